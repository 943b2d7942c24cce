"""Gaussian errors of rows, of trials and of what a form misses: least squares under them, and their sizes by REML.

Rows have errors of their own, all rows of a trial have one in common, and what the form misses is smooth in N and D;
all of them grow with C^growth. Their sizes and growth are those of restricted maximum likelihood.

Shape legend: R rows, P parameters (those of `miss` included), T trials.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize

from bfm.laws.joint_form import Places

_OUTLIER = 5.0
"""Robust standard deviations beyond which a row counts less: one in two million rows of Gaussian noise."""


@dataclass(frozen=True)
class Errors:
    """Sizes of the errors, in units of a row's own variance at the mean ln C."""

    trial: float = 0.0
    """Variance in common to the rows of a trial."""
    miss: float = math.exp(-7)
    """Variance of what the form misses; so little is nothing."""
    growth: float = 0.0
    """Power of C with which all standard deviations grow."""


@dataclass(frozen=True)
class Problem:
    """Minimise the squares of the whitened residuals and of the parameters' distances from their priors."""

    places: Places
    y_R: np.ndarray
    trial_R: np.ndarray
    """Number of each row's trial."""
    count_T: np.ndarray
    weight_R: np.ndarray
    """1, less for outliers: the error of a row is that of the others over this."""
    mean_P: np.ndarray
    sd_P: np.ndarray
    """Of independent normal priors, so weak that they only keep what the rows do not tell at finite values."""
    variance: float
    """Of a row's own error."""
    errors: Errors

    def white(self, values: np.ndarray) -> np.ndarray:
        """Values of shape R x P in units in which the rows' errors (but for `miss`) are independent and alike.

        k rows of a trial have the covariance I + t 1 1^T; taking a part of their mean away makes it I.
        """
        scale_R = self.weight_R * np.exp(-self.errors.growth * self.places.log_c_R)
        values = values * scale_R[:, None]
        if self.errors.trial == 0:
            return values
        by_trial, first_T = np.argsort(self.trial_R, kind="stable"), np.cumsum(self.count_T) - self.count_T
        sums = np.add.reduceat(values[by_trial], first_T, axis=0)
        part_T = (1 - 1 / np.sqrt(1 + self.count_T * self.errors.trial)) / self.count_T
        return np.asarray(values - (sums * part_T[:, None])[self.trial_R])

    def residual(self, theta_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(residuals of shape R + P, their gradient)."""
        with np.errstate(over="ignore", invalid="ignore"):
            loss_R, jacobian_RP = self.places.mean(theta_P)
            weight_P, white = self.weight_P, self.white(np.column_stack([loss_R - self.y_R, jacobian_RP]))
            rest = np.concatenate([white[:, 0], weight_P * (theta_P - self.mean_P)])
            return rest, np.concatenate([white[:, 1:], np.diag(weight_P)])

    def outlying(self, theta_P: np.ndarray) -> np.ndarray:
        """`weight_R` for the residuals at theta: 1 up to five robust standard deviations."""
        plain = replace(self, weight_R=np.ones(len(self.y_R)))
        away_R = np.abs(plain.residual(theta_P)[0][: len(self.y_R)])
        return np.minimum(1.0, _OUTLIER * 1.4826 * float(np.median(away_R)) / np.maximum(away_R, 1e-300))

    @property
    def weight_P(self) -> np.ndarray:
        """1 / standard deviation of the priors, in units of a row's own error."""
        weight_P = math.sqrt(self.variance) / self.sd_P
        weight_P[self.places.size :] = 1 / math.sqrt(self.errors.miss)
        return weight_P

    def minimise(self, theta_P: np.ndarray, iterations: int = 100) -> np.ndarray:
        """theta_P by damped Gauss-Newton steps from a start."""
        rest, jacobian = self.residual(theta_P)
        value, damping = float(rest @ rest), 1e-5
        for _ in range(iterations):
            normal_PP = jacobian.T @ jacobian
            damped_PP = normal_PP + damping * np.diag(np.diag(normal_PP))
            trial_P = theta_P - np.clip(np.linalg.solve(damped_PP, jacobian.T @ rest), -2.0, 2.0)
            rest_new, jacobian_new = self.residual(trial_P)
            value_new = float(rest_new @ rest_new)
            damping *= 10
            if value_new < value:
                settled = value - value_new < 1e-8 * value
                theta_P, rest, jacobian, value = trial_P, rest_new, jacobian_new, value_new
                damping = max(damping / 100, 1e-12)
                if settled:
                    break
            elif damping > 1e8:
                break
        return theta_P

    def value(self, theta_P: np.ndarray) -> float:
        """What `minimise` minimises."""
        rest, _ = self.residual(theta_P)
        return float(rest @ rest)

    def free(self, inverse_PP: np.ndarray) -> float:
        """Degrees of freedom: rows less the parameters that they tell, what priors tell left out.

        `inverse_PP` is that of the squared gradient of `residual`.
        """
        size = self.places.size
        by_priors = self.weight_P[:size] ** 2 * np.diag(inverse_PP)[:size]
        return len(self.y_R) - size + float(by_priors.sum())

    def judged(self, theta_P: np.ndarray) -> tuple[Problem, np.ndarray, float]:
        """(the problem with its variance, its minimum, -2 ln of the restricted likelihood), from near the minimum."""
        here, rows, size = self, len(self.y_R), self.places.size
        for _ in range(2):
            theta_P = here.minimise(theta_P, 20)
            rest, jacobian = here.residual(theta_P)
            normal_PP = jacobian.T @ jacobian
            # Of the priors only those of `miss` are errors.
            told = np.r_[0:rows, rows + size : len(rest)]
            variance = float(rest[told] @ rest[told]) / here.free(np.linalg.inv(normal_PP))
            here = replace(here, variance=variance)
        value = (rows - size) * math.log(here.variance) + float(np.linalg.slogdet(normal_PP)[1])
        value += float(rest @ rest) / here.variance
        value += float(np.log1p(here.count_T * here.errors.trial).sum())
        value += 2 * here.errors.growth * float(here.places.log_c_R.sum())
        value += (len(theta_P) - size) * math.log(here.errors.miss)
        return here, theta_P, value


def by_reml(problem: Problem, places: Places, theta_P: np.ndarray) -> tuple[Problem, np.ndarray]:
    """The problem under the errors that REML finds, and its minimum; `places` are those without growth."""
    shared = 0.95 if problem.count_T.max() > 1 else 0.0
    bounds = [(0.0, shared), (-7.0, 9.0), (-0.6, 0.6)]
    latest = theta_P

    def at(place_3: np.ndarray) -> tuple[Problem, np.ndarray, float]:
        nonlocal latest
        errors = Errors(place_3[0] / (1 - place_3[0]), math.exp(place_3[1]), place_3[2])
        here = replace(problem, places=places.growing(errors.growth), errors=errors, variance=variance)
        found = here.judged(latest)
        latest = found[1]
        return found

    variance = problem.judged(theta_P)[0].variance
    simplex = np.array([[0.2, -3.0, 0.0], [0.5, -3.0, 0.0], [0.2, 1.0, 0.0], [0.2, -3.0, 0.1]])
    simplex[:, 0] = np.minimum(simplex[:, 0], shared)
    options = {"initial_simplex": simplex, "xatol": 0.03, "fatol": 0.05, "maxfev": 100}
    found = optimize.minimize(
        lambda place: at(place)[2], simplex[0], method="Nelder-Mead", bounds=bounds, options=options
    )
    return at(found.x)[:2]
