"""How a text file is written: its encoding, and of CSV the separator, the header and the decimal mark.

A byte order mark decides the encoding; else the user's `read` does; else it is UTF-8. The separator is the format's
own (comma, of TSV tab) unless only another one gives the columns that are asked for. Decimals have a comma where the
first rows have numbers such as `1,5` and none such as `1.5`.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

from bfm.errors import UserError
from bfm.tables.csv_lines import read_rows

BLOCK_BYTES = 1 << 24
HEAD_BYTES = 1 << 16
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_SEPARATORS = {"csv": ",;\t|", "tsv": "\t,;|"}
_SEPARATOR_WORDS = {"\t": "tabs", ",": "commas"}
_WITH_COMMA = re.compile(r"[-+]?(\d{1,3}(\.\d{3})+|\d+),\d+")
_WITH_POINT = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)\.\d+")
# Three digits after a mark may be thousands.
_UNCLEAR = re.compile(r"[-+]?\d{1,3}[.,]\d{3}")


def _separator(value: str) -> str:
    if len(value) != 1 or not value.isascii() or value in '"\r\n':
        raise UserError(f"{value!r} is not one character", fix='write for example ";" or "\\t"')
    return value


def _encoding(value: str) -> str:
    try:
        "".encode(value).decode(value)
    except (LookupError, UnicodeError) as error:
        fix = "write one that Python knows, such as utf-8, latin-1, cp1252 or utf-16"
        raise UserError(f"{value!r} is no text encoding", fix=fix) from error
    return value


class ReadSpec(BaseModel):
    """What a user says of text files, where they do not show it themselves."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    delimiter: Annotated[str, AfterValidator(_separator)] | None = None
    """CSV: what separates the values."""
    decimal: Literal[".", ","] | None = None
    """The mark in numbers that are written as text; with a comma, points separate thousands."""
    encoding: Annotated[str, AfterValidator(_encoding)] | None = None
    """Where there is no byte order mark."""


@dataclass(frozen=True)
class Dialect:
    """How one text file is written."""

    form: str
    """csv, tsv or json."""
    encoding: str = "utf-8"
    newline: str = "\n"
    """`\\r` alone of old Macs; `\\r\\n` is `\\n`."""
    separator: str = ""
    names: tuple[str, ...] = ()
    """CSV: the columns, none of an empty file."""
    header_bytes: int = 0
    """CSV: where the rows begin in the UTF-8 text."""
    decimal: str | None = None
    """`.` or `,`; None where nothing shows it."""
    array: bool = False
    """JSON: one array, or objects of several lines each; else an object a line."""

    def words(self) -> str:
        """What is not the format's default, for people; empty where all is."""
        found = [] if self.encoding.startswith("utf-8") else [self.encoding]
        if self.separator and self.separator != _SEPARATORS[self.form][0]:
            found.append(f"separated by {_SEPARATOR_WORDS.get(self.separator, repr(self.separator))}")
        if self.decimal == ",":
            found.append("decimal commas")
        if self.newline == "\r":
            found.append("lines end in \\r")
        if self.array:
            found.append("JSON values that are no lines")
        return ", ".join(found)


