"""The figures of fitted laws, as a paper would show them: fits and their runs in, figures with captions out.

Per axis of the joint law: the curves of each budget with their optima, and the optimum against C. Beside them critical
batches (law_batch.py), how far loss and ranking metrics agree, and what is foretold beyond the largest C. A figure has
a variant per metric. R runs of one budget.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bfm.laws.frontier import goal_of
from bfm.laws.result import Estimate, LawFit
from bfm.laws.runs import Runs
from bfm.laws.transform import from_loss, to_loss
from bfm.report.digits import estimate_text, power_text
from bfm.report.floors import Baselines, floors_at, strongest
from bfm.report.law_batch import batch_panels
from bfm.report.law_details import (
    AxisWords,
    FittedAxis,
    agreements,
    asked_axes,
    estimates,
    outlook,
    ranked_metrics,
)
from bfm.report.law_fits import Fitted, told
from bfm.report.law_published import EXPONENTS, RANGES, SOURCE
from bfm.report.law_words import agreement, axis_sentence, critical
from bfm.report.plots import (
    BAD,
    INK,
    MUTED,
    PAPER,
    Figure,
    Panel,
    Trace,
    Variant,
    Window,
    band_traces,
    bars,
    diamonds,
    dots,
    empty,
    floor_lines,
    line,
    linear_axis,
    log_axis,
    log_ends,
    plain,
    rung_axis,
    rung_colours,
    short,
    value_window,
    with_goal,
    words_at,
)
from bfm.units import format_count

_LEAST_SPAN = 4.0
_AXIS = (
    "First, one colour per C: each run as it would stand were all else at its best, and the joint law there. Diamonds "
    "are optima, bars and bands 95 % intervals, bars at the side one standard deviation of the errors either way. "
    "Then the optimum against C: solid where runs are, dashed and paler where it is foretold."
)
_ZERO = " An open square is 0, which has a place of its own."
_PUBLISHED = f" The grey line or strip is what {SOURCE} found."
_BATCH = (
    "What each batch B cost to reach one target (of several, the hardest): lines are steps = a + b / B. A diamond is "
    "the batch with 20 % more events than linear scaling from a reference batch, a circle the one with twice the least "
    "events (b / a): two definitions, not to be compared. Then both against N with 95 % intervals."
)
_AGREEMENT = (
    "Spearman correlation over the runs of one C between the loss and each ranking metric, +1 where they prefer the "
    "same runs; bars are 95 % intervals."
)
_OUTLOOK = (
    "Dots are the best run of each C, grey bars two standard errors over queries (the same ones at every C, so they "
    "move together); the line is the joint law at its own optimum with the 95 % prediction interval of one run, "
    "dashed and paler beyond the largest C. Dashed lines across are floors: what counting reaches without a model."
)
_SHOWN = {"params": ("N", format_count), "events": ("D", format_count), "share": ("s", "{:.2%}".format)}
"""What a run says of itself."""


def law_figures(laws: Sequence[Fitted], baselines: Baselines) -> list[Figure]:
    """The figures that the fits allow; the floors stand beside what is foretold."""
    joint, batch, agreed = (told(laws, law) for law in ("joint", "batch", "agreement"))
    by_name: dict[str, list[tuple[Runs, FittedAxis]]] = {}
    for runs, fit in joint:
        for axis in asked_axes(fit):
            by_name.setdefault(axis.name, []).append((runs, axis))
    figures: list[Figure] = []
    for name, known in by_name.items():
        caption = _AXIS + _ZERO * bool((known[0][0][name] == 0).any())
        published = name in EXPONENTS or name in RANGES
        caption += _PUBLISHED * (published and any(axis.optima for _, axis in known))
        file = f"law-{re.sub(r'[^a-z0-9]+', '_', name.lower())}"
        if file in [figure.name for figure in figures]:
            file += f"-{len(figures)}"
        variants = [Variant(axis.fit.metric, axis_sentence(axis), _axis_panels(runs, axis)) for runs, axis in known]
        figures.append(Figure(file, known[0][1].words.heading, caption, variants))
    if batch:
        variants = [Variant(fit.metric, critical(fit), batch_panels(runs, fit)) for runs, fit in batch]
        figures.append(Figure("law-batch", "Critical batch size", _BATCH, variants))
    if agreed:
        variants = [Variant(fit.metric, agreement(fit), [_correlation_panel(runs, fit)]) for runs, fit in agreed[:1]]
        figures.append(Figure("law-agreement", "Agreement against C", _AGREEMENT, variants))
    # Without a law of N* there is no best model to foretell.
    foretold = [(runs, fit) for runs, fit in joint if outlook(fit) and FittedAxis(fit, "params").exponent]
    if foretold:
        variants = [
            Variant(fit.metric, _outlook_sentence(fit, baselines), [_outlook_panel(runs, fit, baselines)])
            for runs, fit in foretold
        ]
        figures.append(Figure("law-outlook", "Beyond the largest C", _OUTLOOK, variants))
    return figures


def _outlook_sentence(fit: LawFit, baselines: Baselines) -> str:
    """What is foretold at the largest C, and the strongest floor."""
    flops, last = outlook(fit)[-1]
    floor = strongest(baselines, fit.metric)
    beside = "" if floor is None else f"; the strongest floor is {floor.name}, {floor.value:.4g}"
    return f"Foretold at C = {power_text(flops)}: {fit.metric} {estimate_text(last, '{:.4g}'.format)}{beside}."


def _axis_panels(runs: Runs, axis: FittedAxis) -> list[Panel]:
    """Curves per budget, and the optimum against C where it is told."""
    colours = rung_colours([curve["flops"] for curve in axis.view["curves"]])
    panels = [_valley_panel(runs, axis, colours)]
    return panels + ([_optimum_panel(axis, colours)] if axis.optima else [])


def _valley_panel(runs: Runs, axis: FittedAxis, colours: Mapping[float, str]) -> Panel:
    """A metric against what was varied, on a log scale; x = 0 stands apart at the left, without a curve."""
    fit, curves, groups = axis.fit, axis.view["curves"], runs.budgets()
    adjusted_R, x_R = np.array(axis.view["adjusted"], float), runs[axis.name]
    within = {
        curve["flops"]: [place for place in groups.get(curve["flops"], ()) if math.isfinite(adjusted_R[place])]
        for curve in curves
    }
    shown = [curve for curve in curves if (x_R[within[curve["flops"]]] > 0).any()]
    if not shown:
        return empty(with_goal(fit.metric), "no budget has runs of its own")
    every = np.concatenate([np.array(within[curve["flops"]]) for curve in shown])
    x_axis, zero = _valley_axis(axis.words, x_R[every])
    best = {budget.flops: budget.best for budget in fit.budgets}
    window = value_window(adjusted_R[every].tolist(), fit.metric, [*best.values()])
    traces: list[Trace] = []
    for curve in shown:
        flops, optimum = curve["flops"], axis.optima.get(curve["flops"])
        # Runs at 0 last: the legend shows the symbol of the first.
        here = np.array(sorted(within[flops], key=lambda place: x_R[place] == 0))
        texts = [_run_text(runs, place, fit.metric, adjusted_R[place]) for place in here]
        named = f"C = {power_text(flops)}" + ("" if optimum else " (no optimum)")
        symbols = ["square-open" if x == 0 else "circle" for x in x_R[here]]
        x, y = np.where(x_R[here] == 0, zero, x_R[here]), np.clip(adjusted_R[here], *window.edges)
        more = {"name": named, "showlegend": True, "marker": {"symbol": symbols}}
        traces.append(dots(x, y, colours[flops], texts, **more))
        traces.append(line(curve["x"], _seen(curve["value"], window), colours[flops]))
        if optimum is not None:
            # The interval as a pale bar, and the optimum on it.
            left, right = log_ends(x_axis)
            height, reach = np.clip(best[flops], *window.edges), [max(optimum.low, left), min(optimum.high, right)]
            traces.append(line(reach, [height] * 2, colours[flops], width=7, opacity=0.35))
            texts = [_optimum_text(axis, flops)]
            traces.append(diamonds([optimum.estimate], [height], colours[flops], texts))
    shapes, notes = _error_bars(fit, window)
    layout = {"xaxis": x_axis, "yaxis": linear_axis("", *window.ends), "shapes": shapes, "annotations": notes}
    return Panel(with_goal(fit.metric), traces, layout | {"showlegend": True, "margin": {"r": 56}})


def _valley_axis(words: AxisWords, x_R: np.ndarray) -> tuple[dict[str, Any], float]:
    """A log axis, and where 0 stands on it, at the left, where some run is at 0."""
    low, high = float(x_R[x_R > 0].min()), float(x_R.max())
    if (x_R > 0).all():
        return log_axis(words.label, low, high, words.text), math.nan
    axis, zero = log_axis(words.label, low, high, words.text, left=0.22), low / max(high / low, 4.0) ** 0.14
    ticks = [tick for tick in axis["tickvals"] if tick > 0.99 * low]
    return axis | {"tickvals": [zero, *ticks], "ticktext": ["0", *map(words.text, ticks)]}, zero


def _seen(values: Sequence[float], window: Window) -> list[float]:
    low, high = window.edges
    return [value if low <= value <= high else math.nan for value in values]


def _optimum_text(axis: FittedAxis, flops: float) -> str:
    optimum = estimate_text(axis.optima[flops], axis.words.text)
    return f"{plain(axis.words.symbol)}* = {optimum}<br>at C = {power_text(flops)}"


def _run_text(runs: Runs, place: int, metric: str, adjusted: float) -> str:
    """Who a run is, what it reached and what it would have."""
    shown = [f"{symbol} {text(runs[column][place])}" for column, (symbol, text) in _SHOWN.items() if runs.has(column)]
    values = f"{plain(metric)} {runs['loss'][place]:.4g}, {adjusted:.4g} were all else at its best"
    return "<br>".join([short(runs.names[place]), ", ".join(shown), values])


def _error_bars(fit: LawFit, window: Window) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Right of the panel, to its scale: the standard deviations of errors of the loss, either way, with their names."""
    loss = float(to_loss(fit.metric, np.array([sum(window.ends) / 2]))[0])
    shapes, notes = [], []
    sizes = {kind: fit.details["noise"][kind] for kind in ("row", "trial")}
    for place, (kind, size) in enumerate((kind, size) for kind, size in sizes.items() if size > 0):
        ends = [float(from_loss(fit.metric, loss - size)), float(from_loss(fit.metric, loss + size))]
        x, side = 1.03 + 0.05 * place, {"color": MUTED, "width": 2}
        across = {"xref": "paper", "yref": "y", "x0": x, "x1": x, "y0": min(ends), "y1": max(ends)}
        shapes.append({"type": "line", **across, "line": side})
        notes.append(words_at(x, max(ends), f"a {kind}", yref="y", yanchor="bottom", textangle=-90))
    return shapes, notes


