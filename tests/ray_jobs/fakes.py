"""A driver without a ledger and a Ray Tune without Ray, so that the searcher's decisions can be watched in a test."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from bfm.sweep.driver.requests import Request
from bfm.sweep.driver.workers import GROW_LEFT_S
from bfm.sweep.ledger.task import Finished, Task, Wait
from bfm.training.task import Account
from ray_jobs.desk import Desk
from ray_jobs.room import Resources
from ray_jobs.search import DriverSearcher
from ray_jobs.signals import Signals
from ray_jobs.trial import FATAL, LOST, ROW

CPU_SCALING = {"engine": "plain", "workers": 1, "zero_stage": 0, "cpus": 0.5, "gpus": 0.0, "micro_groups": 1}


def make_task(number: int, scaling: dict[str, Any] = CPU_SCALING) -> Task:
    return Task(
        task_id=f"t{number}-r0-a0",
        trial=f"t{number}",
        rung=0,
        rung_flops=1000,
        config={"params": 1000.0},
        seed=0,
        resume_from=None,
        from_rung=None,
        reserved_flops=1000,
        scaling=dict(scaling),
    )


class FakeDriver:
    """Hands out `num_tasks` tasks; every `batch` tasks it waits until all that are running have ended."""

    def __init__(
        self, num_tasks: int, slots: int, batch: int = 10**9, scaling: Sequence[dict[str, Any]] = (CPU_SCALING,)
    ) -> None:
        self.left, self.slots, self.batch, self.scaling = num_tasks, slots, batch, scaling
        self.open: dict[str, Task] = {}
        self.rows: dict[str, Any] = {}
        self.losses: dict[str, str] = {}
        self.faults: list[str] = []
        self.yields: dict[str, Account] = {}
        self.taken: list[str] = []
        self.given = 0
        self.counts: Sequence[int] = ()

    def next_task(self, fits: Callable[[Task, int], bool]) -> Task | Wait | Finished:
        barrier = self.given and self.given % self.batch == 0 and self.open
        if len(self.open) >= self.slots or barrier or (self.left == 0 and self.open):
            return Wait("others are running")
        if self.left == 0:
            return Finished("all done")
        scaling = self.scaling[self.given % len(self.scaling)]
        task = make_task(self.given, scaling)
        if not fits(task, 1):
            return Wait("no room", task)
        self.left -= 1
        self.given += 1
        self.open[task.task_id] = task
        return task

    def growable(self, left_s: Mapping[str, float]) -> Iterator[tuple[Task, list[Task]]]:
        for task in (self.open[task_id] for task_id, seconds in left_s.items() if seconds >= GROW_LEFT_S):
            more = sorted((workers for workers in self.counts if workers > task.scaling["workers"]), reverse=True)
            if more:
                yield task, [replace(task, scaling={**task.scaling, "workers": workers}) for workers in more]

    def report(self, task_id: str, row: Any) -> bool:
        del self.open[task_id]
        self.rows[task_id] = row
        return True

    def yielded(self, task_id: str, account: Account) -> bool:
        del self.open[task_id]
        self.yields[task_id] = account
        return True

    def take(self, request: Request) -> dict[str, Any]:
        self.taken.append(request.id)
        return {"verb": request.verb, "by": request.by, **request.asked}

    def lost(self, task_id: str, reason: str, *, retry: bool = True, fault: str = "worker") -> bool:
        del self.open[task_id]
        self.losses[task_id] = reason
        self.faults.append(fault)
        return True


@dataclass
class FakeRunning:
    """What running tasks have written down, and which of them were asked to yield."""

    spent: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    where: dict[str, list[str]] = field(default_factory=dict)

    def account(self, task: Task) -> Account:
        return Account(self.spent.get(task.task_id, 0))

    def ask_to_yield(self, task: Task) -> None:
        self.asked.append(task.task_id)

    def end_hung(self) -> list[str]:
        hung, self.hung = self.hung, []
        return hung

    def nodes(self, task: Task) -> list[str]:
        return self.where.get(task.task_id, [])


class Machines:
    """Nodes that a test sets."""

    def __init__(self, *nodes: Resources) -> None:
        self.machines = list(nodes)
        self.asked: list[list[int]] = []

    def nodes(self):
        return {f"node{place}": machine for place, machine in enumerate(self.machines)}

    def gone(self, nodes):
        return set(nodes) - self.nodes().keys()

    def ask(self, tasks, more=()):
        self.asked.append([task.scaling["workers"] for task in (*tasks, *more)])

    def free_orphans(self):
        pass


def make_desk(driver: Any, slots: int, **parts: Any) -> Desk:
    """With endless room and idle stand-ins for what a test does not give."""
    endless = Machines({"CPU": 1e9, "GPU": 1e9})
    idle = {"on_event": lambda event: None, "room": endless, "running": FakeRunning(), "signals": Signals()}
    return Desk(driver, slots, **(idle | parts))


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class _Trial:
    task: dict[str, Any]
    delivered: bool = False
    actor: int | None = None


@dataclass
class FakeTune:
    """Ray Tune's habits that matter: one idle actor is kept at most, and an idle actor takes over the trial of a
    starting one, which is killed. Time is virtual."""

    searcher: DriverSearcher
    clock: Clock
    slots: int
    rng: np.random.Generator
    start_s: float = 8.0
    train_s: tuple[float, float] = (0.1, 5.0)
    capacity: int | None = None
    deaths: float = 0.0
    """Chance that a training actor dies."""
    errors: float = 0.0
    """Chance that an executor raises."""
    fatal_task: str | None = None
    starts: int = 0
    most_live: int = 0
    finished: bool = False
    trials: dict[str, _Trial] = field(default_factory=dict)
    _idle: list[int] = field(default_factory=list)
    _up: set[int] = field(default_factory=set)
    _events: list[tuple[float, int, str, str, int]] = field(default_factory=list)
    _count: itertools.count = field(default_factory=itertools.count)

    def run(self, limit_s: float = 1e5) -> None:
        """Until the searcher has finished; fails if it never does."""
        while not (self.finished and not self.trials):
            self._ask()
            self._place()
            self._advance()
            assert self.clock.now_s < limit_s, "the sweep hangs"

    def _ask(self) -> None:
        while not self.finished and sum(t.actor not in self._up for t in self.trials.values()) < self.slots:
            trial_id = f"trial{next(self._count)}"
            answer = self.searcher.suggest(trial_id)
            if answer == Searcher.FINISHED:
                self.finished = True
            if not isinstance(answer, dict):
                return
            self.trials[trial_id] = _Trial(json.loads(answer["task"]))
            self.most_live = max(self.most_live, len(self.trials))

    def _place(self) -> None:
        for trial_id, trial in self.trials.items():
            if trial.actor in self._up:
                continue
            if self._idle:
                self._begin(trial_id, self._idle.pop())
            elif trial.actor is None:
                trial.actor = next(self._count)
                self.starts += 1
                starting = sum(t.actor is not None for t in self.trials.values()) + len(self._idle)
                if self.capacity is None or starting <= self.capacity:
                    self._at(self.start_s, "up", trial_id, trial.actor)

    def _begin(self, trial_id: str, actor: int) -> None:
        trial = self.trials[trial_id]
        trial.actor = actor
        self._up.add(actor)
        self.searcher.started(trial_id)
        self._at(float(self.rng.uniform(*self.train_s)), "result", trial_id, actor)

    def _at(self, delay_s: float, kind: str, trial_id: str, actor: int) -> None:
        self._events.append((self.clock.now_s + delay_s, next(self._count), kind, trial_id, actor))
        self._events.sort()

    def _advance(self) -> None:
        if not self._events:
            self.clock.now_s += 0.1
            return
        self.clock.now_s, _, kind, trial_id, actor = self._events.pop(0)
        trial = self.trials.get(trial_id)
        if trial is None or trial.actor != actor:
            return
        if kind == "up":
            self._begin(trial_id, actor)
            return
        if not trial.delivered and self.rng.random() < self.deaths:
            self._up.discard(actor)
            del self.trials[trial_id]
            self.searcher.on_trial_complete(trial_id, error=True)
            return
        if self.searcher.may_end(trial_id, self._result(trial)):
            del self.trials[trial_id]
            self.searcher.on_trial_complete(trial_id, result={})
            if self._idle:
                self._up.discard(actor)
            else:
                self._idle.append(actor)
        else:
            self._at(0.1, "result", trial_id, actor)

    def _result(self, trial: _Trial) -> dict[str, Any]:
        if trial.delivered:
            return {}
        trial.delivered = True
        if trial.task["task_id"] == self.fatal_task:
            return {FATAL: "CorruptError", "message": "events/item.npy: truncated"}
        if self.rng.random() < self.errors:
            return {LOST: "ValueError: boo", "retry": True}
        return {ROW: json.dumps({"trial": trial.task["trial"], "kind": "rung", "probes": [{"kind": "probe"}]})}
