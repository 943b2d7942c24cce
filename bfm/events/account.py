"""What became of the lines and rows of a log: an account that adds up, for the manifest's checks and for people.

Lines of text are rows, headers, blank, or go on inside a value; rows are events or in quarantine for a reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bfm.errors import UserError
from bfm.events.clean import FAULT, Cleaned, Losses
from bfm.events.ties import Ties
from bfm.events.times import TimeRange, check_clock, merged
from bfm.tables.pieces import require_columns
from bfm.tables.raw import Lines
from bfm.tables.understood import read_as, reading_lines, short_names

_MOST_FILES = 10
_ENOUGH = 10
"""Rows from which on a file's times are looked at by themselves."""
_LITERAL = "with quotes as text"
"""Lines that are counted as something else, too."""


@dataclass
class Reading:
    """What was read of a log, or of a piece of it."""

    path: str = ""
    words: str = ""
    """How the file was understood, where that is not as usual."""
    rows: int = 0
    lines: Lines = field(default_factory=Lines)
    """Of text."""
    columns: set[str] = field(default_factory=set)
    reasons: Counter[str] = field(default_factory=Counter)
    """Of unusable rows."""
    losses: Losses = field(default_factory=Losses)
    ties: Ties = field(default_factory=Ties)
    """In the raw order."""
    guessed_times: dict[str, TimeRange] = field(default_factory=dict)
    """By key of the schema."""

    def add(self, cleaned: Cleaned) -> None:
        """Count some more rows (their ties apart)."""
        self.rows += cleaned.table.num_rows
        self.lines += cleaned.lines
        self.columns |= cleaned.names
        self.reasons.update(cleaned.table[FAULT].drop_null().to_pylist())
        self.losses += cleaned.losses
        for key, found in cleaned.guessed_times.items():
            self.guessed_times[key] = merged([self.guessed_times.get(key), found])


def check_reading(readings: Sequence[Reading], columns: Sequence[str]) -> int:
    """Rows of a log that was read whole; `columns` are those that it needs.

    Raises UserError where it has no rows, none of them has a column, or a file's times whose unit was guessed are where
    no log is.
    """
    rows = sum(reading.rows for reading in readings)
    if rows == 0:
        raise UserError("the log has no rows", key="LOG", fix="check the files")
    # The columns of JSON are known at the end only.
    if present := set[str]().union(*(reading.columns for reading in readings)):
        require_columns(columns, sorted(present), "LOG")
    by_file: dict[tuple[str, str], list[Reading]] = {}
    for reading in readings:
        for key in reading.guessed_times:
            by_file.setdefault(("", key), []).append(reading)
            by_file.setdefault((reading.path, key), []).append(reading)
    for (path, key), of_file in by_file.items():
        # A few odd rows are no reason to refuse a log; that it begins in 1970 is said.
        if not path or sum(reading.rows for reading in of_file) >= _ENOUGH:
            check_clock(merged(reading.guessed_times[key] for reading in of_file), key, path or None)
    return rows


def reading_checks(pieces: Sequence[Reading], left_out: Mapping[str, int]) -> dict[str, Any]:
    """The manifest's checks about files and lines; empty ones are as usual."""
    lines, reasons, rows = Lines(), dict[str, Counter[str]](), Counter[str]()
    names = dict(zip([piece.path for piece in pieces], short_names([piece.path for piece in pieces]), strict=True))
    for piece in pieces:
        assert not piece.lines or piece.lines["rows"] == piece.rows, f"{piece.path}: lines and rows do not add up"
        lines += piece.lines
        rows[names[piece.path]] += piece.rows
        reasons.setdefault(names[piece.path], Counter()).update(piece.reasons)
    worst = sorted((name for name in reasons if reasons[name]), key=lambda name: -reasons[name].total())
    files = {name: {"rows": rows[name], **reasons[name]} for name in worst[:_MOST_FILES]}
    if len(worst) > _MOST_FILES:
        files["others"] = {"files": len(worst) - _MOST_FILES}
    return {
        "lines": dict(lines),
        "files": files if len(reasons) > 1 else {},
        "read_as": read_as([(piece.path, piece.words) for piece in pieces]),
        "left_out": dict(left_out),
    }


def counts_text(counts: Mapping[str, int]) -> str:
    """`missing user 3, unparsable time 1`."""
    return ", ".join(f"{what} {count:,}" for what, count in counts.items())


def line_account(lines: Mapping[str, int]) -> list[str]:
    """The lines of text, of what and how many, and those that had to be repaired; nothing where the format has none."""
    if not lines:
        return []
    parts = {what: count for what, count in lines.items() if count and what != _LITERAL}
    told = [f"lines: {sum(parts.values()):,} = {' + '.join(f'{count:,} {what}' for what, count in parts.items())}"]
    if literal := lines.get(_LITERAL, 0):
        told.append(f"repaired: quotes that nobody closes were taken as text in {literal:,} line{'s' * (literal > 1)}")
    return told


def account_lines(rows: int, events: int, quarantined: Mapping[str, int], checks: Mapping[str, Any]) -> list[str]:
    """The account of a preparation for people; what did not happen is not said."""
    out = sum(quarantined.values())
    reasons = f" ({counts_text(quarantined)})" if out else ""
    told = [f"rows: {rows:,} read = {events:,} events + {out:,} quarantined{reasons}"]
    told += line_account(checks.get("lines", {}))
    for name, counts in checks.get("files", {}).items():
        told.append(f"file {name}: {counts_text(counts)}")
    if repaired := checks.get("repairs"):
        told.append(f"repaired: values taken as missing: {counts_text(repaired)}")
    told += reading_lines(checks.get("read_as", {}), checks.get("left_out", {}))
    if never := checks.get("item_keys_that_never_meet"):
        told.append(
            f"warning: no item of the log has a row in the item table: the log has keys such as {never[0]!r}, "
            f"the table such as {never[1]!r}"
        )
    elif without := checks.get("items_without_row"):
        told.append(f"warning: {without:,} items of the log have no row in the item table")
    if unreadable := checks.get("item_rows_unreadable"):
        told.append(f"warning: {unreadable:,} rows of the item table could not be read")
    return told
