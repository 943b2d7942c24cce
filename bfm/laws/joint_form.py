"""The mean of a metric over everything that a sweep varies, and its derivatives.

    L = E + A / N^alpha + B / D'^beta + sum over axes of h bowl(x - x*) + miss(N, D),   D' = D / (1 + batch / critical)

x is the log of an axis (embedder share, rate, negatives); x* is linear in the logs of what moves it, and the log of the
critical batch in ln C. bowl(u) = 2 (e^(k u) - 1 - k u) / k^2 is u^2 but for its skew k: one side may be steeper.
`miss` is what the form leaves: a sum of smooth functions, each with a coefficient of mean 0 whose size the fit finds
(bfm.laws.joint), so that a law that holds is left alone and one that does not is followed.

Parameters theta: ln of A / N0^alpha, ln of B / D0^beta, ln E, ln alpha, ln beta; ln of the critical batch over the
rows' own and its slope, where the batch varies; ln h, k, x* at the centre and its slopes per axis; the coefficients of
`miss`. N0, D0 and C0 are geometric means of the rows.

Shape legend: R rows, P parameters, M functions of `miss`, Q drivers of an axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import solve_triangular

LOG_A, LOG_B, LOG_E, LOG_ALPHA, LOG_BETA, LOG_CRITICAL, CRITICAL_SLOPE = range(7)
AXES = ("share", "rate", "negatives")
DRIVERS: Mapping[str, tuple[str, ...]] = {
    "share": ("flops",),
    "rate": ("params", "batch", "flops"),
    "negatives": ("flops",),
}
"""Columns whose logs move the optimum of an axis."""
LENGTH = math.log(10.0)
"""How far in ln N or ln D a miss is much the same: a decade."""
_MOST_KNOTS = 60
_STEEP, _SMALL = 20.0, 0.03
"""Of a bowl's exponent: no sweep goes where it is larger; below the second its series is more exact."""


