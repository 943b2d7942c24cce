"""Stops a sweep whose tasks are lost to a fault that is nobody's configuration: a full disk, a broken machine image.

Enters: rows and losses of a driver, as they are written. Leaves: PausedError, with one line for a person. What was lost
before the driver began is left out: whoever starts it again has mended something.
"""

from __future__ import annotations

from collections import deque

from bfm.errors import PausedError
from bfm.sweep.ledger.state import Record, SweepState

_LOOKS_BACK = 5
_OF_ONE_KIND = 3
_BEFORE_ANY_ROW = 2


class Breaker:
    """The last tasks of a sweep, and whether their losses are of one kind."""

    def __init__(self, state: SweepState) -> None:
        self._state = state
        self._last: deque[tuple[str, str] | None] = deque(maxlen=_LOOKS_BACK)

    def row(self) -> None:
        """A task brought its row."""
        self._last.append(None)

    def loss(self, record: Record) -> None:
        """A task was lost. Raises PausedError at the second in a row of one kind, of several trials, before any row of
        the sweep, and at the third among the last five tasks.

        A worker that dies in the middle of its work may have been taken away, so it is not counted.
        """
        kind = record["reason"].partition(":")[0]
        if ":" not in record["reason"] and record["charged_flops"] > 0:
            return
        self._last.append((kind, record["trial"]))
        trials = [entry[1] for entry in self._last if entry is not None and entry[0] == kind]
        in_a_row = [entry for entry in list(self._last)[-_BEFORE_ANY_ROW:] if entry is not None and entry[0] == kind]
        begins_so = not self._state.arrivals and len(in_a_row) == _BEFORE_ANY_ROW
        if (begins_so or len(trials) >= _OF_ONE_KIND) and len(set(trials)) > 1:
            raise PausedError(
                f"paused: {len(trials)} of the last {len(self._last)} tasks were lost in the same way "
                f"({record['reason']}); mend that, and the same command goes on"
            )
