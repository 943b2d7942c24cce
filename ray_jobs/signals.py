"""SIGINT and SIGTERM: a sweep ends by unwinding, and may ask its tasks for checkpoints before."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """SIGINT or SIGTERM; not an Exception, so that nothing on the way takes it for a failed task."""

    def __init__(self, number: int, sender: str | None = None) -> None:
        """`sender`: who asked for it, where no signal was sent."""
        super().__init__(sender or signal.Signals(number).name)
        self.number = number


class Signals:
    """What has been received inside `signals_raise`."""

    def __init__(self) -> None:
        self.waits = False
        """Whether the first signal is only noted, for somebody who looks at `received`."""
        self.received: int | None = None
        self.sender: str | None = None
        """Who asked from elsewhere, where this is no signal."""

    def ask(self, sender: str) -> None:
        """As if SIGTERM had come."""
        if self.received is None:
            self.received, self.sender = signal.SIGTERM, sender


@contextmanager
def signals_raise() -> Iterator[Signals]:
    """The first SIGINT or SIGTERM leaves the block as Interrupted, or is noted where the block says so; the next one
    leaves it in any case, and a third ends the process."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        noted = signals.waits and signals.received is None
        signals.received = signal.Signals(number)
        if noted:
            return
        signal.signal(number, signal.SIG_DFL)
        # The one exception that Ray's native code lets through.
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    except KeyboardInterrupt:
        raise Interrupted(signals.received or signal.SIGINT) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
