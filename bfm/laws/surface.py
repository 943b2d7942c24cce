"""The loss as a surface of model size and data, L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022).

Approach 3 of that paper: the least sum of Huber's loss of ln residuals, from many starts. The other objective,
"asym_mae", is the mean absolute error of the loss with fits above a run counted ten times (the default of the
chinchilla package of kyo-takano: a lower envelope). It has kinks, so its intervals are a bootstrap. Intervals under
Huber's loss take noise as even in ln loss; where it is even in loss, that of N_opt holds 90 to 93 %, not 95
(`benchmarks/laws.py surface`).

With C = k N^g D (g = 1 unless the runs say otherwise) the best size at a budget is N_opt = G (C / k)^a with
a = beta / (alpha + g beta) and G = (alpha A / (g beta B))^(1 / (alpha + g beta)); D_opt goes with C^b,
b = alpha / (alpha + g beta). A metric to maximise is fitted as `transform.to_loss` turns it.

Shape legend: R runs, S draws, P parameters. theta_P = ln of (A / N0^alpha, B / D0^beta, E, alpha, beta), with N0 and D0
the geometric means of the runs: a fit starts well conditioned, and all five stay above 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from scipy import stats

from bfm.errors import UserError
from bfm.laws.cost import PowerCost, cost_levels, power_cost_of, unbracketed
from bfm.laws.result import UNKNOWN, BudgetOptimum, Estimate, LawFit, Outlier
from bfm.laws.robust import METHOD, RobustFit, robust_fit
from bfm.laws.runs import Runs, levels
from bfm.laws.transform import from_loss, to_loss, transform_name

_ABOVE = 10.0
"""Weight of a fit above the run in asym_mae."""
_ENVELOPE = f"mean absolute error of the loss, fits above a run weighted {_ABOVE:g}"
_ASYMMETRIC_DRAWS = 100
_ROUNDED = np.geomspace(1e-2, 1e-7, 6)
"""Deltas of asym_mae in units of the median loss; the first three are enough for draws."""
_FEWEST = 7
_SIZES = 3
_ONE_BUDGET = math.log(1.5)
_EXPONENTS = (0.01, 4.0)
"""Bounds of alpha and beta."""
_NO_FLOOR = 1e-4
"""E is kept above this share of the smallest loss; there it is not told from 0."""
_FAR = math.log(4.0)
_OUTLIER = 5.0
_ILL_CONDITIONED = 1e4
_REFUSED = 0.01
"""p-value below which the form is said to miss the runs."""
_EXACT = 1e-7
"""Residuals below are rounding."""
_LEAST_POWER = 0.1
"""Of N in the cost of an event: below, larger models are all but free, and none is the best."""
_LIMIT = 20.0
"""An interval search may try any log; exp of more says nothing further and overflows."""
Quantity = Callable[[np.ndarray], float]
"""Of theta_P."""
Interval = Callable[[Quantity], Estimate]


@dataclass(frozen=True)
class _Problem:
    """The surface at given runs, or at draws of them, and what is to be least."""

    log_n_R: np.ndarray
    log_d_R: np.ndarray
    y_R: np.ndarray
    """ln of the measured losses."""
    center: tuple[float, float]
    """ln of N0 and D0."""
    cost: PowerCost
    skewed: bool
    """asym_mae, not Huber's loss."""
    deltas: Sequence[float]
    """Of Huber's loss: one, or what rounds the kinks of asym_mae off less and less."""

    def log_loss(self, theta_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ln L of shape R, its derivatives of shape R x P)."""
        alpha, beta = _exponents(theta_P)
        n_R, d_R = self.log_n_R - self.center[0], self.log_d_R - self.center[1]
        terms_3R = np.stack([theta_P[0] - alpha * n_R, theta_P[1] - beta * d_R, np.full(len(n_R), theta_P[2])])
        log_loss_R = np.logaddexp.reduce(terms_3R)
        share_3R = np.exp(terms_3R - log_loss_R)
        return log_loss_R, np.stack([*share_3R, -alpha * n_R * share_3R[0], -beta * d_R * share_3R[1]], 1)

    def at(self, places: np.ndarray) -> _Problem:
        """The problem of the runs of these places."""
        return replace(self, log_n_R=self.log_n_R[places], log_d_R=self.log_d_R[places], y_R=self.y_R[places])

    def solve(self, theta_P: np.ndarray) -> RobustFit:
        """The minimum that a start leads to, by each delta in turn."""
        model, wanted_R = (self._above, np.zeros(len(self.y_R))) if self.skewed else (self.log_loss, self.y_R)
        bounds = self._bounds()
        for delta in self.deltas:
            fit = robust_fit(model, wanted_R, np.clip(theta_P, *bounds), bounds, delta=delta)
            theta_P = fit.theta_P
        return fit

    def best(self) -> RobustFit:
        """The lowest minimum: over a grid of exponents, the best start of each alpha is followed."""
        exponents, rough = np.geomspace(0.06, 1.6, 7), replace(self, deltas=self.deltas[:1])
        fits = []
        for alpha in exponents:
            starts = [self._start(alpha, beta) for beta in exponents]
            fits.append(
                rough.solve(min(starts, key=lambda start_P: np.abs(self.log_loss(start_P)[0] - self.y_R).sum()))
            )
        return self.solve(min(fits, key=lambda fit: fit.objective).theta_P)

    def _start(self, alpha: float, beta: float) -> np.ndarray:
        """theta_P with the A, B, E of the least relative error at these exponents, made positive."""
        n_R, d_R, loss_R = self.log_n_R - self.center[0], self.log_d_R - self.center[1], np.exp(self.y_R)
        terms_R3 = np.stack([np.exp(-alpha * n_R), np.exp(-beta * d_R), np.ones(len(n_R))], 1)
        level_3 = np.linalg.lstsq(terms_R3 / loss_R[:, None], np.ones(len(n_R)), rcond=None)[0]
        return np.log([*np.maximum(level_3, 0.02 * loss_R.min()), alpha, beta])

    def log_best(self, log_paid: float, theta_P: np.ndarray) -> float:
        """ln N_opt where N^g D is exp(log_paid)."""
        (center_n, center_d), power = self.center, self.cost.power
        alpha, beta = _exponents(theta_P)
        pull = theta_P[3] + theta_P[0] - theta_P[4] - theta_P[1] - math.log(power)
        return float((pull + beta * (log_paid - power * center_n - center_d)) / (alpha + power * beta) + center_n)

    def log_events(self, log_paid: float, log_n: float) -> float:
        """ln D where N^g D is exp(log_paid)."""
        return log_paid - self.cost.power * log_n

    def _above(self, theta_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Fitted minus measured loss, times _ABOVE where above 0, and its derivatives."""
        log_loss_R, jacobian_RP = self.log_loss(theta_P)
        fitted_R, loss_R = np.exp(log_loss_R), np.exp(self.y_R)
        side_R = np.where(fitted_R > loss_R, _ABOVE, 1.0)
        return side_R * (fitted_R - loss_R), (side_R * fitted_R)[:, None] * jacobian_RP

    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        least, (low, high) = float(self.y_R.min()), np.log(_EXPONENTS)
        floor = least + math.log(_NO_FLOOR)
        return np.array([-60.0, -60.0, floor, low, low]), np.array([30.0, 30.0, least, high, high])


