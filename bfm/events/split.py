"""Where training ends: boundaries in time from the histogram of all event times, or per user by leave-one-out.

An event at time t is a training event where t < valid_from, a validation event where valid_from <= t < test_from, else
a test event. Leave-one-out: a user's last event is for the test, the one before for validation; users with fewer than
three events are training only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from bfm.errors import UserError
from bfm.events.histogram import Histogram
from bfm.events.schema import SplitSpec, TimeSpec
from bfm.events.times import times
from bfm.tables.values import plain

_LEAVE_ONE_OUT_FIX = "give valid_from and test_from, other fractions, or by: leave_one_out"


@dataclass(frozen=True)
class Split:
    """Boundaries in milliseconds; both None: leave-one-out."""

    valid_from: int | None = None
    test_from: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The manifest's form."""
        if self.valid_from is None:
            return {"by": "leave_one_out"}
        return {"by": "time", "valid_from": self.valid_from, "test_from": self.test_from}

    def ends(self, time: np.ndarray, user_offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Counts of each user's events that lie in training, and before the end of validation.

        Args:
            time: [E], ascending inside each user. user_offsets: [U+1].

        Returns:
            train_end [U], valid_end [U].
        """
        lengths = np.diff(user_offsets)
        if self.valid_from is None or self.test_from is None:
            long_enough = lengths >= 3
            return lengths - 2 * long_enough, lengths - long_enough
        before_valid = np.concatenate([[0], np.cumsum(time < self.valid_from)])
        before_test = np.concatenate([[0], np.cumsum(time < self.test_from)])
        return np.diff(before_valid[user_offsets]), np.diff(before_test[user_offsets])


def time_split(spec: SplitSpec, times_seen: Histogram) -> Split:
    """Boundaries from dates, or such that the wanted shares of events lie before them (to the histogram's bin).

    Raises:
        UserError: a date is no time, the boundaries are not in order, or a part would be empty.
    """
    if spec.valid_from is not None and spec.test_from is not None:
        valid_from, test_from = (_date(getattr(spec, key), f"split.{key}") for key in ("valid_from", "test_from"))
    else:
        valid_share, test_share = spec.shares
        valid_from, test_from = _boundaries(times_seen, 1 - test_share - valid_share, 1 - test_share)
    if valid_from >= test_from:
        raise UserError("the validation part would be empty", key="split", fix=_LEAVE_ONE_OUT_FIX)
    first, last = times_seen.starts, times_seen.starts + (1 << times_seen.shift) - 1
    parts = {
        "training": first < valid_from,
        "validation": (last >= valid_from) & (first < test_from),
        "test": last >= test_from,
    }
    for part, inside in parts.items():
        if not inside.any():
            raise UserError(f"the {part} part has no events", key="split", fix=_LEAVE_ONE_OUT_FIX)
    return Split(valid_from, test_from)


def _boundaries(histogram: Histogram, before_valid: float, before_test: float) -> tuple[int, int]:
    """The bin edges with the shares of events before them nearest to the wanted ones, and three parts left."""
    if len(histogram.bins) < 3:
        raise UserError("there are fewer than three distinct times", key="split", fix="use by: leave_one_out")
    before = np.concatenate([[0], np.cumsum(histogram.counts)])[:-1] / histogram.total
    test = int(np.abs(before[2:] - before_test).argmin()) + 2
    valid = int(np.abs(before[1:test] - before_valid).argmin()) + 1
    return int(histogram.starts[valid]), int(histogram.starts[test])


def _date(text: str, key: str) -> int:
    values, wrong = times(plain(pa.array([text])), TimeSpec(column=key))
    if wrong[0] or values[0].as_py() is None:
        raise UserError(f"{text!r} is no date", key=key, fix="write for example 2017-11-01")
    return int(values[0].as_py())
