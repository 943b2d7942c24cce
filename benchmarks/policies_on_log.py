"""Policies against each other on real training: a small sweep of a prepared log, each at the same cap, several seeds.

Tasks of a sweep run one after the other with the plain engine, so that only the policy differs. Run with
`python benchmarks/policies_on_log.py SHARDS`; writes benchmarks/results/policies_on_log.md.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from common import machine, publish

from bfm.events.protocol import Protocol
from bfm.events.shards import Shards
from bfm.files import Store
from bfm.sweep.driver.driver import SweepDriver
from bfm.sweep.ledger.ledger import MemoryLedger
from bfm.sweep.space.costs import Costs
from bfm.sweep.space.space import FeasibleSet
from bfm.sweep.space.spec import from_dict
from bfm.training.engine import EngineFactory
from bfm.training.rung import run_rung
from bfm.training.task import RungTask
from tests.sweep.serial import run_serial

POLICIES = ("frontier", "asha-promote", "isoflop-window")


def spec_values(policy: str, seed: int, options: argparse.Namespace) -> dict:
    """The quickstart's axes, wider in N, on a lower ladder."""
    log = {"distribution": "log_uniform_values"}
    return {
        "name": "contest",
        "metric": {"name": "nll"},
        "method": "random",
        "parameters": {
            "params": {**log, "min": 2e3, "max": 1e5},
            "embedder_share": {**log, "min": 0.02, "max": 0.3},
            "learning_rate": {**log, "min": 1e-3, "max": 2e-2},
            "groups_per_step": {"value": 1},
            "window": {"value": 64},
            "group_windows": {"value": 4},
            "d_item": {"value": 32},
        },
        "budget": {"ladder_flops": options.ladder, "total_flops": options.cap, "max_trials": 200},
        "scheduler": {"type": policy},
        "data": {"shards": options.shards, "evaluation_queries": options.queries},
        "seeds": [seed],
    }


def run(job: tuple[str, int, argparse.Namespace]) -> dict[str, float]:
    """One sweep of a policy and a seed; the best nll per rung, what was spent, seconds."""
    policy, seed, options = job
    torch.set_num_threads(1)
    shards = Shards.open(options.shards)
    spec = from_dict(spec_values(policy, seed, options))
    costs = Costs.on(shards, Protocol.load(shards), spec.data.evaluation_queries)
    begun_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        store, factory = Store(folder), EngineFactory(torch.device("cpu"))
        driver = SweepDriver.start(FeasibleSet(spec, costs), MemoryLedger())
        run_serial(driver, lambda task: run_rung(RungTask.from_task(task.as_dict()), shards, factory, store))
    state, found = driver.state, {}
    for rung, flops in enumerate(spec.budget.ladder_flops):
        losses = [row["metrics"]["nll"] for row in state.rungs.get(rung, {}).values() if row["status"] == "ok"]
        found[f"nll at {flops:.2g}"] = min(losses, default=float("nan"))
        found[f"rows at {flops:.2g}"] = len(losses)
    return found | {"trials": len(state.trials), "spent": state.spent_flops, "s": time.perf_counter() - begun_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards")
    parser.add_argument("--ladder", nargs="+", default=["8e9", "2.4e10", "7.2e10"])
    parser.add_argument("--cap", default="3e11")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    lines: list[str] = []
    jobs = [(policy, seed, options) for policy in POLICIES for seed in range(options.seeds)]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        done = pool.map(run, jobs, chunksize=1)
    for place, policy in enumerate(POLICIES):
        rows = done[place * options.seeds : (place + 1) * options.seeds]
        if not lines:
            lines = ["| policy | " + " | ".join(rows[0]) + " |", "|---" * (len(rows[0]) + 1) + "|"]
        cells = []
        for name in rows[0]:
            values = np.array([row[name] for row in rows], dtype=float)
            error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
            cells.append(f"{values.mean():.4f} ({error:.4f})" if name.startswith("nll") else f"{values.mean():.3g}")
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    head = f"""# Policies on real training

Complete Journey (as packaged), cap {options.cap} FLOPs each, {options.queries} validation queries, mean of
{options.seeds} seeds (standard error); tasks one after the other, one thread.
Written by `python benchmarks/policies_on_log.py` on {datetime.date.today()}.

"""
    publish("policies_on_log", head + "\n".join(lines) + "\n\n" + machine("torch", "numpy", "scipy") + "\n")


if __name__ == "__main__":
    main()