def fit_surface(
    runs: Runs, *, objective: str = "huber", delta: float = 1e-3, seed: int = 0, bootstrap: int = 0
) -> LawFit:
    """E, A, B, alpha, beta, a and b of runs with params (N), events (D), loss, and optionally flops, budget, curve.

    `objective` is "huber" (delta in ln loss) or "asym_mae". `bootstrap` draws of whole training runs (`curve`) replace
    the profile likelihood; `seed` is theirs. Repeated events count in full. `budgets` hold N_opt and D_opt at the C of
    `cost_levels`. Raises UserError for fewer than 7 runs, for fewer than 3 N or D, and for one C only.
    """
    if objective not in ("huber", "asym_mae"):
        raise UserError(f"there is no objective {objective!r}", key="--objective", fix="huber or asym_mae")
    if bootstrap < 0:
        raise UserError(f"{bootstrap} draws", key="--bootstrap", fix="0 for the profile likelihood, or 100 and more")
    if not 0 < delta < math.inf:
        raise UserError(f"Huber's loss has no corner at {delta:g}", key="--delta", fix="above 0, such as 1e-3")
    _check(runs)
    log_n_R, log_d_R = np.log(runs["params"]), np.log(runs["events"])
    center = (float(log_n_R.mean()), float(log_d_R.mean()))
    y_R = np.log(to_loss(runs.metric, runs["loss"]))
    skewed = objective == "asym_mae"
    deltas = (math.exp(float(np.median(y_R))) * _ROUNDED).tolist() if skewed else [delta]
    problem = _Problem(log_n_R, log_d_R, y_R, center, power_cost_of(runs), skewed, deltas)
    fit = problem.best()
    interval: Interval = fit.region.interval
    method = METHOD
    if bootstrap or skewed:
        interval, method = _bootstrap(runs, problem, fit, bootstrap or _ASYMMETRIC_DRAWS, np.random.default_rng(seed))
    log_loss_R, jacobian_RP = problem.log_loss(fit.theta_P)
    has_best = problem.cost.power > _LEAST_POWER
    parameters = _parameters(problem, interval) | ({} if has_best else {"a": UNKNOWN, "b": UNKNOWN})
    # Each parameter in units of its own error.
    condition = float(np.linalg.cond(jacobian_RP / np.maximum(np.linalg.norm(jacobian_RP, axis=0), 1e-300))) ** 2
    outliers, form_p = _outliers(runs, y_R - log_loss_R), _form_p(problem, fit.theta_P)
    return LawFit(
        law="surface",
        metric=runs.metric,
        parameters=parameters,
        definitions={
            **runs.definitions,
            "C of (N, D)": problem.cost.words,
            "fitted": f"ln of {transform_name(runs.metric)}; residuals are ln measured - ln fitted",
            "a, b": "exponents of N_opt and D_opt in C",
            "data": "D, repeats counted in full",
        },
        runs=len(runs),
        interval_method=method,
        objective=float(np.abs(fit.residual_R).mean()) if skewed else fit.objective,
        objective_name=_ENVELOPE if skewed else f"sum of Huber's loss of ln residuals, delta {delta:g}",
        budgets=_budgets(runs, problem, fit.theta_P, interval) if has_best else (),
        residuals=tuple((y_R - log_loss_R).tolist()),
        outliers=outliers,
        warnings=(
            *runs.warnings,
            *_doubts(parameters, condition, form_p, outliers),
            *([] if has_best else ["an event costs the runs the same at every N: no size is the best at a C"]),
            *_in_common(runs, redrawn=bool(bootstrap) or skewed),
        ),
        details={"condition_number": condition, "form_p": form_p},
    )


