"""Which N is best at a C, and what comes of it: the surface L(N, D) where the runs identify it, else cruder laws.

Enters: the rows of the sweep of sizes, the configurations that C allows (bfm.sweep.recipe.choices). Leaves: one of
them, with the predicted metric, its 95 % prediction interval, and what was taken where a law could not be identified.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from bfm.errors import UserError
from bfm.laws.frontier import Row, goal_of, metric_value
from bfm.laws.isoflop import fit_isoflop
from bfm.laws.result import CONFIDENCE, Estimate
from bfm.laws.runs import Runs
from bfm.laws.surface import Surface, fit_surface
from bfm.laws.transform import from_loss, to_loss
from bfm.sweep.metric import Metric
from bfm.sweep.recipe.choices import Configurations
from bfm.sweep.recipe.evidence import Swept
from bfm.sweep.space import Feasible, Rejection
from bfm.units import format_count

SIZES_PER_DECADE = 40
_BEYOND = 4.0
"""Sizes are tried so far beyond the fitted ones, and further up as C exceeds the highest rung."""
_COARSE = 8
MIN_RUNGS = 3
"""A line through two rungs has no residual to judge it by."""


@dataclass(frozen=True)
class Expectation:
    """The best size and what it is expected to reach."""

    point: Feasible
    params: Estimate
    """N with the law's interval for the best N."""
    source: str
    predicted: Estimate
    predicted_by: str
    fresh: Estimate | None
    """Were every event seen once; None where the runs cannot tell."""
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def beats(self, other: Expectation, metric: str) -> bool:
        """Whether it promises the better value."""
        sign = 1.0 if goal_of(metric) == "minimize" else -1.0
        return sign * self.predicted.estimate < sign * other.predicted.estimate


@dataclass(frozen=True)
class Trend:
    """A line through the best values of the rungs: log of a loss, logit of a bounded metric, against log C.

    For runs that no surface fits. Its intervals are wide, because a trend in C knows neither N nor D nor where the
    metric saturates.
    """

    metric: Metric
    intercept: float
    slope: float
    spread: float
    """Standard deviation of the residuals."""
    log_flops_R: np.ndarray
    top: float
    """Best value at the top rung, on the line's scale."""

    @classmethod
    def through(cls, metric: Metric, best: Mapping[float, Row], *, folder: str) -> Trend:
        """Through the best row of each rung. Raises UserError for fewer than 3 rungs."""
        if len(best) < MIN_RUNGS:
            raise UserError(
                f"too few rungs have {metric.name} to foretell it ({len(best)} of {MIN_RUNGS})",
                file=folder,
                fix=f"extend the sweep by {MIN_RUNGS - len(best)} above, best with 5 or more sizes at each rung",
            )
        log_flops_R = np.log(list(best))
        value_R = np.array([_to_line(metric, metric_value(row, metric.name)) for row in best.values()])
        slope, intercept = np.polyfit(log_flops_R, value_R, 1)
        residual_R = value_R - intercept - slope * log_flops_R
        spread = math.sqrt(float((residual_R**2).sum()) / (len(best) - 2))
        return cls(metric, float(intercept), float(slope), spread, log_flops_R, float(value_R[-1]))

    def at(self, flops: float) -> Estimate:
        """The best run's value at a C; beyond the top rung the interval also holds that more C brings nothing."""
        log_flops = math.log(flops)
        runs = len(self.log_flops_R)
        centred_R = self.log_flops_R - self.log_flops_R.mean()
        lever = (log_flops - self.log_flops_R.mean()) ** 2 / float((centred_R**2).sum())
        reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, runs - 2)) * self.spread
        middle = self.intercept + self.slope * log_flops
        half = reach * math.sqrt(1 + 1 / runs + lever)
        ends = [middle - half, middle + half]
        if log_flops > self.log_flops_R.max():
            ends += [self.top - reach, self.top + reach]
        low, high = sorted(_from_line(self.metric, end) for end in (min(ends), max(ends)))
        return Estimate(_from_line(self.metric, middle), low, high)


def surface_of(runs: Runs) -> tuple[Surface | None, str]:
    """The surface, or why there is none."""
    try:
        return fit_surface(runs), ""
    except UserError as error:
        return None, f"{error.what}; {error.fix}" if error.fix else error.what


def stage_factor(surface: Surface, rows: Sequence[Row], metric: str) -> float:
    """What a second stage makes of the loss: median over its rows against what the surface expects of their N and D."""
    factors = []
    for row in rows:
        expected = surface.mean(row["params"], row["events"], row["unique_events"]).estimate
        factors.append(_loss(metric, metric_value(row, metric)) / _loss(metric, expected))
    return statistics.median(factors)


def by_surface(
    surface: Surface, runs: Runs, configurations: Configurations, flops: float, factor: float = 1.0
) -> Expectation | str:
    """The size of best expected metric; or why the surface cannot say it.

    `factor` is what stages that the fitted rows do not have make of the loss.
    """
    metric = runs.metric
    points, rejected = _sizes(runs, configurations, flops)
    sign = 1.0 if goal_of(metric) == "minimize" else -1.0

    @functools.cache
    def value(place: int) -> float:
        return sign * surface.mean(*_data(points[place], flops)).estimate

    place = _lowest(value, len(points))
    point = points[place]
    params, events, unique = _data(point, flops)
    predicted = surface.predict(params, events, unique)
    if not math.isfinite(predicted.high - predicted.low):
        return "the runs do not bound the surface L(N, D) there"
    best = surface.optimum(flops).optima["N_opt"]
    size = Estimate(params, best.low, best.high)
    notes = [*_edge_notes(point, place, len(points), rejected), *_size_notes(size)]
    told = bool(surface.fit.details.get("effective_data", {}).get("used"))
    return Expectation(
        point=point,
        params=size,
        source="the surface L(N, D) at this log's costs",
        predicted=_shifted(predicted, factor, metric),
        predicted_by="the surface L(N, D)",
        fresh=_shifted(surface.predict(params, events, events), factor, metric) if told else None,
        notes=tuple(notes),
        warnings=surface.fit.warnings,
    )


