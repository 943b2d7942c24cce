"""The best N at each C and its power law, read off the joint model: N* = coefficient * C^exponent.

At a budget N* is where the model's own loss is least along N at that C (every other axis at its optimum), what the form
misses included; its error is that of the parameters, by the implicit derivative. The law is a line through the budgets'
ln N* in ln C, and its errors are theirs with all that they have in common, and their scatter about the line. Where
the form holds they lie on that line as they are and the law is the form's own.

Shape legend: K budgets, P parameters, R places along N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bfm.errors import UserError
from bfm.laws.cost import cost_levels
from bfm.laws.joint import Joint
from bfm.laws.joint_form import LENGTH
from bfm.laws.powerlaw import exponential, line
from bfm.laws.result import Estimate
from bfm.laws.runs import Runs

_PLACES = 201
_STEP = 0.05
"""Of differences in ln N."""
_SAME = 0.02
"""In ln C: one budget."""
_NEAR = math.log(2.0) + 1e-6


@dataclass(frozen=True)
class Optima:
    """ln N* over ln C."""

    reach: float
    """Half width of an interval, in standard errors."""
    log_c_K: np.ndarray
    log_n_K: np.ndarray
    covariance_KK: np.ndarray
    refused: dict[float, str]
    """C without an optimum -> why."""

    def own(self, flops: float) -> Estimate | None:
        """N* of one of the budgets, as it is at that budget alone; None where it has none."""
        weight_K = np.isclose(self.log_c_K, math.log(flops), rtol=0, atol=_SAME).astype(float)
        if weight_K.sum() != 1:
            return None
        return exponential(self._of(weight_K, self.covariance_KK))

    def exponent(self) -> Estimate:
        """Of N* in C."""
        return self._of(self._line()[0], self._scattered())

    def at(self, flops: float) -> Estimate:
        """N* of the law at any C."""
        slope_K, intercept_K = self._line()
        return exponential(self._of(intercept_K + math.log(flops) * slope_K, self._scattered()))

    def _of(self, weight_K: np.ndarray, covariance_KK: np.ndarray) -> Estimate:
        middle = float(weight_K @ self.log_n_K)
        half = self.reach * math.sqrt(float(weight_K @ covariance_KK @ weight_K))
        return Estimate(middle, middle - half, middle + half)

    def _line(self) -> tuple[np.ndarray, np.ndarray]:
        return line(self.log_c_K, np.sqrt(np.diag(self._scattered())))

    def _scattered(self) -> np.ndarray:
        """Covariance of the optima about the line: their errors, and as much again as they scatter."""
        slope_K, intercept_K = line(self.log_c_K)
        rest_K = self.log_n_K - intercept_K @ self.log_n_K - slope_K @ self.log_n_K * self.log_c_K
        scatter = float(rest_K @ rest_K) / max(len(rest_K) - 2, 1)
        return np.asarray(self.covariance_KK + scatter * np.eye(len(rest_K)))


def optima_of(fit: Joint, runs: Runs, batch: float | None = None) -> Optima:
    """Of the runs' budgets at a batch (default: the smallest of the runs). Raises UserError with fewer than two."""
    log_c_R = fit.problem.places.log_c_R + fit.frame.logs["flops"]
    log_n_R = np.log(runs["params"])
    found, refused = [], {}
    for flops in cost_levels(runs, log_c_R):
        near_R = log_n_R[np.abs(log_c_R - math.log(flops)) <= _NEAR]
        if len(near_R) == 0:
            refused[flops] = "no run within a factor of 2 of this C"
            continue
        optimum = _optimum(fit, flops, near_R, batch)
        if optimum is None:
            refused[flops] = "the loss has no minimum within a decade of its runs' N"
        else:
            found.append((math.log(flops), *optimum))
    if len(found) < 2:
        what = f"{len(found)} budgets have a best size, and a power law needs two"
        raise UserError(what, file=runs.source, fix="add runs of smaller and larger N")
    log_c_K, log_n_K, slope_KP = (np.array(part) for part in zip(*found, strict=True))
    return Optima(fit.reach, log_c_K, log_n_K, slope_KP @ fit.covariance_PP @ slope_KP.T, refused)


def _optimum(fit: Joint, flops: float, near_R: np.ndarray, batch: float | None) -> tuple[float, np.ndarray] | None:
    """(ln N*, its gradient by the parameters) near the runs of a budget; None without a minimum there."""
    log_n_R = np.linspace(near_R.min() - LENGTH, near_R.max() + LENGTH, _PLACES)
    place = int(np.argmin(fit.along(flops, log_n_R, batch)[0]))
    if place in (0, _PLACES - 1):
        return None
    log_n = float(log_n_R[place])
    for _ in range(4):
        around_3 = log_n + _STEP * np.array([-1.0, 0.0, 1.0])
        loss_3, jacobian_3P = fit.along(flops, around_3, batch)
        curvature = float(loss_3[2] - 2 * loss_3[1] + loss_3[0]) / _STEP**2
        if curvature <= 0:
            return None
        step = float(loss_3[2] - loss_3[0]) / (2 * _STEP) / curvature
        log_n -= float(np.clip(step, -_STEP, _STEP))
    return log_n, -(jacobian_3P[2] - jacobian_3P[0]) / (2 * _STEP) / curvature
