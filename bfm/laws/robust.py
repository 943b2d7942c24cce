"""Huber fits of curves whose errors have one unknown scale, and the region of parameters that they leave.

The scale sigma is the median absolute residual over .6745, times sqrt(runs / (runs - parameters)). Huber's delta is a
multiple of it (2: 99 % efficient under Gaussian errors), found in turns with the fit.

Shape legend: P parameters, R runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from bfm.laws.intervals import Region, curvature, huber, margin
from bfm.laws.result import Outlier

HUBER_SCALES = 2.0
OUTLIER_SCALES = 4.0
"""A residual beyond this many sigma is named: one run in 16,000 under Gaussian errors."""
_ROUNDS = 5
_EXACT = 1e-6
"""Residuals below a millionth are rounding, not noise."""
_TIGHT = 1e-12
Model = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class RobustFit:
    """A fitted curve."""

    theta_P: np.ndarray
    residual_R: np.ndarray
    scale: float
    """sigma."""
    delta: float
    """Huber's; infinite for least squares."""
    region: Region

    @property
    def objective(self) -> float:
        """Sum of Huber's losses."""
        return float(huber(self.residual_R, self.delta)[0].sum())

    def excess(self, narrower: RobustFit) -> float:
        """p-value of a model of fewer parameters fitted with the same delta: small where it misses structure."""
        lost, free = len(self.theta_P) - len(narrower.theta_P), len(self.residual_R) - len(self.theta_P)
        _, psi_R, curvature_R = huber(self.residual_R, self.delta)
        spread = max(float((psi_R**2).sum()) / free, _EXACT**2)
        deviance = 2 * (narrower.objective - self.objective) * float(curvature_R.mean()) / spread
        return float(stats.f.sf(deviance / lost, lost, free))

    def outliers(self, names: Sequence[str]) -> tuple[Outlier, ...]:
        """Runs beyond OUTLIER_SCALES, worst first."""
        scale = max(self.scale, _EXACT)
        sizes_R = np.abs(self.residual_R) / scale
        worst = [place for place in np.argsort(-sizes_R) if sizes_R[place] > OUTLIER_SCALES]
        return tuple(Outlier(names[p], float(self.residual_R[p]), f"{sizes_R[p]:.1f} sigma") for p in worst)


def robust_fit(
    model: Model,
    observed_R: np.ndarray,
    start_P: np.ndarray,
    bounds: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    huber_scales: float = HUBER_SCALES,
    delta: float | None = None,
) -> RobustFit:
    """Least Huber loss of `observed - model(theta)`; `model` gives (prediction_R, jacobian_RP).

    `huber_scales` is delta over sigma (infinite: least squares); `delta` fixes it, to compare models. Needs more runs
    than parameters.
    """
    theta_P = start_P
    runs, num_params = len(observed_R), len(start_P)
    current = math.inf if delta is None else delta
    for _ in range(_ROUNDS):
        theta_P = _minimise(model, observed_R, theta_P, bounds, current)
        residual_R = observed_R - model(theta_P)[0]
        scale = float(np.median(np.abs(residual_R))) / 0.6745 * math.sqrt(runs / (runs - num_params))
        wanted = max(huber_scales * scale, _EXACT)
        if delta is not None or math.isinf(huber_scales) or abs(wanted / current - 1) < 1e-3:
            break
        current = wanted
    _, jacobian_RP = model(theta_P)
    information_PP = curvature(residual_R, current, num_params) * jacobian_RP.T @ jacobian_RP
    edge = max(margin(residual_R, current, num_params), _EXACT**2)

    def objective(theta_P: np.ndarray) -> tuple[float, np.ndarray]:
        with np.errstate(over="ignore", invalid="ignore"):
            prediction_R, jacobian_RP = model(theta_P)
            rho_R, psi_R, _ = huber(observed_R - prediction_R, current)
            return float(rho_R.sum()), -jacobian_RP.T @ psi_R

    return RobustFit(theta_P, residual_R, scale, current, Region(theta_P, objective, information_PP, edge))


def _minimise(
    model: Model,
    observed_R: np.ndarray,
    start_P: np.ndarray,
    bounds: tuple[np.ndarray, np.ndarray] | None,
    delta: float,
) -> np.ndarray:
    robust = {} if math.isinf(delta) else {"loss": "huber", "f_scale": delta}
    found = optimize.least_squares(
        lambda theta_P: model(theta_P)[0] - observed_R,
        start_P,
        jac=lambda theta_P: model(theta_P)[1],
        bounds=(-math.inf, math.inf) if bounds is None else bounds,
        x_scale="jac",
        ftol=_TIGHT,
        xtol=_TIGHT,
        gtol=_TIGHT,
        max_nfev=200,
        **robust,
    )
    return found.x


def coordinate(place: int) -> Callable[[np.ndarray], float]:
    """The parameter at a place, as the quantity of an interval."""
    return lambda theta_P: float(theta_P[place])
