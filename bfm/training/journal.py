"""The in-rung checkpoint of a task, and what it has spent, so that a killed one goes on and is charged rightly.

In: a task and its store. Out: the checkpoint's name, and the spend of earlier attempts.
"""

from __future__ import annotations

import json
import math
import time

from bfm.errors import CorruptError, UserError
from bfm.files import Store
from bfm.training.checkpoint import read_meta
from bfm.training.task import RungTask

EVERY_S = 1.0


class Journal:
    """The in-rung checkpoint of a task, and what it has spent, lost work included."""

    def __init__(self, task: RungTask, store: Store) -> None:
        self.task, self.store = task, store
        self.checkpoint, self.spent_name = task.name("progress"), task.name("progress-spent.json")
        self._noted_s = -math.inf

    def resumable(self) -> bool:
        """Whether a checkpoint of this rung's way stands; its tensors are not looked at."""
        try:
            meta = read_meta(self.store, self.checkpoint)
        except (UserError, CorruptError):
            return False
        # The trunk leads to every rung; a branch to its own alone (one run trained on to ever larger budgets).
        return meta["counters"]["phase"] == "trunk" or meta["rung_flops"] == self.task.rung_flops

    def note(self, spent_flops: int, *, at_once: bool = False) -> None:
        """Keep what the task has spent: at once where a checkpoint follows, else at most once a second.

        A kill loses no more than that second from the account, and nothing that led to a checkpoint.
        """
        now_s = time.monotonic()
        if at_once or now_s - self._noted_s >= EVERY_S:
            self._noted_s = now_s
            entry = {"task_id": self.task.task_id, "spent_flops": spent_flops}
            self.store.put(self.spent_name, json.dumps(entry).encode())

    def spent_before(self) -> int:
        """What earlier attempts at this very task have spent: that of another that was lost is charged to that one."""
        if not self.store.exists(self.spent_name):
            return 0
        entry = json.loads(self.store.get(self.spent_name))
        return int(entry["spent_flops"]) if entry["task_id"] == self.task.task_id else 0

    def clear(self) -> None:
        """Drop the in-rung checkpoint; the row is in hand."""
        self.store.delete_folder(self.checkpoint)
