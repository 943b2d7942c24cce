"""The in-rung checkpoint of a task, and what it has spent, so that a killed one goes on and is charged rightly.

In: a task and its store. Out: the checkpoint's name, and the spend of earlier attempts.
"""

from __future__ import annotations

import json
import math
import time
from typing import Any

from bfm.errors import CorruptError, UserError
from bfm.files import Store
from bfm.training.checkpoint import Checkpoint, load_checkpoint
from bfm.training.task import RungTask

EVERY_S = 1.0


class Journal:
    """The in-rung checkpoint of a task, and what it has spent, lost work included."""

    def __init__(self, task: RungTask, store: Store) -> None:
        self.task, self.store = task, store
        self.checkpoint, self.spent_name = task.name("progress"), task.name("progress-spent.json")
        self._noted_s = -math.inf

    def leads_here(self) -> bool:
        """Whether a checkpoint stands from which the task can go on; a damaged one is passed over."""
        try:
            meta = load_checkpoint(self.store, self.checkpoint).meta
        except (UserError, CorruptError):
            return False
        # The trunk leads to every rung; a branch to its own alone (one run trained on to ever larger budgets).
        return meta["counters"]["phase"] == "trunk" or meta["progress"]["rung_flops"] == self.task.rung_flops

    def note(self, spent_flops: int) -> None:
        """Keep what the task has spent, at most once a second: a kill loses no more than that from the account."""
        now_s = time.monotonic()
        if now_s - self._noted_s >= EVERY_S:
            self._noted_s = now_s
            self.store.put(self.spent_name, json.dumps(self._entry(spent_flops)).encode())

    def in_meta(self, spent_flops: int) -> dict[str, Any]:
        """What the meta of an in-rung checkpoint says of a spend."""
        return {"progress": self._entry(spent_flops)}

    def spent_before(self, start: Checkpoint | None) -> int:
        """What earlier attempts at this very task have spent: that of another that was lost is charged to that one."""
        # The note is up to a second old; the checkpoint may be newer.
        entries = [] if start is None else [start.meta.get("progress", {})]
        if self.store.exists(self.spent_name):
            entries.append(json.loads(self.store.get(self.spent_name)))
        return max((entry["spent_flops"] for entry in entries if entry.get("task_id") == self.task.task_id), default=0)

    def _entry(self, spent_flops: int) -> dict[str, Any]:
        return {"task_id": self.task.task_id, "rung_flops": self.task.rung_flops, "spent_flops": spent_flops}

    def clear(self) -> None:
        """Drop the in-rung checkpoint; the row is in hand."""
        self.store.delete_folder(self.checkpoint)