def by_trend(sizes: Swept, runs: Runs, configurations: Configurations, flops: float, reason: str) -> Expectation:
    """N from the iso-FLOP law, else from the top rung's best runs; the metric from the frontier's trend in C.

    Raises UserError where the trend has too few rungs.
    """
    metric = runs.metric
    best = {rung: rows[0] for rung, rows in sizes.rungs(metric).items()}
    trend = Trend.through(Metric(metric), best, folder=sizes.folder)
    wanted, source, notes = _size_without_surface(sizes, runs, flops)
    points, _ = _sizes(runs, configurations, flops)
    point = min(points, key=lambda point: abs(math.log(point.cost.params / wanted.estimate)))
    if abs(math.log(point.cost.params / wanted.estimate)) > 2 / SIZES_PER_DECADE * math.log(10):
        notes = (
            *notes,
            f"N = {format_count(wanted.estimate)} cannot be trained at that C: the nearest that can is taken",
        )
    how = "the metric is foretold by the frontier's trend in C, with a much wider interval"
    return Expectation(
        point=point,
        params=Estimate(point.cost.params, wanted.low, wanted.high),
        source=source,
        predicted=trend.at(flops),
        predicted_by="the frontier's own trend in C",
        fresh=None,
        notes=(f"the surface L(N, D) is not identified ({reason}): {how}", *notes),
    )


def _size_without_surface(sizes: Swept, runs: Runs, flops: float) -> tuple[Estimate, str, tuple[str, ...]]:
    """(N, where it comes from, what could not be told)."""
    try:
        law = fit_isoflop(runs)
        exponent, scale = law.parameters["N_exponent"], law.parameters["N_coefficient"]
        if math.isfinite(exponent.high - exponent.low):
            return Estimate(scale.estimate * flops**exponent.estimate), "the iso-FLOP law", ()
        reason = "the iso-FLOP law does not bound how N grows"
    except UserError as error:
        reason = f"the iso-FLOP law cannot be fitted ({error.what})"
    best = sizes.top_runs(runs.metric)
    params = float(statistics.median(row["params"] for row in best))
    taken = f"the median N of the best {len(best)} runs" if len(best) > 1 else "the best run's N"
    note = f"{reason}: {taken} at the top rung is taken, not scaled with C"
    return Estimate(params, 0.0, math.inf), f"{taken} at the top rung", (note,)


def _sizes(
    runs: Runs, configurations: Configurations, flops: float
) -> tuple[list[Feasible], list[tuple[float, Rejection]]]:
    beyond = _BEYOND * max(1.0, flops / float(runs["flops"].max()))
    low, high = float(runs["params"].min()) / _BEYOND, float(runs["params"].max()) * beyond
    return configurations.grid(low, high, SIZES_PER_DECADE)


def _data(point: Feasible, flops: float) -> tuple[float, float, float]:
    """(N, D, unique events) of a point at a C."""
    events = point.cost.events(flops)
    return float(point.cost.params), events, min(events, float(point.cost.epoch_events))


def _shifted(value: Estimate, factor: float, metric: str) -> Estimate:
    """With a factor on the loss; the interval holds the value with it and without."""
    if factor == 1.0:
        return value
    ends = (value.estimate, value.low, value.high)
    moved = [float(from_loss(metric, factor * _loss(metric, end))) for end in ends]
    return Estimate(moved[0], min(value.low, *moved[1:]), max(value.high, *moved[1:]))


def _lowest(value: Callable[[int], float], count: int) -> int:
    """The place of the least value of a smooth valley: every eighth first, then all around the least of them."""
    coarse = min(range(0, count, _COARSE), key=value)
    return min(range(max(0, coarse - _COARSE), min(count, coarse + _COARSE + 1)), key=value)


def _edge_notes(point: Feasible, place: int, count: int, rejected: Sequence[tuple[float, Rejection]]) -> list[str]:
    """Whether the best size is only the best that can be trained."""
    if 0 < place < count - 1:
        return []
    above = place == count - 1
    asked = point.config.params
    beside = [found for params, found in rejected if (params > asked) == above]
    side = "larger" if above else "smaller"
    if not beside:
        return [f"the best N may be {side} than all that were tried"]
    nearest = beside[0] if above else beside[-1]
    return [
        f"a {side} N is expected to be better, but cannot be trained at that C: {nearest.reason} ({nearest.detail})"
    ]


def _size_notes(size: Estimate) -> list[str]:
    if not math.isfinite(size.high - size.low):
        return ["the runs do not bound the best N on both sides: its interval is open"]
    if not size.low <= size.estimate <= size.high:
        span = f"{format_count(size.low)} to {format_count(size.high)}"
        return [f"with every event fresh the best N would be {span}; repeats or bounds of this log move it"]
    return []


def _loss(metric: str, value: float) -> float:
    return float(to_loss(metric, np.array([value]))[0])


def _to_line(metric: Metric, value: float) -> float:
    return -metric.to_model(metric.loss(value)) if metric.is_bounded else math.log(value)


def _from_line(metric: Metric, line: float) -> float:
    return metric.from_model(-line) if metric.is_bounded else math.exp(line)
