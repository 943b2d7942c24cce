"""The sweep driver as a Ray Tune searcher: every (configuration, rung) task is one short Tune trial on a reused actor.

Enters: a driver with `next_task`, `report` and `lost`. Leaves: calls on that driver, and events for a display.

Ray Tune reuses a trial's actor only if the next trial is at hand when the last one ends, keeps at most one idle actor,
and takes a starting actor's trial away as soon as any other actor is idle (the starting one is killed; with short
trials a slot then never comes up). So a trial that has delivered its row does not end by itself: it stands by, and
`may_end` ends it when its successor is waiting and no other slot is starting. Both delays are bounded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ray.tune.search import Searcher

from bfm.errors import PausedError
from bfm.sweep.task import Finished, Task, Wait
from bfm.training.task import Account
from ray_jobs.room import Holding, Room, fits, total_of
from ray_jobs.signals import Interrupted, Signals
from ray_jobs.trial import FATAL, FATAL_ERRORS, LEAVES, LOST, ROW, YIELDED

IDLE_LIMIT_S = 60.0
START_LIMIT_S = 60.0
WAIT_POLL_S = 1.0
YIELD_LIMIT_S = 45.0
"""A sweep that ends waits so long for the checkpoints of its running tasks."""
Answer = TypeVar("Answer")


class Driver(Protocol):
    """What the searcher needs of bfm.sweep.driver.SweepDriver."""

    def next_task(self, fits: Callable[[Task], bool]) -> Task | Wait | Finished:
        """The next task, with its cost reserved, if there is room for it."""
        ...

    def report(self, task_id: str, row: dict[str, Any]) -> bool:
        """Commit a task's rung row; its key `probes` holds probe rows."""
        ...

    def lost(self, task_id: str, reason: str, *, retry: bool = True) -> bool:
        """A task ended without a row."""
        ...

    def yielded(self, task_id: str, account: Account) -> bool:
        """A task ended early, with a checkpoint."""
        ...


@dataclass(frozen=True)
class SweepEvent:
    """Something a display may show: `kind` is imported, assigned, row, lost, yielded, waiting or finished."""

    kind: str
    task: Task | None = None
    row: dict[str, Any] | None = None
    reason: str = ""


@dataclass
class _Live:
    """A Tune trial that holds a slot."""

    task: Task
    started: bool = False
    settled_at_s: float | None = None
    ending: bool = False
    leaving: bool = False
    """Its actor ends by itself, and the trial with it."""


