"""The mean of a metric over everything that a sweep varies, and its derivatives.

    L = E + A / N^alpha + B / D'^beta + sum over axes of h C^g rise(x - x*) + a step of each choice + miss(N, D, epochs)

D' are the events that count: U + U R* (1 - exp(-(D / U - 1) / R*)) of D events of which U are distinct (Muennighoff et
al. 2023), over 1 + batch / critical. x is the log of an axis (embedder share, rate, negatives, any other number that
was searched); x* is linear in the logs of what moves it. rise(u) = u^2 + O(u^3) has two sides, e^(-left u) and
e^(right u): a x^right + b x^-left (arXiv 2606.05257) told from its lowest point. Rows at 0 of an axis have a step in
its place, which goes with C^g, too; beyond the largest C at which the axis was swept both may fall, and do not grow.
The values of what is no number have steps, the same at every C. `miss` is what the form leaves: a sum of smooth
functions, each with a coefficient of mean 0 whose size the fit finds (bfm.laws.reml), so that a law that holds is left
alone and one that does not is followed.

Parameters theta: ln of A / N0^alpha, ln of B / D0^beta, ln E, ln alpha, ln beta; [ln R*]; [ln of the critical batch
over the rows' own and its slope]; per axis ln h, g, ln left, ln right, x* at the centre, its slopes, [the step at 0];
the steps of choices; the coefficients of `miss`. N0, D0 and C0 are geometric means of the rows.

Shape legend: R rows, P parameters, M functions of `miss`, Q drivers of an axis, J steps, X = 2 or 3 coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import solve_triangular

from bfm.laws.valley import rise

LOG_A, LOG_B, LOG_E, LOG_ALPHA, LOG_BETA = range(5)
HEIGHT, GROWTH, LEFT, RIGHT, OPTIMUM, SLOPES = range(6)
"""Of an axis, from its first parameter on."""
DRIVERS: Mapping[str, tuple[str, ...]] = {"rate": ("params", "batch", "flops")}
"""Columns whose logs move the optimum of an axis; of others C alone."""
LENGTH = math.log(10.0)
"""How far in ln N or ln D a miss is much the same: a decade."""
_MOST_KNOTS = 60


@dataclass(frozen=True)
class Axis:
    """A number that was searched."""

    x_R: np.ndarray
    """Natural log less the centre's; 0 where the number is 0."""
    drivers_RQ: np.ndarray
    off_R: np.ndarray | None
    """1 where the number is 0; None where no row has that."""
    log_c_R: np.ndarray
    """ln C less the centre's."""
    log_top: float
    """Of the largest C at which the axis was swept: what it adds may fall beyond, and does not grow."""

    @property
    def size(self) -> int:
        """Number of its parameters."""
        return SLOPES + self.drivers_RQ.shape[1] + (self.off_R is not None)

    def optimum(self, theta_A: np.ndarray) -> np.ndarray:
        """x* at every row, of the axis' own parameters."""
        return np.asarray(theta_A[OPTIMUM] + self.drivers_RQ @ theta_A[SLOPES : SLOPES + self.drivers_RQ.shape[1]])

    def mean(self, theta_A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(what the axis adds to L, its gradient by the axis' own parameters)."""
        on_R = 1.0 if self.off_R is None else 1 - self.off_R
        log_c_R = self.log_c_R if theta_A[GROWTH] < 0 else np.minimum(self.log_c_R, self.log_top)
        grown_R = np.exp(np.clip(theta_A[GROWTH] * log_c_R, -50, 50))
        height_R = on_R * grown_R * math.exp(np.clip(theta_A[HEIGHT], -50, 50))
        parts = rise(self.x_R - self.optimum(theta_A), math.exp(theta_A[LEFT]), math.exp(theta_A[RIGHT]))
        value_R, slope_R, left_R, right_R = (height_R * part_R for part_R in parts)
        columns = [value_R, value_R * log_c_R, left_R, right_R, -slope_R, *(-slope_R * self.drivers_RQ.T)]
        if self.off_R is not None:
            step_R = self.off_R * grown_R
            columns.append(step_R)
            columns[GROWTH] = columns[GROWTH] + step_R * theta_A[-1] * log_c_R
            value_R = value_R + step_R * theta_A[-1]
        return value_R, np.stack(columns, 1)


@dataclass(frozen=True)
class Places:
    """Where rows stand: natural logs less the centre's."""

    log_n_R: np.ndarray
    log_d_R: np.ndarray
    log_u_R: np.ndarray | None
    """Of the distinct events, less the centre of D; None: an event counts the same each time."""
    log_c_R: np.ndarray
    log_batch_R: np.ndarray | None
    axes: Mapping[str, Axis]
    steps_RJ: np.ndarray
    """1 where a row has a value of a choice."""
    miss_RM: np.ndarray
    beyond_R: np.ndarray
    """Share of the variance of `miss` that its functions do not know, in [0, 1]."""

    @property
    def repeats(self) -> int | None:
        """Place of ln R*."""
        return None if self.log_u_R is None else LOG_BETA + 1

    @property
    def critical(self) -> int | None:
        """Place of the log critical batch; its slope follows."""
        return None if self.log_batch_R is None else LOG_BETA + 1 + (self.log_u_R is not None)

    @property
    def first_axis(self) -> int:
        """Number of parameters before those of the axes."""
        return LOG_BETA + 1 + (self.log_u_R is not None) + 2 * (self.log_batch_R is not None)

    @property
    def spans(self) -> dict[str, slice]:
        """Axis -> the place of its parameters."""
        found, first = {}, self.first_axis
        for name, axis in self.axes.items():
            found[name] = slice(first, first + axis.size)
            first += axis.size
        return found

    @property
    def first_step(self) -> int:
        """Number of parameters before the steps of choices."""
        return self.first_axis + sum(axis.size for axis in self.axes.values())

    @property
    def size(self) -> int:
        """Parameters without the coefficients of `miss`."""
        return self.first_step + self.steps_RJ.shape[1]

    @property
    def told(self) -> int:
        """Parameters that only rows tell: not R*, slopes and the shapes of axes, for which a prior can stand in."""
        axes = sum(2 + (axis.off_R is not None) for axis in self.axes.values())
        return LOG_BETA + 1 + (self.log_batch_R is not None) + axes + self.steps_RJ.shape[1]

    def growing(self, power: float) -> Places:
        """The same places, where a miss goes with C^power."""
        return replace(self, miss_RM=self.miss_RM * np.exp(power * self.log_c_R)[:, None])

    def at_best(self, theta_P: np.ndarray) -> Places:
        """The same places with every axis at its optimum."""
        axes = {}
        for name, span in self.spans.items():
            axis = self.axes[name]
            off_R = None if axis.off_R is None else 0 * axis.off_R
            axes[name] = replace(axis, x_R=axis.optimum(theta_P[span]), off_R=off_R)
        return replace(self, axes=axes)

    def mean(self, theta_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(L of shape R, its gradient of shape R x P)."""
        alpha, beta, floor = (math.exp(theta_P[place]) for place in (LOG_ALPHA, LOG_BETA, LOG_E))
        log_d_R, by_data = self._counted(theta_P)
        n_R, d_R = np.exp(theta_P[LOG_A] - alpha * self.log_n_R), np.exp(theta_P[LOG_B] - beta * log_d_R)
        columns = [n_R, d_R, np.full(len(n_R), floor), -alpha * self.log_n_R * n_R, -beta * log_d_R * d_R]
        columns += [-beta * d_R * part_R for part_R in by_data]
        loss_R, parts = floor + n_R + d_R, [np.stack(columns, 1)]
        for name, span in self.spans.items():
            added_R, jacobian_RA = self.axes[name].mean(theta_P[span])
            loss_R = loss_R + added_R
            parts.append(jacobian_RA)
        jacobian_RP = np.concatenate([*parts, self.steps_RJ, self.miss_RM], 1)
        return loss_R + jacobian_RP[:, self.first_step :] @ theta_P[self.first_step :], jacobian_RP

    def _counted(self, theta_P: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """(ln D', its derivatives by ln R*, ln of the critical batch and its slope, as far as they are there)."""
        log_d_R, found = self.log_d_R, []
        if self.log_u_R is not None:
            scale = math.exp(float(np.clip(theta_P[LOG_BETA + 1], -20, 20)))
            again_R = np.expm1(np.maximum(self.log_d_R - self.log_u_R, 0.0))
            gained_R = -scale * np.expm1(-again_R / scale)
            log_d_R = np.minimum(self.log_u_R, self.log_d_R) + np.log1p(gained_R)
            found.append((gained_R - again_R * np.exp(-again_R / scale)) / (1 + gained_R))
        if self.log_batch_R is not None and self.critical is not None:
            over_R = self.log_batch_R - theta_P[self.critical] - theta_P[self.critical + 1] * self.log_c_R
            log_d_R = log_d_R - np.logaddexp(0.0, over_R)
            wasted_R = 1 / (1 + np.exp(-over_R))
            found += [wasted_R, wasted_R * self.log_c_R]
        return log_d_R, found


@dataclass(frozen=True)
class Frame:
    """From which logs count, which axes and choices there are, and the knots of `miss`."""

    logs: Mapping[str, float]
    """Mean natural log of every column that varies, of its values above 0."""
    axes: Mapping[str, float]
    """Axis -> the largest ln C, less the centre's, of the rows where it is above 0."""
    with_zeros: tuple[str, ...]
    """Axes of which some rows have 0."""
    choices: Mapping[str, tuple[str, ...]]
    """What is no number -> its values, the commonest first."""
    repeats: bool
    """Whether repeated events may count less."""
    knots_MX: np.ndarray
    """(ln N, ln D) less the centre's, and ln of the epochs where events repeat."""

    @classmethod
    def of(
        cls,
        columns: Mapping[str, np.ndarray],
        axes: tuple[str, ...] = (),
        choices: Mapping[str, np.ndarray] | None = None,
        *,
        repeats: bool = False,
    ) -> Frame:
        """Of the columns of the rows that are fitted, in their own units."""
        varying = {name: values for name, values in columns.items() if name != "unique_events"}
        logs = {name: float(np.log(values[values > 0]).mean()) for name, values in varying.items()}
        zeros = tuple(name for name in axes if (columns[name] == 0).any())
        log_c_R = np.log(columns["flops"]) - logs["flops"]
        swept = {name: float(log_c_R[columns[name] > 0].max()) for name in axes}
        where = [np.log(columns[name]) - logs[name] for name in ("params", "events")]
        # What rows miss that see events again is no miss of fresh events at the same N and D.
        where += [np.log(np.maximum(columns["events"] / columns["unique_events"], 1.0))] if repeats else []
        ordered = {name: _by_count(values) for name, values in (choices or {}).items()}
        return cls(logs, swept, zeros, ordered, repeats, _knots(np.stack(where, 1)))

    def places(self, columns: Mapping[str, np.ndarray], choices: Mapping[str, np.ndarray] | None = None) -> Places:
        """Of columns in their own units; those that the fitted rows hold fixed are left aside, choices that are not
        given are the commonest."""
        rows = len(columns["params"])
        logs = {}
        for name, centre in self.logs.items():
            values = columns[name]
            logs[name] = np.where(values > 0, np.log(np.where(values > 0, values, 1.0)) - centre, 0.0)
        axes = {}
        for name, top in self.axes.items():
            drivers = [logs[driver] for driver in DRIVERS.get(name, ("flops",)) if driver in logs]
            off_R = (columns[name] == 0).astype(float) if name in self.with_zeros else None
            axes[name] = Axis(logs[name], np.stack(drivers, 1), off_R, logs["flops"], top)
        log_u_R = None
        if self.repeats:
            unique_R = np.minimum(columns.get("unique_events", columns["events"]), columns["events"])
            log_u_R = np.log(unique_R) - self.logs["events"]
        steps = [
            (choices[name] == value).astype(float) if choices is not None and name in choices else np.zeros(rows)
            for name, values in self.choices.items()
            for value in values[1:]
        ]
        steps_RJ = np.stack(steps, 1) if steps else np.zeros((rows, 0))
        where = [logs["params"], logs["events"]]
        where += [] if log_u_R is None else [np.maximum(logs["events"] - log_u_R, 0.0)]
        miss_RM = self._functions(np.stack(where, 1))
        beyond_R = np.clip(1 - (miss_RM**2).sum(1), 0.0, 1.0)
        known = (logs["params"], logs["events"], log_u_R, logs["flops"], logs.get("batch"))
        return Places(*known, axes, steps_RJ, miss_RM, beyond_R)

    def _functions(self, where_RX: np.ndarray) -> np.ndarray:
        """Functions whose squares sum to the variance at a place that the knots know (Nystrom), (R, M)."""
        among_MM = _kernel(self.knots_MX, self.knots_MX) + 1e-8 * np.eye(len(self.knots_MX))
        across_RM = _kernel(where_RX, self.knots_MX)
        return np.asarray(solve_triangular(np.linalg.cholesky(among_MM), across_RM.T, lower=True).T)


def _by_count(values_R: np.ndarray) -> tuple[str, ...]:
    found, count = np.unique(values_R, return_counts=True)
    return tuple(str(value) for value in found[np.argsort(-count, kind="stable")])


def _kernel(first_RX: np.ndarray, second_MX: np.ndarray) -> np.ndarray:
    """Correlation of misses (Matern 5/2): twice differentiable, and no smoother."""
    far_RM = math.sqrt(5) / LENGTH * np.sqrt(((first_RX[:, None] - second_MX[None]) ** 2).sum(-1))
    return np.asarray((1 + far_RM + far_RM**2 / 3) * np.exp(-far_RM))


def _knots(where_RX: np.ndarray) -> np.ndarray:
    """Of the rows' places, each next one as far as can be from those before."""
    far_R = ((where_RX - where_RX.mean(0)) ** 2).sum(1)
    chosen: list[int] = []
    while len(chosen) < _MOST_KNOTS and (not chosen or far_R.max() > (0.2 * LENGTH) ** 2):
        chosen.append(int(np.argmax(far_R)))
        away_R = ((where_RX - where_RX[chosen[-1]]) ** 2).sum(1)
        far_R = away_R if len(chosen) == 1 else np.minimum(far_R, away_R)
    return where_RX[chosen]