@dataclass(frozen=True)
class Places:
    """Where rows stand: natural logs less the centre's."""

    log_n_R: np.ndarray
    log_d_R: np.ndarray
    log_c_R: np.ndarray
    log_batch_R: np.ndarray | None
    axes: Mapping[str, tuple[np.ndarray, np.ndarray]]
    """Name -> (x_R, drivers_RQ)."""
    miss_RM: np.ndarray
    beyond_R: np.ndarray
    """Share of the variance of `miss` that its functions do not know, in [0, 1]."""

    @property
    def first_axis(self) -> int:
        """Number of parameters before those of the axes."""
        return LOG_CRITICAL if self.log_batch_R is None else CRITICAL_SLOPE + 1

    @property
    def size(self) -> int:
        """Parameters without the coefficients of `miss`."""
        return self.first_axis + sum(3 + drivers_RQ.shape[1] for _, drivers_RQ in self.axes.values())

    def growing(self, power: float) -> Places:
        """The same places, where a miss goes with C^power."""
        return replace(self, miss_RM=self.miss_RM * np.exp(power * self.log_c_R)[:, None])

    def at_best(self, theta_P: np.ndarray) -> Places:
        """The same places with every axis at its optimum."""
        axes, first = {}, self.first_axis
        for name, (_, drivers_RQ) in self.axes.items():
            after = first + 3 + drivers_RQ.shape[1]
            axes[name] = (theta_P[first + 2] + drivers_RQ @ theta_P[first + 3 : after], drivers_RQ)
            first = after
        return replace(self, axes=axes)

    def mean(self, theta_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(L of shape R, its gradient of shape R x P)."""
        alpha, beta, floor = (math.exp(theta_P[place]) for place in (LOG_ALPHA, LOG_BETA, LOG_E))
        log_d_R = self.log_d_R
        if self.log_batch_R is not None:
            over_R = self.log_batch_R - theta_P[LOG_CRITICAL] - theta_P[CRITICAL_SLOPE] * self.log_c_R
            log_d_R = log_d_R - np.logaddexp(0.0, over_R)
        n_R, d_R = np.exp(theta_P[LOG_A] - alpha * self.log_n_R), np.exp(theta_P[LOG_B] - beta * log_d_R)
        columns = [n_R, d_R, np.full(len(n_R), floor), -alpha * self.log_n_R * n_R, -beta * log_d_R * d_R]
        if self.log_batch_R is not None:
            wasted_R = -beta * d_R / (1 + np.exp(-over_R))
            columns += [wasted_R, wasted_R * self.log_c_R]
        loss_R, first = floor + n_R + d_R, self.first_axis
        for x_R, drivers_RQ in self.axes.values():
            after = first + 3 + drivers_RQ.shape[1]
            height = math.exp(theta_P[first])
            off_R = x_R - theta_P[first + 2] - drivers_RQ @ theta_P[first + 3 : after]
            bowl_R, slope_R, by_skew_R = (height * part_R for part_R in bowl(off_R, theta_P[first + 1]))
            loss_R = loss_R + bowl_R
            columns += [bowl_R, by_skew_R, -slope_R, *(-slope_R * drivers_RQ.T)]
            first = after
        jacobian_RP = np.concatenate([np.stack(columns, 1), self.miss_RM], 1)
        return loss_R + self.miss_RM @ theta_P[first:], jacobian_RP


@dataclass(frozen=True)
class Frame:
    """From which logs count, which axes there are, and the knots of `miss`."""

    logs: Mapping[str, float]
    """Mean natural log of every column that varies."""
    axes: tuple[str, ...]
    knots_M2: np.ndarray
    """(ln N, ln D) less the centre's."""

    @classmethod
    def of(cls, columns: Mapping[str, np.ndarray]) -> Frame:
        """Of the columns of the rows that are fitted, in their own units."""
        logs = {name: float(np.log(values).mean()) for name, values in columns.items()}
        where_R2 = np.stack([np.log(columns[name]) - logs[name] for name in ("params", "events")], 1)
        return cls(logs, tuple(name for name in AXES if name in columns), _knots(where_R2))

    def places(self, columns: Mapping[str, np.ndarray]) -> Places:
        """Of columns in their own units; those that the fitted rows hold fixed are left aside."""
        logs = {name: np.log(columns[name]) - centre for name, centre in self.logs.items()}
        axes = {
            name: (logs[name], np.stack([logs[driver] for driver in DRIVERS[name] if driver in logs], 1))
            for name in self.axes
        }
        miss_RM = self._functions(np.stack([logs["params"], logs["events"]], 1))
        beyond_R = np.clip(1 - (miss_RM**2).sum(1), 0.0, 1.0)
        return Places(logs["params"], logs["events"], logs["flops"], logs.get("batch"), axes, miss_RM, beyond_R)

    def _functions(self, where_R2: np.ndarray) -> np.ndarray:
        """Functions whose squares sum to the variance at a place that the knots know (Nystrom), (R, M)."""
        among_MM = _kernel(self.knots_M2, self.knots_M2) + 1e-8 * np.eye(len(self.knots_M2))
        across_RM = _kernel(where_R2, self.knots_M2)
        return np.asarray(solve_triangular(np.linalg.cholesky(among_MM), across_RM.T, lower=True).T)


def bowl(off_R: np.ndarray, skew: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """2 (e^(k u) - 1 - k u) / k^2 with its derivatives by u and by k: u^2 at k = 0, steeper to the right above."""
    t_R = np.clip(skew * off_R, -_STEEP, _STEEP)
    small_R = np.abs(t_R) < _SMALL
    safe_R = np.where(small_R, 1.0, t_R)
    grown_R = np.expm1(safe_R)
    value_R = np.where(small_R, 1 + t_R / 3 + t_R**2 / 12 + t_R**3 / 60, 2 * (grown_R - safe_R) / safe_R**2)
    slope_R = np.where(small_R, 1 + t_R / 2 + t_R**2 / 6 + t_R**3 / 24, grown_R / safe_R)
    bend_R = 2 * ((safe_R - 2) * grown_R + 2 * safe_R) / safe_R**3
    bend_R = np.where(small_R, 1 / 3 + t_R / 6 + t_R**2 / 20 + t_R**3 / 90, bend_R)
    return off_R**2 * value_R, 2 * off_R * slope_R, off_R**3 * bend_R


def _kernel(first_R2: np.ndarray, second_M2: np.ndarray) -> np.ndarray:
    """Correlation of misses (Matern 5/2): twice differentiable, and no smoother."""
    far_RM = math.sqrt(5) / LENGTH * np.sqrt(((first_R2[:, None] - second_M2[None]) ** 2).sum(-1))
    return np.asarray((1 + far_RM + far_RM**2 / 3) * np.exp(-far_RM))


def _knots(where_R2: np.ndarray) -> np.ndarray:
    """Of the rows' places, each next one as far as can be from those before."""
    far_R = ((where_R2 - where_R2.mean(0)) ** 2).sum(1)
    chosen: list[int] = []
    while len(chosen) < _MOST_KNOTS and far_R.max() > (0.2 * LENGTH) ** 2:
        chosen.append(int(np.argmax(far_R)))
        away_R = ((where_R2 - where_R2[chosen[-1]]) ** 2).sum(1)
        far_R = away_R if len(chosen) == 1 else np.minimum(far_R, away_R)
    return where_R2[chosen]
