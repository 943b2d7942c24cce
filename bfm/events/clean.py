"""Raw rows to cleaned rows: every row comes out, either usable or with a fault and its original content.

A row is *quarantined* when it cannot be an event: its user, an item column, or its time (position) is missing, not
readable, infinite or of a nested type, an id is a number that is not whole or was rounded, or the row itself could not
be read. A *field value* that cannot be used (text where a number should stand, an infinity, a vector with a gap)
becomes missing, which every field kind can represent; such losses are counted per field and fault. NaN is missing.

A cleaned table has the columns of `Cleaner.target`. Item fields travel as text (`to_text`): which value an item has is
decided by counting equal texts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bfm.errors import UserError
from bfm.events.hashing import hash_rows
from bfm.events.schema import EventSchema, FieldSpec, ItemPart, TimeSpec
from bfm.events.times import TimeRange, guessed_range, times
from bfm.tables.pieces import Piece, make_pieces, read_piece
from bfm.tables.raw import Lines, RawChunk
from bfm.tables.values import (
    SEPARATOR,
    bucket_names,
    encoded,
    inexact,
    keys,
    lists,
    numbers,
    plain,
    positions,
    to_mask,
    vectors,
)

USER, TIME, ITEM, FAULT, RAW, HASH = "user", "time", "item", "fault", "raw", "hash"
_TEXT = pa.large_string()
_CONTEXT_TYPE = {
    "categorical": _TEXT,
    "text": _TEXT,
    "numeric": pa.float64(),
    "list": pa.large_list(_TEXT),
    "vector": pa.large_list(pa.float32()),
    "time": pa.int64(),
}
_RAW_SLICE_ROWS = 4096
Faults = list[tuple[str, np.ndarray]]
"""Reasons and the rows (bool [n]) that they are true of, the graver first."""
Losses = Counter[tuple[str, str]]
"""(field, what) -> what cleaning and encoding leave out of a log's values; counts of parts add up. `what` is the fault
of values made missing; or of texts and lists one of BAG_COUNTS: `values` with at least one word or element, how many of
these are `cut`, and how many words or elements are `lost`."""
BAG_COUNTS = ("values", "cut", "lost")


@dataclass(frozen=True)
class Cleaned:
    """One cleaned table."""

    table: pa.Table
    losses: Losses
    raw: pa.Table
    """The rows as read; those that could not be read would follow."""
    guessed_times: Mapping[str, TimeRange] = field(default_factory=dict)
    """By key of the schema."""
    names: frozenset[str] = frozenset()
    """All columns of the rows, wanted or not."""
    lines: Lines = field(default_factory=Lines)
    """Of text."""


def item_column(name: str) -> str:
    """Column of an item field in cleaned tables."""
    return f"i.{name}"


def context_column(name: str) -> str:
    """Column of a context field in cleaned tables."""
    return f"c.{name}"


@dataclass(frozen=True)
class Cleaner:
    """What is read of a log, and how it is cleaned."""

    schema: EventSchema
    event_item_fields: Sequence[str]
    """Item fields that stand in the log itself."""

    @cached_property
    def columns(self) -> list[str]:
        """Columns that are read, each once."""
        schema = self.schema
        order = schema.time.column if schema.time else schema.position
        columns = [schema.user, order, *(part.column for part in schema.item)]
        columns += [schema.item_fields[name].column for name in self.event_item_fields]
        columns += [spec.column for spec in schema.context_fields.values()]
        return list(dict.fromkeys(column for column in columns if column is not None))

    @cached_property
    def target(self) -> pa.Schema:
        """Columns of a cleaned table."""
        fields = [(USER, _TEXT), (TIME, pa.int64()), (ITEM, _TEXT)]
        fields += [(item_column(name), _TEXT) for name in self.event_item_fields]
        fields += [
            (context_column(name), _CONTEXT_TYPE[spec.kind]) for name, spec in self.schema.context_fields.items()
        ]
        return pa.schema([*fields, (FAULT, _TEXT), (RAW, _TEXT)])

    def pieces(self, paths: Sequence[str]) -> list[Piece]:
        """The pieces of a log's files. Raises UserError where one is unreadable or lacks a column."""
        return make_pieces(paths, self.columns, self.schema.number_columns, self.schema.read)

    def read(self, piece: Piece) -> Iterator[Cleaned]:
        """The rows of a piece in tables of bounded size. Raises UserError where the file cannot be read."""
        for chunk in read_piece(piece, self.columns):
            cleaned = self.clean(chunk.table)
            table = pa.concat_tables([cleaned.table, self.unreadable(chunk)])
            yield replace(cleaned, table=table, names=chunk.names, lines=chunk.lines)

    def clean(self, raw: pa.Table) -> Cleaned:
        """Clean rows as read, with columns of any type.

        Of the `columns`, one that the rows lack is missing in all of them; further ones are left out.
        """
        schema, faults, losses = self.schema, Faults(), Losses()
        user = _key(column_of(raw, schema.user), "user", faults)
        item = item_key(raw, schema.item, faults)
        time = _order(raw, schema, faults)
        columns: dict[str, pa.Array] = {USER: user, TIME: time, ITEM: item}
        guessed = {} if schema.time is None else {"time": _guessed(raw, time, schema.time)}
        for name in self.event_item_fields:
            spec = schema.item_fields[name]
            values = field_values(column_of(raw, spec.column), spec, name, losses)
            columns[item_column(name)] = to_text(values)
            guessed |= {f"item_fields.{name}": _guessed(raw, values, spec)} if spec.kind == "time" else {}
        for name, spec in schema.context_fields.items():
            values = field_values(column_of(raw, spec.column), spec, name, losses)
            columns[context_column(name)] = values
            guessed |= {f"context_fields.{name}": _guessed(raw, values, spec)} if spec.kind == "time" else {}
        columns[FAULT] = _first_fault(faults)
        present = [name for name in self.columns if name in raw.column_names]
        columns[RAW] = _raw_text(raw.select(present), to_mask(columns[FAULT].is_valid()))
        table = pa.table([columns[name] for name in self.target.names], schema=self.target)
        return Cleaned(table, losses, raw, guessed)

    def unreadable(self, chunk: RawChunk) -> pa.Table:
        """What could not be read as rows, as a cleaned table."""
        num = len(chunk.unreadable)
        content = {FAULT: pa.array([chunk.reason] * num, _TEXT), RAW: pa.array(chunk.unreadable, _TEXT)}
        columns = [content.get(field.name, pa.nulls(num, field.type)) for field in self.target]
        return pa.table(columns, schema=self.target)


