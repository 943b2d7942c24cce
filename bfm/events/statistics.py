"""Figures of negative groups: in how many windows an item is a target, how many distinct items and queries there are.

A group is G of the W windows of the stream, drawn without replacement (windows.py), so everything follows from n_v, the
number of windows that hold item v:

    P(no window of G holds v) = prod_{i < G} (1 - n_v / (W - i))

and the mean number of distinct items is the sum over items of one minus that. The manifest keeps those sums on a grid
of L and G, from a sample of windows where the log is large (rarefaction: the formula with the sample in the place of
the stream has the mean of a group of the stream, Hurlbert 1971); between its knots they are interpolated linearly in
logarithms. A query belongs to one window, so queries are a share of the targets that depends on L alone.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from bfm.events.cache import kept
from bfm.events.manifest import Manifest
from bfm.events.shards import Shards
from bfm.events.windows import Targets, WindowOrder

_LARGEST_WINDOW = 1 << 16
_SAMPLE_POSITIONS = 1 << 18
_PIECE_POSITIONS = 1 << 18
_KINDS = ("items", "targets")
# The product over so few draws is quick; differences of log factorials cancel where it is near one.
_EXACT_DRAWS = 256
_SMALLEST = 1e-9


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
    relative_error: float
    """Largest relative error of the interpolation, as measured between the knots."""


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
    every = np.arange(shards.manifest.windows_per_epoch(window))

    def make() -> bytes:
        return _count_windows(shards, window, every)[0]["targets"][: shards.num_catalogue].astype("<i8").tobytes()

    return np.frombuffer(kept(shards, f"target-windows-L{window}", make), "<i8").astype(np.int64)


def fit_group_curve(shards: Shards) -> dict[str, Any]:
    """The grid for the manifest: per window length the knots of G with the mean distinct items and targets."""
    lengths = [2]
    while lengths[-1] < min(shards.manifest.train_events, _LARGEST_WINDOW):
        lengths.append(2 * lengths[-1])
    curve: dict[str, Any] = {"max_relative_error": 0.0, "windows": {str(L): _knots(shards, L) for L in lengths}}
    worst = 0.0
    for low, high in itertools.pairwise(lengths):
        middle = round(math.sqrt(low * high))
        if low < middle < high:
            measured, largest = _knots(shards, middle), curve["windows"][str(high)]["groups"][-1]
            for kind, groups in itertools.product(_KINDS, range(len(measured["groups"]))):
                drawn, value = measured["groups"][groups], measured[kind][groups]
                if drawn <= largest and value > 0:
                    worst = max(worst, abs(_interpolate(curve, kind, middle, drawn) / value - 1))
    return {**curve, "max_relative_error": round(worst, 6)}


def group_means(manifest: Manifest, window: int, group_windows: int, targets: Targets = "next_event") -> GroupMeans:
    """Evaluate the manifest's grid at (L, G); groups beyond the largest knot hold what that one does."""
    curve = manifest.group_curve
    distinct_items, distinct_targets = (_interpolate(curve, kind, window, group_windows) for kind in _KINDS)
    targets_mean = group_windows * manifest.train_targets / manifest.windows_per_epoch(window)
    share = _interpolate(curve, "baskets", window, 1) if targets == "next_basket" else 1.0
    error = float(curve["max_relative_error"])
    return GroupMeans(distinct_items, distinct_targets, targets_mean, share * targets_mean, error)


def _knots(shards: Shards, window: int) -> dict[str, list[float]]:
    """Knots of G (powers of two, and the whole sample), the mean distinct counts there, and baskets per target."""
    num_windows = shards.manifest.windows_per_epoch(window)
    sampled = min(num_windows, max(1, _SAMPLE_POSITIONS // window))
    spaced = np.arange(sampled) * num_windows // sampled
    groups = sorted({*(2**power for power in range(sampled.bit_length())), sampled})
    found: dict[str, list[float]] = {"groups": [float(g) for g in groups]}
    counts, baskets_per_target = _count_windows(shards, window, spaced)
    for kind, count in counts.items():
        distinct, times = np.unique(count, return_counts=True)
        found[kind] = [float(-np.expm1(_log_absent(distinct, sampled, g)) @ times) for g in groups]
    return {**found, "baskets": [baskets_per_target] * len(groups)}


def _count_windows(shards: Shards, window: int, window_R: np.ndarray) -> tuple[dict[str, np.ndarray], float]:
    """How many of these windows hold each item [I], as input or target (`items`) and as target (`targets`).

    And the queries per target where baskets are predicted whole, 1 in a window without a target.
    """
    order = WindowOrder(shards, window, 1, shards.manifest.seed, targets="next_basket")
    num_targets, num_queries = 0, 0
    counts = {kind: np.zeros(shards.num_items, np.int64) for kind in _KINDS}
    step = max(1, _PIECE_POSITIONS // window)
    for start in range(0, len(window_R), step):
        read = order.windows(window_R[start : start + step])
        for kind, ids_RX in (("items", np.hstack([read.item_RL, read.target_RL])), ("targets", read.target_RL)):
            row_P, place_P = np.nonzero(ids_RX >= 0)
            pairs = np.unique(row_P * shards.num_items + ids_RX[row_P, place_P])
            counts[kind] += np.bincount(pairs % shards.num_items, minlength=shards.num_items)
        row_T, place_T = np.nonzero(read.target_RL >= 0)
        num_targets += len(row_T)
        num_queries += len(np.unique(row_T * window + read.query_RL[row_T, place_T]))
    return counts, num_queries / num_targets if num_targets else 1.0


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


def _interpolate(curve: dict[str, Any], kind: str, window: int, group_windows: float) -> float:
    lengths = np.array(sorted(map(int, curve["windows"])))
    values = []
    for length in lengths:
        knots = curve["windows"][str(length)]
        values.append(
            np.interp(math.log(group_windows), np.log(knots["groups"]), np.log(np.maximum(knots[kind], _SMALLEST)))
        )
    return float(np.exp(np.interp(math.log(window), np.log(lengths), values)))
