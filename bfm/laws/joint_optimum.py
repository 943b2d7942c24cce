"""The best N and the best place of every axis at each C, and their power laws, read off the joint model.

At a budget N* is where the model's own loss is least along N at that C (every other axis at its optimum), what the form
misses included; its error is that of the parameters, by the implicit derivative. The optimum of an axis is the form's
own, at N*. A law is a line through the budgets' ln x* in ln C, and its errors are theirs with all that they have in
common, and their scatter about the line. Where the form holds they lie on that line as they are.

Shape legend: K budgets, P parameters, R places along N, Q drivers of an axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bfm.errors import UserError
from bfm.laws.cost import NEAR, Cost, cost_levels
from bfm.laws.joint import Joint
from bfm.laws.joint_form import DRIVERS, LENGTH, OPTIMUM, SLOPES
from bfm.laws.powerlaw import PowerLaw
from bfm.laws.result import UNKNOWN, Estimate
from bfm.laws.runs import SAME, Runs

_PLACES = 201
_STEP = 0.05
"""Of differences in ln N."""
ASKED = 1.5
"""Runs of one C whose values are nearer than this factor ask nothing of an axis."""


@dataclass(frozen=True)
class Ends:
    """The swept range of an axis, and the loss at its ends."""

    low: float
    high: float
    low_rise: Estimate
    high_rise: Estimate
    """Above its least along the axis."""
    fall: Estimate
    """At the low end, above that at the high end."""

    @property
    def falls_towards(self) -> str:
        """`high` or `low`, where the ends are told apart; else empty."""
        return "high" if self.fall.low > 0 else "low" if self.fall.high < 0 else ""

    @property
    def is_flat(self) -> bool:
        """Whether the loss is told to rise towards neither end."""
        return not (self.low_rise.low > 0 or self.high_rise.low > 0 or self.falls_towards)

    def as_dicts(self) -> list[dict[str, float | None]]:
        """JSON-able: both places with their rises."""
        return [{"x": self.low, **self.low_rise.as_dict()}, {"x": self.high, **self.high_rise.as_dict()}]


@dataclass(frozen=True)
class Optima:
    """The laws of all that has an optimum."""

    size: PowerLaw
    axes: Mapping[str, PowerLaw]
    middle: Mapping[float, float]
    """C of every budget -> the mean ln N of its runs."""
    refused: Mapping[float, str]
    """C without a best size -> why."""

    @property
    def budgets(self) -> list[float]:
        """Those that have runs."""
        return list(self.middle)

    def events(self, cost: Cost) -> PowerLaw:
        """The law of D* that the best sizes leave at each C."""
        size_K = np.exp(self.size.log_x_K)
        slope_K = np.array([-cost.slope(size) for size in size_K])
        log_d_K = self.size.log_c_K - np.log(cost.per_event(size_K))
        covariance_KK = slope_K[:, None] * self.size.covariance_KK * slope_K
        return replace(self.size, log_x_K=log_d_K, covariance_KK=covariance_KK)

    def log_size(self, flops: float) -> float:
        """ln N* of a budget, or the middle of its runs where it has none."""
        size = self.size.own(flops)
        return self.middle[flops] if size is None else math.log(size.estimate)


def optima_of(fit: Joint, runs: Runs) -> Optima:
    """Of the runs' budgets at the smallest batch of the runs.

    Where a budget has no best size, axes have their optimum at the middle of its runs' N, and where its runs do not
    differ in an axis none of that. Raises UserError where no run is near the C of its budget.
    """
    log_c_R, log_n_R = np.log(fit.columns["flops"]), np.log(fit.columns["params"])
    sizes, middle, refused = [], {}, {}
    places: dict[str, list[tuple[float, float, np.ndarray]]] = {name: [] for name in fit.frame.axes}
    for flops in cost_levels(runs, log_c_R):
        is_near_R = np.abs(log_c_R - math.log(flops)) <= NEAR
        near_R = log_n_R[is_near_R]
        if len(near_R) == 0:
            continue
        middle[flops] = float(near_R.mean())
        at = _best_size(fit, flops, near_R) if np.ptp(log_n_R) > SAME else None
        if at is None:
            lies = "the loss has no minimum within a decade of its runs' N"
            refused[flops] = lies if np.ptp(log_n_R) > SAME else "all runs have one N"
            at = middle[flops], np.zeros(len(fit.theta_P))
        else:
            sizes.append((math.log(flops), *at))
        for name, found in places.items():
            values_R = fit.columns[name][is_near_R & (fit.columns[name] > 0)]
            if len(values_R) and values_R.max() > ASKED * values_R.min():
                found.append((math.log(flops), *_best_place(fit, name, flops, at)))
    if not middle:
        what = "no run's C lies within a factor of 2 of its budget"
        raise UserError(what, file=runs.source, key="budget", fix="give both in FLOPs")
    laws = {name: _law(fit, found) for name, found in places.items()}
    return Optima(_law(fit, sizes), laws, middle, refused)


def _law(fit: Joint, found: Sequence[tuple[float, float, np.ndarray]]) -> PowerLaw:
    """Of (ln C, ln x*, its gradient by the parameters) per budget."""
    if not found:
        return PowerLaw(fit.reach, np.zeros(0), np.zeros(0), np.zeros((0, 0)))
    log_c_K, log_x_K, slope_KP = (np.array(part) for part in zip(*found, strict=True))
    return PowerLaw(fit.reach, log_c_K, log_x_K, slope_KP @ fit.covariance_PP @ slope_KP.T)


def _best_size(fit: Joint, flops: float, near_R: np.ndarray) -> tuple[float, np.ndarray] | None:
    """(ln N*, its gradient by the parameters) near the runs of a budget; None without a minimum there.

    Between the runs, or else within a decade of them: further out what the form misses is not known, and there the
    form alone can be lower.
    """
    for beyond in (0.0, LENGTH):
        log_n_R = np.linspace(near_R.min() - beyond, near_R.max() + beyond, _PLACES)
        place = int(np.argmin(fit.along(flops, log_n_R)[0]))
        if place not in (0, _PLACES - 1):
            break
    else:
        return None
    log_n = float(log_n_R[place])
    for _ in range(4):
        around_3 = log_n + _STEP * np.array([-1.0, 0.0, 1.0])
        loss_3, jacobian_3P = fit.along(flops, around_3)
        curvature = float(loss_3[2] - 2 * loss_3[1] + loss_3[0]) / _STEP**2
        if curvature <= 0:
            return None
        step = float(loss_3[2] - loss_3[0]) / (2 * _STEP) / curvature
        log_n -= float(np.clip(step, -_STEP, _STEP))
    return log_n, -(jacobian_3P[2] - jacobian_3P[0]) / (2 * _STEP) / curvature


def _best_place(
    fit: Joint, name: str, flops: float, size: tuple[float, np.ndarray], batch: float | None = None
) -> tuple[float, np.ndarray]:
    """(ln x*, its gradient by the parameters) of an axis at a size and its gradient."""
    log_n, slope_P = size
    places = fit.places(flops, np.array([log_n]), batch)
    axis, start = places.axes[name], places.spans[name].start
    gradient_P = np.zeros(len(fit.theta_P))
    gradient_P[start + OPTIMUM] = 1.0
    first = start + SLOPES
    gradient_P[first : first + axis.drivers_RQ.shape[1]] = axis.drivers_RQ[0]
    if "params" in DRIVERS.get(name, ()):
        gradient_P = gradient_P + fit.theta_P[first + DRIVERS[name].index("params")] * slope_P
    return float(axis.x_R[0]) + fit.frame.logs[name], gradient_P


def axis_at(fit: Joint, name: str, flops: float, log_n: float, batch: float | None = None) -> Estimate:
    """The optimum of an axis at one C and size, as far as the rows tell it.

    Beyond what was swept only the end that they tell is known, and nothing where the loss rises towards neither end.
    """
    value = fit.of(*_best_place(fit, name, flops, (log_n, np.zeros(len(fit.theta_P))), batch)).exp()
    return known(value, ends_of(fit, name, flops, log_n, batch))


def known(value: Estimate, ends: Ends) -> Estimate:
    """An optimum as `axis_at` tells it, of the form's own and what the ends of the swept range are like."""
    if ends.is_flat or (value.low < ends.low and value.high > ends.high):
        # Where the optimum is not told, its side is: it lies beyond the worse end.
        sides = {"high": Estimate(math.nan, ends.low, math.inf), "low": Estimate(math.nan, 0.0, ends.high)}
        return sides.get(ends.falls_towards, UNKNOWN.exp())
    if value.estimate > ends.high:
        return Estimate(math.nan, value.low, math.inf)
    return Estimate(math.nan, 0.0, value.high) if value.estimate < ends.low else value


