"""What tests of several rooms need: small valid shard sets, written without Ray through the low-level writers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bfm.events.encoding import write_items
from bfm.events.fields import FittedField
from bfm.events.parts import KEYS, column_files, join_column, write_part
from bfm.events.protocol import build_protocol
from bfm.events.repeats import training_repeats
from bfm.events.shards import Manifest, Shards, finish
from bfm.sealed import check_files

DAY_MS = 86_400_000
START_MS = 1_704_067_200_000  # 2024-01-01
NUM_CATEGORIES = 6


@dataclass(frozen=True)
class ToyLog:
    """Raw events of all users, one user after the other, in their final order."""

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    offsets: np.ndarray
    train_end: np.ndarray
    valid_end: np.ndarray


def make_shards(
    directory: Path,
    *,
    users: int = 80,
    items: int = 60,
    seed: int = 0,
    max_events: int = 60,
    clock: bool = True,
    split: str = "time",
    filter_seen: bool = False,
    queries: int | None = None,
    num_parts: int = 1,
    every_kind: bool = False,
    context: bool = True,
) -> Shards:
    """A small finished shard set with protocol. Users like one category each, so models can learn something.

    Baskets share a timestamp (`clock`), or times are positions. Some users have one event; a few items are cold.
    Item fields: item_id (hashed), category (categorical), price (numeric), tags (list); `every_kind` adds title (text),
    look (vector) and released (time). Context fields (`context`): channel (categorical), quantity (numeric, NaNs).
    `split` is "time" or "leave_one_out"; `queries` as in build_protocol.
    """
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    log = _draw_log(rng, users, items, max_events, clock, split)
    item, raw_of_item, train_count = _number_items(log)
    item_fields, encoded = _item_fields(rng, raw_of_item, every_kind)
    context_fields, context_arrays = _context_fields(rng, len(item)) if context else ((), {})
    _write_events(directory, log, item, context_arrays, num_parts)
    first_time = np.full(len(raw_of_item), np.iinfo(np.int64).max)
    np.minimum.at(first_time, item, log.time)
    table = {"item": pa.array([f"item-{raw}" for raw in raw_of_item]), "train_count": train_count}
    write_items(directory, pa.table({**table, "first_time": first_time}), encoded, {})
    draft = Manifest(
        name="toy",
        seed=seed,
        users=users,
        events=len(item),
        items=len(raw_of_item),
        catalogue=int((train_count > 0).sum()),
        has_clock=clock,
        split={"by": split},
        fields=(*item_fields, *context_fields),
        train_events=int(log.train_end.sum()),
        train_targets=int(np.maximum(log.train_end - 1, 0).sum()),
        time_range=(int(log.time.min()), int(log.time.max())),
        rows_read=len(item),
    )
    shards = Shards(directory, draft)
    repeats = training_repeats(shards)
    build_protocol(shards, repeats=repeats, queries=queries, filter_seen=filter_seen, seed=seed)
    finish(directory, draft)
    return Shards.open(directory)


def _draw_log(rng, users, items, max_events, clock, split) -> ToyLog:
    lengths = np.where(rng.random(users) < 0.05, 1, rng.integers(4, max_events + 1, users))
    user = np.repeat(np.arange(users), lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    popularity = 1.0 / (1.0 + np.arange(items)) ** 0.7
    liked = rng.integers(NUM_CATEGORIES, size=users)[user]
    item = np.empty(len(user), np.int64)
    for category in range(NUM_CATEGORIES):
        weights = np.where(np.arange(items) % NUM_CATEGORIES == category, 20.0, 1.0) * popularity
        rows = np.flatnonzero(liked == category)
        item[rows] = rng.choice(items, size=len(rows), p=weights / weights.sum())
    if clock:
        step = np.where(rng.random(len(user)) < 0.4, 0, rng.integers(60_000, 3 * DAY_MS, len(user)))
        step[offsets[:-1]] = rng.integers(0, 60 * DAY_MS, users)
        total = np.cumsum(step)
        time = START_MS + total - (total - step)[offsets[:-1]][user]
    else:
        time = np.arange(len(user)) - offsets[:-1][user]
    if split == "time":
        bounds = np.quantile(time, [0.8, 0.9])
        train_end, valid_end = (np.bincount(user, time < bound, users).astype(np.int64) for bound in bounds)
    else:
        train_end, valid_end = np.where(lengths >= 3, [lengths - 2, lengths - 1], lengths)
    later = np.arange(len(user)) - offsets[:-1][user] >= train_end[user]
    item = np.where(later & (rng.random(len(user)) < 0.04), items + rng.integers(3, size=len(user)), item)
    return ToyLog(user, item, time, offsets, train_end, valid_end)


def _number_items(log: ToyLog) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Item ids by falling training count: events' ids, raw number of each id, its training count."""
    in_train = np.arange(len(log.user)) - log.offsets[:-1][log.user] < log.train_end[log.user]
    raw, where = np.unique(log.item, return_inverse=True)
    count = np.bincount(where, in_train, len(raw)).astype(np.int64)
    order = np.lexsort((raw, -count))
    rank = np.empty(len(raw), np.int64)
    rank[order] = np.arange(len(raw))
    return rank[where], raw[order], count[order]


