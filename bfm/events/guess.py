"""A first schema for the files of a log, so that nobody starts from a blank page: what a column seems to be, and why.

Enters: files, of which the first rows are read. Leaves: the text of a schema YAML; what was not certain stands beside
it as a comment. The schema is a guess to be read, not a decision: `prepare` and `describe` tell what becomes of it.

Shape legend: E rows that were read.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bfm.errors import UserError
from bfm.events.schema import RESERVED, TimeSpec
from bfm.events.written_times import setting, written_days, written_times
from bfm.tables.dialect import ReadSpec, decimal_mark
from bfm.tables.find import find_files
from bfm.tables.pieces import ENCODING_KEY, make_pieces, read_piece, table_columns
from bfm.tables.values import inexact, keys, numbers, plain, with_points
from bfm.units import format_count
from bfm.yaml import validate

_ROWS = 200_000
_WORDS: Mapping[str, str] = {
    "user": r"user|customer|client|household|account|member|visitor|buyer|card|session|person|reviewer",
    "item": r"item|product|sku|article|asin|stock|movie|track|song|merchant|mcc|listing|isbn|title_id|content|page",
    "time": r"time|date|created|_at$|^at$|^ts$|when|day|datum|^tag$|fecha",
}
"""Of a column's name, in order of how much they say."""
_SURE = 0.99
"""Share of rows from which on something holds of a column."""
_USUAL = 0.95
"""Share of an item's rows that have its usual value of a field of the item."""
_DAYS = {"sheet_days": "days of a spreadsheet", "days": "days since 1970"}
_MARK_ROWS = 10_000
_MOST_CATEGORIES = 1000
_LONG_WORDS = 3.0
_FEWEST_REPEATS = 1.2
_LONGEST_NAME = 48


@dataclass(frozen=True)
class _Column:
    """A column of the rows that were read."""

    name: str
    values_E: pa.Array
    """Plain, as bfm.tables.values takes them."""
    commas: bool = False
    """Its numbers have decimal commas."""

    @cached_property
    def keys_E(self) -> pa.Array:
        """As ids."""
        return keys(self.values_E)[0]

    @property
    def is_list(self) -> bool:
        """It holds lists."""
        kind = self.values_E.type
        return pa.types.is_list(kind) or pa.types.is_large_list(kind)

    @cached_property
    def distinct(self) -> int:
        """Number of different values."""
        return int(pc.count_distinct(self.keys_E).as_py())

    @cached_property
    def known(self) -> int:
        """Rows that have a value."""
        return len(self.values_E) - int(self.keys_E.null_count)

    @cached_property
    def told_E(self) -> pa.Array:
        """The values with decimal points."""
        return with_points(self.values_E) if self.commas else self.values_E

    def named(self, role: str) -> int:
        """How much its name says that it is that: 0 for nothing."""
        return _says(self.name, role)

    @cached_property
    def written(self) -> list[TimeSpec]:
        """How it can be read as times, the likeliest first; empty where it seems to hold none."""
        return written_times(self.name, self.told_E)

    @cached_property
    def numbers_E(self) -> pa.Array:
        """As numbers."""
        return numbers(self.told_E)[0]

    @cached_property
    def is_number(self) -> bool:
        """Nearly all of it are numbers."""
        return len(self.numbers_E.drop_null()) >= _SURE * max(self.known, 1) > 0

    @cached_property
    def is_measured(self) -> bool:
        """Nearly all of it are numbers, some with a fraction."""
        return self.is_number and bool((self.numbers_E.drop_null().to_numpy(zero_copy_only=False) % 1 != 0).any())

    @cached_property
    def can_be_id(self) -> bool:
        """It repeats, and is no measured number."""
        repeats = self.known > _FEWEST_REPEATS * self.distinct > 1
        return repeats and not self.is_measured and not inexact(self.values_E).any()


