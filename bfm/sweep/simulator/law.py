"""Planted laws: what a configuration's loss would be after C, in closed form, with everything that moves an optimum.

L = E + A / N^alpha + B / D'^beta + bowls + noise, with C = 6 N D and D' = D / (1 + batch / critical batch). Bowls, each
zero at its optimum: in log s, in log rate against the rule in (N, B), in log aspect, in log K. The preset `paper` has
the optima of arXiv 2606.05257 (N* ~ C^0.617 through 0.5 M at 1e15 FLOPs, s* 2 %, critical batch 570 sequences, K* 1 M
at 1e17); how steep the bowls are it does not say, those are ours. A law tells nll, and nothing about ranking.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from bfm.errors import UserError
from bfm.sweep.ledger.task import Task
from bfm.sweep.simulator.run import simulated_row
from bfm.sweep.space.costs import ConfigCost
from bfm.training.config import TrainConfig
from bfm.training.schedule import rule_learning_rate


@dataclass(frozen=True)
class Law:
    """Constants in nats, FLOPs, parameters, events."""

    floor: float = 5.0
    """E."""
    model_scale: float = 90.0
    """A."""
    model_exponent: float = 0.314
    data_scale: float = 8.0e3
    """B; see `through`."""
    data_exponent: float = 0.506
    critical_batch: float = 570.0
    """Windows per step at which half of the events are wasted."""
    best_share: float = 0.02
    share_bowl: float = 0.012
    rate_bowl: float = 0.05
    best_aspect: float = 32.0
    aspect_bowl: float = 0.01
    best_negatives: float = 1e6
    """K* at 1e17 FLOPs; it grows like C^1/4."""
    negatives_bowl: float = 0.003
    noise: float = 0.002
    """Standard deviation of a row."""

    @classmethod
    def through(cls, params: float, flops: float, **constants: float) -> Law:
        """With the data scale that makes `params` the best size at `flops`, all else at its optimum."""
        law = cls(**constants)
        events = flops / (6 * params)
        ratio = law.model_exponent * law.model_scale / params**law.model_exponent
        return cls(**{**constants, "data_scale": ratio / law.data_exponent * events**law.data_exponent})

    def loss(self, config: Mapping[str, Any], params: float, flops: float, batch_windows: float) -> float:
        """Without noise."""
        events = flops / (6 * params) / (1 + batch_windows / self.critical_batch)
        value = self.floor + self.model_scale / params**self.model_exponent
        value += self.data_scale / events**self.data_exponent
        share = max(float(config["embedder_share"]), 1e-3)
        positions = batch_windows * config["window"]
        value += self.share_bowl * math.log(share / self.best_share) ** 2
        value += self.rate_bowl * math.log(config["learning_rate"] / rule_learning_rate(params, positions)) ** 2
        value += self.aspect_bowl * math.log(config["aspect"] / self.best_aspect) ** 2
        if config["negatives"]:
            best = self.best_negatives * (flops / 1e17) ** 0.25
            value += self.negatives_bowl * math.log(config["negatives"] / best) ** 2
        return value

    def loss_of(self, config: Mapping[str, Any], params: float, flops: float) -> float:
        """The same of a whole configuration."""
        return self.loss(config, params, flops, config["groups_per_step"] * config["group_windows"])

    def measured(self, loss: float, key: str) -> float:
        """With the noise of one run, a function of `key`."""
        draw = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2.0**64
        return loss + self.noise * NormalDist().inv_cdf(min(max(draw, 1e-12), 1 - 1e-12))


LAWS = {"paper": Law.through(params=0.5e6, flops=1e15)}


def law_named(name: str) -> Law:
    """A preset. Raises UserError for an unknown one."""
    if name not in LAWS:
        raise UserError(f"unknown law {name!r}", key="--law", fix=f"one of {', '.join(LAWS)}")
    return LAWS[name]


class LawCosts:
    """Nominal costs without a log: C = 6 N D, and an epoch without end."""

    num_catalogue = 1 << 62

    def of(self, config: TrainConfig) -> ConfigCost:
        """Raises InfeasibleError where (N, s) cannot be built."""
        shape = config.shape()
        events = float(config.groups_per_step * config.group_windows * config.window)
        step_flops = 6.0 * shape.params * events
        return ConfigCost(
            params=shape.params,
            embedder_share=shape.embedder_share,
            state_params=shape.params,
            table_params=0,
            step_flops=step_flops,
            step_events=events,
            epoch_events=1 << 62,
            evaluation_flops=0,
            probe_flops=0,
            group_bytes=0,
            group_scores=0,
            catalogue_bytes=0,
            stage2_step_flops=None if config.freeze_at_flops is None else step_flops,
            freeze_at_flops=config.freeze_at_flops,
        )


def law_row(law: Law, task: Task) -> dict[str, Any]:
    """The row that a task brings: a function of configuration, seed and rung."""
    params = TrainConfig.from_dict(task.config).shape().params
    loss = law.loss_of(task.config, params, task.rung_flops)
    nll = law.measured(loss, f"{task.trial} {task.seed} {task.rung}")
    return simulated_row(task, params, {"nll": nll}, f"trials/{task.trial}/checkpoints/rung{task.rung}-trunk")