def _check(runs: Runs) -> None:
    """Raises UserError where the runs cannot hold the law's five parameters, saying how many more of what would."""
    runs.require("the surface L(N, D)", "params", "events", "loss")
    if len(runs) < _FEWEST:
        short = _FEWEST - len(runs)
        fix = f"add {short} at other N and D (a grid of {_SIZES} N by {_SIZES} D is the least that is any use)"
        raise UserError(f"{len(runs)} runs are too few for the surface's 5 parameters", file=runs.source, fix=fix)
    for column, letter, other in (("params", "N", "D"), ("events", "D", "N")):
        sizes = len(np.unique(levels(runs[column])))
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


def _bootstrap(
    runs: Runs, problem: _Problem, fit: RobustFit, draws: int, rng: np.random.Generator
) -> tuple[Interval, str]:
    """(percentiles over refits to training runs drawn with replacement, how they are called)."""
    curve_R = runs.curves_R
    members = [np.flatnonzero(curve_R == name) for name in np.unique(curve_R)]
    rough, theta_SP = replace(problem, deltas=problem.deltas[:3]), []
    for _ in range(draws):
        places = np.concatenate([members[one] for one in rng.integers(len(members), size=len(members))])
        theta_SP.append(rough.at(places).solve(fit.theta_P).theta_P)

    def interval(quantity: Quantity) -> Estimate:
        return Estimate.of_draws(quantity(fit.theta_P), [quantity(theta_P) for theta_P in theta_SP])

    what = "runs" if len(members) == len(runs) else "whole training runs"
    return interval, f"percentiles of {draws} bootstrap draws of {what}"


def _parameters(problem: _Problem, interval: Interval) -> dict[str, Estimate]:
    (center_n, center_d), power = problem.center, problem.cost.power

    def share(theta_P: np.ndarray) -> float:
        alpha, beta = _exponents(theta_P)
        return beta / (alpha + power * beta)

    logs: Mapping[str, Quantity] = {
        "E": lambda theta_P: theta_P[2],
        "A": lambda theta_P: theta_P[0] + _exponents(theta_P)[0] * center_n,
        "B": lambda theta_P: theta_P[1] + _exponents(theta_P)[1] * center_d,
        "alpha": lambda theta_P: theta_P[3],
        "beta": lambda theta_P: theta_P[4],
    }
    a = interval(share)
    b = a.through_falling(lambda of_n: 1 - power * of_n)
    return {**{name: interval(log).exp() for name, log in logs.items()}, "a": a, "b": b}


def _exponents(theta_P: np.ndarray) -> tuple[float, float]:
    """(alpha, beta)."""
    alpha, beta = np.exp(np.clip(theta_P[3:], -_LIMIT, _LIMIT))
    return float(alpha), float(beta)