def _optimum_panel(axis: FittedAxis, colours: Mapping[float, str]) -> Panel:
    """The optimum of an axis against C on log scales, the law and its band over all C, and what is published of it."""
    name, words, known, exponent, rungs = axis.name, axis.words, axis.optima, axis.exponent, list(colours)
    power = "" if exponent is None else f" \u221d C^p, p = {estimate_text(exponent, '{:.3f}'.format)}"
    band = estimates(axis.view["trend"]) if exponent else []
    y_axis = _log_window([*known.values(), *(value for _, value in band)], words.text)
    values, texts = [value.estimate for value in known.values()], [_optimum_text(axis, at) for at in known]
    marked = diamonds(list(known), values, [colours[at] for at in known], texts)
    traces = [*band_traces(band, rungs[-1], log=True), marked | {"error_y": bars(known.values(), INK, y_axis)}]
    shapes, notes = [], []
    if name in EXPONENTS and len(known) > 1:
        traces.append(_published_line(list(known.items()), rungs, EXPONENTS[name]))
    if name in RANGES:
        low, high = RANGES[name]
        strip = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": low, "y1": high, "line": {"width": 0}}
        shapes.append(strip | {"fillcolor": MUTED, "opacity": 0.12, "layer": "below"})
        named = f"{SOURCE}: {words.text(low)} to {words.text(high)}"
        notes.append(words_at(1, math.log10(high), named, yref="y", xanchor="right", yanchor="top"))
    if missing := [at for at in rungs if at not in known]:
        text = f"no optimum at C = {', '.join(map(power_text, missing))}"
        notes.append(words_at(0, 0, text, xanchor="left", yanchor="bottom", font={"size": 11, "color": BAD}))
    x_axis = rung_axis(rungs, band[-1][0] if band else None)
    layout = {"xaxis": x_axis, "yaxis": y_axis, "shapes": shapes, "annotations": notes, "showlegend": True}
    return Panel(f"{words.symbol}*{power or ' against C'}", traces, layout)


