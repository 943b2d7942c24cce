"""Planted learning curves, and whole sweeps over them by any policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bfm.sweep.driver.driver import SweepDriver
from bfm.sweep.ledger.ledger import MemoryLedger
from bfm.sweep.simulator.table import Curve, TableArena
from bfm.sweep.space.metric import Selection
from bfm.sweep.space.settings import Budget, Data, Scaling, Scheduler, SweepSpec
from tests.sweep.serial import run_serial

RUNGS = (10**9, 4 * 10**9, 16 * 10**9)
TABLE_POLICIES = ("frontier", "asha-promote", "asha-stop", "isoflop-window", "random", "grid")


def curve(
    name: str, losses: Sequence[float], params: int = 1000, flops: Sequence[float] = RUNGS, resumable=True, **features
) -> Curve:
    """A curve with a row at each of the first rungs."""
    flops = tuple(float(c) for c in flops[: len(losses)])
    return Curve({"config_id": name, **features}, params, flops, tuple(losses), resumable)


def crossing(sizes: Iterable[int], rungs: Sequence[int] = RUNGS) -> list[Curve]:
    """E + A / N^a + B / D^b: at equal C small models lead early and large ones late."""
    return [
        curve(
            f"n{place:03d}",
            [1.0 + 40.0 / size**0.5 + 300.0 / (c / (6 * size)) ** 0.5 for c in rungs],
            params=size,
            flops=rungs,
        )
        for place, size in enumerate(sizes)
    ]


def table_spec(policy: str, total_flops: float, rungs: Sequence[int] = RUNGS, **changes: Any) -> SweepSpec:
    """A sweep over a table."""
    scheduler = Scheduler(policy, eta=changes.pop("eta", 3.0), shares=changes.pop("shares", None))
    budget = Budget(tuple(rungs), round(total_flops), max_trials=changes.pop("max_trials", 1_000_000))
    scaling = Scaling(slots=changes.pop("slots", 1), max_retries=changes.pop("max_retries", 2))
    metric = Selection("loss", others=changes.pop("others", ()), constraints=changes.pop("constraints", ()))
    values: dict[str, Any] = {"name": "table", "method": "random", "parameters": (), "metric": metric}
    return SweepSpec(**{**values, **changes}, budget=budget, scheduler=scheduler, scaling=scaling, data=Data(""))


def begin(
    spec: SweepSpec, curves: Sequence[Curve], records: Sequence[dict] = (), cooldown: float = 0.0, **more: Any
) -> SweepDriver:
    """A driver without files over curves."""
    arena = TableArena(curves, spec.budget.ladder_flops, cooldown)
    return SweepDriver(spec, MemoryLedger(records), arena, **more)


def sweep(
    spec: SweepSpec, curves: Sequence[Curve], run: Callable[[SweepDriver, Any], dict] | None = None, **more: Any
) -> SweepDriver:
    """A whole sweep, one task at a time; its `reason` is why it ended."""
    driver = begin(spec, curves, **more)
    driver.reason = run_serial(driver, driver.arena.execute if run is None else lambda task: run(driver, task))
    return driver


def tasks_of(driver: SweepDriver) -> list[tuple[str, int]]:
    """(config_id, rung) in order of the decisions."""
    return [
        (record["task"]["config"]["config_id"], record["task"]["rung"])
        for record in driver._ledger.records
        if record["kind"] == "task" and record["task"]["task_id"].endswith("-a0")
    ]


def reasons_of(driver: SweepDriver) -> list[str]:
    """Why each task was started."""
    return [record["reason"] for record in driver._ledger.records if record["kind"] == "task"]


def reached(driver: SweepDriver) -> dict[str, int]:
    """config_id -> highest rung with a row."""
    return {t.config["config_id"]: max(t.rows, default=-1) for t in driver.state.trials.values()}


def finite(loss: float | None) -> bool:
    """Whether a loss may be compared."""
    return loss is not None and math.isfinite(loss)
