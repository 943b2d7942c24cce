"""One model of a metric over all that a sweep varies, fitted to all of its rows: what holds when a policy chose them.

The mean is that of `joint_form`, the errors about it are those of `reml`. A policy that looks at nothing but rows does
not bias such a likelihood as long as every row is in it and what it chose is modelled (Rubin 1976): rows are not to be
picked by how good they are, nor budgets by where their best row lies. Intervals are t intervals in the parameters'
logs, from the inverse information; `joint_optimum` reads optima off the fit, and `Joint.predict` what a run will reach.

Shape legend: R rows, P parameters (those of `miss` included), Q what a number may follow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from bfm.errors import UserError
from bfm.laws.cost import Cost, cost_of
from bfm.laws.joint_form import HEIGHT, LEFT, LOG_ALPHA, LOG_BETA, LOG_E, OPTIMUM, RIGHT, Frame, Places
from bfm.laws.reml import Errors, Problem, by_reml
from bfm.laws.result import CONFIDENCE, Estimate
from bfm.laws.runs import SAME, Runs
from bfm.laws.transform import to_loss

_SLOPE_SD = 0.5
"""Prior standard deviation of an optimum's power in what moves it: where the rows do not tell, it does not move."""
_SIDES = (math.log(0.3), 1.0)
"""Prior mean and standard deviation of the log rates of an axis' sides: near a parabola over a decade or two."""
_REPEATS = (math.log(15.0), 2.0)
"""Prior of ln R*: Muennighoff et al. (2023) found 15, and the interval is a factor 50 either way."""
_PRIOR = 0.7
"""Share of its prior's width from which on a parameter is the prior's and not the rows'."""
_WIDE = 3.0
"""Prior standard deviation of logs: a factor of 400 either way."""
_STARTS = (0.08, 0.16, 0.32, 0.64)
_KEPT_STARTS = 4
_ROUNDS = 4
FEWEST = 4
"""Values of a number from which on it is an axis; fewer are choices."""
_AGAIN = 1.2
"""D / U of a row that sees events again."""
_REPEATING = 3
"""Such rows from which on it is asked what that is worth."""


