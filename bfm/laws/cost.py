"""C as a function of N and D, C = scale * N^power * D, and the C of a table at which optima are of interest.

Shape legend: R runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from bfm.laws.runs import Runs

_CONSTANT = 0.02
_FEWEST = 3
_SAME = 0.1
"""In ln C: one budget."""
NEAR = math.log(2.0) + 1e-6
"""Runs whose ln C is so far off are near a C."""


@dataclass(frozen=True)
class Cost:
    """C = scale * N^power * D."""

    scale: float
    power: float
    words: str
    """How it was found."""

    def flops(self, params: Any, events: Any) -> Any:
        """C, of numbers or arrays."""
        return self.scale * params**self.power * events

    def events(self, params: Any, flops: float) -> Any:
        """D that C pays for at N, of a number or an array."""
        return flops / (self.scale * params**self.power)


def cost_of(runs: Runs) -> Cost:
    """6 N D without a column flops; the median C / (N D) where it is one number; else the power of N that fits best."""
    if not runs.has("flops"):
        return Cost(6.0, 1.0, "C = 6 N D (the runs give no C)")
    log_n_R = np.log(runs["params"])
    log_ratio_R = np.log(runs["flops"]) - log_n_R - np.log(runs["events"])
    middle = float(np.median(log_ratio_R))
    if np.quantile(np.abs(log_ratio_R - middle), 0.9) <= _CONSTANT:
        return Cost(math.exp(middle), 1.0, f"C = {math.exp(middle):.4g} N D (median over the runs)")
    slope, level = (float(value) for value in np.polyfit(log_n_R, log_ratio_R, 1))
    apart = float(np.sqrt(np.mean((log_ratio_R - level - slope * log_n_R) ** 2)))
    scale, power = math.exp(level), 1 + slope
    return Cost(scale, power, f"C = {scale:.4g} N^{power:.4f} D (fitted to the runs' C, within {apart:.1%})")


def cost_levels(runs: Runs, log_c_R: np.ndarray) -> list[float]:
    """The C to give optima at: iso-FLOP groups of three runs or more; without two such, unless all runs are one, powers
    of ten and the top."""
    if runs.has("budget") or runs.has("flops"):
        groups = runs.budgets()
        close = {c: np.ptp(log_c_R[places]) < _SAME or runs.has("budget") for c, places in groups.items()}
        found = [flops for flops, places in groups.items() if len(places) >= _FEWEST and close[flops]]
        if len(found) > 1 or (found and len(groups) == 1):
            return found
    low, top = log_c_R.min() / math.log(10), float(np.exp(log_c_R.max()))
    powers = [10.0**power for power in range(math.ceil(low), math.floor(math.log10(top)) + 1)]
    return [*(flops for flops in powers if math.log(top / flops) > _SAME), top]


def unbracketed(log_n_R: np.ndarray, log_c_R: np.ndarray, log_c: float, log_n: float) -> str:
    """Why the runs near a C do not bracket a best N there; empty where they do."""
    near_R = log_n_R[np.abs(log_c_R - log_c) <= NEAR]
    if len(near_R) == 0:
        return "no run within a factor of 2 of this C: the law alone says it"
    if not (near_R < log_n).any():
        return "no smaller run near this C"
    return "" if (near_R > log_n).any() else "no larger run near this C"
