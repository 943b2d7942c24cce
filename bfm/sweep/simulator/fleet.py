"""Workers on a virtual clock: they start up, train at a stated throughput, straggle, fail, are preempted, come and go.

Enters: a SweepDriver and what executes its tasks. Leaves: the Timeline of the sweep. The driver, its policy and its
ledger are those of a real sweep; only time is made up.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bfm.errors import UserError
from bfm.sweep.driver import Finished, SweepDriver, Wait
from bfm.sweep.task import Task
from bfm.units import parse_number

Execute = Callable[[Task], dict[str, Any]]
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


@dataclass(frozen=True)
class Fleet:
    """The machines of a simulated sweep."""

    schedule: tuple[tuple[float, int], ...] = ((0.0, 1),)
    """(from this second on, so many workers), ascending, beginning at 0."""
    flops_per_s: float = 1e15
    startup_s: float = 0.0
    """Of a worker that comes or comes back."""
    task_startup_s: float = 0.0
    """Of every task: loading, compiling."""
    preempted_per_hour: float = 0.0
    """Of each worker; its task is lost, and it comes back."""
    failure_share: float = 0.0
    """Of tasks; lost at their end."""
    straggler_share: float = 0.0
    """Of tasks, at a quarter of the throughput."""

    def check(self) -> None:
        """Raises UserError for figures that no machine has."""
        if not 0 < self.flops_per_s < math.inf:
            raise UserError("must be above 0", key="--throughput", fix="write FLOP/s, e.g. 4e14")
        for name in ("startup_s", "task_startup_s", "preempted_per_hour"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError("is no number from 0 on", key=f"--{name.replace('_', '-')}", fix="write 0 or more")
        for name in ("failure_share", "straggler_share"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError("is no share", key=f"--{name.replace('_', '-')}", fix="at least 0, below 1")

    @property
    def most(self) -> int:
        """Largest number of workers."""
        return max(workers for _, workers in self.schedule)

    def workers_at(self, now_s: float) -> int:
        """How many there are."""
        return self.schedule[bisect_right(self.schedule, now_s, key=lambda change: change[0]) - 1][1]


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


@dataclass
class Timeline:
    """What happened when."""

    elapsed_s: float = 0.0
    """Until the last task ended."""
    busy_s: float = 0.0
    """Worker seconds with a task, start-up included."""
    decisions: int = 0
    decision_s: list[float] = field(default_factory=list)
    """Real seconds that each took."""
    rows: list[tuple[float, int, dict[str, Any]]] = field(default_factory=list)
    """(virtual second, spent FLOPs, row)."""
    lost: int = 0


def decision_ms(decision_s: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile of what decisions took, JSON-able."""
    return {"median": 1e3 * float(np.median(decision_s)), "p99": 1e3 * float(np.quantile(decision_s, 0.99))}


def run_fleet(driver: SweepDriver, execute: Execute, fleet: Fleet, rng: np.random.Generator) -> Timeline:
    """Run a sweep to its end. The driver's spec must allow `fleet.most` slots."""
    timeline, events = Timeline(), _Events(fleet, rng)
    while True:
        asked: Task | Wait | Finished = Wait("no worker is free")
        while events.free > 0:
            begun_s = time.perf_counter()
            asked = driver.next_task()
            timeline.decision_s.append(time.perf_counter() - begun_s)
            if not isinstance(asked, Task):
                break
            timeline.decisions += 1
            events.start(asked)
        if isinstance(asked, Finished):
            return timeline
        ended = events.advance()
        if ended is None:
            continue
        task, used_s, fault = ended
        timeline.busy_s += used_s
        timeline.elapsed_s = events.now_s
        if fault:
            timeline.lost += 1
            driver.lost(task.task_id, fault)
        else:
            row = execute(task)
            driver.report(task.task_id, row)
            timeline.rows.append((events.now_s, driver.state.spent_flops, row))


class _Events:
    """The clock: when tasks end, workers come and workers go."""

    def __init__(self, fleet: Fleet, rng: np.random.Generator) -> None:
        self.fleet, self.rng, self.now_s = fleet, rng, 0.0
        self._ends: list[tuple[float, int, Task, float, str]] = []
        self._count = 0
        self._running = 0
        self._ready: list[float] = []
        """When workers that start up will be ready."""
        self._come(fleet.schedule[0][1])
        self._changes = list(fleet.schedule[1:])

    @property
    def free(self) -> int:
        """Workers that are up and idle."""
        ready = sum(at_s <= self.now_s for at_s in self._ready)
        return min(ready, self.fleet.workers_at(self.now_s) - self._running)

    def start(self, task: Task) -> None:
        """On a free worker."""
        self._ready.remove(min(self._ready))
        fleet = self.fleet
        slow = 4.0 if self.rng.random() < fleet.straggler_share else 1.0
        whole_s = fleet.task_startup_s + slow * task.reserved_flops / fleet.flops_per_s
        hazard = fleet.preempted_per_hour / 3600.0
        preempted_s = self.rng.exponential(1 / hazard) if hazard > 0 else math.inf
        fault = "preempted" if preempted_s < whole_s else ""
        fault = fault or ("failed" if self.rng.random() < fleet.failure_share else "")
        used_s = min(whole_s, preempted_s)
        heapq.heappush(self._ends, (self.now_s + used_s, self._count, task, used_s, fault))
        self._count += 1
        self._running += 1

    def advance(self) -> tuple[Task, float, str] | None:
        """To the next moment; the task that ended there, if one did."""
        waiting = [at_s for at_s in self._ready if at_s > self.now_s]
        moments = [*(end[0] for end in self._ends[:1]), *(change[0] for change in self._changes[:1]), *waiting]
        assert moments, "a schedule ends without workers"
        self.now_s = max(self.now_s, min(moments))
        if self._changes and self._changes[0][0] <= self.now_s:
            self._change(self._changes.pop(0)[1])
            return None
        if not self._ends or self._ends[0][0] > self.now_s:
            return None
        _, _, task, used_s, fault = heapq.heappop(self._ends)
        self._running -= 1
        if self._running + len(self._ready) < self.fleet.workers_at(self.now_s):
            self._ready.append(self.now_s + (self.fleet.startup_s if fault == "preempted" else 0.0))
        return task, used_s, fault

    def _come(self, workers: int) -> None:
        self._ready += [self.now_s + self.fleet.startup_s] * workers

    def _change(self, workers: int) -> None:
        """Idle workers go at once, busy ones when their task has ended."""
        have = self._running + len(self._ready)
        if workers >= have:
            self._come(workers - have)
        else:
            idle = max(0, workers - self._running)
            self._ready = sorted(self._ready)[:idle]
