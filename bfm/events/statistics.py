"""Figures of negative groups: inclusion probabilities of in-batch negatives, distinct items per group, and their curve.

A group is n = G * L consecutive positions of the training stream, so its distinct items depend on (L, G) through n
alone (padding of the epoch's last window apart). The curve is measured at n = 1, 2, 4, ..., one epoch; between knots
the ratios (distinct / n) are interpolated linearly in logarithms. Its stated error is the largest relative deviation at
the geometric midpoints between the knots, measured on groups of their own.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bfm.events.derived import load_derived, save_derived
from bfm.events.manifest import Manifest
from bfm.events.shards import Shards
from bfm.events.windows import WindowOrder
from bfm.files import canonical_json

_MEASURED_GROUPS = 256
_KNOT_POSITIONS = 1 << 18
_PIECE_POSITIONS = 1 << 20
_SMALLEST_RATIO = 1e-9
_RATIOS = ("distinct_items", "distinct_targets", "target_rows")


@dataclass(frozen=True)
class DistinctStats:
    """Means over groups."""

    distinct_items_mean: float
    """Distinct items among a group's inputs and targets: what the embedder embeds."""
    distinct_targets_mean: float
    """Distinct target items: the in-batch candidates."""
    target_rows_mean: float
    """Positions with a target."""
    relative_error: float
    """Measured: standard error of distinct_items_mean over it. From the curve: its stated largest relative error."""


def inclusion_in_batch(shards: Shards, window: int, group_windows: int) -> np.ndarray:
    """Float64 [V]: share of the first epoch's groups whose distinct targets contain the item, floored at one group.

    The order is seeded by the manifest's seed, so every run on the shard set corrects by the same numbers. Cached.
    """
    name = f"inclusion-L{window}-G{group_windows}"
    cached = load_derived(shards, name)
    if cached is not None and len(cached) == 8 * shards.num_catalogue:
        return np.frombuffer(cached, "<f8").astype(np.float64)
    order = WindowOrder(shards, window, group_windows, shards.seed)
    num_groups = math.ceil(order.groups_per_epoch)
    hits = np.zeros(shards.num_catalogue, np.int64)
    for index in range(num_groups):
        hits[order.group_target_ids(index)] += 1
    inclusion = np.maximum(hits, 1) / num_groups
    save_derived(shards, name, inclusion.astype("<f8").tobytes())
    return inclusion


def distinct_per_group(shards: Shards, window: int, group_windows: int) -> DistinctStats:
    """Means over at most 256 groups, evenly spaced over the first epoch (seeded by the manifest's seed). Cached."""
    name = f"distinct-L{window}-G{group_windows}"
    cached = load_derived(shards, name)
    if cached is not None:
        return DistinctStats(**json.loads(cached))
    order = WindowOrder(shards, window, group_windows, shards.seed)
    num_groups = math.ceil(order.groups_per_epoch)
    indices = _spaced(num_groups, min(num_groups, _MEASURED_GROUPS))
    groups = ((order.group_item_ids(int(index)), order.group_targets(int(index))) for index in indices)
    counts = np.array([_count(shards.num_items, [group]) for group in groups], np.float64)
    items, targets, rows = counts.mean(axis=0)
    spread = float(counts[:, 0].std(ddof=1) / math.sqrt(len(counts))) if 1 < len(counts) < num_groups else 0.0
    stats = DistinctStats(float(items), float(targets), float(rows), spread / float(items))
    save_derived(shards, name, canonical_json(asdict(stats)))
    return stats


def fit_distinct_curve(shards: Shards) -> dict[str, Any]:
    """The curve for the manifest: knots (positions per group), ratios to them, and the largest relative error."""
    total = shards.manifest.train_events
    order = WindowOrder(shards, 1, 1, shards.seed)
    knots = sorted({*(2**power for power in range(total.bit_length())), total})
    ratios = np.array([_measure(order, knot) / knot for knot in knots])
    curve: dict[str, Any] = {"positions": knots, "max_relative_error": 0.0}
    curve |= {name: [round(float(value), 9) for value in ratios[:, column]] for column, name in enumerate(_RATIOS)}
    worst = 0.0
    for low, high in itertools.pairwise(knots):
        middle = round(math.sqrt(low * high))
        if low < middle < high:
            measured = _measure(order, middle, offset=0.5)[:2]
            fitted = np.array(_interpolate(curve, middle)[:2])
            worst = max(worst, float(np.max(np.abs(fitted - measured) / np.maximum(measured, 1.0))))
    curve["max_relative_error"] = round(worst, 6)
    return curve


def expected_distinct(manifest: Manifest, window: int, group_windows: int) -> DistinctStats:
    """Evaluate the manifest's curve at (L, G); beyond an epoch the distinct counts stay those of one epoch."""
    windows_per_epoch = -(-manifest.train_events // window)
    positions = group_windows * manifest.train_events / windows_per_epoch
    items, targets, rows = _interpolate(manifest.distinct_curve, positions)
    return DistinctStats(items, targets, rows, float(manifest.distinct_curve["max_relative_error"]))


def _interpolate(curve: dict[str, Any], positions: float) -> tuple[float, float, float]:
    knots = np.asarray(curve["positions"], np.float64)
    inside = min(positions, float(knots[-1]))
    items, targets, rows = (
        float(np.exp(np.interp(math.log(inside), np.log(knots), np.log(np.maximum(curve[name], _SMALLEST_RATIO)))))
        for name in _RATIOS
    )
    # Rows with a target go on to grow beyond an epoch, distinct items do not.
    return items * inside, targets * inside, rows * positions


def _measure(order: WindowOrder, positions: int, offset: float = 0.0) -> np.ndarray:
    """Mean (distinct items, distinct targets, target rows) of stretches of so many positions, spaced over the epoch."""
    whole = order.shards.manifest.train_events // positions
    wanted = int(np.clip(_KNOT_POSITIONS // positions, 4, _MEASURED_GROUPS))
    counts = []
    for index in _spaced(whole, min(whole, wanted), offset):
        cuts = [*range(int(index) * positions, (int(index) + 1) * positions, _PIECE_POSITIONS)]
        pieces = (order.stretch(*cut) for cut in itertools.pairwise([*cuts, (int(index) + 1) * positions]))
        counts.append(_count(order.shards.num_items, pieces))
    return np.mean(counts, axis=0)


def _spaced(available: int, wanted: int, offset: float = 0.0) -> np.ndarray:
    """`wanted` different indices below `available`, evenly spaced."""
    return np.floor((np.arange(wanted) + offset) * available / wanted).astype(np.int64)


def _count(num_items: int, pieces: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[int, int, int]:
    """Distinct items, distinct targets and rows with a target of (items, targets) that come in pieces."""
    as_input, as_target, rows = np.zeros(num_items, np.bool_), np.zeros(num_items, np.bool_), 0
    for items, targets in pieces:
        as_input[items], as_target[targets] = True, True
        rows += len(targets)
    return int(np.count_nonzero(as_input | as_target)), int(np.count_nonzero(as_target)), rows
