"""The figures of fitted laws, as a paper would show them: fits and their runs in, figures with captions out.

Per axis of the joint law: the curves of each budget with their optima, and the optimum against C. Beside them critical
batches, how far loss and ranking metrics agree, and what is foretold beyond the largest C.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bfm.laws.frontier import goal_of
from bfm.laws.result import Estimate, LawFit
from bfm.laws.runs import Runs
from bfm.report.digits import estimate_text
from bfm.report.figures import NamedFigure
from bfm.report.law_details import (
    agreements,
    asked_axes,
    axis_words,
    estimates,
    hardest_groups,
    ranked_metrics,
    told_exponent,
    told_optima,
)
from bfm.report.law_fits import Fitted, told
from bfm.report.law_panels import (
    Band,
    Curve,
    Valley,
    correlation_panel,
    critical_panel,
    error_bars,
    extrapolation_panel,
    need_panel,
    reference_line,
    reference_range,
    trend_panel,
    valley_panel,
)
from bfm.report.panels import titled
from bfm.report.style import house_style, new_axes, new_figure, power_text, rung_colours
from bfm.units import format_count

_WIDTH_IN = 10.6
_SHOWN_METRICS = 2
_PUBLISHED_EXPONENT = {"params": 0.617}
"""Of an optimum in C, as arXiv 2606.05257 found it."""
_PUBLISHED_RANGE = {"share": (0.011, 0.037)}
"""Where it found the optimum at every C."""
_AXIS = (
    "Above, one colour per C: each run as it would stand were all else at its best, and the joint law there. Diamonds "
    "are optima, bars and bands 95 % intervals, bars at the side one standard deviation of the errors either way. "
    "Below, the optimum against C: solid where runs are, dashed and paler where it is foretold."
)
_ZERO = " An open square is 0, which has a place of its own."
_PAPER = " The grey line or strip is what arXiv 2606.05257 found."
_BATCH = (
    "Left, what each batch B cost to reach one target (of several, the hardest): lines are steps = a + b / B. A "
    "diamond is the batch with 20 % more events than linear scaling from a reference batch, a circle the one with "
    "twice the least events (b / a): two definitions, not to be compared. Right, both against N with 95 % intervals."
)
_AGREEMENT = (
    "Spearman correlation over the runs of one C between the loss and each ranking metric, +1 where they prefer the "
    "same runs; bars are 95 % intervals."
)
_OUTLOOK = (
    "Dots are the best run of each C, grey bars two standard errors over queries (the same ones at every C, so they "
    "move together); the line is the joint law at its own optimum with the 95 % prediction interval of one run, "
    "dashed and paler beyond the largest C."
)
_CRITICAL = (
    ("overhead20", "20 % more\nevents", "D", "cbs"),
    ("gain_halving", "twice the\nleast events", "o", "gain_halving"),
)
"""Definition of the critical batch, its words, its marker and its power law in N."""


def law_figures(laws: Sequence[Fitted]) -> list[NamedFigure]:
    """The figures that the fits allow."""
    joint, batch, agreed = (told(laws, law) for law in ("joint", "batch", "agreement"))
    figures = []
    for name in dict.fromkeys(name for _, fit in joint for name in asked_axes(fit)):
        known = [(runs, fit) for runs, fit in joint if name in asked_axes(fit)]
        caption = _AXIS + _ZERO * bool((known[0][0][name] == 0).any())
        caption += _PAPER * (name in _PUBLISHED_EXPONENT or name in _PUBLISHED_RANGE)
        file = f"law-{re.sub(r'[^a-z0-9]+', '_', name.lower())}"
        figures.append(NamedFigure(file, axis_words(name).heading, caption, axis_figure(name, known)))
    if batch:
        figures.append(NamedFigure("law-batch", "Critical batch size", _BATCH, batch_figure(batch)))
    if agreed:
        figures.append(NamedFigure("law-agreement", "Agreement against C", _AGREEMENT, agreement_figure(agreed)))
    # Without a law of N* there is no best model to foretell.
    foretold = [found for found in laws if found.outlook and found.fit and told_exponent(found.fit, "params")]
    if foretold:
        figures.append(NamedFigure("law-outlook", "Beyond the largest C", _OUTLOOK, outlook_figure(foretold)))
    return figures


@house_style
def axis_figure(name: str, found: Sequence[tuple[Runs, LawFit]]) -> Figure:
    """Curves per budget above, below the optimum against C where it is told, the loss and a ranking metric beside."""
    shown = found[:_SHOWN_METRICS]
    panels = 1 + any(told_optima(fit, name) for _, fit in shown)
    lines, columns = (panels, len(shown)) if len(shown) > 1 else (1, panels)
    figure = new_figure(_WIDTH_IN * (1.0 if columns > 1 else 0.55), 3.2 * lines + 0.5)
    axes = new_axes(figure, lines, columns, panels * len(shown))
    for place, (runs, fit) in enumerate(shown):
        colours = rung_colours([curve["flops"] for curve in fit.details["axes"][name]["curves"]])
        valleys, words = _valleys(runs, fit, name, colours), axis_words(name)
        valley_panel(axes[place], valleys, fit.metric, words)
        if valleys:
            error_bars(axes[place], fit.metric, {f"a {kind}": fit.details["noise"][kind] for kind in ("row", "trial")})
        if panels > 1:
            _optimum_panel(axes[len(shown) + place], fit, name, colours)
    return figure


@house_style
def batch_figure(found: Sequence[tuple[Runs, LawFit]]) -> Figure:
    """Events and steps to a target against B, and the critical batches against N; a line per metric."""
    shown = found[:_SHOWN_METRICS]
    figure = new_figure(_WIDTH_IN, 3.3 * len(shown) + 0.1)
    axes = new_axes(figure, len(shown), 3, 3 * len(shown))
    for place, (runs, fit) in enumerate(shown):
        groups = hardest_groups(fit)
        colours = rung_colours([float(place) for place in range(len(groups))])
        events, steps, critical = axes[3 * place : 3 * place + 3]
        marks = [
            [(fit.parameters[f"{name}[{group['group']}]"].estimate, marker) for name, _, marker, _ in _CRITICAL]
            for group in groups
        ]
        for panel, quantity in ((events, "events"), (steps, "steps")):
            needs = [
                _need(runs, group, quantity, colour) for group, colour in zip(groups, colours.values(), strict=True)
            ]
            need_panel(panel, needs, f"{fit.metric}: {quantity} to target", marks, "B, events per step")
        critical_panel(critical, [_critical_series(fit, *series) for series in _CRITICAL])
    return figure


@house_style
def agreement_figure(found: Sequence[tuple[Runs, LawFit]]) -> Figure:
    """One line per ranking metric."""
    runs, fit = found[0]
    lines = {name: points for name in ranked_metrics(fit) if (points := agreements(fit, name))}
    colours = rung_colours([float(place) for place in range(len(lines))])
    figure = new_figure(_WIDTH_IN * 0.62, 3.4)
    axes = new_axes(figure, 1, 1, 1)[0]
    axes.set_title(f"Spearman correlation of {fit.metric} with")
    shown = [(name, colour, points) for (name, points), colour in zip(lines.items(), colours.values(), strict=True)]
    correlation_panel(axes, shown, sorted(runs.budgets()))
    return figure


@house_style
def outlook_figure(found: Sequence[Fitted]) -> Figure:
    """The best of each C and the law's expectation, per metric."""
    shown = found[:_SHOWN_METRICS]
    figure = new_figure(_WIDTH_IN * (1.0 if len(shown) > 1 else 0.55), 3.5)
    for panel, one in zip(new_axes(figure, 1, len(shown), len(shown)), shown, strict=True):
        assert one.runs is not None
        extrapolation_panel(panel, _best(one.runs), one.outlook, one.metric)
    return figure


