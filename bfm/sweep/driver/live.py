"""A sweep as it runs, from its storage alone: who drives it, what is trained and how far it is, what waits and why.

Enters: a sweep's store and its ledger's state. Leaves: JSON-able figures. How far a task is stands in its account,
which is written every ten seconds or so (bfm.training.journal), and what its driver has no room for in an object of
that one's (`tell_waits`): the ledger holds what was decided, and waiting is no decision. Times are of the clocks of
those who wrote.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bfm.errors import UserError
from bfm.files import Store
from bfm.sweep.driver.requests import new_requests
from bfm.sweep.ledger.lease import driver_of
from bfm.sweep.ledger.state import SweepState, spec_of
from bfm.sweep.ledger.task import Task
from bfm.sweep.ledger.winner import winner
from bfm.training.journal import read_live
from bfm.units import format_seconds

WAITS = "waits.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Waits:
    """Something that a driver could do if there were room for it."""

    what: str
    why: str
    since_s: float
    """Seconds since the epoch."""


def tell_waits(store: Store, epoch: int, waits: Sequence[Waits]) -> None:
    """Replace what the driver of an epoch has told; where the storage refuses, that stays."""
    try:
        data = json.dumps({"epoch": epoch, "waits": [asdict(one) for one in waits]}).encode()
        store.with_patience(0).put(WAITS, data)
    except (OSError, UserError) as error:
        _log.warning("%s/%s could not be written: %s", store.uri, WAITS, error)


def live_figures(store: Store, state: SweepState, clock: Callable[[], float] = time.time) -> dict[str, Any]:
    """Keys driver, running, waiting, settings (those that are searched), best_checkpoint.

    Raises ValueError for a ledger without a spec.
    """
    spec = spec_of(state)
    best, driver, now_s = winner(state, spec), driver_of(store, clock), clock()
    model = best and state.trials[best["trial"]].rows[best["rung"]].get("model")
    return {
        "driver": driver,
        "running": [_running(store, state, place, now_s) for place in state.open_tasks.values()],
        "waiting": [*_for_room(store, driver, now_s), *_waiting(store, state)],
        "settings": {parameter.name: parameter.as_dict() for parameter in spec.free_parameters},
        "best_checkpoint": f"{store.uri}/{model}" if model else None,
    }


def _running(store: Store, state: SweepState, place: tuple[str, int], now_s: float) -> dict[str, Any]:
    task = Task.from_dict(state.attempts[place].task)
    live = read_live(task, store) or {}
    rate, told_s = live.get("flops_per_s") or 0.0, None if not live else max(0.0, now_s - live["at_s"])
    path_flops = live.get("path_flops", task.begins_flops)
    return {
        "task_id": task.task_id,
        "trial": task.trial,
        "rung": task.rung,
        "rung_flops": task.rung_flops,
        "path_flops": path_flops,
        "workers": task.scaling.get("workers", 1),
        **{name: live.get(name) for name in ("step", "phase", "loss", "events_per_s", "host")},
        "told_s": told_s,
        "left_s": max(0.0, (task.rung_flops - path_flops) / rate - (told_s or 0.0)) if rate else None,
    }


def _for_room(store: Store, driver: dict[str, Any] | None, now_s: float) -> list[dict[str, Any]]:
    """What the driver has told that it waits for; of an earlier one nobody waits any more."""
    told = json.loads(store.get(WAITS)) if driver is not None and store.exists(WAITS) else None
    if driver is None or told is None or told["epoch"] != driver["epoch"]:
        return []
    return [_waited(Waits(**one), now_s) for one in told["waits"]]


def _waited(waits: Waits, now_s: float) -> dict[str, Any]:
    waited_s = max(0.0, now_s - waits.since_s)
    why = f"{waits.why}; waits for {format_seconds(waited_s)}"
    return {"what": waits.what, "why": why, "waited_s": waited_s}


def _waiting(store: Store, state: SweepState) -> list[dict[str, Any]]:
    """What is owed, what was asked for, what nobody has answered yet."""
    reasons = {(record["trial"], record["rung"]): record["reason"] for record in state.losses}
    waiting = []
    for place in state.owed():
        lost = reasons.get(place)
        why = f"was lost ({lost}), goes on" if lost else "was asked to make room or to end, goes on"
        waiting.append({"what": f"{place[0]} rung {place[1]}", "why": why})
    for request_id, record in state.queue.items():
        what = f"N {record['params']:,} seed {record['seed']} ({request_id})"
        waiting.append({"what": what, "why": f"asked for by {record['by']}, comes next"})
    for request in new_requests(store, state.requests):
        waiting.append({"what": f"{request.verb} ({request.id})", "why": f"asked by {request.by}, not answered yet"})
    return waiting
