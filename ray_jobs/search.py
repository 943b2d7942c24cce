"""The sweep driver as a Ray Tune searcher: every (configuration, rung) task is one short Tune trial on a reused actor.

Enters: a Desk, which knows the driver. Leaves: trials for Tune, and when each may give its actor back.

Ray Tune reuses a trial's actor only if the next trial is at hand when the last one ends, keeps at most one idle actor,
and takes a starting actor's trial away as soon as any other actor is idle (the starting one is killed; with short
trials a slot then never comes up). So a trial that has delivered its row does not end by itself: it stands by, and
`may_end` ends it when its successor is waiting and no other slot is starting. Both delays are bounded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from bfm.sweep.ledger.task import Task
from ray_jobs.desk import Desk, Live

IDLE_LIMIT_S = 60.0
START_LIMIT_S = 60.0


class DriverSearcher(Searcher):
    """suggest -> next_task; a trial's result or death -> report or lost. At most `desk.slots` trials at a time."""

    def __init__(self, desk: Desk) -> None:
        super().__init__()
        self.desk = desk
        self._trials: dict[str, Live] = {}
        # Actors given back and not yet taken by another trial.
        self._freed = 0
        self._short_since_s: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles searchers into its own snapshot; the ledger is the journal here, so there is nothing to keep.
        return {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """A configuration for a new Tune trial, None while there is nothing to start, FINISHED at the end."""
        live = list(self._trials.values())
        if self.desk.ends(live):
            return None if live else Searcher.FINISHED
        self.desk.look_after(live)
        task = self.desk.peek(live) if self._taken() < self.desk.slots else None
        if task is None:
            return None if live or self.desk.waiting is not None else Searcher.FINISHED
        if self._freed <= self._starting() and any(one.stands_by and not one.ending for one in live):
            # A warm actor waits for it: `may_end` will free that one.
            return None
        self._trials[trial_id], config = self.desk.take()
        return config

    def started(self, trial_id: str) -> None:
        """The trial has an actor, its own or one that was freed."""
        self._trials[trial_id].started_at_s = self.desk.clock()
        self._freed = min(max(0, self._freed - 1), self._starting())

    def may_end(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Commit the trial's row if it has come, and say whether the trial may give its actor back now."""
        one = self._trials[trial_id]
        self.desk.settle(one, result)
        if one.settled_at_s is None:
            return False
        if one.gone or one.yields_room or self.desk.failure is not None or self.desk.ends(self._trials.values()):
            return True
        if one.leaving or self._slots_are_starting():
            return False
        task = self.desk.peek(list(self._trials.values()))
        if task is not None and not _suits(one, task) and any(_suits(other, task) for other in self._trials.values()):
            return False
        in_hand = task is not None
        if self.desk.waiting is not None:
            # What an idle actor holds may be what the next task lacks.
            one.ending = True
            return True
        if in_hand or self._starting():
            # One trial ends per task that waits for an actor; the others stand by for the next one.
            freed = self._freed + sum(other.ending for other in self._trials.values())
            one.ending = one.ending or freed < in_hand + self._starting()
            return one.ending
        return self.desk.finished or self.desk.clock() - one.settled_at_s > IDLE_LIMIT_S

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The Tune trial is over; without a row its task is lost."""
        one = self._trials.pop(trial_id)
        self._freed = min(self._freed + one.ending, self._starting() + 1)
        self.desk.died(one)

    def save(self, checkpoint_path: str) -> None:
        """Tune's snapshot of the searcher: a note that the ledger is the journal."""
        Path(checkpoint_path).write_text('{"journal": "ledger"}\n')

    def restore(self, checkpoint_path: str) -> None:
        """Tune's restore is not used: a sweep is resumed from its ledger."""
        raise RuntimeError("resume the sweep from its ledger, not from Ray Tune's snapshot")

    def _taken(self) -> int:
        return sum(not one.gone for one in self._trials.values())

    def _starting(self) -> int:
        return sum(one.started_at_s is None for one in self._trials.values())

    def _slots_are_starting(self) -> bool:
        if not self._starting():
            if not self.desk.in_hand or self._taken() == self.desk.slots:
                self._short_since_s = None
            return False
        if self._short_since_s is None:
            self._short_since_s = self.desk.clock()
        # A slot without resources (a cluster at its limit) may never come up; nobody waits for it for ever.
        return self.desk.clock() - self._short_since_s <= START_LIMIT_S


def _suits(one: Live, task: Task) -> bool:
    """Whether a trial's actor may have workers that stand by for a task of this tier; such a one goes first."""
    return one.stands_by and not one.ending and one.task.scaling == task.scaling
