"""SIGINT and SIGTERM as an exception in the main thread, so that a sweep ends by unwinding: ledger, lease, Ray."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """SIGINT or SIGTERM; not an Exception, so that nothing on the way takes it for a failed task."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def signals_raise() -> Iterator[None]:
    """The first SIGINT or SIGTERM leaves the block as Interrupted; a second one ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = [signal.SIGINT]

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        received[0] = signal.Signals(number)
        # The one exception that Ray's native code lets through.
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(received[0]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
