"""One panel each: ledger rows drawn on given axes. Figures are put together in `figures`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from scipy.optimize import isotonic_regression

from bfm.laws.frontier import (
    FrontierPoint,
    Row,
    frontier,
    goal_of,
    measured,
    metric_error,
    metric_value,
    rung_ladder,
    rung_rows,
)
from bfm.laws.hull import lower_hull
from bfm.report.floors import Baselines, shown_name
from bfm.report.style import (
    BAD,
    INK,
    MUTED,
    PAPER,
    SIZE_MAP,
    log_axis,
    power_text,
    rung_axis,
    rung_colours,
    value_axis,
)
from bfm.report.tables import failed_rows
from bfm.units import format_count

_DOT: dict[str, Any] = {"s": 20.0, "linewidths": 0.6, "edgecolors": PAPER, "zorder": 3}


def frontier_panel(axes: Axes, rows: Sequence[Row], metric: str, baselines: Baselines, norm: LogNorm) -> None:
    """All results of a metric against C, the frontier as a step through the best, baselines as lines."""
    found, points, rungs = measured(rows, metric), frontier(rows, metric), rung_ladder(rows)
    titled(axes, with_goal(metric))
    if not points:
        empty(axes)
        return
    rung_axis(axes, rungs, air_right=0.32)
    values = [metric_value(row, metric) for row in found]
    window = value_window(axes, values, metric, _bar_ends(points), _values(baselines, metric))
    axes.scatter(
        _spread_by_size(found, rungs, norm),
        np.clip(values, *window),
        c=[row.get("params") or math.nan for row in found],
        cmap=SIZE_MAP,
        norm=norm,
        alpha=0.75,
        **_DOT,
    )
    _draw_baselines(axes, baselines, metric, window)
    flops = [point.flops for point in points]
    best = [point.value for point in points]
    axes.step([*flops, axes.get_xlim()[1]], [*best, best[-1]], where="post", color=INK, lw=1.3, zorder=4)
    for point in points:
        _error_bar(axes, point.flops, point.value, point.error, INK)
        if point.carried:
            continue
        labelled = point in points[:: -math.ceil(len(points) / 6)]
        size = point.row.get("params") or math.nan
        axes.plot(point.flops, point.value, "o", ms=7, mfc=SIZE_MAP(norm(size)), mec=INK, mew=1.1, zorder=6)
        below = goal_of(metric) == "minimize"
        axes.annotate(
            _holder(point.row) if labelled else "",
            (point.flops, point.value),
            xytext=(6, -6 if below else 6),
            textcoords="offset points",
            va="top" if below else "bottom",
            fontsize=8,
            color=INK,
            zorder=7,
        )


def curves_panel(axes: Axes, rows: Sequence[Row], metric: str, norm: LogNorm, *, title: str | None = None) -> None:
    """One line per trial through its rungs, coloured by N; a ring where a trial waits, a cross where it diverged."""
    found, rungs = measured(rows, metric), rung_ladder(rows)
    titled(axes, title or f"{with_goal(metric)}  of every trial along its ladder")
    if not found:
        empty(axes)
        return
    rung_axis(axes, rungs, air_right=0.16)
    window = value_window(axes, [metric_value(row, metric) for row in found], metric)
    for trial in sorted({str(row["trial"]) for row in found}):
        line = sorted((row for row in found if str(row["trial"]) == trial), key=lambda row: row["rung_flops"])
        flops = [row["rung_flops"] for row in line]
        values = np.clip([metric_value(row, metric) for row in line], *window)
        colour = SIZE_MAP(norm(line[-1].get("params") or math.nan))
        axes.plot(flops, values, color=colour, lw=1.5, zorder=3, alpha=0.9)
        axes.plot(flops, values, "o", ms=3.6, color=colour, mec=PAPER, mew=0.5, zorder=4)
        if flops[-1] < rungs[-1]:
            axes.plot(flops[-1], values[-1], "o", ms=4.2, mfc=PAPER, mec=colour, mew=1.2, zorder=4)
    for point in frontier(rows, metric)[-1:]:
        _tag(axes, point.row, float(point.row["rung_flops"]), point.value)
    _draw_diverged(axes, [(row["rung_flops"], row) for row in _diverged(rows)], goal_of(metric))


def size_panel(axes: Axes, rows: Sequence[Row], metric: str) -> None:
    """Iso-FLOP: a metric against N, one colour per rung, the best of each rung marked, hulls as guides for the eye."""
    found = [row for row in measured(rows, metric) if row.get("params")]
    titled(axes, f"{with_goal(metric)}  against model size at equal C", x_label="N, dense parameters")
    if not found:
        empty(axes)
        return
    colours, sign = rung_colours(rung_ladder(rows)), 1.0 if goal_of(metric) == "minimize" else -1.0
    sizes = [float(row["params"]) for row in rung_rows(rows) if row.get("params")]
    log_axis(axes, min(sizes), max(sizes), air_right=0.2)
    values = [metric_value(row, metric) for row in found]
    window = value_window(axes, values, metric, _bar_ends(frontier(rows, metric)))
    winners = []
    for flops, colour in colours.items():
        here = [row for row in found if row["rung_flops"] == flops]
        if not here:
            continue
        x, y = [row["params"] for row in here], [metric_value(row, metric) for row in here]
        axes.scatter(x, np.clip(y, *window), color=colour, alpha=0.8, **_DOT)
        hull = _whole_hull(np.log(x), sign * np.asarray(y))
        axes.plot(np.take(x, hull), np.take(y, hull), color=colour, lw=1.0, alpha=0.55, zorder=2)
        beside(axes, f"C = {power_text(flops)}", x[hull[-1]], y[hull[-1]], INK)
        best = min(here, key=lambda row: sign * metric_value(row, metric))
        winners.append((best["params"], metric_value(best, metric), metric_error(best, metric), colour))
    axes.plot([w[0] for w in winners], [w[1] for w in winners], ":", color=MUTED, lw=1.1, zorder=2)
    for size, value, error, colour in winners:
        _error_bar(axes, size, value, error, colour)
        axes.plot(size, value, "D", ms=6.5, mfc=colour, mec=INK, mew=1.0, zorder=6)
    _draw_diverged(axes, [(row["params"], row) for row in _diverged(rows)], goal_of(metric))


def field_panel(axes: Axes, rows: Sequence[Row], metric: str, field: str) -> None:
    """A metric against one swept number of the configuration, one colour per rung, the best of each rung marked."""
    colours, sign = rung_colours(rung_ladder(rows)), 1.0 if goal_of(metric) == "minimize" else -1.0
    found = [row for row in measured(rows, metric) if isinstance((row.get("config") or {}).get(field), (int, float))]
    titled(axes, field.replace("_", " "))
    values = sorted({float(row["config"][field]) for row in found})
    if values and values[0] > 0 and values[-1] >= 4 * values[0]:
        log_axis(axes, values[0], values[-1])
    if 1 < len(values) <= 5:
        axes.set_xticks(values, [format_count(value) for value in values])
    window = value_window(axes, [metric_value(row, metric) for row in found], metric)
    for flops, colour in colours.items():
        here = [row for row in found if row["rung_flops"] == flops]
        if not here:
            continue
        x, y = [row["config"][field] for row in here], [metric_value(row, metric) for row in here]
        axes.scatter(x, np.clip(y, *window), color=colour, alpha=0.8, **_DOT)
        best = int(np.argmin(sign * np.asarray(y)))
        axes.plot(x[best], y[best], "D", ms=6, mfc=colour, mec=INK, mew=1.0, zorder=6)


def agreement_panel(axes: Axes, rows: Sequence[Row], first: str, second: str, flops: float, norm: LogNorm) -> None:
    """Two metrics against each other at one rung."""
    here = [row for row in measured(rows, first) if row["rung_flops"] == flops]
    here = [row for row in here if math.isfinite(metric_value(row, second))]
    x, y = [metric_value(row, first) for row in here], [metric_value(row, second) for row in here]
    sizes = [row.get("params") or math.nan for row in here]
    axes.scatter(x, y, c=sizes, cmap=SIZE_MAP, norm=norm, **_DOT)
    axes.set_xlabel(first)
    axes.set_ylabel(second)
    axes.locator_params(axis="both", nbins=5)


def spend_panel(axes: Axes, bars: Sequence[tuple[str, float, str, bool]], total: float) -> None:
    """Horizontal bars (label, FLOPs, colour, filled), each with its amount and share of `total`."""
    for place, (label, flops, colour, filled) in enumerate(bars):
        axes.barh(place, flops, height=0.62, color=colour if filled else "none", edgecolor=colour, lw=0.9, zorder=3)
        share = f"  {power_text(flops)}   {flops / total:.0%}" if total > 0 else f"  {power_text(flops)}"
        axes.text(flops, place, share, va="center", ha="left", fontsize=8.5, color=INK)
        axes.text(0, place, f"{label}  ", va="center", ha="right", fontsize=8.5, color=MUTED)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, max([flops for _, flops, _, _ in bars], default=1.0) * 1.25 or 1.0)
    axes.set_axis_off()


def value_window(
    axes: Axes,
    values: Sequence[float],
    metric: str,
    reach: Sequence[float] = (),
    references: Sequence[float] = (),
) -> tuple[float, float]:
    """Set the y range and return it with half of its air: values, `reach` (ends of error bars), near references.

    A run that nearly diverged must not flatten the picture: it is drawn at the edge. Neither must a far reference.
    """
    value_axis(axes)
    if not values:
        return axes.get_ylim()
    minimise, middle = goal_of(metric) == "minimize", float(np.median(values))
    low, high = min(values), max(values)
    bulk = 3 * max(middle - low if minimise else high - middle, 0.02 * abs(middle))
    low, high = (low, min(high, middle + bulk)) if minimise else (max(low, middle - bulk), high)
    known = [value for value in reach if math.isfinite(value)]
    low, high = min([low, *known]), max([high, *known])
    span = max(high - low, 0.02 * abs(high), 1e-9)
    # Ranking metrics have a natural zero, so a floor near it may stretch the axis; a loss has none.
    near = max(1.5 * span, (0.15 if minimise else 0.6) * abs(high))
    for value in references:
        if low - near <= value <= high + near:
            low, high = min(low, value), max(high, value)
    air = 0.1 * max(high - low, span)
    axes.set_ylim(low - air, high + air)
    return low - 0.5 * air, high + 0.5 * air


def titled(axes: Axes, title: str, *, x_label: str = "") -> None:
    """What is plotted, top left, and the label of the x axis."""
    axes.set_title(title)
    axes.set_xlabel(x_label)


def beside(
    axes: Axes, text: str, x: float, y: float, colour: str, *, offset: tuple[float, float] = (8, 0), align: str = "left"
) -> None:
    """Words next to a point."""
    axes.annotate(
        text,
        (x, y),
        xytext=offset,
        textcoords="offset points",
        ha=align,
        va="center",
        fontsize=8,
        color=colour,
        zorder=7,
    )


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str]], *, left: bool = False) -> None:
    """Names at the right (or left) ends of curves, pushed apart where they would overlap."""
    place, box = axes.get_subplotspec(), axes.get_figure(root=True)
    rows = place.get_gridspec().nrows if place else 1
    height_pt = (box.get_size_inches()[1] if box else 3.0) * 72 * 0.76 / rows
    to_axes = axes.transData + axes.transAxes.inverted()
    at = [to_axes.transform((x, y)) for x, y, _ in ends]
    tall = [10.5 * (1 + text.count("\n")) / height_pt for _, _, text in ends]
    for (x, _), height, (_, _, text) in zip(at, apart([y for _, y in at], tall), ends, strict=True):
        axes.annotate(
            text, (min(x, 0.99), height), xycoords="axes fraction", xytext=(-9 if left else 6, 0),
            textcoords="offset points", ha="right" if left else "left", va="center", fontsize=8, color=INK, zorder=7,
            linespacing=1.1,
        )  # fmt: skip


def apart(wanted: Sequence[float], tall: Sequence[float]) -> np.ndarray:
    """Centres as near as can be to the wanted ones so that none of these heights overlap."""
    order = np.argsort(wanted, kind="stable")
    height = np.asarray(tall)[order]
    stacked = np.cumsum(height) - height / 2
    found = np.empty(len(order))
    # Heights do not overlap where what is left of the centres, once all are stacked, does not fall.
    found[order] = isotonic_regression(np.asarray(wanted)[order] - stacked).x + stacked
    return found


def empty(axes: Axes, text: str = "no result yet") -> None:
    """Says why there is nothing to see."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED)
    axes.set_xlabel("")
    axes.set_axis_off()


