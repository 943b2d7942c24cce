"""How many workers a task takes, of the numbers that its tier allows.

Enters: those numbers, and rows of tasks that were trained before. Leaves: the numbers that pay. More workers are taken
until some have been measured to bring too little; what was not measured yet is tried.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

GAIN = 0.5
"""W times the workers pay where they are at least 1 + GAIN (W - 1) times as fast, the start of the group included."""
GROW_LEFT_S = 120.0
"""A running task that has less left to do takes no more workers: a group takes tens of seconds to start."""
_LIKE = 4.0
"""Rows say something of sizes up to so many times theirs."""
_TRAINED = 0.1
"""A task that trained a smaller share of its C went on near its end: its seconds are those of saving and starting."""


def worthwhile(
    counts: Sequence[int], rows: Iterable[Mapping[str, Any]], params: float | None, flops: float
) -> list[int]:
    """The numbers of workers that pay for training a model of N = `params` (None: not known) by `flops`, most first.

    `counts` are ascending; the first is always among them.
    """
    kept = list(counts[:1])
    if len(counts) == 1:
        return kept
    seconds = _seconds(rows, params, flops)
    for count in counts[1:]:
        less = max((known for known in kept if known in seconds), default=None)
        if less is not None and count in seconds and seconds[less] < seconds[count] * (1 + GAIN * (count / less - 1)):
            break
        kept.append(count)
    return kept[::-1]


def _seconds(rows: Iterable[Mapping[str, Any]], params: float | None, flops: float) -> dict[int, float]:
    """Workers -> what the task would take: median start, and FLOPs over the median speed."""
    found: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        if row["status"] != "ok" or not row.get("train_s") or row.get("warm_start_s") is None:
            continue
        if row["task_flops"] < _TRAINED * row["path_flops"]:
            continue
        if params is None or params / _LIKE <= row["params"] <= params * _LIKE:
            found.setdefault(row["workers"], []).append((row["warm_start_s"], row["task_flops"] / row["train_s"]))
    return {
        workers: statistics.median(start_s for start_s, _ in measured)
        + flops / statistics.median(flops_per_s for _, flops_per_s in measured)
        for workers, measured in found.items()
    }
