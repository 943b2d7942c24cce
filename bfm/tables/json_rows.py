"""JSON text to columns, every number exactly as it is written, whatever else stands in its column or block.

Lines go to Arrow in blocks. It reads a column as doubles if one of its numbers is not a 64-bit integer, so a block in
which that loses digits is read again with decimals there; and where a column has several types, line by line, rows
with the same types together. A column `a.b` is the key b of the object a, where no key is called `a.b`.
"""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from bfm.errors import UserError
from bfm.tables.dialect import BLOCK_BYTES
from bfm.tables.raw import Lines, RawChunk

UNREADABLE = "not a JSON object of plain values"
_ROWS = 1 << 16
_EXACT = 2**53
_DECIMAL = pa.decimal128(38, 10)
_LONGEST_VALUE = 4 * BLOCK_BYTES
_BETWEEN = re.compile(r"[\s,]*")
Types = dict[str, pa.DataType]


def read_lines(blocks: Iterator[bytes], columns: Sequence[str]) -> Iterator[RawChunk]:
    """Rows of JSON lines, block by block, with the wanted columns that they have. Raises UnicodeDecodeError."""
    types: Types = {}
    for block in blocks:
        block.decode()
        num_lines = block.count(b"\n") + (not block.endswith(b"\n"))
        table = _by_arrow(block, columns, types)
        texts = []
        if table is None or table.num_rows != num_lines:
            texts = [text for text in block.split(b"\n") if text.strip()]
        if table is not None and table.num_rows == len(texts or range(num_lines)):
            lines = Lines(rows=table.num_rows, blank=num_lines - table.num_rows)
            yield RawChunk(chosen(table, columns), names=frozenset(column_paths(table.schema)), lines=lines)
        else:
            yield RawChunk(pa.table({}), lines=Lines(rows=len(texts), blank=num_lines - len(texts)))
            yield from _one_by_one(map(_loaded, texts), columns)


def read_objects(blocks: Iterator[bytes], array: bool) -> Iterator[Any]:
    """Values of JSON lines (a line that is no JSON is a text), or of an array or of what follows each other.

    Raises UserError where an array is no JSON, UnicodeDecodeError.
    """
    if array:
        return _values(blocks)
    return (_loaded(line) for block in blocks for line in block.split(b"\n") if line.strip())


def read_values(blocks: Iterator[bytes], columns: Sequence[str]) -> Iterator[RawChunk]:
    """Rows of a JSON array, or of objects that follow each other. Raises UserError where the text is no JSON."""
    values = _values(blocks)
    while some := list(itertools.islice(values, _ROWS)):
        yield from _one_by_one(some, columns)


def column_paths(schema: Iterable[pa.Field], above: str = "") -> list[str]:
    """Names of columns, and `a.b` of what is nested."""
    paths = []
    for field in schema:
        paths.append(above + field.name)
        if pa.types.is_struct(field.type):
            paths += column_paths(field.type, f"{above}{field.name}.")
    return paths


def columnvalue_at(table: pa.Table, path: str) -> pa.ChunkedArray | None:
    """The column of a name, or of a path into nested ones."""
    if path in table.column_names:
        return table[path]
    for name, rest in _splits(path):
        if name in table.column_names and pa.types.is_struct(table[name].type):
            below = {field.name: pc.struct_field(table[name], [field.name]) for field in table[name].type}
            return columnvalue_at(pa.table(below), rest)
    return None


def chosen(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    """Those of the wanted columns that a table has, by name or path."""
    found = {name: columnvalue_at(table, name) for name in columns}
    chosen = {name: column for name, column in found.items() if column is not None}
    # A table without columns would have no rows.
    return pa.table(chosen or {"": pa.nulls(table.num_rows)})


def value_at(row: dict[str, Any], path: str) -> Any:
    """The value of a key or path."""
    if path in row:
        return row[path]
    for name, rest in _splits(path):
        if isinstance(row.get(name), dict):
            return value_at(row[name], rest)
    return None


# ---------------------------------------------------------------- inside


def _splits(path: str) -> Iterator[tuple[str, str]]:
    parts = path.split(".")
    return ((".".join(parts[:cut]), ".".join(parts[cut:])) for cut in range(1, len(parts)))


def _by_arrow(block: bytes, columns: Sequence[str], types: Types) -> pa.Table | None:
    """Lines as Arrow reads them, or None where it cannot. `types` are learned from block to block."""
    table = _parsed(block, types)
    if table is None and types:
        types.clear()
        table = _parsed(block, types)
    while table is not None and (better := _better_types(table, columns)):
        types |= better
        table = _parsed(block, types)
    return table


def _better_types(table: pa.Table, columns: Sequence[str]) -> Types:
    """Types of the columns in which Arrow changed values.

    It takes text that looks like a date for a time if all of a block does, and rounds large whole numbers beside a
    fraction; keys must not depend on either.
    """
    wanted = {name for path in columns for name in (path, *(name for name, _ in _splits(path)))}
    better = {}
    for field in table.schema:
        kind = _changed(field.type, pa.types.is_timestamp, pa.string())
        if field.name in wanted and _lost_digits(table[field.name]):
            kind = _changed(kind, pa.types.is_floating, _DECIMAL)
        if kind != field.type:
            better[field.name] = kind
    return better


def _parsed(block: bytes, types: Types) -> pa.Table | None:
    options = pyarrow.json.ParseOptions(explicit_schema=pa.schema(types)) if types else None
    reading = pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1)
    try:
        table = pyarrow.json.read_json(io.BytesIO(block), reading, options)
    except pa.ArrowInvalid:
        return None
    # Of the learned columns, those that this block does not have.
    return table.drop_columns([name for name in types if table[name].null_count == len(table)])


