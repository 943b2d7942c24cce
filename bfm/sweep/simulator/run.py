"""A sweep on a virtual clock: the driver, policy and ledger of real ones; only machines and time are made up.

Enters: a SweepSpec, an arena, what executes its tasks, a Fleet. Leaves: the sweep's state and the Timeline. The driver
is asked when a worker is free, and told what has room; where nothing waits, a running task yields to go on with more
workers, as in real sweeps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from bfm.errors import UserError
from bfm.sweep.driver.driver import SweepDriver
from bfm.sweep.ledger.ledger import MemoryLedger
from bfm.sweep.ledger.state import SweepState
from bfm.sweep.ledger.task import Finished, Task, Wait
from bfm.sweep.policies.arena import Arena
from bfm.sweep.simulator.fleet import DONE, YIELDED, Cluster, Fleet
from bfm.sweep.space.settings import SweepSpec

Execute = Callable[[Task], dict[str, Any]]
Progress = Callable[[str, float], None]
"""Is told what runs, and the share that is done."""
Made = TypeVar("Made")


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
    rows: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    """(virtual second, row)."""
    lost: int = 0
    yielded: int = 0


def decision_times(timelines: Iterable[Timeline]) -> dict[str, Any]:
    """What decisions took in real time, JSON-able: median and 99th percentile, and all together."""
    decision_s = [seconds for timeline in timelines for seconds in timeline.decision_s]
    median, p99 = (1e3 * float(np.quantile(decision_s, share)) for share in (0.5, 0.99))
    return {"decision_ms": {"median": median, "p99": p99}, "seconds": float(sum(decision_s))}


def simulated_row(
    task: Task, params: int, metrics: dict[str, float | None], checkpoint: str | None, status: str = "ok"
) -> dict[str, Any]:
    """The row of a task that trained all that was reserved for it."""
    return {
        "kind": "rung",
        "trial": task.trial,
        "rung": task.rung,
        "rung_flops": task.rung_flops,
        "seed": task.seed,
        "config": task.config,
        "status": status,
        "params": params,
        "path_flops": task.rung_flops,
        "task_flops": task.reserved_flops,
        "eval_flops": 0,
        "metrics": metrics,
        "checkpoint": checkpoint,
    }


def run_all(
    run: Callable[[str, int], Made], policies: Sequence[str], seeds: Sequence[int], progress: Progress
) -> list[list[Made]]:
    """What each policy makes of each seed. Raises UserError where no policy is named."""
    if not policies:
        raise UserError("names no policy", key="--policy", fix="write e.g. frontier,random")
    made: list[list[Made]] = []
    for place, policy in enumerate(policies):
        made.append([])
        for number, seed in enumerate(seeds):
            progress(f"{policy} seed {seed}", (place + number / len(seeds)) / len(policies))
            made[-1].append(run(policy, seed))
    return made


def simulate(
    spec: SweepSpec, arena: Arena, execute: Execute, fleet: Fleet, rng: np.random.Generator
) -> tuple[SweepState, Timeline]:
    """Run a sweep to its end.

    Raises UserError where a task needs more workers than there will ever be, PausedError where a real sweep would pause
    (bfm.sweep.driver.breaker): workers that are taken away while their tasks start look like broken ones.
    """
    cluster, timeline = Cluster(fleet, rng), Timeline()
    driver = SweepDriver(spec, MemoryLedger(), arena, settle=cluster.account)
    while True:
        answer = _fill(driver, cluster, timeline)
        if isinstance(answer, Finished):
            timeline.provisioned_s = cluster.provisioned_s(timeline.elapsed_s)
            return driver.state, timeline
        cluster.check_room(answer)
        for task, how in cluster.advance():
            if how == DONE:
                row = {**execute(task), **cluster.timings(task)}
                driver.report(task.task_id, row)
                timeline.rows.append((cluster.now_s, row))
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
