"""Iso-FLOP optima (Hoffmann et al. 2022, approach 2): the best N at each C, and the power laws through them.

Curves of the loss in log N at one C, by choice: `valley`, a two-term valley whose sides rise at different rates,
common to all budgets; `quadratic`, the parabola of the paper, biased where valleys are skewed. A metric to maximise is
fitted as a loss (`bfm.laws.transform`), so its optimum is its maximum. Curves are fitted to the loss itself, in which
the two-term law has exactly the valley's form and noise is about even.

D* = C / (kappa N*), where kappa = C/(N D) of the budget's own runs is interpolated in log N; 6 where runs have no D.

Shape legend: K bracketed budgets, R runs, S sizes of a budget, P fit parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bfm.errors import UserError
from bfm.laws.powerlaw import inflation, line
from bfm.laws.result import UNKNOWN, BudgetOptimum, Estimate, LawFit
from bfm.laws.robust import METHOD, RobustFit, coordinate, robust_fit
from bfm.laws.runs import Runs
from bfm.laws.transform import from_loss, to_loss, transform_name
from bfm.laws.valley import RATE, Valleys

CURVES = ("valley", "quadratic")
_SIZES = 3
_RESOLVED = 3.0
"""A valley's curvature is at least this many standard errors above 0."""
_WINDOW = math.log(8.0)
"""On either side of a budget's best run, in log N: real valleys are not two power laws much further out."""


@dataclass(frozen=True)
class _Group:
    """The runs of one budget."""

    flops: float
    places_R: np.ndarray
    x_R: np.ndarray
    """log N."""
    y_R: np.ndarray
    """The loss."""
    log_kappa_2S: np.ndarray
    """log N of the sizes, ascending, and the mean log C/(N D) of each."""

    def log_events(self, log_params: float) -> float:
        """log D at this budget."""
        return math.log(self.flops) - float(np.interp(log_params, *self.log_kappa_2S)) - log_params

    def unbracketed(self, log_params: float) -> str:
        """Why a minimum there is none, '' where runs bracket it."""
        low, high = float(self.x_R.min()), float(self.x_R.max())
        if log_params <= low:
            return f"the optimum lies at or below the smallest size, N = {math.exp(low):.3g}: add 2 smaller ones"
        if log_params >= high:
            return f"the optimum lies at or above the largest size, N = {math.exp(high):.3g}: add 2 larger ones"
        return ""


Interval = Callable[[Callable[[np.ndarray], float]], Estimate]
"""A quantity of log N* of the K budgets -> its interval."""


@dataclass(frozen=True)
class _Fit:
    """The valleys of the budgets that have a minimum."""

    groups: Sequence[_Group]
    valleys: Valleys
    at: RobustFit

    @property
    def num(self) -> int:
        """K."""
        return len(self.groups)

    def optimum(self, runs: Runs, place: int) -> BudgetOptimum:
        """The best N and D of one budget."""
        group, n = self.groups[place], self.at.region.interval(coordinate(2 * self.num + place))
        values = {"N_opt": n.exp(), "D_opt": n.through_falling(group.log_events).exp()}
        return BudgetOptimum(group.flops, True, values, from_loss(runs.metric, float(self.at.theta_P[place])))


def fit_isoflop(runs: Runs, *, curve: str = "valley") -> LawFit:
    """N* = N_coefficient C^N_exponent and D* likewise, with the optimum of each budget.

    A budget whose optimum the runs do not bracket is refused with a reason. Two bracketed budgets give exponents
    without a check of the power law, one gives none (infinite intervals), and none is a UserError, as are fewer runs
    than the curves have parameters. Intervals are profile likelihood with the noise pooled over budgets; those of the
    laws are widened where the optima scatter about the line beyond their errors.
    """
    if curve not in CURVES:
        raise UserError(f"there is no curve {curve!r}", key="--curve", fix=f"one of {', '.join(CURVES)}")
    runs.require("iso-FLOP", "params", "budget" if runs.has("budget") else "flops", "loss")
    fit, refused = _fit(runs, skewed=curve == "valley")
    along, ratio = _along_line(fit)
    factor = inflation(ratio, fit.num - 2, fit.at.free)
    budgets = [BudgetOptimum(flops, False, {}, reason=reason) for flops, reason in refused.items()]
    budgets += [fit.optimum(runs, place) for place in range(fit.num)]
    places_R = np.concatenate([group.places_R for group in fit.groups])
    rates = np.exp(fit.valleys.shape(fit.at.theta_P)).tolist()
    return LawFit(
        law="isoflop",
        metric=runs.metric,
        parameters=_laws(fit.groups, lambda quantity: along(quantity).widened(factor)),
        definitions=_definitions(runs, curve),
        runs=len(runs),
        interval_method=f"{METHOD}; noise pooled over budgets",
        objective=fit.at.objective,
        objective_name=f"sum of Huber losses, delta {fit.at.delta:.3g}",
        budgets=tuple(sorted(budgets, key=lambda budget: budget.flops)),
        residuals=tuple(fit.at.residual_R.tolist()),
        outliers=fit.at.outliers([runs.names[place] for place in places_R]),
        warnings=(*runs.warnings, *_doubts(refused, fit.num, ratio, factor)),
        details={"curve": curve, "rates": dict(zip(("below", "above"), rates, strict=False)), "noise": fit.at.scale},
    )


