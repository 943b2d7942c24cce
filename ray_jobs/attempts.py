"""The running tries of a sweep, as their objects in its store tell of them (bfm.training.journal)."""

from __future__ import annotations

from dataclasses import dataclass

from bfm.files import Store
from bfm.sweep.task import Task
from bfm.training.journal import read_account, settle, stop_task
from bfm.training.task import Account, RungTask


@dataclass(frozen=True)
class Attempts:
    """Those of one sweep."""

    store: Store

    def account(self, task: Task) -> Account:
        """What a running task may have trained so far."""
        return read_account(_rung_task(task), self.store)

    def ask_to_yield(self, task: Task) -> None:
        """Have it end after a checkpoint."""
        stop_task(_rung_task(task), self.store, at_once=False)

    def settle(self, task: Task) -> Account:
        """What it may have trained; it trains nothing more."""
        return settle(_rung_task(task), self.store)


def _rung_task(task: Task) -> RungTask:
    return RungTask.from_task(task.as_dict())
