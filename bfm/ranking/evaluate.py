"""Score a model on a part of the frozen protocol.

Enters: a model, a shard set and its protocol. Leaves: every query's metrics (`QueryScores`), which workers merge and
`summarise` turns into the names of a row: nll, recall@k, ndcg@k, mrr@k, coverage@k, their `warm.` and `basket.` kinds,
and loss_sampled, the training objective at the headline queries on one fixed sample of its proposal.

All items are embedded once, by all workers together; each runs the contexts of its queries (queries.py), and the
catalogue streams in blocks.

Q = queries, V = catalogue items, I = all items, W = workers, S = items of one, D = retrieval width, N = targets,
T = targets of a block, K = negatives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from bfm.errors import UserError
from bfm.events.protocol import Protocol, QueryTable, query_targets, seen_items
from bfm.events.shards import Shards
from bfm.model.flops import ModelCost
from bfm.model.two_part import TwoPartModel
from bfm.objective.sampling import fixed_candidates
from bfm.objective.softmax import fixed_sample_loss
from bfm.ragged import Ragged
from bfm.ranking.metrics import QueryScores, query_mean, score_queries
from bfm.ranking.queries import Answers, answer
from bfm.ranking.ranks import rank_targets
from bfm.ranking.sampled import sampled_metrics

_BLOCK_ROWS = 4096


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
    pi_V: NDArray[np.float64] | None = None,
    sampled_negatives: int | None = None,
) -> QueryScores:
    """Metrics of this worker's share of a part's queries, on the model's device; its mode is left alone.

    `queries` takes the first so many of the protocol's table (headline queries stand first), None all. Worker `rank`
    of `world_size` takes every world_size-th; where the workers are a process group, the call is collective. pi_V, the
    catalogue's chances to be candidates in training, adds loss_sampled. `sampled_negatives` adds ranks among so many
    drawn items, under names such as sampled100.recall@10.
    Raises UserError for an unknown part or a part without queries, DivergedError for scores that are not finite.
    """
    table = protocol.queries(part)[:queries]
    if len(table) == 0:
        raise UserError(f"the {part} part has no query", file=str(shards.path), fix="use a later or longer log")
    rows = np.arange(rank, len(table), world_size)
    table, num_items, seed = table[rows], shards.num_catalogue, shards.manifest.seed
    targets, seen = query_targets(shards, table), seen_items(shards, table)
    vectors_ID, num_embedded = _embed_together(model, rank, world_size)
    answers = answer(model, vectors_ID, shards, table, window, num_items)
    scorer = answers.scores()
    ranked = rank_targets(scorer, targets, num_items, max(k), seen)
    scores = score_queries(ranked, targets, num_items, k, query_Q=rows, user_Q=table.user, basket_Q=table.basket)
    cost = ModelCost(model.shape, shards.manifest.fields, model.table_width, window, shards.manifest.has_clock)
    flops = cost.catalogue_flops(num_embedded) + cost.eval_flops(answers.rows, len(table), num_items)
    pair_flops = 2 * model.shape.d_item
    if pi_V is not None:
        ids_K = fixed_candidates(pi_V, seed)
        loss_Q, rows_T = _sampled_loss(answers, targets, table, ids_K, np.log(pi_V[ids_K]))
        scores.values["loss_sampled"] = loss_Q
        flops += pair_flops * rows_T * len(ids_K)
        scores = dataclasses.replace(scores, loss_sampled_negatives=len(ids_K))
    if sampled_negatives is not None:
        scores.values.update(sampled_metrics(scorer, num_items, targets, seen, rows, k, sampled_negatives, seed))
        flops += pair_flops * len(table) * num_items
    return dataclasses.replace(scores, eval_flops=flops)


def _embed_together(model: TwoPartModel, rank: int, world_size: int) -> tuple[Tensor, int]:
    """Vectors of all items, [I, D], and how many of them this worker embedded: its share, where workers are a group."""
    if world_size == 1 or not dist.is_initialized():
        vectors_ID = model.embed_all()
        return vectors_ID, len(vectors_ID)
    own_SD = model.embed_all(first=rank, step=world_size)
    num_items = model.item_store.num_items
    # The last shares may be one item shorter.
    padded_SD = torch.nn.functional.pad(own_SD, (0, 0, 0, -(-num_items // world_size) - len(own_SD)))
    shares_WSD = padded_SD.new_empty(world_size, *padded_SD.shape)
    dist.all_gather_into_tensor(shares_WSD.flatten(0, 1), padded_SD)
    return shares_WSD.transpose(0, 1).flatten(0, 1)[:num_items], len(own_SD)


def _sampled_loss(
    answers: Answers, targets: Ragged, table: QueryTable, ids: NDArray[np.int64], log_pi: NDArray[np.float64]
) -> tuple[NDArray[np.float64], int]:
    """loss_sampled of every headline query (mean over its warm targets; NaN elsewhere), and the rows it took."""
    catalogue_VD, device = answers.catalogue_VD, answers.h_QD.device
    used_N = (targets.ids < len(catalogue_VD)) & ~table.basket[targets.rows]
    ids_K, log_pi_K = torch.from_numpy(ids).to(device), torch.from_numpy(log_pi).float().to(device)
    loss_N = np.full(len(targets.ids), np.nan)
    rows = np.flatnonzero(used_N)
    for start in range(0, len(rows), _BLOCK_ROWS):
        chosen_T = rows[start : start + _BLOCK_ROWS]
        query_T, item_T = (
            torch.from_numpy(values[chosen_T].astype(np.int64)).to(device) for values in (targets.rows, targets.ids)
        )
        loss_T = fixed_sample_loss(answers.scale * answers.h_QD[query_T], item_T, catalogue_VD, ids_K, log_pi_K)
        loss_N[chosen_T] = answers.mixed_loss(loss_T, query_T, item_T).double().cpu().numpy()
    return query_mean(loss_N, targets, used_N), len(rows)
