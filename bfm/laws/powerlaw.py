"""Straight lines in log-log coordinates through estimated points: exponent and coefficient of a power law.

Shape legend: K points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from bfm.laws.result import CONFIDENCE, UNKNOWN, Estimate
from bfm.laws.runs import SAME

_DOUBT = 0.05
"""Scatter about the line that chance alone gives less often than this widens the intervals."""


def line(x_K: np.ndarray, deviation_K: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(weights of the slope, weights of the intercept at x = 0): slope = weights_K @ y_K.

    Least squares, weighted with the inverse variances of the points where their standard deviations are given. Needs
    two different x.
    """
    weight_K = np.ones(len(x_K)) if deviation_K is None else deviation_K**-2.0
    weight_K = weight_K / weight_K.sum()
    # About the centre slope and intercept do not disturb each other; far from the origin they are all but one number.
    centre = float(weight_K @ x_K)
    slope_K = weight_K * (x_K - centre) / float(weight_K @ (x_K - centre) ** 2)
    return slope_K, weight_K - centre * slope_K


def inflation(ratio: float, own: int, free: float = math.inf) -> float:
    """What a line's intervals are multiplied with where its points scatter more than their errors explain, else 1.

    `ratio` is their chi2 per degree of freedom, of which there are `own`; `free` are those behind the errors' scale.
    The wider interval is that of the scatter itself, with Student's factor for its few degrees (R. T. Birge 1932).
    """
    if own < 1 or stats.f.sf(ratio, own, min(free, 1e6)) > _DOUBT:
        return 1.0
    level = 0.5 + CONFIDENCE / 2
    return max(1.0, math.sqrt(ratio) * float(stats.t.ppf(level, own) / stats.t.ppf(level, min(free, 1e6))))


@dataclass(frozen=True)
class PowerLaw:
    """ln of an optimum over ln C."""

    reach: float
    """Half width of an interval, in standard errors."""
    log_c_K: np.ndarray
    log_x_K: np.ndarray
    covariance_KK: np.ndarray

    def own(self, flops: float) -> Estimate | None:
        """The optimum of one of the budgets, as it is at that budget alone; None where it has none."""
        weight_K = np.isclose(self.log_c_K, math.log(flops), rtol=0, atol=SAME).astype(float)
        if weight_K.sum() != 1:
            return None
        return self._of(weight_K, self.covariance_KK).exp()

    def exponent(self) -> Estimate:
        """Of the optimum in C; unknown with fewer than two budgets."""
        return self._of(self._line()[0], self._scattered()) if len(self.log_c_K) > 1 else UNKNOWN

    def at(self, flops: float) -> Estimate:
        """The law at any C; unknown with fewer than two budgets."""
        if len(self.log_c_K) < 2:
            return UNKNOWN.exp()
        slope_K, intercept_K = self._line()
        return self._of(intercept_K + math.log(flops) * slope_K, self._scattered()).exp()

    def _of(self, weight_K: np.ndarray, covariance_KK: np.ndarray) -> Estimate:
        middle = float(weight_K @ self.log_x_K)
        half = self.reach * math.sqrt(float(weight_K @ covariance_KK @ weight_K))
        return Estimate.around(middle, half)

    def _line(self) -> tuple[np.ndarray, np.ndarray]:
        return line(self.log_c_K, np.sqrt(np.diag(self._scattered())))

    def _scattered(self) -> np.ndarray:
        """Covariance of the optima about the line: their errors, and as much again as they scatter."""
        slope_K, intercept_K = line(self.log_c_K)
        rest_K = self.log_x_K - intercept_K @ self.log_x_K - slope_K @ self.log_x_K * self.log_c_K
        scatter = float(rest_K @ rest_K) / max(len(rest_K) - 2, 1)
        return np.asarray(self.covariance_KK + scatter * np.eye(len(rest_K)))
