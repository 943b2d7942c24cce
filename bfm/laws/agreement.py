"""Do two metrics prefer the same runs: rank correlations within each budget, and whether they change with C (arXiv
2606.05257: metrics agree less as C grows).

Correlations are oriented so that +1 says both prefer the same runs. Intervals are of Fisher's z = artanh(r): variance
(1 + r^2 / 2) / (n - 3) for Spearman (Bonett and Wright 2000), .437 / (n - 4) for Kendall's tau-b (Fieller, Hartley and
Pearson 1957). z is not finite at r = +-1; there it is taken half a swap of neighbours short of it, and the interval
reaches to +-1. The trend in C is no matter of separate budgets where trials have rows at several: leaving out a trial
at a time (jackknife, Efron 1982) tells its error with all that rows of a trial have in common. All runs answer the same
queries, so it is the trend on these queries: others would move all budgets together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from bfm.errors import UserError
from bfm.laws.frontier import goal_of
from bfm.laws.result import CONFIDENCE, UNKNOWN, Estimate, LawFit
from bfm.laws.runs import Runs

MIN_RUNS = 4
_TRIALS = 8
"""Trials from which on leaving out one at a time tells an error."""
METHOD = "Fisher z: Bonett-Wright variance (Spearman), Fieller variance (Kendall tau-b)"
_NORMAL = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))


@dataclass(frozen=True)
class Agreement:
    """Rank correlations of two metrics over the runs of one budget; +1 where both prefer the same runs."""

    flops: float
    spearman: Estimate
    kendall: Estimate
    rows: int


def agreement(flops: float, first_R: np.ndarray, second_R: np.ndarray) -> Agreement | None:
    """Of two metrics that both go down; None for fewer than 4 runs, or where one metric is the same for all."""
    runs = len(first_R)
    if runs < MIN_RUNS or np.ptp(first_R) == 0 or np.ptp(second_R) == 0:
        return None
    spearman = float(stats.spearmanr(first_R, second_R).statistic)
    kendall = float(stats.kendalltau(first_R, second_R).statistic)
    # One swap of neighbours lowers Spearman by 12 / (n (n^2 - 1)) and Kendall by 4 / (n (n - 1)).
    return Agreement(
        flops,
        _fisher(spearman, _spearman_variance(spearman, runs), 6 / (runs * (runs**2 - 1))),
        _fisher(kendall, 0.437 / (runs - 4) if runs > 4 else math.inf, 2 / (runs * (runs - 1))),
        runs,
    )


def fit_agreement(runs: Runs) -> LawFit:
    """Whether the fitted metric and each other of the runs prefer the same runs, and its trend in C.

    Needs flops (or budget) and loss, and at least 4 runs of a budget, those of one configuration counted once, with
    the mean over its seeds. `details["agreement"]` holds, for each metric and
    budget, Spearman and Kendall with their intervals; parameters are `trend[METRIC]`, the change of Fisher's z of
    Spearman per factor 10 in C by weighted least squares over the budgets. Raises UserError that says which runs are
    missing.
    """
    runs.require("agreement", "budget" if runs.has("budget") else "flops", "loss")
    others = [name for name in runs.metrics if name != runs.metric]
    if not others:
        fix = "name another metric of the table as metric=NAME"
        raise UserError("agreement needs two metrics", file=runs.source, key="--columns", fix=fix)
    parameters: dict[str, Estimate] = {}
    details: dict[str, Any] = {}
    warnings = list(runs.warnings)
    for metric in others:
        both = _over_seeds(runs.fitting(metric))
        first_R = both.metrics[runs.metric]
        turn = 1.0 if goal_of(metric) == goal_of(runs.metric) else -1.0
        second_R, budgets = turn * both["loss"], both.budgets()
        found = _agreements(first_R, second_R, budgets)
        if not found:
            warnings.append(f"{metric}: no budget has {MIN_RUNS} runs that differ in it and in {runs.metric}")
        parameters[f"trend[{metric}]"] = _trend(found, first_R, second_R, budgets, both.curves_R)
        details[metric] = [
            {"flops": a.flops, "spearman": a.spearman.as_dict(), "kendall": a.kendall.as_dict(), "runs": a.rows}
            for a in found
        ]
    if not any(details.values()):
        raise UserError(
            f"no budget has {MIN_RUNS} runs with values of {runs.metric} and of another metric that differ",
            file=runs.source,
            key="metric",
            fix=f"add runs until one budget has {MIN_RUNS} (10 for intervals worth reading)",
        )
    return LawFit(
        law="agreement",
        metric=runs.metric,
        parameters=parameters,
        definitions={
            **runs.definitions,
            "spearman, kendall": f"rank correlation with {runs.metric} within a budget; +1: both prefer the same runs",
            "trend": "change of Fisher's z of Spearman per factor 10 in C, on the queries that all runs answered",
        },
        runs=len(runs),
        interval_method=METHOD,
        warnings=tuple(warnings),
        details={"agreement": details},
    )


def _over_seeds(runs: Runs) -> Runs:
    """Runs of one C that differ in their seed alone as one run: their means, under the name of what they share."""
    if not runs.has("seed") or len(np.unique(runs["seed"])) == 1:
        return runs
    names = [
        name for name in dict.fromkeys(("params", "batch", "share", "negatives", *runs.settings)) if runs.has(name)
    ]
    # A batch's events are a mean over its own steps, which another seed fills a little otherwise.
    texts = [[f"{value:.3g}" if isinstance(value, float) else value for value in runs[name].tolist()] for name in names]
    named = [", ".join(key) for key in zip(*texts, strict=True)] or [""] * len(runs)
    groups: dict[tuple[float, str], list[int]] = {}
    for flops, places in runs.budgets().items():
        for place in places:
            groups.setdefault((flops, named[place]), []).append(int(place))
    first = runs.select(np.array([places[0] for places in groups.values()]))

    def means(values_R: np.ndarray) -> np.ndarray:
        return np.array([values_R[places].mean() for places in groups.values()])

    columns = {**first.columns, "loss": means(runs["loss"]), "curve": np.array([name for _, name in groups])}
    return replace(first, columns=columns, metrics={name: means(values) for name, values in runs.metrics.items()})


def _spearman_variance(spearman: float, runs: int) -> float:
    return (1 + spearman**2 / 2) / (runs - 3)


def _fisher(value: float, variance: float, short: float) -> Estimate:
    """Interval of a correlation; `short` is how far from +-1 z is taken at most."""
    if math.isinf(variance):
        return Estimate(value, -1.0, 1.0)
    z, width = math.atanh(float(np.clip(value, short - 1, 1 - short))), _NORMAL * math.sqrt(variance)
    low, high = math.tanh(z - width), math.tanh(z + width)
    return Estimate(value, -1.0 if value <= short - 1 else low, 1.0 if value >= 1 - short else high)


def _agreements(first_R: np.ndarray, second_R: np.ndarray, budgets: Mapping[float, np.ndarray]) -> list[Agreement]:
    """Of the budgets that tell one."""
    found = (agreement(flops, first_R[places], second_R[places]) for flops, places in budgets.items())
    return [one for one in found if one is not None]


def _trend(
    found: Sequence[Agreement],
    first_R: np.ndarray,
    second_R: np.ndarray,
    budgets: Mapping[float, np.ndarray],
    curve_R: np.ndarray,
) -> Estimate:
    """Slope of Fisher's z in log10 C over the budgets, weighted by its variances."""
    if len(found) < 2:
        return UNKNOWN
    slope, error = _slope(found)
    trials, rows_T = np.unique(curve_R, return_counts=True)
    if rows_T.max() > 1 and len(trials) >= _TRIALS:
        without: list[float] = []
        for trial in trials:
            kept = {flops: places[curve_R[places] != trial] for flops, places in budgets.items()}
            left = _agreements(first_R, second_R, kept)
            without += [_slope(left)[0]] if len(left) > 1 else []
        away = np.array(without) - np.mean(without)
        error = math.sqrt((len(without) - 1) / len(without) * float(away @ away))
    return Estimate.around(slope, _NORMAL * error)


def _slope(found: Sequence[Agreement]) -> tuple[float, float]:
    """(slope, its standard error were the budgets' runs separate)."""
    # As far short of +-1 at every budget as the fewest runs can tell: a perfect order is no trend however many have it.
    short = max(6 / (one.rows * (one.rows**2 - 1)) for one in found)
    z = np.arctanh(np.clip([one.spearman.estimate for one in found], short - 1, 1 - short))
    weight = np.array([1 / _spearman_variance(one.spearman.estimate, one.rows) for one in found])
    x = np.log10([one.flops for one in found])
    x = x - (weight * x).sum() / weight.sum()
    information = float((weight * x**2).sum())
    return float((weight * x * z).sum()) / information, 1 / math.sqrt(information)