class DriverSearcher(Searcher):
    """suggest -> next_task; a trial's result or death -> report or lost. At most `slots` trials at a time.

    `failure` holds the first exception that the driver raised: the run ends, and its caller must raise it. A signal
    and a PausedError end it too, once the running tasks have left their checkpoints.
    """

    def __init__(
        self,
        driver: Driver,
        slots: int,
        *,
        on_event: Callable[[SweepEvent], None] | None = None,
        room: Room | None = None,
        signals: Signals | None = None,
        ask_to_yield: Callable[[Task], None] = lambda task: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.driver, self.slots = driver, slots
        self.failure: Exception | None = None
        self._on_event = on_event or (lambda event: None)
        self._clock, self._signals, self._ask_to_yield = clock, signals or Signals(), ask_to_yield
        self._room = room
        self._waiting: Task | None = None
        """What does not fit beside what runs."""
        self._paused: PausedError | None = None
        self._ends_at_s: float | None = None
        self._live: dict[str, _Live] = {}
        self._next: Task | None = None
        # Actors given back and not yet taken by another trial.
        self._freed = 0
        self._finished = False
        self._ask_again_at_s = float("-inf")
        self._short_since_s: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles searchers into its own snapshot; the ledger is the journal here, so there is nothing to keep.
        return {"slots": self.slots}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """A configuration for a new Tune trial, None while there is nothing to start, FINISHED at the end."""
        if self._ends():
            return None if self._live else Searcher.FINISHED
        if len(self._live) >= self.slots:
            return None
        task = self._peek()
        if task is None:
            return None if self._live or self._waiting is not None else Searcher.FINISHED
        if self._freed <= self._starting() and self._standing_by():
            # A warm actor waits for it: `may_end` will free that one.
            return None
        self._next = None
        self._live[trial_id] = _Live(task)
        self._on_event(SweepEvent("assigned", task=task))
        return {"task": json.dumps(task.as_dict()), "assigned_at_s": time.time()}

    def started(self, trial_id: str) -> None:
        """The trial has an actor, its own or one that was freed."""
        self._live[trial_id].started = True
        self._freed = min(max(0, self._freed - 1), self._starting())

    def may_end(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Commit the trial's row if it has come, and say whether the trial may give its actor back now."""
        self._settle(trial_id, result)
        live = self._live[trial_id]
        if live.settled_at_s is None:
            return False
        if self.failure is not None or self._ends():
            return True
        if live.leaving or self._slots_are_starting():
            return False
        in_hand = self._peek() is not None
        if self._waiting is not None:
            # What an idle actor holds may be what the next task lacks.
            live.ending = True
            return True
        if in_hand or self._starting():
            # One trial ends per task that waits for an actor; the others stand by for the next one.
            freed = self._freed + sum(other.ending for other in self._live.values())
            live.ending = live.ending or freed < in_hand + self._starting()
            return live.ending
        return self._finished or self._clock() - live.settled_at_s > IDLE_LIMIT_S

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: `may_end` has seen the result."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The Tune trial is over; without a row its task is lost."""
        live = self._live.pop(trial_id)
        self._freed = min(self._freed + live.ending, self._starting() + 1)
        if live.settled_at_s is None:
            self._lose(live.task, "its worker process died (killed, out of memory, or its node is gone)")

    def save(self, checkpoint_path: str) -> None:
        """Tune's snapshot of the searcher: a note that the ledger is the journal."""
        Path(checkpoint_path).write_text('{"journal": "ledger"}\n')

    def restore(self, checkpoint_path: str) -> None:
        """Tune's restore is not used: a sweep is resumed from its ledger."""
        raise RuntimeError("resume the sweep from its ledger, not from Ray Tune's snapshot")

    def _ends(self) -> bool:
        """Whether the run is on its way to its end. Raises Interrupted when all tasks have yielded or were too slow."""
        if self._signals.received is None and self._paused is None:
            return False
        # One that has not started trained nothing; the next driver finds that in its account.
        running = [live.task for live in self._live.values() if live.started and live.settled_at_s is None]
        if self._ends_at_s is None:
            self._ends_at_s = self._clock() + YIELD_LIMIT_S
            for task in running:
                self._ask_to_yield(task)
        if not running or self._clock() > self._ends_at_s:
            if self._signals.received is not None:
                raise Interrupted(self._signals.received)
            self.failure = self.failure or self._paused
        return True

    def _peek(self) -> Task | None:
        now_s = self._clock()
        if self._next is not None or self._finished or self.failure is not None or now_s < self._ask_again_at_s:
            return self._next
        answer = self._guard(lambda: self.driver.next_task(self._fits))
        self._wait_for_room(answer.task if isinstance(answer, Wait) else None)
        if isinstance(answer, Task):
            self._next = answer
        elif isinstance(answer, Finished):
            self._finished = True
            self._on_event(SweepEvent("finished", reason=answer.reason))
        elif isinstance(answer, Wait) and answer.task is None and not self._live:
            # A driver that waits with nothing running waits for ever; that must not look like work.
            self.failure = RuntimeError(f"nothing is running, and yet the sweep waits: {answer.reason}")
        else:
            self._ask_again_at_s = now_s + WAIT_POLL_S
        return self._next

    def _fits(self, task: Task) -> bool:
        if self._room is None:
            return True
        holdings = [
            Holding(live.task, live.settled_at_s is not None) for live in self._live.values() if not live.leaving
        ]
        return fits(task, holdings, self._room.total())

    def _wait_for_room(self, task: Task | None) -> None:
        if self._room is not None:
            running = [live.task for live in self._live.values() if live.settled_at_s is None]
            self._room.ask(running, task, self.slots - len(running))
        if task is not None and self._waiting is None:
            needs = ", ".join(f"{amount:g} {name}s" for name, amount in total_of(task.scaling).items() if amount > 0)
            self._on_event(SweepEvent("waiting", task=task, reason=f"for {needs}"))
        self._waiting = task

    def _starting(self) -> int:
        return sum(not live.started for live in self._live.values())

    def _standing_by(self) -> bool:
        return any(
            live.settled_at_s is not None and not live.ending and not live.leaving for live in self._live.values()
        )

    def _slots_are_starting(self) -> bool:
        if not self._starting():
            if self._next is None or len(self._live) == self.slots:
                self._short_since_s = None
            return False
        if self._short_since_s is None:
            self._short_since_s = self._clock()
        # A slot without resources (a cluster at its limit) may never come up; nobody waits for it for ever.
        return self._clock() - self._short_since_s <= START_LIMIT_S

    def _settle(self, trial_id: str, result: dict[str, Any]) -> None:
        live = self._live[trial_id]
        if live.settled_at_s is not None or not {ROW, LOST, YIELDED, FATAL} & result.keys():
            return
        live.settled_at_s = self._clock()
        if LOST in result:
            self._lose(live.task, result[LOST], retry=result["retry"])
            return
        if YIELDED in result:
            account = Account(**json.loads(result[YIELDED]))
            live.leaving = bool(result.get(LEAVES))
            self._ask_again_at_s = float("-inf")
            self._guard(lambda: self.driver.yielded(live.task.task_id, account))
            self._on_event(SweepEvent("yielded", task=live.task))
            return
        if FATAL in result:
            self.failure = self.failure or FATAL_ERRORS[result[FATAL]](result["message"])
            return
        row = json.loads(result[ROW])
        self._ask_again_at_s = float("-inf")
        self._guard(lambda: self.driver.report(live.task.task_id, row))
        self._on_event(SweepEvent("row", task=live.task, row=row))

    def _lose(self, task: Task, reason: str, retry: bool = True) -> None:
        self._ask_again_at_s = float("-inf")
        self._guard(lambda: self.driver.lost(task.task_id, reason, retry=retry))
        self._on_event(SweepEvent("lost", task=task, reason=reason))

    def _guard(self, call: Callable[[], Answer]) -> Answer | None:
        if self.failure is not None:
            return None
        try:
            return call()
        except PausedError as error:
            self._paused = error
        except Exception as error:
            # Tune would bury it in a TuneError's text; the sweep's entry point raises it after the run has ended.
            self.failure = error
        return None
