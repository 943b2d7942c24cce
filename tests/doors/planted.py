"""Ledgers of sweeps that were never run, with planted rows."""

from __future__ import annotations

from typing import Any

from bfm.files import Store
from bfm.sweep.ledger.study import list_sweeps
from tests.report.planted_laws import BUDGETS, allocation_rows, share_rows
from tests.sweep.world import mortal_ledger

Record = dict[str, Any]
PARAMETERS = {
    "params": {"distribution": "log_uniform_values", "min": 1e4, "max": 1e10},
    "embedder_share": {"distribution": "uniform", "min": 0.0, "max": 0.5},
    "negatives": {"value": 0},
}


def write_sweep(location: str, rows: list[Record], axis: str | None = None) -> str:
    """A finished sweep of one row per trial; its name is its folder's."""
    store = Store(location)
    spec = {
        "name": location.rsplit("/", 1)[-1], "axis": axis, "parameters": PARAMETERS,
        "metric": {"name": "nll", "others": ["recall@10"]}, "data": {"shards": "shards"},
        "budget": {"ladder_flops": list(BUDGETS), "total_flops": 1e21},
    }  # fmt: skip
    records: list[Record] = [{"kind": "opened"}, {"kind": "spec", "spec": spec}]
    for number, row in enumerate(rows):
        who = {"trial": row["trial"], "config": row["config"], "seed": 0, "params": int(row["params"])}
        task = {"task_id": f"task-{number}", "trial": row["trial"], "rung": row["rung"], "reserved_flops": 10**15}
        recall = row["metrics"]["recall@10"]
        whole = {
            **row, "metrics": {**row["metrics"], "ndcg@10": 0.56 * recall}, "eval_flops": 0,
            "errors": {**row["errors"], "ndcg@10": 0.0014},
        }  # fmt: skip
        records += [
            {"kind": "proposal", "number": number, "source": "random", "rejected": {}, **who},
            {"kind": "task", "task": task},
            {"kind": "row", "task_id": task["task_id"], "row": whole, "probes": []},
        ]
    ledger = mortal_ledger(store)
    ledger.append([*records, {"kind": "finished", "reason": "the space has no more points"}])
    ledger.close()
    return location


def write_study(location: str) -> str:
    """Two begun sweeps, of the allocation and of the share, and one that is not."""
    write_sweep(f"{location}/allocation", allocation_rows(), "allocation")
    write_sweep(f"{location}/share", share_rows(), "embedder_share")
    list_sweeps(Store(location), ["allocation", "share", "batch"])
    return location
