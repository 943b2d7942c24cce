"""Configurations for one C, by model size: a base configuration with the settings that were chosen for that C.

Enters: what a sweep's best run was configured with, the choices, the cost model. Leaves: verdicts per N, judged by the
same bounds as the sweep's own points (steps, D/N, epochs, memory of the tier).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bfm.errors import InfeasibleError
from bfm.laws.frontier import Row
from bfm.sweep.choices import BatchRule
from bfm.sweep.costs import CostModel
from bfm.sweep.evidence import Swept
from bfm.sweep.space import Feasible, FeasibleSet, Rejection
from bfm.training.config import TrainConfig
from bfm.training.schedule import rule_learning_rate
from bfm.units import format_flops

_STAGE_2 = ("freeze_at_flops", "negatives", "negatives_exponent")
_ONE_STAGE = {"freeze_at_flops": None, "negatives": 0}


@dataclass(frozen=True)
class Settings:
    """What is the same at every N."""

    embedder_share: float
    batch: BatchRule
    rate_ratio: float
    """Learning rate over the rule in (N, B)."""
    negatives: int
    """K."""
    second_stage: Row | None
    """The run that stage 2 is taken from; None: one stage."""


class Candidates:
    """The configurations that a C allows."""

    def __init__(self, sizes: Swept, best: Row, settings: Settings, costs: CostModel, flops: float) -> None:
        self.flops, self.settings = flops, settings
        self._costs = costs
        budget = dataclasses.replace(sizes.spec.budget, ladder_flops=(round(flops),))
        self._spec = dataclasses.replace(sizes.spec, budget=budget)
        self._feasible = FeasibleSet(self._spec, costs)
        self._base = {**best["config"], **self._depths(sizes, best), **self._stage_2()}
        probe = costs.of(TrainConfig.from_dict(best["config"]))
        self._group_events = probe.step_events / best["config"]["groups_per_step"]

    def at(self, params: float) -> Feasible | Rejection:
        """The verdict on a size; widths, depths, steps and D follow from it."""
        config = self.config(params)
        return self._feasible.judge_config(config)

    def config(self, params: float) -> TrainConfig:
        """The configuration of a size, feasible or not."""
        workers = self._spec.tier(self.flops, params).workers
        groups = workers * max(1, round(self.settings.batch.at(params) / self._group_events / workers))
        positions = groups * self._base["group_windows"] * self._base["window"]
        rate = self.settings.rate_ratio * rule_learning_rate(params, positions)
        chosen = {"params": params, "embedder_share": self.settings.embedder_share}
        return TrainConfig.from_dict({**self._base, **chosen, "groups_per_step": groups, "learning_rate": rate})

    def grid(self, low: float, high: float, per_decade: int) -> tuple[list[Feasible], list[tuple[float, Rejection]]]:
        """Feasible sizes between two N, ascending, and the others. Raises InfeasibleError where there is none."""
        steps = max(2, math.ceil(per_decade * math.log10(high / low)))
        feasible: list[Feasible] = []
        rejected: list[tuple[float, Rejection]] = []
        for step in range(steps + 1):
            params = low * (high / low) ** (step / steps)
            verdict = self.at(params)
            if isinstance(verdict, Feasible):
                feasible.append(verdict)
            else:
                rejected.append((params, verdict))
        if not feasible:
            params, first = rejected[len(rejected) // 2]
            raise InfeasibleError(
                f"no model size can be trained at {format_flops(self.flops)} FLOPs; N = {params:.3g}: {first.reason} "
                f"({first.detail})",
                key=first.key,
                fix=first.fix,
            )
        return feasible, rejected

    def _depths(self, sizes: Swept, best: Row) -> dict[str, Any]:
        """A depth that was searched belongs to its own N; its width per layer goes on to others."""
        if not sizes.searched("depth") or best["config"].get("depth") is None:
            return {}
        return {"depth": None, "aspect": best["shape"]["width"] / best["shape"]["depth"]}

    def _stage_2(self) -> Mapping[str, Any]:
        """Stage 2 begins at the same share of C as in the run that it is taken from."""
        row = self.settings.second_stage
        if row is None:
            return _ONE_STAGE
        share = row["config"]["freeze_at_flops"] / float(row["rung_flops"])
        taken = {name: row["config"][name] for name in _STAGE_2}
        return {**taken, "freeze_at_flops": share * self.flops, "negatives": self.settings.negatives}
