"""A planted world: costs and training results as closed formulas, so that whole sweeps run in milliseconds."""

from __future__ import annotations

import hashlib
import itertools
import math
import uuid
from collections.abc import Callable, Collection
from dataclasses import replace

from bfm.files import Store
from bfm.sweep.driver.driver import SweepDriver
from bfm.sweep.driver.status import import_words
from bfm.sweep.ledger.imports import read_runs
from bfm.sweep.ledger.lease import STALE_S, Holder, Lease
from bfm.sweep.ledger.ledger import Ledger, MemoryLedger
from bfm.sweep.ledger.state import SweepState
from bfm.sweep.ledger.task import Task
from bfm.sweep.simulator.run import simulated_row
from bfm.sweep.space.costs import ConfigCost
from bfm.sweep.space.settings import SweepSpec
from bfm.sweep.space.space import FeasibleSet
from bfm.sweep.space.spec import from_dict
from bfm.training.config import TrainConfig
from tests.sweep.serial import run_serial

EVENTS_PER_GROUP = 100.0
GRID = {"params": {"values": [500, 1000, 3000]}, "learning_rate": {"values": [0.001, 0.004, 0.09]}}
"""Axes of make_spec's space as a grid; the last rate diverges."""


class PlantedCosts:
    """C = 6 N D."""

    num_catalogue = 1000

    def of(self, config: TrainConfig) -> ConfigCost:
        events = EVENTS_PER_GROUP * config.groups_per_step
        return ConfigCost(
            params=round(config.params),
            embedder_share=config.embedder_share,
            state_params=round(config.params),
            table_params=0,
            step_flops=6.0 * config.params * events,
            step_events=events,
            epoch_events=100_000,
            evaluation_flops=1_000_000,
            probe_flops=100_000,
            group_bytes=1 << 20,
            group_scores=0.0,
            catalogue_bytes=1 << 20,
            stage2_step_flops=None if config.freeze_at_flops is None else 5.0 * config.params * events,
            freeze_at_flops=config.freeze_at_flops,
            catalogue_flops=0 if config.freeze_at_flops is None else 1_000_000,
        )


def make_spec(**changes) -> SweepSpec:
    """A small sweep; `changes` replace whole top-level keys, or single ones where both are mappings."""
    values = {
        "name": "planted",
        "metric": {"name": "nll"},
        "method": "random",
        "parameters": {
            "params": {"distribution": "log_uniform_values", "min": 300, "max": 10000},
            "learning_rate": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1},
        },
        "budget": {"ladder_flops": ["1e9", "4e9", "16e9"], "total_flops": "150e9", "events_per_param": [0, 1e6]},
        "scheduler": {"type": "asha-promote", "eta": 3},
        "data": {"shards": "nowhere"},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
    if values["scheduler"].get("type") in ("random", "grid"):
        # Full-length runs go with their method.
        values["method"] = values["scheduler"]["type"]
    return from_dict(values)


def planted_loss(config: dict, path_flops: float, seed: int = 0) -> float:
    """E + A / N^a + B / D^b, times a bowl in log learning rate, plus noise of the seed; inf where the rate diverges."""
    params, rate = config["params"], config["learning_rate"]
    if rate > 0.08:
        return math.inf
    events = path_flops / (6 * params)
    text = f"{params:.9g} {rate:.9g} {seed} {path_flops:.6g}"
    noise = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") / 2**32 - 0.5
    share = 0.1 * math.log(config["embedder_share"] / 0.02) ** 2 if config["embedder_share"] else 1.0
    bowl = 0.15 * math.log(rate / 3e-3) ** 2
    return 2.0 + 30.0 / params**0.5 + 200.0 / events**0.5 + bowl + share + 0.002 * noise


def spoilt(bad: Collection[int], kind: str) -> Callable[[Task], dict]:
    """An executor whose trials of these numbers bring rows that cannot be compared: nan, missing C, or a status."""

    def run(task: Task) -> dict:
        row = execute(task)
        if int(task.trial[1:]) in bad:
            match kind:
                case "nan":
                    row["metrics"]["nll"] = math.nan
                case "missing C":
                    row["path_flops"] //= 2
                    row["task_flops"] //= 2
                case status:
                    row |= {"status": status, "metrics": {}}
        return row

    return run


def execute(task: Task) -> dict:
    """The row of a task: a pure function of configuration, seed and rung."""
    loss = planted_loss(task.config, task.rung_flops, task.seed)
    ok = math.isfinite(loss)
    begins = task.from_rung is None and task.progress is None
    start_flops = 0 if begins else task.begins_flops
    path_flops = round(task.rung_flops * 0.997)
    metrics, checkpoint = {"nll": loss, "recall@10": 1.0 / loss}, f"trials/{task.trial}/checkpoints/r{task.rung}"
    return {
        **simulated_row(task, round(task.config["params"]), metrics, checkpoint, "ok" if ok else "diverged"),
        "path_flops": path_flops,
        "task_flops": (path_flops - start_flops) if ok else (path_flops - start_flops) // 2,
        "eval_flops": 1000,
    }


def mortal_lease(store: Store, machine: str = "") -> Lease:
    """That of a process on a machine of its own, which whoever comes next finds dead at once."""
    holder = replace(Holder.this_process(), machine=machine or uuid.uuid4().hex)
    return Lease.acquire(store, holder=holder, clock=itertools.count(0.0, STALE_S).__next__, heartbeat_s=None)


def mortal_ledger(store: Store) -> Ledger:
    """A ledger under such a lease."""
    return Ledger(store, mortal_lease(store))


def start(spec: SweepSpec, store: Store) -> SweepDriver:
    """A driver over the planted world that may die without a trace."""
    return SweepDriver.start(FeasibleSet(spec, PlantedCosts()), mortal_ledger(store))


def in_memory(spec: SweepSpec, records=(), **options) -> SweepDriver:
    """A driver without files; go on from `records`."""
    return SweepDriver.start(FeasibleSet(spec, PlantedCosts()), MemoryLedger(records), **options)


def import_runs(driver: SweepDriver, path, protocol_hash: str | None = None) -> str:
    """What comes of a table of runs."""
    return import_words(driver.take_runs(read_runs(path, driver.spec, driver.arena.feasible, protocol_hash)))


def first_tries(records) -> list[tuple]:
    """(trial, rung, reason, meant for) in the order of the decisions."""
    return [
        (record["task"]["trial"], record["task"]["rung"], record["reason"], record.get("meant_for"))
        for record in records
        if record["kind"] == "task" and record["task"]["task_id"].endswith("-a0")
    ]


def rows_of(state: SweepState) -> dict:
    """(trial, rung) -> rung row."""
    return {(trial, rung): row for rung, rows in state.rungs.items() for trial, row in rows.items()}


def unbroken(spec: SweepSpec) -> tuple[SweepDriver, list[int]]:
    """A whole sweep, and how many records stood after every append."""
    batches = []

    class Recording(MemoryLedger):
        def append(self, records):
            super().append(records)
            batches.append(len(self.records))

    driver = SweepDriver.start(FeasibleSet(spec, PlantedCosts()), Recording())
    run_serial(driver, execute)
    return driver, batches
