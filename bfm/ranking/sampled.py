"""Ranks among a few sampled negatives, as papers that rank "1 against 100" report them. Not the full catalogue.

Enters: scores (ranks.py) and targets. Leaves: recall, NDCG and MRR per query under names of their own,
such as `sampled100.recall@10`: they are far above the full-catalogue ones and may order models differently (Krichene &
Rendle, KDD 2020), so they only serve to compare with such papers.

A target's competitors are drawn uniformly without replacement from the catalogue without the query's targets and, where
the protocol filters them, its seen items; a seen target is a miss then, as in any list. They depend on the seed and the
query alone: every model, and every division among workers, meets the same ones. Ties count half.

Q = queries, R = query rows of a chunk, V = catalogue items, N = targets, T = warm targets of a chunk,
S = sampled negatives.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from bfm.errors import UserError
from bfm.ragged import Ragged, chunks
from bfm.ranking.metrics import query_metrics
from bfm.ranking.ranks import Scores, pass_on


def sampled_metrics(
    scores: Scores,
    num_items: int,
    targets: Ragged,
    seen: Ragged | None,
    query_Q: NDArray[np.int64],
    ks: Sequence[int],
    num_negatives: int,
    seed: int,
) -> dict[str, NDArray[np.float64]]:
    """Metric name -> value per query; cold targets are misses. query_Q: the queries' rows in the part's table.

    Raises UserError where a query has fewer than num_negatives items to draw from.
    """
    negatives_QS = _draw(targets, seen, query_Q, num_items, num_negatives, seed)
    rank_N = _ranks(scores, num_items, targets, negatives_QS)
    if seen is not None:
        rank_N[targets.within(seen)] = np.inf
    metrics: dict[str, NDArray[np.float64]] = {}
    for k in ks:
        metrics |= query_metrics(rank_N, targets, np.ones(len(rank_N), bool), k)
    return {f"sampled{num_negatives}.{name}": value_Q for name, value_Q in metrics.items()}


def _draw(
    targets: Ragged, seen: Ragged | None, query_Q: NDArray[np.int64], num_items: int, num_negatives: int, seed: int
) -> NDArray[np.int64]:
    if num_negatives < 1:
        raise UserError(f"{num_negatives} sampled negatives", key="sampled_negatives", fix="give at least 1")
    negatives_QS = np.empty((len(targets), num_negatives), np.int64)
    for row, query in enumerate(query_Q.tolist()):
        excluded = targets[row] if seen is None else np.union1d(targets[row], seen[row])
        # The first of a random order that are not excluded: so many draws always hold enough of them.
        num_drawn = min(num_items, num_negatives + len(excluded))
        drawn = np.random.default_rng([seed, query]).choice(num_items, num_drawn, replace=False)
        allowed = drawn[~np.isin(drawn, excluded)]
        if len(allowed) < num_negatives:
            raise UserError(
                f"{num_negatives} sampled negatives, but a query has only {len(allowed)} items to draw from",
                key="sampled_negatives",
                fix="ask for fewer",
            )
        negatives_QS[row] = allowed[:num_negatives]
    return negatives_QS


def _ranks(scores: Scores, num_items: int, targets: Ragged, negatives_QS: NDArray[np.int64]) -> NDArray[np.float64]:
    """1 + #greater + 1/2 #equal among the query's negatives; inf for cold targets."""
    rank_N = np.full(len(targets.ids), np.inf)
    most_scores = pass_on(getattr(scores, "device", torch.device("cpu"))).block_scores
    for low, high in chunks(np.full(len(targets), num_items), most_scores):
        score_RV = scores(slice(low, high))(slice(0, num_items))
        place_T = np.arange(targets.offsets[low], targets.offsets[high])
        place_T = place_T[targets.ids[place_T] < num_items]
        query_T = targets.rows[place_T]
        items_TS = np.concatenate([targets.ids[place_T, None], negatives_QS[query_T]], axis=1)
        score_TS = score_RV[torch.from_numpy(query_T - low)[:, None], torch.from_numpy(items_TS)]
        target_T1, negative_TS = score_TS[:, :1], score_TS[:, 1:]
        better_T, equal_T = (negative_TS > target_T1).sum(1), (negative_TS == target_T1).sum(1)
        rank_N[place_T] = (1.0 + better_T + 0.5 * equal_T).double().cpu().numpy()
    return rank_N