def sniff(head: bytes, form: str, columns: Sequence[str], numbers: Collection[str] | None, read: ReadSpec) -> Dialect:
    """Dialect of a file from its first HEAD_BYTES.

    Args:
        head: as they stand in the file, uncompressed.
        form: csv, tsv or json.
        columns: of these the header should have as many as can be; without any, of columns at all.
        numbers: those that hold numbers; None where any may.
        read: what the user says.

    Raises:
        UnicodeDecodeError: the head is not in this encoding.
    """
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), read.encoding or "utf-8")
    text = codecs.getincrementaldecoder(encoding)().decode(head)
    dialect = Dialect(form, encoding, "\n" if "\n" in text or "\r" not in text else "\r", decimal=read.decimal)
    if form == "json":
        start = text.lstrip()
        return replace(dialect, array=re.match(r"\[\s*[{\]]|\{\s*\n", start) is not None)
    text = text.replace("\r", "\n") if dialect.newline == "\r" else text
    # Sheets may name their separator in a line of its own.
    named = re.match(r"sep=(.)\r?\n", text)
    # Of separators with as many of the columns, the first.
    marks = named[1] if named else read.delimiter or _SEPARATORS[form]
    found = [_header(text[named.end() if named else 0 :], mark) for mark in marks]
    separator, names, rest = max(found, key=lambda header: len({*header[1]} & {*columns} if columns else header[1]))
    header_bytes = len(text[: len(text) - len(rest)].encode())
    dialect = replace(dialect, separator=separator, names=names, header_bytes=header_bytes)
    if dialect.decimal is None:
        wanted = [name for name in names if names.count(name) == 1 and (numbers is None or name in numbers)]
        # The last row may be cut.
        sample = iter([rest[: rest.rfind("\n") + 1].encode()])
        for rows in read_rows(sample, separator, names, wanted):
            cells = itertools.chain(*(column.to_pylist() for column in rows.table.columns))
            dialect = replace(dialect, decimal=decimal_mark(cells, separator))
    return dialect


def resolved(dialects: Sequence[Dialect]) -> list[Dialect]:
    """Files that do not show their decimal mark have that of the others of the log."""
    shown = {dialect.decimal for dialect in dialects} - {None}
    common = shown.pop() if len(shown) == 1 else "."
    return [dialect if dialect.decimal else replace(dialect, decimal=common) for dialect in dialects]


def text_blocks(stream: Any, dialect: Dialect) -> Iterator[bytes]:
    """UTF-8 text in blocks of about BLOCK_BYTES that end with a line, where the text has lines.

    Raises UnicodeDecodeError; but lines that are UTF-8 already are passed on unseen.
    """
    decoder = None
    if dialect.array or codecs.lookup(dialect.encoding).name != "utf-8":
        decoder = codecs.getincrementaldecoder(dialect.encoding)()
    kept = b""
    while data := stream.read(BLOCK_BYTES):
        block = kept + (decoder.decode(data).encode() if decoder else data)
        if dialect.newline == "\r":
            block = block.replace(b"\r", b"\n")
        end = len(block) if dialect.array else block.rfind(b"\n") + 1
        if end:
            yield block[:end]
        kept = block[end:]
    if decoder:
        kept += decoder.decode(b"", final=True).encode()
    if kept:
        yield kept


def bad_byte(stream: Any, encoding: str) -> str:
    """Where a file stops to be in an encoding, for people."""
    decoder, place = codecs.getincrementaldecoder(encoding)(), 0
    for data in itertools.chain(iter(lambda: stream.read(BLOCK_BYTES), b""), [b""]):
        held = len(decoder.getstate()[0])
        try:
            decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            value = error.object[error.start]
            return f"byte {place - held + error.start:,} is 0x{value:02x}"
        place += len(data)
    return "some value"


def decimal_mark(cells: Iterable[str], separator: str) -> str | None:
    """The mark that numbers among texts show, None where none does."""
    comma = point = unclear = 0
    for cell in map(str.strip, cells):
        if _UNCLEAR.fullmatch(cell):
            unclear += "," in cell
        elif _WITH_COMMA.fullmatch(cell):
            comma += 1
        elif _WITH_POINT.fullmatch(cell):
            point += 1
    if point:
        return "."
    # Who writes decimal commas separates by semicolons.
    return "," if comma or (unclear and separator == ";") else None


def _header(text: str, separator: str) -> tuple[str, tuple[str, ...], str]:
    """Separator, column names, and the text below the header; blank lines before it are passed over."""
    stream = io.StringIO(text, newline="")
    try:
        for names in csv.reader(iter(stream.readline, ""), delimiter=separator):
            if names and any(name.strip() for name in names):
                return separator, tuple(names), stream.read()
    except csv.Error as error:
        raise UserError(f"has a header that cannot be read ({error})", fix="check the first line") from error
    return separator, (), ""