def usable(cleaned: pa.Table, seed: int) -> pa.Table:
    """The rows without a fault in columns of one chunk, text as dictionaries, with the hash of the whole row: HASH."""
    faultless = cleaned[FAULT].null_count == cleaned.num_rows
    rows = (cleaned if faultless else cleaned.filter(cleaned[FAULT].is_null())).drop_columns([FAULT, RAW])
    columns = {name: encoded(plain(rows[name])) for name in rows.column_names}
    return pa.table({**columns, HASH: hash_rows(list(columns.values()), seed)})


def as_quarantined(rows: pa.Table, reason: str) -> pa.Table:
    """Fault and content of usable rows that are left out all the same."""
    texts = pa.array(list(_json_lines(rows.drop_columns([HASH]))), _TEXT)
    return pa.table({FAULT: pa.array([reason] * rows.num_rows, _TEXT), RAW: texts})


def nothing_usable(reasons: Mapping[str, int], fix: str) -> UserError:
    """What to raise for a log all of whose rows are unusable: reason -> rows."""
    counts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))
    return UserError(f"no row is usable ({counts})", key="LOG", fix=fix)


def column_of(raw: pa.Table, name: str) -> pa.Array:
    """A column as read, in one piece; all missing where there is none."""
    return plain(raw[name]) if name in raw.column_names else pa.nulls(raw.num_rows, _TEXT)


def item_key(raw: pa.Table, parts: list[ItemPart], faults: Faults) -> pa.Array:
    """The item of each row as one text; several columns are joined by `SEPARATOR`."""
    texts = [_key(column_of(raw, part.column), "item", faults, part.buckets) for part in parts]
    for text in texts if len(texts) > 1 else ():
        faults.append(("item holds a control character", to_mask(pc.match_substring(text, SEPARATOR))))
    return join_key(texts)


