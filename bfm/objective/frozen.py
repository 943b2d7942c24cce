"""Item vectors without gradient as stage 2 reads them: all of them on every rank, or dealt out over the ranks.

Enters: a model whose embedder is frozen. Leaves: vectors by item id, and the sampled softmax over chosen items. Loss,
gradient and C are those of the whole catalogue either way; dealt out, a rank holds every W-th item.

I = all items, S = items of a rank, N = ids asked for, T = target rows, K = candidates, D = retrieval width, W = ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bfm.model.two_part import TwoPartModel
from bfm.objective.fused import MAX_WIDTH, fused_available, fused_softmax_state
from bfm.objective.methods import shares_catalogue
from bfm.objective.sharded import ShardedCatalogue
from bfm.objective.softmax import sampled_softmax
from bfm.objective.tiled import softmax_state


class FrozenItems(Protocol):
    """What stage 2 needs of the frozen catalogue."""

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""

    def vectors(self, ids_N: Tensor) -> Tensor:
        """Rows of the items, [N, D]."""

    def loss(
        self, h_TD: Tensor, target_T: Tensor, ids_K: Tensor, log_pi_K: Tensor, hit_T: Tensor, scale: Tensor
    ) -> Tensor:
        """loss_T as of sampled_softmax, target_T and ids_K being item ids; differentiable in h and scale."""


@dataclass(frozen=True)
class WholeItems:
    """Every rank holds all vectors."""

    vectors_ID: Tensor
    method: str = "auto"
    """Of sampled_softmax."""

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self.vectors_ID.device

    def vectors(self, ids_N: Tensor) -> Tensor:
        """Rows of the items, [N, D]."""
        return self.vectors_ID[ids_N]

    def loss(
        self, h_TD: Tensor, target_T: Tensor, ids_K: Tensor, log_pi_K: Tensor, hit_T: Tensor, scale: Tensor
    ) -> Tensor:
        """loss_T of the rows."""
        positive_TD = self.vectors_ID[target_T]
        return sampled_softmax(h_TD, positive_TD, self.vectors_ID, ids_K, log_pi_K, hit_T, scale, method=self.method)


class DealtItems:
    """Rank r holds items r, r + W, ...; collective: all ranks ask the same number of times, in the same order.

    Items are often numbered by popularity: contiguous shards would leave most of the work to the first rank.
    """

    def __init__(self, rows_SD: Tensor, num_items: int, rank: int, world: int) -> None:
        """Hold this rank's rows, in the order of their ids; ranks are those of the default process group."""
        self.world = world
        firsts = [0]
        for other in range(world):
            firsts.append(firsts[-1] + len(range(other, num_items, world)))
        self.first_W = torch.tensor(firsts[:-1], device=rows_SD.device)
        half = rows_SD.dtype in (torch.bfloat16, torch.float16)
        fused = half and rows_SD.is_cuda and rows_SD.shape[1] <= MAX_WIDTH and fused_available() is None
        state_of = fused_softmax_state if fused else softmax_state
        self.catalogue = ShardedCatalogue(rows_SD, firsts[rank], num_items, state_of=state_of)

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self.first_W.device

    def vectors(self, ids_N: Tensor) -> Tensor:
        """Rows of the items, [N, D]."""
        return self.catalogue.vectors(self._places(ids_N))

    def loss(
        self, h_TD: Tensor, target_T: Tensor, ids_K: Tensor, log_pi_K: Tensor, hit_T: Tensor, scale: Tensor
    ) -> Tensor:
        """loss_T of this rank's rows among its own candidates."""
        q_TD = scale.float() * h_TD.float()
        return self.catalogue.loss(q_TD, self._places(target_T), self._places(ids_K), log_pi_K, hit_T)

    def _places(self, ids_N: Tensor) -> Tensor:
        """Items as the sharded catalogue numbers them: rank by rank."""
        return self.first_W[ids_N % self.world] + ids_N // self.world


def freeze_items(model: TwoPartModel, dtype: torch.dtype, method: str, rank: int, world: int) -> FrozenItems:
    """Embed the catalogue with a model outside any engine, on its device; collective where it is dealt out."""
    num_items = model.item_store.num_items
    if shares_catalogue(method, world, 4 * num_items * model.shape.d_item):
        return DealtItems(model.embed_all(first=rank, step=world).to(dtype), num_items, rank, world)
    return WholeItems(model.embed_all().to(dtype), method)
