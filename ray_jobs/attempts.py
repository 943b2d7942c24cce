"""The running tries of a sweep, as their objects in its store tell of them (bfm.training.journal)."""

from __future__ import annotations

from dataclasses import dataclass

from bfm.files import Store
from bfm.sweep.ledger.task import Task
from bfm.training.journal import read_account, stop_task
from bfm.training.task import Account
from ray_jobs.pulse import Pulses


@dataclass(frozen=True)
class Attempts:
    """Those of one sweep."""

    store: Store
    pulses: Pulses

    def account(self, task: Task) -> Account:
        """What a running task may have trained so far."""
        return read_account(task, self.store)

    def ask_to_yield(self, task: Task) -> None:
        """Have it end after a checkpoint."""
        stop_task(task, self.store, at_once=False)

    def end_hung(self) -> list[str]:
        """Ids of tasks that stood still; their processes are killed."""
        hung = self.pulses.hung()
        for processes in hung.values():
            self.pulses.end(processes)
        return list(hung)

    def nodes(self, task: Task) -> list[str]:
        """Where a running task was last seen."""
        return self.pulses.nodes(task.task_id)
