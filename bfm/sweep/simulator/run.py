"""A sweep on a virtual clock: the driver, policy and ledger of real ones; only machines and time are made up.

Enters: a SweepDriver, what executes its tasks, a Cluster. Leaves: the Timeline. The driver is asked when a worker is
free, and told what has room; where nothing waits, a running task yields to go on with more workers, as in real sweeps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bfm.sweep.driver import SweepDriver
from bfm.sweep.simulator.fleet import DONE, YIELDED, Cluster
from bfm.sweep.task import Finished, Task, Wait

Execute = Callable[[Task], dict[str, Any]]


@dataclass
class Timeline:
    """What happened when."""

    elapsed_s: float = 0.0
    """Until the last task ended."""
    busy_s: float = 0.0
    """Worker seconds with a task, its start-up included."""
    provisioned_s: float = 0.0
    """Worker seconds from when each was asked for until it was gone or the last task had ended: what is paid."""
    decisions: int = 0
    decision_s: list[float] = field(default_factory=list)
    """Real seconds that each took."""
    rows: list[tuple[float, int, dict[str, Any]]] = field(default_factory=list)
    """(virtual second, spent FLOPs, row)."""
    lost: int = 0
    yielded: int = 0


def decision_ms(decision_s: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile of what decisions took, JSON-able."""
    return {"median": 1e3 * float(np.median(decision_s)), "p99": 1e3 * float(np.quantile(decision_s, 0.99))}


def run_fleet(driver: SweepDriver, execute: Execute, cluster: Cluster) -> Timeline:
    """Run a sweep to its end. The driver must settle by `cluster.account`.

    Raises UserError where a task needs more workers than there will ever be, PausedError where a real sweep would pause
    (bfm.sweep.breaker): workers that are taken away while their tasks start look like broken ones.
    """
    timeline = Timeline()
    while True:
        answer = _fill(driver, cluster, timeline)
        if isinstance(answer, Finished):
            timeline.provisioned_s = cluster.provisioned_s(timeline.elapsed_s)
            return timeline
        cluster.check_room(answer)
        for task, how in cluster.advance():
            if how == DONE:
                row = {**execute(task), **cluster.timings(task)}
                driver.report(task.task_id, row)
                timeline.rows.append((cluster.now_s, driver.state.spent_flops, row))
            elif how == YIELDED:
                timeline.yielded += driver.yielded(task.task_id, cluster.account(task))
            else:
                timeline.lost += driver.lost(task.task_id, how)
            timeline.busy_s += cluster.busy_s(task)
            timeline.elapsed_s = cluster.now_s


def _fill(driver: SweepDriver, cluster: Cluster, timeline: Timeline) -> Wait | Finished:
    """Start what there is room for; what the driver said last."""
    while cluster.free:
        begun_s = time.perf_counter()
        answer = driver.next_task(cluster.fits)
        timeline.decision_s.append(time.perf_counter() - begun_s)
        if isinstance(answer, Task):
            timeline.decisions += 1
            cluster.start(answer)
        elif isinstance(answer, Finished) or answer.task is not None or not _grow(driver, cluster, timeline):
            return answer
    return Wait("no worker is free")


def _grow(driver: SweepDriver, cluster: Cluster, timeline: Timeline) -> bool:
    """Have a running task yield, to go on with workers that nobody else takes; False where none would."""
    if driver.state.owed():
        return False
    for task, wider in driver.growable(cluster.left_s()):
        room = len(cluster.free) + task.scaling["workers"]
        if any(way.scaling["workers"] <= room for way in wider):
            cluster.stop(task)
            timeline.yielded += driver.yielded(task.task_id, cluster.account(task))
            timeline.busy_s += cluster.busy_s(task)
            return True
    return False
