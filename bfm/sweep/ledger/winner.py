"""The best of a sweep: the configuration that leads at the highest rung, by the mean over its seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bfm.sweep.ledger.state import SweepState, Trial, comparable_value
from bfm.sweep.space.parameters import ConfigKey
from bfm.sweep.space.settings import SweepSpec


def by_config(state: SweepState, rung: int, spec: SweepSpec) -> dict[ConfigKey, tuple[Trial, dict[int, float]]]:
    """Configurations with comparable rows at a rung that keep the constraints: the first trial, losses by seed."""
    found: dict[ConfigKey, tuple[Trial, dict[int, float]]] = {}
    for name, row in state.rungs.get(rung, {}).items():
        value = comparable_value(row, spec.metric.name, spec.budget.tolerance)
        if value is not None and _keeps(row, spec):
            trial = state.trials[name]
            found.setdefault(trial.key, (trial, {}))[1][trial.seed] = spec.metric.loss(value)
    return found


def winner(state: SweepState, spec: SweepSpec) -> dict[str, Any] | None:
    """The best configuration of the highest rung with rows.

    Of those compared over seeds, where there are any: one with fewer is named if it is ahead of every seed of theirs.
    """
    for rung in reversed(range(len(spec.budget.ladder_flops))):
        groups = by_config(state, rung, spec)
        if not groups:
            continue
        most = max(len(losses) for _, losses in groups.values())
        compared = min((group for group in groups.values() if len(group[1]) == most), key=_mean)
        leader = min(groups.values(), key=_mean)
        trial, losses = leader if _mean(leader) < min(compared[1].values()) else compared
        mean, seeds = _mean((trial, losses)), len(losses)
        spread = math.sqrt(sum((loss - mean) ** 2 for loss in losses.values()) / (seeds - 1)) if seeds > 1 else None
        return {
            "trial": trial.trial,
            "rung": rung,
            "metric": spec.metric.name,
            "value": spec.metric.loss(mean),
            "seeds": seeds,
            "error": None if spread is None else spread / math.sqrt(seeds),
            "config": trial.config,
        }
    return None


def _mean(group: tuple[Trial, Mapping[int, float]]) -> float:
    return sum(group[1].values()) / len(group[1])


def _keeps(row: Mapping[str, Any], spec: SweepSpec) -> bool:
    values = [(constraint, row["metrics"].get(constraint.metric.name)) for constraint in spec.metric.constraints]
    return all(value is not None and constraint.holds(value) for constraint, value in values)
