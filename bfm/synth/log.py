"""Synthetic logs with known structure, of any length, with the NLL and recall@10 that no model can beat.

Writes <out>/events/part-*.parquet, <out>/items.parquet (features that carry the interests), <out>/schema.yaml (prepares
the log) and, last, <out>/truth.json. The world is that of bayes.py. Memory: one chunk of users plus O(users + items).

The truth answers the platform's prediction question, given the full history, what comes at the next later timestamp,
for baskets in the last 20 % of the time range. Its values are averages of exact expectations of the protocol's NLL and
recall@10 over sampled users' histories, with user-clustered standard errors. Context fields carry nothing, item fields
nothing beyond what the item itself says, so the bound holds for models that use them.

Shapes: U users, E events, B baskets, N users at one step, V items, K values of a field.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.special import entr

from bfm.errors import UserError
from bfm.files import write_atomic, write_json
from bfm.ragged import chunks, runs
from bfm.randomness import generator
from bfm.synth.world import BayesFilter, World, WorldSpec, histories

TRUTH = "truth.json"
_CHUNK_EVENTS = 500_000
# A user's last purchases and belief take the memory of about so many events.
_USER_EVENTS = 5
_TRUTH_USERS = 4_000
_TRUTH_EVENTS = 400_000
# Baskets times items: an evaluated basket asks for every item.
_TRUTH_NUMBERS = 500_000_000
_PIECE_NUMBERS = 1 << 21
_EVALUATED_SHARE = 0.2
_TOP = 10
_METRICS = ("nll", f"recall@{_TOP}")
_START_MS = 1_672_531_200_000  # 2023-01-01
_SPAN_MS = 365 * 86_400_000
_LENGTH_STREAM, _CHUNK_STREAM, _ITEM_STREAM = 1, 2, 3
_CHANNELS = ("web", "app", "store")
_SCHEMA = """\
# A synthetic log: baskets, latent interests, Zipf popularity, repeat purchases. Its optimum stands in truth.json.
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
    interests: int | None = None,
    repeat: float = WorldSpec.repeat,
    basket: float = WorldSpec.basket,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Write a log and return its truth.

    Args:
        path: a new or empty directory.
        events: exact number of events, at least `users`; every user has one or more.
        users, items: numbers of users and of items that may occur.
        seed: everything is a function of the arguments.
        interests: hidden interests, at most `items`; None: 16, or `items` where there are fewer.
        repeat: probability that an item repeats the user's last purchase in its aisle, where there is one.
        basket: mean of the geometric law of basket sizes, cut at 1 + 4 (basket - 1) and at `items`; 1: no baskets.
        progress: called with the number of events written so far.

    Raises:
        UserError: numbers that do not fit together, or a directory that already holds a log.
    """
    interests = min(WorldSpec.interests, items) if interests is None else interests
    spec = WorldSpec(items=items, seed=seed, interests=interests, repeat=repeat, basket=basket)
    _check(path, events, users, spec)
    world = World(spec)
    path.mkdir(parents=True, exist_ok=True)
    pq.write_table(_item_table(world), path / "items.parquet")
    lengths_U = _history_lengths(seed, events, users)
    numbers = int(events / basket * items)
    stride = max(1, users // _TRUTH_USERS, events // _TRUTH_EVENTS, numbers // _TRUTH_NUMBERS)
    sums = []
    done = 0
    (path / "events").mkdir()
    for chunk, (low, high) in enumerate(chunks(lengths_U + _USER_EVENTS, _CHUNK_EVENTS)):
        rng = generator(seed, _CHUNK_STREAM, chunk)
        lengths = lengths_U[low:high]
        size_B, baskets_U = world.draw_sizes(rng, lengths)
        time_B = _times(rng, baskets_U)
        item_E, of_chunk = _draw(world, rng, size_B, baskets_U, time_B, np.arange(low, high) % stride == 0)
        table = _event_table(rng, np.repeat(np.arange(low, high), lengths), item_E, np.repeat(time_B, size_B))
        pq.write_table(table, path / "events" / f"part-{chunk:05d}.parquet")
        sums.append(of_chunk)
        done += len(item_E)
        progress(done)
    write_atomic(path / "schema.yaml", _SCHEMA.encode())
    result = {"events": events, "users": users, "world": asdict(spec), **_truth(np.hstack(sums))}
    # Of a predictor that ignores the history: a repeated item has the marginal of the purchase it repeats.
    result["marginal_nll"] = float(entr(BayesFilter(world, 1).probability()).sum())
    write_json(path / TRUTH, result)
    return result


def _draw(
    world: World,
    rng: np.random.Generator,
    size_B: np.ndarray,
    baskets_U: np.ndarray,
    time_B: np.ndarray,
    chosen_U: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Items [E] of all baskets, and [3, U]: number of each chosen user's evaluated baskets, sums of their metrics."""
    start_B, first_U = np.cumsum(size_B) - size_B, np.cumsum(baskets_U) - baskets_U
    late_B = time_B >= _START_MS + (1 - _EVALUATED_SHARE) * _SPAN_MS
    item_E, sums_U = np.empty(int(size_B.sum()), np.int32), np.zeros((1 + len(_METRICS), len(baskets_U)))
    for predictor, user_N, basket_N, bought_E in histories(world, rng, size_B, baskets_U):
        item_E[runs(start_B[basket_N], size_B[basket_N])] = bought_E
        asked = user_N[chosen_U[user_N] & late_B[basket_N] & (basket_N > first_U[user_N])]
        sums_U[0, asked] += 1
        sums_U[1:, asked] += expected(predictor, asked)
    return item_E, sums_U


