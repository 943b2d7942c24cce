"""Evaluation queries through a model: contexts packed, run in batches of bounded size, and joined.

Enters: a model, item vectors, queries of a shard set. Leaves: `Answers`, what the output distribution of every query is
made of, and the `Scores` (ranks.py) over the catalogue that follow from it.

Q = queries, I = all items, V = catalogue items, D = retrieval width, L = positions of a window, M = last events of a
query, P = pairs of a query and an item.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bfm.events.protocol import QueryTable
from bfm.events.shards import Shards
from bfm.events.windows import eval_windows
from bfm.model.batch import make_query_batch
from bfm.model.two_part import TwoPartModel
from bfm.ragged import chunks
from bfm.ranking.mixed_scores import Component, MixtureScores, NeighbourMass, SparseMass
from bfm.ranking.ranks import DotScores

# Positions of one batch of contexts: bounds the activations, and is enough to keep the matmuls busy. Kernels of packed
# attention take fewer than 2^16 users.
_BATCH_POSITIONS, _GPU_BATCH_POSITIONS = 1 << 14, 1 << 15


@dataclass(frozen=True)
class Answers:
    """What a model says to Q queries."""

    h_QD: Tensor
    """Unit vectors, float32."""
    log_gate_Q: Tensor
    """log of the softmax's share of the distribution."""
    components: Sequence[Component]
    """What else the distribution is made of."""
    scale: Tensor
    catalogue_VD: Tensor
    """Vectors of the catalogue, float32."""
    rows: int
    """Packed windows that were run."""

    def scores(self) -> DotScores | MixtureScores:
        """log p of the catalogue; of a softmax alone the logits scale * <h, v>."""
        softmax = DotScores(self.h_QD * self.scale, self.catalogue_VD)
        return MixtureScores(softmax, self.log_gate_Q, self.components) if self.components else softmax

    def mixed_loss(self, loss_T: Tensor, query_T: Tensor, item_T: Tensor) -> Tensor:
        """-log p of pairs whose loss under the softmax alone is loss_T."""
        log_p_T = self.log_gate_Q[query_T] - loss_T
        for component in self.components:
            log_p_T = torch.logaddexp(log_p_T, component.at(query_T, item_T).log())
        return -log_p_T


@torch.no_grad()
def answer(
    model: TwoPartModel, vectors_ID: Tensor, shards: Shards, table: QueryTable, window: int, num_catalogue: int
) -> Answers:
    """Run the contexts of all queries; vectors_ID are those of all items, on the model's device."""
    none = torch.zeros(0, device=model.device)
    h, gates, rows = [none.new_zeros(0, model.shape.d_item)], [none], 0
    no_masses = none.new_zeros(0, model.shape.counted_events)
    pointed, counted_items, counted_masses = [], [no_masses.long()], [no_masses]
    filled_Q = np.minimum(table.position + 1, window)
    most = _BATCH_POSITIONS if model.device.type == "cpu" else _GPU_BATCH_POSITIONS
    for chosen in itertools.starmap(slice, chunks(filled_Q, most)):
        batch = make_query_batch(eval_windows(shards, table[chosen], window, model.neighbours)).to(model.device)
        queries = model.contextualize(batch, vectors_ID[batch.items_U].float())
        gate_X1Q = iter(queries.log_gate_TX1.exp().T)
        h.append(queries.h_QD)
        gates.append(next(gate_X1Q))
        if queries.pointer_A is not None:
            pairs = batch.places.pairs
            item_A = batch.items_U[batch.item_RL.flatten()[pairs.position_A]]
            mass_A = queries.pointer_A * next(gate_X1Q)[pairs.query_A]
            pointed.append(SparseMass.of(chosen.start + pairs.query_A, item_A, mass_A, num_catalogue))
        if batch.counted_TM is not None and queries.counted_TM is not None:
            counted_items.append(batch.counted_TM)
            counted_masses.append(queries.counted_TM * next(gate_X1Q)[:, None])
        rows += len(batch.item_RL)
    gate_Q, pointer = torch.cat(gates), SparseMass.join(pointed, model.device)
    total_Q = gate_Q + pointer.totals(len(gate_Q))
    components: list[Component] = []
    if model.neighbours is not None:
        mass_QM = torch.cat(counted_masses)
        # What fell on items outside the catalogue is left out of the distribution; neighbours lie inside.
        total_Q = total_Q + mass_QM.sum(1)
        components.append(NeighbourMass(model.neighbours, torch.cat(counted_items), mass_QM / total_Q[:, None]))
    if model.shape.pointer_width:
        components.append(dataclasses.replace(pointer, mass_P=pointer.mass_P / total_Q[pointer.query_P]))
    catalogue_VD = vectors_ID[:num_catalogue].float()
    return Answers(torch.cat(h), (gate_Q / total_Q).log(), components, model.scale, catalogue_VD, rows)
