"""Files to pieces, and pieces to raw tables: Parquet, CSV and TSV, JSON lines and JSON arrays.

CSV columns are read as text, so that no guess about a type depends on where a file is cut. What a file does not hold
may stand in its folders' names (find.py); `a.b` is the field b of a nested column a.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bfm.errors import UserError
from bfm.files import parent_store
from bfm.ragged import chunks
from bfm.tables import csv_lines, dialect, json_rows
from bfm.tables.dialect import Dialect, ReadSpec
from bfm.tables.find import COMPRESSED, file_format, partitions
from bfm.tables.raw import Lines, RawChunk
from bfm.tables.values import plain, with_points
from bfm.yaml import did_you_mean

CHUNK_ROWS = 1 << 18
_PIECE_CHUNKS = 4
ENCODING_KEY = "read.encoding"
"""Of a schema: what says how text is written that does not show it."""


@dataclass(frozen=True)
class Piece:
    """A part of a table that one task reads."""

    index: int
    path: str
    row_groups: tuple[int, ...] = ()
    """Parquet only."""
    rows: tuple[int, int] = (0, sys.maxsize)
    """Of these row groups, from one to before another."""
    dialect: Dialect | None = None
    """Of text files."""
    told: dict[str, str | None] = field(default_factory=dict)
    """Columns whose value the file's folders say."""
    commas: frozenset[str] = frozenset()
    """Columns whose numbers have decimal commas."""

    def words(self) -> str:
        """How the file was understood, where that is not as usual."""
        told = f"{', '.join(self.told)} by the folders' names" if self.told else ""
        return ", ".join(filter(None, (self.dialect.words() if self.dialect else "", told)))


def make_pieces(
    paths: Sequence[str], columns: Sequence[str], numbers: Collection[str] | None = (), read: ReadSpec | None = None
) -> list[Piece]:
    """Cut files into pieces; Parquet files by row groups, large ones of these by rows, others whole.

    Args:
        paths: of the files.
        columns: those that are needed: checked where a file names its own.
        numbers: columns that hold numbers; None where any may.
        read: what the user says of text files.

    Raises:
        UserError: a file is unreadable or lacks a column.
    """
    pieces: list[Piece] = []
    texts = [path for path in paths if not _is_parquet(path)]
    dialects = iter(dialect.resolved([_sniffed(path, columns, numbers, read) for path in texts]))
    for path in paths:
        if _is_parquet(path):
            file = open_parquet(path)
            present = json_rows.column_paths(file.schema_arrow)
            num_rows = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            parts = [
                Piece(0, path, tuple(range(low, high)), rows)
                for low, high in chunks(np.array(num_rows), CHUNK_ROWS)
                for rows in _equal_parts(sum(num_rows[low:high]))
            ]
        else:
            how = next(dialects)
            parts = [
                Piece(0, path, dialect=how, commas=frozenset(numbers or ()) if how.decimal == "," else frozenset())
            ]
            present = list(how.names)
        said = {name: value for name, value in partitions(path).items() if name in columns}
        told = {name: value for name, value in said.items() if name not in present}
        if present:
            require_columns(columns, [*present, *told], path)
        pieces += [replace(part, index=len(pieces) + n, told=told) for n, part in enumerate(parts)]
    return pieces