def guess_schema(logs: Sequence[str], encoding: str | None = None) -> str:
    """The text of a schema for files, folders, globs or URIs; text that shows no encoding has this one.

    Fields of items are those that are the same at every row of an item; the others are of the event.

    Raises UserError where a file cannot be read, or no column can be user, item, time.
    """
    found = find_files(list(logs))
    columns, rows, understood = _read(found.paths, encoding)
    if rows == 0:
        raise UserError("has no rows", file=found.paths[0], fix="give a log with rows")
    doubts: list[str] = [f"first {format_count(rows)} rows of {found.paths[0]}{understood}"]
    time, spec = _time(columns, found.paths[0], doubts)
    left = [column for column in columns if column is not time]
    user = _choose("user", [column for column in left if column.can_be_id and not column.written], doubts)
    if user is None:
        names = ", ".join(column.name for column in columns)
        raise UserError(f"no column of {names} repeats as users do", file=found.paths[0], fix="write a schema by hand")
    left = [column for column in left if column is not user]
    item = _choose("item", [column for column in left if column.can_be_id and not column.written], doubts)
    if item is None:
        raise UserError("no column repeats as items do", file=found.paths[0], fix="write a schema by hand")
    left = [column for column in left if column is not item]
    sides: dict[str, list[str]] = {"item_fields": [], "context_fields": []}
    taken: set[str] = set()
    for column in left:
        entry = _field(column, taken)
        if entry is None:
            doubts.append(f"{column.name} is left out: it has one value, or another one at every row, or none")
            continue
        sides["item_fields" if _belongs_to(column, item) else "context_fields"].append(entry)
    return "\n".join(_lines(user, spec, item, sides, doubts, encoding)) + "\n"


def _read(paths: Sequence[str], encoding: str | None) -> tuple[list[_Column], int, str]:
    """(columns of the first rows, how many rows, how the file was understood)."""
    tables: list[pa.Table] = []
    read = validate(ReadSpec, {"encoding": encoding})
    try:
        columns = table_columns(paths[0], read=read)
        pieces = make_pieces([paths[0]], columns, None, read)
        for chunk in (chunk for piece in pieces for chunk in read_piece(piece, columns)):
            tables.append(chunk.table)
            if sum(map(len, tables)) >= _ROWS:
                break
    except UserError as error:
        if error.key == ENCODING_KEY:
            fix = "name its encoding, e.g. `bfm init LOG... --encoding latin-1`"
            raise UserError(error.what, file=error.file, fix=fix) from error
        raise
    table = pa.concat_tables(tables, promote_options="permissive").slice(0, _ROWS)
    words, how = pieces[0].words(), pieces[0].dialect
    separator = how.separator if how else ""

    def has_commas(values_E: pa.Array) -> bool:
        return bool(separator) and decimal_mark(map(str, values_E[:_MARK_ROWS].to_pylist()), separator) == ","

    columns_E = {name: plain(table[name]) for name in table.column_names}
    found = [_Column(name, values_E, has_commas(values_E)) for name, values_E in columns_E.items()]
    return found, len(table), f", read as {words}" if words else ""


def _time(columns: Sequence[_Column], path: str, doubts: list[str]) -> tuple[_Column, TimeSpec]:
    """The column of the times and how to read it. Raises UserError where there is none."""
    chosen = _choose("time", [column for column in columns if column.written], doubts)
    if chosen is not None:
        doubts += _doubts_of_format(chosen)
        return chosen, chosen.written[0]
    # Any number may count days: only a name says that it does.
    named = sorted((column for column in columns if column.named("time")), key=lambda column: -column.named("time"))
    for column in named:
        for spec in written_days(column.name, column.told_E):
            doubts.append(f"time: {column.name} holds numbers such as {_example(column)}, taken as {_DAYS[spec.unit]}")
            return column, spec
    what = "no column holds times between 1980 and 2100 in a format that is known"
    if named:
        what += f"; {named[0].name} has values such as {_example(named[0])!r}"
    fix = (
        "write a schema by hand, with `time: {column: COLUMN, format: '%d.%m.%Y'}` as the times are written, or "
        "`position: COLUMN` where whole numbers order a user's events"
    )
    raise UserError(what, file=path, fix=fix)


def _doubts_of_format(column: _Column) -> Iterator[str]:
    spec, *others = column.written
    if spec.format is not None:
        also = f"; {' or '.join(repr(other.format) for other in others)} fits too" if others else ""
        yield f"{column.name}: {_example(column)} is read as {spec.format!r}{also}"


def _example(column: _Column) -> str:
    return str(next(iter(column.keys_E.drop_null()), ""))


def _choose(role: str, able: Sequence[_Column], doubts: list[str]) -> _Column | None:
    """The column whose name says most; of equals the one of most different values."""
    ranked = sorted(able, key=lambda column: (column.named(role), column.distinct), reverse=True)
    if not ranked:
        return None
    best = ranked[0]
    if not best.named(role):
        doubts.append(f"{role}: no column's name says so; {best.name} has {format_count(best.distinct)} values")
    elif others := [column.name for column in ranked[1:] if column.named(role)]:
        doubts.append(f"{role}: {best.name}, or {' or '.join(others[:3])}?")
    return best


