"""Ranking metrics of queries from their targets' ranks, and their means with user-clustered standard errors.

Enters: ranks, likelihoods and first items of every query (`ranks.py`). Leaves: metrics per query, which workers merge,
and the means that stand in a row.

    recall@k = |targets ranked <= k| / |targets|       cold targets (ids >= V) and filtered ones are misses
    ndcg@k   = sum_{rank_t <= k} 1/log2(1 + rank_t) / sum_{i <= min(k, |targets|)} 1/log2(1 + i)
    mrr@k    = 1 / (best rank) if that is <= k, else 0
    coverage@k = |union of the headline queries' first k items| / V
    nll      = mean over a query's warm targets of -log softmax over the whole catalogue

Q = queries, V = catalogue items, N = targets, k = list length, G = users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bfm.errors import UserError
from bfm.ragged import Ragged

if TYPE_CHECKING:
    from bfm.ranking.ranks import Ranked

_BASKET = "basket."


def check_k(k: int, num_catalogue: int) -> None:
    """Raise UserError where lists of k items cannot be made of the catalogue."""
    if not 1 <= k <= num_catalogue:
        fix = f"use 1 to {num_catalogue}, the number of items in the catalogue"
        raise UserError(f"lists of {k} items cannot be made", key="--k", fix=fix)


def query_metrics(
    rank_N: NDArray[np.float64], targets: Ragged, counted_N: NDArray[np.bool_], k: int
) -> dict[str, NDArray[np.float64]]:
    """recall, ndcg and mrr at k of every query over its counted targets; NaN for a query without any."""
    num_queries = len(targets)
    query_N, rank_N = targets.rows[counted_N], rank_N[counted_N]
    found_N = rank_N <= k
    size_Q = np.bincount(query_N, minlength=num_queries)
    none_Q = size_Q == 0
    gain_N = np.where(found_N, 1.0 / np.log2(1.0 + rank_N), 0.0)
    ideal = np.cumsum(1.0 / np.log2(2.0 + np.arange(k)))
    best_Q = np.full(num_queries, np.inf)
    np.minimum.at(best_Q, query_N, rank_N)
    values = {
        f"recall@{k}": np.bincount(query_N, found_N, num_queries) / np.maximum(size_Q, 1),
        f"ndcg@{k}": np.bincount(query_N, gain_N, num_queries) / ideal[np.clip(size_Q, 1, k) - 1],
        f"mrr@{k}": np.where(best_Q <= k, 1.0 / best_Q, 0.0),
    }
    return {name: np.where(none_Q, np.nan, value_Q) for name, value_Q in values.items()}


def query_mean(value_N: NDArray[np.float64], targets: Ragged, counted_N: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean over each query's counted targets; NaN for a query without any."""
    query_N = targets.rows[counted_N]
    size_Q = np.bincount(query_N, minlength=len(targets))
    return np.bincount(query_N, value_N[counted_N], len(targets)) / np.where(size_Q > 0, size_Q, np.nan)


@dataclass(frozen=True)
class QueryScores:
    """Scores of some queries of a part; `merge` joins what several workers scored."""

    query_Q: NDArray[np.int64]
    """Row in the part's query table."""
    user_Q: NDArray[np.int64]
    basket_Q: NDArray[np.bool_]
    values: dict[str, NDArray[np.float64]]
    """Metric name -> value per query, NaN where the query has none."""
    shown: dict[int, NDArray[np.bool_]]
    """k -> whether an item is among the first k of any headline query, [V]."""
    eval_flops: int = 0
    loss_sampled_negatives: int | None = None

    def first(self, queries: int) -> QueryScores:
        """The scores of the first rows of the part's table; coverage, which is of all of them, is left out."""
        chosen_Q = self.query_Q < queries
        values = {name: value_Q[chosen_Q] for name, value_Q in self.values.items()}
        own = self.query_Q[chosen_Q], self.user_Q[chosen_Q], self.basket_Q[chosen_Q]
        return QueryScores(*own, values, {}, self.eval_flops, self.loss_sampled_negatives)


