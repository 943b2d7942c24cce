"""The workers of a simulated sweep: they are asked for, start up, train, straggle, fail, are preempted, come and go.

Enters: a Fleet, the figures of the machines, and tasks. Leaves: when each task ended, how, and what it had trained by
then. A worker is a machine of its own; one that is taken away ends its task as a real one does: after a checkpoint
where there was a notice, else with what the last checkpoint inside the rung had.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bfm.errors import UserError
from bfm.sweep.ledger.task import Task, Wait
from bfm.training.task import Account
from bfm.units import parse_number

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
DONE = "done"
YIELDED = "yielded"
PREEMPTED = "preempted"
FAILED = "failed"
"""How a task ends."""
Ended = tuple[Task, str]


@dataclass(frozen=True)
class Fleet:
    """The machines of a simulated sweep; figures that no machine has are UserErrors."""

    schedule: tuple[tuple[float, int], ...] = ((0.0, 1),)
    """(from this second on, so many workers), ascending, from 0 on. Idle ones go first; a busy one's task yields."""
    flops_per_s: float = 1e15
    """Of one worker alone."""
    startup_s: float = 0.0
    """From when a worker is asked for until it is up."""
    task_startup_s: float = 0.0
    """Of every try at a task: loading, compiling, starting its group."""
    preempted_per_hour: float = 0.0
    """Of each worker that is up; another one is asked for at once."""
    failure_share: float = 0.0
    """Of tries; lost at their end."""
    straggler_share: float = 0.0
    """Of tries, at a quarter of the throughput."""
    notice_s: float = 0.0
    """From the notice of a preemption until the worker is gone: its task yields. 0: no notice, and its task is lost."""
    efficiency: float = 1.0
    """Twice the workers are 2 x efficiency as fast."""
    checkpoint_s: float = 60.0
    """Between checkpoints inside a rung."""

    def __post_init__(self) -> None:
        if not 0 < self.flops_per_s < math.inf:
            raise UserError("must be above 0", key="--throughput", fix="write FLOP/s, e.g. 4e14")
        for name in ("startup_s", "task_startup_s", "preempted_per_hour", "notice_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError("is no number from 0 on", key=f"--{name.replace('_', '-')}", fix="write 0 or more")
        for name in ("failure_share", "straggler_share"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError("is no share", key=f"--{name.replace('_', '-')}", fix="at least 0, below 1")
        if not 0.5 <= self.efficiency <= 1:
            raise UserError("is no efficiency", key="--efficiency", fix="from 0.5 (more workers bring nothing) to 1")

    @property
    def most(self) -> int:
        """Largest number of workers."""
        return max(workers for _, workers in self.schedule)

    def workers_at(self, now_s: float) -> int:
        """How many there are."""
        return self.schedule[bisect_right(self.schedule, now_s, key=lambda change: change[0]) - 1][1]

    def speed(self, workers: int) -> float:
        """FLOP/s of so many on one task."""
        return float(self.flops_per_s * workers ** (1 + math.log2(self.efficiency)))


def parse_schedule(text: str) -> tuple[tuple[float, int], ...]:
    """ "64", or "8,64@2h,16@1d": numbers of workers and when they change. Raises UserError."""
    changes = []
    for place, part in enumerate(text.split(",")):
        number, _, when = part.strip().partition("@")
        begins = when or ("0s" if place == 0 else "")
        unit = _UNITS_S.get(begins[-1:])
        if unit is None:
            raise UserError(f"{part!r} does not say when", key="--workers", fix="write e.g. 8,64@2h,16@1d")
        changes.append(
            (parse_number(begins[:-1], key="--workers") * unit, round(parse_number(number, key="--workers")))
        )
    ordered = all(before[0] < after[0] for before, after in itertools.pairwise(changes))
    if changes[0][0] != 0 or not ordered or min(workers for _, workers in changes) < 0 or changes[0][1] < 1:
        raise UserError(f"{text!r} is no schedule", key="--workers", fix="begin with at least 1, times ascending")
    if changes[-1][1] < 1:
        raise UserError(f"{text!r} ends without workers", key="--workers", fix="end with at least 1")
    return tuple(changes)


@dataclass(eq=False)
class _Worker:
    """From when it is asked for until it is gone."""

    asked_s: float
    gone_s: float = math.inf
    is_up: bool = False
    task: str | None = None
    """Id of the one that it trains."""


@dataclass(eq=False)
class _Try:
    """A task on its workers."""

    task: Task
    workers: tuple[_Worker, ...]
    begun_s: float
    flops_per_s: float
    ended_s: float = math.inf
    how: str = ""


class Cluster:
    """The workers of one sweep on its clock, and what they train."""

    def __init__(self, fleet: Fleet, rng: np.random.Generator) -> None:
        self.fleet, self.now_s = fleet, 0.0
        self._rng = rng
        self._workers: list[_Worker] = []
        """All that are asked for or up; those with a notice are not among them any more."""
        self._gone: list[_Worker] = []
        self._tries: dict[str, _Try] = {}
        """By task id, those that have ended as well: their accounts are asked for then."""
        self._running: dict[str, _Try] = {}
        self._events: list[tuple[float, int, Callable[[], list[Ended]]]] = []
        self._count = itertools.count()
        for at_s, workers in fleet.schedule:
            self._at(at_s, partial(self._resize, workers))
        self.advance()

    @property
    def free(self) -> list[_Worker]:
        """Workers that are up and idle."""
        return [worker for worker in self._workers if worker.is_up and worker.task is None]

    def fits(self, task: Task, copies: int) -> bool:
        """Whether there are workers for so many tasks like it."""
        return copies * int(task.scaling["workers"]) <= len(self.free)

    def check_room(self, wait: Wait) -> None:
        """Raises UserError where the task that is waited with will never have its workers."""
        if wait.task is None or self._running:
            return
        needed = wait.task.scaling["workers"]
        ahead = [workers for at_s, workers in self.fleet.schedule if at_s > self.now_s]
        if needed > max(self.fleet.workers_at(self.now_s), *ahead, 0):
            fix = f"end the schedule with at least {needed}"
            raise UserError(f"leaves no room: the next task needs {needed} workers", key="--workers", fix=fix)

    def start(self, task: Task) -> None:
        """On free workers."""
        fleet, workers = self.fleet, tuple(self.free[: task.scaling["workers"]])
        slow = 4.0 if self._rng.random() < fleet.straggler_share else 1.0
        how = FAILED if self._rng.random() < fleet.failure_share else DONE
        begun = _Try(task, workers, self.now_s, fleet.speed(len(workers)) / slow)
        for worker in workers:
            worker.task = task.task_id
        self._tries[task.task_id] = self._running[task.task_id] = begun
        whole_s = fleet.task_startup_s + task.reserved_flops / begun.flops_per_s
        self._at(self.now_s + whole_s, partial(self._end, begun, how))

    def advance(self) -> list[Ended]:
        """To the next moment at which something happens; the tasks that ended then, and how."""
        self.now_s, ended = self._events[0][0], []
        while self._events and self._events[0][0] == self.now_s:
            ended += heapq.heappop(self._events)[2]()
        return ended

    def stop(self, task: Task) -> None:
        """It yields."""
        self._end(self._running[task.task_id], YIELDED)

    def left_s(self) -> dict[str, float]:
        """Id of each running task -> seconds that it will take at its speed, oldest first."""
        running = self._running.items()
        return {name: (one.task.reserved_flops - self._trained_flops(one)) / one.flops_per_s for name, one in running}

    def account(self, task: Task) -> Account:
        """What a task has trained; all of it is kept where it yielded, else what the last checkpoint had."""
        one = self._tries[task.task_id]
        trained_flops = kept_flops = self._trained_flops(one)
        if one.how != YIELDED:
            every_flops = self.fleet.checkpoint_s * one.flops_per_s
            kept_flops = math.floor(trained_flops // every_flops * every_flops)
            if not kept_flops:
                return Account(trained_flops)
        return Account(trained_flops, f"{task.task_id}-progress", task.begins_flops + kept_flops)

    def timings(self, task: Task) -> dict[str, Any]:
        """What the row of a task tells of its workers."""
        one, start_s = self._tries[task.task_id], self.fleet.task_startup_s
        train_s = one.ended_s - one.begun_s - start_s
        return {"workers": len(one.workers), "train_s": train_s, "warm_start_s": start_s}

    def busy_s(self, task: Task) -> float:
        """Worker seconds of a task that has ended."""
        one = self._tries[task.task_id]
        return (one.ended_s - one.begun_s) * len(one.workers)

    def provisioned_s(self, until_s: float) -> float:
        """Worker seconds up to a moment, from when each was asked for until it was gone."""
        lives = [(worker.asked_s, min(worker.gone_s, until_s)) for worker in [*self._workers, *self._gone]]
        return sum(max(0.0, gone_s - asked_s) for asked_s, gone_s in lives)

    def _at(self, at_s: float, happens: Callable[[], list[Ended]]) -> None:
        heapq.heappush(self._events, (at_s, next(self._count), happens))

    def _resize(self, workers: int) -> list[Ended]:
        """The schedule's next number."""
        while len(self._workers) < workers:
            self._ask()
        ended: list[Ended] = []
        while len(self._workers) > workers:
            # Of the idle ones, those that are not up yet first.
            going = min(self._workers, key=lambda worker: (worker.task is not None, worker.is_up))
            ended += self._leave(going, YIELDED, self.now_s)
        return ended

    def _ask(self) -> None:
        worker = _Worker(self.now_s)
        self._workers.append(worker)
        self._at(self.now_s + self.fleet.startup_s, partial(self._come, worker))

    def _come(self, worker: _Worker) -> list[Ended]:
        worker.is_up = True
        if self.fleet.preempted_per_hour:
            lives_s = self._rng.exponential(3600.0 / self.fleet.preempted_per_hour)
            self._at(self.now_s + lives_s, partial(self._preempt, worker))
        return []

    def _preempt(self, worker: _Worker) -> list[Ended]:
        if worker not in self._workers:
            return []
        notice_s = self.fleet.notice_s
        ended = self._leave(worker, YIELDED if notice_s else PREEMPTED, self.now_s + notice_s)
        self._ask()
        return ended

    def _leave(self, worker: _Worker, how: str, gone_s: float) -> list[Ended]:
        """No task is given to it any more; the one that it has ends."""
        self._workers.remove(worker)
        self._gone.append(worker)
        worker.gone_s = gone_s
        return [] if worker.task is None else self._end(self._running[worker.task], how)

    def _end(self, one: _Try, how: str) -> list[Ended]:
        if one.how:
            return []
        one.ended_s, one.how = self.now_s, how
        del self._running[one.task.task_id]
        for worker in one.workers:
            worker.task = None
        return [(one.task, how)]

    def _trained_flops(self, one: _Try) -> int:
        """By now, or by its end."""
        trained_s = min(self.now_s, one.ended_s) - one.begun_s - self.fleet.task_startup_s
        return min(one.task.reserved_flops, math.floor(max(0.0, trained_s) * one.flops_per_s))
