"""A sweep as it runs, from its storage alone: who drives it, what is trained and how far it is, what waits and why.

Enters: a sweep's store and its ledger's state. Leaves: JSON-able figures. How far a task is stands in its account,
which is written every ten seconds or so (bfm.training.journal); times are of the clocks of those who wrote.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from bfm.files import Store
from bfm.sweep.lease import driver_of
from bfm.sweep.requests import new_requests
from bfm.sweep.state import SweepState
from bfm.sweep.status import spec_of
from bfm.sweep.task import Task
from bfm.sweep.winner import winner
from bfm.training.journal import read_live


def live_figures(store: Store, state: SweepState, clock: Callable[[], float] = time.time) -> dict[str, Any]:
    """Keys driver, running, waiting, settings (those that are searched), best_checkpoint.

    Raises ValueError for a ledger without a spec.
    """
    spec = spec_of(state)
    best = winner(state, spec)
    model = best and state.trials[best["trial"]].rows[best["rung"]].get("model")
    return {
        "driver": driver_of(store, clock),
        "running": [_running(store, state, place, clock()) for place in state.open_tasks.values()],
        "waiting": _waiting(store, state),
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


def _waiting(store: Store, state: SweepState) -> list[dict[str, str]]:
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
