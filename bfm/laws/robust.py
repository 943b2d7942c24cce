"""Huber fits of curves whose errors have one unknown scale, and profile-likelihood intervals of what they imply.

The scale sigma is the median absolute residual over .6745, without as many of the smallest as there are parameters,
which say nothing. Huber's delta is 2.5 sigma (all but 1 % of Gaussian residuals are below it), found in turns with the
fit, where it is not given.

The 95 % interval of a quantity g(theta) is the range of g over all theta whose objective is at most
`objective(theta_hat) + margin`. For residuals r_i with loss rho the margin follows from the robust deviance
2 (obj - obj_min) mean(rho'') / (sum rho'^2 / (n - p)), which is F(1, n - p) under independent symmetric errors
(Heritier and Ronchetti 1994; exact for Gaussian errors and least squares, up to curvature).

Shape legend: P parameters, R runs, S rows of a prior, M = R + S.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import optimize, stats

from bfm.laws.result import CONFIDENCE, Estimate, Outlier

METHOD = "profile likelihood, robust deviance against F(1, runs - parameters)"
OUTLIER_SCALES = 4.0
"""A residual beyond this many sigma is named: one run in 16,000 under Gaussian errors."""
_HUBER_SCALES = 2.5
_ROUNDS = 5
_EXACT = 1e-6
"""Residuals below a millionth are rounding, not noise."""
_TIGHT = 1e-12
_STEP = 1e-4
"""Of numerical derivatives, in units of the region: what it leaves in an end is its square."""
_STARTS = (1.0, 0.3, 0.0)
_NEAR = 0.02
"""The deviance at an end may miss its bound by this share."""
_WINDOW = 0.6
"""Least half width over which the density of errors at 0 is taken, in robust standard deviations."""
Model = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


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
    information_PP = _curvature(rest_M, current, num_params) * jacobian_MP.T @ jacobian_MP
    edge = max(_margin(rest_M, current, num_params), _EXACT**2)

    def objective(theta_P: np.ndarray) -> tuple[float, np.ndarray]:
        with np.errstate(over="ignore", invalid="ignore"):
            rest_M, jacobian_MP = rows(theta_P)
            rho_M, psi_M = _huber(rest_M, current)
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


def _margin(residual_R: np.ndarray, delta: float, num_params: int) -> float:
    """Height of the region's edge under Huber's loss of the residuals at the fit."""
    free = len(residual_R) - num_params
    spread = float((_huber(residual_R, delta)[1] ** 2).sum()) / free
    return 0.5 * float(stats.f.ppf(CONFIDENCE, 1, free)) * spread / _curvature(residual_R, delta, num_params)


def _curvature(residual_R: np.ndarray, delta: float, num_params: int) -> float:
    """Mean of rho'', the share of errors within delta of 0.

    Where delta is far below the noise few residuals are that near, and a fit that passes through as many runs as it
    has parameters makes them seem more; so their density is taken over a wider window.
    """
    size_R = np.abs(residual_R)
    window = max(delta, _WINDOW * float(np.median(size_R)) / 0.6745)
    inside = max(float((size_R <= window).mean()), num_params / len(size_R))
    return inside if window == delta else inside * delta / window


def _huber(residual_R: np.ndarray, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """(rho, rho') of Huber's loss: quadratic up to delta, linear beyond."""
    size_R = np.abs(residual_R)
    rho_R = np.where(size_R <= delta, 0.5 * residual_R**2, delta * (size_R - 0.5 * delta))
    return rho_R, np.clip(residual_R, -delta, delta)


def _gradient(function: Callable[[np.ndarray], float], z_P: np.ndarray) -> np.ndarray:
    steps_PP = _STEP * np.eye(len(z_P))
    return np.array([(function(z_P + step) - function(z_P - step)) / (2 * _STEP) for step in steps_PP])


def coordinate(place: int) -> Callable[[np.ndarray], float]:
    """The parameter at a place, as the quantity of an interval."""
    return lambda theta_P: float(theta_P[place])
