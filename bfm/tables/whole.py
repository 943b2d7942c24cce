"""Files to one table in memory: every row in its order, every column as numbers, yes or no, or text.

For tables that are small and of which each row counts: a file with a row that cannot be read is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bfm.errors import UserError
from bfm.tables import json_rows
from bfm.tables.dialect import Dialect
from bfm.tables.find import find_files
from bfm.tables.pieces import (
    ENCODING_KEY,
    Piece,
    blocks_of,
    make_pieces,
    open_parquet,
    read_piece,
    require_columns,
)
from bfm.tables.understood import read_as, reading_lines
from bfm.tables.values import keys, known, numbers, plain, with_points

_WHOLE = r"^[-+]?[0-9]+(\.0*)?$"
_NO_NUMBER = pa.array(["NA", "#NA", "-nan", "-NaN"], pa.large_string())
"""Texts that are missing numbers, beside those that are missing anywhere."""
_YES_OR_NO = pa.array(["true", "false"], pa.large_string())


@dataclass(frozen=True)
class Whole:
    """A table that was read."""

    table: pa.Table
    told: tuple[str, ...]
    """How files were understood that are not as usual, and which were left out."""


def read_whole(place: str, columns: Sequence[str]) -> Whole:
    """All rows of a file, or of the files of a folder or glob, local or of a URI.

    Args:
        place: of the files.
        columns: those that are needed; `a.b` is the field b of a nested column a. All others are read too.

    Raises:
        UserError: nothing is there, a needed column is absent or stands twice, or a row cannot be read.
    """
    found = find_files([place])
    try:
        pieces = make_pieces(found.paths, columns, None)
        tables = [table for piece in pieces if (table := _read(piece, columns)).num_rows]
    except UserError as error:
        # Who brings such a table has no schema to name an encoding in.
        fix = "write it as UTF-8" if error.key == ENCODING_KEY else error.fix
        raise UserError(error.what, file=error.file, fix=fix) from error
    if not tables:
        raise UserError("has no rows", file=place, fix="give a table with rows")
    names = dict.fromkeys(name for table in tables for name in table.column_names)
    joined = {name: _joined([_column(table, name) for table in tables]) for name in names}
    how = read_as([(piece.path, piece.words()) for piece in pieces])
    return Whole(pa.table(joined), tuple(reading_lines(how, found.left_out)))


# ---------------------------------------------------------------- inside


def _read(piece: Piece, columns: Sequence[str]) -> pa.Table:
    how = piece.dialect
    if how is not None and how.form == "json":
        return _of_objects(piece, columns)
    num_named = Counter(how.names if how else open_parquet(piece.path).schema_arrow.names)
    for name in columns:
        if num_named[name] > 1:
            raise UserError(
                f"has {num_named[name]} columns {name!r}", file=piece.path, fix="give each a name of its own"
            )
    wanted = dict.fromkeys([*(name for name, count in num_named.items() if count == 1), *columns])
    tables = []
    for chunk in read_piece(piece, list(wanted)):
        _refuse(chunk.unreadable, chunk.reason, piece.path)
        tables += [chunk.table] if chunk.num_rows else []
    if not tables:
        return pa.table({})
    table = pa.concat_tables(tables)
    typed = {name: _typed(plain(table[name]), how) for name in table.column_names}
    return pa.table(typed | {name: _numbers_or_text(plain(table[name])) for name in piece.told})


def _of_objects(piece: Piece, columns: Sequence[str]) -> pa.Table:
    """Row by row: Arrow would read a block's column as doubles for the sake of one value."""
    assert piece.dialect is not None
    with blocks_of(piece.path, piece.dialect) as blocks:
        rows = list(json_rows.read_objects(blocks, piece.dialect.array))
    _refuse([str(row) for row in rows if not isinstance(row, dict)], json_rows.UNREADABLE, piece.path)
    names = dict.fromkeys(name for row in rows for name in row)
    below = {name: [json_rows.value_at(row, name) for row in rows] for name in dict.fromkeys([*names, *columns])}
    found = {name: values for name, values in below.items() if name in names or any(v is not None for v in values)}
    told = {
        name: _numbers_or_text(pa.array([value] * len(rows), pa.large_string())) for name, value in piece.told.items()
    }
    require_columns(columns, [*found, *told], piece.path)
    return pa.table(told | {name: _of_values(values) for name, values in found.items()})


def _of_values(values: list[Any]) -> pa.Array:
    """Values of one type as they are, of several by what their texts are."""
    if len({type(value) for value in values if value is not None}) <= 1:
        with suppress(pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            return plain(pa.array(values))
    texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    return _numbers_or_text(pa.array(texts, pa.large_string()))


def _typed(column: pa.Array, how: Dialect | None) -> pa.Array:
    """Of text files numbers, yes or no where all values are that; of others decimals as numbers."""
    if how is None:
        return _numbers_or_text(keys(column)[0]) if pa.types.is_decimal(column.type) else column
    if how.decimal == ",":
        numbers = _numbers_or_text(with_points(column))
        return column if pa.types.is_large_string(numbers.type) else numbers
    return _numbers_or_text(column)


def _joined(columns: list[pa.Array]) -> pa.Array:
    """One column of the parts of several files."""
    kinds = {column.type for column in columns if column.null_count < len(column)}
    if len(kinds) > 1:
        return _numbers_or_text(pa.concat_arrays([keys(column)[0] for column in columns]))
    kind = next(iter(kinds), pa.null())
    return pa.concat_arrays([column if column.type == kind else pa.nulls(len(column), kind) for column in columns])


def _column(table: pa.Table, name: str) -> pa.Array:
    return plain(table[name]) if name in table.column_names else pa.nulls(len(table), pa.large_string())


def _numbers_or_text(texts: pa.Array) -> pa.Array:
    """Int64 or uint64 where all of a column that is not missing is whole, else doubles, yes or no, or the texts."""
    told = known(texts)
    if told.null_count == len(told):
        return pa.nulls(len(texts))
    told = pc.if_else(pc.is_in(told, _NO_NUMBER), None, told)
    given = told.drop_null()
    if len(given) == 0:
        return texts
    if pc.all(pc.match_substring_regex(given, _WHOLE)).as_py():
        digits = pc.replace_substring_regex(told, r"^\+|\.0*$", "")
        for kind in (pa.int64(), pa.uint64(), pa.float64()):
            with suppress(pa.ArrowInvalid):
                return digits.cast(kind)
    _, wrong, _ = numbers(given)
    if not wrong.any():
        return pc.replace_substring_regex(told, r"^\+", "").cast(pa.float64())
    words = pc.utf8_lower(told)
    return pc.equal(words, "true") if pc.all(pc.is_in(words.drop_null(), _YES_OR_NO)).as_py() else texts


def _refuse(unreadable: Sequence[str], reason: str, path: str) -> None:
    if unreadable:
        what = f"has {len(unreadable):,} rows that cannot be read ({reason}), the first is {unreadable[0]:.80}"
        raise UserError(what, file=path, fix="correct them, or leave them out")
