"""Item vectors without gradient as stage 2 reads them: all of them on every rank, or dealt out over the ranks.

Enters: a model whose embedder is frozen. Leaves: vectors by item id, and the log sum over chosen items. Value,
gradient and C are the same either way.

I = all items, N = ids asked for, Q = queries, K = candidates, D = retrieval width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bfm.model.two_part import TwoPartModel
from bfm.objective.methods import shares_catalogue
from bfm.objective.sharded import DealtItems
from bfm.objective.softmax import log_sum


@dataclass(frozen=True)
class WholeItems:
    """Every rank holds all vectors."""

    vectors_ID: Tensor
    method: str = "auto"
    """Of softmax.log_sum."""

    def vectors(self, ids_N: Tensor) -> Tensor:
        """Rows of the items, [N, D]."""
        return self.vectors_ID[ids_N]

    def log_sum(self, q_QD: Tensor, ids_K: Tensor, log_pi_K: Tensor) -> Tensor:
        """log_sum_Q as of softmax.log_sum, ids_K being item ids; differentiable in q."""
        return log_sum(q_QD, self.vectors_ID, ids_K, log_pi_K, method=self.method)


FrozenItems = WholeItems | DealtItems


def freeze_items(model: TwoPartModel, dtype: torch.dtype, method: str, rank: int, world: int) -> FrozenItems:
    """Embed the catalogue with a model outside any engine, on its device; this rank's share where it is dealt out."""
    if shares_catalogue(method, world, 4 * model.item_store.num_items * model.shape.d_item):
        return DealtItems(model.embed_all(first=rank, step=world).to(dtype))
    return WholeItems(model.embed_all().to(dtype), method)
