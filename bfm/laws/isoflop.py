"""Iso-FLOP optima (Hoffmann et al. 2022, approach 2): the best N at each C, and the power laws through them.

Curves of the loss in log N at one C, by choice: `valley`, a two-term valley whose sides rise at different rates,
common to all budgets; `quadratic`, the parabola of the paper, biased where valleys are skewed; `akima`, splines of log
loss (see `curves`). A metric to maximise is fitted as a loss (`bfm.laws.transform`), so its optimum is its maximum.
Valleys are fitted to the loss itself, in which the two-term law has exactly their form and noise is about even.

D* = C / (kappa N*), where kappa = C/(N D) of the budget's own runs is interpolated in log N; 6 where runs have no D.

Shape legend: K bracketed budgets, R runs, S sizes of a budget, B redraws, P fit parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bfm.errors import UserError
from bfm.laws.curves import RATE, Valleys, noise_level, redraw_minima, spline
from bfm.laws.intervals import METHOD
from bfm.laws.powerlaw import UNKNOWN, drawn_places, exponential, inflation, line, widen
from bfm.laws.result import CONFIDENCE, BudgetOptimum, Estimate, LawFit
from bfm.laws.robust import RobustFit, coordinate, robust_fit
from bfm.laws.runs import Runs
from bfm.laws.transform import from_loss, to_loss, transform_name

CURVES = ("valley", "quadratic", "akima")
_SIZES = 3
_RESOLVED = 3.0
"""A valley's curvature is at least this many standard errors above 0."""
_PICTURE = 60
_REDRAWS = 400
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

    @property
    def drawn_X(self) -> np.ndarray:
        """log N at which the curve is told."""
        return np.linspace(self.x_R.min(), self.x_R.max(), _PICTURE)


@dataclass(frozen=True)
class _Optimum:
    """What a curve says about one budget."""

    group: _Group
    log_params: Estimate
    loss: float
    picture_X: np.ndarray
    """The fitted loss at `group.drawn_X`."""


Interval = Callable[[Callable[[np.ndarray], float]], Estimate]
"""A quantity of log N* of the K budgets -> its interval."""


@dataclass(frozen=True)
class _Answer:
    """What a kind of curve makes of all budgets."""

    optima: list[_Optimum]
    interval: Interval
    method: str
    ratio: float = math.nan
    """Scatter of log N* about a line, chi2 per degree of freedom."""
    factor: float = 1.0
    """What the intervals of the laws are widened by for it."""
    details: Mapping[str, Any] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)
    """Objective, residuals and outliers, as of `LawFit`."""


