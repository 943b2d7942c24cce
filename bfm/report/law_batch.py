"""The panels of a batch law: what each batch cost to reach a target, and critical batches against N."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bfm.laws.result import Estimate, LawFit
from bfm.laws.runs import Runs
from bfm.report.digits import estimate_text
from bfm.report.law_details import hardest_groups
from bfm.report.plots import INK, PAPER, Panel, Trace, bars, dots, empty, line, log_axis, rung_colours, short
from bfm.units import format_count

_CRITICAL = (
    ("overhead20", "20 % more events", "diamond", "cbs"),
    ("gain_halving", "twice the least events", "circle", "gain_halving"),
)
"""Definition of the critical batch, its words, its marker and its power law in N."""
_PLACES = 60


def batch_panels(runs: Runs, fit: LawFit) -> list[Panel]:
    """Events and steps to a target against B, and the critical batches against N."""
    return [_need_panel(runs, fit, "events"), _need_panel(runs, fit, "steps"), _critical_panel(fit)]


def _need_panel(runs: Runs, fit: LawFit, quantity: str) -> Panel:
    """Events (a B + b) or steps (a + b / B) to a target, log-log: the runs and hyperbola of each size."""
    groups, traces = hardest_groups(fit), []
    x, y = [], []
    for group, colour in zip(groups, rung_colours(range(len(groups))).values(), strict=True):
        here = _of_group(runs, group)
        batch_R = here["batch"]
        events_R = here["events"] if here.has("events") else here["steps"] * batch_R
        need_R = events_R if quantity == "events" else events_R / batch_R
        a, b = group["a"], group["b"]

        def curve(batch_P: np.ndarray, a: float = a, b: float = b) -> np.ndarray:
            return a * batch_P + b if quantity == "events" else a + b / batch_P

        label = f"N {format_count(group['params'])}" if "params" in group else str(group["group"])
        texts = [
            f"{short(name)}<br>{format_count(need)} {quantity} at B = {format_count(batch)}"
            for name, need, batch in zip(here.names, need_R, batch_R, strict=True)
        ]
        batch_P = np.geomspace(batch_R.min() / 1.12, batch_R.max() * 1.12, _PLACES)
        traces.append(dots(batch_R, need_R, colour, texts, name=short(label), showlegend=True))
        traces.append(line(batch_P, curve(batch_P), colour))
        for name, words, symbol, _ in _CRITICAL:
            at = fit.parameters[f"{name}[{group['group']}]"].estimate
            if batch_P[0] < at < batch_P[-1]:
                marked = {"symbol": symbol, "size": 10, "line": {"color": INK, "width": 1.2}, "opacity": 1.0}
                text = f"B = {format_count(at)} costs {words}"
                traces.append(dots([at], curve(np.array([at])), colour, [text], marker=marked))
        x += batch_R.tolist()
        y += need_R.tolist()
    layout = {
        "xaxis": log_axis("B, events per step", min(x), max(x), format_count),
        "yaxis": log_axis("", min(y), max(y), format_count),
        "showlegend": True,
    }
    return Panel(f"{fit.metric}: {quantity} to target", traces, layout)


def _of_group(runs: Runs, group: Mapping[str, Any]) -> Runs:
    same = [np.abs(runs[key] / group[key] - 1) <= 0.02 for key in ("params", "target", "budget") if key in group]
    return runs.select(np.all(same, axis=0) if same else np.ones(len(runs), bool))


def _critical_panel(fit: LawFit) -> Panel:
    """Both definitions against N with intervals, and their power laws where they are closed."""
    series = [(*definition, _critical_points(fit, definition[0])) for definition in _CRITICAL]
    every = [value for *_, points in series for _, value in points]
    if not every:
        return empty("Critical batch", "no critical batch is closed")
    sizes = [size for *_, points in series for size, _ in points]
    middles = [value.estimate for value in every]
    y_axis = log_axis("", min(middles) / 3, max(middles) * 3, format_count)
    low_edge, high_edge = (10.0**end for end in y_axis["range"])
    traces: list[Trace] = []
    for _, words, symbol, law, points in series:
        values = [value.estimate for _, value in points]
        ends = [max(value.low, low_edge) for _, value in points], [min(value.high, high_edge) for _, value in points]
        texts = [f"B = {estimate_text(value, format_count)}<br>at N = {format_count(size)}" for size, value in points]
        marker = {"symbol": symbol, "size": 9, "line": {"color": INK, "width": 1.4}}
        marked = dots([size for size, _ in points], values, PAPER, texts, marker=marker, name=words, showlegend=True)
        traces += [*_power_line(fit, law, points), marked | {"error_y": bars(values, *ends, INK)}]
    x_axis = log_axis("N, dense parameters", min(sizes), max(sizes), format_count, left=0.2, right=0.2)
    return Panel("Critical batch", traces, {"xaxis": x_axis, "yaxis": y_axis, "showlegend": True})


def _critical_points(fit: LawFit, definition: str) -> list[tuple[float, Estimate]]:
    sizes = {group["params"]: group["group"] for group in hardest_groups(fit) if "params" in group}
    points = [(float(size), fit.parameters[f"{definition}[{group}]"]) for size, group in sizes.items()]
    return [(size, value) for size, value in points if 0 < value.estimate < math.inf]


def _power_line(fit: LawFit, law: str, points: Sequence[tuple[float, Estimate]]) -> list[Trace]:
    power, level = (fit.parameters.get(f"{law}_{part}", Estimate(math.nan)) for part in ("exponent", "coefficient"))
    if len(points) < 2 or not (math.isfinite(power.low) and math.isfinite(power.high)):
        return []
    ends = np.array([points[0][0] / 1.3, points[-1][0] * 1.3])
    return [line(ends, level.estimate * ends**power.estimate, INK, width=1.2)]
