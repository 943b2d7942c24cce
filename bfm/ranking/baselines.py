"""Floors that need no training, on the same protocol and through the same ranking code as the models.

Enters: a shard set and its protocol. Leaves: metrics by the name of the floor.

    popularity:     score_v = log((n_v + 1) / (sum n + V)), n_v = training count: a distribution, so it has an nll
    co_occurrence:  score_v = sum over the query's last events u of DECAY^age c_uv / (n_u n_v)^DAMPING, then popularity

c_uv counts pairs of training events of one user at most REACH events apart: one where u comes first, BACKWARD where v
does; u = v counts too (repeats). Only the strongest neighbours of an item are kept. The constants do well on the
validation parts of two public logs, reviews of cosmetics and grocery baskets; they are not tuned per log.
A log of more than MOST_EVENTS training events is counted on its first users (their order is a hash).

V = catalogue items, Q = queries, M = context events of a query, B = neighbours of an item.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bfm.events.derived import load_derived, save_derived
from bfm.events.protocol import Protocol, QueryTable, Ragged, distinct_items, query_targets
from bfm.events.shards import Shards
from bfm.files import canonical_json
from bfm.ranking.metrics import score_queries, summarise
from bfm.ranking.ranks import Ranked, ScoreBlock, rank_targets

VERSION = 1
REACH = 10
CONTEXT_EVENTS = 20
DECAY = 0.9
DAMPING = 0.3
BACKWARD = 0.5
NEIGHBOURS = 100
MOST_EVENTS = 5_000_000
_PASS_PAIRS = 1 << 23
_CHUNK_EVENTS = 1 << 20


def baseline_metrics(
    shards: Shards, protocol: Protocol, part: str, k: Sequence[int] = (10,), queries: int | None = None
) -> dict[str, dict[str, float]]:
    """Metrics of `popularity` and `co_occurrence` over a part (its first `queries`), under the names of `summarise`.

    Cached with the shard set. Only popularity has an nll.
    """
    table = protocol.queries(part)[:queries]
    chosen = "-".join(map(str, k))
    name = f"baselines-v{VERSION}-{protocol.hash[:16]}-{part}-{len(table)}-at-{chosen}"
    cached = load_derived(shards, name)
    if cached is not None:
        return json.loads(cached)
    metrics = {
        "popularity": _measure(popularity_scores(shards), shards, table, k, alike=True),
        "co_occurrence": _measure(co_occurrence_scores(shards, table), shards, table, k, alike=False),
    }
    metrics["co_occurrence"] = {key: value for key, value in metrics["co_occurrence"].items() if "nll" not in key}
    save_derived(shards, name, canonical_json(metrics))
    return metrics


def _measure(scorer: ScoreBlock, shards: Shards, table: QueryTable, k: Sequence[int], alike: bool) -> dict[str, float]:
    """Metrics of one scorer. `alike`: all queries have the same scores, so one row of them is enough."""
    num_items, targets = shards.num_catalogue, query_targets(shards, table)
    if table.filter_seen:
        seen = distinct_items(shards, shards.user_starts[table.user], table.position + 1)
        ranked = rank_targets(scorer, targets, num_items, max(k), seen)
    elif alike:
        ids, place_N = np.unique(targets.ids, return_inverse=True)
        row = rank_targets(scorer, Ragged(ids, np.array([0, len(ids)])), num_items, max(k))
        ranked = Ranked(row.rank_N[place_N], row.nll_N[place_N], np.repeat(row.top_Qk, len(table), axis=0))
    else:
        ranked = rank_targets(scorer, targets, num_items, max(k))
    rows = np.arange(len(table))
    scores = score_queries(ranked, targets, num_items, k, query_Q=rows, user_Q=table.user, basket_Q=table.basket)
    return summarise(scores).metrics


def popularity_scores(shards: Shards) -> ScoreBlock:
    """Add-one smoothed log shares of the training events, the same for every query."""
    smoothed_V = shards.train_counts + 1.0
    log_share_V = torch.from_numpy(np.log(smoothed_V / smoothed_V.sum())).float()

    def block(rows: slice, items: slice) -> Tensor:
        return log_share_V[items].repeat(rows.stop - rows.start, 1)

    return block


# ---------------------------------------------------------------- co-occurrence


@dataclass(frozen=True)
class Neighbours:
    """Rows of the item-item table: item i is followed by ids[offsets[i] : offsets[i + 1]], with their weights."""

    lists: Ragged
    weight: NDArray[np.float32]

    @property
    def smallest(self) -> float:
        """The smallest weight; 1 where no item has a neighbour."""
        return float(self.weight.min(initial=1.0))


def co_occurrence_scores(shards: Shards, table: QueryTable) -> ScoreBlock:
    """Summed neighbour weights of each query's last events; equal sums are ordered by popularity."""
    neighbours = count_neighbours(shards)
    context_QM = _last_items(shards, table, CONTEXT_EVENTS)
    # Ids fall with popularity. Far below every neighbour weight, this orders the items that no event points to.
    tie_break_V = (1e-6 * neighbours.smallest * np.linspace(1.0, 0.0, shards.num_catalogue)).astype(np.float32)

    def block(rows: slice, items: slice) -> Tensor:
        context_RM = context_QM[rows]
        scores_RC = np.tile(tie_break_V[items], (len(context_RM), 1))
        for age in range(context_RM.shape[1]):
            known_R = np.flatnonzero((context_RM[:, age] >= 0) & (context_RM[:, age] < shards.num_catalogue))
            place_N, row_N = _spread(neighbours.lists, context_RM[known_R, age])
            item_N = neighbours.lists.ids[place_N]
            inside_N = (item_N >= items.start) & (item_N < items.stop)
            # A row's list has distinct ids, so no index repeats within one age.
            scores_RC[known_R[row_N[inside_N]], item_N[inside_N] - items.start] += (
                np.float32(DECAY**age) * neighbours.weight[place_N[inside_N]]
            )
        return torch.from_numpy(scores_RC)

    return block