def merge(parts: Sequence[QueryScores]) -> QueryScores:
    """Scores of disjoint sets of queries as one, in the table's order."""
    query_Q = np.concatenate([part.query_Q for part in parts])
    order = np.argsort(query_Q)
    return QueryScores(
        query_Q[order],
        np.concatenate([part.user_Q for part in parts])[order],
        np.concatenate([part.basket_Q for part in parts])[order],
        {name: np.concatenate([part.values[name] for part in parts])[order] for name in parts[0].values},
        {k: np.logical_or.reduce([part.shown[k] for part in parts]) for k in parts[0].shown},
        sum(part.eval_flops for part in parts),
        parts[0].loss_sampled_negatives,
    )


def score_queries(
    ranked: Ranked,
    targets: Ragged,
    num_items: int,
    ks: Sequence[int],
    *,
    query_Q: NDArray[np.int64],
    user_Q: NDArray[np.int64],
    basket_Q: NDArray[np.bool_],
) -> QueryScores:
    """All metrics of every query over all its targets, with the prefix `warm.` over those of the catalogue, and where
    lists leave out seen items with the prefix `unseen.` over the targets that the user had not had before."""
    warm_N = targets.ids < num_items
    kinds = {"": np.ones(len(warm_N), bool), "warm.": warm_N}
    if ranked.filtered_N is not None:
        kinds["unseen."] = ~ranked.filtered_N
    values = {"nll": query_mean(ranked.nll_N, targets, warm_N)}
    shown = {}
    for k in ks:
        for kind, counted_N in kinds.items():
            found = query_metrics(ranked.rank_N, targets, counted_N, k)
            values |= {kind + name: value_Q for name, value_Q in found.items()}
        listed = ranked.top_Qk[~basket_Q, :k]
        shown[k] = np.bincount(listed[listed >= 0], minlength=num_items) > 0
    return QueryScores(query_Q, user_Q, basket_Q, values, shown)


@dataclass(frozen=True)
class Evaluation:
    """Means over queries, and their standard errors where there are two users or more."""

    metrics: dict[str, float]
    errors: dict[str, float]


def summarise(scores: QueryScores) -> Evaluation:
    """Headline means under their plain names, basket queries under `basket.`; a metric without a query is left out."""
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for name in [prefix + name for prefix in ("", _BASKET) for name in scores.values]:
        value_Q = counted_values(scores, name)
        used_Q = ~np.isnan(value_Q)
        if not used_Q.any() or name.startswith((f"{_BASKET}warm.", f"{_BASKET}unseen.")):
            continue
        metrics[name] = float(value_Q[used_Q].mean())
        error = clustered_error(value_Q[used_Q], scores.user_Q[used_Q])
        if error is not None:
            errors[name] = error
    for k, shown_V in scores.shown.items():
        metrics[f"coverage@{k}"] = float(shown_V.mean())
    if scores.loss_sampled_negatives is not None:
        metrics["loss_sampled_negatives"] = float(scores.loss_sampled_negatives)
    return Evaluation(metrics, errors)


def counted_values(scores: QueryScores, metric: str) -> NDArray[np.float64]:
    """A row's metric query by query, [Q]; NaN where a query does not count in its mean. All NaN: it is no such mean."""
    name = metric.removeprefix(_BASKET)
    value_Q = scores.values.get(name, np.full(len(scores.query_Q), np.nan))
    return np.where(scores.basket_Q == (name != metric), value_Q.astype(np.float64), np.nan)


def clustered_error(value_Q: NDArray[np.float64], user_Q: NDArray[np.int64]) -> float | None:
    """Standard error of the mean over queries when queries of one user are not independent; None below two users.

    var = G / (G - 1) * sum over the G users of (sum of their queries' deviations from the mean)^2 / Q^2
    """
    users, cluster_Q = np.unique(user_Q, return_inverse=True)
    if len(users) < 2:
        return None
    deviation_G = np.bincount(cluster_Q, value_Q - value_Q.mean())
    return float(np.sqrt(len(users) / (len(users) - 1) * np.sum(deviation_G**2)) / len(value_Q))