def _optimum_panel(axes: Axes, fit: LawFit, name: str, colours: Mapping[float, Any]) -> None:
    """The optimum of an axis against C, and what is published of it."""
    words, known, exponent = axis_words(name), told_optima(fit, name), told_exponent(fit, name)
    power = "" if exponent is None else f" \u221d C^p,  p = {estimate_text(exponent, '{:.3f}'.format)}"
    titled(axes, f"{words.symbol}*{power or ' against C'}")
    points = [(at, value, colours[at]) for at, value in known.items()]
    band = estimates(fit.details["axes"][name]["trend"]) if exponent else []
    trend_panel(axes, points, list(colours), band, words.text)
    if name in _PUBLISHED_EXPONENT and len(points) > 1:
        middle = [(at, value.estimate) for at, value, _ in points]
        reference_line(axes, middle, _PUBLISHED_EXPONENT[name], f"exponent {_PUBLISHED_EXPONENT[name]:g}")
    if name in _PUBLISHED_RANGE and points:
        reference_range(axes, *_PUBLISHED_RANGE[name], words.text)


def _valleys(runs: Runs, fit: LawFit, name: str, colours: Mapping[float, Any]) -> list[Valley]:
    """Per budget its runs as they would stand were all else at its best, the curve there, and the optimum on it."""
    view, known, groups = fit.details["axes"][name], told_optima(fit, name), runs.budgets()
    best = {budget.flops: budget.best for budget in fit.budgets}
    adjusted_R, x_R = np.array(view["adjusted"], float), runs[name]
    valleys = []
    for curve in view["curves"]:
        flops, line = curve["flops"], _through(curve["x"], curve["value"])
        here = [place for place in groups.get(flops, ()) if math.isfinite(adjusted_R[place])]
        if (x_R[here] > 0).any():
            drawn = f"C = {power_text(flops)}", colours[flops], x_R[here], adjusted_R[here], line
            at_best = (known[flops], best[flops]) if flops in known else (None, math.nan, "no optimum")
            valleys.append(Valley(*drawn, *at_best))
    return valleys


