"""One model of a metric over all that a sweep varies, fitted to all of its rows: what holds when a policy chose them.

The mean is that of `joint_form`. About it are Gaussian errors: each row's own, what all rows of a trial have in common,
and what the form misses, smooth in N and D; all of them grow with C^growth. Their sizes and growth are those of
restricted maximum likelihood (REML). A policy that looks at nothing but rows does not bias such a likelihood as long as
every row is in it and what it chose is modelled (Rubin 1976): rows are not to be picked by how good they are, nor
budgets by where their best row lies. Intervals are t intervals in the parameters' logs, from the inverse information;
`joint_optimum` reads N* off the fit, and `Joint.predict` what a run will reach.

Shape legend: R rows, P parameters (those of `miss` included), M functions of `miss`, T trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, stats

from bfm.errors import UserError
from bfm.laws.cost import Cost, cost_of
from bfm.laws.joint_form import AXES, LOG_ALPHA, LOG_BETA, LOG_E, Frame, Places
from bfm.laws.powerlaw import exponential
from bfm.laws.result import CONFIDENCE, Estimate
from bfm.laws.runs import Runs
from bfm.laws.transform import to_loss

_SLOPE_SD = 0.5
"""Prior standard deviation of an optimum's power in what moves it: where the rows do not tell, it does not move."""
_SKEW_SD = 0.5
"""Prior standard deviation of a bowl's skew: a side of a decade may be three times as high as a parabola's."""
_WIDE = 3.0
"""Prior standard deviation of logs: a factor of 400 either way."""
_STARTS = (0.08, 0.16, 0.32, 0.64)
_KEPT_STARTS = 4
_OUTLIER = 5.0
"""Robust standard deviations beyond which a row counts less: one in two million rows of Gaussian noise."""
_ROUNDS = 4
_SAME = 0.02
"""Logs of a column that does not vary differ by less."""


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
        """Values of shape R or R x P in units in which the rows' errors (but for `miss`) are independent and alike.

        k rows of a trial have the covariance I + t 1 1^T; taking a part of their mean away makes it I.
        """
        scale_R = self.weight_R * np.exp(-self.errors.growth * self.places.log_c_R)
        values = values * scale_R.reshape(-1, *([1] * (values.ndim - 1)))
        if self.errors.trial == 0:
            return values
        sums = np.zeros((len(self.count_T), *values.shape[1:]))
        np.add.at(sums, self.trial_R, values)
        part_T = (1 - 1 / np.sqrt(1 + self.count_T * self.errors.trial)) / self.count_T
        sums *= part_T.reshape(-1, *([1] * (values.ndim - 1)))
        return np.asarray(values - sums[self.trial_R])

    def residual(self, theta_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(residuals of shape R + P, their gradient)."""
        with np.errstate(over="ignore", invalid="ignore"):
            loss_R, jacobian_RP = self.places.mean(theta_P)
            weight_P = self.weight_P
            rest = np.concatenate([self.white(loss_R - self.y_R), weight_P * (theta_P - self.mean_P)])
            return rest, np.concatenate([self.white(jacobian_RP), np.diag(weight_P)])

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

    def judged(self, theta_P: np.ndarray) -> tuple[Problem, np.ndarray, float]:
        """(the problem with its variance, its minimum, -2 ln of the restricted likelihood), from near the minimum."""
        here, rows, size = self, len(self.y_R), self.places.size
        for _ in range(2):
            theta_P = here.minimise(theta_P, 20)
            rest, jacobian = here.residual(theta_P)
            # Of the priors only those of `miss` are errors.
            told = np.r_[0:rows, rows + size : len(rest)]
            here = replace(here, variance=float(rest[told] @ rest[told]) / (rows - size))
        value = (rows - size) * math.log(here.variance) + float(np.linalg.slogdet(jacobian.T @ jacobian)[1])
        value += float(np.log1p(here.count_T * here.errors.trial).sum())
        value += 2 * here.errors.growth * float(here.places.log_c_R.sum())
        value += (len(theta_P) - size) * math.log(here.errors.miss)
        return here, theta_P, value


@dataclass(frozen=True)
class Joint:
    """The fitted model, ready to be asked."""

    frame: Frame
    cost: Cost
    problem: Problem
    theta_P: np.ndarray
    covariance_PP: np.ndarray
    least_batch: float
    """The smallest of the rows; 1 where they have none."""

    @property
    def reach(self) -> float:
        """Half width of an interval, in standard errors."""
        free = len(self.problem.y_R) - self.problem.places.size
        return float(stats.t.ppf(0.5 + CONFIDENCE / 2, free))

    def parameter(self, place: int) -> Estimate:
        """exp of the parameter at a place of theta, such as LOG_E or LOG_ALPHA."""
        half = self.reach * math.sqrt(float(self.covariance_PP[place, place]))
        middle = float(self.theta_P[place])
        return exponential(Estimate(middle, middle - half, middle + half))

    def along(self, flops: float, log_n_R: np.ndarray, batch: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(loss, its gradient) at sizes N of one C, every other axis at its optimum, as `Places.mean`."""
        params_R = np.exp(log_n_R)
        columns = {"events": self.cost.events(params_R, flops), "params": params_R}
        values = {"flops": flops, "batch": batch or self.least_batch, **dict.fromkeys(AXES, 1.0)}
        columns |= {name: np.full(len(params_R), value) for name, value in values.items()}
        where = self.frame.places(columns).growing(self.problem.errors.growth)
        return where.at_best(self.theta_P).mean(self.theta_P)

    def predict(self, columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(loss, half width of the 95 % prediction interval) of new runs of new trials, each of shape R."""
        problem = self.problem
        where = self.frame.places(columns).growing(problem.errors.growth)
        loss_R, jacobian_RP = where.mean(self.theta_P)
        own_R = 1 + problem.errors.trial + problem.errors.miss * where.beyond_R
        variance_R = problem.variance * np.exp(2 * problem.errors.growth * where.log_c_R) * own_R
        variance_R += np.einsum("rp,pq,rq->r", jacobian_RP, self.covariance_PP, jacobian_RP)
        return loss_R, self.reach * np.sqrt(variance_R)


def fit_joint(runs: Runs) -> Joint:
    """Fit the model to every row of a sweep.

    Needs params, events and loss; takes flops, batch, share, rate and negatives where they vary, and `curve` for the
    trials. What varies and is no column is noise of the trials to it: where a policy chose that too, and it matters,
    the intervals do not hold. Raises UserError where there are not twice as many rows as parameters.
    """
    runs.require("the joint model", "params", "events", "loss")
    cost, y_R = cost_of(runs), to_loss(runs.metric, runs["loss"])
    columns = _columns(runs, cost)
    frame = Frame.of(columns)
    places = frame.places(columns)
    if len(y_R) < 2 * places.size:
        what = f"{len(y_R)} rows for {places.size} parameters of N, D{''.join(f', {name}' for name in frame.axes)}"
        raise UserError(what, file=runs.source, fix=f"let the sweep make {2 * places.size} rows")
    trials = runs["curve"] if runs.has("curve") else np.arange(len(y_R))
    _, trial_R, count_T = np.unique(trials, return_inverse=True, return_counts=True)
    alike_R = np.ones(len(y_R))
    problem = Problem(places, y_R, trial_R, count_T, alike_R, *_prior(places, y_R), 1e-6 * float(y_R.var()), Errors())
    problem, theta_P = _by_reml(problem, places, _first(problem))
    for _ in range(_ROUNDS):
        weight_R = problem.outlying(theta_P)
        if np.allclose(weight_R, problem.weight_R, atol=0.1):
            break
        problem, theta_P = _by_reml(replace(problem, weight_R=weight_R), places, theta_P)
    _, jacobian = problem.residual(theta_P)
    covariance_PP = problem.variance * np.linalg.inv(jacobian.T @ jacobian)
    least = float(runs["batch"].min()) if runs.has("batch") else 1.0
    return Joint(frame, cost, problem, theta_P, covariance_PP, least)


def _columns(runs: Runs, cost: Cost) -> dict[str, np.ndarray]:
    """N, D, C and whatever else varies."""
    flops_R = runs["flops"] if runs.has("flops") else cost.flops(runs["params"], runs["events"])
    found = {"params": runs["params"], "events": runs["events"], "flops": flops_R}
    others = (name for name in (*AXES, "batch") if runs.has(name) and runs[name].min() > 0)
    return found | {name: runs[name] for name in others if np.ptp(np.log(runs[name])) > _SAME}


def _prior(places: Places, y_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean_P, sd_P); those of `miss` are of the errors."""
    spread = math.log(max(float(np.ptp(y_R)), 1e-12))
    mean = [spread - 1, spread - 1, math.log(float(y_R.min())) - 0.5, math.log(0.3), math.log(0.3)]
    sd = [_WIDE, _WIDE, _WIDE, 1.0, 1.0]
    if places.log_batch_R is not None:
        mean, sd = [*mean, float(places.log_batch_R.max()), 0.0], [*sd, _WIDE, _SLOPE_SD]
    for x_R, drivers_RQ in places.axes.values():
        count, range_x = drivers_RQ.shape[1], max(float(np.ptp(x_R)), 1.0)
        mean += [spread - 2 * math.log(range_x), 0.0, float(x_R.mean()), *[0.0] * count]
        sd += [_WIDE, _SKEW_SD, range_x, *[_SLOPE_SD] * count]
    functions = places.miss_RM.shape[1]
    return np.array([*mean, *[0.0] * functions]), np.array([*sd, *[1.0] * functions])


def _first(problem: Problem) -> np.ndarray:
    """The lowest minimum from a grid of exponents, each with the linear parts that fit best."""
    starts = [_start(problem, alpha, beta) for alpha in _STARTS for beta in _STARTS]
    near = sorted((problem.minimise(theta_P, 6) for theta_P in starts), key=problem.value)
    return min(map(problem.minimise, near[:_KEPT_STARTS]), key=problem.value)


def _start(problem: Problem, alpha: float, beta: float) -> np.ndarray:
    """E, A, B and the bowls of least squares at given exponents, made positive."""
    places, y_R = problem.places, problem.y_R
    theta_P = problem.mean_P.copy()
    theta_P[LOG_ALPHA], theta_P[LOG_BETA] = math.log(alpha), math.log(beta)
    columns = [np.exp(-alpha * places.log_n_R), np.exp(-beta * places.log_d_R), np.ones(len(y_R))]
    for x_R, drivers_RQ in places.axes.values():
        columns += [x_R**2, x_R, *(x_R[:, None] * drivers_RQ).T]
    c = np.linalg.lstsq(np.stack(columns, 1), y_R, rcond=None)[0]
    theta_P[: LOG_E + 1] = np.log(np.maximum(c[:3], 0.02 * np.array([np.ptp(y_R), np.ptp(y_R), y_R.min()])))
    first, at = places.first_axis, 3
    for x_R, drivers_RQ in places.axes.values():
        if c[at] > 0:
            middle = float(np.clip(-0.5 * c[at + 1] / c[at], x_R.min(), x_R.max()))
            theta_P[first : first + 3] = math.log(c[at]), 0.0, middle
        at, first = at + 2 + drivers_RQ.shape[1], first + 3 + drivers_RQ.shape[1]
    return theta_P


def _by_reml(problem: Problem, places: Places, theta_P: np.ndarray) -> tuple[Problem, np.ndarray]:
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
