"""Notices that this machine or process will go: a drained Ray node (a spot notice is forwarded as one), or SIGTERM.

Enters: nothing but what Ray and the system say. Leaves: a flag that training looks at after every step, so that it
leaves a checkpoint and ends before it is killed.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Collection
from types import FrameType

import ray

LOOK_S = 5.0
_GRACE_S = 60.0
"""A process that got SIGTERM ends by itself after so long, whatever it is doing."""
_log = logging.getLogger(__name__)


def draining_nodes() -> Collection[str]:
    """Ids of the nodes that are to go. What Ray Train's own watcher asks; there is no public call."""
    return ray._private.state.state.get_draining_nodes()


class Notice:
    """Whether this process shall end; looks at its node from the first question on."""

    def __init__(self) -> None:
        self._given = threading.Event()
        self.looks = 0
        """How often it was asked for: after every step."""
        self._watch: threading.Thread | None = None

    def __call__(self) -> bool:
        """Whether a notice was given."""
        self.looks += 1
        if self._watch is None:
            self._watch = threading.Thread(target=self._look, name="preemption", daemon=True)
            self._watch.start()
        return self.given

    @property
    def given(self) -> bool:
        """Whether one was given so far."""
        return self._given.is_set()

    def take_sigterm(self) -> None:
        """Only in the main thread: SIGTERM is a notice from here on."""

        def terminate(number: int, frame: FrameType | None) -> None:
            self._given.set()
            threading.Timer(_GRACE_S, os._exit, [128 + number]).start()

        signal.signal(signal.SIGTERM, terminate)

    def _look(self) -> None:
        node = ray.get_runtime_context().get_node_id()
        while not self._given.wait(LOOK_S):
            try:
                draining = draining_nodes()
            except Exception as error:
                _log.warning("cannot ask which nodes are drained: %s", error)
                continue
            if node in draining:
                self._given.set()
