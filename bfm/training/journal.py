"""The account of a task: how much it may have trained, where to go on from, and whether it shall stop.

In: a task and its store. Out: three small objects beside the task's checkpoints, written by rank 0.
`account` is a promise made ahead: FLOPs are trained only after the account that allows them stands. So whoever finds a
dead task knows a bound of what it has trained, NOTE_S to 2 NOTE_S of work above the truth. `stop` is the way back: a
task that reads it trains no further step. Who writes `stop` first and then reads the account knows that nothing comes
after it, also of a worker that was thought dead and is not. Beside its promise an account says where the task is, for
those who watch.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

from bfm.errors import PausedError, UserError
from bfm.files import Store
from bfm.training.records import StepRecord
from bfm.training.task import Account

NOTE_S = 10.0
"""An account allows work for one to two times as long."""
STOP_S = 5.0
"""How often a task looks whether it shall stop."""
_SHOWN = ("step", "phase", "path_flops", "events", "events_per_s", "flops_per_s")
"""Of a StepRecord."""


class YieldError(PausedError):
    """A task ended early because it was asked to; its checkpoint stands."""

    def __init__(self, account: Account) -> None:
        super().__init__("stopped, because this process or its machine is to go; the same command goes on from here")
        self.account = account

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.account,)


class FencedError(Exception):
    """A task was given up by its driver, so it may not train on."""


class Named(Protocol):
    """What is needed of a task: a RungTask, or a bfm.sweep.ledger.task.Task."""

    @property
    def task_id(self) -> str:
        """No other try has it."""
        ...

    def name(self, what: str) -> str:
        """Name of an object of this task in the store."""
        ...


def stop_task(task: Named, store: Store, *, at_once: bool) -> None:
    """Ask a task for a checkpoint and no more; `at_once`: it may train no further step."""
    store.put(task.name("stop.json"), json.dumps({"at_once": at_once}).encode())


def settle(task: Named, store: Store) -> Account:
    """The account of a task that can no longer add to it."""
    stop_task(task, store, at_once=True)
    return read_account(task, store)


def read_live(task: Named, store: Store) -> dict[str, Any] | None:
    """Where an attempt under this task id was when it wrote last (`Journal.show`); None where it has said nothing."""
    entry = _read(store, task.name("account.json"))
    return entry.get("live") if entry.get("task_id") == task.task_id else None


def read_account(task: Named, store: Store) -> Account:
    """What an attempt under this task id wrote last, else an empty account: that of another one is that one's."""
    entry = _read(store, task.name("account.json"))
    return Account(**entry["account"]) if entry.get("task_id") == task.task_id else Account()


class Journal:
    """Rank 0's side of a running attempt."""

    def __init__(self, task: Named, store: Store) -> None:
        self.task, self.store = task, store
        self.checkpoint = task.name("progress")
        """Name of the in-rung checkpoint."""
        self.found = read_account(task, store)
        """What earlier attempts under the same task id have left."""
        self.stop_asked = threading.Event()
        """Whether the task shall end after a checkpoint."""
        self._live: dict[str, Any] | None = None
        self._noted = self._wanted = self.found
        self._fenced = False
        self._error: Exception | None = None
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None

    def allow(self, needed_flops: int, flops_per_s: float = 0.0) -> None:
        """Return once an account stands that covers `needed_flops`; it is asked for ahead, so few calls have to wait.

        Raises FencedError where the task was given up, OSError where the storage refuses.
        """
        ahead_flops = NOTE_S * flops_per_s if math.isfinite(flops_per_s) else 0.0
        with self._change:
            if needed_flops + ahead_flops > self._wanted.spent_flops:
                self._want(spent_flops=math.ceil(needed_flops + 2 * ahead_flops))
            self._wait(lambda: self._noted.spent_flops >= needed_flops)

    def show(self, record: StepRecord) -> None:
        """Where the task is: stands in the accounts that are written from now on."""
        self._live = {
            **{name: getattr(record, name) for name in _SHOWN},
            "loss": record.loss if math.isfinite(record.loss) else None,
            "host": socket.gethostname(),
            "at_s": time.time(),
        }

    def saved(self, progress_flops: int) -> None:
        """The in-rung checkpoint stands at `progress_flops`. Raises FencedError where the task was given up."""
        with self._change:
            self._want(progress=self.checkpoint, progress_flops=progress_flops)
            wanted = self._wanted
            self._wait(lambda: self._noted == wanted)

    def close(self, spent_flops: int) -> None:
        """Say exactly what was trained, if the storage still listens; the last promise stands where it does not."""
        thread = self._thread
        with self._change:
            self._thread = None
            self._change.notify_all()
        if thread is not None:
            thread.join(NOTE_S)
        exact = Account(spent_flops, self._noted.progress, self._noted.progress_flops)
        with contextlib.suppress(OSError, UserError):
            self._write(exact)

    def clear(self) -> None:
        """Drop the in-rung checkpoint; the row is in hand."""
        self.store.delete_folder(self.checkpoint)

    def note_out_of_memory(self) -> None:
        """One of several workers could not allocate; the next attempt need not try."""
        self.store.put(self.task.name("oom.json"), json.dumps({"task_id": self.task.task_id}).encode())

    def ran_out_of_memory(self) -> bool:
        """Whether an earlier attempt did."""
        return _read(self.store, self.task.name("oom.json")).get("task_id") == self.task.task_id

    def _want(self, **changes: Any) -> None:
        self._wanted = Account(**{**asdict(self._wanted), **changes})
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="task-account", daemon=True)
            self._thread.start()
        self._change.notify_all()

    def _wait(self, done: Callable[[], bool]) -> None:
        self._change.wait_for(lambda: done() or self._fenced or self._error is not None)
        if self._error is not None:
            raise self._error
        if self._fenced:
            raise FencedError(f"task {self.task.task_id} was given up by its driver")

    def _run(self) -> None:
        """Write what is wanted and look for `stop`, off the training step."""
        me = threading.current_thread()
        while True:
            with self._change:
                self._change.wait_for(lambda: self._wanted != self._noted or self._thread is not me, STOP_S)
                if self._thread is not me:
                    return
                wanted = self._wanted
            try:
                if wanted != self._noted:
                    self._write(wanted)
                # After the write, so that no promise is used that the driver did not see before it gave the task up.
                stop = _read(self.store, self.task.name("stop.json"))
            except Exception as error:
                with self._change:
                    self._error = error
                    self._change.notify_all()
                return
            if stop:
                self.stop_asked.set()
            with self._change:
                self._fenced = bool(stop.get("at_once"))
                if not self._fenced:
                    self._noted = wanted
                self._change.notify_all()
            if self._fenced:
                # Nothing is promised any more, so there is nothing left to write.
                return

    def _write(self, account: Account) -> None:
        entry = {"task_id": self.task.task_id, "account": asdict(account), "live": self._live}
        self.store.put(self.task.name("account.json"), json.dumps(entry).encode())


def _read(store: Store, name: str) -> dict[str, Any]:
    try:
        return json.loads(store.get(name))
    except FileNotFoundError:
        return {}
