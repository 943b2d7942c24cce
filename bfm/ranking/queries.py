"""Evaluation queries through a model: contexts packed, run in batches of bounded size, and joined.

Enters: a model, a way to item vectors, queries of a shard set. Leaves: `Answers`, what the output distribution of every
query is made of, and the ScoreBlock (ranks.py) over a catalogue that follows from it.

Q = queries, V = catalogue items, D = retrieval width, L = positions of a window, P = pairs of a query and an item.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bfm.events.protocol import QueryTable
from bfm.events.shards import Shards
from bfm.events.windows import eval_windows
from bfm.model.batch import ModelBatch, make_query_batch
from bfm.model.mixture import Queries
from bfm.model.two_part import TwoPartModel
from bfm.ranking.mixture import MixtureScores, SparseMass
from bfm.ranking.ranks import DotScores

# Positions of one batch of contexts: bounds the activations, and is enough to keep the matmuls busy.
_BATCH_POSITIONS = 1 << 14


@dataclass(frozen=True)
class Answers:
    """What a model says to Q queries."""

    h_QD: Tensor
    """Unit vectors, float32."""
    log_gate_Q: Tensor
    """log of the softmax's share of the distribution."""
    sparse: SparseMass
    """What the other components give to single items, their gates included."""
    scale: Tensor
    rows: int
    """Packed windows that were run."""
    mixed: bool
    """Whether there are other components at all."""

    def scores(self, catalogue_VD: Tensor) -> DotScores | MixtureScores:
        """log p of the catalogue; of a softmax alone the logits scale * <h, v>."""
        softmax = DotScores(self.h_QD * self.scale, catalogue_VD)
        return MixtureScores(softmax, self.log_gate_Q, self.sparse) if self.mixed else softmax

    def mixed_loss(self, loss_T: Tensor, query_T: Tensor, item_T: Tensor) -> Tensor:
        """-log p of pairs whose loss under the softmax alone is loss_T."""
        if not self.mixed:
            return loss_T
        log_rest_T = self.log_gate_Q[query_T] - loss_T
        return -torch.logaddexp(log_rest_T, self.sparse.at(query_T, item_T).log())


@torch.no_grad()
def answer(
    model: TwoPartModel,
    vectors: Callable[[Tensor], Tensor],
    shards: Shards,
    table: QueryTable,
    window: int,
    num_catalogue: int,
) -> Answers:
    """Run the contexts of all queries; `vectors` gives float32 vectors of item ids (int64) on the model's device."""
    h, gates, masses, lengths, rows = [], [], [], [], 0
    for chosen in query_batches(table, window):
        batch = make_query_batch(eval_windows(shards, table[chosen], window), model.device)
        queries = model.contextualize(batch, vectors(batch.items_U))
        h.append(queries.h_TD)
        gates.append(queries.log_gate_TX1[:, 0])
        masses.append(_sparse_mass(batch, queries, num_catalogue))
        lengths.append(len(queries.h_TD))
        rows += len(batch.item_RL)
    none = torch.zeros(0, device=model.device)
    log_gate_Q, sparse = torch.cat([none, *gates]), SparseMass.join(masses, lengths, model.device)
    # What fell on items outside the catalogue is left out of the distribution.
    log_total_Q = (log_gate_Q.exp() + sparse.totals(len(log_gate_Q))).log()
    return Answers(
        torch.cat([none.new_zeros(0, model.shape.d_item), *h]),
        log_gate_Q - log_total_Q,
        dataclasses.replace(sparse, mass_P=sparse.mass_P * (-log_total_Q[sparse.query_P]).exp()),
        model.scale,
        rows,
        model.shape.pointer_width > 0,
    )


def query_batches(table: QueryTable, window: int) -> Iterator[slice]:
    """Runs of queries whose contexts fill a bounded number of positions."""
    filled_Q = np.cumsum(np.minimum(table.position + 1, window))
    start = 0
    while start < len(table):
        before = filled_Q[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(filled_Q, before + _BATCH_POSITIONS, side="right")))
        yield slice(start, stop)
        start = stop


def _sparse_mass(batch: ModelBatch, queries: Queries, num_catalogue: int) -> SparseMass:
    """What the pointer gives to the items of each query's context."""
    if queries.pointer_TL is None:
        none = torch.zeros(0, dtype=torch.int64, device=queries.h_TD.device)
        return SparseMass(none, none, none.float())
    row_T = batch.target_position_T // batch.item_RL.shape[1]
    item_TL = batch.items_U[batch.item_RL.index_select(0, row_T)]
    mass_TL = queries.pointer_TL * queries.log_gate_TX1[:, 1:].exp()
    query_TL = torch.arange(len(row_T), device=row_T.device)[:, None].expand_as(item_TL)
    return SparseMass.of(query_TL.flatten(), item_TL.flatten(), mass_TL.flatten(), num_catalogue)
