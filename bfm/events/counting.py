"""Pairs of items that stand near each other in training histories, counted from a shard set (see neighbours.py).

Enters: a shard set's training events, and ways to count. Leaves: `Neighbours`. A log of more than MOST_EVENTS training
events is counted on its first users (their order is a hash).

V = catalogue items, E = training events, P = pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bfm.events.neighbours import NEIGHBOURS, REACH, Counting, Neighbours
from bfm.events.ragged import Ragged, chunks, place_in_run
from bfm.events.shards import Shards, training_events

BROAD = Counting("broad", lag_decay=1.0, age_decay=0.9, damping=0.3, backward=0.5)
"""Baskets and long tastes: what stands somewhere near."""
SHARP = Counting("sharp", lag_decay=0.6, age_decay=0.7, damping=0.2, backward=0.3)
"""Orders of events: what comes next."""
COUNTINGS = (BROAD, SHARP)
MOST_EVENTS = 5_000_000
_PASS_PAIRS = 1 << 23
_CHUNK_EVENTS = 1 << 20


def count_neighbours(shards: Shards, countings: Sequence[Counting]) -> list[Neighbours]:
    """The strongest neighbours of every catalogue item, in each way of counting, from one reading of the log.

    Memory: a bounded number of pairs, and the tables themselves.
    """
    num_items, counts_V = shards.num_catalogue, shards.train_counts
    runs: list[list[_Run]] = [[] for _ in countings]
    # No item has more pairs than this; a pass takes a run of items that fits.
    for low, high in itertools.pairwise(chunks(2 * REACH * counts_V, _PASS_PAIRS)):
        key_P, times_P = np.unique(np.concatenate(list(_pairs(shards, low, high))), return_counts=True)
        for of_counting, counting in zip(runs, countings, strict=True):
            first_P, second_P, count_P = _totals(key_P, times_P, num_items, counting)
            weight_P = count_P / counts_V[second_P].astype(np.float64) ** counting.damping
            of_counting.append(_strongest(first_P - low, second_P, count_P, weight_P, high - low))
    return [_joined(run, shards, counting) for run, counting in zip(runs, countings, strict=True)]


def _totals(
    key_P: NDArray[np.int64], times_P: NDArray[np.int64], num_items: int, counting: Counting
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """First item, second item and c_uv of each distinct pair, ascending."""
    pair_P, kind_P = np.divmod(key_P, 2 * REACH)
    counted_P = counting.near_J[kind_P] * times_P
    starts = np.flatnonzero(np.diff(pair_P, prepend=-1))
    first, second = np.divmod(pair_P[starts], num_items)
    return first, second, np.add.reduceat(counted_P, starts) if len(starts) else counted_P


_Run = tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int64]]
"""Neighbours of consecutive items one after the other, their counts, and how many each item has."""


def _strongest(
    row_P: NDArray[np.int64],
    second_P: NDArray[np.int64],
    count_P: NDArray[np.float64],
    weight_P: NDArray[np.float64],
    num_rows: int,
) -> _Run:
    """The first NEIGHBOURS of each row by weight; row_P rises."""
    # One key instead of two: pairs stand by their row already, a weight below 1 orders inside it.
    order = np.argsort(row_P - weight_P / (2.0 * weight_P.max(initial=1.0)), kind="stable")
    kept = np.sort(order[place_in_run(row_P) < NEIGHBOURS])
    lengths = np.bincount(row_P[kept], minlength=num_rows)
    return second_P[kept].astype(np.int32), count_P[kept].astype(np.float32), lengths


def _joined(runs: Sequence[_Run], shards: Shards, counting: Counting) -> Neighbours:
    """One table of the runs."""
    ids, counts, lengths = (np.concatenate(parts) for parts in zip(*runs, strict=True))
    lists = Ragged(ids, np.concatenate([[0], np.cumsum(lengths)]))
    return Neighbours(lists, counts, shards.train_counts, counted_users(shards), counting)


def counted_users(shards: Shards) -> int:
    """The first so many users are counted."""
    return max(1, int(np.searchsorted(shards.train_stops, MOST_EVENTS, side="right")))


def _pairs(shards: Shards, low: int, high: int) -> Iterator[NDArray[np.int64]]:
    """((first * V + second) * 2 + backward) * REACH + lag - 1 of all pairs whose first item lies in low..high-1.

    Each pair of events comes both ways round.
    """
    yield np.zeros(0, np.int64)
    for user_E, _, located in training_events(shards, counted_users(shards), _CHUNK_EVENTS):
        item_E = shards.take_item(located).astype(np.int64)
        for lag in range(1, REACH + 1):
            together = user_E[:-lag] == user_E[lag:]
            early, late = item_E[:-lag][together], item_E[lag:][together]
            for backward, (first, second) in enumerate(((early, late), (late, early))):
                wanted = (first >= low) & (first < high)
                pair = first[wanted] * shards.num_catalogue + second[wanted]
                yield (pair * 2 + backward) * REACH + lag - 1
