"""What a law says in plain words: a LawFit in, one sentence per axis out (what, how sure, what would tell more).

There is one function per kind of answer: an optimum with its power law, one whose law is open, none within the runs,
and an axis that changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bfm.laws.frontier import goal_of
from bfm.laws.result import UNKNOWN, Estimate, LawFit
from bfm.report.digits import estimate_text, value_text
from bfm.report.law_details import (
    CRITICAL,
    FittedAxis,
    agreements,
    asked_axes,
    choices_of,
    estimate_of,
    hardest_groups,
    ranked_metrics,
)
from bfm.units import format_count, format_flops

_SURE = 0.1
"""Half width of an exponent's interval from which on more budgets are asked for."""
_FEW = 5
"""So many C are listed one by one."""
_VAGUE = 100.0
"""Where the ends are a factor this far apart, nothing is told."""
Said = tuple[str, str]
"""(what it is about, what is said of it)."""


def sentences(fit: LawFit) -> list[Said]:
    """Of each axis that the runs ask about, of batch and repeats, of what a law of its own is about; of laws without
    axes nothing."""
    if "agreement" in fit.details:
        return [(f"{fit.metric} and ranking", agreement(fit))]
    if "groups" in fit.details:
        return [("Critical batch", critical(fit))]
    said = [(axis.words.heading, axis_sentence(axis)) for axis in asked_axes(fit)]
    if "axes" in fit.details and not said:
        said = [("Model size", "the runs of a budget do not differ in it: add others there.")]
    said += [(name.replace("_", " ").capitalize(), _choice(fit, name)) for name in choices_of(fit)]
    if "critical_batch" in fit.parameters:
        said.append(("Batch", _batch(fit.parameters["critical_batch"])))
    if "R_star" in fit.parameters:
        said.append(("Repeated events", _repeats(fit.parameters["R_star"])))
    return said


def axis_sentence(axis: FittedAxis) -> str:
    """Of one axis, without its name."""
    fit, exponent = axis.fit, axis.exponent
    if not axis.optima:
        return f"{_flat(axis) if _is_flat(axis) else _unbracketed(axis)}."
    parts = [_unmoved(axis) if exponent is None else _power(axis, exponent)]
    if exponent is not None and exponent.high - exponent.low > 2 * _SURE:
        parts.append("budgets further apart would tell the exponent better")
    if axis.name != "params" and max(axis.optima) == max(axis.asked):
        costs = [f"by {_amount(fit.metric, end)} at {axis.words.text(end['x'])}" for end in axis.view["ends"]]
        parts.append(f"{_loses(fit.metric)} {' and '.join(costs)}")
    told = "bracketed" if axis.name == "params" else "told"
    parts.append(f"{told} at {len(axis.optima)} of {len(axis.asked)} budgets")
    return f"{'; '.join(filter(None, [*parts, _unbracketed(axis)]))}."


def _power(axis: FittedAxis, exponent: Estimate) -> str:
    """An optimum that moves with C, where the interval of the exponent is on one side of 0, or may stay where it is."""
    if not (exponent.low > 0 or exponent.high < 0):
        return f"{_best(axis)}, not told to move with C (exponent {estimate_text(exponent, '{:.2f}'.format)})"
    verb, top = "grows" if exponent.low > 0 else "falls", max(axis.optima)
    low, high = (f"{end:.2f}" if math.isfinite(end) else "open" for end in (exponent.low, exponent.high))
    power = f"the best {axis.words.symbol} {verb} as C^{exponent.estimate:.2f} (95 %: {low} to {high})"
    return f"{power}, {axis.words.text(axis.optima[top].estimate)} at C = {format_flops(top)}"


def _unmoved(axis: FittedAxis) -> str:
    """An optimum at one budget, or at several whose line is open."""
    return f"{_best(axis)}; how it moves with C is not told: bracket it at more budgets, further apart"


def _best(axis: FittedAxis) -> str:
    top = max(axis.optima)
    return f"best at {estimate_text(axis.optima[top], axis.words.text)} at C = {format_flops(top)}"


def _flat(axis: FittedAxis) -> str:
    """An axis whose whole range changes less than the rows can tell."""
    text, metric, (low, high) = axis.words.text, axis.fit.metric, axis.view["ends"]
    worst = max((low, high), key=lambda end: end["high"])
    change = f"{_loses(metric)} by at most {_amount(metric, worst)}"
    return f"flat: from {text(low['x'])} to {text(high['x'])} {change}; runs further out would tell"


def _unbracketed(axis: FittedAxis) -> str:
    """The budgets that do not tell an optimum, by what to add there; empty where all do."""
    by_side: dict[str, list[str]] = {}
    for curve in axis.view["curves"]:
        if curve["flops"] in axis.asked and curve["flops"] not in axis.optima:
            by_side.setdefault(_side(axis.fit.metric, curve["value"]), []).append(format_flops(curve["flops"]))
    return "; ".join(
        f"not bracketed at {_listed(flops)}: add {side} {axis.words.symbol} there" for side, flops in by_side.items()
    )


