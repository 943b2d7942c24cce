"""How many workers a task takes, of the numbers that its tier allows.

Enters: those numbers, and the rows of the task's rung. Leaves: the numbers that pay. More workers are taken until some
have been measured to bring too little; what was not measured yet is tried.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

GAIN = 0.5
"""W times the workers pay where they are at least 1 + GAIN (W - 1) times as fast."""
_LIKE = 4.0
"""Rows say something of sizes up to so many times theirs."""


def worthwhile(counts: Sequence[int], rows: Iterable[Mapping[str, Any]], params: float | None) -> list[int]:
    """The numbers of workers that pay for a model of N = `params` (None: not known), most first.

    `counts` are ascending; the first is always among them. `rows` are those of one rung. A speed is FLOPs from
    assignment to the end of training over its seconds, so the start of a group counts.
    """
    kept = list(counts[:1])
    if len(counts) == 1:
        return kept
    speeds = _speeds(rows, params)
    for count in counts[1:]:
        less = max((known for known in kept if known in speeds), default=None)
        if less is not None and count in speeds and speeds[count] < speeds[less] * (1 + GAIN * (count / less - 1)):
            break
        kept.append(count)
    return kept[::-1]


def _speeds(rows: Iterable[Mapping[str, Any]], params: float | None) -> dict[int, float]:
    """Workers -> median FLOP/s."""
    found: dict[int, list[float]] = {}
    for row in rows:
        seconds = (row.get("train_s") or 0.0) + (row.get("warm_start_s") or 0.0)
        if row["status"] != "ok" or seconds <= 0 or "workers" not in row:
            continue
        if params is None or params / _LIKE <= row["params"] <= params * _LIKE:
            found.setdefault(row["workers"], []).append(row["task_flops"] / seconds)
    return {workers: statistics.median(speeds) for workers, speeds in found.items()}
