"""The loss as a surface of model size and data, L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022).

With C = k N^g D (g = 1 unless the runs say otherwise) the best size at a budget is N_opt = G (C / k)^a with
a = beta / (alpha + g beta) and G = (alpha A / (g beta B))^(1 / (alpha + g beta)); D_opt goes with C^b,
b = alpha / (alpha + g beta). A metric to maximise is fitted as `transform.to_loss` turns it.

Shape legend: R runs, P parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from bfm.errors import UserError
from bfm.laws.cost import Cost, cost_levels, cost_of
from bfm.laws.result import BudgetOptimum, Estimate, LawFit
from bfm.laws.runs import Runs
from bfm.laws.surface_fit import Fitted, Noise, Objective, extrapolation, fit_form, noise_of
from bfm.laws.surface_form import LOG_A, LOG_ALPHA, LOG_B, LOG_BETA, LOG_E, LOG_REPEATS, REPEATS, Form, exponents
from bfm.laws.surface_notes import (
    check,
    condition_of,
    outliers_of,
    repeating,
    repeats_of,
    warnings_of,
)
from bfm.laws.transform import from_loss, to_loss, transform_name

_DATA_REPEATED = (
    "effective, D' = U + U R* (1 - exp(-R / R*)) with R = D / U - 1 repetitions, because R* is closed above "
    "(or because it was asked for)"
)
_DATA_PLAIN = "D, repeats counted in full, because the 95 % interval of R* is open above: the runs do not refuse it"
_FAR = math.log(4.0)
_NEAR_FLOPS = math.log(2.0) + 1e-6


@dataclass(frozen=True)
class Surface:
    """A fitted surface, ready to be asked."""

    fit: LawFit
    cost: Cost
    fitted: Fitted
    log_n_R: np.ndarray
    """ln N of the runs."""
    log_c_R: np.ndarray
    """ln C of the runs."""
    center: tuple[float, float]
    """Mean ln N and mean ln D, from which the form counts."""
    noise: Noise
    drift: float
    """Half width of the error of extrapolation per unit of ln C above the runs; NaN: not measured."""

    def expected(self, params: float, events: float, unique_events: float | None = None) -> float:
        """What `mean` estimates, without the interval, which takes time."""
        return self._value(self._log_loss(self.fitted.theta_P, *_logs(params, events, unique_events)))

    def mean(self, params: float, events: float, unique_events: float | None = None) -> Estimate:
        """The metric expected at (N, D, unique events), with the interval of that mean; in the metric's units."""
        return self._metric(self._log_mean(params, events, unique_events))

    def predict(self, params: float, events: float, unique_events: float | None = None) -> Estimate:
        """The metric of a new run at (N, D), with its prediction interval.

        Joins in ln loss, in squares: the interval of the mean, the noise of one run, and above the runs' largest C the
        error of extrapolation (`drift` times ln of how far above).
        """
        mean = self._log_mean(params, events, unique_events)
        log_c = math.log(self.cost.flops(params, events))
        beyond = max(0.0, log_c - float(self.log_c_R.max())) * (0.0 if math.isnan(self.drift) else self.drift)
        one = self.noise.at(mean.estimate)
        low = math.hypot(mean.estimate - mean.low, one, beyond)
        high = math.hypot(mean.high - mean.estimate, one, beyond)
        middle = mean.estimate + self.noise.shift
        return self._metric(Estimate(mean.estimate, middle - low, middle + high))

    def best(self, flops: float) -> tuple[float, float]:
        """The best (N, D) at C, each event seen once, without the intervals of `optimum`."""
        log_n, log_d = self._log_best(self.fitted.theta_P, flops)
        return math.exp(log_n), math.exp(log_d)

    def optimum(self, flops: float) -> BudgetOptimum:
        """The best N and D at C, each event seen once."""
        size = _exp(self.fitted.uncertainty.interval(lambda theta_P: self._log_best(theta_P, flops)[0]))
        data = (self.cost.events(n, flops) if 0 < n < math.inf else -n for n in (size.estimate, size.high, size.low))
        optima = {"N_opt": size, "D_opt": Estimate(*data)}
        log_n, log_d = self._log_best(self.fitted.theta_P, flops)
        if self._is_made_up(log_n, size):
            optima = {name: Estimate(math.nan, value.low, value.high) for name, value in optima.items()}
        best = from_loss(self.fit.metric, math.exp(self._log_loss(self.fitted.theta_P, log_n, log_d, log_d)))
        reason = self._why_open(flops, log_n)
        return BudgetOptimum(flops, not reason, optima, best, reason)

    def _is_made_up(self, log_n: float, size: Estimate) -> bool:
        """Whether the optimum lies far outside the runs on a side that they do not close."""
        below, above = self.log_n_R.min() - log_n, log_n - self.log_n_R.max()
        return (below > _FAR and not size.low > 0) or (above > _FAR and size.high == math.inf)

    def _why_open(self, flops: float, log_n: float) -> str:
        near_R = np.abs(self.log_c_R - math.log(flops)) <= _NEAR_FLOPS
        if not near_R.any():
            return "no run within a factor of 2 of this C: the surface alone says it"
        if not (self.log_n_R[near_R] < log_n).any():
            return "no smaller run near this C"
        return "" if (self.log_n_R[near_R] > log_n).any() else "no larger run near this C"

    def _log_best(self, theta_P: np.ndarray, flops: float) -> tuple[float, float]:
        """(ln N_opt, ln D_opt)."""
        (center_n, center_d), power = self.center, self.cost.power
        alpha, beta = exponents(theta_P)
        paid = math.log(flops / self.cost.scale) - power * center_n - center_d
        pull = theta_P[LOG_ALPHA] + theta_P[LOG_A] - theta_P[LOG_BETA] - theta_P[LOG_B] - math.log(power)
        n = (pull + beta * paid) / (alpha + power * beta)
        return float(n + center_n), float(paid - power * n + center_d)

    def _log_mean(self, params: float, events: float, unique_events: float | None) -> Estimate:
        logs = _logs(params, events, unique_events)
        return self.fitted.uncertainty.interval(lambda theta_P: self._log_loss(theta_P, *logs))

    def _log_loss(self, theta_P: np.ndarray, log_n: float, log_d: float, log_u: float) -> float:
        center_n, center_d = self.center
        unique = None if self.fitted.form.log_u_R is None else np.array([log_u - center_d])
        form = Form(np.array([log_n - center_n]), np.array([log_d - center_d]), unique)
        return float(form.log_loss(theta_P)[0])

    def _metric(self, log_loss: Estimate) -> Estimate:
        """ln loss to the metric's units; an open end stays infinite."""
        ends = [self._value(end) for end in (log_loss.low, log_loss.high)]
        if ends[0] > ends[1]:
            ends.reverse()
        return Estimate(self._value(log_loss.estimate), *ends)

    def _value(self, log_loss: float) -> float:
        falls = from_loss(self.fit.metric, 0.0) > from_loss(self.fit.metric, 1.0)
        if math.isinf(log_loss):
            return -log_loss if falls else log_loss
        return from_loss(self.fit.metric, math.exp(log_loss))


