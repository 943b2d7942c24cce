"""What an event costs at a size, and the C of a table at which optima are of interest.

Shape legend: R runs, T terms of a cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

from bfm.laws.runs import Runs

_CONSTANT = 0.02
_POWERS = np.linspace(0.6, 1.6, 21)
"""Of N, where N itself leaves more of C / D open than _MISFIT."""
_MISFIT = 0.03
_FEWEST = 3
_MEANT, _MOST = 0.5, 20
"""Least share of the runs in budgets that were meant, and most such budgets: learning curves meet by accident, too."""
_SAME = 0.1
"""In ln C: one budget."""
NEAR = math.log(2.0) + 1e-6
"""Runs whose ln C is so far off are near a C."""


@dataclass(frozen=True)
class Cost:
    """C / D = base + root N^.5 + line N^p (1 - s) + embedder N^p s + negative K: what a model's matmuls come to, p = 1
    unless the runs say otherwise.

    `middle` are the share and K at which sizes are compared: those of the middle run.
    """

    weight_T: np.ndarray
    middle: Mapping[str, float]
    words: str
    """How it was found."""
    power: float = 1.0
    misfit: float = 0.0
    """Root mean square of the runs' C / D beside it, relative."""

    def per_event(self, params: Any, share: Any = None, negatives: Any = None) -> Any:
        """C / D, of numbers or arrays; at the middle share and K where they are left out."""
        share = self.middle.get("share", 0.0) if share is None else share
        negatives = self.middle.get("negatives", 0.0) if negatives is None else negatives
        terms = _terms(params, share, negatives, self.power)
        return sum(weight * term for weight, term in zip(self.weight_T, terms, strict=True))

    def events(self, params: Any, flops: Any) -> Any:
        """D that C pays for at N, of numbers or arrays."""
        return flops / self.per_event(params)

    def slope(self, params: float) -> float:
        """Power of N with which an event's cost grows there."""
        share, negatives = (self.middle.get(name, 0.0) for name in ("share", "negatives"))
        part_T = self.weight_T * np.array(_terms(params, share, negatives, self.power))
        return float(part_T @ (0.0, 0.5, self.power, self.power, 0.0) / part_T.sum())

    def dearer(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Cost of an event of rows over that of the same sizes at the middle share and K."""
        params_R = columns["params"]
        varied = {name: columns[name] for name in self.middle if name in columns}
        return np.asarray(self.per_event(params_R, **varied) / self.per_event(params_R))


def _terms(params: Any, share: Any, negatives: Any, power: float) -> tuple[Any, ...]:
    one, grown = np.ones_like(np.asarray(params, float)), params**power
    return one, np.sqrt(params), grown * (1 - share), grown * share, negatives * one


def cost_of(runs: Runs) -> Cost:
    """6 N D without a column flops; else the terms, none below 0, that fit C / D best by relative error.

    Shares and K are terms where they differ and C tells them. Another power of N than the first is taken where that
    leaves less than half as much open.
    """
    if not runs.has("flops"):
        return Cost(np.array([0.0, 0.0, 6.0, 6.0, 0.0]), {}, "C = 6 N D (the runs give no C)")
    paid_R = runs["flops"] / runs["events"]
    varied = {
        name: runs[name] for name in ("share", "negatives") if name in runs.settings and runs[name].dtype.kind == "f"
    }
    middle: dict[str, float] = {name: float(np.median(values)) for name, values in varied.items()}
    settings = (runs["params"], varied.get("share", 0.0), varied.get("negatives", 0.0))

    def fitted(power: float) -> Cost:
        terms_RT = np.stack(_terms(*settings, power), 1)
        weight_T = nnls(terms_RT / paid_R[:, None], np.ones(len(runs)))[0]
        if "share" not in varied:
            weight_T[3] = weight_T[2]
        misfit = float(np.sqrt(np.mean((terms_RT @ weight_T / paid_R - 1) ** 2)))
        size = " N" if power == 1 else f" N^{power:.3g}"
        names = ("", " N^.5", size if "share" not in varied else f"{size} (1 - s)", f"{size} s", " K")
        shown = weight_T * (1, 1, 1, "share" in varied, 1)
        parts = " + ".join(f"{weight:.4g}{name}" for weight, name in zip(shown, names, strict=True) if weight > 0)
        words = f"C = ({parts}) D (fitted to the runs' C, within {misfit:.1%})"
        return Cost(weight_T, middle, words, power, misfit)

    first = fitted(1.0)
    if first.misfit <= _MISFIT:
        return first
    best = min(map(fitted, _POWERS), key=lambda cost: cost.misfit)
    return best if best.misfit < first.misfit / 2 else first


@dataclass(frozen=True)
class PowerCost:
    """C = scale * N^power * D: where an optimum is to have a closed form."""

    scale: float
    power: float
    words: str
    """How it was found."""

    def flops(self, params: Any, events: Any) -> Any:
        """C, of numbers or arrays."""
        return self.scale * params**self.power * events


def power_cost_of(runs: Runs) -> PowerCost:
    """6 N D without a column flops; the median C / (N D) where it is one number; else the power of N that fits best."""
    if not runs.has("flops"):
        return PowerCost(6.0, 1.0, "C = 6 N D (the runs give no C)")
    log_n_R = np.log(runs["params"])
    log_ratio_R = np.log(runs["flops"]) - log_n_R - np.log(runs["events"])
    middle = float(np.median(log_ratio_R))
    if np.quantile(np.abs(log_ratio_R - middle), 0.9) <= _CONSTANT:
        return PowerCost(math.exp(middle), 1.0, f"C = {math.exp(middle):.4g} N D (median over the runs)")
    slope, level = (float(value) for value in np.polyfit(log_n_R, log_ratio_R, 1))
    apart = float(np.sqrt(np.mean((log_ratio_R - level - slope * log_n_R) ** 2)))
    scale, power = math.exp(level), 1 + slope
    return PowerCost(scale, power, f"C = {scale:.4g} N^{power:.4f} D (fitted to the runs' C, within {apart:.1%})")


def cost_levels(runs: Runs, log_c_R: np.ndarray) -> list[float]:
    """The C to give optima at: iso-FLOP groups of three runs or more, if most runs are in one; without two such, unless
    all runs are one, powers of ten and the top."""
    if runs.has("budget") or runs.has("flops"):
        groups = runs.budgets()
        close = {c: np.ptp(log_c_R[places]) < _SAME or runs.has("budget") for c, places in groups.items()}
        found = [flops for flops, places in groups.items() if len(places) >= _FEWEST and close[flops]]
        meant = len(found) <= _MOST and sum(len(groups[flops]) for flops in found) >= _MEANT * len(runs)
        if (meant or runs.has("budget")) and (len(found) > 1 or len(groups) == 1):
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