def _log_window(values: Sequence[Estimate], text: Callable[[float], str]) -> dict[str, Any]:
    """A logarithmic y axis that shows estimates and their intervals."""
    middles = [value.estimate for value in values]
    # An open interval must not squeeze the optima into a corner: it leaves through the edge.
    reach = 4 * max(max(middles) / min(middles), 2.0) ** 0.5
    ends = [end for value in values for end in (value.estimate, value.low, value.high)]
    near = [end for end in ends if min(middles) / reach <= end <= max(middles) * reach]
    # Optima that do not move with C must look as if they do not.
    middle = math.sqrt(min(near) * max(near))
    return log_axis("", min(*near, middle / _LEAST_SPAN**0.5), max(*near, middle * _LEAST_SPAN**0.5), text)


def _published_line(points: Sequence[tuple[float, Estimate]], rungs: Sequence[float], exponent: float) -> Trace:
    """A power law of a published exponent through the (geometric) middle of our optima."""
    x, y = np.log([at for at, _ in points]), np.log([value.estimate for _, value in points])
    ends = np.array([rungs[0], rungs[-1]])
    level = np.exp(y.mean() + exponent * (np.log(ends) - x.mean()))
    return line(ends, level, MUTED, dash="dot", width=1.2, name=f"exponent {exponent:g}", showlegend=True)