def _changed(kind: pa.DataType, which: Any, to: pa.DataType) -> pa.DataType:
    """A type with another one in place of some, at any depth."""
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _changed(field.type, which, to)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(_changed(kind.value_type, which, to))
    return to if which(kind) else kind


def _lost_digits(column: pa.ChunkedArray | pa.Array) -> bool:
    """Whether doubles are so large that whole numbers were rounded."""
    kind = column.type
    if pa.types.is_struct(kind):
        return any(_lost_digits(pc.struct_field(column, [field.name])) for field in kind)
    if pa.types.is_list(kind):
        return _lost_digits(pc.list_flatten(column))
    return pa.types.is_floating(kind) and pc.any(pc.greater_equal(pc.abs(column), _EXACT)).as_py() is True


def _float(text: str) -> float | int:
    """Large whole numbers are exact, also with a point or an exponent (see _DECIMAL)."""
    value = float(text)
    return int(Decimal(text)) if _EXACT <= abs(value) < 1e28 and Decimal(text) % 1 == 0 else value


_DECODER = json.JSONDecoder(parse_float=_float)


def _loaded(line: bytes) -> Any:
    try:
        return _DECODER.decode(line.decode())
    except (ValueError, RecursionError):
        return line.decode()


def _one_by_one(values: Iterable[Any], columns: Sequence[str]) -> Iterator[RawChunk]:
    """Rows whose values have the same types form a table; so no value is changed to fit its column."""
    alike: dict[tuple[str, ...], list[list[Any]]] = {}
    unreadable: list[str] = []
    names: set[str] = set()
    for row in values:
        if isinstance(row, dict):
            found = [_bounded(value_at(row, path)) for path in columns]
            names.update(row, (path for path, value in zip(columns, found, strict=True) if value is not None))
            alike.setdefault(tuple(type(value).__name__ for value in found), []).append(found)
        else:
            unreadable.append(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False))
    for rows in alike.values():
        try:
            arrays = [pa.array(column) for column in zip(*rows, strict=True)]
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            unreadable += [json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows]
        else:
            yield RawChunk(pa.table(arrays, names=list(columns)), names=frozenset(names))
    yield RawChunk(pa.table({}), tuple(unreadable), UNREADABLE, frozenset(names))


def _bounded(value: Any) -> Any:
    """Integers that no 64 bits hold as text."""
    if isinstance(value, list):
        return [_bounded(entry) for entry in value]
    return str(value) if type(value) is int and not -(2**63) <= value < 2**63 else value


def _values(blocks: Iterator[bytes]) -> Iterator[Any]:
    """The elements of an array, or JSON values one after the other."""
    text = next(blocks, b"").decode().lstrip()
    in_array = text.startswith("[")
    text, ended = text.removeprefix("["), False
    while not ended:
        place = _after(text, 0)
        while place < len(text) and not (in_array and text[place] == "]"):
            try:
                value, place = _DECODER.raw_decode(text, place)
            except (ValueError, RecursionError):
                # The text may go on.
                break
            yield value
            place = _after(text, place)
        text = text[place:]
        block = next(blocks, None)
        ended = block is None or len(text) > _LONGEST_VALUE
        text += (block or b"").decode()
    if text.rstrip() != ("]" if in_array else ""):
        what = f"is not JSON from {text[:40]!r} on"
        raise UserError(what, fix="restore the file, or write an object a line")


def _after(text: str, place: int) -> int:
    """Where the next value begins."""
    found = _BETWEEN.match(text, place)
    assert found is not None
    return found.end()
