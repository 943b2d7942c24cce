"""Whether running tasks still move, and the end of those that stand still.

Enters: every process that trains says every few seconds where in the code it is. Leaves: the tasks with a process that
has been at one place for too long, be it stopped, in a collective that nobody answers, or before a dead filesystem.
The signs go to one small actor, because a process that hangs can say nothing and its storage may be what hangs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

BEAT_S = 5.0
HUNG_S = 300.0
"""No step, no part of an evaluation and no checkpoint of a running task keeps one instruction busy for so long."""
_ANSWER_S = 5.0


@dataclass(frozen=True)
class Process:
    """One that trains a task."""

    task_id: str
    node: str
    pid: int


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)
class _Board:
    """The last signs. Times are this actor's own, so that clocks need not agree."""

    def __init__(self) -> None:
        self.seen: dict[Process, tuple[int, float]] = {}

    def beat(self, process: Process, place: int) -> None:
        """A process is at a place in the code."""
        if self.seen.get(process, (None,))[0] != place:
            self.seen[process] = place, time.monotonic()

    def gone(self, task_id: str, pid: int | None = None) -> None:
        """A process has ended its task; None: all of them."""
        self.seen = {
            process: sign
            for process, sign in self.seen.items()
            if process.task_id != task_id or pid not in (None, process.pid)
        }

    def still_s(self) -> dict[Process, float]:
        """How long each has been where it is."""
        return {process: time.monotonic() - since_s for process, (_, since_s) in self.seen.items()}


class Pulses:
    """Of all tasks of a sweep; pickles, so that workers can tell theirs."""

    def __init__(self) -> None:
        self._board: Any = _Board.remote()  # type: ignore[attr-defined]

    @contextmanager
    def beating(self, task_id: str) -> Iterator[None]:
        """The calling thread is at work on a task until the block ends."""
        process = Process(task_id, ray.get_runtime_context().get_node_id(), os.getpid())
        thread, done = threading.get_ident(), threading.Event()

        def beat() -> None:
            while True:
                self._board.beat.remote(process, _place(sys._current_frames().get(thread)))
                if done.wait(BEAT_S):
                    return

        threading.Thread(target=beat, name="pulse", daemon=True).start()
        try:
            yield
        finally:
            done.set()
            self._board.gone.remote(task_id, process.pid)

    def hung(self) -> dict[str, list[Process]]:
        """Task id -> its processes, of tasks of which one stands still; empty where the board does not answer."""
        try:
            still_s = ray.get(self._board.still_s.remote(), timeout=_ANSWER_S)
        except ray.exceptions.RayError:
            return {}
        hung = {process.task_id for process, seconds in still_s.items() if seconds > HUNG_S}
        return {task_id: [process for process in still_s if process.task_id == task_id] for task_id in hung}

    def nodes(self, task_id: str) -> list[str]:
        """Nodes that a task's processes were last seen on."""
        try:
            still_s = ray.get(self._board.still_s.remote(), timeout=_ANSWER_S)
        except ray.exceptions.RayError:
            return []
        return sorted({process.node for process in still_s if process.task_id == task_id})

    def end(self, processes: list[Process]) -> None:
        """Kill them, each from its own node; a stopped process hears nothing else."""
        for process in processes:
            here = NodeAffinitySchedulingStrategy(process.node, soft=False)
            _kill.options(scheduling_strategy=here).remote(process.pid)
            self._board.gone.remote(process.task_id, process.pid)


def at_work(pulses: Pulses | None, task_id: str) -> AbstractContextManager[None]:
    """The same where somebody listens."""
    return nullcontext() if pulses is None else pulses.beating(task_id)


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def _place(frame: FrameType | None) -> int:
    """A number that changes when a thread gets on: the instructions that it stands at, from the innermost frame out."""
    at = []
    while frame is not None:
        at.append((frame.f_code.co_filename, frame.f_code.co_name, frame.f_lasti))
        frame = frame.f_back
    return hash(tuple(at))
