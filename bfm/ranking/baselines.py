"""Floors that need no training, on the same protocol and through the same ranking code as the models.

Enters: a shard set and its protocol. Leaves: scores of queries, and metrics, by the name of the floor.

    popularity:     score_v = log((n_v + 1) / (sum n + V)), n_v = training count: a distribution, so it has an nll
    co_occurrence:  the neighbours of the query's last events (neighbours.py), then popularity
    personal:       the user's own history, decayed, mixed with popularity (personal.py): a distribution too

V = catalogue items, Q = queries, R = query rows of a chunk, N = targets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bfm.events.counting import BROAD, COUNTINGS, count_neighbours
from bfm.events.derived import load_derived, save_derived
from bfm.events.neighbours import Neighbours
from bfm.events.protocol import Protocol, QueryTable, Ragged, distinct_items, query_targets
from bfm.events.shards import Shards
from bfm.ranking.metrics import QueryScores, score_queries, summarise
from bfm.ranking.neighbours import NeighbourScores
from bfm.ranking.paired import from_npz, to_npz
from bfm.ranking.personal import best_personal, log_popularity
from bfm.ranking.ranks import Ranked, ScoreBlock, rank_targets

VERSION = 3
_CHOOSING_QUERIES = 2_000
_CHOOSING_METRIC = "ndcg@10"


def baseline_metrics(
    shards: Shards, protocol: Protocol, part: str, k: Sequence[int] = (10,), queries: int | None = None
) -> dict[str, dict[str, float]]:
    """Metrics of every floor over a part (its first `queries`), under the names of `summarise`."""
    scores = baseline_scores(shards, protocol, part, k, queries)
    return {floor: summarise(of_floor).metrics for floor, of_floor in scores.items()}


def baseline_scores(
    shards: Shards, protocol: Protocol, part: str, k: Sequence[int] = (10,), queries: int | None = None
) -> dict[str, QueryScores]:
    """Every floor's scores of a part's queries (the first `queries`), in float32.

    Cached with the shard set. Co-occurrence is no distribution and has no nll.
    """
    table = protocol.queries(part)[:queries]
    chosen = "-".join(map(str, k))
    name = f"baselines-v{VERSION}-{protocol.hash[:16]}-{part}-{len(table)}-at-{chosen}"
    measures = {
        "popularity": lambda: _measure(popularity_scores(shards), shards, table, k, alike=True),
        "co_occurrence": lambda: _neighbour_scores(best_neighbours(shards, protocol), shards, table, k),
        "personal": lambda: _measure(best_personal(shards, protocol).scores(shards, table), shards, table, k, False),
    }
    found: dict[str, QueryScores] = {}
    for floor, measure in measures.items():
        data = load_derived(shards, f"{name}-{floor}")
        if data is None:
            data = to_npz(measure())
            save_derived(shards, f"{name}-{floor}", data)
        found[floor] = from_npz(data)
    return found


def best_neighbours(shards: Shards, protocol: Protocol) -> Neighbours:
    """Pairs counted in the way, of COUNTINGS, that ranks the first queries of the validation part best.

    Cached with the shard set.
    """
    validation = protocol.queries("validation")[:_CHOOSING_QUERIES]
    if len(validation) == 0:
        return count_neighbours(shards, [BROAD])[0]
    name = f"neighbours-v{VERSION}-{protocol.hash[:16]}"
    cached = load_derived(shards, name)
    if cached is not None:
        return Neighbours.from_bytes(cached)
    counted = count_neighbours(shards, COUNTINGS)

    def worth(way: Neighbours) -> float:
        return summarise(_neighbour_scores(way, shards, validation, (10,))).metrics.get(_CHOOSING_METRIC, 0.0)

    best = max(counted, key=worth)
    save_derived(shards, name, best.to_bytes())
    return best


def _neighbour_scores(neighbours: Neighbours, shards: Shards, table: QueryTable, k: Sequence[int]) -> QueryScores:
    scores = _measure(co_occurrence_scores(neighbours, shards, table), shards, table, k, alike=False)
    return dataclasses.replace(scores, values={key: value_Q for key, value_Q in scores.values.items() if key != "nll"})


def _measure(scorer: ScoreBlock, shards: Shards, table: QueryTable, k: Sequence[int], alike: bool) -> QueryScores:
    """Scores of one scorer's queries. `alike`: all queries have the same scores, so one row of them is enough."""
    num_items, targets = shards.num_catalogue, query_targets(shards, table)
    if table.filter_seen:
        seen = distinct_items(shards, shards.user_starts[table.user], table.position + 1)
        ranked = rank_targets(scorer, targets, num_items, max(k), seen)
    elif alike:
        ids, place_N = np.unique(targets.ids, return_inverse=True)
        row = rank_targets(scorer, Ragged(ids, np.array([0, len(ids)])), num_items, max(k))
        top_Qk = np.repeat(row.top_Qk, len(table), axis=0)
        top_score_Qk = np.repeat(row.top_score_Qk, len(table), axis=0)
        ranked = Ranked(row.rank_N[place_N], row.nll_N[place_N], top_Qk, top_score_Qk)
    else:
        ranked = rank_targets(scorer, targets, num_items, max(k))
    rows = np.arange(len(table))
    return score_queries(ranked, targets, num_items, k, query_Q=rows, user_Q=table.user, basket_Q=table.basket)


def popularity_scores(shards: Shards) -> ScoreBlock:
    """Add-one smoothed log shares of the training events, the same for every query."""
    log_share_V = torch.from_numpy(log_popularity(shards)).float()

    def block(rows: slice, items: slice) -> Tensor:
        return log_share_V[items].repeat(rows.stop - rows.start, 1)

    return block


def co_occurrence_scores(neighbours: Neighbours, shards: Shards, table: QueryTable) -> ScoreBlock:
    """Summed neighbour weights of each query's last events; equal sums are ordered by popularity."""
    scores = NeighbourScores(neighbours, shards, table)
    # Ids fall with popularity. Far below every neighbour weight, this orders the items that no event points to.
    tie_break_V = (1e-6 * scores.smallest * np.linspace(1.0, 0.0, shards.num_catalogue)).astype(np.float32)

    def block(rows: slice, items: slice) -> Tensor:
        return torch.from_numpy(scores(rows, items) + tie_break_V[items])

    return block
