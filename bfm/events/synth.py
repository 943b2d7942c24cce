"""Synthetic logs with known structure, of any length, with the NLL and recall@10 that no model can beat.

Writes <out>/events/part-*.parquet, <out>/items.parquet (features that carry the interests), <out>/schema.yaml (prepares
the log) and, last, <out>/truth.json. The world is that of bayes.py. Memory: one chunk of users plus O(users + items).

The truth answers the platform's prediction question, given the full history, which item comes next, for events in the
last 20 % of the time range (no user has two events at one time). Its values are averages of exact conditional
entropies and top-10 masses over sampled users' histories, with user-clustered standard errors: over events, and (as a
protocol with about one query per user weighs them) over users' means. `optimum` gives the values at the very queries of
a prepared log's protocol. Context fields carry nothing, item fields nothing beyond what the item itself says, so the
bound holds for models that use them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bfm.errors import UserError
from bfm.events.bayes import BayesFilter, World, WorldSpec
from bfm.events.mixing import stream_key
from bfm.events.protocol import QueryTable
from bfm.events.shards import Shards
from bfm.files import write_atomic, write_json

TRUTH = "truth.json"
_CHUNK_EVENTS = 500_000
_FILE_EVENTS = 8_000_000
_TRUTH_USERS = 4_000
_TRUTH_EVENTS = 400_000
_EVALUATED_SHARE = 0.2
_TOP = 10
_START_MS = 1_672_531_200_000  # 2023-01-01
_SPAN_MS = 365 * 86_400_000
_LENGTH_STREAM, _CHUNK_STREAM, _ITEM_STREAM = 1, 2, 3
_CHANNELS = ("web", "app", "store")
_SCHEMA = """\
# A synthetic log: latent interests, Zipf popularity, repeat purchases. Its optimum stands in truth.json.
name: synthetic
user: user_id
time: timestamp
item: item_id
items: {path: items.parquet, key: item_id}
item_fields:
  category: categorical
  brand: categorical
  price: numeric
  tags: list
  title: text
context_fields:
  channel: categorical
  quantity: numeric