def with_goal(metric: str) -> str:
    """The metric and an arrow in the direction of better."""
    return f"{metric} \u2193" if goal_of(metric) == "minimize" else f"{metric} \u2191"


def _draw_baselines(axes: Axes, baselines: Baselines, metric: str, window: tuple[float, float]) -> None:
    """Dashed lines named at the right end; what lies far off the scale is named beside the title."""
    low, high = window
    known = [(shown_name(name), values[metric]) for name, values in baselines.items() if metric in values]
    known = sorted((entry for entry in known if math.isfinite(entry[1])), key=lambda entry: entry[1])
    off_scale = [f"{name} {value:.2g}" for name, value in known if not low <= value <= high]
    if off_scale:
        axes.set_title(f"off scale: {', '.join(off_scale)}", loc="right", fontsize=8, fontweight="normal", color=MUTED)
    free = low
    for name, value in known:
        if low <= value <= high:
            axes.axhline(value, color=MUTED, lw=0.9, ls=(0, (4, 3)), zorder=1)
            height = max(value + 0.008 * (high - low), free)
            axes.text(
                0.995,
                height,
                name,
                transform=axes.get_yaxis_transform(),
                ha="right",
                va="bottom",
                fontsize=8,
                color=MUTED,
            )
            free = height + 0.08 * (high - low)


