"""Which items stand near which in the training histories: a sparse table of counted pairs, and scores from it.

Enters: a shard set's training events, and a way to count. Leaves: `Neighbours`, and for queries the scores

    m_v = sum over the query's last events u of age_decay^age w_uv,    w_uv = c_uv / (n_u n_v)^damping

c_uv sums lag_decay^(lag - 1) over pairs of training events of one user at most REACH events apart: one where u comes
first, `backward` where v does; u = v counts too (repeats). Only the strongest neighbours of an item are kept. A log of
more than MOST_EVENTS training events is counted on its first users (their order is a hash).

V = catalogue items, Q = queries, R = query rows of a chunk, C = items of a block, M = context events of a query,
E = training events, P = pairs, N = neighbours of context events.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bfm.events.protocol import QueryTable, Ragged
from bfm.events.shards import Shards
from bfm.ranking.ranks import kept_per_thread

REACH = 10
CONTEXT_EVENTS = 20
NEIGHBOURS = 100
MOST_EVENTS = 5_000_000
_PASS_PAIRS = 1 << 23
_CHUNK_EVENTS = 1 << 20


@dataclass(frozen=True)
class Counting:
    """How pairs are weighted. The constants of both kinds do well on the validation parts of public logs."""

    name: str
    lag_decay: float
    """Per event between the two of a pair."""
    age_decay: float
    """Per event between a context event and the query."""
    damping: float
    """Power of both items' training counts that a weight is divided by."""
    backward: float
    """Weight of a pair read against time."""


BROAD = Counting("broad", lag_decay=1.0, age_decay=0.9, damping=0.3, backward=0.5)
"""Baskets and long tastes: what stands somewhere near."""
SHARP = Counting("sharp", lag_decay=0.6, age_decay=0.7, damping=0.2, backward=0.3)
"""Orders of events: what comes next."""
COUNTINGS = (BROAD, SHARP)


@dataclass(frozen=True)
class Neighbours:
    """Rows of the item-item table: item u is followed by ids[offsets[u] : offsets[u + 1]], with their weights."""

    lists: Ragged
    weight: NDArray[np.float32]
    counting: Counting

    @property
    def smallest(self) -> float:
        """The smallest weight; 1 where no item has a neighbour."""
        return float(self.weight.min(initial=1.0))


class ScoredPairs(NamedTuple):
    """A sparse block of scores, by rising item."""

    row_P: NDArray[np.int64]
    column_P: NDArray[np.int64]
    score_P: NDArray[np.float32]


class NeighbourScores:
    """The scores m_v of a table's queries; their callers want blocks (query rows, items) -> [R, C]."""

    def __init__(self, neighbours: Neighbours, shards: Shards, table: QueryTable) -> None:
        self._neighbours = neighbours
        self._context_QM = _last_items(shards, table, CONTEXT_EVENTS)
        self._scored_rows = kept_per_thread(self._scored)

    def totals(self) -> NDArray[np.float32]:
        """Sum over the catalogue of every query's scores [Q]; 0 where no event has a neighbour."""
        lists, decay = self._neighbours.lists, self._neighbours.counting.age_decay
        running = np.concatenate([[0.0], np.cumsum(self._neighbours.weight, dtype=np.float64)])
        total_V = np.append(running[lists.offsets[1:]] - running[lists.offsets[:-1]], 0.0)
        known_QM = (self._context_QM >= 0) & (self._context_QM < len(lists))
        item_QM = np.where(known_QM, self._context_QM, len(lists))
        return (total_V[item_QM] @ decay ** np.arange(item_QM.shape[1])).astype(np.float32)

    def pairs(self, rows: slice, items: slice) -> ScoredPairs:
        """Where scores of these rows and items are not 0."""
        row_P, item_P, score_P = self._scored_rows(rows)
        low, high = np.searchsorted(item_P, [items.start, items.stop])
        return ScoredPairs(row_P[low:high], item_P[low:high] - items.start, score_P[low:high])

    def __call__(self, rows: slice, items: slice) -> NDArray[np.float32]:
        """Scores [R, C]; 0 where no event points."""
        row_P, column_P, score_P = self.pairs(rows, items)
        scores_RC = np.zeros((len(self._context_QM[rows]), items.stop - items.start), np.float32)
        scores_RC[row_P, column_P] = score_P
        return scores_RC

    def _scored(self, rows: slice) -> ScoredPairs:
        """All pairs of some rows, by rising item."""
        lists, context_RM = self._neighbours.lists, self._context_QM[rows]
        num_rows = len(context_RM)
        keys, weights = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
        for age in range(context_RM.shape[1]):
            known_R = np.flatnonzero((context_RM[:, age] >= 0) & (context_RM[:, age] < len(lists)))
            place_N, row_N = _spread(lists, context_RM[known_R, age])
            keys.append(lists.ids[place_N].astype(np.int64) * num_rows + known_R[row_N])
            weights.append(np.float32(self._neighbours.counting.age_decay**age) * self._neighbours.weight[place_N])
        key_N, weight_N = np.concatenate(keys), np.concatenate(weights)
        order = np.argsort(key_N, kind="stable")
        starts = np.flatnonzero(np.diff(key_N[order], prepend=-1))
        item_P, row_P = np.divmod(key_N[order][starts], num_rows)
        return ScoredPairs(row_P, item_P, _sums_of_runs(weight_N[order], starts))


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


