"""How a sweep stands, from its ledger's state, for people and programs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from bfm.laws.frontier import goal_of, numbers
from bfm.sweep.driver.requests import request_words
from bfm.sweep.ledger.state import LAST_DECISIONS, SweepState, comparable_value, spec_of
from bfm.sweep.ledger.winner import winner
from bfm.sweep.recipe.verdicts import calibration, checks_lines
from bfm.sweep.space.metric import METRICS, Metric
from bfm.sweep.space.settings import SweepSpec
from bfm.units import GIB, format_flops


def summarise(state: SweepState) -> dict[str, Any]:
    """JSON-able figures: spend, rungs with their best rows per metric, failures, refused proposals.

    Raises ValueError for a ledger without a spec: nothing was started there.
    """
    spec = spec_of(state)
    budget = spec.budget
    return {
        "name": spec.name,
        "finished": state.finished,
        "metric": spec.metric.name,
        "total_flops": budget.total_flops,
        "spent_flops": state.spent_flops,
        "reserved_flops": state.reserved_flops,
        "lost_flops": state.lost_flops,
        "redone_flops": state.redone_flops,
        "left_flops": budget.total_flops - state.spent_flops - state.reserved_flops,
        "eval_flops": state.eval_flops,
        "trials": state.num_proposals,
        "imported_trials": len(state.trials) - state.num_proposals,
        "imports": state.imports,
        "rungs": [
            _rung(state, rung, rung_flops, spec.metric, budget.tolerance)
            for rung, rung_flops in enumerate(budget.ladder_flops)
        ],
        "winner": winner(state, spec),
        "retrying": [f"{trial} rung {rung}" for trial, rung in state.owed()],
        "abandoned": {f"{trial} rung {rung}": reason for (trial, rung), reason in state.abandoned.items()},
        "lost_tasks": dict(Counter(record["reason"] for record in state.losses)),
        "rejected": dict(state.rejected.most_common()),
        "requests": list(state.requests.values()),
        "cancelled": state.cancelled,
        "probes": len(state.probes),
        "storage": _storage(state, spec),
        "checks": state.checks,
        "calibration": calibration(state.checks),
        "decisions": list(state.decisions),
    }


def life_text(state: SweepState) -> str:
    """The winner, imports, what is kept, checks, what was asked for and last decisions, for a terminal; empty where
    there is nothing.

    Raises as `summarise`.
    """
    spec = spec_of(state)
    blocks = [_winner_lines(winner(state, spec)), [import_words(record) for record in state.imports]]
    blocks += [_storage_lines(_storage(state, spec)), checks_lines(state.checks)]
    if state.requests:
        asked = list(state.requests.values())[-LAST_DECISIONS:]
        blocks.append(["last requests", *(f"  {request_words(record)}" for record in asked)])
    if state.decisions:
        lines = [f"  {_decision_line(decision)}" for decision in state.decisions]
        blocks.append(["last decisions", *lines])
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def _winner_lines(winner: Mapping[str, Any] | None) -> list[str]:
    if winner is None:
        return []
    over = f"mean of {winner['seeds']} seeds, s.e. {winner['error']:.2g}" if winner["seeds"] > 1 else "one seed"
    return [f"best at rung {winner['rung']}: {winner['trial']}, {winner['metric']} {winner['value']:.5g} ({over})"]


def import_words(record: Mapping[str, Any]) -> str:
    """One line for a person, of an import as the state counts it."""
    words = f"imported {record['rows']} rows of {record['trials']} new trials from {record['file']}"
    words += f", {record['known']} known already" if record["known"] else ""
    reasons = ", ".join(f"{reason} ({count})" for reason, count in record["left_out"].items())
    return f"{words}; left out: {reasons}" if reasons else words


def _decision_line(decision: Mapping[str, Any]) -> str:
    cost = format_flops(decision["reserved_flops"])
    return f"{decision['task_id']} ({cost} FLOPs, on the way to rung {decision['meant_for']}): {decision['reason']}"


def _storage(state: SweepState, spec: SweepSpec) -> dict[str, Any]:
    kept = state.kept_trunks
    models = [row.get("model_bytes") or 0 for rows in state.rungs.values() for row in rows.values()]
    quota_bytes = None if spec.storage.checkpoints_gib is None else round(spec.storage.checkpoints_gib * GIB)
    return {
        "quota_bytes": quota_bytes,
        "trunks": len(kept),
        "trunk_bytes": sum(kept.values()),
        "model_bytes": sum(models),
        "models_alone_break_quota": quota_bytes is not None and sum(models) > quota_bytes,
        "evicted": len(state.evicted),
        "evicted_bytes": sum(record["bytes"] for record in state.evicted.values()),
        "evictions": dict(Counter(_kind(record["reason"]) for record in state.evicted.values())),
    }


def _kind(reason: str) -> str:
    """A reason without its figures, so that equal ones are counted together."""
    return re.sub(r"\s*\(.*?\)", "", re.sub(r"\d[\d.e+-]*%?", "#", reason))


def _storage_lines(storage: Mapping[str, Any]) -> list[str]:
    if storage["quota_bytes"] is None and not storage["evicted"]:
        return []
    quota = "" if storage["quota_bytes"] is None else f" of {storage['quota_bytes'] / GIB:.3g} GiB"
    lines = [f"{storage['trunks']} trunks kept, {storage['trunk_bytes'] / GIB:.3g}{quota or ' GiB'}"]
    lines[0] += f"; {storage['evicted']} evicted, {storage['evicted_bytes'] / GIB:.3g} GiB"
    lines += [f"  evicted {count}: {reason}" for reason, count in storage["evictions"].items()]
    if storage["models_alone_break_quota"]:
        size = f"{storage['model_bytes'] / GIB:.3g} GiB"
        lines.append(f"the cooled models of the rows alone take {size}, more than the quota; they are kept")
    return lines


def _rung(state: SweepState, rung: int, rung_flops: int, selection: Metric, tolerance: float) -> dict[str, Any]:
    rows = state.rungs.get(rung, {})
    values = {trial: comparable_value(row, selection.name, tolerance) for trial, row in rows.items()}
    comparable = {trial: rows[trial] for trial, value in values.items() if value is not None}
    statuses = Counter(row["status"] for row in rows.values())
    return {
        "rung": rung,
        "rung_flops": rung_flops,
        "rows": len(rows),
        "diverged": statuses["diverged"],
        "oom": statuses["oom"],
        "off_budget": statuses["ok"] - len(comparable),
        "pending": len(state.pending(rung)),
        "spent_flops": state.trained_at(rung),
        "best": _bests(comparable),
    }


def _bests(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Metric -> the best of comparable rows; of equal ones that of the first name."""
    trials, bests = list(rows), {}
    for metric, value_R in numbers(rows.values(), "metrics", METRICS).items():
        known_R = value_R[np.isfinite(value_R)]
        if known_R.size:
            value = float(known_R.min() if goal_of(metric) == "minimize" else known_R.max())
            trial = min(trials[place] for place in np.flatnonzero(value_R == value))
            bests[metric] = {"trial": trial, "value": value, "params": rows[trial].get("params")}
    return bests
