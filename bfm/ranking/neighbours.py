"""Scores of queries from counted neighbours (bfm/events/neighbours.py): the floor of co-occurrence.

    m_v = sum over the query's last events u of age_decay^age c_uv / (n_u n_v)^damping

V = catalogue items, Q = queries, R = query rows of a chunk, C = items of a block, M = last events of a query,
P = pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bfm.events.neighbours import LAST_EVENTS, Neighbours
from bfm.events.protocol import QueryTable
from bfm.events.shards import Shards
from bfm.ranking.ranks import kept_per_thread


class ScoredPairs(NamedTuple):
    """A sparse block of scores, by rising item."""

    row_P: NDArray[np.int64]
    column_P: NDArray[np.int64]
    score_P: NDArray[np.float32]


class NeighbourScores:
    """The scores m_v of a table's queries; their callers want blocks (query rows, items) -> [R, C]."""

    def __init__(self, neighbours: Neighbours, shards: Shards, table: QueryTable) -> None:
        self._neighbours = neighbours
        self._last_QM = neighbours.known(_last_items(shards, table, LAST_EVENTS))
        lengths_V = np.diff(neighbours.lists.offsets)
        damping_V = neighbours.train_counts.astype(np.float32) ** neighbours.counting.damping
        self._weight_P = neighbours.weight_P / np.repeat(damping_V, lengths_V)
        self._scored_rows = kept_per_thread(self._scored)

    @property
    def smallest(self) -> float:
        """The smallest weight; 1 where no item has a neighbour."""
        return float(self._weight_P.min(initial=1.0))

    def __call__(self, rows: slice, items: slice) -> NDArray[np.float32]:
        """Scores [R, C]; 0 where no event points."""
        row_P, item_P, score_P = self._scored_rows(rows)
        low, high = np.searchsorted(item_P, [items.start, items.stop])
        scores_RC = np.zeros((len(self._last_QM[rows]), items.stop - items.start), np.float32)
        scores_RC[row_P[low:high], item_P[low:high] - items.start] = score_P[low:high]
        return scores_RC

    def _scored(self, rows: slice) -> ScoredPairs:
        """All pairs of some rows, by rising item."""
        last_RM = self._last_QM[rows]
        row_N, age_N = np.nonzero(last_RM >= 0)
        place_S, from_S = self._neighbours.spread(last_RM[row_N, age_N])
        decay_N = (self._neighbours.counting.age_decay**age_N).astype(np.float32)
        key_S = self._neighbours.lists.ids[place_S].astype(np.int64) * len(last_RM) + row_N[from_S]
        order = np.argsort(key_S, kind="stable")
        starts = np.flatnonzero(np.diff(key_S[order], prepend=-1))
        item_P, row_P = np.divmod(key_S[order][starts], len(last_RM))
        score_S = (decay_N[from_S] * self._weight_P[place_S])[order]
        # Of an empty array `reduceat` makes no sums but an error.
        score_P = np.add.reduceat(score_S, starts) if len(starts) else score_S
        return ScoredPairs(row_P, item_P, score_P.astype(np.float32))


def _last_items(shards: Shards, table: QueryTable, count: int) -> NDArray[np.int64]:
    """Item ids [Q, count] of the last known events, the latest first; -1 where the history is shorter."""
    first_Q1 = shards.user_starts[table.user][:, None]
    event_QM = first_Q1 + table.position[:, None] - np.arange(count)
    known_QM = event_QM >= first_Q1
    items_QM = np.full(event_QM.shape, -1, np.int64)
    items_QM[known_QM] = shards.take_item(shards.locate(event_QM[known_QM]))
    return items_QM
