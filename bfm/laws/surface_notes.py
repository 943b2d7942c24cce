"""What a surface can be fitted to, and what to doubt in one that was.

Shape legend: R runs, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import optimize

from bfm.errors import UserError
from bfm.laws.result import Estimate, Outlier
from bfm.laws.runs import Runs
from bfm.laws.surface_fit import Fitted
from bfm.laws.surface_form import EXPONENTS, LOG_ALPHA, LOG_BETA, LOG_REPEATS, REPEATS

FEWEST = 7
_SIZES = 3
_SAME = 0.02
_BEHIND = 0.9
_WORTHLESS = 1e-6
"""R* of events that bring nothing when they come again."""
_OUTLIER = 5.0
_ILL_CONDITIONED = 1e4
_ONE_BUDGET = math.log(1.5)
_REPEATED = 1.2


def check(runs: Runs) -> None:
    """Raises UserError where the runs cannot hold the law's five parameters, saying how many more of what would."""
    runs.require("the surface L(N, D)", "params", "events", "loss")
    if len(runs) < FEWEST:
        short = FEWEST - len(runs)
        fix = f"add {short} at other N and D (a grid of {_SIZES} N by {_SIZES} D is the least that is any use)"
        raise UserError(f"{len(runs)} runs are too few for the surface's 5 parameters", file=runs.source, fix=fix)
    for column, letter, other in (("params", "N", "D"), ("events", "D", "N")):
        sizes = _distinct(runs[column])
        if sizes < _SIZES:
            raise UserError(
                f"all {len(runs)} runs stand at {sizes} {letter}, and the surface needs {_SIZES}",
                file=runs.source,
                key=column,
                fix=f"add runs at {_SIZES - sizes} or more other {letter}, each at several {other}",
            )
    if np.ptp(np.log(runs["params"] * runs["events"])) < _ONE_BUDGET:
        raise UserError(
            f"all {len(runs)} runs stand at one C, where N and D change together",
            file=runs.source,
            key="flops",
            fix=f"add {_SIZES} or more sizes at each of 2 other C, a factor 3 or more apart",
        )


def repeating(runs: Runs, asked: bool) -> bool:
    """Whether enough runs repeat events to ask what a repeated event is worth. Raises UserError where asked in vain."""
    known = runs.has("unique_events") and bool(np.isfinite(runs["unique_events"]).all())
    count = int((runs["events"] > _REPEATED * runs["unique_events"]).sum()) if known else 0
    if asked and count < _SIZES:
        what = f"{count} runs repeat their events" if known else "unique_events are not known for all runs"
        fix = f"add {_SIZES - count} or more runs of 2 to 20 epochs, with unique_events for every run"
        raise UserError(f"effective data need repeats, and {what}", file=runs.source, key="unique_events", fix=fix)
    return count >= _SIZES


def outliers_of(runs: Runs, error_R: np.ndarray) -> tuple[Outlier, ...]:
    """Runs further than five robust standard deviations from the middle residual."""
    away_R = error_R - np.median(error_R)
    spread = max(1.4826 * float(np.median(np.abs(away_R))), 1e-8)
    return tuple(
        Outlier(runs.names[place], float(error_R[place]), f"{away_R[place] / spread:+.1f} robust standard deviations")
        for place in np.argsort(-np.abs(away_R))
        if abs(away_R[place]) > _OUTLIER * spread
    )


def epochs_behind(repeats: float) -> float:
    """Epochs at which D' falls 10 % behind D, for an R*."""
    if not math.isfinite(repeats):
        return repeats
    if repeats < _WORTHLESS:
        return 1 / _BEHIND

    def behind(repetitions: float) -> float:
        return 1 - repeats * math.expm1(-repetitions / repeats) - _BEHIND * (1 + repetitions)

    return 1 + float(optimize.brentq(behind, 0.0, 20 + 20 * repeats))


def repeats_of(used: bool, repeats: Estimate | None) -> dict[str, Any]:
    """The form that was used, R*, and when repeats start to matter."""
    if repeats is None:
        return {"effective_data": {"used": False}}
    epochs = Estimate(*(epochs_behind(value) for value in (repeats.estimate, repeats.low, repeats.high)))
    return {"effective_data": {"used": used, "R_star": repeats.as_dict(), "epochs_10_percent_behind": epochs.as_dict()}}


def condition_of(fitted: Fitted) -> float:
    """Condition number of the runs' information about the parameters, each in units of its own error."""
    _, jacobian_RP = fitted.form.jacobian(fitted.theta_P)
    length_P = np.maximum(np.linalg.norm(jacobian_RP, axis=0), 1e-300)
    return float(np.linalg.cond(jacobian_RP / length_P)) ** 2


def warnings_of(
    runs: Runs, fitted: Fitted, parameters: Mapping[str, Estimate], outliers: tuple[Outlier, ...], drift: float
) -> tuple[str, ...]:
    """One line per doubt."""
    notes = list(runs.warnings)
    floor = parameters["E"]
    if not floor.low > 0.05 * floor.estimate or not math.isfinite(floor.high):
        ends = f"{floor.low:.3g} to {floor.high:.3g}"
        notes.append(f"E is ill-determined ({ends}): runs of larger N and D would tell the floor from slow power laws")
    condition = condition_of(fitted)
    if condition > _ILL_CONDITIONED:
        notes.append(
            f"the design is nearly collinear (condition number {condition:.0e}): N and D move together, or the range "
            "is short; runs at other D/N would part their terms"
        )
    for name, place in (("alpha", LOG_ALPHA), ("beta", LOG_BETA)):
        value = math.exp(fitted.theta_P[place])
        if not EXPONENTS[0] * 1.001 < value < EXPONENTS[1] * 0.999:
            notes.append(f"{name} is at its bound {value:g}: the runs do not show its term")
    if fitted.form.size > LOG_REPEATS and not REPEATS[0] * 1.001 < math.exp(fitted.theta_P[LOG_REPEATS]) < REPEATS[1]:
        notes.append("R* is at its bound: the runs do not say what a repeated event is worth")
    if outliers:
        named = ", ".join(outlier.run for outlier in outliers[:5])
        notes.append(f"{len(outliers)} outliers: {named}{', ...' if len(outliers) > 5 else ''}")
    if math.isnan(drift):
        notes.append("too few runs below the largest C to measure the error of extrapolation: predictions leave it out")
    return tuple(notes)


def _distinct(values_R: np.ndarray) -> int:
    """Values that lie apart by more than 2 %."""
    return 1 + int((np.diff(np.sort(np.log(values_R))) > _SAME).sum())
