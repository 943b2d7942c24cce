"""What a fitted law says, the same for every law: estimates with intervals, what they rest on, and what to doubt."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval. An end that the data do not close is infinite; one not asked for is NaN."""

    estimate: float
    low: float = math.nan
    high: float = math.nan

    @classmethod
    def around(cls, middle: float, half: float) -> Estimate:
        """With an interval of that half width."""
        return cls(middle, middle - half, middle + half)

    @classmethod
    def of_draws(cls, estimate: float, draws: Sequence[float] | np.ndarray) -> Estimate:
        """With percentiles of bootstrap draws; nothing is known without one."""
        if len(draws) == 0:
            return cls(estimate, -math.inf, math.inf)
        tail = 50 * (1 - CONFIDENCE)
        low, high = np.percentile(draws, [tail, 100 - tail])
        return cls(estimate, float(low), float(high))

    @property
    def is_known(self) -> bool:
        """Whether the data say anything of it: an interval of all numbers, or of all above 0, is no measurement."""
        return math.isfinite(self.estimate) and not (self.high == math.inf and self.low in (-math.inf, 0.0))

    def as_dict(self) -> dict[str, float | None]:
        """JSON has no NaN and no infinity: those are null, and so is the estimate of what is not known."""
        values = {"estimate": self.estimate if self.is_known else math.nan, "low": self.low, "high": self.high}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    def overlaps(self, other: Estimate) -> bool:
        """Whether the two intervals have a point in common."""
        return self.low <= other.high and other.low <= self.high

    def through_rising(self, rising: Callable[[float], float]) -> Estimate:
        """The estimate of a quantity that rises with this one."""
        return Estimate(rising(self.estimate), rising(self.low), rising(self.high))

    def through_falling(self, falling: Callable[[float], float]) -> Estimate:
        """The estimate of a quantity that falls as this one rises."""
        return Estimate(falling(self.estimate), falling(self.high), falling(self.low))

    def widened(self, factor: float) -> Estimate:
        """With both ends `factor` times as far away."""
        middle = self.estimate
        return Estimate(middle, middle + factor * (self.low - middle), middle + factor * (self.high - middle))

    def exp(self) -> Estimate:
        """That of exp(x); beyond the range of floats an end is infinite, or zero."""
        with np.errstate(over="ignore"):
            return self.through_rising(lambda end: float(np.exp(end)))


UNKNOWN = Estimate(math.nan, -math.inf, math.inf)
"""Of a number of any sign, or the log of one above 0."""


@dataclass(frozen=True)
class BudgetOptimum:
    """The best point at one C."""

    flops: float
    bracketed: bool
    """Whether runs on both sides of the optimum are worse than it."""
    optima: Mapping[str, Estimate]
    """Name -> optimum, such as N_opt and D_opt, s_opt, B_opt, K_opt; empty where there is none."""
    best: float = math.nan
    """Value of the metric there."""
    reason: str = ""
    """Why there is no optimum."""

    def as_dict(self) -> dict[str, Any]:
        """The optima stand beside the FLOPs."""
        optima = {name: value.as_dict() for name, value in self.optima.items()}
        best = self.best if math.isfinite(self.best) else None
        return {"flops": self.flops, **optima, "bracketed": self.bracketed, "best": best, "reason": self.reason}


@dataclass(frozen=True)
class Outlier:
    """A run that the fit gives little weight."""

    run: str
    """As its table names it."""
    residual: float
    detail: str = ""


@dataclass(frozen=True)
class LawFit:
    """One law on one table of runs."""

    law: str
    metric: str
    parameters: Mapping[str, Estimate]
    definitions: Mapping[str, str]
    """What C, N, D, the metric's transform and the law's own words mean here."""
    runs: int
    interval_method: str
    objective: float = math.nan
    """What the fit minimised, at its minimum."""
    objective_name: str = ""
    budgets: tuple[BudgetOptimum, ...] = ()
    residuals: tuple[float, ...] = ()
    outliers: tuple[Outlier, ...] = ()
    warnings: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able results of this law alone."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "law": self.law,
            "metric": self.metric,
            "parameters": {name: value.as_dict() for name, value in self.parameters.items()},
            "objective": self.objective if math.isfinite(self.objective) else None,
            "objective_name": self.objective_name,
            "definitions": dict(self.definitions),
            "runs": self.runs,
            "budgets": [budget.as_dict() for budget in self.budgets],
            "residuals": list(self.residuals),
            "outliers": [{"run": o.run, "residual": o.residual, "detail": o.detail} for o in self.outliers],
            "warnings": list(self.warnings),
            "interval_method": self.interval_method,
            **self.details,
        }