def _groups(runs: Runs) -> list[_Group]:
    """Of a budget whose sizes span more than the window on both sides, the runs inside it."""
    y_R, x_R = to_loss(runs.metric, runs["loss"]), np.log(runs["params"])
    cost_R = runs["flops"] if runs.has("flops") else runs["budget"]
    kappa_R = np.log(cost_R / runs["events"]) - x_R if runs.has("events") else np.full(len(runs), math.log(6))
    found = []
    for flops, places in runs.budgets().items():
        near = places
        if np.ptp(x_R[places]) > 2.01 * _WINDOW:
            best = x_R[places[int(np.argmin(y_R[places]))]]
            near = places[np.abs(x_R[places] - best) <= _WINDOW]
        found.append(_Group(flops, near, x_R[near], y_R[near], _by_size(x_R[places], kappa_R[places])))
    return found


def _by_size(x_R: np.ndarray, value_R: np.ndarray) -> np.ndarray:
    """The sizes, ascending, and the mean value of each, (2, S)."""
    sizes = np.unique(x_R)
    return np.stack([sizes, [float(value_R[x_R == size].mean()) for size in sizes]])


def _fit(runs: Runs, *, skewed: bool) -> tuple[_Fit, dict[float, str]]:
    """Valleys of all budgets at once, until each that is left has a minimum; why the others have none."""
    refused: dict[float, str] = {}
    kept: list[tuple[_Group, np.ndarray]] = []
    for group in _groups(runs):
        found = _first_look(group)
        if isinstance(found, str):
            refused[group.flops] = found
        else:
            kept.append((group, found))
    while True:
        if not kept:
            flops, reason = max(refused.items())
            raise UserError(
                f"no budget of {len(refused)} has an optimum (C = {flops:.3g}: {reason})",
                file=runs.source,
                fix="train 5 sizes or more, on both sides of the optimum, at each of 3 budgets or more",
            )
        fit = _fit_valleys(runs, *zip(*kept, strict=True), skewed=skewed)
        reasons = [_verdict(fit, place) for place in range(fit.num)]
        refused |= {group.flops: reason for group, reason in zip(fit.groups, reasons, strict=True) if reason}
        if not any(reasons):
            return fit, refused
        kept = [one for one, reason in zip(kept, reasons, strict=True) if not reason]


def _first_look(group: _Group) -> np.ndarray | str:
    """(c, h, log N*) of a parabola to start from, or why the budget has no optimum."""
    if (sizes := len(np.unique(group.x_R))) < _SIZES:
        return f"{sizes} of the {_SIZES} or more sizes that an optimum needs"
    centre = float(group.x_R.mean())
    bend, slope, level = np.polyfit(group.x_R - centre, group.y_R, 2).tolist()
    offset = -0.5 * slope / bend if bend else 0.0
    reason = group.unbracketed(centre + offset) if bend > 0 else "the loss curves downwards over its sizes"
    if not reason:
        return np.array([level + 0.5 * slope * offset, bend, centre + offset])
    best = int(np.argmin(group.y_R))
    if group.unbracketed(group.x_R[best]):
        return reason
    # A parabola can miss the minimum of a skewed valley that the runs themselves show.
    steep = float(np.ptp(group.y_R)) / float(np.ptp(group.x_R)) ** 2
    return np.array([group.y_R[best], steep, group.x_R[best]])