def _equal_parts(num_rows: int) -> list[tuple[int, int]]:
    """Ranges of rows. To read the end of a row group is to decode its beginning, so the parts are few."""
    count = max(1, -(-num_rows // (_PIECE_CHUNKS * CHUNK_ROWS)))
    bounds = [num_rows * part // count for part in range(count + 1)]
    return list(itertools.pairwise(bounds))


def read_piece(piece: Piece, columns: Sequence[str]) -> Iterator[RawChunk]:
    """Rows of a piece in chunks of bounded size. Raises UserError where the file cannot be read."""
    how = piece.dialect
    wanted = [name for name in columns if name not in piece.told or (how and how.form == "json")]
    with _readable(piece.path):
        for chunk in _read_parquet(piece, wanted) if how is None else _read_text(piece.path, how, wanted):
            table = chunk.table
            for name, value in piece.told.items():
                if name not in table.column_names and chunk.names:
                    table = table.append_column(name, pa.array([value] * len(table), pa.large_string()))
            for place, name in enumerate(table.column_names):
                if name in piece.commas:
                    table = table.set_column(place, name, with_points(plain(table[name])))
            yield replace(chunk, table=table, names=chunk.names | piece.told.keys())


def read_file(path: str, columns: Sequence[str], numbers: Collection[str], read: ReadSpec | None) -> Iterator[RawChunk]:
    """Rows of a whole file (see `make_pieces`). Raises UserError where it has no rows or lacks a column."""
    names, rows = set[str](), 0
    for piece in make_pieces([path], columns, numbers, read):
        for chunk in read_piece(piece, columns):
            names |= chunk.names
            rows += chunk.num_rows
            yield chunk
    if rows == 0:
        raise UserError("has no rows", file=path, fix="give a table with rows")
    require_columns(columns, sorted(names), path)


def table_columns(path: str, columns: Sequence[str] = (), read: ReadSpec | None = None) -> list[str]:
    """Column names of a file (of JSON: of its first block); `columns` are some of them."""
    if _is_parquet(path):
        return json_rows.column_paths(open_parquet(path).schema_arrow)
    how = _sniffed(path, columns, (), read)
    if how.form != "json":
        return list(how.names)
    first = next(filter(lambda chunk: chunk.names, _read_text(path, how, columns)), RawChunk(pa.table({})))
    return sorted(first.names)


def open_parquet(path: str) -> pq.ParquetFile:
    """A Parquet file. Raises UserError where it cannot be read."""
    store, name = parent_store(path)
    with _readable(path):
        return pq.ParquetFile(store.path(name) if store.is_local else store.open(name))


@contextmanager
def blocks_of(path: str, how: Dialect) -> Iterator[Iterator[bytes]]:
    """UTF-8 text of a file in blocks (see dialect.text_blocks). Raises UserError where it cannot be read."""
    with _readable(path, how), _open_stream(path) as stream:
        yield dialect.text_blocks(stream, how)


def require_columns(columns: Sequence[str], present: Sequence[str], path: str) -> None:
    """Raise UserError for the first column that is not present."""
    for column in columns:
        if column not in present:
            raise UserError(f"has no column {column!r}", file=path, fix=did_you_mean(column, present))


# ---------------------------------------------------------------- inside


def _is_parquet(path: str) -> bool:
    return file_format(path) == "parquet"


def _open_stream(path: str) -> Any:
    """Bytes of a file, uncompressed."""
    store, name = parent_store(path)
    codec = COMPRESSED.get(Path(name.lower()).suffix)
    stream = store.open(name)
    return pa.CompressedInputStream(stream, codec) if codec else pa.PythonFile(stream, "r")


@contextmanager
def _readable(path: str, how: Dialect | None = None) -> Iterator[None]:
    """A file that cannot be read is the user's to restore."""
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeDecodeError, EOFError, OSError) as error:
        text = " ".join(str(error).split())
        # Arrow cannot hand over a row of the wrong width that is not UTF-8.
        if isinstance(error, UnicodeDecodeError) or re.search("utf-?8|CSV parse error", text, re.IGNORECASE):
            encoding = how.encoding if how else "utf-8"
            with _open_stream(path) as stream:
                what = f"is not {encoding} text: {dialect.bad_byte(stream, encoding)}"
            fix = "name its encoding in the schema, e.g. `read: {encoding: latin-1}`"
            raise UserError(what, file=path, key=ENCODING_KEY, fix=fix) from error
        raise UserError(f"cannot be read ({text:.160})", file=path, fix="restore the file or leave it out") from error
    except UserError as error:
        if error.file is None:
            raise UserError(error.what, file=path, key=error.key, fix=error.fix) from error
        raise


def _sniffed(path: str, columns: Sequence[str], numbers: Collection[str] | None, read: ReadSpec | None) -> Dialect:
    read = read or ReadSpec()
    with _readable(path, Dialect("", read.encoding or "utf-8")):
        with _open_stream(path) as stream:
            head = stream.read(dialect.HEAD_BYTES)
        return dialect.sniff(head, file_format(path), columns, numbers, read)


def _read_parquet(piece: Piece, names: Sequence[str]) -> Iterator[RawChunk]:
    file = open_parquet(piece.path)
    place, (low, high) = 0, piece.rows
    for batch in file.iter_batches(CHUNK_ROWS, row_groups=list(piece.row_groups), columns=list(names)):
        inside = batch.slice(max(low - place, 0), max(high - max(low, place), 0))
        if inside.num_rows:
            yield RawChunk(json_rows.chosen(pa.Table.from_batches([inside]), names), names=frozenset(names))
        if (place := place + batch.num_rows) >= high:
            break


def _read_text(path: str, how: Dialect, names: Sequence[str]) -> Iterator[RawChunk]:
    with blocks_of(path, how) as blocks:
        if how.form == "json":
            yield from (json_rows.read_values if how.array else json_rows.read_lines)(blocks, names)
        elif how.names:
            first = next(blocks)
            header = first[: how.header_bytes]
            yield RawChunk(pa.table({}), lines=Lines(header=header.count(b"\n") or 1))
            rows = itertools.chain([first[how.header_bytes :]], blocks)
            yield from csv_lines.read_rows(filter(None, rows), how.separator, how.names, names)