# The optimum knows of no filter.
evaluation: {filter_seen: false}
"""


def write_synthetic(
    path: Path,
    *,
    events: int,
    users: int,
    items: int,
    seed: int = 0,
    interests: int = 16,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write a log and return its truth.

    Args:
        path: a new or empty directory.
        events: exact number of events, at least `users`; every user has one or more.
        users, items: numbers of users and of items that may occur.
        seed: everything is a function of the arguments.
        interests: hidden interests, at most `items`.
        progress: called with the number of events written so far.

    Raises:
        UserError: numbers that do not fit together, or a directory that already holds a log.
    """
    _check(path, events, users, items, interests)
    world = World(WorldSpec(items=items, seed=seed, interests=interests))
    path.mkdir(parents=True, exist_ok=True)
    pq.write_table(_item_table(world), path / "items.parquet")
    lengths_U = _history_lengths(seed, events, users)
    truth = _Truth(world, stride=max(1, users // _TRUTH_USERS, events // _TRUTH_EVENTS))
    with _EventFiles(path / "events") as files:
        for chunk, (low, high) in enumerate(_chunks(lengths_U)):
            rng = np.random.Generator(np.random.Philox(key=int(stream_key(seed, _CHUNK_STREAM, chunk))))
            lengths = lengths_U[low:high]
            item, time = world.draw_histories(rng, lengths), _times(rng, lengths)
            files.write(_event_table(rng, np.repeat(np.arange(low, high), lengths), item, time))
            truth.add(low, lengths, item, time)
            if progress is not None:
                progress(files.events)
    write_atomic(path / "schema.yaml", _SCHEMA.encode())
    result = {"events": events, "users": users, "world": asdict(world.spec), **truth.result()}
    write_json(path / TRUTH, result)
    return result


def optimum(shards: Shards, queries: QueryTable, truth: dict[str, Any], k: int = _TOP) -> tuple[np.ndarray, np.ndarray]:
    """Float64 [Q], [Q]: expected NLL (nats, over all items) and recall@k of the optimal predictor at each query.

    Args:
        shards: the synthetic log, prepared by its schema.
        queries: of its protocol; one sweep over the histories of their users.
        truth: what truth.json holds.
    """
    world = World(WorldSpec(**truth["world"]))
    raw_V = pc.cast(shards.items_table(["item_id"])["item_id"], pa.int64()).to_numpy()
    users, slot_Q = np.unique(queries.user, return_inverse=True)
    needed = np.zeros(len(users), np.int64)
    np.maximum.at(needed, slot_Q, queries.position + 1)
    by_length = np.argsort(-needed, kind="stable")
    rank_Q = np.argsort(by_length)[slot_Q]
    start, falling = shards.user_starts[users[by_length]], needed[by_length]
    by_position = np.argsort(queries.position, kind="stable")
    cuts = np.searchsorted(queries.position[by_position], np.arange(int(needed.max(initial=0)) + 1))
    nll_Q, recall_Q = np.zeros(len(queries)), np.zeros(len(queries))
    predictor = BayesFilter(world, len(users))
    for step in range(len(cuts) - 1):
        active = int(np.searchsorted(-falling, -step, side="left"))
        predictor.observe(raw_V[shards.take_item(shards.locate(start[:active] + step))])
        asked = by_position[cuts[step] : cuts[step + 1]]
        if len(asked):
            view = predictor.subset(rank_Q[asked])
            nll_Q[asked], recall_Q[asked] = view.entropy(), view.top_mass(k)
    return nll_Q, recall_Q


def _check(path: Path, events: int, users: int, items: int, interests: int) -> None:
    if users < 1 or items < 1 or events < users:
        raise UserError(
            f"{events} events, {users} users and {items} items do not fit together",
            key="events",
            fix="give at least one user, one item and as many events as users",
        )
    if not 1 <= interests <= items:
        raise UserError(f"{interests} interests for {items} items", key="interests", fix="give from 1 to items")
    if (path / TRUTH).exists() or (path / "events").exists():
        raise UserError("already holds a synthetic log", file=str(path), fix="give a new directory or remove it")


def _history_lengths(seed: int, events: int, users: int) -> np.ndarray:
    """Int64 [U], log-normal, at least 1, with the exact sum."""
    rng = np.random.Generator(np.random.Philox(key=int(stream_key(seed, _LENGTH_STREAM))))
    total = np.cumsum(rng.lognormal(0.0, 1.0, users))
    ends = np.floor(total / total[-1] * (events - users) + 0.5).astype(np.int64)
    return 1 + np.diff(ends, prepend=0)


def _chunks(lengths_U: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of users with about the same number of events each."""
    ends = np.cumsum(lengths_U)
    low = 0
    while low < len(lengths_U):
        before = int(ends[low - 1]) if low else 0
        high = max(low + 1, int(np.searchsorted(ends, before + _CHUNK_EVENTS, side="right")))
        yield low, high
        low = high


def _times(rng: np.random.Generator, lengths: np.ndarray) -> np.ndarray:
    """Milliseconds [E]: each user's events are sorted uniform draws over the span, a millisecond apart at least."""
    # Normalised partial sums of exponentials are sorted uniforms, without sorting.
    gaps = rng.exponential(size=int(lengths.sum()) + len(lengths))
    ends = np.cumsum(lengths + 1)
    total = np.cumsum(gaps)
    last = total[ends - 1]
    before = np.concatenate([[0.0], last[:-1]])
    fraction = (total - np.repeat(before, lengths + 1)) / np.repeat(last - before, lengths + 1)
    keep = np.ones(len(gaps), np.bool_)
    keep[ends - 1] = False
    step = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return _START_MS + np.floor(fraction[keep] * _SPAN_MS).astype(np.int64) + step


def _event_table(rng: np.random.Generator, user: np.ndarray, item: np.ndarray, time: np.ndarray) -> pa.Table:
    channel = pa.DictionaryArray.from_arrays(rng.integers(0, len(_CHANNELS), len(user), np.int8), list(_CHANNELS))
    return pa.table(
        {
            "user_id": user.astype(np.int64),
            "timestamp": pa.array(time, pa.timestamp("ms")),
            "item_id": item.astype(np.int64),
            "channel": channel.cast(pa.string()),
            "quantity": 1 + rng.poisson(0.5, len(user)),
        }
    )


def _item_table(world: World) -> pa.Table:
    """Features: category is the cluster in nine of ten items; brand, price, tags and title lean to it."""
    spec, cluster_V = world.spec, world.cluster_V
    rng = np.random.Generator(np.random.Philox(key=int(stream_key(spec.seed, _ITEM_STREAM))))
    astray = rng.random(spec.items) < 0.1
    category = np.where(astray, rng.integers(0, spec.interests, spec.items), cluster_V)
    brand = cluster_V * 8 + rng.integers(0, 8, spec.items)
    level_M = rng.normal(2.5, 0.8, spec.interests)
    price = np.exp(level_M[cluster_V] + rng.normal(0.0, 0.3, spec.items)).round(2)
    tag_VK = cluster_V[:, None] * 20 + rng.integers(0, 20, (spec.items, 3))
    word_VK = np.where(rng.random((spec.items, 3)) < 0.5, tag_VK, rng.integers(0, 20 * spec.interests, (spec.items, 3)))
    tags = pa.ListArray.from_arrays(np.arange(spec.items + 1, dtype=np.int32) * 3, _named("t", tag_VK.ravel()))
    words = [_named("w", word_VK[:, column]) for column in range(3)]
    return pa.table(
        {
            "item_id": np.arange(spec.items),
            "category": _named("c", category),
            "brand": _named("b", brand),
            "price": price,
            "tags": tags,
            "title": pc.binary_join_element_wise(*words, " "),
        }
    )


def _named(prefix: str, numbers: np.ndarray) -> pa.Array:
    return pc.binary_join_element_wise(prefix, pa.array(numbers).cast(pa.string()), "")


class _EventFiles:
    """Parquet files of bounded size, one row group per chunk."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.directory, self.events = directory, 0
        self._files, self._in_file = 0, 0
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> _EventFiles:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, table: pa.Table) -> None:
        """Append a chunk; opens the next file where this one is full."""
        if self._writer is None or self._in_file >= _FILE_EVENTS:
            if self._writer is not None:
                self._writer.close()
            name = self.directory / f"part-{self._files:05d}.parquet"
            self._writer = pq.ParquetWriter(name, table.schema)
            self._files, self._in_file = self._files + 1, 0
        self._writer.write_table(table)
        self._in_file += table.num_rows
        self.events += table.num_rows


@dataclass
class _Truth:
    """Accumulates exact expectations over every `stride`-th user."""

    world: World
    stride: int
    sums: list[np.ndarray] = field(default_factory=list)
    """Per chunk [n, 3]: each user's evaluated events, sum of entropies, sum of top-10 masses."""

    def add(self, low: int, lengths: np.ndarray, item: np.ndarray, time: np.ndarray) -> None:
        """Evaluate the sampled users of a chunk that begins at user `low`."""
        chosen = np.flatnonzero((np.arange(low, low + len(lengths)) % self.stride) == 0)
        if len(chosen):
            chosen = chosen[np.argsort(-lengths[chosen], kind="stable")]
            start = (np.cumsum(lengths) - lengths)[chosen]
            self.sums.append(self._walk(start, lengths[chosen], item, time))

    def _walk(self, start: np.ndarray, falling: np.ndarray, item: np.ndarray, time: np.ndarray) -> np.ndarray:
        cut = _START_MS + (1 - _EVALUATED_SHARE) * _SPAN_MS
        sums = np.zeros((len(start), 3))
        predictor = BayesFilter(self.world, len(start))
        for step in range(int(falling[0]) - 1):
            # Users with a next event; they have seen `step + 1` events when they predict it.
            active = int(np.searchsorted(-falling, -(step + 1), side="left"))
            predictor.observe(item[start[:active] + step])
            rows = np.flatnonzero(time[start[:active] + step + 1] >= cut)
            if len(rows):
                view = predictor.subset(rows)
                sums[rows] += np.stack([np.ones(len(rows)), view.entropy(), view.top_mass(_TOP)], axis=1)
        return sums

    def result(self) -> dict[str, Any]:
        """Means over evaluated events with user-clustered standard errors; None where no event was evaluated."""
        sums = np.concatenate(self.sums)
        count = sums[:, 0].sum()
        figures: dict[str, Any] = {"evaluated_events": int(count), "evaluated_users": int((sums[:, 0] > 0).sum())}
        for column, name in ((1, "bayes_nll"), (2, f"bayes_recall@{_TOP}")):
            mean = sums[:, column].sum() / count if count else None
            deviation = None if mean is None else np.sqrt(np.sum((sums[:, column] - mean * sums[:, 0]) ** 2)) / count
            per_user = sums[sums[:, 0] > 0, column] / sums[sums[:, 0] > 0, 0]
            figures[name] = None if mean is None else float(mean)
            figures[f"{name}_error"] = None if deviation is None else float(deviation)
            figures[f"{name}_user_mean"] = float(per_user.mean()) if count else None
        return {**figures, "marginal_nll": self.world.marginal_nll}