def _sums_of_runs(values_N: NDArray, starts: NDArray[np.int64]) -> NDArray:
    """Sums of values[starts[i] : starts[i + 1]]; of an empty array `reduceat` makes no sums but an error."""
    return np.add.reduceat(values_N, starts) if len(starts) else values_N[:0]


# ---------------------------------------------------------------- counting


def count_neighbours(shards: Shards, countings: Sequence[Counting]) -> list[Neighbours]:
    """The strongest neighbours of every catalogue item, in each way of counting, from one reading of the log.

    Memory: a bounded number of pairs, and the tables themselves.
    """
    num_items, counts_V = shards.num_catalogue, shards.train_counts
    # No item has more pairs than this; a pass takes a run of items that fits.
    most_pairs_V = np.cumsum(2 * REACH * counts_V)
    found: list[list[Neighbours]] = [[] for _ in countings]
    low = 0
    while low < num_items:
        before = most_pairs_V[low - 1] if low else 0
        high = max(low + 1, int(np.searchsorted(most_pairs_V, before + _PASS_PAIRS, side="right")))
        key_P, count_P = np.unique(np.concatenate(list(_pairs(shards, low, high))), return_counts=True)
        for runs, counting in zip(found, countings, strict=True):
            first_P, second_P, total_P = _totals(key_P, count_P, num_items, counting)
            weight_P = total_P / (counts_V[first_P].astype(np.float64) * counts_V[second_P]) ** counting.damping
            runs.append(_strongest(first_P - low, second_P, weight_P, min(high, num_items) - low, counting))
        low = high
    return [_joined(runs) for runs in found]


def _totals(
    key_P: NDArray[np.int64], count_P: NDArray[np.int64], num_items: int, counting: Counting
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """First item, second item and c_uv of each distinct pair, ascending."""
    pair_P, kind_P = np.divmod(key_P, 2 * REACH)
    backward_P, past_P = np.divmod(kind_P, REACH)
    weighted_P = np.where(backward_P == 1, counting.backward, 1.0) * counting.lag_decay**past_P * count_P
    starts = np.flatnonzero(np.diff(pair_P, prepend=-1))
    first, second = np.divmod(pair_P[starts], num_items)
    return first, second, _sums_of_runs(weighted_P, starts)


def _strongest(
    row_P: NDArray[np.int64],
    second_P: NDArray[np.int64],
    weight_P: NDArray[np.float64],
    num_rows: int,
    counting: Counting,
) -> Neighbours:
    """The first NEIGHBOURS of each row by weight; row_P rises."""
    # One key instead of two: pairs stand by their row already, a weight below 1 orders inside it.
    order = np.argsort(row_P - weight_P / (2.0 * weight_P.max(initial=1.0)), kind="stable")
    starts = np.searchsorted(row_P, np.arange(num_rows + 1))
    rank_P = np.arange(len(order)) - np.repeat(starts[:-1], np.diff(starts))
    kept = np.sort(order[rank_P < NEIGHBOURS])
    offsets = np.concatenate([[0], np.cumsum(np.minimum(np.diff(starts), NEIGHBOURS))])
    return Neighbours(Ragged(second_P[kept].astype(np.int32), offsets), weight_P[kept].astype(np.float32), counting)


def _joined(runs: Sequence[Neighbours]) -> Neighbours:
    """One table of the tables of consecutive runs of items."""
    lengths = [np.diff(run.lists.offsets) for run in runs]
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    lists = Ragged(np.concatenate([run.lists.ids for run in runs]), offsets)
    return Neighbours(lists, np.concatenate([run.weight for run in runs]), runs[0].counting)


def _pairs(shards: Shards, low: int, high: int) -> Iterator[NDArray[np.int64]]:
    """((first * V + second) * 2 + backward) * REACH + lag - 1 of all pairs whose first item lies in low..high-1.

    Each pair of events comes both ways round.
    """
    yield np.zeros(0, np.int64)
    for user_E, item_E in _training_events(shards):
        for lag in range(1, REACH + 1):
            together = user_E[:-lag] == user_E[lag:]
            early, late = item_E[:-lag][together], item_E[lag:][together]
            for backward, (first, second) in enumerate(((early, late), (late, early))):
                wanted = (first >= low) & (first < high)
                pair = first[wanted] * shards.num_catalogue + second[wanted]
                yield (pair * 2 + backward) * REACH + lag - 1


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
