"""Changes to the order of windows and to negatives that only benchmarks make; the product has no options for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bfm.events.windows import WindowOrder, Windows
from bfm.model.batch import ModelBatch
from bfm.objective.objective import Objective, own_window_certain
from bfm.randomness import permuted, stream_key
from bfm.training.config import TrainConfig
from bfm.training.data import TrainingData


@dataclass(frozen=True)
class Variant:
    """Of groups and of candidates; the defaults are the product."""

    order: str = "permuted"
    """`permuted`: the windows of a group are of unrelated users; `neighbours`: they follow each other in the stream."""
    own: str = "certain"
    """Targets of the own window that are none of the query's. `certain`: pi = 1; `biased`: pi as if they had been drawn
    like those of the other windows; `excluded`: no candidates."""

    def install(self) -> None:
        """Change the product inside this process, once."""
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
        candidate_T, query_T = batch.candidate_T[targets], batch.query_T[targets] - batch.queries_of(group).start
        log_pi_K = objective.log_pi_V[batch.items_U[batch.candidates_of(group)]]
        log_pi_QK = log_pi_K.repeat(len(window_Q), 1)
        if excluded:
            other_K = torch.ones_like(log_pi_K)
            own_GK = own_window_certain(other_K, batch.window_T(group), candidate_T, batch.groups[group].windows) == 0
            log_pi_QK = log_pi_QK.masked_fill(own_GK[window_Q], torch.inf)
        log_pi_QK[query_T, candidate_T] = 0.0
        return log_pi_QK, torch.arange(len(window_Q))

    return log_pi_of_group
