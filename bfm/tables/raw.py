"""Rows as they were read, with the account of the lines that they stood on: what the readers of text give."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pyarrow as pa

Lines = Counter[str]
"""Lines of text by what they are: `rows`, `header`, `blank`, and `inside values`, the further lines of a row that spans
several. `with quotes as text` are among the rows: lines with quotes that nobody closes."""


@dataclass(frozen=True)
class RawChunk:
    """Some rows as read, and texts that could not be read as rows."""

    table: pa.Table
    unreadable: tuple[str, ...] = ()
    reason: str = ""
    names: frozenset[str] = frozenset()
    """All columns of the rows, wanted or not."""
    lines: Lines = field(default_factory=Lines)
    """Of text that has lines."""

    @property
    def num_rows(self) -> int:
        """Rows, unreadable ones included."""
        return self.table.num_rows + len(self.unreadable)
