"""Whether running tasks still move, and the end of those that stand still.

Enters: every process that trains says every few seconds how many steps it has made and where in the code it is. Leaves:
the tasks whose processes have all been at one place for too long: stopped, in a collective that nobody answers, before
a dead filesystem. One that waits for another one that moves is well.
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

from bfm.sweep.ledger.lease import Holder
from ray_jobs.preemption import Notice

BEAT_S = 5.0
HUNG_S = 300.0
"""No step, no part of an evaluation and no checkpoint keeps all processes of a task at one instruction for so long."""
_ANSWER_S = 5.0
Sign = tuple[int, int]
"""Steps, and where in the code."""


@dataclass(frozen=True)
class Process:
    """One that trains a task."""

    task_id: str
    node: str
    holder: Holder


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)
class _Board:
    """The last signs. Times are this actor's own, so that clocks need not agree."""

    def __init__(self) -> None:
        self.seen: dict[Process, tuple[Sign, float]] = {}

    def beat(self, process: Process, sign: Sign) -> None:
        """A process is well."""
        if process not in self.seen or self.seen[process][0] != sign:
            self.seen[process] = sign, time.monotonic()

    def gone(self, process: Process) -> None:
        """A process has ended its task."""
        self.seen.pop(process, None)

    def still_s(self) -> dict[Process, float]:
        """How long each has been where it is."""
        return {process: time.monotonic() - since_s for process, (_, since_s) in self.seen.items()}


class Pulses:
    """Of all tasks of a sweep; pickles, so that workers can tell theirs."""

    def __init__(self) -> None:
        self._board: Any = _Board.remote()  # type: ignore[attr-defined]

    @contextmanager
    def beating(self, task_id: str, notice: Notice) -> Iterator[None]:
        """The calling thread is at work on a task until the block ends, and asks the notice after every step."""
        process = Process(task_id, ray.get_runtime_context().get_node_id(), Holder.this_process())
        thread, done = threading.get_ident(), threading.Event()

        def beat() -> None:
            while True:
                self._board.beat.remote(process, (notice.looks, place_of(sys._current_frames().get(thread))))
                if done.wait(BEAT_S):
                    return

        beats = threading.Thread(target=beat, name="pulse", daemon=True)
        beats.start()
        try:
            yield
        finally:
            done.set()
            # A sign that came after the farewell would stand for ever, and then cost the process its next task.
            beats.join()
            self._board.gone.remote(process)

    def hung(self) -> dict[str, list[Process]]:
        """Task id -> its processes, of tasks that stand still; empty where the board does not answer."""
        still_s = self._still_s()
        moving = {process.task_id for process, seconds in still_s.items() if seconds <= HUNG_S}
        hung: dict[str, list[Process]] = {}
        for process in still_s:
            if process.task_id not in moving:
                hung.setdefault(process.task_id, []).append(process)
        return hung

    def nodes(self, task_id: str) -> list[str]:
        """Nodes that a task's processes were last seen on."""
        return sorted({process.node for process in self._still_s() if process.task_id == task_id})

    def close(self) -> None:
        """End the actor: tasks that Tune keeps in its objects would hold it."""
        ray.kill(self._board)

    def _still_s(self) -> dict[Process, float]:
        try:
            return ray.get(self._board.still_s.remote(), timeout=_ANSWER_S)
        except ray.exceptions.RayError:
            return {}

    def end(self, processes: list[Process]) -> None:
        """Kill them, each from its own node; a stopped process hears nothing else."""
        for process in processes:
            here = NodeAffinitySchedulingStrategy(process.node, soft=False)
            _kill.options(scheduling_strategy=here).remote(process.holder)
            self._board.gone.remote(process)


def at_work(pulses: Pulses | None, task_id: str, notice: Notice) -> AbstractContextManager[None]:
    """The same where somebody listens."""
    return nullcontext() if pulses is None else pulses.beating(task_id, notice)


@ray.remote(num_cpus=0, max_retries=0)
def _kill(holder: Holder) -> None:
    # One that was killed while it trained says no farewell, and its id may be another one's by now.
    if holder.runs():
        os.kill(holder.pid, signal.SIGKILL)


def place_of(frame: FrameType | None) -> int:
    """A number that changes when a thread gets on: the instructions that it stands at, from the innermost frame out."""
    at = []
    while frame is not None:
        at.append((frame.f_code.co_filename, frame.f_code.co_name, frame.f_lasti))
        frame = frame.f_back
    return hash(tuple(at))
