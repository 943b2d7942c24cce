"""AdamW over three groups of parameters, with the running average of the trunk's weights kept beside the moments.

In: a model's parameters and a configuration. Out: an optimizer whose whole state is the moments, the average and one
step counter, so that every engine (whole tensors or flat ZeRO partitions) can export and import it by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bfm.model.two_part import TwoPartModel
from bfm.training.config import TrainConfig

LARGEST_DECAY = 0.1
"""Share of a table that one step takes away at most, however often events repeat."""
AVERAGE_EXPONENT = 8
"""gamma of polynomial-decay averaging (Shamir & Zhang 2013): about the last 1/9 of the trunk, at any time."""
MOMENTS = ("exp_avg", "exp_avg_sq")
TIDY_EVERY_STEPS, LEAST_MOMENT = 64, 1e-30
"""How often moments below the second are set to 0, which no update shows: AdamW's epsilon is 1e-8.

Those of a row that no step touches halve every few steps, until they stay where numbers are denormal, and there a CPU
takes twenty times as long for each (1 ms became 20 to 33 for 1.2 million).
"""
AVERAGE = "average"
STATE_KEYS = (*MOMENTS, AVERAGE)
"""What the optimizer keeps of a parameter, by its own names."""


def average_weight(trunk_step: int) -> float:
    """Share of the new weights in the running average after the trunk's step 1, 2, ...: (g + 1) / (t + g)."""
    return (AVERAGE_EXPONENT + 1) / (trunk_step + AVERAGE_EXPONENT)


class AveragingAdamW(torch.optim.AdamW):
    """AdamW that also moves a running average of the weights, one tensor of the state like the moments."""

    average_weight = 0.0
    """Set before each step; 0 leaves the average alone."""
    tidies = False
    """Whether the next step sets moments below LEAST_MOMENT to 0."""
    grad_scale: Tensor | None = None
    """What gradients are divided by in the next step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; gradients must stand."""
        loss = super().step(closure)
        if self.average_weight == 0.0 and not self.tidies:
            return loss
        for group in self.param_groups:
            for parameter in group["params"]:
                # ZeRO steps sub-groups one by one, so only what was just stepped may move.
                state = self.state[parameter]
                if AVERAGE in state and self.average_weight:
                    state[AVERAGE].lerp_(parameter, self.average_weight)
                if self.tidies:
                    for key in state.keys() & MOMENTS:
                        torch.hardshrink(state[key], LEAST_MOMENT, out=state[key])
        return loss

    def start_state(self, parameters: Iterable[Tensor], averaging: bool) -> None:
        """Lay out zero state before the first step, so that it can be imported into."""
        for parameter in parameters:
            state = self.state[parameter]
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for key in MOMENTS:
                state[key] = torch.zeros_like(parameter, requires_grad=False)
            if averaging:
                state[AVERAGE] = torch.zeros_like(parameter, requires_grad=False)

    def set_steps(self, steps: int) -> None:
        """Set the step counter of every parameter."""
        for state in self.state.values():
            state["step"].fill_(steps)


def parameter_groups(model: TwoPartModel, config: TrainConfig) -> list[dict[str, Any]]:
    """The trainable parameters in groups by `TwoPartModel.parameter_kinds`, with what AdamW does to each."""
    kinds = model.parameter_kinds()
    groups: dict[str, dict[str, Any]] = {
        "dense": {"params": [], "weight_decay": config.weight_decay, "rate_ratio": 1.0},
        "tables": {
            "params": [],
            "weight_decay": 0.0,
            "decay_per_repeat": config.table_weight_decay,
            "rate_ratio": config.table_learning_rate_ratio,
        },
        "free": {"params": [], "weight_decay": 0.0, "rate_ratio": 1.0},
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[kinds[name]]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def build_optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> AveragingAdamW:
    """AdamW over `parameter_groups`."""
    return AveragingAdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        # One kernel per group: 3 times as fast as foreach on a CPU, whole tables included.
        fused=True,
    )


def set_rates(optimizer: torch.optim.Optimizer, learning_rate: float, repeats: float) -> None:
    """Give every group its rate, and the tables their decay after so many epochs beyond the first."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate_ratio"]
        if "decay_per_repeat" in group:
            bound = LARGEST_DECAY / group["lr"] if group["lr"] else 0.0
            group["weight_decay"] = min(repeats * group["decay_per_repeat"], bound)