def _belongs_to(column: _Column, item: _Column) -> bool:
    """Whether nearly all rows of items that occur again have the item's usual value of it."""
    rows = pa.table({"item": item.keys_E, "value": _texts(column)}).drop_null()
    pairs = rows.group_by(["item", "value"]).aggregate([([], "count_all")])
    items = pairs.group_by("item").aggregate([("count_all", "max"), ("count_all", "sum")])
    again = items.filter(pc.greater(items["count_all_sum"], 1))
    if len(again) == 0:
        return False
    other = 1 - pc.sum(again["count_all_max"]).as_py() / pc.sum(again["count_all_sum"]).as_py()
    # A value that nearly all events have is no item's own.
    commonest = pc.max(pairs.group_by("value").aggregate([("count_all", "sum")])["count_all_sum"]).as_py()
    return bool(other <= min(1 - _USUAL, 0.3 * (1 - commonest / len(rows))))


def _texts(column: _Column) -> pa.Array:
    if column.is_list:
        return pa.array([None if value is None else str(value) for value in column.values_E.to_pylist()])
    return column.keys_E


def _field(column: _Column, taken: set[str]) -> str | None:
    """`name: kind` with a name that is none of those taken, which it joins; None where it can be no field."""
    kind, options = _kind(column)
    if kind is None:
        return None
    name = re.sub(r"[^A-Za-z0-9]+", "_", column.name).strip("_").lower()[:_LONGEST_NAME]
    name = name if name[:1].isalpha() else f"field_{name}".strip("_")
    name = f"{name}_column" if name in RESERVED else name
    if name in taken:
        name = next(f"{name}_{number}" for number in itertools.count(2) if f"{name}_{number}" not in taken)
    taken.add(name)
    if name != column.name:
        options = {"column": _quoted(column.name), **options}
    if not options:
        return f"{name}: {kind}"
    return f"{name}: {{{', '.join(f'{key}: {value}' for key, value in {'kind': kind, **options}.items())}}}"


def _kind(column: _Column) -> tuple[str | None, dict[str, Any]]:
    if column.is_list:
        return "list", {}
    if column.distinct < 2:
        return None, {}
    if column.distinct >= column.known and not column.is_number:
        return ("text" if _words(column) >= _LONG_WORDS else None), {}
    if column.written:
        return "time", {key: value for key, _, value in [setting(column.written[0]).partition(": ")] if key}
    if column.is_number:
        # Of product.price the product is no hint.
        own = column.name.rpartition(".")[2]
        named = _says(own, "user") or _says(own, "item") or own.lower().endswith(("id", "code"))
        is_code = named and not column.is_measured
        return ("categorical" if is_code else "numeric"), {}
    if _words(column) >= _LONG_WORDS:
        return "text", {}
    texts = [text for text in column.keys_E.drop_null().unique().to_pylist()[:1000] if text]
    if np.mean(["|" in text for text in texts]) > 0.3:
        return "list", {"separator": '"|"'}
    return ("categorical" if column.distinct <= max(_MOST_CATEGORIES, 0.1 * column.known) else "text"), {}


def _says(name: str, role: str) -> int:
    words = _WORDS[role].split("|")
    found = [len(words) - place for place, word in enumerate(words) if re.search(word, name.lower())]
    return max(found, default=0) + (len(words) if found and name.lower().endswith("id") else 0)


def _words(column: _Column) -> float:
    """Mean number of words of its different values."""
    texts = column.keys_E.drop_null().unique().to_pylist()[:1000]
    return float(np.mean([len(text.split()) for text in texts])) if texts else 0.0


def _lines(
    user: _Column,
    time: TimeSpec,
    item: _Column,
    sides: Mapping[str, Sequence[str]],
    doubts: Sequence[str],
    encoding: str | None,
) -> Iterator[str]:
    yield "# A first schema, proposed by `bfm init`: look at it, then `bfm data prepare` and `bfm data describe`."
    for doubt in doubts:
        yield f"# {doubt}"
    yield "name: log"
    yield f"user: {_quoted(user.name)}  # {_counted(user)}"
    column, how = _quoted(time.column), setting(time)
    yield f"time: {{column: {column}, {how}}}" if how else f"time: {column}"
    yield f"item: {_quoted(item.name)}  # {_counted(item)}"
    for side, fields in sides.items():
        if fields:
            yield f"{side}:"
            yield from (f"  {field}" for field in fields)
    if encoding is not None:
        yield f"read: {{encoding: {encoding}}}"


def _counted(column: _Column) -> str:
    return f"{format_count(column.distinct)} values, {column.known / column.distinct:.3g} events each"


def _quoted(name: str) -> str:
    return (
        name if re.fullmatch(r"[A-Za-z_][\w.]*", name) else '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'
    )
