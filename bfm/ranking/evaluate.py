"""Score a model on a part of the frozen protocol.

Enters: a model, a shard set and its protocol. Leaves: every query's metrics (`QueryScores`), which workers merge and
`summarise` turns into the names of a row: nll, recall@k, ndcg@k, mrr@k, coverage@k, their `warm.` and `basket.` kinds,
and loss_sampled, the training objective at the headline queries on one fixed sample of its proposal.

All items are embedded once; contexts are packed and run in batches of bounded size; the catalogue streams in blocks.

Q = queries, D = retrieval width, I = all items, V = catalogue items, N = targets, T = targets of a block,
K = negatives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bfm.errors import UserError
from bfm.events.protocol import Protocol, QueryTable, Ragged
from bfm.events.shards import Shards
from bfm.events.windows import eval_windows
from bfm.model.batch import make_query_batch
from bfm.model.flops import ModelCost
from bfm.model.two_part import TwoPartModel
from bfm.objective.sampling import Candidates
from bfm.objective.softmax import sampled_softmax
from bfm.ranking.metrics import Evaluation, QueryScores, merge, query_mean, score_queries, summarise
from bfm.ranking.ranks import DotScores, ScoreBlock, rank_targets
from bfm.ranking.sampled import sampled_metrics

__all__ = ["Evaluation", "QueryScores", "evaluate", "merge", "summarise"]

# Positions of one batch of contexts: bounds the activations, and is enough to keep the matmuls busy.
_BATCH_POSITIONS = 1 << 14
_BLOCK_BYTES = 16 * 2**20


@torch.no_grad()
def evaluate(
    model: TwoPartModel,
    shards: Shards,
    protocol: Protocol,
    part: str,
    window: int,
    k: Sequence[int] = (10,),
    queries: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    candidates: Candidates | None = None,
    sampled_negatives: int | None = None,
    seed: int = 0,
) -> QueryScores:
    """Metrics of this worker's share of a part's queries; the model's mode is left alone.

    `queries` takes the first so many of the protocol's table (headline queries stand first), None all. Worker `rank`
    of `world_size` takes every world_size-th. `candidates` adds loss_sampled. `device` is where the model is.
    `sampled_negatives` adds ranks among so many items drawn by `seed`, under names such as sampled100.recall@10.
    Raises UserError for an unknown part or a part without queries, DivergedError for scores that are not finite.
    """
    encoded = encode(model, shards, protocol, part, window, queries, rank, world_size, device)
    return evaluate_encoded(model, encoded, k, candidates, sampled_negatives, seed)


@dataclass(frozen=True)
class Encoded:
    """Queries as a model sees them, ready to be ranked."""

    rows: NDArray[np.int64]
    """Place of each query in the part."""
    table: QueryTable
    h_QD: Tensor
    catalogue_VD: Tensor
    scale: Tensor
    targets: Ragged
    seen: Ragged | None
    eval_flops: int

    @property
    def scorer(self) -> DotScores:
        """The model's scores scale * <h, v>."""
        return DotScores(self.h_QD * self.scale, self.catalogue_VD)

    def ranked(self, scorer: ScoreBlock, k: Sequence[int] = (10,)) -> QueryScores:
        """Every query's metrics by any scores of the catalogue."""
        table, num_items = self.table, len(self.catalogue_VD)
        ranked = rank_targets(scorer, self.targets, num_items, max(k), self.seen)
        return score_queries(
            ranked, self.targets, num_items, k, query_Q=self.rows, user_Q=table.user, basket_Q=table.basket
        )