def _logs(params: float, events: float, unique_events: float | None) -> tuple[float, float, float]:
    """ln of N, D and the unique events."""
    seen = events if unique_events is None else min(unique_events, events)
    if min(params, events, seen) <= 0:
        raise UserError("N, D and the unique events of a prediction are above 0", fix="give positive counts")
    return math.log(params), math.log(events), math.log(seen)


def fit_surface(
    runs: Runs,
    *,
    objective: str = "huber",
    delta: float = 1e-3,
    seed: int = 0,
    bootstrap: int = 0,
    effective: bool | None = None,
) -> Surface:
    """Fit the surface to runs with params (N), events (D), loss, and optionally flops, unique_events, curve.

    `objective` is "huber" (delta in ln loss) or "asym_mae" (see `surface_fit`). `bootstrap` draws replace the profile
    likelihood; `seed` is theirs. `effective` counts repeated events less: None where unique events are known, some
    runs repeat, and the 95 % interval of R* is closed above, so the runs refuse that repeats count in full.
    Raises UserError for fewer than 7 runs, fewer than 3 sizes N or D, and repeats asked for where there are none.
    """
    if objective not in ("huber", "asym_mae"):
        raise UserError(f"there is no objective {objective!r}", key="--objective", fix="huber or asym_mae")
    if not 0 < delta < math.inf:
        raise UserError(f"Huber's loss has no corner at {delta:g}", key="--delta", fix="above 0, such as 1e-3")
    check(runs)
    aim = Objective(objective, delta)
    y_R = np.log(to_loss(runs.metric, runs["loss"]))
    log_n_R, log_d_R = np.log(runs["params"]), np.log(runs["events"])
    groups_R = runs["curve"] if runs.has("curve") else np.arange(len(runs))
    plain = Form(log_n_R - log_n_R.mean(), log_d_R - log_d_R.mean())
    fitted, repeated = None, None
    if effective is not False and repeating(runs, asked=bool(effective)):
        log_u_R = np.log(np.minimum(runs["unique_events"], runs["events"])) - log_d_R.mean()
        with_repeats = Form(plain.log_n_R, plain.log_d_R, log_u_R)
        fitted = fit_form(with_repeats, y_R, aim, bootstrap, groups_R, seed)
        repeated = _closed(_exp(fitted.uncertainty.interval(lambda theta_P: theta_P[LOG_REPEATS])))
        if not effective and math.isinf(repeated.high):
            fitted = None
    fitted = fitted or fit_form(plain, y_R, aim, bootstrap, groups_R, seed)
    cost = cost_of(runs)
    log_c_R = np.log(cost.flops(runs["params"], runs["events"]))
    drift = extrapolation(fitted.form, y_R, fitted.theta_P, aim, log_c_R)
    error_R = y_R - fitted.form.log_loss(fitted.theta_P)
    law = _law(runs, fitted, aim, cost, error_R, drift, repeated)
    center = (float(log_n_R.mean()), float(log_d_R.mean()))
    noise = noise_of(error_R, y_R - error_R, fitted.form.size)
    surface = Surface(law, cost, fitted, log_n_R, log_c_R, center, noise, drift)
    budgets = tuple(surface.optimum(flops) for flops in cost_levels(runs, log_c_R))
    return replace(surface, fit=replace(law, budgets=budgets))


