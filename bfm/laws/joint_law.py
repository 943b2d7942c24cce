"""The joint model as a law: what every row of a sweep says of N, D and all else that was varied, in words and numbers.

Enters: runs. Leaves: a LawFit whose `details` hold what a figure needs: per axis (`axes`) the curves of every budget,
what each run would have reached were all else at its best (`adjusted`), the optimum over C (`trend`) and what the ends
of the range cost (`ends`); the metric of one run at the optimum up to 10 times the largest C (`outlook`); the sizes of
the errors (`noise`).

Shape legend: R rows, P parameters, X places of a curve.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from bfm.errors import UserError
from bfm.laws.cost import unbracketed
from bfm.laws.joint import FEWEST, Joint, fit_joint
from bfm.laws.joint_form import LEFT, LOG_A, LOG_ALPHA, LOG_B, LOG_BETA, LOG_E, RIGHT
from bfm.laws.joint_optimum import Optima, along_axis, ends_of, known, optima_of
from bfm.laws.powerlaw import PowerLaw
from bfm.laws.result import UNKNOWN, BudgetOptimum, Estimate, LawFit, Outlier
from bfm.laws.runs import Runs
from bfm.laws.transform import from_loss, in_units, transform_name

SYMBOLS = {"params": "N", "share": "s", "negatives": "K"}
"""Of axes; others go by their own name."""
METHOD = "t intervals of Gaussian errors of rows and trials and of what the form misses, their sizes by REML"
_PICTURE, _OUTLOOK = 60, 16
BEYOND = 10.0
"""The outlook goes to so many times the largest C."""
_POWER = ("exponent", "coefficient")
_COSTLY = 0.05
"""Relative misfit of the cost from which on it is named."""
_REFUSED = 0.01
"""p-value below which what the form leaves out is named."""


def joint_law(runs: Runs) -> LawFit:
    """What all rows say of everything that was varied. Raises UserError as `fit_joint`."""
    return _law_of(fit_joint(runs), runs)


def axis_law(runs: Runs, name: str) -> LawFit:
    """The same, of one axis alone (share, negatives): its optimum per budget, its power law in C, its two rates.

    Raises UserError where the runs do not differ in it, and as `fit_joint`.
    """
    runs.require(name, name, "loss")
    values = np.unique(runs[name][runs[name] > 0])
    if len(values) < FEWEST:
        what = f"the runs stand at {len(values)} {name} above 0, and an optimum needs {FEWEST}"
        raise UserError(what, file=runs.source, key=name, fix=f"add runs at {FEWEST - len(values)} or more others")
    fit = fit_joint(replace(runs, settings=tuple(dict.fromkeys((*runs.settings, name)))))
    if name not in fit.frame.axes:
        what = f"the {name} of the runs follows their N and batch"
        raise UserError(what, file=runs.source, key=name, fix="add runs that differ in it alone")
    whole, optimum = _law_of(fit, runs), f"{SYMBOLS.get(name, name)}_opt"
    budgets = tuple(
        _of_axis(budget, optimum, runs[name][runs[name] > 0]) for budget in whole.budgets if optimum in budget.optima
    )
    own = {key: value for key, value in whole.parameters.items() if key.startswith(f"{name}_")}
    own = {key if key.endswith(_POWER) else key.removeprefix(f"{name}_"): value for key, value in own.items()}
    details = {"axes": {name: whole.details["axes"][name]}, "noise": whole.details["noise"]}
    warnings = (*runs.warnings, *_moving(fit, name))
    return replace(whole, law=name, parameters=own, budgets=budgets, warnings=warnings, details=details)


def _law_of(fit: Joint, runs: Runs) -> LawFit:
    """A fitted model as a law."""
    best = optima_of(fit, runs)
    names = ("params", *fit.frame.axes)
    rest_R = fit.rest_R
    views = {name: _view(fit, runs, best, name, rest_R) for name in names}
    return LawFit(
        law="joint",
        metric=runs.metric,
        parameters=_parameters(fit, best),
        definitions=_definitions(fit, runs),
        runs=len(runs),
        interval_method=f"{METHOD}; {fit.free:.0f} degrees of freedom",
        budgets=tuple(_budget(fit, best, flops) for flops in best.budgets),
        residuals=tuple(rest_R.tolist()),
        outliers=_outliers(fit, runs, rest_R),
        warnings=(*runs.warnings, *doubts(fit)),
        details={"axes": views, "outlook": _outlook(fit, runs, best), "noise": _noise_of(fit)},
    )


def _noise_of(fit: Joint) -> dict[str, float]:
    """Standard deviations of the loss at the middle C (a row's own, its trial's, what the form misses) and growth."""
    errors, own = fit.problem.errors, math.sqrt(fit.problem.variance)
    found = {"row": own, "trial": own * math.sqrt(errors.trial), "miss": own * math.sqrt(errors.miss)}
    return {**found, "power_of_C": errors.growth}


def _parameters(fit: Joint, best: Optima) -> dict[str, Estimate]:
    places, unit = fit.problem.places, np.eye(len(fit.theta_P))
    found: dict[str, Estimate] = {}
    if fit.has_sizes:
        data = best.events(fit.cost)
        found |= {"N_exponent": best.size.exponent(), "N_coefficient": best.size.at(1.0)}
        found |= {"D_exponent": data.exponent(), "D_coefficient": data.at(1.0)}
        for name, log, rate, column in (("A", LOG_A, LOG_ALPHA, "params"), ("B", LOG_B, LOG_BETA, "events")):
            middle = fit.frame.logs[column]
            exponent_now = math.exp(fit.theta_P[rate])
            gradient_P = unit[log] + exponent_now * middle * unit[rate]
            found[name] = fit.of(float(fit.theta_P[log]) + exponent_now * middle, gradient_P).exp()
        found |= {name: fit.parameter(place) for name, place in (("alpha", LOG_ALPHA), ("beta", LOG_BETA))}
    found["E"] = fit.parameter(LOG_E)
    if places.repeats is not None:
        found["R_star"] = fit.parameter(places.repeats) if fit.tells(places.repeats) else UNKNOWN.exp()
    if places.critical is not None and not fit.tells(places.critical):
        found["critical_batch"] = UNKNOWN.exp()
    elif places.critical is not None:
        log_batch = float(fit.theta_P[places.critical]) + fit.frame.logs["batch"]
        found["critical_batch"] = fit.of(log_batch, unit[places.critical]).exp()
    for name, span in places.spans.items():
        law = best.axes[name]
        found |= {f"{name}_exponent": law.exponent(), f"{name}_coefficient": law.at(1.0)}
        for side, place in (("alpha", span.start + RIGHT), ("beta", span.start + LEFT)):
            found[f"{name}_{side}"] = fit.parameter(place) if fit.tells(place) else UNKNOWN.exp()
        if places.axes[name].off_R is not None:
            found[f"{name}_at_zero"] = fit.of(float(fit.theta_P[span.stop - 1]), unit[span.stop - 1])
    steps = [f"{name}={value}" for name, values in fit.frame.choices.items() for value in values[1:]]
    for place, name in enumerate(steps, places.first_step):
        found[name] = fit.of(float(fit.theta_P[place]), unit[place]) if fit.tells(place) else UNKNOWN
    return found


def _budget(fit: Joint, best: Optima, flops: float) -> BudgetOptimum:
    size, optima, reason = best.size.own(flops), {}, best.refused.get(flops, "")
    log_n = best.log_size(flops)
    if size is not None and fit.has_sizes:
        optima = {"N_opt": size, "D_opt": size.through_falling(lambda params: fit.cost.events(params, flops))}
        log_n_R, log_c_R = np.log(fit.columns["params"]), np.log(fit.columns["flops"])
        reason = unbracketed(log_n_R, log_c_R, math.log(flops), log_n)
    for name, law in best.axes.items():
        value = law.own(flops)
        if value is not None:
            optima[f"{SYMBOLS.get(name, name)}_opt"] = known(value, ends_of(fit, name, flops, log_n))
    best_loss = float(fit.along(flops, np.array([log_n]))[0][0])
    return BudgetOptimum(flops, not reason, optima, from_loss(fit.metric, best_loss), reason)


def _of_axis(budget: BudgetOptimum, optimum: str, swept_R: np.ndarray) -> BudgetOptimum:
    """A budget as the law of one axis sees it."""
    value, span = budget.optima[optimum], f"{swept_R.min():.3g} to {swept_R.max():.3g}"
    lies = "beyond the tested range" if value.low > 0 or value.high < math.inf else "flat within the noise"
    reason = "" if math.isfinite(value.estimate) else f"{lies} from {span}"
    return replace(budget, bracketed=not reason, optima={optimum: value}, reason=reason)


def _view(fit: Joint, runs: Runs, best: Optima, name: str, rest_R: np.ndarray) -> dict[str, Any]:
    """What is drawn of one axis."""
    values_R = fit.columns[name]
    adjusted_R = np.full(len(values_R), math.nan)
    on_R = values_R > 0
    curves, groups = [], runs.budgets() if runs.has("budget") or runs.has("flops") else {}
    for flops in best.budgets:
        here = groups.get(flops, np.zeros(0, int))
        adjusted_R[here] = rest_R[here] + along_axis(fit, name, flops, best.log_size(flops), values_R[here])[0]
        swept = values_R[here][on_R[here]] if on_R[here].any() else values_R[on_R]
        x_X = np.geomspace(swept.min(), swept.max(), _PICTURE)
        value_X = from_loss(runs.metric, along_axis(fit, name, flops, best.log_size(flops), x_X)[0])
        curves.append({"flops": flops, "x": x_X.tolist(), "value": value_X.tolist()})
    law = best.size if name == "params" else best.axes[name]
    top = max((flops for flops in best.budgets if law.own(flops) is not None), default=max(best.budgets))
    return {
        "symbol": SYMBOLS.get(name, name),
        "curves": curves,
        "adjusted": [value if math.isfinite(value) else None for value in from_loss(runs.metric, adjusted_R).tolist()],
        "trend": _trend(fit, law),
        "ends": ends_of(fit, name, top, best.log_size(top)).as_dicts(),
    }


def _trend(fit: Joint, law: PowerLaw) -> list[dict[str, Any]]:
    """An optimum with its interval from the smallest C to beyond the largest."""
    if len(law.log_c_K) < 2:
        return []
    return [{"flops": flops, **law.at(flops).as_dict()} for flops in _horizon(fit)]


def _horizon(fit: Joint) -> list[float]:
    """C from the smallest of the rows to beyond the largest."""
    flops_R = fit.columns["flops"]
    return np.geomspace(flops_R.min(), BEYOND * flops_R.max(), _OUTLOOK).tolist()


def _outlook(fit: Joint, runs: Runs, best: Optima) -> list[dict[str, Any]]:
    """The metric of one run at the optimum, events repeated where the log holds no more."""
    if len(best.size.log_c_K) < 2 or not fit.has_sizes:
        return []
    distinct = float(fit.columns["unique_events"].max()) if fit.frame.repeats else math.inf
    found = []
    for flops in _horizon(fit):
        where = fit.places(flops, np.log([best.size.at(flops).estimate]), unique_events=distinct)
        (loss,), (half,) = fit.foretell(where)
        value = in_units(runs.metric, Estimate.around(loss, half))
        found.append({"flops": flops, "estimate": value.estimate, "low": value.low, "high": value.high})
    return found


def _outliers(fit: Joint, runs: Runs, rest_R: np.ndarray) -> tuple[Outlier, ...]:
    own = math.sqrt(fit.problem.variance)
    less = np.flatnonzero(fit.problem.weight_R < 1)
    ranked = less[np.argsort(fit.problem.weight_R[less])]
    return tuple(
        Outlier(runs.names[place], float(rest_R[place]), f"{abs(rest_R[place]) / own:.1f} standard deviations of a row")
        for place in ranked
    )


def doubts(fit: Joint) -> list[str]:
    """One line per doubt about a fit."""
    noise, found = _noise_of(fit), []
    if noise["miss"] > 2 * noise["row"]:
        found.append(
            f"the form misses more ({noise['miss']:.2g}) than a row's own error ({noise['row']:.2g}): intervals hold "
            "it, but E, A and B are the form's"
        )
    if fit.has_sizes:
        for name, place in (("E", LOG_E), ("alpha", LOG_ALPHA), ("beta", LOG_BETA)):
            if not fit.tells(place):
                found.append(f"the runs do not tell {name}: a wider range of N and D at more budgets would")
    for name in fit.frame.axes:
        found += _moving(fit, name)
    if fit.problem.places.log_batch_R is not None and (p := fit.free_batches()) < _REFUSED:
        found.append(
            f"small batches cost here, which the form has not (p = {p:.2g}): optima at small batches do not hold; "
            "leave the smallest out"
        )
    if fit.problem.places.repeats is not None and not fit.tells(fit.problem.places.repeats):
        found.append("the runs do not tell what a repeated event is worth: predictions of repeats are the prior's")
    if fit.has_sizes and fit.cost.misfit > _COSTLY:
        found.append(
            f"C is that of N and D within {fit.cost.misfit:.0%} only: what a C pays for, and so the best sizes, are no "
            "surer than that"
        )
    return found


def _moving(fit: Joint, name: str) -> list[str]:
    """A doubt about rates that are the same at every C."""
    p = fit.shared_rates(name)
    if p > _REFUSED:
        return []
    return [
        f"the sides of the valley in {name} are not the same at every C (p = {p:.2g}): its optima hold near the middle"
    ]


def _definitions(fit: Joint, runs: Runs) -> Mapping[str, str]:
    """What was fitted to what."""
    varied = [name for name in fit.columns if name not in ("params", "events", "flops", "unique_events")]
    data = "D, repeats counted in full"
    if fit.frame.repeats:
        data = "U + U R* (1 - exp(-(D / U - 1) / R*)) of D events, U of them distinct; optima are those of fresh events"
    return {
        **runs.definitions,
        **({"C of (N, D)": fit.cost.words} if fit.has_sizes else {}),
        "L": transform_name(runs.metric),
        "form": "E + A / N^alpha + B / D^beta, a valley in the log of " + (", ".join(fit.frame.axes) or "nothing else"),
        "varied": ", ".join([*varied, *fit.frame.choices]) or "N and D alone",
        "data": data,
        **_batch_words(fit),
        **{name: f"steps of the loss beside {name}={values[0]}" for name, values in fit.frame.choices.items()},
        "rows": _chosen(runs),
        "noise": _noise_words(fit),
    }


def _batch_words(fit: Joint) -> dict[str, str]:
    if "batch" not in fit.columns:
        return {}
    return {"batch": f"optima are those at the smallest of the rows, B = {fit.columns['batch'].min():.4g}"}


def _noise_words(fit: Joint) -> str:
    """The errors that intervals hold, and the one that they do not."""
    noise = _noise_of(fit)
    parts = f"a row {noise['row']:.2g}, its trial {noise['trial']:.2g}, what the form misses {noise['miss']:.2g}"
    shared = "rows that answer the same queries share an error that is in no interval: others would move all alike"
    return f"standard deviations at the middle C: {parts}, growing as C^{noise['power_of_C']:.2f}; {shared}"


def _chosen(runs: Runs) -> str:
    """How the rows came to be, as far as they show it."""
    if not (runs.has("curve") and runs.has("budget")):
        return f"all {len(runs)} as they were given"
    rungs, (trials, rows_T) = np.unique(runs["budget"]), np.unique(runs["curve"], return_counts=True)
    budgets = f"{len(rungs)} budget{'s' if len(rungs) > 1 else ''}"
    whole, on = f"all {len(runs)} of {len(trials)} trials at {budgets}", int((rows_T > 1).sum())
    if on in (0, len(trials)):
        return f"{whole}, as designed"
    return f"{whole}; {on} went on to further ones (that a policy chose them by their rows is allowed for)"