@torch.no_grad()
def encode(
    model: TwoPartModel,
    shards: Shards,
    protocol: Protocol,
    part: str,
    window: int,
    queries: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Encoded:
    """This worker's queries and all items through the model; arguments and errors as in `evaluate`."""
    table = protocol.queries(part)[:queries]
    if len(table) == 0:
        raise UserError(f"the {part} part has no query", file=str(shards.path), fix="use a later or longer log")
    rows = np.arange(rank, len(table), world_size)
    table = table[rows]
    item_vectors_ID = model.embed_all()
    h_QD, targets, seen, flops = _contextualize(model, item_vectors_ID, shards, table, window, device)
    return Encoded(rows, table, h_QD, item_vectors_ID[: shards.num_catalogue], model.scale, targets, seen, flops)


@torch.no_grad()
def evaluate_encoded(
    model: TwoPartModel,
    encoded: Encoded,
    k: Sequence[int] = (10,),
    candidates: Candidates | None = None,
    sampled_negatives: int | None = None,
    seed: int = 0,
) -> QueryScores:
    """`evaluate` of queries that are encoded already."""
    table, targets, h_QD, catalogue_VD = encoded.table, encoded.targets, encoded.h_QD, encoded.catalogue_VD
    scores, flops = encoded.ranked(encoded.scorer, k), encoded.eval_flops
    if candidates is not None:
        scores.values["loss_sampled"], rows_T = _sampled_loss(model, h_QD, catalogue_VD, targets, table, candidates)
        flops += 2 * rows_T * len(candidates.ids_K) * catalogue_VD.shape[1]
        scores = dataclasses.replace(scores, loss_sampled_negatives=len(candidates.ids_K))
    if sampled_negatives is not None:
        rows, seen = encoded.rows, encoded.seen
        scores.values.update(sampled_metrics(h_QD, catalogue_VD, targets, seen, rows, k, sampled_negatives, seed))
        flops += 2 * int((targets.ids < len(catalogue_VD)).sum()) * (1 + sampled_negatives) * catalogue_VD.shape[1]
    return dataclasses.replace(scores, eval_flops=flops)


def _contextualize(
    model: TwoPartModel,
    item_vectors_ID: Tensor,
    shards: Shards,
    table: QueryTable,
    window: int,
    device: torch.device | str,
) -> tuple[Tensor, Ragged, Ragged | None, int]:
    """h_QD of all queries, their targets, their seen items where filtered, and the forward FLOPs of everything."""
    cost = ModelCost(model.shape, shards.fields, _table_width(model), window, shards.has_clock)
    flops = cost.catalogue_flops(shards.num_items)
    vectors = [item_vectors_ID.new_zeros(0, item_vectors_ID.shape[1])]
    targets, seen = [], []
    for chosen in query_batches(table, window):
        contexts = eval_windows(shards, table[chosen], window)
        batch = make_query_batch(contexts, device)
        vectors.append(model.contextualize(batch, item_vectors_ID[batch.items_U]))
        targets.append(contexts.targets)
        if contexts.seen is not None:
            seen.append(contexts.seen)
        flops += cost.eval_flops(len(contexts.windows.item_RL), len(contexts.row), shards.num_catalogue)
    return torch.cat(vectors), _join(targets), _join(seen) if table.filter_seen else None, flops


def query_batches(table: QueryTable, window: int) -> Iterator[slice]:
    """Runs of queries whose contexts fill a bounded number of positions."""
    filled_Q = np.cumsum(np.minimum(table.position + 1, window))
    start = 0
    while start < len(table):
        before = filled_Q[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(filled_Q, before + _BATCH_POSITIONS, side="right")))
        yield slice(start, stop)
        start = stop


def _join(parts: Sequence[Ragged]) -> Ragged:
    lengths = [np.diff(part.offsets) for part in parts]
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([np.zeros(0, np.int64), *lengths]))])
    return Ragged(np.concatenate([np.zeros(0, np.int32), *(part.ids for part in parts)]), offsets)


def _table_width(model: TwoPartModel) -> int:
    tables = [side.fields.table for side in (model.embedder, model.context) if side.fields.table is not None]
    # Without any table no cost depends on the width.
    return tables[0].shape[1] if tables else 1


def _sampled_loss(
    model: TwoPartModel,
    h_QD: Tensor,
    catalogue_VD: Tensor,
    targets: Ragged,
    table: QueryTable,
    candidates: Candidates,
) -> tuple[NDArray[np.float64], int]:
    """loss_sampled of every headline query (mean over its warm targets; NaN elsewhere), and the rows it took."""
    device = h_QD.device
    query_N = np.repeat(np.arange(len(targets)), np.diff(targets.offsets))
    used_N = (targets.ids < len(catalogue_VD)) & ~table.basket[query_N]
    place_N = np.minimum(np.searchsorted(candidates.ids_K, targets.ids), len(candidates.ids_K) - 1)
    hit_N = np.where(candidates.ids_K[place_N] == targets.ids, place_N, -1)
    ids_K = torch.from_numpy(candidates.ids_K).to(device)
    log_pi_K = torch.from_numpy(candidates.log_pi_K).float().to(device)
    loss_N = np.full(len(query_N), np.nan)
    rows = np.flatnonzero(used_N)
    step = max(1, _BLOCK_BYTES // (h_QD.element_size() * max(1, len(candidates.ids_K))))
    for start in range(0, len(rows), step):
        chosen_T = rows[start : start + step]
        query_T, item_T, hit_T = (
            torch.from_numpy(values[chosen_T].astype(np.int64)).to(device) for values in (query_N, targets.ids, hit_N)
        )
        loss_T = sampled_softmax(h_QD[query_T], catalogue_VD[item_T], catalogue_VD, ids_K, log_pi_K, hit_T, model.scale)
        loss_N[chosen_T] = loss_T.double().cpu().numpy()
    return query_mean(loss_N, targets, used_N), len(rows)
