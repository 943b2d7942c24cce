"""Which N is best at a C, and what comes of it: the surface L(N, D) where the runs identify it, else cruder laws.

Enters: the rows of the sweep of sizes, the sizes that C allows (bfm.sweep.recipe.choices). Leaves: one of
them, with the predicted metric, its 95 % prediction interval, and what was taken where a law could not be identified.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from bfm.errors import UserError
from bfm.laws.frontier import Row, metric_value
from bfm.laws.isoflop import fit_isoflop
from bfm.laws.result import CONFIDENCE, Estimate
from bfm.laws.runs import Runs
from bfm.laws.surface import Surface, fit_surface
from bfm.laws.transform import from_loss, to_loss
from bfm.sweep.metric import Metric
from bfm.sweep.recipe.choices import SIZE_STEP, Sizes, power_of
from bfm.sweep.recipe.evidence import Swept
from bfm.sweep.space import Feasible
from bfm.units import format_count

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


def surface_of(runs: Runs) -> tuple[Surface | None, str]:
    """The surface, or why there is none."""
    try:
        return fit_surface(runs), ""
    except UserError as error:
        return None, error.reason


def stage_factor(surface: Surface, rows: Sequence[Row], metric: str) -> float:
    """What a second stage makes of the loss: median over its rows against what the surface expects of their N and D."""
    measured_R = np.array([metric_value(row, metric) for row in rows])
    expected_R = np.array([surface.expected(row["params"], row["events"], row["unique_events"]) for row in rows])
    return float(np.median(to_loss(metric, measured_R) / to_loss(metric, expected_R)))


def by_surface(surface: Surface, sizes: Sizes, factor: float = 1.0) -> Expectation | str:
    """The size of best expected metric; or why the surface cannot say it.

    `factor` is what stages that the fitted rows do not have make of the loss.
    """
    metric, flops = Metric(surface.fit.metric), sizes.flops
    values = [metric.loss(surface.expected(*_data(point, flops))) for point in sizes.trainable]
    place = int(np.argmin(values))
    point = sizes.trainable[place]
    params, events, unique = _data(point, flops)
    predicted = surface.predict(params, events, unique)
    if not math.isfinite(predicted.high - predicted.low):
        return "the runs do not bound the surface L(N, D) there"
    best = surface.optimum(flops).optima["N_opt"]
    size = Estimate(params, best.low, best.high)
    notes = [*_edge_notes(sizes, place), *_size_notes(size)]
    told = bool(surface.fit.details.get("effective_data", {}).get("used"))
    return Expectation(
        point=point,
        params=size,
        source="the surface L(N, D) at this log's costs",
        predicted=_shifted(predicted, factor, metric.name),
        predicted_by="the surface L(N, D)",
        fresh=_shifted(surface.predict(params, events, events), factor, metric.name) if told else None,
        notes=tuple(notes),
        warnings=surface.fit.warnings,
    )


def by_trend(swept: Swept, runs: Runs, sizes: Sizes, reason: str) -> Expectation:
    """N from the iso-FLOP law, else from the top rung's best runs; the metric from the frontier's trend in C.

    Raises UserError where the trend has too few rungs.
    """
    predicted = _trend(swept, Metric(runs.metric), sizes.flops)
    wanted, source, notes = _size_without_surface(swept, runs, sizes.flops)

    def distance(point: Feasible) -> float:
        return abs(math.log(point.cost.params / wanted.estimate))

    point = min(sizes.trainable, key=distance)
    if distance(point) > 2 * math.log(SIZE_STEP):
        notes.append(f"N = {format_count(wanted.estimate)} cannot be trained at that C: the nearest that can is taken")
    how = "the metric is foretold by the frontier's trend in C, with a much wider interval"
    return Expectation(
        point=point,
        params=Estimate(point.cost.params, wanted.low, wanted.high),
        source=source,
        predicted=predicted,
        predicted_by="the frontier's own trend in C",
        fresh=None,
        notes=(f"the surface L(N, D) is not identified ({reason}): {how}", *notes),
    )


def _trend(swept: Swept, metric: Metric, flops: float) -> Estimate:
    """The best run's value at a C, by a line through the rungs' best ones: log of a loss, or logit of a bounded metric,
    against log C.

    The interval is wide, because a trend in C knows neither N nor D nor where the metric saturates; beyond the top rung
    it also holds that more C brings nothing. Raises UserError for fewer than 3 rungs.
    """
    best = {rung: rows[0] for rung, rows in swept.rungs(metric.name).items()}
    runs = len(best)
    if runs < MIN_RUNGS:
        raise UserError(
            f"too few rungs have {metric.name} to foretell it ({runs} of {MIN_RUNGS})",
            file=swept.folder,
            fix=f"extend the sweep by {MIN_RUNGS - runs} above, best with 5 or more sizes at each rung",
        )
    log_flops, log_flops_R = math.log(flops), np.log(list(best))
    value_R = np.array([_to_line(metric, metric_value(row, metric.name)) for row in best.values()])
    slope, intercept = np.polyfit(log_flops_R, value_R, 1)
    squares = float(((value_R - intercept - slope * log_flops_R) ** 2).sum())
    reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, runs - 2)) * math.sqrt(squares / (runs - 2))
    centred_R = log_flops_R - log_flops_R.mean()
    lever = (log_flops - log_flops_R.mean()) ** 2 / float((centred_R**2).sum())
    middle, half = float(intercept + slope * log_flops), reach * math.sqrt(1 + 1 / runs + lever)
    ends = [middle - half, middle + half]
    if log_flops > log_flops_R.max():
        ends += [value_R[-1] - reach, value_R[-1] + reach]
    low, high = sorted(_from_line(metric, end) for end in (min(ends), max(ends)))
    return Estimate(_from_line(metric, middle), low, high)


def _size_without_surface(swept: Swept, runs: Runs, flops: float) -> tuple[Estimate, str, list[str]]:
    """(N, where it comes from, what could not be told)."""
    try:
        power = power_of(fit_isoflop(runs), "N")
        if power is not None:
            return Estimate(power.at(flops)), "the iso-FLOP law", []
        reason = "the iso-FLOP law does not bound how N grows"
    except UserError as error:
        reason = f"the iso-FLOP law cannot be fitted ({error.what})"
    best = swept.top_runs(runs.metric)
    params = float(statistics.median(row["params"] for row in best))
    taken = f"the median N of the best {len(best)} runs" if len(best) > 1 else "the best run's N"
    note = f"{reason}: {taken} at the top rung is taken, not scaled with C"
    return Estimate(params, 0.0, math.inf), f"{taken} at the top rung", [note]


def _data(point: Feasible, flops: float) -> tuple[float, float, float]:
    """(N, D, unique events) of a point at a C."""
    events = point.cost.events(flops)
    return float(point.cost.params), events, min(events, float(point.cost.epoch_events))


def _shifted(value: Estimate, factor: float, metric: str) -> Estimate:
    """With a factor on the loss; the interval holds the value with it and without."""
    if factor == 1.0:
        return value
    ends = np.array([value.estimate, value.low, value.high])
    moved, *others = from_loss(metric, factor * to_loss(metric, ends)).tolist()
    return Estimate(moved, min(value.low, *others), max(value.high, *others))


def _edge_notes(sizes: Sizes, place: int) -> list[str]:
    """Whether the best size is only the best that can be trained."""
    asked, last = sizes.trainable[place].config.params, len(sizes.trainable) - 1
    smaller = [found for params, found in sizes.rejected if params < asked][-1:]
    larger = [found for params, found in sizes.rejected if params > asked][:1]
    notes = []
    for side, is_edge, beside in (("smaller", place == 0, smaller), ("larger", place == last, larger)):
        if is_edge and not beside:
            notes.append(f"the best N may be {side} than all that were tried")
        elif is_edge:
            why = f"{beside[0].reason} ({beside[0].detail})"
            better = "may be" if last == 0 else "is expected to be"
            notes.append(f"a {side} N {better} better, but cannot be trained at that C: {why}")
    return notes


def _size_notes(size: Estimate) -> list[str]:
    if not math.isfinite(size.high - size.low):
        return ["the runs do not bound the best N on both sides: its interval is open"]
    if not size.low <= size.estimate <= size.high:
        span = f"{format_count(size.low)} to {format_count(size.high)}"
        return [f"with every event fresh the best N would be {span}; repeats or bounds of this log move it"]
    return []


def _to_line(metric: Metric, value: float) -> float:
    return -metric.to_model(metric.loss(value)) if metric.is_bounded else math.log(value)


def _from_line(metric: Metric, line: float) -> float:
    return metric.from_model(-line) if metric.is_bounded else math.exp(line)
