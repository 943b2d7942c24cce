"""Who is an item and what it is like: ids, counts and one value per field, from partial statistics of partitions.

Catalogue items (at least one training event) have the ids 0..V-1 by falling training count, ties by key; items first
seen after the split follow by first time, ties by key. A field's value is the most frequent one among the item's
training events (ties: the smaller text); a cold item has the first value known for it. Everything is item-level: one
row per (item, value), never per event. Keys compare as UTF-8 bytes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bfm.events.clean import Faults, field_values, item_key, to_text
from bfm.events.parse import SEPARATOR, plain
from bfm.events.schema import EventSchema, ItemPart

_TEXT = pa.large_string()


@dataclass(frozen=True)
class Items:
    """All items in id order."""

    keys: pa.Array
    """Large strings [I]."""
    train_count: np.ndarray
    """Int64 [I]."""
    first_time: np.ndarray
    """Int64 [I], over all events."""

    @property
    def catalogue(self) -> int:
        """V: items with a training event."""
        return int(np.count_nonzero(self.train_count))

    def ids(self, keys: pa.Array) -> np.ndarray:
        """Int32 ids of keys (or of dictionary codes); every key must be known."""
        if pa.types.is_dictionary(keys.type):
            return self.ids(keys.dictionary)[keys.indices.to_numpy(zero_copy_only=False)]
        found = pc.index_in(keys, value_set=self.keys)
        assert found.null_count == 0, "an event's item is missing from the item statistics"
        return found.to_numpy(zero_copy_only=False)


@dataclass(frozen=True)
class Values:
    """One field's chosen values in id order."""

    texts: pa.Array
    """Large strings [I], null where nothing is known; see clean.to_text."""
    conflicts: int
    """Training events whose known value is not the chosen one."""


def count_items(item: pa.DictionaryArray, time: np.ndarray, train: np.ndarray) -> pa.Table:
    """Partial: item, train_count, first_time of one partition (`train`: bool [E])."""
    codes = item.indices.to_numpy()
    num = len(item.dictionary)
    first = np.full(num, np.iinfo(np.int64).max)
    np.minimum.at(first, codes, time)
    counts = np.bincount(codes[train], minlength=num)
    return pa.table({"item": item.dictionary, "train_count": counts, "first_time": first})


def count_values(
    item: pa.DictionaryArray, value: pa.DictionaryArray, time: np.ndarray, row_hash: np.ndarray, train: np.ndarray
) -> pa.Table:
    """Partial: item, value, count over training events; and for items without any here, the first known value.

    The latter has count 0, and `first_time` and `first_hash` that say which of several partitions saw it first.
    """
    known = value.is_valid().to_numpy(zero_copy_only=False)
    codes = item.indices.to_numpy()
    value_codes = value.indices.fill_null(0).to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(known & train)
    num_values = max(len(value.dictionary), 1)
    pairs, counts = np.unique(codes[rows].astype(np.int64) * num_values + value_codes[rows], return_counts=True)
    is_cold = np.bincount(codes[train], minlength=len(item.dictionary)) == 0
    late = np.flatnonzero(known & is_cold[codes])
    late = late[np.lexsort((row_hash[late], time[late], codes[late]))]
    late = late[np.diff(codes[late], prepend=-1) != 0]
    item_codes = np.concatenate([pairs // num_values, codes[late]])
    chosen = np.concatenate([pairs % num_values, value_codes[late]])
    zeros = np.zeros(len(pairs), np.int64)
    return pa.table(
        {
            "item": item.dictionary.take(pa.array(item_codes)),
            "value": value.dictionary.take(pa.array(chosen)),
            "count": np.concatenate([counts, np.zeros(len(late), np.int64)]),
            "first_time": np.concatenate([zeros, time[late]]),
            "first_hash": np.concatenate([zeros.astype(np.uint64), row_hash[late]]),
        }
    )


def merge_items(partials: list[pa.Table]) -> Items:
    """All items from the partials of all partitions."""
    merged = pa.concat_tables(partials).group_by("item").aggregate([("train_count", "sum"), ("first_time", "min")])
    counts = merged["train_count_sum"].to_numpy()
    first = merged["first_time_min"].to_numpy()
    keys = plain(merged["item"])
    order = np.lexsort((_ranks(keys), np.where(counts > 0, 0, first), -counts))
    return Items(keys.take(pa.array(order)), counts[order], first[order])


def choose_values(partials: list[pa.Table], items: Items) -> Values:
    """One field's values from the partials of all partitions."""
    table = pa.concat_tables(partials)
    if table.num_rows == 0:
        return Values(pa.nulls(len(items.keys), _TEXT), 0)
    warm = table.filter(pc.greater(table["count"], 0)).group_by(["item", "value"]).aggregate([("count", "sum")])
    item, counts = items.ids(plain(warm["item"])), warm["count_sum"].to_numpy()
    values = plain(warm["value"])
    order = np.lexsort((_ranks(values), -counts, item))
    best = order[np.diff(item[order], prepend=-1) != 0]
    conflicts = int(counts.sum() - counts[best].sum())
    cold = table.filter(pc.equal(table["count"], 0))
    cold_item = items.ids(plain(cold["item"]))
    # Cold in one partition, known from another's training events: the training range decides.
    cold = cold.filter(pa.array(cold_item >= items.catalogue))
    cold_item = cold_item[cold_item >= items.catalogue]
    late_values = plain(cold["value"])
    order = np.lexsort((_ranks(late_values), cold["first_hash"].to_numpy(), cold["first_time"].to_numpy(), cold_item))
    first = order[np.diff(cold_item[order], prepend=-1) != 0]
    where = np.full(len(items.keys), -1, np.int64)
    where[item[best]] = best
    where[cold_item[first]] = len(values) + first
    pool = plain(pa.chunked_array([values, late_values]))
    return Values(pool.take(pa.array(where, mask=where < 0)), conflicts)


@dataclass(frozen=True)
class Joined:
    """The item table's values for the items of the log."""

    texts: dict[str, pa.Array]
    """Field -> large strings [I]."""
    items_without_row: int
    rows_with_a_used_key: int
    """Rows of the table whose key an earlier row has: not used."""
    repairs: Counter[tuple[str, str]]


def join_item_table(schema: EventSchema, raw: pa.Table, names: list[str], items: Items) -> Joined:
    """Values of the fields that an item table holds; of rows with one key, the first counts."""
    assert schema.items is not None
    keys = item_key(raw, [ItemPart(column=column) for column in schema.items.key], Faults(raw.num_rows))
    found = pc.index_in(items.keys, value_set=keys)
    repairs: Counter[tuple[str, str]] = Counter()
    texts = {}
    for name in names:
        spec = schema.item_fields[name]
        texts[name] = to_text(field_values(plain(raw[spec.column]), spec, name, repairs)).take(found)
    used_twice = len(keys) - keys.null_count - pc.count_distinct(keys, mode="only_valid").as_py()
    return Joined(texts, found.null_count, used_twice, repairs)


def key_columns(schema: EventSchema, items: Items) -> dict[str, pa.Array]:
    """The parts of the keys [I], one column per item column."""
    if len(schema.item) == 1:
        return {f"key_{schema.item[0].column}": items.keys}
    parts = pc.split_pattern(items.keys, SEPARATOR)
    return {f"key_{part.column}": pc.list_element(parts, index) for index, part in enumerate(schema.item)}


def _ranks(texts: pa.Array) -> np.ndarray:
    """Int64 [n]: place of each text in byte order; equal texts share it."""
    if len(texts) == 0:
        return np.zeros(0, np.int64)
    return pc.rank(texts, tiebreaker="dense").to_numpy()