def _last_items(shards: Shards, table: QueryTable, count: int) -> NDArray[np.int64]:
    """Item ids [Q, count] of the last known events, the latest first; -1 where the history is shorter."""
    age_M = np.arange(count)
    first_Q1 = shards.user_starts[table.user][:, None]
    event_QM = first_Q1 + table.position[:, None] - age_M
    known_QM = event_QM >= first_Q1
    items_QM = np.full(event_QM.shape, -1, np.int64)
    items_QM[known_QM] = shards.take_item(shards.locate(event_QM[known_QM]))
    return items_QM


def _spread(lists: Ragged, item_R: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of all neighbours of each row's item, and the row of each."""
    start_R, length_R = lists.offsets[item_R], lists.offsets[item_R + 1] - lists.offsets[item_R]
    row_N = np.repeat(np.arange(len(item_R)), length_R)
    inside_N = np.arange(len(row_N)) - np.repeat(np.cumsum(length_R) - length_R, length_R)
    return start_R[row_N] + inside_N, row_N


def count_neighbours(shards: Shards) -> Neighbours:
    """The strongest neighbours of every catalogue item. Memory: a bounded number of pairs, and the table itself."""
    num_items, counts_V = shards.num_catalogue, shards.train_counts
    # No item has more pairs than this; a pass takes a run of items that fits.
    most_pairs_V = np.cumsum(2 * REACH * counts_V)
    ids, weights, sizes = [], [], []
    low = 0
    while low < num_items:
        before = most_pairs_V[low - 1] if low else 0
        high = max(low + 1, int(np.searchsorted(most_pairs_V, before + _PASS_PAIRS, side="right")))
        first_P, second_P, count_P = _count(np.concatenate(list(_pairs(shards, low, high))), num_items)
        weight_P = count_P / (counts_V[first_P].astype(np.float64) * counts_V[second_P]) ** DAMPING
        # One key instead of two: pairs stand by their first item already, a weight below 1 orders inside it.
        order = np.argsort(first_P - weight_P / (2.0 * weight_P.max(initial=1.0)), kind="stable")
        starts = np.searchsorted(first_P, np.arange(low, high + 1))
        rank_P = np.arange(len(order)) - np.repeat(starts[:-1], np.diff(starts))
        kept = order[rank_P < NEIGHBOURS]
        ids.append(second_P[kept].astype(np.int32))
        weights.append(weight_P[kept].astype(np.float32))
        sizes.append(np.minimum(np.diff(starts), NEIGHBOURS))
        low = high
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    return Neighbours(Ragged(np.concatenate(ids), offsets), np.concatenate(weights))


def _count(
    key_P: NDArray[np.int64], num_items: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """First item, second item and weighted count of each distinct pair, ascending."""
    key_P, count_P = np.unique(key_P, return_counts=True)
    pair_P, backward_P = np.divmod(key_P, 2)
    weighted_P = np.where(backward_P == 1, BACKWARD, 1.0) * count_P
    starts = np.flatnonzero(np.diff(pair_P, prepend=-1))
    first, second = np.divmod(pair_P[starts], num_items)
    # Both directions of a pair are neighbours: differences of the running sum, exact for halves.
    total = np.concatenate([[0.0], np.cumsum(weighted_P)])
    return first, second, np.diff(total[np.append(starts, len(weighted_P))])


def _pairs(shards: Shards, low: int, high: int) -> Iterator[NDArray[np.int64]]:
    """(first * V + second) * 2 + backward of all pairs whose first item lies in low..high-1, both ways round."""
    yield np.zeros(0, np.int64)
    for user_E, item_E in _training_events(shards):
        for lag in range(1, REACH + 1):
            together = user_E[:-lag] == user_E[lag:]
            early, late = item_E[:-lag][together], item_E[lag:][together]
            for backward, (first, second) in enumerate(((early, late), (late, early))):
                wanted = (first >= low) & (first < high)
                yield (first[wanted] * shards.num_catalogue + second[wanted]) * 2 + backward


def _training_events(shards: Shards) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """User and item of training events, whole users at a time, about a million events per chunk."""
    ends_U = np.cumsum(shards.train_lengths)
    last_user = int(np.searchsorted(ends_U, MOST_EVENTS, side="right"))
    low = 0
    while low < max(1, min(last_user, len(ends_U))):
        before = ends_U[low - 1] if low else 0
        high = max(low + 1, int(np.searchsorted(ends_U, before + _CHUNK_EVENTS, side="right")))
        length_U = shards.train_lengths[low:high]
        user_E = np.repeat(np.arange(low, high), length_U)
        inside_E = np.arange(len(user_E)) - np.repeat(np.cumsum(length_U) - length_U, length_U)
        yield user_E, shards.take_item(shards.locate(shards.user_starts[user_E] + inside_E)).astype(np.int64)
        low = high