def _draw_diverged(axes: Axes, places: Sequence[tuple[float, Row]], goal: str) -> None:
    """Crosses in a lane of their own past the bad end of the value axis."""
    if not places:
        return
    low, high = axes.get_ylim()
    lane = 0.06 * (high - low)
    worst = high if goal == "minimize" else low
    axes.set_ylim(low - lane * (goal != "minimize"), high + lane * (goal == "minimize"))
    axes.plot([x for x, _ in places], [worst] * len(places), "x", ms=6, mew=1.6, color=BAD, zorder=6, clip_on=False)
    diverged = all(row["status"] == "diverged" for _, row in places)
    text = "diverged" if diverged else "no result"
    beside(axes, f"{len(places)} {text}" if len(places) > 1 else text, max(x for x, _ in places), worst, BAD)


def _tag(axes: Axes, row: Row, flops: float, value: float) -> None:
    beside(axes, f"{row['trial']}\n{_holder(row)}" if row.get("params") else _holder(row), flops, value, INK)


def _holder(row: Row) -> str:
    return f"N {format_count(row['params'])}" if row.get("params") else str(row["trial"])


def _spread_by_size(rows: Sequence[Row], rungs: Sequence[float], norm: LogNorm) -> list[float]:
    """x of the dots: the rung, a little to the left for small N and to the right for large, so that none hides."""
    ratios = [high / low for low, high in itertools.pairwise(rungs)]
    width = 0.3 * math.log10(min(ratios, default=1.4))
    sizes = [float(norm(row["params"])) if row.get("params") else 0.5 for row in rows]
    return [row["rung_flops"] * 10 ** (width * (size - 0.5)) for row, size in zip(rows, sizes, strict=True)]


def _error_bar(axes: Axes, x: float, value: float, error: float, colour: object) -> None:
    if math.isfinite(error):
        axes.plot([x, x], [value - 2 * error, value + 2 * error], color=colour, lw=1.2, zorder=5)


def _bar_ends(points: Sequence[FrontierPoint]) -> list[float]:
    return [point.value + side * 2 * point.error for point in points for side in (-1, 1)]


def _whole_hull(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Places of the lower convex hull's vertices, left to right, beyond the lowest y too."""
    hull = np.union1d(lower_hull(x, y), lower_hull(-x, y))
    return hull[np.unique(x[hull], return_index=True)[1]]


def _diverged(rows: Sequence[Row]) -> list[Row]:
    return [row for row in failed_rows(rows) if row.get("params")]


def _values(baselines: Baselines, metric: str) -> list[float]:
    return [values[metric] for values in baselines.values() if math.isfinite(values.get(metric, math.nan))]
