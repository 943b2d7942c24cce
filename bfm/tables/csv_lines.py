"""CSV text to columns of text, with an account of its lines: none is swallowed by a quote that nobody closes.

Well-formed lines (RFC 4180) go to Arrow as they are. The others are looked at one by one, as the first of these that
has as many values as the header: with quoted values that may span lines, the same with `\\"` for a quote inside, or the
line alone with its stray quotes as text. A value spans no lines that look like rows themselves.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.csv

from bfm.errors import UserError
from bfm.tables.raw import Lines, RawChunk

_WIDTH = "wrong number of columns"
_LONGEST_VALUE = 1 << 20
_LINES_LOOKED_AT = 100
_NUMBER_LIKE = re.compile(rb"[-+:./TZ ]*[0-9][-+0-9:./TZ ]*")
_NEWLINE, _RETURN, _QUOTE = b'\n\r"'


def read_rows(
    blocks: Iterator[bytes], separator: str, names: Sequence[str], columns: Sequence[str]
) -> Iterator[RawChunk]:
    """Rows of UTF-8 text without its header, block by block; blocks end with a line.

    Raises:
        UserError: a wanted column stands twice, or rows and lines do not add up.
        pa.ArrowInvalid: a value that is wanted is not UTF-8.
    """
    for name in columns:
        if names.count(name) > 1:
            raise UserError(f"has {names.count(name)} columns {name!r}", fix="give each a name of its own")
    kept, block = b"", next(blocks, b"")
    while kept or block:
        following = next(blocks, b"")
        text = kept + block
        found, kept = _mended(text, separator.encode(), len(names), last=not following)
        yield _parsed(found, separator, names, columns)
        block = following


@dataclass
class _Mended:
    """Text that Arrow reads as it is meant."""

    text: bytes
    misfits: list[bytes]
    lines: Lines
    mended: bool


@dataclass
class _Record:
    """The values of one row."""

    values: list[bytes]
    end: int
    """Where the next line begins."""
    literal: bool
    """A quote at the beginning of a value was taken as text."""


def _mended(text: bytes, separator: bytes, width: int, last: bool) -> tuple[_Mended, bytes]:
    """Text whose every line break ends a row or stands inside quotes, and what is left for the next block."""
    codes = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(codes == _NEWLINE)
    if not text.endswith(b"\n"):
        ends = np.append(ends, len(text))
    starts = np.concatenate([[0], ends[:-1] + 1])
    found = _Mended(text, [], Lines(), False)
    suspects = _suspects(codes, starts, separator[0])
    parts, place, stop = [], 0, len(text)
    inside = np.zeros(len(starts), bool)
    for start in starts[suspects].tolist():
        if start < place:
            continue
        record = _record(text, start, separator, width)
        unclosed = record.literal or len(record.values) != width
        if unclosed and not last and len(text) - start < _LONGEST_VALUE:
            stop = start
            break
        parts.append(text[place:start])
        place = record.end
        first, after = np.searchsorted(starts, (start, place))
        inside[first + 1 : after] = True
        if len(record.values) != width:
            found.misfits.append(text[start:place].rstrip(b"\r\n"))
            continue
        found.lines["with quotes as text"] += record.literal
        parts.append(separator.join(b'"' + value.replace(b'"', b'""') + b'"' for value in record.values) + b"\n")
    if parts or stop < len(text):
        found.text = b"".join([*parts, text[place:stop]])
        found.mended = True
    seen = starts < stop
    length = ends - starts
    length -= (length > 0) & (codes[ends - 1] == _RETURN)
    blank = seen & ~inside & (length == 0)
    found.lines.update({"inside values": int(inside.sum()), "blank": int(blank.sum())})
    found.lines["rows"] = int(seen.sum()) - found.lines["inside values"] - found.lines["blank"]
    return found, text[stop:]


def _suspects(codes: np.ndarray, starts: np.ndarray, separator: int) -> np.ndarray:
    """Lines [indices, rising] in which quotes do more than to enclose whole values, or that hold a lone return."""
    found = []
    returns = np.flatnonzero(codes == _RETURN)
    padded = np.append(codes, np.uint8(_NEWLINE))
    lone = returns[padded[returns + 1] != _NEWLINE]
    if len(lone):
        found.append(np.searchsorted(starts, lone, side="right") - 1)
    quotes = np.flatnonzero(codes == _QUOTE)
    starts_value, ends_value = np.zeros((2, 256), bool)
    starts_value[[separator, _NEWLINE, _QUOTE]] = True
    ends_value[[separator, _NEWLINE, _RETURN, _QUOTE]] = True
    first = np.searchsorted(quotes, starts)
    counts = np.diff(first, append=len(quotes))
    odd = counts & 1
    if odd.any() or not (starts_value[padded[quotes[::2] - 1]].all() and ends_value[padded[quotes[1::2] + 1]].all()):
        closes = ((np.arange(len(quotes)) - np.repeat(first, counts)) & 1).astype(bool)
        good = np.where(closes, ends_value[padded[quotes + 1]], starts_value[padded[quotes - 1]])
        found += [np.searchsorted(starts, quotes[~good], side="right") - 1, np.flatnonzero(odd)]
    return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)


def _record(text: bytes, start: int, separator: bytes, width: int) -> _Record:
    """The record that begins at `start`; where no reading fits, the line alone."""
    spanning, escaped, alone = _patterns(separator)
    for pattern in (spanning, escaped):
        record = _read(text, start, separator, pattern)
        if len(record.values) == width and not _are_rows(text[start : record.end], separator, alone, width):
            if pattern is escaped:
                record.values = [re.sub(rb"\\(.)", rb"\1", value, flags=re.DOTALL) for value in record.values]
            return record
    return _read(text, start, separator, alone)


@lru_cache
def _patterns(separator: bytes) -> tuple[re.Pattern[bytes], ...]:
    """A quoted value that may span lines, one with backslashes before its quotes, and one inside of a line."""
    after = rb"(?=" + re.escape(separator) + rb"|\r?\n|\r?\Z)"
    bodies = (rb'(?:[^"]++|"")*+', rb'(?:[^"\\]++|\\.|"")*+', rb'(?:[^"\n]++|"")*+')
    return tuple(re.compile(rb'"(' + body + rb')"' + after, re.DOTALL) for body in bodies)


def _read(text: bytes, start: int, separator: bytes, quoted: re.Pattern[bytes]) -> _Record:
    """What stands from `start` to the end of a line that is not inside of quotes."""
    record, place = _Record([], start, False), start
    while True:
        match = quoted.match(text, place, place + _LONGEST_VALUE)
        if match is not None:
            value, place = match[1].replace(b'""', b'"'), match.end()
        else:
            line_end = text.find(b"\n", place)
            line_end = len(text) if line_end < 0 else line_end
            stop = text.find(separator, place, line_end)
            value = text[place : line_end if stop < 0 else stop]
            place += len(value)
            record.literal |= value.startswith(b'"')
        record.values.append(value)
        if text[place : place + 1] != separator:
            break
        place += 1
    record.values[-1] = record.values[-1].removesuffix(b"\r") if match is None else record.values[-1]
    record.end = text.find(b"\n", place) + 1 or len(text)
    return record


def _are_rows(record: bytes, separator: bytes, alone: re.Pattern[bytes], width: int) -> bool:
    """Whether each of several lines is a row of its own: as many values, and numbers where the first one has some."""
    lines = record.splitlines(keepends=True)[:_LINES_LOOKED_AT]
    if len(lines) < 2:
        return False
    rows = [_read(line, 0, separator, alone).values for line in lines]
    numbers = [place for place, value in enumerate(rows[0]) if _NUMBER_LIKE.fullmatch(value)]
    return bool(numbers) and all(
        len(row) == width and all(_NUMBER_LIKE.fullmatch(row[place]) for place in numbers) for row in rows
    )


def _parsed(found: _Mended, separator: str, names: Sequence[str], columns: Sequence[str]) -> RawChunk:
    misfits = list(found.misfits)

    def keep(row: pyarrow.csv.InvalidRow) -> str:
        misfits.append(row.text.encode())
        return "skip"

    # Arrow knows the columns by their place: names that nobody asked for may stand twice.
    places = {name: str(names.index(name)) for name in columns} or {"": "0"}
    expected = found.lines["rows"] - len(found.misfits)
    table = pa.table({name: pa.array([], pa.large_string()) for name in places})
    if expected:
        table = pyarrow.csv.read_csv(
            io.BytesIO(found.text),
            pyarrow.csv.ReadOptions(
                use_threads=False,
                block_size=len(found.text) + 1,
                column_names=[str(place) for place in range(len(names))],
            ),
            pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=found.mended, invalid_row_handler=keep),
            pyarrow.csv.ConvertOptions(
                include_columns=list(places.values()),
                column_types=dict.fromkeys(places.values(), pa.large_string()),
                null_values=[],
                strings_can_be_null=False,
            ),
        ).rename_columns(list(places))
    if table.num_rows + len(misfits) != found.lines["rows"]:
        what = f"{found.lines['rows']:,} lines were read as {table.num_rows + len(misfits):,} rows"
        raise UserError(what, fix="check the quotes, or give another `read: {delimiter: ...}`")
    texts = tuple(line.decode("utf-8", "replace") for line in misfits)
    return RawChunk(table, texts, _WIDTH, frozenset(names), found.lines)
