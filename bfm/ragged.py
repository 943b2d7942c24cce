"""Lists of different lengths that lie one after the other in flat arrays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """Lists of item ids, one per query (compressed rows)."""

    ids: np.ndarray
    """Int32 [sum of lengths], ascending inside each list."""
    offsets: np.ndarray
    """Int64 [Q+1]."""

    def __getitem__(self, query: int) -> np.ndarray:
        """The ids of one query."""
        return self.ids[self.offsets[query] : self.offsets[query + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def rows(self) -> np.ndarray:
        """Int64 [sum of lengths]: the query of each id."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def within(self, other: Ragged) -> np.ndarray:
        """Bool [sum of lengths]: which ids are also in the same query's list of `other`."""
        width = 1 + max(self.ids.max(initial=0), other.ids.max(initial=0))
        own, others = (lists.rows * width + lists.ids for lists in (self, other))
        return np.isin(own, others)


def distinct(values: np.ndarray) -> np.ndarray:
    """Distinct values, ascending. numpy's own way of hashing whole numbers takes ten times as long as sorting them."""
    ordered = np.sort(values)
    return ordered[begins(ordered)]


def runs(start: np.ndarray | int, length: np.ndarray) -> np.ndarray:
    """Int64: start, start + 1, ... of every run, one run after the other."""
    return np.arange(int(length.sum())) + np.repeat(start - (np.cumsum(length) - length), length)


def begins(values: np.ndarray) -> np.ndarray:
    """Bool: whether each number, along the last axis, differs from the one before it; the first does."""
    out = np.ones(values.shape, bool)
    np.not_equal(values[..., 1:], values[..., :-1], out=out[..., 1:])
    return out


def place_in_run(values: np.ndarray) -> np.ndarray:
    """Int64 [n]: how many equal numbers stand directly before each."""
    starts = np.flatnonzero(begins(values))
    return np.arange(len(values)) - np.repeat(starts, np.diff(starts, append=len(values)))


def place_among_equal(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Int64 [n]: how many equal numbers stand before each in an `order` that sorts them."""
    place = np.empty(len(values), np.int64)
    place[order] = place_in_run(values[order])
    return place


def chunks(count_N: np.ndarray, target: int) -> Iterator[tuple[int, int]]:
    """Low and high of runs of neighbours whose counts [N] sum to at most `target`, or that are one of more."""
    total_N, low, before = np.cumsum(count_N), 0, 0
    while low < len(total_N):
        high = max(low + 1, int(np.searchsorted(total_N, before + target, side="right")))
        yield low, high
        low, before = high, total_N[high - 1]
