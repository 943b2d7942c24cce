"""The lease on a sweep's ledger: who may write, proven by an epoch that only grows.

One object `lease/<epoch>.json` per holder, published only where none stands; the holder of the highest epoch is the
writer. A holder that is dead does not block: on the same machine its process is looked up, elsewhere its heartbeat
grows old, and a driver that was submitted again waits for that. A holder that lost its lease without knowing cannot
write: its successor has taken the ledger's next number.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from bfm.errors import CorruptError, UserError
from bfm.files import Store, canonical_json
from bfm.units import format_seconds

FOLDER = "lease"
HEARTBEAT_S = 15.0
STALE_S = 120.0
WAIT_S = STALE_S + 2 * HEARTBEAT_S
"""A holder that has died is stale by then."""
LOOK_S = 2.0
RENEWALS = 3
"""So many heartbeats while one waits are those of a holder that lives on, not the last ones of a dying one."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """A process, so that another one can tell whether it still lives."""

    host: str
    machine: str
    """Boot and process-id space: process ids mean the same only where this is equal."""
    pid: int
    started_at_s: float
    """Start of the process: process ids are used again."""

    @classmethod
    def this_process(cls) -> Holder:
        """The process that calls."""
        host = socket.gethostname()
        boot = Path("/proc/sys/kernel/random/boot_id")
        space = Path("/proc/self/ns/pid")
        parts = [host, boot.read_text().strip() if boot.exists() else ""]
        parts.append(os.readlink(space) if space.exists() else "")
        return cls(host, "|".join(parts), os.getpid(), psutil.Process().create_time())

    def runs(self) -> bool:
        """Whether the process lives; only to be asked on its own machine."""
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started_at_s) < 1.0
        except psutil.NoSuchProcess:
            return False


class Lease:
    """The right to write, from `acquire` to `release`; renewed by a thread of its own."""

    def __init__(self, store: Store, epoch: int, clock: Callable[[], float], heartbeat_s: float | None) -> None:
        self.store, self.epoch = store, epoch
        self._clock = clock
        self._stop = threading.Event()
        self._heartbeat_s = heartbeat_s
        if heartbeat_s is not None:
            threading.Thread(target=self._beat, name="sweep-lease", daemon=True).start()

    @classmethod
    def acquire(
        cls,
        store: Store,
        *,
        wait_s: float = WAIT_S,
        holder: Holder | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        heartbeat_s: float | None = HEARTBEAT_S,
    ) -> Lease:
        """Take the next epoch, waiting for a holder elsewhere that may be dead. `heartbeat_s` None: no thread.

        Raises UserError where another holder lives: a process of this machine, one that goes on renewing its
        heartbeat, or one whose heartbeat is fresh after `wait_s`.
        """
        me = holder or Holder.this_process()
        last = latest_epoch(store)
        if last:
            _wait_for_end(store, last, me, wait_s, clock, sleep)
        epoch = last + 1
        # No two contenders bring the same bytes, so that none takes another's object for its own.
        taken = {**asdict(me), "at_s": clock(), "nonce": uuid.uuid4().hex}
        if not store.put_new(_name(epoch), canonical_json(taken)):
            raise UserError("another sweep is starting here", file=store.uri, fix="give this one another name")
        return cls(store, epoch, clock, heartbeat_s)

    @property
    def is_held(self) -> bool:
        """Whether no higher epoch was taken and this one was not released."""
        return not self._stop.is_set() and latest_epoch(self.store) == self.epoch

    def renew(self) -> None:
        """Publish a heartbeat."""
        # A heartbeat that has to wait would be old when it arrives: the next one is tried instead.
        impatient = self.store.with_patience(0)
        impatient.put(_alive(self.epoch), canonical_json({"at_s": self._clock()}))

    def release(self) -> None:
        """Give the lease up, so that the next holder need not wait."""
        if not self._stop.is_set():
            self._stop.set()
            self.store.put(_released(self.epoch), canonical_json({"at_s": self._clock()}))

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            try:
                self.renew()
            except OSError as error:
                # A missed beat is not a lost lease; the next append shows whether the storage is really gone.
                _log.warning("the sweep's heartbeat could not be written: %s", error)


def latest_epoch(store: Store) -> int:
    """The highest epoch that was ever taken; 0 if none."""
    names = (name.removeprefix(f"{FOLDER}/").removesuffix(".json") for name in store.names(FOLDER))
    return max((int(name) for name in names if name.isdigit()), default=0)


def _wait_for_end(
    store: Store, epoch: int, me: Holder, wait_s: float, clock: Callable[[], float], sleep: Callable[[float], None]
) -> None:
    """Return once the holder of an epoch is gone; raises UserError where it lives."""
    taken = _read(store, _name(epoch))
    holder = Holder(**{name: taken[name] for name in ("host", "machine", "pid", "started_at_s")})
    began_s, told, beats = clock(), False, list[float]()
    while not store.exists(_released(epoch)):
        beat = _read(store, _alive(epoch)) if store.exists(_alive(epoch)) else taken
        beats += [float(beat["at_s"])] if float(beat["at_s"]) not in beats else []
        age_s, here = clock() - beats[-1], holder.machine == me.machine
        if (not holder.runs()) if here else age_s >= STALE_S:
            return
        waited_s = clock() - began_s
        if here or len(beats) > RENEWALS or waited_s >= wait_s:
            raise UserError(
                f"another sweep is running here (process {holder.pid} on {holder.host}, "
                f"last seen {format_seconds(max(age_s, 0.0))} ago)",
                file=store.uri,
                fix=f"stop it, or give this one another name; a dead one is given up after {format_seconds(STALE_S)}",
            )
        if not told:
            told = True
            _log.warning(
                "%s: process %d on %s held this sweep %s ago; waiting up to %s for it to be gone",
                store.uri, holder.pid, holder.host, format_seconds(max(age_s, 0.0)), format_seconds(STALE_S - age_s),
            )  # fmt: skip
        sleep(LOOK_S)


def _read(store: Store, name: str) -> dict[str, Any]:
    try:
        return json.loads(store.get(name))
    except ValueError as error:
        raise CorruptError(f"{store.uri}/{name}: not a lease ({error})") from error


def _name(epoch: int) -> str:
    return f"{FOLDER}/{epoch:06d}.json"


def _alive(epoch: int) -> str:
    return f"{FOLDER}/{epoch:06d}-alive.json"


def _released(epoch: int) -> str:
    return f"{FOLDER}/{epoch:06d}-released.json"
