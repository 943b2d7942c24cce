"""Storage that is away for a while pauses its caller, and costs nothing else.

Enters: an action on storage. Leaves: what it returns, once it has succeeded; an error that waiting does not mend, at
once; an OSError that says how long it was waited, after `PATIENCE_S`.
"""

from __future__ import annotations

import errno
import itertools
import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from bfm.units import format_seconds

PATIENCE_S = 660.0
"""An outage of ten minutes is slept through, with a minute to spare for the storage's own recovery."""
QUIET_S = 10.0
"""Shorter ones are not even mentioned."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0
_NAMES = (
    "EAGAIN EBUSY ECONNABORTED ECONNREFUSED ECONNRESET EHOSTDOWN EHOSTUNREACH EINTR EIO ENETDOWN ENETUNREACH ENOTCONN "
    "EPIPE EREMOTEIO ESHUTDOWN ESTALE ETIMEDOUT"
)
# Not every system has every name.
TRANSIENT = frozenset(getattr(errno, name) for name in _NAMES.split() if hasattr(errno, name))
_log = logging.getLogger(__name__)
Result = TypeVar("Result")


def patiently(action: Callable[[int], Result], place: str, patience_s: float = PATIENCE_S) -> Result:
    """The result of `action(attempt)`, tried again with growing pauses while it raises a transient OSError.

    Args:
        action: takes the number of failed attempts before this one.
        place: what the log and the error call the storage.
        patience_s: after so long the last error is raised; 0 tries once.

    Raises:
        OSError: of another kind at once, a transient one after `patience_s`.
    """
    began_s, pause_s, told = time.monotonic(), _FIRST_PAUSE_S, False
    for attempt in itertools.count():
        try:
            return action(attempt)
        except OSError as error:
            waited_s = time.monotonic() - began_s
            if error.errno not in TRANSIENT or patience_s == 0:
                raise
            if waited_s + pause_s > patience_s:
                words = f"{place}: has not answered for {format_seconds(waited_s)} ({error.strerror or error})"
                raise OSError(error.errno, words) from error
            if waited_s >= QUIET_S and not told:
                told = True
                limit = format_seconds(patience_s)
                _log.warning("%s does not answer (%s); waiting for it, %s at most", place, error, limit)
        # Many workers that lost the same storage must not come back in step.
        time.sleep(pause_s * random.uniform(0.5, 1.0))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    raise AssertionError("unreachable")
