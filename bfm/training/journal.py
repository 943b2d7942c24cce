"""What attempts at a task leave for the next one, so that a killed one goes on and is charged rightly.

In: a task and its store. Out: the name of the in-rung checkpoint, what earlier attempts have spent, and whether one ran
out of memory.
"""

from __future__ import annotations

import json
import math
import time
from typing import Any

from bfm.errors import CorruptError, UserError
from bfm.files import Store
from bfm.training.checkpoint import read_meta
from bfm.training.task import RungTask

EVERY_S = 1.0


class Journal:
    """What attempts at a task have left."""

    def __init__(self, task: RungTask, store: Store) -> None:
        self.task, self.store = task, store
        self.checkpoint = task.name("progress")
        """Name of the in-rung checkpoint."""
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
            self._write("progress-spent.json", spent_flops=spent_flops)

    def spent_before(self) -> int:
        """What earlier attempts have spent, lost work included."""
        return int(self._read("progress-spent.json").get("spent_flops", 0))

    def note_out_of_memory(self) -> None:
        """One of several workers could not allocate; the next attempt need not try."""
        self._write("oom.json")

    def ran_out_of_memory(self) -> bool:
        """Whether an earlier attempt did."""
        return bool(self._read("oom.json"))

    def _write(self, what: str, **entry: Any) -> None:
        self.store.put(self.task.name(what), json.dumps({"task_id": self.task.task_id, **entry}).encode())

    def _read(self, what: str) -> dict[str, Any]:
        """What an attempt at this very task wrote, else nothing: that of another that was lost is that one's."""
        name = self.task.name(what)
        entry = json.loads(self.store.get(name)) if self.store.exists(name) else {}
        return entry if entry.get("task_id") == self.task.task_id else {}

    def clear(self) -> None:
        """Drop the in-rung checkpoint; the row is in hand."""
        self.store.delete_folder(self.checkpoint)