def _listed(flops: Sequence[str]) -> str:
    if len(flops) > _FEW:
        return f"{len(flops)} C from {flops[0]} to {flops[-1]}"
    return f"C = {' and '.join(flops)}"


def _choice(fit: LawFit, name: str) -> str:
    """Of a setting that is no number, or has too few values for a valley."""
    steps = {key.partition("=")[2]: value for key, value in fit.parameters.items() if key.startswith(f"{name}=")}
    known = {value: step for value, step in steps.items() if step.is_known}
    if not known:
        return "not told apart from what else these runs differ in."
    said = [f"{value_text(step.estimate, (step.high - step.low) / 2)} with {value}" for value, step in known.items()]
    sure = any(step.low * step.high > 0 for step in known.values())
    told = "" if sure else "; more runs of each would tell them apart"
    usual = fit.definitions[name].rpartition("=")[2]
    return f"the loss changes by {', '.join(said)} beside {usual}{told}."


def _batch(batch: Estimate) -> str:
    """At which batch every second event is lost."""
    if _is_vague(batch):
        return "not told what a large one costs: runs of larger batches would tell."
    return f"a run at B = {estimate_text(batch, format_count)} needs twice the events of one at a small batch."


def _repeats(worth: Estimate) -> str:
    """What an event is worth that is seen again."""
    if _is_vague(worth):
        return "not told what they are worth: runs with more epochs would tell."
    return f"from about R* = {estimate_text(worth)} epochs beyond the first on they teach little."


def _is_vague(value: Estimate) -> bool:
    return not value.is_known or value.high > _VAGUE * value.low


def critical(fit: LawFit) -> str:
    """Of the largest size, by both definitions, and how it moves with N."""
    last = hardest_groups(fit)[-1]
    values = {one.words: one.of(fit, last) for one in CRITICAL}
    batches = " and ".join(
        f"B = {estimate_text(value, format_count)} costs {words}"
        if value.is_known
        else f"which B costs {words} is open"
        for words, value in values.items()
    )
    size = f"at N = {format_count(last['params'])} " if "params" in last else ""
    exponent = fit.parameters.get(CRITICAL[0].exponent, UNKNOWN)
    law = f"it moves as N^{estimate_text(exponent, '{:.2f}'.format)}"
    is_told = math.isfinite(exponent.low) and math.isfinite(exponent.high)
    return f"{size}{batches}; {law if is_told else 'runs at more sizes would tell how it moves with N'}."


def agreement(fit: LawFit) -> str:
    """Whether the loss prefers the runs that other metrics prefer: at the largest C, and where that does not tell, at
    the largest that does, too."""
    said = []
    for metric in ranked_metrics(fit):
        found = agreements(fit, metric)
        told = [one for one in found if one[1].low * one[1].high > 0]
        # The last of each, once.
        shown = dict([*found[-1:], *told[-1:]])
        said += (
            [f"{metric} prefers {', '.join(_prefers(flops, value) for flops, value in shown.items())}"] if shown else []
        )
    return f"{'; '.join(said)}."


def _prefers(flops: float, value: Estimate) -> str:
    runs = "the same runs" if value.low > 0 else "opposite runs" if value.high < 0 else "runs of no told order"
    return f"{runs} at C = {format_flops(flops)} (Spearman {estimate_text(value, '{:+.2f}'.format)})"


def rows_text(fit: LawFit) -> str:
    """How the rows came to be, and which noise was found in them."""
    found = [f"{name.capitalize()}: {fit.definitions[name]}." for name in ("rows", "noise") if name in fit.definitions]
    return " ".join(found)


def _is_flat(axis: FittedAxis) -> bool:
    found = [budget.optima[axis.words.optimum] for budget in axis.asked.values() if axis.name != "params"]
    return bool(found) and all((value.low, value.high) == (0, math.inf) for value in found)


def _side(metric: str, values: Sequence[float]) -> str:
    """Where the metric is still getting better at the end of a budget's curve."""
    best = min(values) if goal_of(metric) == "minimize" else max(values)
    if best in (values[0], values[-1]) and values[0] != values[-1]:
        return "smaller" if best == values[0] else "larger"
    return "other"


def _loses(metric: str) -> str:
    return "the loss rises" if goal_of(metric) == "minimize" else f"{metric} falls"


def _amount(metric: str, end: Mapping[str, Any]) -> str:
    """How much worse a metric is at the end of a range, either way 95 %; of one that goes up, in per cent of it."""
    rise = estimate_of(end)
    if goal_of(metric) == "minimize":
        return value_text(rise.estimate, (rise.high - rise.low) / 2)
    lost, low, high = (-100 * math.expm1(-value) for value in (rise.estimate, rise.low, rise.high))
    return f"{value_text(lost, (high - low) / 2)} %"