def _budgets(runs: Runs, problem: _Problem, theta_P: np.ndarray, interval: Interval) -> tuple[BudgetOptimum, ...]:
    """The best N and D at each C; no point where it lies far outside the runs on a side that they do not close."""
    cost, log_n_R = problem.cost, problem.log_n_R
    log_c_R = np.log(cost.flops(runs["params"], runs["events"]))
    found = []
    for flops in cost_levels(runs, log_c_R):
        log_paid = math.log(flops / cost.scale)
        n = interval(partial(problem.log_best, log_paid))
        d = n.through_falling(partial(problem.log_events, log_paid))
        there = replace(problem, log_n_R=np.array([n.estimate]), log_d_R=np.array([d.estimate]))
        best = from_loss(runs.metric, math.exp(float(there.log_loss(theta_P)[0][0])))
        reason = unbracketed(log_n_R, log_c_R, math.log(flops), n.estimate)
        vague_below = n.low == -math.inf and n.estimate < log_n_R.min() - _FAR
        if vague_below or (n.high == math.inf and n.estimate > log_n_R.max() + _FAR):
            n, d = replace(n, estimate=math.nan), replace(d, estimate=math.nan)
        optima = {"N_opt": n.exp(), "D_opt": d.exp()}
        found.append(BudgetOptimum(flops, not reason, optima, best, reason))
    return tuple(found)


def _outliers(runs: Runs, error_R: np.ndarray) -> tuple[Outlier, ...]:
    """Runs further than five robust standard deviations from the middle residual."""
    away_R = error_R - np.median(error_R)
    spread = max(1.4826 * float(np.median(np.abs(away_R))), 1e-8)
    return tuple(
        Outlier(runs.names[place], float(error_R[place]), f"{away_R[place] / spread:+.1f} robust standard deviations")
        for place in np.argsort(-np.abs(away_R))
        if abs(away_R[place]) > _OUTLIER * spread
    )


def _doubts(
    parameters: Mapping[str, Estimate], condition: float, form_p: float, outliers: tuple[Outlier, ...]
) -> list[str]:
    notes, floor = [], parameters["E"]
    if not floor.low > 0.05 * floor.estimate or not math.isfinite(floor.high):
        ends = f"{floor.low:.3g} to {floor.high:.3g}"
        notes.append(f"E is ill-determined ({ends}): runs of larger N and D would tell the floor from slow power laws")
    if condition > _ILL_CONDITIONED:
        notes.append(
            f"the design is nearly collinear (condition number {condition:.0e}): N and D move together, or the range "
            "is short; runs at other D/N would part their terms"
        )
    for name in ("alpha", "beta"):
        value = parameters[name].estimate
        if not _EXPONENTS[0] * 1.001 < value < _EXPONENTS[1] * 0.999:
            notes.append(f"{name} is at its bound {value:g}: the runs do not show its term")
    if form_p < _REFUSED:
        notes.append(
            f"the form misses a part of the loss that bends with N and D (p = {form_p:.1g}): no interval here holds "
            "it, those of `fit joint` do"
        )
    if outliers:
        named = ", ".join(outlier.run for outlier in outliers[:5])
        notes.append(f"{len(outliers)} outliers: {named}{', ...' if len(outliers) > 5 else ''}")
    return notes


def _form_p(problem: _Problem, theta_P: np.ndarray) -> float:
    """p-value of the form beside one whose ln L also bends with ln N and ln D (F test of a quadratic, outliers drawn
    in); 1 where the runs cannot tell."""
    log_loss_R, jacobian_RP = problem.log_loss(theta_P)
    n_R, d_R, rest_R = (
        problem.log_n_R - problem.center[0],
        problem.log_d_R - problem.center[1],
        problem.y_R - log_loss_R,
    )
    spread, free = 1.4826 * float(np.median(np.abs(rest_R))), len(rest_R) - 8
    if free < 1 or spread < _EXACT:
        return 1.0
    known = np.linalg.qr(jacobian_RP)[0]
    bends_R3 = np.stack([n_R**2, n_R * d_R, d_R**2], 1)
    bends_R3 = np.linalg.qr(bends_R3 - known @ (known.T @ bends_R3))[0]
    rest_R = np.clip(rest_R, -_OUTLIER * spread, _OUTLIER * spread)
    rest_R = rest_R - known @ (known.T @ rest_R)
    bent = float(((bends_R3.T @ rest_R) ** 2).sum())
    return float(stats.f.sf(bent / 3 / ((float(rest_R @ rest_R) - bent) / free), 3, free))


def _in_common(runs: Runs, redrawn: bool) -> list[str]:
    """A doubt about noise that rows of one training run share."""
    if redrawn or len(np.unique(runs.curves_R)) == len(runs):
        return []
    return [
        "rows of one training run err together, which the profile likelihood does not know: "
        "--bootstrap 200 redraws whole runs"
    ]