def _through(x: Sequence[float], values: Sequence[float]) -> Curve:
    return lambda x_P: np.interp(np.log(x_P), np.log(x), values, left=math.nan, right=math.nan)


def _need(runs: Runs, group: Mapping[str, Any], quantity: str, colour: object) -> Valley:
    """Events or steps of one group, and a B + b or a + b / B."""
    same = [np.abs(runs[key] / group[key] - 1) <= 0.02 for key in ("params", "target", "budget") if key in group]
    here = runs.select(np.all(same, axis=0) if same else np.ones(len(runs), bool))
    batch_R = here["batch"]
    events_R = here["events"] if here.has("events") else here["steps"] * batch_R
    a, b = group["a"], group["b"]
    label = f"N {format_count(group['params'])}" if "params" in group else str(group["group"])
    if quantity == "events":
        return Valley(label, colour, batch_R, events_R, lambda batch_P: a * batch_P + b)
    return Valley(label, colour, batch_R, events_R / batch_R, lambda batch_P: a + b / batch_P)


def _critical_series(
    fit: LawFit, name: str, label: str, marker: str, law: str
) -> tuple[str, str, list[tuple[float, Estimate]], Band]:
    sizes = {group["params"]: group["group"] for group in hardest_groups(fit) if "params" in group}
    points = [(float(size), fit.parameters[f"{name}[{group}]"]) for size, group in sizes.items()]
    known = [(size, value) for size, value in points if 0 < value.estimate < math.inf]
    power, level = (fit.parameters.get(f"{law}_{part}", Estimate(math.nan)) for part in ("exponent", "coefficient"))
    if len(known) < 2 or not (math.isfinite(power.low) and math.isfinite(power.high)):
        return label, marker, known, []
    ends = [known[0][0] / 1.3, known[-1][0] * 1.3]
    line = [(size, level.estimate * size**power.estimate) for size in ends]
    return label, marker, known, [(size, Estimate(value, value, value)) for size, value in line]


def _best(runs: Runs) -> list[tuple[float, float, float]]:
    """(C, value, standard error) of the best run of each budget."""
    sign = 1.0 if goal_of(runs.metric) == "minimize" else -1.0
    errors_R = runs.errors.get(runs.metric, np.full(len(runs), math.nan))
    best = [(flops, places[np.argmin(sign * runs["loss"][places])]) for flops, places in runs.budgets().items()]
    return [(flops, float(runs["loss"][place]), float(errors_R[place])) for flops, place in best]