def fit_isoflop(runs: Runs, *, curve: str = "valley", seed: int = 0) -> LawFit:
    """N* = N_coefficient C^N_exponent and D* likewise, with the optimum of each budget.

    A budget whose optimum the runs do not bracket is refused with a reason. Two bracketed budgets give exponents
    without a check of the power law, one gives none (infinite intervals), and none is a UserError, as are fewer runs
    than the curves have parameters. `seed` is that of the redraws of `akima`. Intervals of `valley` and `quadratic` are
    profile likelihood with the noise pooled over budgets; those of the laws are widened where the optima scatter about
    the line beyond their errors. `details` hold the fitted `curves`, and in `trends` N* with its band over C.
    """
    if curve not in CURVES:
        raise UserError(f"there is no curve {curve!r}", key="--curve", fix=f"one of {', '.join(CURVES)}")
    runs.require("iso-FLOP", "params", "budget" if runs.has("budget") else "flops")
    able, refused = [], {}
    for group in _groups(runs):
        sizes = len(np.unique(group.x_R))
        if sizes < _SIZES:
            refused[group.flops] = f"{sizes} of the {_SIZES} or more sizes that an optimum needs"
        else:
            able.append(group)
    if curve == "akima":
        answer = _by_spline(able, refused, np.random.default_rng(seed))
    else:
        answer = _by_valley(runs, able, refused, skewed=curve == "valley")
    _refuse_none(runs, answer.optima, refused)
    parameters, trend = _laws([one.group for one in answer.optima], answer.interval)
    return LawFit(
        law="isoflop",
        metric=runs.metric,
        parameters=parameters,
        definitions=_definitions(runs, curve),
        runs=len(runs),
        interval_method=answer.method,
        budgets=_budgets(runs, answer.optima, refused),
        warnings=runs.warnings + _doubts(answer, refused),
        details={
            "curve": curve,
            **answer.details,
            "trends": {"N_opt": trend},
            "curves": [
                {
                    "flops": one.group.flops,
                    "params": np.exp(one.group.drawn_X).tolist(),
                    "value": from_loss(runs.metric, one.picture_X).tolist(),
                }
                for one in answer.optima
            ],
        },
        **answer.fit,
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


def _by_valley(runs: Runs, able: list[_Group], refused: dict[float, str], *, skewed: bool) -> _Answer:
    """Valleys of all budgets at once, until each that is left has a minimum."""
    looked = [(group, _first_look(group)) for group in able]
    refused |= {group.flops: found for group, found in looked if isinstance(found, str)}
    kept = {group.flops: (group, found) for group, found in looked if not isinstance(found, str)}
    while True:
        groups = [group for group, _ in kept.values()]
        _refuse_none(runs, groups, refused)
        valleys, fit = _fit_valleys(runs, groups, [start_3 for _, start_3 in kept.values()], skewed=skewed)
        reasons = {group.flops: _verdict(group, fit, place, len(groups)) for place, group in enumerate(groups)}
        refused |= {flops: reason for flops, reason in reasons.items() if reason}
        if not any(reasons.values()):
            break
        kept = {flops: kept[flops] for flops, reason in reasons.items() if not reason}
    optima = []
    for place, group in enumerate(groups):
        here = Valleys(group.drawn_X, np.full(_PICTURE, place), valleys.vertices_KV)
        log_params = fit.region.interval(coordinate(2 * len(groups) + place))
        optima.append(_Optimum(group, log_params, float(fit.theta_P[place]), here.loss(fit.theta_P)[0]))
    line_up, ratio = _along_line(valleys, fit, groups)
    factor = inflation(ratio, len(groups) - 2, fit.free)
    places_R = np.concatenate([group.places_R for group in groups])
    rates = np.exp(valleys.shape(fit.theta_P)).tolist()
    return _Answer(
        optima,
        lambda quantity: widen(line_up(quantity), factor),
        f"{METHOD}; noise pooled over budgets",
        ratio,
        factor,
        {"rates": dict(zip(("below", "above"), rates, strict=False)), "noise": fit.scale},
        {
            "objective": fit.objective,
            "objective_name": f"sum of Huber losses, delta {fit.delta:.3g}",
            "residuals": tuple(fit.residual_R.tolist()),
            "outliers": fit.outliers([runs.names[place] for place in places_R]),
        },
    )


def _first_look(group: _Group) -> np.ndarray | str:
    """(c, h, log N*) of a parabola to start from, or why the budget has no optimum."""
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


def _fit_valleys(
    runs: Runs, groups: Sequence[_Group], starts: Sequence[np.ndarray], *, skewed: bool
) -> tuple[Valleys, RobustFit]:
    x_R, y_R = (np.concatenate([getattr(group, name) for group in groups]) for name in ("x_R", "y_R"))
    if len(x_R) <= 3 * len(groups):
        what = f"{len(x_R)} runs at {len(groups)} budgets leave nothing to tell noise from shape"
        raise UserError(what, file=runs.source, fix="add runs: at least 5 sizes a budget")
    budget_R = np.repeat(np.arange(len(groups)), [len(group.x_R) for group in groups])
    valleys = Valleys(x_R, budget_R, np.eye(len(groups)))
    start_P = np.concatenate([np.array(starts).T.ravel(), np.full(2 * skewed, RATE)])
    return valleys, robust_fit(valleys.loss, y_R, start_P, prior=valleys.prior)


def _verdict(group: _Group, fit: RobustFit, place: int, num: int) -> str:
    """Why a fitted valley is no optimum."""
    resolution = float(fit.theta_P[num + place] / fit.errors_P[num + place])
    if resolution <= -_RESOLVED:
        return "the loss curves downwards over its sizes"
    reason = group.unbracketed(float(fit.theta_P[2 * num + place]))
    if reason or resolution >= _RESOLVED:
        return reason
    return f"its valley is as flat as the noise (curvature {resolution:.1f} standard errors): add sizes further out"


def _along_line(valleys: Valleys, fit: RobustFit, groups: Sequence[_Group]) -> tuple[Interval, float]:
    """(intervals of the same valleys with log N* on a line in log C, chi2 per degree of freedom about that line).

    The noise, for the intervals too, is that of the free vertices. NaN for two budgets.
    """
    num = len(groups)
    x_K = np.log([group.flops for group in groups])
    straight = replace(valleys, vertices_KV=np.stack([np.ones(num), x_K - x_K.mean()], 1)[:, : min(num, 2)])
    vertex_V = np.linalg.lstsq(straight.vertices_KV, valleys.vertices(fit.theta_P), rcond=None)[0]
    start_P = np.concatenate([fit.theta_P[: 2 * num], vertex_V, valleys.shape(fit.theta_P)])
    y_R = np.concatenate([group.y_R for group in groups])
    found = robust_fit(straight.loss, y_R, start_P, delta=fit.delta, prior=straight.prior)
    region = replace(found.region, margin=fit.region.margin)
    ratio = fit.missed(found) if num > 2 else math.nan
    return lambda quantity: region.interval(lambda theta_P: quantity(straight.vertices(theta_P))), ratio


def _by_spline(able: list[_Group], refused: dict[float, str], rng: np.random.Generator) -> _Answer:
    """A spline a budget; intervals are of the spread of redraws."""
    merged = [_by_size(group.x_R, np.log(group.y_R)) for group in able]
    noise = noise_level(merged)
    optima, minima = [], []
    for group, (x_S, y_S) in zip(able, merged, strict=True):
        minima_B, loss = redraw_minima(x_S, y_S, noise if math.isfinite(noise) else 0.0, _REDRAWS, rng)
        reason = group.unbracketed(float(minima_B[0]))
        if reason:
            refused[group.flops] = reason
            continue
        picture_X = np.exp(spline(x_S, y_S, group.drawn_X))
        optima.append(_Optimum(group, _redrawn(minima_B, noise), math.exp(loss), picture_X))
        minima.append(np.clip(minima_B, x_S[0], x_S[-1]))
    minima_KB, ratio = np.array(minima), math.nan
    if len(optima) > 2:
        slope_K, intercept_K = line(x_K := np.log([one.group.flops for one in optima]))
        rest_K = minima_KB[:, 0] - intercept_K @ minima_KB[:, 0] - slope_K @ minima_KB[:, 0] * x_K
        variance = float(minima_KB[:, 1:].var(1).mean())
        ratio = float(rest_K @ rest_K) / (len(optima) - 2) / variance if variance > 0 else math.nan
    factor = inflation(ratio, len(optima) - 2)
    return _Answer(
        optima,
        lambda quantity: widen(_redrawn(np.array([quantity(minima_K) for minima_K in minima_KB.T]), noise), factor),
        f"{_REDRAWS} redraws with noise of the level found (log loss +- {noise:.2g}), about their median",
        ratio,
        factor,
        {"noise": noise if math.isfinite(noise) else None},
    )


def _redrawn(value_B: np.ndarray, noise: float) -> Estimate:
    """The first value with the spread of the others about their own median.

    Redraws add noise to noise, and round a minimum off towards its flatter side.
    """
    estimate, tail = float(value_B[0]), 50 * (1 - CONFIDENCE)
    low, middle, high = np.percentile(value_B[1:], [tail, 50, 100 - tail], method="nearest").tolist()
    if not (math.isfinite(noise) and math.isfinite(middle)):
        return Estimate(estimate, -math.inf, math.inf)
    return Estimate(estimate, estimate + low - middle, estimate + high - middle)


def _laws(groups: Sequence[_Group], interval: Interval) -> tuple[dict[str, Estimate], list[dict[str, Any]]]:
    """(exponents and coefficients of N* and D*, N* with its band over C); unknown with one budget."""
    if len(groups) < 2:
        unknown = {"exponent": UNKNOWN, "coefficient": exponential(UNKNOWN)}
        return {f"{letter}_{name}": value for letter in "ND" for name, value in unknown.items()}, []
    x_K = np.log([group.flops for group in groups])
    slope_K, intercept_K = line(x_K)

    def events(n_K: np.ndarray) -> np.ndarray:
        return np.array([group.log_events(n) for group, n in zip(groups, n_K, strict=True)])

    def along(weight_K: np.ndarray, values: Callable[[np.ndarray], np.ndarray] = np.asarray) -> Estimate:
        return interval(lambda n_K: float(weight_K @ values(n_K)))

    parameters = {
        "N_exponent": along(slope_K),
        "N_coefficient": exponential(along(intercept_K)),
        "D_exponent": along(slope_K, events),
        "D_coefficient": exponential(along(intercept_K, events)),
    }
    told = [(math.exp(x), exponential(along(intercept_K + x * slope_K))) for x in drawn_places(x_K)]
    return parameters, [{"flops": flops, **value.as_dict()} for flops, value in told]


def _budgets(runs: Runs, optima: Sequence[_Optimum], refused: Mapping[float, str]) -> tuple[BudgetOptimum, ...]:
    found = [BudgetOptimum(flops, False, {}, reason=reason) for flops, reason in refused.items()]
    for one in optima:
        n = one.log_params
        # D falls as N grows.
        d = Estimate(*(one.group.log_events(end) for end in (n.estimate, n.high, n.low)))
        values = {"N_opt": exponential(n), "D_opt": exponential(d)}
        found.append(BudgetOptimum(one.group.flops, True, values, from_loss(runs.metric, one.loss)))
    return tuple(sorted(found, key=lambda budget: budget.flops))


def _definitions(runs: Runs, curve: str) -> dict[str, str]:
    loss = transform_name(runs.metric)
    kappa = "interpolated over the budget's runs" if runs.has("events") else "6, as the runs have no D"
    return {
        **runs.definitions,
        "fitted": f"log of {loss}" if curve == "akima" else loss,
        "N_opt": f"lowest point of the {curve} curve over log N at one C, of runs within a factor 8 of the best one "
        "where the sizes span more than a factor 64",
        "D_opt": f"C / (kappa N_opt) with kappa = C/(N D) {kappa}",
    }


def _doubts(answer: _Answer, refused: Mapping[float, str]) -> tuple[str, ...]:
    found = [f"C = {flops:.3g}: {reason}" for flops, reason in sorted(refused.items())]
    count = len(answer.optima)
    if count == 1:
        found.append("one budget has an optimum, so there is no law: add 2 budgets of 5 sizes or more")
    if count == 2:
        found.append("two budgets have an optimum: whether a power law holds is not known; add 1 budget or more")
    if answer.factor > 1:
        found.append(
            f"the optima scatter {math.sqrt(answer.ratio):.1f} times their errors about the power law: "
            f"its intervals are widened {answer.factor:.1f} times"
        )
    return tuple(found)


def _refuse_none(runs: Runs, kept: Sequence[object], refused: Mapping[float, str]) -> None:
    """Raises UserError where no budget is left."""
    if not kept:
        flops, reason = max(refused.items())
        raise UserError(
            f"no budget of {len(refused)} has an optimum (C = {flops:.3g}: {reason})",
            file=runs.source,
            fix="train 5 sizes or more, on both sides of the optimum, at each of 3 budgets or more",
        )