def expected(predictor: BayesFilter, users: np.ndarray, k: int = _TOP) -> np.ndarray:
    """[2, N]: nll and recall@k that the optimal predictor expects of users' next baskets."""
    num_items = predictor.world.spec.items
    nll_N, recall_N = np.zeros((2, len(users)))
    step = max(1, _PIECE_NUMBERS // num_items)
    for start in range(0, len(users), step):
        rows = slice(start, start + step)
        q_NV = predictor.probability(users[rows])
        nll_N[rows] = entr(q_NV).sum(axis=1)
        recall_N[rows] = -np.partition(-q_NV, min(k, num_items) - 1)[:, :k].sum(axis=1)
    return np.stack([nll_N, recall_N])


def _check(path: Path, events: int, users: int, spec: WorldSpec) -> None:
    if users < 1 or spec.items < 1 or events < users:
        raise UserError(
            f"{events} events, {users} users and {spec.items} items do not fit together",
            key="events",
            fix="give at least one user, one item and as many events as users",
        )
    if not 1 <= spec.interests <= spec.items:
        raise UserError(f"{spec.interests} interests, {spec.items} items", key="interests", fix="give from 1 to items")
    if not 0 <= spec.repeat <= 1:
        raise UserError(f"{spec.repeat} is no probability", key="repeat", fix="give from 0 to 1")
    if not 1 <= spec.basket < math.inf:
        raise UserError(f"{spec.basket} is no mean size of baskets", key="basket", fix="give 1 (no baskets) or more")
    if (path / TRUTH).exists() or (path / "events").exists():
        raise UserError("already holds a synthetic log", file=str(path), fix="give a new directory or remove it")


def _history_lengths(seed: int, events: int, users: int) -> np.ndarray:
    """Int64 [U], log-normal, at least 1, with the exact sum."""
    total = np.cumsum(generator(seed, _LENGTH_STREAM).lognormal(0.0, 1.0, users))
    ends = np.floor(total / total[-1] * (events - users) + 0.5).astype(np.int64)
    return 1 + np.diff(ends, prepend=0)


def _times(rng: np.random.Generator, baskets_U: np.ndarray) -> np.ndarray:
    """Milliseconds [B]: each user's baskets are sorted uniform draws over the span, a millisecond apart at least."""
    user_B, fraction_B = np.repeat(np.arange(len(baskets_U)), baskets_U), rng.random(int(baskets_U.sum()))
    fraction_B = fraction_B[np.lexsort((fraction_B, user_B))]
    return _START_MS + np.floor(fraction_B * _SPAN_MS).astype(np.int64) + runs(0, baskets_U)


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
    rng = generator(spec.seed, _ITEM_STREAM)
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


def _truth(sums_U: np.ndarray) -> dict[str, Any]:
    """Means over evaluated baskets with user-clustered standard errors; None where none was evaluated."""
    queries_U, *values = sums_U[:, sums_U[0] > 0]
    count = queries_U.sum()
    figures: dict[str, Any] = {"evaluated_queries": int(count), "evaluated_users": len(queries_U)}
    for name, sum_U in zip(_METRICS, values, strict=True):
        mean = float(sum_U.sum() / count) if count else None
        deviation = None if mean is None else float(np.sqrt(np.sum((sum_U - mean * queries_U) ** 2)) / count)
        figures |= {f"bayes_{name}": mean, f"bayes_{name}_error": deviation}
    return figures