@dataclass(frozen=True)
class Joint:
    """The fitted model, ready to be asked."""

    frame: Frame
    cost: Cost
    problem: Problem
    theta_P: np.ndarray
    covariance_PP: np.ndarray
    columns: Mapping[str, np.ndarray]
    """What it was fitted to."""
    metric: str
    has_sizes: bool
    """Whether N and D are the rows' own."""

    @property
    def rest_R(self) -> np.ndarray:
        """Measured less fitted losses of the rows."""
        return np.asarray(self.problem.y_R - self.problem.places.mean(self.theta_P)[0])

    @property
    def reach(self) -> float:
        """Half width of an interval, in standard errors."""
        return float(stats.t.ppf(0.5 + CONFIDENCE / 2, self.free))

    @property
    def free(self) -> float:
        """Degrees of freedom."""
        return self.problem.free(self.covariance_PP / self.problem.variance)

    def of(self, middle: float, gradient_P: np.ndarray) -> Estimate:
        """A quantity with the interval that the parameters' errors leave it."""
        half = self.reach * math.sqrt(max(float(gradient_P @ self.covariance_PP @ gradient_P), 0.0))
        return Estimate.around(middle, half)

    def parameter(self, place: int) -> Estimate:
        """exp of the parameter at a place of theta, such as LOG_E or LOG_ALPHA."""
        return self.of(float(self.theta_P[place]), np.eye(len(self.theta_P))[place]).exp()

    def tells(self, place: int) -> bool:
        """Whether the rows tell the parameter at a place of theta: what is hardly surer than its prior, they do not."""
        return bool(math.sqrt(self.covariance_PP[place, place]) <= _PRIOR * self.problem.sd_P[place])

    def places(
        self, flops: float, log_n_R: np.ndarray, batch: float | None = None, unique_events: float = math.inf
    ) -> Places:
        """Sizes N of one C at their best: every axis at its optimum and the best of all choices.

        `batch`: the smallest of the rows where it is None; `unique_events`: of the log, infinite where none repeats.
        """
        rows = len(log_n_R)
        columns = {name: np.full(rows, float(values[0])) for name, values in self.columns.items()}
        columns["params"] = np.exp(log_n_R)
        columns["flops"] = np.full(rows, flops)
        columns["events"] = np.asarray(self.cost.events(columns["params"], flops))
        columns["unique_events"] = np.minimum(columns["events"], unique_events)
        if "batch" in columns:
            columns["batch"] = np.full(rows, batch or self.columns["batch"].min())
        where = self.frame.places(columns, self._best_choices(rows))
        return where.growing(self.problem.errors.growth).at_best(self.theta_P)

    def along(self, flops: float, log_n_R: np.ndarray, batch: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(loss, its gradient) at `places`, as `Places.mean`."""
        return self.places(flops, log_n_R, batch).mean(self.theta_P)

    def predict(
        self, columns: Mapping[str, np.ndarray], choices: Mapping[str, np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """`foretell` of new runs by their columns, each of shape R."""
        return self.foretell(
            self.frame.places(_at_middle(self.cost, columns), choices).growing(self.problem.errors.growth)
        )

    def foretell(self, where: Places) -> tuple[np.ndarray, np.ndarray]:
        """(loss, half width of the 95 % prediction interval) of new runs of new trials, each of shape R."""
        problem = self.problem
        loss_R, jacobian_RP = where.mean(self.theta_P)
        own_R = 1 + problem.errors.trial + problem.errors.miss * where.beyond_R
        variance_R = problem.variance * np.exp(2 * problem.errors.growth * where.log_c_R) * own_R
        variance_R += np.einsum("rp,pq,rq->r", jacobian_RP, self.covariance_PP, jacobian_RP)
        return loss_R, self.reach * np.sqrt(variance_R)

    def shared_rates(self, name: str) -> float:
        """p-value of an axis whose two rates are the same at every C: small where they move with ln C."""
        first = self.problem.places.spans[name].start
        by_rates_R2 = self.problem.places.mean(self.theta_P)[1][:, [first + LEFT, first + RIGHT]]
        return self._unneeded(by_rates_R2 * self.problem.places.log_c_R[:, None])

    def free_batches(self) -> float:
        """p-value of small batches that cost nothing: small where the loss has a part that goes with 1 / batch."""
        assert self.problem.places.log_batch_R is not None
        return self._unneeded(np.exp(-self.problem.places.log_batch_R)[:, None])

    def _unneeded(self, terms_RX: np.ndarray) -> float:
        """p-value of a mean without further terms (score test)."""
        rest, jacobian = self.problem.residual(self.theta_P)
        further = np.zeros((len(rest), terms_RX.shape[1]))
        further[: len(terms_RX)] = self.problem.white(terms_RX)
        known = np.linalg.qr(jacobian)[0]
        further -= known @ (known.T @ further)
        told = np.linalg.qr(further)[0].T @ rest
        return float(stats.f.sf(told @ told / len(told) / self.problem.variance, len(told), self.free))

    def _best_choices(self, rows: int) -> dict[str, np.ndarray]:
        """The value of each choice with the lowest step."""
        found, first = {}, self.problem.places.first_step
        for name, values in self.frame.choices.items():
            steps = np.concatenate([[0.0], self.theta_P[first : first + len(values) - 1]])
            found[name] = np.full(rows, values[int(np.argmin(steps))])
            first += len(values) - 1
        return found


def fit_joint(runs: Runs) -> Joint:
    """Fit the model to every row of a sweep.

    Needs loss, and params and events, or C and neither; takes flops, unique_events, batch and `runs.settings` where
    they vary, and `curve` for the trials. What varies and is no column is noise of the trials to it: where a policy
    chose that too, and it matters, the intervals do not hold. Raises UserError where there are not twice as many rows
    as parameters.
    """
    own = runs.has("params") or runs.has("events")
    runs.require("the joint model", "loss", *(("params", "events") if own else ("flops",)))
    if not own:
        # A table without N and D stands on C alone: they are then equal parts of it.
        part_R = np.sqrt(runs["flops"] / 6)
        runs = replace(runs, columns={**runs.columns, "params": part_R, "events": part_R})
    cost, y_R = cost_of(runs), to_loss(runs.metric, runs["loss"])
    if np.ptp(y_R) == 0:
        raise UserError(f"all {len(y_R)} rows have the same {runs.metric}", file=runs.source, fix="fit another metric")
    columns, axes, choices = varying(runs, cost)
    frame = Frame.of(columns, axes, choices, repeats=_repeats(columns))
    places = frame.places(columns, choices)
    told = places.told
    if len(y_R) < 2 * told:
        what = f"{len(y_R)} rows for {told} parameters of N, D{''.join(f', {name}' for name in (*axes, *choices))}"
        raise UserError(what, file=runs.source, fix=f"let the sweep make {2 * told} rows")
    _, trial_R, count_T = np.unique(runs.curves_R, return_inverse=True, return_counts=True)
    alike_R = np.ones(len(y_R))
    problem = Problem(places, y_R, trial_R, count_T, alike_R, *_prior(places, y_R), 1e-6 * float(y_R.var()), Errors())
    problem, theta_P = by_reml(problem, places, _first(problem))
    for _ in range(_ROUNDS):
        weight_R = problem.outlying(theta_P)
        if np.allclose(weight_R, problem.weight_R, atol=0.1):
            break
        problem, theta_P = by_reml(replace(problem, weight_R=weight_R), places, theta_P)
    _, jacobian = problem.residual(theta_P)
    covariance_PP = problem.variance * np.linalg.inv(jacobian.T @ jacobian)
    return Joint(frame, cost, problem, theta_P, covariance_PP, columns, runs.metric, own)


def varying(runs: Runs, cost: Cost) -> tuple[dict[str, np.ndarray], tuple[str, ...], dict[str, np.ndarray]]:
    """(N, D, C and the numbers that vary, which of these are axes, what is no number or has too few values).

    A rate that follows N and the batch is a rule's and no axis.
    """
    flops_R = runs["flops"] if runs.has("flops") else runs["events"] * cost.per_event(runs["params"])
    columns = {"params": runs["params"], "events": runs["events"], "flops": flops_R}
    if runs.has("batch") and np.ptp(np.log(runs["batch"])) > SAME:
        columns["batch"] = runs["batch"]
    if runs.has("unique_events") and np.isfinite(runs["unique_events"]).all():
        columns["unique_events"] = runs["unique_events"]
    axes, choices = [], {}
    for name in runs.settings:
        values_R = runs[name]
        is_number = values_R.dtype.kind == "f" and (values_R >= 0).all()
        if is_number and _follows(values_R, columns):
            continue
        if is_number and len(np.unique(values_R[values_R > 0])) >= FEWEST:
            axes.append(name)
            columns[name] = values_R
        elif len(np.unique(values_R)) > 1:
            choices[name] = labels(values_R)
    return _at_middle(cost, columns), tuple(axes), choices


def _at_middle(cost: Cost, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns with the events that the same C pays for at the middle share and K, seen as often.

    So an axis' valley is what it does at equal C: that many negatives leave fewer events is a part of it.
    """
    dearer_R = cost.dearer(columns)
    moved = {name: columns[name] * dearer_R for name in ("events", "unique_events") if name in columns}
    return {**columns, **moved}


def labels(values_R: np.ndarray) -> np.ndarray:
    """Values of a setting as texts."""
    return np.array([f"{value:g}" for value in values_R]) if values_R.dtype.kind == "f" else values_R.astype(str)


def _follows(values_R: np.ndarray, columns: Mapping[str, np.ndarray]) -> bool:
    """Whether a number is a power of N and the batch, and so no question of its own."""
    if (values_R <= 0).any():
        return False
    logs_RQ = [np.ones(len(values_R)), np.log(columns["params"])]
    logs_RQ += [np.log(columns["batch"])] if "batch" in columns else []
    design_RQ, y_R = np.stack(logs_RQ, 1), np.log(values_R)
    rest_R = y_R - design_RQ @ np.linalg.lstsq(design_RQ, y_R, rcond=None)[0]
    return float(np.std(rest_R)) < SAME


def _repeats(columns: Mapping[str, np.ndarray]) -> bool:
    """Whether enough rows see events again to ask what that is worth."""
    if "unique_events" not in columns:
        return False
    return int((columns["events"] > _AGAIN * columns["unique_events"]).sum()) >= _REPEATING


def _prior(places: Places, y_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean_P, sd_P); those of `miss` are of the errors."""
    spread = math.log(max(float(np.ptp(y_R)), 1e-12))
    mean = [spread - 1, spread - 1, math.log(float(y_R.min())) - 0.5, math.log(0.3), math.log(0.3)]
    sd = [_WIDE, _WIDE, _WIDE, 1.0, 1.0]
    if places.repeats is not None:
        mean, sd = [*mean, _REPEATS[0]], [*sd, _REPEATS[1]]
    if places.log_batch_R is not None:
        mean, sd = [*mean, float(places.log_batch_R.max()), 0.0], [*sd, _WIDE, _SLOPE_SD]
    for axis in places.axes.values():
        on_R = axis.x_R if axis.off_R is None else axis.x_R[axis.off_R == 0]
        count, range_x = axis.drivers_RQ.shape[1], max(float(np.ptp(on_R)), 1.0)
        mean += [spread - 2 * math.log(range_x), 0.0, *_SIDES[:1] * 2, float(on_R.mean()), *[0.0] * count]
        sd += [_WIDE, _SLOPE_SD, *_SIDES[1:] * 2, range_x, *[_SLOPE_SD] * count]
        mean, sd = (mean, sd) if axis.off_R is None else ([*mean, 0.0], [*sd, 3 * math.exp(spread)])
    choices, functions = places.steps_RJ.shape[1], places.miss_RM.shape[1]
    mean, sd = [*mean, *[0.0] * choices], [*sd, *[3 * math.exp(spread)] * choices]
    return np.array([*mean, *[0.0] * functions]), np.array([*sd, *[1.0] * functions])


def _first(problem: Problem) -> np.ndarray:
    """The lowest minimum from a grid of exponents, each with the linear parts that fit best."""
    starts = [_start(problem, alpha, beta) for alpha in _STARTS for beta in _STARTS]
    near = sorted((problem.minimise(theta_P, 6) for theta_P in starts), key=problem.value)
    return min(map(problem.minimise, near[:_KEPT_STARTS]), key=problem.value)


def _start(problem: Problem, alpha: float, beta: float) -> np.ndarray:
    """E, A, B, the axes as parabolas and the steps of least squares at given exponents, made positive."""
    places, y_R = problem.places, problem.y_R
    theta_P = problem.mean_P.copy()
    theta_P[LOG_ALPHA], theta_P[LOG_BETA] = math.log(alpha), math.log(beta)
    columns = [np.exp(-alpha * places.log_n_R), np.exp(-beta * places.log_d_R), np.ones(len(y_R))]
    for axis in places.axes.values():
        columns += [axis.x_R**2, axis.x_R, *(axis.x_R[:, None] * axis.drivers_RQ).T]
        columns += [] if axis.off_R is None else [axis.off_R]
    c = np.linalg.lstsq(np.stack([*columns, *places.steps_RJ.T], 1), y_R, rcond=None)[0]
    theta_P[: LOG_E + 1] = np.log(np.maximum(c[:3], 0.02 * np.array([np.ptp(y_R), np.ptp(y_R), y_R.min()])))
    at = 3
    for name, span in places.spans.items():
        axis = places.axes[name]
        if c[at] > 0:
            middle = float(np.clip(-0.5 * c[at + 1] / c[at], axis.x_R.min(), axis.x_R.max()))
            theta_P[span.start + HEIGHT], theta_P[span.start + OPTIMUM] = math.log(c[at]), middle
        at += 2 + axis.drivers_RQ.shape[1] + (axis.off_R is not None)
    return theta_P
