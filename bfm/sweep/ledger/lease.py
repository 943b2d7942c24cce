"""The lease on a sweep's ledger: who may write, proven by an epoch that only grows.

One object `lease/<epoch>.json` per holder, published only where none stands; the holder of the highest epoch is the
writer. A holder that is dead does not block: on the same machine its process is looked up, elsewhere its heartbeat
stands still, and a driver that was submitted again watches it for so long. A holder that lost its lease without knowing
cannot write: its successor has taken the ledger's next number.
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
"""A heartbeat that has stood still for so long is that of a dead one."""
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
    """Start of the process, after that of its machine: process ids are used again, and the wall clock may be set."""

    @classmethod
    def this_process(cls) -> Holder:
        """The process that calls."""
        host = socket.gethostname()
        boot = Path("/proc/sys/kernel/random/boot_id")
        space = Path("/proc/self/ns/pid")
        parts = [host, boot.read_text().strip() if boot.exists() else ""]
        parts.append(os.readlink(space) if space.exists() else "")
        return cls(host, "|".join(parts), os.getpid(), _started_at_s(os.getpid()))

    def runs(self) -> bool:
        """Whether the process lives; only to be asked on its own machine."""
        try:
            # Where nobody reaps the dead, as in many containers, they keep their id.
            is_dead = psutil.Process(self.pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            return not is_dead and abs(_started_at_s(self.pid) - self.started_at_s) < 2.0
        except psutil.NoSuchProcess:
            return False


class Lease:
    """The right to write, from `acquire` to `release`; renewed by a thread of its own."""

    def __init__(self, store: Store, epoch: int, heartbeat_s: float | None) -> None:
        self.store, self.epoch = store, epoch
        self._stop = threading.Event()
        self._heartbeat_s = heartbeat_s
        if heartbeat_s is not None:
            threading.Thread(target=self._beat, name="sweep-lease", daemon=True).start()

    @classmethod
    def acquire(
        cls,
        store: Store,
        *,
        holder: Holder | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        heartbeat_s: float | None = HEARTBEAT_S,
    ) -> Lease:
        """Take the next epoch, once a holder elsewhere is seen to be dead. `heartbeat_s` None: no thread.

        Raises UserError where another holder lives: a process of this machine, or one that goes on renewing its
        heartbeat.
        """
        me = holder or Holder.this_process()
        last = latest_epoch(store)
        if last:
            _wait_for_end(store, last, me, clock, sleep)
        epoch = last + 1
        # No two contenders bring the same bytes, so that none takes another's object for its own.
        taken = {**asdict(me), "at_s": time.time(), "nonce": uuid.uuid4().hex}
        if not store.put_new(_name(epoch), canonical_json(taken)):
            raise UserError("another sweep is starting here", file=store.uri, fix="give this one another name")
        return cls(store, epoch, heartbeat_s)

    @property
    def is_held(self) -> bool:
        """Whether no higher epoch was taken and this one was not released."""
        return not self._stop.is_set() and latest_epoch(self.store) == self.epoch

    def renew(self) -> None:
        """Publish a heartbeat."""
        # A heartbeat that has to wait would be old when it arrives: the next one is tried instead.
        impatient = self.store.with_patience(0)
        impatient.put(_alive(self.epoch), canonical_json({"at_s": time.time()}))

    def release(self) -> None:
        """Give the lease up, so that the next holder need not wait."""
        if not self._stop.is_set():
            self._stop.set()
            self.store.put(_released(self.epoch), canonical_json({"at_s": time.time()}))

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            try:
                self.renew()
            except (OSError, UserError) as error:
                # A missed beat, one that was forbidden too, is no lost lease; the next append shows what is gone.
                _log.warning("the sweep's heartbeat could not be written: %s", error)


def latest_epoch(store: Store) -> int:
    """The highest epoch that was ever taken; 0 if none."""
    names = (name.removeprefix(f"{FOLDER}/").removesuffix(".json") for name in store.names(FOLDER))
    return max((int(name) for name in names if name.isdigit()), default=0)


def driver_of(store: Store, clock: Callable[[], float] = time.time) -> dict[str, Any] | None:
    """Epoch, host and pid of a holder that seems to live; None where nobody drives the sweep.

    Only to tell people: on another machine's clock a heartbeat may seem older or younger than it is.
    """
    epoch = latest_epoch(store)
    if not epoch or store.exists(_released(epoch)):
        return None
    holder, since_s = _taken(store, epoch)
    if holder.machine == Holder.this_process().machine:
        lives = holder.runs()
    else:
        beat = _heartbeat(store, epoch)
        lives = clock() - (beat["at_s"] if beat else since_s) < 2 * STALE_S
    return {"epoch": epoch, "host": holder.host, "pid": holder.pid} if lives else None


def _started_at_s(pid: int) -> float:
    # Both are told by the same wall clock, in whole seconds of boot time, so that setting it changes nothing.
    return psutil.Process(pid).create_time() - psutil.boot_time()


def _wait_for_end(
    store: Store, epoch: int, me: Holder, clock: Callable[[], float], sleep: Callable[[float], None]
) -> None:
    """Return once the holder of an epoch is gone; raises UserError where it lives.

    A heartbeat is only told from the one before it: the time in it is that of another machine's clock.
    """
    holder, _ = _taken(store, epoch)
    here = holder.machine == me.machine
    beat, seen_s, renewals, told = _heartbeat(store, epoch), clock(), 0, False
    while not store.exists(_released(epoch)) and (holder.runs() if here else clock() - seen_s < STALE_S):
        if here or renewals == RENEWALS:
            raise UserError(
                f"another sweep is running here (process {holder.pid} on {holder.host})",
                file=store.uri,
                fix=f"stop it, or give this one another name; a dead one is given up after {format_seconds(STALE_S)}",
            )
        if not told:
            told = True
            _log.warning(
                "%s: process %d on %s has held this sweep; waiting for %s without a sign of it",
                store.uri, holder.pid, holder.host, format_seconds(STALE_S),
            )  # fmt: skip
        sleep(LOOK_S)
        if (last := _heartbeat(store, epoch)) != beat:
            beat, seen_s, renewals = last, clock(), renewals + 1


def _taken(store: Store, epoch: int) -> tuple[Holder, float]:
    """Who took an epoch, and when by its clock."""
    taken = _read(store, _name(epoch))
    return Holder(**{name: taken[name] for name in ("host", "machine", "pid", "started_at_s")}), taken["at_s"]


def _heartbeat(store: Store, epoch: int) -> dict[str, Any] | None:
    return _read(store, _alive(epoch)) if store.exists(_alive(epoch)) else None


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