def _item_fields(rng, raw, every_kind) -> tuple[tuple[FittedField, ...], dict[str, np.ndarray]]:
    num = len(raw)
    price = np.exp(rng.normal(2.0, 1.0, num)).astype(np.float32)
    price[rng.random(num) < 0.1] = np.nan
    warped = np.log1p(price[~np.isnan(price)])
    edges = tuple(float(edge) for edge in np.unique(np.quantile(warped, np.linspace(0.1, 0.9, 8))))
    tags = np.where(rng.random((num, 4)) < 0.6, rng.integers(2, 12, (num, 4)), 0)
    fields = [
        FittedField("item_id", "item", "hashed", rows=1024, columns=2),
        FittedField("category", "item", "categorical", rows=2 + NUM_CATEGORIES),
        FittedField("price", "item", "numeric", edges=edges, mean=float(warped.mean()), std=float(warped.std())),
        FittedField("tags", "item", "list", rows=12, columns=4),
    ]
    arrays = {
        "item_id": rng.integers(1, 1024, (num, 2)).astype(np.int32),
        "category": (2 + raw % NUM_CATEGORIES).astype(np.int32),
        "price": price,
        "tags": -np.sort(-tags, axis=1).astype(np.int32),
    }
    if every_kind:
        fields += [
            FittedField("title", "item", "text", rows=64, columns=6),
            FittedField("look", "item", "vector", columns=3),
            FittedField("released", "item", "time"),
        ]
        words = np.arange(6) < rng.integers(0, 7, (num, 1))
        arrays["title"] = np.where(words, rng.integers(2, 64, (num, 6)), 0).astype(np.int32)
        arrays["look"] = rng.normal(size=(num, 3)).astype(np.float32)
        arrays["released"] = START_MS - rng.integers(0, 1000 * DAY_MS, num)
    return tuple(fields), arrays


def _context_fields(rng, num) -> tuple[tuple[FittedField, ...], dict[str, np.ndarray]]:
    quantity = rng.integers(0, 6, num).astype(np.float32)
    quantity[rng.random(num) < 0.1] = np.nan
    warped = np.log1p(quantity[~np.isnan(quantity)])
    edges = tuple(float(edge) for edge in np.log1p([1, 2, 3, 4]))
    fields = (
        FittedField("channel", "context", "categorical", rows=5),
        FittedField("quantity", "context", "numeric", edges=edges, mean=float(warped.mean()), std=float(warped.std())),
    )
    return fields, {"channel": rng.integers(0, 5, num).astype(np.int32), "quantity": quantity}


def _write_events(directory, log, item, context, num_parts) -> None:
    bounds = np.linspace(0, len(log.train_end), num_parts + 1).astype(int)
    with TemporaryDirectory() as scratch:
        parts = [Path(scratch, str(index)) for index in range(num_parts)]
        for part, (low, high) in zip(parts, itertools.pairwise(bounds), strict=True):
            rows = slice(log.offsets[low], log.offsets[high])
            write_part(
                part,
                item=item[rows],
                time=log.time[rows],
                context={name: values[rows] for name, values in context.items()},
                user_offsets=log.offsets[low : high + 1] - log.offsets[low],
                train_end=log.train_end[low:high],
                valid_end=log.valid_end[low:high],
                users=pa.array([f"user-{number}" for number in range(low, high)], pa.string()),
            )
        for name in column_files(parts[0]):
            join_column(parts, directory, name)


@dataclass(frozen=True)
class History:
    """One user's events."""

    item: np.ndarray
    time: np.ndarray
    context: dict[str, np.ndarray]
    train_end: int
    valid_end: int


def open_verified(place: str | Path) -> Shards:
    """A shard set, the sum of every file compared."""
    shards = Shards.open(place)
    check_files(shards.path, shards.manifest.files)
    return shards


def history_of(shards: Shards, user: int) -> History:
    """All events of one user."""
    events = np.arange(shards.user_starts[user], shards.user_starts[user + 1])
    context = {field.name: shards.context_at(field.name, events) for field in shards.context_fields}
    ends = int(shards.train_lengths[user]), int(shards.valid_lengths[user])
    return History(shards.item_at(events), shards.time_at(events), context, *ends)


def user_keys(shards: Shards) -> pa.ChunkedArray:
    """Original user keys [U] in global order."""
    return pq.read_table(shards.path / KEYS)["user"]


def published(name: str) -> Path:
    """A table that others published, where the checkout has it beside it; the test is skipped where not."""
    root = Path(__file__).resolve().parents[1]
    for folder in (root / "shared", root.parent / "shared"):
        if (folder / "external" / name).is_file():
            return folder / "external" / name
    pytest.skip(f"shared/external/{name} is not beside this checkout")
