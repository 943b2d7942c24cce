"""Huber fits of curves whose errors have one unknown scale, and the region of parameters that they leave.

The scale sigma is the median absolute residual over .6745, without as many of the smallest as there are parameters,
which say nothing. Huber's delta is 2.5 sigma (all but 1 % of Gaussian residuals are below it), found in turns with the
fit, where it is not given.

Shape legend: P parameters, R runs, S rows of a prior, M = R + S.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import optimize, stats

from bfm.laws.intervals import Region, curvature, huber, margin
from bfm.laws.result import CONFIDENCE, Outlier

OUTLIER_SCALES = 4.0
"""A residual beyond this many sigma is named: one run in 16,000 under Gaussian errors."""
_HUBER_SCALES = 2.5
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
    """Huber's."""
    region: Region
    free: int
    """Rows, those of a prior among them, less parameters."""

    @property
    def objective(self) -> float:
        """Sum of Huber's losses."""
        return self.region.objective(self.theta_P)[0]

    @property
    def errors_P(self) -> np.ndarray:
        """Standard errors of the parameters, as far as the model is linear."""
        return np.sqrt(self._variance * np.diag(np.linalg.pinv(self.region.information_PP, hermitian=True)))

    @property
    def _variance(self) -> float:
        """Of the residuals' rho', over the curvature of rho: read off the region's edge."""
        return 2 * self.region.margin / float(stats.f.ppf(CONFIDENCE, 1, self.free))

    def missed(self, narrower: RobustFit) -> float:
        """chi2 per lost parameter of what a narrower model misses, fitted with the same delta; F where it is true."""
        lost = len(self.theta_P) - len(narrower.theta_P)
        return max(0.0, 2 * (narrower.objective - self.objective) / self._variance / lost)

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
    delta: float | None = None,
    prior: Model | None = None,
) -> RobustFit:
    """Least Huber loss of `observed - model(theta)`; `model` gives (prediction_R, jacobian_RP).

    `delta` fixes Huber's, to compare models or as published. `prior` gives further rows that are expected to be 0 +- 1:
    (rest_S, jacobian_SP); they count in units of sigma. Needs more rows than parameters.
    """
    theta_P = start_P
    num_params, free = len(start_P), len(observed_R) - len(start_P)
    if prior is not None:
        free += len(prior(start_P)[0])

    def scale_of(theta_P: np.ndarray) -> float:
        size_R = np.sort(np.abs(observed_R - model(theta_P)[0]))
        return float(np.median(size_R[len(size_R) - free :])) / 0.6745

    current, scale = (math.inf, scale_of(start_P)) if delta is None else (delta, delta / _HUBER_SCALES)
    for _ in range(_ROUNDS):
        rows = partial(_rows, model, observed_R, prior, scale)
        theta_P = _minimise(rows, theta_P, bounds, current)
        scale = scale_of(theta_P)
        wanted = max(_HUBER_SCALES * scale, _EXACT)
        if delta is not None or abs(wanted / current - 1) < 1e-3:
            break
        current = wanted
    rest_M, jacobian_MP = rows(theta_P)
    information_PP = curvature(rest_M, current, num_params) * jacobian_MP.T @ jacobian_MP
    edge = max(margin(rest_M, current, num_params), _EXACT**2)

    def objective(theta_P: np.ndarray) -> tuple[float, np.ndarray]:
        with np.errstate(over="ignore", invalid="ignore"):
            rest_M, jacobian_MP = rows(theta_P)
            rho_M, psi_M = huber(rest_M, current)
            return float(rho_M.sum()), jacobian_MP.T @ psi_M

    region = Region(theta_P, objective, information_PP, edge)
    return RobustFit(theta_P, -rest_M[: len(observed_R)], scale, current, region, free)


def _rows(
    model: Model, observed_R: np.ndarray, prior: Model | None, scale: float, theta_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(fitted minus observed, then the prior's rows, (M,), its derivatives, (M, P))."""
    prediction_R, jacobian_RP = model(theta_P)
    if prior is None:
        return prediction_R - observed_R, jacobian_RP
    rest_S, jacobian_SP = prior(theta_P)
    return (
        np.concatenate([prediction_R - observed_R, scale * rest_S]),
        np.concatenate([jacobian_RP, scale * jacobian_SP]),
    )


def _minimise(
    rows: Model, start_P: np.ndarray, bounds: tuple[np.ndarray, np.ndarray] | None, delta: float
) -> np.ndarray:
    robust = {} if math.isinf(delta) else {"loss": "huber", "f_scale": delta}
    found = optimize.least_squares(
        lambda theta_P: rows(theta_P)[0],
        start_P,
        jac=lambda theta_P: rows(theta_P)[1],
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
