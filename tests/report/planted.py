"""A realistic sweep that was never run: planted surfaces whose curves cross, noise, promotions, two divergences."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from bfm.laws.frontier import Gap, no_answers, unpaired
from bfm.report.sweep_report import report_html
from bfm.report.sweep_view import SweepView
from bfm.sweep.ledger.state import SweepState
from bfm.training.records import Validation

RUNGS = (1e11, 4e11, 1.6e12)
VALIDATION = Validation(
    step=100,
    phase="trunk",
    path_flops=1_200_000_000_000,
    epochs=3.14,
    train_loss=7.0,
    metrics={"nll": 8.69, "recall@10": 0.0312},
    errors={"nll": 0.04},
    floors={"popularity": {"nll": 9.24, "recall@10": 0.02}, "co_occurrence": {"recall@10": 0.05}},
    best_flops=1_200_000_000_000,
    best_epochs=3.14,
    best_nll=8.69,
)
"""A look on the way at a model above one floor and below another."""


def planted_nll(params: float, flops: float, learning_rate: float) -> float:
    events = flops / (9.0 * params)
    rate_optimum = 3e-3 * (params / 1e5) ** -0.2
    return 6.2 + 28.0 * params**-0.32 + 60.0 * events**-0.38 + 0.06 * np.log(learning_rate / rate_optimum) ** 2


def fake_row(trial: int, rung: int, config: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    flops, params = RUNGS[rung], config["params"]
    nll = planted_nll(params, flops, config["learning_rate"]) + rng.normal(0, 0.012)
    recall = 0.31 * np.exp(-0.42 * (nll - 6.6)) * (params / 1e5) ** 0.02 + rng.normal(0, 0.0008)
    values = {"nll": nll, "recall@10": recall, "ndcg@10": 0.56 * recall, "mrr@10": 0.42 * recall}
    values |= {"coverage@10": 0.02 + 0.5 * recall, "warm.recall@10": 1.04 * recall, "loss_sampled": nll - 2.2}
    errors = {"nll": 0.021, "recall@10": 0.0021, "ndcg@10": 0.0014, "mrr@10": 0.0012, "warm.recall@10": 0.0022}
    events = flops / (9.0 * params)
    return {
        "trial": f"t{trial:03d}", "rung": rung, "rung_flops": flops, "seed": 0, "config": config, "kind": "rung",
        "status": "ok", "params": int(params * 1.004), "embedder_share": config["embedder_share"],
        "embedder_params": int(params * config["embedder_share"]), "stem_params": 8192, "table_params": 1_200_000,
        "contextualizer_params": int(params * (1 - config["embedder_share"])), "shape": {"width": 64, "depth": 2},
        "path_flops": flops * 0.998, "task_flops": flops * (0.998 if rung == 0 else 0.8), "eval_flops": 3.1e9,
        "hardware_flops": flops * 1.1, "useful_attention_flops": flops * 0.03, "steps": int(events / 900),
        "events": int(events), "unique_events": min(int(events), 900_000), "epochs": events / 900_000,
        "batch_events": 905.0, "groups": int(events / 900), "metrics": values, "errors": errors,
        "code_version": "0.1.0+g1a2b3c4", "flops_version": 1, "protocol_hash": "9f" * 32, "shards_hash": "c4" * 32,
        "engine": "zero" if rung == 2 else "plain", "workers": 2 if rung == 2 else 1, "zero_stage": 2 * (rung == 2),
        "device": "cpu", "dtype": "float32", "micro_groups": 1, "softmax": "auto", "threads": 1,
        "train_s": flops / 2.2e10, "eval_s": 1.4, "warm_start_s": 0.08,
        "checkpoint": f"t{trial:03d}/trunk-{rung}", "model": f"t{trial:03d}/{rung}",
    }  # fmt: skip


def large_sweep(num_trials: int = 600, num_rungs: int = 5) -> dict[str, Any]:
    """Every trial at every rung."""
    rng, rows = np.random.default_rng(0), []
    for trial in range(num_trials):
        config = {"params": float(10 ** rng.uniform(3.7, 6.3)), "embedder_share": float(10 ** rng.uniform(-2.2, -0.7))}
        config |= {"learning_rate": float(10 ** rng.uniform(-3.1, -1.8)), "copy": ("pointer", "none")[trial % 2]}
        for rung in range(num_rungs):
            row = fake_row(trial, min(rung, 2), config, rng)
            rows.append(row | {"rung": rung, "rung_flops": RUNGS[0] * 4**rung})
    return {"rows": rows, "state": state_of(rows), "baselines": planted_sweep(4)["baselines"]}


def compare(row: dict[str, Any], other: dict[str, Any], metric: str) -> Gap:
    """As if the queries had been stored: errors of differences are a tenth of what they are unpaired."""
    apart = unpaired(row, other, metric)
    return Gap(apart.value, apart.error / 10, paired=True)


def diverged(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"status": "diverged", "metrics": {}, "errors": {}, "path_flops": row["rung_flops"] * 0.3}


def state_of(rows: list[dict[str, Any]], **known: Any) -> SweepState:
    """The state of a ledger with these rung rows."""
    state = SweepState(**known)
    for row in rows:
        state.rungs.setdefault(row["rung"], {})[row["trial"]] = row
        state.arrivals.append((row["trial"], row["rung"]))
        state.trained_flops[row["trial"], row["rung"]] = row.get("task_flops", 0)
    return state


def planted_sweep(num_trials: int = 24, seed: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    configs = []
    for _ in range(num_trials):
        configs.append(
            {
                "params": float(10 ** rng.uniform(3.7, 6.3)),
                "embedder_share": float(10 ** rng.uniform(-2.2, -0.7)),
                "learning_rate": float(10 ** rng.uniform(-3.1, -1.8)),
                "groups_per_step": int(rng.choice([1, 2, 4])),
                "window": 256,
            }
        )
    rows = [fake_row(trial, 0, config, rng) for trial, config in enumerate(configs)]
    for bad in (5, 17):
        if bad < num_trials:
            rows[bad] = diverged(rows[bad])
    for rung, keep in ((1, 10), (2, 4)):
        below = [row for row in rows if row["rung"] == rung - 1 and row["status"] == "ok"]
        # Strata of model size, as the simple rule has it: the best of each goes on.
        below.sort(key=lambda row: row["params"])
        strata = [part for part in np.array_split(np.arange(len(below)), min(keep, len(below))) if len(part)]
        for part in strata:
            best = min((below[i] for i in part), key=lambda row: row["metrics"]["nll"])
            rows.append(fake_row(int(best["trial"][1:]), rung, best["config"], rng))
    state = state_of(
        rows,
        spec={
            "name": "quickstart",
            "parameters": {
                "params": {"min": 5e3, "max": 2e6},
                "embedder_share": {"min": 0.006, "max": 0.2},
                "learning_rate": {"value": 0},
                "groups_per_step": {"values": [1, 2, 4]},
            },
            "budget": {"ladder_flops": list(RUNGS), "total_flops": 2.4e13},
        },
        finished="the space has no more points",
        spent_flops=sum(row["task_flops"] for row in rows) + 2e11,
        lost_flops=2e11,
        losses=[{"trial": "t011", "rung": 1, "reason": "worker killed (signal 9)", "charged_flops": 2e11}],
        rejected=Counter({"fewer than 100 steps": 7, "share below s_min": 2}),
    )
    baselines = {
        "popularity": {"nll": 8.91, "recall@10": 0.061, "ndcg@10": 0.034, "mrr@10": 0.024, "coverage@10": 0.0004},
        "co_occurrence": {"recall@10": 0.119, "ndcg@10": 0.071, "mrr@10": 0.055, "coverage@10": 0.21},
    }
    return {"rows": rows, "state": state, "baselines": baselines}


def view_of(sweep: dict[str, Any], **known: Any) -> SweepView:
    """A view whose storage is never asked: its rows, state and floors are given, and what else is known."""
    view = SweepView(store=None, state=sweep["state"])
    facts = {"rows": sweep["rows"], "floors": sweep["baselines"], "compare": no_answers, "laws": []}
    vars(view).update(facts | known)
    return view


def page_of(sweep: dict[str, Any], about: dict[str, Any] | None = None, **known: Any) -> str:
    return report_html(view_of(sweep, **known), **(about or {}))
