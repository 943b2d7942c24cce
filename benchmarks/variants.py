"""Changes to weights, rates, the order of windows and negatives that only benchmarks make; the product has no options
for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bfm.events.randomness import permuted, stream_key
from bfm.events.windows import WindowOrder, Windows
from bfm.model.batch import ModelBatch
from bfm.model.two_part import TwoPartModel
from bfm.objective.objective import Objective, own_window_certain
from bfm.training import plain
from bfm.training.config import TrainConfig
from bfm.training.data import TrainingData
from bfm.training.optimizer import AveragingAdamW

OUTPUTS = ("attention_out", "down")
"""Matrices of a block that write to the residual stream: zero at the start."""


@dataclass(frozen=True)
class Variant:
    """Of the contextualizer's matrices, of groups and of candidates; the defaults are the product."""

    inner_std: float = 1.0
    """Factor of the initial deviation of all but OUTPUTS."""
    output_std: float = 0.0
    """Initial deviation of OUTPUTS, in units of inputs^-0.5."""
    hidden_rate: float = 1.0
    """Factor of the rate of matrices whose inputs are as many as the width (the blocks' and the final projection)."""
    order: str = "permuted"
    """`permuted`: the windows of a group are of unrelated users; `neighbours`: they follow each other in the stream."""
    own: str = "certain"
    """Targets of the own window that are none of the query's. `certain`: pi = 1; `biased`: pi as if they had been drawn
    like those of the other windows; `excluded`: no candidates."""

    def install(self) -> None:
        """Change the product inside this process, once."""
        self._change_candidates()
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

    def _change_candidates(self) -> None:
        if self.order == "neighbours":
            WindowOrder.group = neighbouring_windows  # type: ignore[method-assign]
        if self.own != "certain":
            Objective._log_pi = own_window_otherwise(self.own == "excluded")  # type: ignore[method-assign]
        if self.own == "biased":
            log_pi = TrainingData.log_pi

            def log_pi_of_all(data: TrainingData, config: TrainConfig) -> Tensor:
                # The chance that one of G windows brings an item is that of the others in a group of G + 1.
                return log_pi(data, replace(config, group_windows=config.group_windows + 1))

            TrainingData.log_pi = log_pi_of_all  # type: ignore[method-assign]

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


def neighbouring_windows(order: WindowOrder, index: int) -> Windows:
    """Groups in a permuted order, the windows of one following each other in the stream."""
    groups = order.windows_per_epoch // order.group_windows
    epoch, place = divmod(index, groups)
    first = permuted(stream_key(order.seed, epoch), np.array([place]), groups)[0] * order.group_windows
    return order.windows(first + np.arange(order.group_windows))


def own_window_otherwise(excluded: bool) -> Callable[[Objective, ModelBatch, int], tuple[Tensor, Tensor]]:
    """Objective._log_pi, but of the own window only the query's own targets are certain: a line for every query.

    The other targets of its window are left out, or have the pi of any other item.
    """

    def log_pi_of_group(objective: Objective, batch: ModelBatch, group: int) -> tuple[Tensor, Tensor]:
        targets, window_Q = batch.targets_of(group), batch.window_Q(group)
        candidate_T, query_T = batch.candidate_T[targets], batch.query_T[targets] - batch.query_offset[group]
        log_pi_K = objective.log_pi_V[batch.items_U[batch.candidates_of(group)]]
        log_pi_QK = log_pi_K.repeat(len(window_Q), 1)
        if excluded:
            other_K = torch.ones_like(log_pi_K)
            own_GK = own_window_certain(other_K, batch.window_T(group), candidate_T, batch.windows[group]) == 0
            log_pi_QK = log_pi_QK.masked_fill(own_GK[window_Q], torch.inf)
        log_pi_QK[query_T, candidate_T] = 0.0
        return log_pi_QK, torch.arange(len(window_Q))

    return log_pi_of_group
