"""Floors that need no training, on the same protocol and through the same ranking code as the models.

Enters: a shard set and its protocol. Leaves: scores of queries, and metrics, by the name of the floor.

    popularity:     score_v = log((n_v + 1) / (sum n + V)), n_v = training count: a distribution, so it has an nll
    co_occurrence:  score_v = sum over the query's last events u of age_decay^age w_uv / n_u^damping, then popularity;
                    w_uv of counted neighbours (bfm/events/neighbours.py)
    personal:       the user's own history, decayed, mixed with popularity (personal.py): a distribution too

V = catalogue items, Q = queries, R = query rows of a chunk, C = items of a block, M = last events of a query,
P = pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bfm.events.neighbours import COUNTINGS, LAST_EVENTS, Neighbours, count_neighbours
from bfm.events.protocol import Protocol, QueryTable, query_targets, seen_items
from bfm.events.shards import Shards
from bfm.ranking.metrics import QueryScores, score_queries, summarise
from bfm.ranking.mixed_scores import NeighbourMass
from bfm.ranking.paired import from_npz, to_npz
from bfm.ranking.personal import best_personal, log_popularity
from bfm.ranking.ranks import Scores, rank_targets

VERSION = 3
_CHOOSING_QUERIES = 2_000
_CHOOSING_METRIC = "ndcg@10"


def baseline_metrics(
    shards: Shards, protocol: Protocol, part: str, queries: int | None = None
) -> dict[str, dict[str, float]]:
    """Metrics of every floor over a part (its first `queries`), under the names of `summarise`."""
    scores = baseline_scores(shards, protocol, part, queries=queries)
    return {floor: summarise(of_floor).metrics for floor, of_floor in scores.items()}


def baseline_scores(
    shards: Shards, protocol: Protocol, part: str, k: Sequence[int] = (10,), queries: int | None = None
) -> dict[str, QueryScores]:
    """Every floor's scores of a part's queries (the first `queries`), in float32.

    Kept with the shard set. Co-occurrence is no distribution and has no nll.
    """
    table = protocol.queries(part)[:queries]
    makers: dict[str, Callable[[], bytes]] = {
        "popularity": lambda: to_npz(_measure(popularity_scores(shards), shards, table, k)),
        "co_occurrence": lambda: to_npz(_neighbour_scores(best_neighbours(shards, protocol), shards, table, k)),
        "personal": lambda: to_npz(_measure(best_personal(shards, protocol).scores(shards, table), shards, table, k)),
    }
    name = f"baselines-v{VERSION}-{protocol.hash[:16]}-{part}-{len(table)}-at-{'-'.join(map(str, k))}"
    return {floor: from_npz(shards.kept(f"{name}-{floor}", make)) for floor, make in makers.items()}


def best_neighbours(shards: Shards, protocol: Protocol) -> Neighbours:
    """Pairs counted in the way, of COUNTINGS, that ranks the first queries of the validation part best; kept."""
    validation = protocol.queries("validation")[:_CHOOSING_QUERIES]

    def worth(way: Neighbours) -> float:
        return summarise(_neighbour_scores(way, shards, validation, (10,))).metrics[_CHOOSING_METRIC]

    def make() -> bytes:
        return max(count_neighbours(shards, COUNTINGS), key=worth).to_bytes()

    return Neighbours.from_bytes(shards.kept(f"neighbours-v{VERSION}-{protocol.hash[:16]}", make))


def _neighbour_scores(neighbours: Neighbours, shards: Shards, table: QueryTable, k: Sequence[int]) -> QueryScores:
    scores = _measure(co_occurrence_scores(neighbours, shards, table), shards, table, k)
    return dataclasses.replace(scores, values={key: value_Q for key, value_Q in scores.values.items() if key != "nll"})


def _measure(scores: Scores, shards: Shards, table: QueryTable, k: Sequence[int]) -> QueryScores:
    num_items, targets = shards.num_catalogue, query_targets(shards, table)
    ranked = rank_targets(scores, targets, num_items, max(k), seen_items(shards, table))
    rows = np.arange(len(table))
    return score_queries(ranked, targets, num_items, k, query_Q=rows, user_Q=table.user, basket_Q=table.basket)


def popularity_scores(shards: Shards) -> Scores:
    """Add-one smoothed log shares of the training events, the same for every query."""
    log_share_V = torch.from_numpy(log_popularity(shards)).float()

    return lambda rows: lambda items: log_share_V[items].repeat(rows.stop - rows.start, 1)


def co_occurrence_scores(neighbours: Neighbours, shards: Shards, table: QueryTable) -> Scores:
    """Summed neighbour weights of each query's last events; equal sums are ordered by popularity."""
    damping_V, lists = neighbours.damp(neighbours.train_counts), neighbours.lists
    item_QM = neighbours.known(_last_items(shards, table))
    decay_M = neighbours.counting.age_decay ** np.arange(LAST_EVENTS)
    mass_QM = np.where(item_QM >= 0, decay_M * (neighbours.total_V / damping_V)[item_QM], 0.0)
    votes = NeighbourMass(neighbours, torch.from_numpy(item_QM), torch.from_numpy(mass_QM).float())
    # Ids fall with popularity. Far below every neighbour weight, this orders the items that no event points to.
    smallest = (neighbours.weight_P / np.repeat(damping_V, np.diff(lists.offsets))).min(initial=1.0)
    tie_break_V = torch.from_numpy(1e-6 * smallest * np.linspace(1.0, 0.0, shards.num_catalogue)).float()

    def scores(rows: slice) -> Callable[[slice], Tensor]:
        pairs, mass_P = votes.of_rows(rows).by_item()

        def block(items: slice) -> Tensor:
            scores_RC = tie_break_V[items].repeat(rows.stop - rows.start, 1)
            here, at = pairs.inside(items)
            scores_RC[at] += mass_P[here]
            return scores_RC

        return block

    return scores


def _last_items(shards: Shards, table: QueryTable) -> NDArray[np.int64]:
    """Item ids [Q, M] of the last known events, the latest first; -1 where the history is shorter."""
    first_Q1 = shards.user_starts[table.user][:, None]
    event_QM = first_Q1 + table.position[:, None] - np.arange(LAST_EVENTS)
    known_QM = event_QM >= first_Q1
    items_QM = np.full(event_QM.shape, -1, np.int64)
    items_QM[known_QM] = shards.item_at(event_QM[known_QM])
    return items_QM