def _fit_valleys(runs: Runs, groups: Sequence[_Group], starts: Sequence[np.ndarray], *, skewed: bool) -> _Fit:
    x_R, y_R = (np.concatenate([getattr(group, name) for group in groups]) for name in ("x_R", "y_R"))
    if len(x_R) <= 3 * len(groups):
        what = f"{len(x_R)} runs at {len(groups)} budgets leave nothing to tell noise from shape"
        raise UserError(what, file=runs.source, fix="add runs: at least 5 sizes a budget")
    budget_R = np.repeat(np.arange(len(groups)), [len(group.x_R) for group in groups])
    valleys = Valleys(x_R, budget_R, np.eye(len(groups)))
    start_P = np.concatenate([np.array(starts).T.ravel(), np.full(2 * skewed, RATE)])
    return _Fit(groups, valleys, robust_fit(valleys.loss, y_R, start_P, prior=valleys.prior))


def _verdict(fit: _Fit, place: int) -> str:
    """Why a fitted valley is no optimum."""
    bend = fit.num + place
    resolution = float(fit.at.theta_P[bend] / fit.at.errors_P[bend])
    if resolution <= -_RESOLVED:
        return "the loss curves downwards over its sizes"
    reason = fit.groups[place].unbracketed(float(fit.at.theta_P[2 * fit.num + place]))
    if reason or resolution >= _RESOLVED:
        return reason
    return f"its valley is as flat as the noise (curvature {resolution:.1f} standard errors): add sizes further out"


def _along_line(fit: _Fit) -> tuple[Interval, float]:
    """(intervals of the same valleys with log N* on a line in log C, chi2 per degree of freedom about that line).

    The noise, for the intervals too, is that of the free vertices. NaN for two budgets.
    """
    x_K, theta_P = np.log([group.flops for group in fit.groups]), fit.at.theta_P
    line_KV = np.stack([np.ones(fit.num), x_K - x_K.mean()], 1)[:, : min(fit.num, 2)]
    straight = replace(fit.valleys, vertices_KV=line_KV)
    vertex_V = np.linalg.lstsq(line_KV, fit.valleys.vertices(theta_P), rcond=None)[0]
    start_P = np.concatenate([theta_P[: 2 * fit.num], vertex_V, fit.valleys.shape(theta_P)])
    y_R = np.concatenate([group.y_R for group in fit.groups])
    found = robust_fit(straight.loss, y_R, start_P, delta=fit.at.delta, prior=straight.prior)
    region = replace(found.region, margin=fit.at.region.margin)
    ratio = fit.at.missed(found) if fit.num > 2 else math.nan
    return lambda quantity: region.interval(lambda theta_P: quantity(straight.vertices(theta_P))), ratio


def _laws(groups: Sequence[_Group], interval: Interval) -> dict[str, Estimate]:
    """Exponents and coefficients of N* and D*; unknown with one budget."""
    if len(groups) < 2:
        unknown = {"exponent": UNKNOWN, "coefficient": UNKNOWN.exp()}
        return {f"{letter}_{name}": value for letter in "ND" for name, value in unknown.items()}
    slope_K, intercept_K = line(np.log([group.flops for group in groups]))

    def events(n_K: np.ndarray) -> np.ndarray:
        return np.array([group.log_events(n) for group, n in zip(groups, n_K, strict=True)])

    def along(weight_K: np.ndarray, values: Callable[[np.ndarray], np.ndarray] = np.asarray) -> Estimate:
        return interval(lambda n_K: float(weight_K @ values(n_K)))

    return {
        "N_exponent": along(slope_K),
        "N_coefficient": along(intercept_K).exp(),
        "D_exponent": along(slope_K, events),
        "D_coefficient": along(intercept_K, events).exp(),
    }


def _definitions(runs: Runs, curve: str) -> dict[str, str]:
    kappa = "interpolated over the budget's runs" if runs.has("events") else "6, as the runs have no D"
    return {
        **runs.definitions,
        "fitted": transform_name(runs.metric),
        "N_opt": f"lowest point of the {curve} curve over log N at one C, of runs within a factor 8 of the best one "
        "where the sizes span more than a factor 64",
        "D_opt": f"C / (kappa N_opt) with kappa = C/(N D) {kappa}",
    }


def _doubts(refused: Mapping[float, str], count: int, ratio: float, factor: float) -> list[str]:
    found = [f"C = {flops:.3g}: {reason}" for flops, reason in sorted(refused.items())]
    if count == 1:
        found.append("one budget has an optimum, so there is no law: add 2 budgets of 5 sizes or more")
    if count == 2:
        found.append("two budgets have an optimum: whether a power law holds is not known; add 1 budget or more")
    if factor > 1:
        found.append(
            f"the optima scatter {math.sqrt(ratio):.1f} times their errors about the power law: "
            f"its intervals are widened {factor:.1f} times"
        )
    return found
