"""The panels of a batch law: what each batch cost to reach a target, and critical batches against N."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from bfm.laws.result import Estimate, LawFit
from bfm.laws.runs import Runs
from bfm.report.digits import estimate_text
from bfm.report.law_details import CRITICAL, CriticalBatch, hardest_groups
from bfm.report.plots import INK, PAPER, Panel, Trace, bars, dots, empty, line, log_axis, rung_colours, short
from bfm.units import format_count

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
        for definition in CRITICAL:
            at = definition.of(fit, group).estimate
            if batch_P[0] < at < batch_P[-1]:
                marked = {"symbol": definition.symbol, "size": 10, "line": {"color": INK, "width": 1.2}, "opacity": 1.0}
                text = f"B = {format_count(at)} costs {definition.words}"
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
    series = {definition: _critical_points(fit, definition) for definition in CRITICAL}
    sizes = [size for points in series.values() for size in points]
    middles = [value.estimate for points in series.values() for value in points.values()]
    if not sizes:
        return empty("Critical batch", "no critical batch is closed")
    y_axis = log_axis("", min(middles) / 3, max(middles) * 3, format_count)
    traces: list[Trace] = []
    for one, points in series.items():
        texts = [
            f"B = {estimate_text(value, format_count)}<br>at N = {format_count(size)}" for size, value in points.items()
        ]
        marker = {"symbol": one.symbol, "size": 9, "line": {"color": INK, "width": 1.4}}
        values = [value.estimate for value in points.values()]
        marked = dots([*points], values, PAPER, texts, marker=marker, name=one.words, showlegend=True)
        traces += _power_line(fit, one.power_law, [*points])
        traces.append(marked | {"error_y": bars(points.values(), INK, y_axis)})
    x_axis = log_axis("N, dense parameters", min(sizes), max(sizes), format_count, left=0.2, right=0.2)
    return Panel("Critical batch", traces, {"xaxis": x_axis, "yaxis": y_axis, "showlegend": True})


def _critical_points(fit: LawFit, definition: CriticalBatch) -> dict[float, Estimate]:
    """By N, ascending."""
    points = {float(group["params"]): definition.of(fit, group) for group in hardest_groups(fit) if "params" in group}
    return {size: value for size, value in points.items() if 0 < value.estimate < math.inf}


def _power_line(fit: LawFit, law: str, sizes: list[float]) -> list[Trace]:
    power, level = (fit.parameters.get(f"{law}_{part}", Estimate(math.nan)) for part in ("exponent", "coefficient"))
    if len(sizes) < 2 or not (math.isfinite(power.low) and math.isfinite(power.high)):
        return []
    ends = np.array([sizes[0] / 1.3, sizes[-1] * 1.3])
    return [line(ends, level.estimate * ends**power.estimate, INK, width=1.2)]
