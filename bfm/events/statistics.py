"""Figures of negative groups: in how many windows an item is a target, how many distinct items and queries there are.

A group is G of the W windows of the stream, drawn without replacement (windows.py), so everything follows from n_v, the
number of windows that hold item v:

    P(no window of G holds v) = prod_{i < G} (1 - n_v / (W - i))

and the mean number of distinct items is the sum over items of one minus that. Of a large log a sample of windows is
counted: with the sample in the place of the stream the formula has the same mean (rarefaction, Hurlbert 1971).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from bfm.events.shards import Shards
from bfm.events.windows import Targets, WindowOrder
from bfm.ragged import distinct

_SAMPLE_POSITIONS = 1 << 17
_PIECE_POSITIONS = 1 << 18
# The product over so few draws is quick; differences of log factorials cancel where it is near one.
_EXACT_DRAWS = 256


@dataclass(frozen=True)
class GroupMeans:
    """Means over groups."""

    distinct_items_mean: float
    """Distinct items among a group's inputs and targets: what the embedder embeds."""
    distinct_targets_mean: float
    """Distinct target items: the in-batch candidates."""
    targets_mean: float
    """Positions with a target."""
    queries_mean: float
    """Positions from which targets are predicted."""


@dataclass(frozen=True)
class _Counted:
    """What some windows hold."""

    items_I: np.ndarray
    """Int64: windows among whose inputs and targets each item is."""
    targets_I: np.ndarray
    """Int64: windows among whose targets each item is."""
    queries_share: float
    """Queries per target where baskets are predicted whole; 1 where there is no target."""


def inclusion_elsewhere(shards: Shards, window: int, group_windows: int) -> np.ndarray:
    """Float64 [V]: chance that the other G - 1 windows of a group hold the item among their targets.

    For a row whose own window does not hold it; floored at what one window gives, so that it is positive. 0 at G = 1.
    """
    count_V = np.maximum(target_windows(shards, window), 1)
    others = shards.manifest.windows_per_epoch(window) - 1
    distinct, place_V = np.unique(count_V, return_inverse=True)
    return -np.expm1(_log_absent(distinct, others, min(group_windows - 1, others)))[place_V]


def target_windows(shards: Shards, window: int) -> np.ndarray:
    """Int64 [V]: windows of the stream among whose targets each catalogue item is. Cached."""

    def make() -> bytes:
        every = shards.manifest.windows_per_epoch(window)
        return _count_windows(shards, window, every).targets_I[: shards.num_catalogue].astype("<i8").tobytes()

    return np.frombuffer(shards.kept(f"target-windows-L{window}", make), "<i8").astype(np.int64)


def group_means(shards: Shards, window: int, group_windows: int, targets: Targets = "next_event") -> GroupMeans:
    """Means of groups of G windows of L events; those of more windows than an epoch has hold what an epoch holds."""
    num_windows = shards.manifest.windows_per_epoch(window)
    sampled = min(num_windows, max(group_windows, _SAMPLE_POSITIONS // window))
    counted = _count_sample(shards, window, sampled)

    def distinct_mean(count_I: np.ndarray) -> float:
        number, items = np.unique(count_I, return_counts=True)
        return float(-np.expm1(_log_absent(number, sampled, min(group_windows, sampled))) @ items)

    targets_mean = group_windows * shards.manifest.train_targets / num_windows
    queries_mean = targets_mean * (counted.queries_share if targets == "next_basket" else 1.0)
    return GroupMeans(distinct_mean(counted.items_I), distinct_mean(counted.targets_I), targets_mean, queries_mean)


def _count_windows(shards: Shards, window: int, sampled: int) -> _Counted:
    """Count so many windows, evenly spaced over the stream."""
    order = WindowOrder(shards, window, 1, shards.manifest.seed, targets="next_basket")
    num_targets, num_queries = 0, 0
    items_I, targets_I = np.zeros((2, shards.num_items), np.int64)
    step = max(1, _PIECE_POSITIONS // window)
    for start in range(0, sampled, step):
        place_R = np.arange(start, min(start + step, sampled))
        read = order.windows(place_R * order.windows_per_epoch // sampled)
        for count_I, ids_RX in ((items_I, np.hstack([read.item_RL, read.target_RL])), (targets_I, read.target_RL)):
            row_P, place_P = np.nonzero(ids_RX >= 0)
            pairs = distinct(row_P * shards.num_items + ids_RX[row_P, place_P])
            count_I += np.bincount(pairs % shards.num_items, minlength=shards.num_items)
        row_T, place_T = np.nonzero(read.target_RL >= 0)
        num_targets += len(row_T)
        num_queries += len(distinct(row_T * window + read.query_RL[row_T, place_T]))
    return _Counted(items_I, targets_I, num_queries / num_targets if num_targets else 1.0)


# A plan asks for groups of many sizes of one window.
_count_sample = lru_cache(maxsize=8)(_count_windows)


def _log_absent(count_X: np.ndarray, num_windows: int, drawn: int) -> np.ndarray:
    """log of the chance that none of `drawn` windows out of num_windows is one of count_X; -inf where one must be."""
    if drawn > _EXACT_DRAWS:
        free_X = num_windows - np.minimum(count_X, num_windows - drawn)
        ways_X = _log_factorial(free_X) - _log_factorial(free_X - drawn)
        all_ways = math.lgamma(num_windows + 1) - math.lgamma(num_windows - drawn + 1)
        return np.where(count_X > num_windows - drawn, -np.inf, ways_X - all_ways)
    log_X = np.zeros(len(count_X))
    with np.errstate(divide="ignore"):
        for before in range(drawn):
            log_X += np.log1p(-np.minimum(count_X / (num_windows - before), 1.0))
    return log_X


def _log_factorial(numbers_X: np.ndarray) -> np.ndarray:
    return np.array([math.lgamma(number + 1) for number in numbers_X.tolist()])
