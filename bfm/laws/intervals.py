"""Profile-likelihood intervals of anything that a fit implies, for least squares and Huber objectives.

The 95 % interval of a quantity g(theta) is the range of g over all theta whose objective is at most
`objective(theta_hat) + margin`. For residuals r_i with loss rho the margin follows from the robust deviance
2 (obj - obj_min) mean(rho'') / (sum rho'^2 / (n - p)), which is F(1, n - p) under independent symmetric errors
(Heritier and Ronchetti 1994; exact for Gaussian errors and least squares, up to curvature).

Shape legend: P parameters, R runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from bfm.laws.result import CONFIDENCE, Estimate

METHOD = "profile likelihood, robust deviance against F(1, runs - parameters)"
_STEP = 1e-4
"""Of numerical derivatives, in units of the region: what it leaves in an end is its square."""
_STARTS = (1.0, 0.3, 0.0)
_NEAR = 0.02
"""The deviance at an end may miss its bound by this share."""
_WINDOW = 0.6
"""Least half width over which the density of errors at 0 is taken, in robust standard deviations."""


@dataclass(frozen=True)
class Region:
    """The parameters that the data do not refuse."""

    theta_P: np.ndarray
    objective: Callable[[np.ndarray], tuple[float, np.ndarray]]
    """theta -> (value, gradient_P)."""
    information_PP: np.ndarray
    """Second derivative of the objective at theta_P (Gauss-Newton)."""
    margin: float
    """The objective of its edge, above that of theta_P."""

    def interval(self, quantity: Callable[[np.ndarray], float]) -> Estimate:
        """Range of a quantity over the region; an end that the region does not close is infinite."""
        return Estimate(quantity(self.theta_P), self._end(quantity, -1.0), self._end(quantity, 1.0))

    def _end(self, quantity: Callable[[np.ndarray], float], sign: float) -> float:
        """Largest sign * quantity in the region, in coordinates where the region is close to the unit ball."""
        values, vectors = np.linalg.eigh(self.information_PP)
        # A direction without information has no scale of its own; it gets that of the weakest one that counts.
        values = np.maximum(values, 1e-12 * values.max())
        axes_PP = vectors * np.sqrt(2 * self.margin / values)
        start, _ = self.objective(self.theta_P)
        # Value and gradient are asked for one after the other at the same place.
        latest: dict[bytes, tuple[float, np.ndarray]] = {}

        def at(z_P: np.ndarray) -> tuple[float, np.ndarray]:
            key = z_P.tobytes()
            if key not in latest:
                latest.clear()
                latest[key] = self.objective(self.theta_P + axes_PP @ z_P)
            return latest[key]

        def inside(z_P: np.ndarray) -> float:
            return 1.0 - (at(z_P)[0] - start) / self.margin

        def slope(z_P: np.ndarray) -> np.ndarray:
            return -axes_PP.T @ at(z_P)[1] / self.margin

        def target(z_P: np.ndarray) -> float:
            return -sign * quantity(self.theta_P + axes_PP @ z_P)

        direction_P = -_gradient(target, np.zeros(len(self.theta_P)))
        length = float(np.linalg.norm(direction_P))
        if length == 0 or not math.isfinite(length):
            return quantity(self.theta_P)
        # A search that starts where the region is curved most can leave it and not come back; a shorter start does not.
        for share in _STARTS:
            found = optimize.minimize(
                lambda z_P: target(z_P) / length,
                share * direction_P / length,
                jac=lambda z_P: _gradient(target, z_P) / length,
                constraints={"type": "ineq", "fun": inside, "jac": slope},
                method="SLSQP",
                options={"maxiter": 200, "ftol": 1e-6},
            )
            value = -sign * target(found.x)
            beyond = sign * (value - quantity(self.theta_P)) >= 0
            if found.success and inside(found.x) > -_NEAR and beyond:
                return float(value)
        return sign * math.inf


def margin(residual_R: np.ndarray, delta: float, num_params: int) -> float:
    """Height of the region's edge under Huber's loss of the residuals at the fit."""
    free = len(residual_R) - num_params
    spread = float((huber(residual_R, delta)[1] ** 2).sum()) / free
    return 0.5 * float(stats.f.ppf(CONFIDENCE, 1, free)) * spread / curvature(residual_R, delta, num_params)


def curvature(residual_R: np.ndarray, delta: float, num_params: int) -> float:
    """Mean of rho'', the share of errors within delta of 0.

    Where delta is far below the noise few residuals are that near, and a fit that passes through as many runs as it
    has parameters makes them seem more; so their density is taken over a wider window.
    """
    size_R = np.abs(residual_R)
    window = max(delta, _WINDOW * float(np.median(size_R)) / 0.6745)
    inside = max(float((size_R <= window).mean()), num_params / len(size_R))
    return inside if window == delta else inside * delta / window


def huber(residual_R: np.ndarray, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """(rho, rho') of Huber's loss: quadratic up to delta, linear beyond."""
    size_R = np.abs(residual_R)
    rho_R = np.where(size_R <= delta, 0.5 * residual_R**2, delta * (size_R - 0.5 * delta))
    return rho_R, np.clip(residual_R, -delta, delta)


def _gradient(function: Callable[[np.ndarray], float], z_P: np.ndarray) -> np.ndarray:
    steps_PP = _STEP * np.eye(len(z_P))
    return np.array([(function(z_P + step) - function(z_P - step)) / (2 * _STEP) for step in steps_PP])
