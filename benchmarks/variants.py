"""Changes to initial weights and rates that only benchmarks make; the product has no options for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bfm.model.two_part import TwoPartModel
from bfm.training import plain
from bfm.training.config import TrainConfig
from bfm.training.data import TrainingData
from bfm.training.optimizer import AveragingAdamW

OUTPUTS = ("attention_out", "down")
"""Matrices of a block that write to the residual stream: zero at the start."""


@dataclass(frozen=True)
class Variant:
    """Of the contextualizer's matrices; the defaults are the product."""

    inner_std: float = 1.0
    """Factor of the initial deviation of all but OUTPUTS."""
    output_std: float = 0.0
    """Initial deviation of OUTPUTS, in units of inputs^-0.5."""
    hidden_rate: float = 1.0
    """Factor of the rate of matrices whose inputs are as many as the width (the blocks' and the final projection)."""

    def install(self) -> None:
        """Change the product inside this process, once."""
        build_model, build_optimizer = TrainingData.build_model, plain.build_optimizer

        def build_changed_model(data: TrainingData, config: TrainConfig, seed: int) -> TwoPartModel:
            model = build_model(data, config, seed)
            self._change_weights(model, seed)
            return model

        def build_changed_optimizer(model: TwoPartModel, config: TrainConfig) -> AveragingAdamW:
            optimizer = build_optimizer(model, config)
            self._change_rates(model, optimizer)
            return optimizer

        TrainingData.build_model = build_changed_model  # type: ignore[assignment, method-assign]
        plain.build_optimizer = build_changed_optimizer

    @torch.no_grad()
    def _change_weights(self, model: TwoPartModel, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, weight in model.named_parameters():
            if not name.startswith("contextualizer."):
                continue
            if name.split(".")[-2] in OUTPUTS:
                weight.normal_(0, self.output_std * weight.shape[1] ** -0.5, generator=generator)
            else:
                weight.mul_(self.inner_std)

    def _change_rates(self, model: TwoPartModel, optimizer: AveragingAdamW) -> None:
        hidden = {
            parameter
            for name, parameter in model.named_parameters()
            if name.startswith(("contextualizer.blocks.", "contextualizer.out."))
        }
        groups: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            for chosen, factor in ((True, self.hidden_rate), (False, 1.0)):
                members = [parameter for parameter in group["params"] if (parameter in hidden) == chosen]
                if members:
                    groups.append({**group, "params": members, "rate_ratio": factor * group["rate_ratio"]})
        optimizer.param_groups[:] = groups
