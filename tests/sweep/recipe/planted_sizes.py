"""Sweeps of model sizes under a planted surface L(N, D), C = 6 N D: ledger rows in closed form, and the truth."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from bfm.sweep.ledger.study import of_sweep
from bfm.sweep.recipe.evidence import ALLOCATION, Evidence, Swept
from bfm.training.config import TrainConfig
from tests.sweep.world import EVENTS_PER_GROUP, PlantedCosts, make_spec

FLOOR, MODEL, ALPHA, DATA, BETA = 2.0, 45.0, 0.34, 900.0, 0.38
NOISE = 0.002
"""Of one run, in ln loss."""
RUNGS = (1e9, 4e9, 16e9, 64e9, 256e9)
FOLDER = "planted"
SHARE = 0.1


def planted(params: float, events: float) -> float:
    return FLOOR + MODEL / params**ALPHA + DATA / events**BETA


def best_size(flops: float) -> float:
    """N* where C = 6 N D."""
    ratio = ALPHA * MODEL / (BETA * DATA)
    return float((ratio * (flops / 6) ** BETA) ** (1 / (ALPHA + BETA)))


@dataclasses.dataclass(frozen=True)
class LogCosts(PlantedCosts):
    """C = 6 N D on a log with so many targets."""

    epoch_events: int = 1 << 50

    def of(self, config: TrainConfig):
        config.shape()
        return dataclasses.replace(super().of(config), epoch_events=self.epoch_events)


def row(number: int, rung: int, params: float, value: float, **changes: Any) -> dict[str, Any]:
    flops = changes.pop("flops", RUNGS[rung])
    settings = {"d_item": 8, "embedder_share": SHARE, "groups_per_step": 1, **changes.pop("config", {})}
    config = TrainConfig(params=params, **settings)
    events = flops / (6 * params)
    unique = min(events, changes.pop("epoch_events", 1 << 50))
    return {
        "trial": f"t{number:05d}",
        "rung": rung,
        "rung_flops": flops,
        "kind": "rung",
        "status": "ok",
        "seed": 0,
        "config": config.as_dict(),
        "params": params,
        "embedder_share": config.embedder_share,
        "path_flops": flops,
        "events": events,
        "unique_events": unique,
        "steps": events / EVENTS_PER_GROUP,
        "batch_events": EVENTS_PER_GROUP,
        "metrics": {"nll": value, "recall@10": float(np.exp(-value / 2))},
        "errors": {"nll": 0.01},
        "flops_version": 1,
        "protocol_hash": "p" * 64,
        **changes,
    }


def rows(seed: int, rungs: int = len(RUNGS), sizes: int = 7) -> list[dict[str, Any]]:
    """Sizes around the best one of every rung, each rung with its own."""
    rng = np.random.default_rng(seed)
    made = []
    for rung in range(rungs):
        for place, step in enumerate(np.linspace(-0.9, 0.9, sizes)):
            params = best_size(RUNGS[rung]) * 10**step
            value = planted(params, RUNGS[rung] / (6 * params)) * np.exp(rng.normal(0, NOISE))
            made.append(row(100 * rung + place, rung, params, float(value)))
    return made


def sizes_sweep(found: list[dict[str, Any]], axis: str | None = ALLOCATION, **changes: Any) -> Swept:
    free = {"params": {"distribution": "log_uniform_values", "min": 300, "max": 1e6}, "learning_rate": {"value": 0.0}}
    top = max(float(r["rung_flops"]) for r in found)
    spec = make_spec(
        parameters={**free, **changes},
        budget={"ladder_flops": [int(c) for c in RUNGS if c <= top], "total_flops": int(1e13)},
    )
    # Laws of an axis are fitted on rows; whether the space could have brought them is not asked here.
    return Swept(FOLDER, dataclasses.replace(spec, axis=axis), tuple(of_sweep(axis or "all", found)))


def evidence(*sweeps: Swept) -> Evidence:
    return Evidence(FOLDER, sweeps)