def _law(
    runs: Runs,
    fitted: Fitted,
    aim: Objective,
    cost: Cost,
    error_R: np.ndarray,
    drift: float,
    repeated: Estimate | None,
) -> LawFit:
    """Everything but the budgets."""
    parameters = _parameters(runs, fitted, cost)
    outliers = outliers_of(runs, error_R)
    used = fitted.form.log_u_R is not None
    if used and repeated is not None:
        parameters["R_star"] = repeated
    definitions = {
        **runs.definitions,
        "C of (N, D)": cost.words,
        "fitted": f"ln of {transform_name(runs.metric)}; residuals are ln measured - ln fitted",
        "a, b": "exponents of N_opt and D_opt in C, every event seen once",
        "data": _DATA_REPEATED if used else "D, repeats counted in full" if repeated is None else _DATA_PLAIN,
    }
    return LawFit(
        law="surface",
        metric=runs.metric,
        parameters=parameters,
        definitions=definitions,
        runs=len(runs),
        interval_method=fitted.method,
        objective=fitted.value,
        objective_name=aim.name,
        residuals=tuple(error_R.tolist()),
        outliers=outliers,
        warnings=warnings_of(runs, fitted, parameters, outliers, drift),
        details={
            **repeats_of(used, repeated),
            "condition_number": condition_of(fitted),
            "extrapolation_error_per_ln_C": None if math.isnan(drift) else drift,
        },
    )


def _parameters(runs: Runs, fitted: Fitted, cost: Cost) -> dict[str, Estimate]:
    """E, A, B, alpha, beta, a, b with intervals."""
    center_n, center_d = float(np.log(runs["params"]).mean()), float(np.log(runs["events"]).mean())

    def share(theta_P: np.ndarray) -> float:
        alpha, beta = exponents(theta_P)
        return float(beta / (alpha + cost.power * beta))

    logs = {
        "E": lambda theta_P: theta_P[LOG_E],
        "A": lambda theta_P: theta_P[LOG_A] + exponents(theta_P)[0] * center_n,
        "B": lambda theta_P: theta_P[LOG_B] + exponents(theta_P)[1] * center_d,
        "alpha": lambda theta_P: theta_P[LOG_ALPHA],
        "beta": lambda theta_P: theta_P[LOG_BETA],
    }
    found = {name: _exp(fitted.uncertainty.interval(log)) for name, log in logs.items()}
    found["E"] = replace(found["E"], low=max(found["E"].low, 0.0))
    a = fitted.uncertainty.interval(share)
    b = Estimate(*(1 - cost.power * value for value in (a.estimate, a.high, a.low)))
    return {**found, "a": a, "b": b}


def _exp(log: Estimate) -> Estimate:
    """Of a quantity above 0; an open end stays infinite."""
    ends = (end if math.isinf(end) else math.exp(min(end, 700.0)) for end in (log.low, log.high))
    return Estimate(math.exp(log.estimate), *ends)


def _closed(repeats: Estimate) -> Estimate:
    """An end of R* at its bound is open."""
    low = repeats.low if repeats.low > REPEATS[0] else 0.0
    return replace(repeats, low=low, high=repeats.high if repeats.high < REPEATS[1] * 0.999 else math.inf)