def field_values(column: pa.Array, spec: FieldSpec, name: str, losses: Losses) -> pa.Array:
    """A field's values in the type of its kind; unusable ones are null and counted in `losses`."""
    faults: Faults
    values: pa.Array
    if spec.kind == "time":
        values, wrong = times(column, spec)
        faults = [("not a time", wrong)]
    elif spec.kind == "numeric" or spec.buckets is not None:
        values, wrong, infinite = numbers(column)
        faults = [("not a number", wrong), ("infinite", infinite)]
        if spec.buckets is not None:
            values = bucket_names(values, spec.buckets)
    elif spec.kind == "list":
        values, wrong = lists(column, spec.separator)
        faults = [("not a list", wrong)]
    elif spec.kind == "vector":
        values, wrong = vectors(column, spec.separator)
        faults = [("not a vector of finite numbers", wrong)]
    else:
        values, wrong, infinite = keys(column)
        faults = [("not a plain value", wrong), ("infinite", infinite)]
    for fault, mask in faults:
        if mask.any():
            losses[name, fault] += int(mask.sum())
    return values


def repairs(losses: Losses) -> dict[str, int]:
    """Values made missing, as people read it: `field: fault` -> count."""
    found = sorted((key, count) for key, count in losses.items() if count and key[1] not in BAG_COUNTS)
    return {f"{name}: {fault}": count for (name, fault), count in found}


def to_text(values: pa.Array) -> pa.Array:
    """Values of any kind as one text each (lists joined), so that equal values are equal texts."""
    if pa.types.is_large_list(values.type):
        return pc.binary_join(values.cast(pa.large_list(_TEXT)), pa.scalar(SEPARATOR, _TEXT))
    return values.cast(_TEXT)


def from_text(texts: pa.Array, kind: str) -> pa.Array:
    """Inverse of `to_text`."""
    target = _CONTEXT_TYPE[kind]
    return (pc.split_pattern(texts, SEPARATOR) if pa.types.is_large_list(target) else texts).cast(target)


def join_key(parts: list[pa.Array]) -> pa.Array:
    """One text per row of one or several columns of text."""
    return parts[0] if len(parts) == 1 else pc.binary_join_element_wise(*parts, pa.scalar(SEPARATOR, _TEXT))


# ---------------------------------------------------------------- inside


def _guessed(raw: pa.Table, time: pa.Array, spec: TimeSpec) -> TimeRange:
    return guessed_range(column_of(raw, spec.column), time, spec)


def _first_fault(faults: Faults) -> pa.Array:
    """Reason of the first fault of each row, null where there is none."""
    reasons, masks = zip(*faults, strict=True)
    first = np.select(masks, np.arange(len(masks)), -1)
    return pa.array(reasons, _TEXT).take(pa.array(first, mask=first < 0))


def _key(column: pa.Array, role: str, faults: Faults, buckets: list[float] | None = None) -> pa.Array:
    values, wrong, infinite = keys(column) if buckets is None else numbers(column)
    faults.append((f"wrong type of {role}" if buckets is None else f"{role} is not a number", wrong))
    faults.append((f"{role} is infinite", infinite))
    if buckets is None:
        faults.append((f"{role} is a number that is not whole or was rounded", inexact(column)))
    faults.append((f"missing {role}", to_mask(values.is_null())))
    return values if buckets is None else bucket_names(values, buckets)


def _order(raw: pa.Table, schema: EventSchema, faults: Faults) -> pa.Array:
    if schema.time is not None:
        role, values, wrong = "time", *times(column_of(raw, schema.time.column), schema.time)
    else:
        assert schema.position is not None
        role, values, wrong = "position", *positions(column_of(raw, schema.position))
    faults.append((f"unparsable {role}", wrong))
    faults.append((f"missing {role}", to_mask(values.is_null())))
    return values


def _raw_text(raw: pa.Table, found: np.ndarray) -> pa.Array:
    """The original row as JSON where `found`, else null."""
    if not found.any():
        return pa.nulls(raw.num_rows, _TEXT)
    texts = pa.array(list(_json_lines(raw.filter(pa.array(found)))), _TEXT)
    return pc.replace_with_mask(pa.nulls(raw.num_rows, _TEXT), pa.array(found), texts)


def _json_lines(table: pa.Table) -> Iterator[str]:
    # Rows become Python objects a slice at a time: a log may be unusable altogether.
    for batch in table.to_batches(max_chunksize=_RAW_SLICE_ROWS):
        for row in batch.to_pylist():
            yield json.dumps(row, default=_json_value, ensure_ascii=False)


def _json_value(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