def _correlation_panel(runs: Runs, fit: LawFit) -> Panel:
    """Spearman correlations with intervals against C, one line per ranking metric."""
    told_of = {name: points for name in ranked_metrics(fit) if (points := agreements(fit, name))}
    if not told_of:
        return empty(f"{fit.metric} and ranking", "no C has enough runs")
    rungs = sorted(runs.budgets())
    step = math.log10(min((b / a for a, b in itertools.pairwise(rungs)), default=2.0))
    traces = []
    for place, (name, colour) in enumerate(zip(told_of, rung_colours(range(len(told_of))).values(), strict=True)):
        # Side by side, so that the bars of several metrics at one C are all seen.
        shift = 10 ** (0.07 * step * (place - (len(told_of) - 1) / 2))
        points = told_of[name]
        at, values = [flops * shift for flops, _ in points], [value for _, value in points]
        texts = [
            f"{plain(name)}: {estimate_text(value, '{:+.2f}'.format)}<br>at C = {power_text(flops)}"
            for flops, value in points
        ]
        middles = [value.estimate for value in values]
        trace = dots(at, middles, colour, texts, name=short(name), showlegend=True)
        traces.append(trace | {"mode": "lines+markers", "error_y": bars(values, colour)})
    zero = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0, "y1": 0, "line": {"color": MUTED, "width": 1}}
    x_axis = rung_axis(rungs, beside=[at for trace in traces for at in trace["x"]])
    layout = {"xaxis": x_axis, "yaxis": linear_axis("", -1.1, 1.1), "shapes": [zero], "showlegend": True}
    return Panel(f"Spearman correlation of {fit.metric} with", traces, layout)


def _outlook_panel(runs: Runs, fit: LawFit, baselines: Baselines) -> Panel:
    """The best of each C, and what the law foretells: dashed beyond the last."""
    band, metric = outlook(fit), fit.metric
    beyond, last = band[-1]
    best = _best_places(runs)
    rungs, values = list(best), [float(runs["loss"][place]) for place in best.values()]
    every, floors = [*values, *(value.estimate for _, value in band)], floors_at(baselines, metric)
    reach = 3 * float(np.ptp(every) or 1.0)
    ends = [max(last.low, last.estimate - reach), min(last.high, last.estimate + reach)]
    window = value_window(every, metric, [*every, *ends], [*floors.values()])
    texts = [
        f"{short(runs.names[place])}<br>{plain(metric)} {value:.4g} at C = {power_text(at)}"
        for (at, place), value in zip(best.items(), values, strict=True)
    ]
    reached = dots(rungs, values, INK, texts, name="best run", showlegend=True)
    errors_R = runs.errors.get(runs.metric, np.full(len(runs), math.nan))
    errors = [2 * float(np.nan_to_num(errors_R[place])) for place in best.values()]
    sides = [Estimate.around(value, error) for value, error in zip(values, errors, strict=True)]
    traces = [*band_traces(band, rungs[-1], log=False), reached | {"error_y": bars(sides, MUTED)}]
    mark = {"color": PAPER, "line": {"color": INK, "width": 1.5}}
    foretold = diamonds([beyond], [last.estimate], PAPER, [plain(_outlook_sentence(fit, baselines))], showlegend=True)
    traces.append(foretold | {"name": "foretold", "marker": foretold["marker"] | mark})
    layout = {"xaxis": rung_axis(rungs, beyond), "yaxis": linear_axis("", *window.ends), "showlegend": True}
    return Panel(with_goal(metric), traces, layout, floor_lines(floors, window))


def _best_places(runs: Runs) -> dict[float, int]:
    """C -> where its best run stands."""
    pick = np.argmin if goal_of(runs.metric) == "minimize" else np.argmax
    return {flops: places[pick(runs["loss"][places])] for flops, places in runs.budgets().items()}
