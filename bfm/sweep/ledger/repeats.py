"""Records without what they repeat: a task and a row carry the configuration that their trial's proposal has brought.

Enters: records in ledger order. Leaves: the same with `SAME` for a part that is that of the trial's record before, and
back. Half of a long ledger is such parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bfm.files import canonical_json

SAME = "as before"
_PARTS = ("config", "scaling", "shape")
_HOLDERS = ("row", "task")
Record = dict[str, Any]


class Repeats:
    """What trials have brought so far."""

    def __init__(self) -> None:
        self._last: dict[tuple[Any, str], Any] = {}

    def shorten(self, records: Sequence[Record]) -> tuple[list[Record], Repeats]:
        """The records without repeats, and what `keep` takes once they are written."""
        new, short = Repeats(), []
        for record in records:
            holder, inside = _holder(record)
            kept = dict(inside)
            for part in _PARTS:
                if "trial" not in inside or not isinstance(inside.get(part), dict):
                    continue
                place = inside["trial"], part
                known = new._last.get(place, self._last.get(place))
                # Numbers of other types are equal, but not as JSON.
                if known is not None and canonical_json(known) == canonical_json(inside[part]):
                    kept[part] = SAME
                else:
                    new._last[place] = inside[part]
            short.append(record if kept == inside else {**record, holder: kept} if holder else kept)
        return short, new

    def keep(self, new: Repeats) -> None:
        """Take what was written."""
        self._last |= new._last

    def restore(self, records: Sequence[Record]) -> None:
        """Put back, in place, what `shorten` left out of the records that follow those seen before."""
        for record in records:
            _, inside = _holder(record)
            if "trial" not in inside:
                continue
            for part in _PARTS:
                found = inside.get(part)
                if isinstance(found, dict):
                    self._last[inside["trial"], part] = found
                elif found == SAME:
                    inside[part] = self._last[inside["trial"], part]


def _holder(record: Record) -> tuple[str, Record]:
    """The key of the part that speaks of a trial (empty: the record itself), and that part."""
    for key in _HOLDERS:
        inside = record.get(key)
        if isinstance(inside, dict):
            return key, inside
    return "", record