def ends_of(fit: Joint, name: str, flops: float, log_n: float, batch: float | None = None) -> Ends:
    """Of an axis (`params`: of N) at one C.

    `log_n` is the size; of N itself, the best one. `batch`: as in `Joint.places`.
    """
    swept_R = fit.columns[name][fit.columns[name] > 0]
    low, high = float(swept_R.min()), float(swept_R.max())
    best_1, slope_1P = fit.along(flops, np.array([log_n]), batch)
    loss_2, slope_2P = along_axis(fit, name, flops, log_n, np.array([low, high]), batch)
    low_rise, high_rise = (fit.of(float(loss_2[k] - best_1[0]), slope_2P[k] - slope_1P[0]) for k in (0, 1))
    return Ends(low, high, low_rise, high_rise, fit.of(float(loss_2[0] - loss_2[1]), slope_2P[0] - slope_2P[1]))


def along_axis(
    fit: Joint, name: str, flops: float, log_n: float, x_X: np.ndarray, batch: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(loss, its gradient) at one C along one axis, all else at its best; `params`: along N."""
    if name == "params":
        return fit.along(flops, np.log(x_X), batch)
    places = fit.places(flops, np.full(len(x_X), log_n), batch)
    axis, off_X = places.axes[name], x_X == 0
    moved_X = np.where(off_X, 0.0, np.log(np.where(off_X, 1.0, x_X)) - fit.frame.logs[name])
    moved = replace(axis, x_R=moved_X, off_R=None if axis.off_R is None else off_X.astype(float))
    return replace(places, axes={**places.axes, name: moved}).mean(fit.theta_P)
