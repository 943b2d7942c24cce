"""How a sweep stands, from its ledger's state, for people and programs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from bfm.sweep.settings import Metric
from bfm.sweep.spec import METRICS, from_dict
from bfm.sweep.state import SweepState, metric_value


def summarise(state: SweepState) -> dict[str, Any]:
    """JSON-able figures: spend, rungs with their best rows per metric, failures, refused proposals.

    Raises ValueError for a ledger without a spec: nothing was started there.
    """
    if state.spec is None:
        raise ValueError("the ledger holds no sweep")
    spec = from_dict(state.spec)
    budget = spec.budget
    return {
        "name": spec.name,
        "finished": state.finished,
        "metric": spec.metric.name,
        "total_flops": budget.total_flops,
        "spent_flops": state.spent_flops,
        "reserved_flops": state.reserved_flops,
        "lost_flops": state.lost_flops,
        "left_flops": budget.total_flops - state.spent_flops - state.reserved_flops,
        "eval_flops": state.eval_flops,
        "trials": len(state.trials),
        "rungs": [
            _rung(state, rung, rung_flops, spec.metric, budget.tolerance)
            for rung, rung_flops in enumerate(budget.ladder_flops)
        ],
        "running": list(state.open_tasks),
        "retrying": [f"{trial} rung {rung}" for trial, rung in state.owed()],
        "abandoned": {f"{trial} rung {rung}": reason for (trial, rung), reason in state.abandoned.items()},
        "lost_tasks": dict(Counter(record["reason"] for record in state.losses)),
        "rejected": dict(state.rejected.most_common()),
        "probes": len(state.probes),
    }


def _rung(state: SweepState, rung: int, rung_flops: int, selection: Metric, tolerance: float) -> dict[str, Any]:
    rows = state.rungs.get(rung, {})
    comparable = {t: row for t, row in rows.items() if metric_value(row, selection.name, tolerance) is not None}
    statuses = Counter(row["status"] for row in rows.values())
    ranking = [Metric(name, "minimize" if name.endswith("nll") else "maximize") for name in METRICS]
    return {
        "rung": rung,
        "rung_flops": rung_flops,
        "rows": len(rows),
        "diverged": statuses["diverged"],
        "oom": statuses["oom"],
        "off_budget": statuses["ok"] - len(comparable),
        "pending": len(state.pending(rung)),
        "spent_flops": sum(row["task_flops"] for row in rows.values()),
        "best": {metric.name: best for metric in ranking if (best := _best(comparable, metric, tolerance))},
    }


def _best(rows: dict[str, dict[str, Any]], metric: Metric, tolerance: float) -> dict[str, Any] | None:
    values = {trial: metric_value(row, metric.name, tolerance) for trial, row in rows.items()}
    found = {trial: value for trial, value in values.items() if value is not None}
    if not found:
        return None
    trial = min(found, key=lambda name: (metric.loss(found[name]), name))
    return {"trial": trial, "value": found[trial], "params": rows[trial].get("params")}
