"""Straight lines in log-log coordinates through estimated points: exponent and coefficient of a power law.

Shape legend: K points.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from bfm.laws.result import CONFIDENCE

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
