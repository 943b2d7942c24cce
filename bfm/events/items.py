"""Who is an item and what it is like: ids, counts and one value per field, from partial statistics of partitions.

Catalogue items (at least one training event) have the ids 0..V-1 by falling training count, ties by key; items first
seen after the split follow by first time, ties by key. A field's value is the most frequent one among the item's
training events (ties: the smaller text); a cold item has the first value known for it. Everything is item-level: one
row per (item, value), never per event. Keys compare as UTF-8 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bfm.events.clean import Losses, column_of, field_values, item_key, join_key, to_text
from bfm.events.encoding import KEY, Encoding
from bfm.events.schema import EventSchema, ItemPart
from bfm.events.times import TimeRange, check_clock, guessed_range, merged
from bfm.ragged import begins
from bfm.tables.pieces import read_file
from bfm.tables.values import SEPARATOR, plain

ITEM_ID, POPULARITY = "item_id", "popularity"
"""The item fields that every schema may have."""


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

    @property
    def train_events(self) -> int:
        """Training events of all items."""
        return int(self.train_count.sum())


def item_ids(keys: pa.Array, known: pa.Array) -> np.ndarray:
    """Int32 places of keys (or of dictionary codes) among the keys [I] of all items; every key must be there."""
    if pa.types.is_dictionary(keys.type):
        return item_ids(keys.dictionary, known)[keys.indices.to_numpy(zero_copy_only=False)]
    found = pc.index_in(keys, value_set=known)
    assert found.null_count == 0, "an event's item is missing from the item statistics"
    return found.to_numpy(zero_copy_only=False)


def count_items(events: pa.Table) -> pa.Table:
    """A row per item of events (item, train_count: 1 or 0, first_time: their time), or of such rows of partitions."""
    return summed(events, ["item"], {"train_count": "sum", "first_time": "min"})


def count_values(events: pa.Table) -> pa.Table:
    """A row per item and known value of events; first_hash is the hash of the row that breaks ties in time."""
    by_time = [("first_time", "ascending"), ("first_hash", "ascending")]
    known = events.filter(events["value"].is_valid()).sort_by(by_time)
    return summed(known, ["item", "value"], {"train_count": "sum", "first_time": "first", "first_hash": "first"})


def summed(events: pa.Table, keys: list[str], aggregates: dict[str, str]) -> pa.Table:
    """A row per combination of keys, in the order of the first ones; aggregates: column -> how it is combined."""
    groups = events.group_by(keys, use_threads=False).aggregate(list(aggregates.items()))
    numbers = {name: groups[f"{name}_{how}"] for name, how in aggregates.items()}
    return pa.table({key: plain(groups[key]) for key in keys} | numbers)


def merge_items(partials: list[pa.Table]) -> Items:
    """All items from what `count_items` found in all partitions."""
    items = count_items(pa.concat_tables(partials))
    cold_time = pc.if_else(pc.greater(items["train_count"], 0), 0, items["first_time"])
    order = [("train_count", "descending"), ("cold_time", "ascending"), ("item", "ascending")]
    items = items.append_column("cold_time", cold_time).sort_by(order)
    return Items(plain(items["item"]), items["train_count"].to_numpy(), items["first_time"].to_numpy())


def choose_values(partials: list[pa.Table], items: Items) -> tuple[pa.Array, int]:
    """One field's values from what `count_values` found in all partitions.

    Returns:
        large strings [I] in id order, null where nothing is known (see clean.to_text), and the number of training
        events whose known value is not the chosen one.
    """
    table = count_values(pa.concat_tables(partials))
    item, count = item_ids(plain(table["item"]), items.keys), table["train_count"].to_numpy()
    first = {name: np.where(count > 0, 0, table[name].to_numpy()) for name in ("first_time", "first_hash")}
    found = pa.table({"item": item, "count": count, **first, "value": table["value"]})
    # What only later events say of a catalogue item does not count.
    found = found.filter(pa.array((count > 0) | (item >= items.catalogue)))
    order = {"item": "ascending", "count": "descending", **dict.fromkeys((*first, "value"), "ascending")}
    found = found.sort_by(list(order.items()))
    item, count = found["item"].to_numpy(), found["count"].to_numpy()
    best = np.flatnonzero(begins(item))
    where = np.full(len(items.keys), -1)
    where[item[best]] = best
    chosen = plain(found["value"]).take(pa.array(where, mask=where < 0))
    return chosen, int(count.sum() - count[best].sum())


def join_item_table(
    schema: EventSchema, path: str, names: list[str], items: Items, losses: Losses
) -> tuple[dict[str, pa.Array], dict[str, Any]]:
    """Values of the fields that an item table holds; of rows with one key, the first counts.

    Returns:
        field -> large strings [I], and what did not fit together, for the manifest's checks.

    Raises UserError where a field's times look like something else.
    """
    assert schema.items is not None
    columns = [*schema.items.key, *(schema.item_fields[name].column for name in names)]
    parts = [ItemPart(column=column) for column in schema.items.key]
    none = pa.array([], pa.large_string())
    keys_of, texts_of, unreadable = [none], {name: [none] for name in names}, 0
    guessed: dict[str, TimeRange] = {}
    for chunk in read_file(path, list(dict.fromkeys(columns)), schema.number_columns, schema.read):
        unreadable += len(chunk.unreadable)
        keys_of.append(item_key(chunk.table, parts, []))
        for name in names:
            spec = schema.item_fields[name]
            column = column_of(chunk.table, spec.column)
            values = field_values(column, spec, name, losses)
            texts_of[name].append(to_text(values))
            if spec.kind == "time":
                guessed[name] = merged([guessed.get(name), guessed_range(column, values, spec)])
    for name, found_range in guessed.items():
        check_clock(found_range, f"item_fields.{name}", path)
    keys = pa.concat_arrays(keys_of)
    found = pc.index_in(items.keys, value_set=keys)
    texts = {name: pa.concat_arrays(values).take(found) for name, values in texts_of.items()}
    used_twice = len(keys) - keys.null_count - pc.count_distinct(keys, mode="only_valid").as_py()
    misfits: dict[str, Any] = {"items_without_row": found.null_count, "item_rows_with_a_used_key": used_twice}
    if found.null_count == len(found) and keys.null_count < len(keys):
        misfits["item_keys_that_never_meet"] = _example_keys(items.keys, keys.drop_null())
    return texts, {**misfits, "item_rows_unreadable": unreadable}


def _example_keys(log: pa.Array, table: pa.Array) -> list[str]:
    """A key of the log and one of the item table; of two that differ in case or zeros at the front, where there are."""
    place = pc.index_in(_bare(log), value_set=_bare(table))
    number = pc.index(place.is_valid(), True).as_py()
    pair = (log[0], table[0]) if number < 0 else (log[number], table[place[number].as_py()])
    return [key.as_py().replace(SEPARATOR, ", ") for key in pair]


def _bare(keys: pa.Array) -> pa.Array:
    return pc.utf8_ltrim(pc.utf8_lower(keys), "0")


def key_columns(schema: EventSchema, items: Items) -> dict[str, pa.Array]:
    """The parts of the keys [I], one column per item column."""
    if len(schema.item) == 1:
        return {f"{KEY}{schema.item[0].column}": items.keys}
    parts = pc.split_pattern(items.keys, SEPARATOR)
    return {f"{KEY}{part.column}": pc.list_element(parts, index) for index, part in enumerate(schema.item)}


def known_keys(encoding: Encoding) -> pa.Array:
    """Large strings [I]: the whole key of each item of an encoding."""
    return join_key([plain(column) for column in encoding.item_keys.columns])
