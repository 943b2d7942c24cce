"""One panel each: runs and fitted curves drawn on given axes. Figures are put together in `law_figures`.

R runs of one budget (or size), P places of a curve.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from bfm.laws.frontier import goal_of
from bfm.laws.result import Estimate
from bfm.report.panels import beside, empty, titled, value_window, with_goal
from bfm.report.style import BAD, INK, MUTED, PAPER, log_axis, power_text, rung_axis, value_axis
from bfm.units import format_count

FAR = 1e6
"""Open ends of intervals are drawn here, beyond any axis."""
_POINT: dict[str, Any] = {"s": 20.0, "linewidths": 0.6, "edgecolors": PAPER, "alpha": 0.8, "zorder": 3}
_PLACES = 160
_LEAST_SPAN = 4.0
Curve = Callable[[np.ndarray], np.ndarray]
Band = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""x_P -> (middle_P, low_P, high_P)."""


@dataclass(frozen=True)
class Valley:
    """Runs that share a budget (or a size), the curve through them and the optimum on it."""

    label: str
    colour: Any
    x_R: np.ndarray
    y_R: np.ndarray
    curve: Curve | None
    optimum: Estimate | None
    best: float
    """The curve's value at the optimum."""
    note: str = ""
    """Why there is no optimum."""


def valley_panel(
    axes: Axes, valleys: Sequence[Valley], metric: str, x_label: str, x_text: Callable[[float], str]
) -> None:
    """A metric against what was varied, on a log scale; x = 0 stands apart at the left, without a curve."""
    titled(axes, with_goal(metric), x_label=x_label)
    positive = np.concatenate([valley.x_R[valley.x_R > 0] for valley in valleys])
    low, high = float(positive.min()), float(positive.max())
    log_axis(axes, low, high, air_right=0.34)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: x_text(value)))
    if high < 2000 * low:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=9))
    zero = _zero_lane(axes, low, high, x_text) if any((valley.x_R == 0).any() for valley in valleys) else math.nan
    values = np.concatenate([valley.y_R for valley in valleys]).tolist()
    window = value_window(axes, values, metric, [valley.best for valley in valleys])
    ends: list[tuple[float, float, str]] = []
    for valley in valleys:
        y_R, at_zero_R = np.clip(valley.y_R, *window), valley.x_R == 0
        axes.scatter(valley.x_R[~at_zero_R], y_R[~at_zero_R], color=valley.colour, **_POINT)
        axes.plot(np.full(at_zero_R.sum(), zero), y_R[at_zero_R], "s", ms=4.5, mfc=PAPER, mec=valley.colour, mew=1.3)
        here_R = np.flatnonzero(~at_zero_R)
        last = here_R[np.argmax(valley.x_R[here_R])] if len(here_R) else int(np.argmax(valley.x_R))
        end = (float(valley.x_R[last]), float(y_R[last]))
        if valley.curve is not None:
            end = _draw_curve(axes, valley.curve, valley.x_R[~at_zero_R], valley.colour, window)
        if valley.optimum is not None:
            _vertex(axes, valley.optimum, float(np.clip(valley.best, *window)), valley.colour)
        ends.append((*end, valley.label + (f"\n{valley.note}" if valley.note else "")))
    _labels(axes, ends)


def trend_panel(
    axes: Axes,
    points: Sequence[tuple[float, Estimate, Any]],
    flops: Sequence[float],
    line: Band | None,
    title: str,
    text: Callable[[float], str],
    missing: Sequence[float] = (),
) -> None:
    """An optimum against C on log scales: points with intervals, the fitted power law and its band.

    points: (C, optimum, colour); flops: every budget; missing: those without an optimum.
    """
    titled(axes, title)
    if not points:
        empty(axes, "no budget encloses its optimum")
        return
    rung_axis(axes, list(flops), air_right=0.2)
    known = [value for _, optimum, _ in points for value in (optimum.estimate, optimum.low, optimum.high)]
    spread = [optimum.estimate for _, optimum, _ in points]
    # An open interval must not squeeze the optima into a corner: it leaves through the edge.
    reach = 4 * max(max(spread) / min(spread), 2.0) ** 0.5
    near = [v for v in known if math.isfinite(v) and min(spread) / reach <= v <= max(spread) * reach]
    # Optima that do not move with C must look as if they do not.
    middle = math.sqrt(min(near) * max(near))
    low, high = min(*near, middle / _LEAST_SPAN**0.5), max(*near, middle * _LEAST_SPAN**0.5)
    log_values(axes, low, high, text)
    if line is not None:
        _draw_band(axes, line, *_inside(axes), INK)
    low_edge, high_edge = axes.get_ylim()
    for at, optimum, colour in points:
        ends = [max(optimum.low, low_edge), min(optimum.high, high_edge)]
        if not any(math.isnan(end) for end in ends):
            axes.plot([at, at], ends, color=colour, lw=1.6, zorder=5)
        axes.plot(at, optimum.estimate, "D", ms=6.5, mfc=colour, mec=INK, mew=1.0, zorder=6)
    if missing:
        _footnote(axes, f"no optimum at C = {', '.join(power_text(at) for at in missing)}")


def reference_line(axes: Axes, points: Sequence[tuple[float, float]], exponent: float, text: str) -> None:
    """A thin dashed power law of a given exponent through the (geometric) middle of points, named at its end."""
    x, y = np.log([point[0] for point in points]), np.log([point[1] for point in points])
    x_P = np.geomspace(*_inside(axes), _PLACES)
    y_P = np.exp(y.mean() + exponent * (np.log(x_P) - x.mean()))
    axes.plot(x_P, y_P, color=MUTED, lw=0.9, ls=(0, (4, 3)), zorder=1, scaley=False)
    low, high = axes.get_ylim()
    seen_P = np.flatnonzero((y_P > low) & (y_P < high))
    place = seen_P[round(0.92 * (len(seen_P) - 1))]
    beside(axes, text, float(x_P[place]), float(y_P[place]), MUTED, offset=(-8, 2), align="right")


def reference_range(axes: Axes, low: float, high: float, text: str) -> None:
    """A published range of an optimum as a pale strip, named at its right end."""
    floor, top = axes.get_ylim()
    if high > floor and low < top:
        axes.axhspan(max(low, floor), min(high, top), color=MUTED, alpha=0.09, lw=0, zorder=0)
        at = axes.get_yaxis_transform()
        axes.text(0.99, min(high, top), text, transform=at, ha="right", va="top", fontsize=8, color=MUTED)
        axes.set_ylim(floor, top)


def critical_panel(
    axes: Axes, series: Sequence[tuple[str, str, Sequence[tuple[float, Estimate]], Band | None]]
) -> None:
    """Critical batches against N on log scales, a series (name, marker, points, power law) per definition."""
    titled(axes, "Critical batch", x_label="N, dense parameters")
    points = [point for _, _, line, _ in series for point in line]
    if not points:
        empty(axes, "no critical batch is closed")
        return
    sizes = [size for size, _ in points]
    log_axis(axes, min(sizes), max(sizes), air_right=0.45)
    closed = [end for _, value in points for end in (value.low, value.estimate, value.high) if 0 < end < math.inf]
    middles = [value.estimate for _, value in points]
    near = [end for end in closed if min(middles) / 10 < end < 10 * max(middles)]
    log_values(axes, min(near) / 1.5, max(near) * 1.5, format_count)
    low_edge, high_edge = axes.get_ylim()
    ends = []
    for name, marker, line, power in series:
        if not line:
            continue
        if power is not None and len(line) > 1:
            _draw_band(axes, power, min(sizes) / 1.3, max(sizes) * 1.3, INK)
        for size, value in line:
            axes.plot([size] * 2, [max(value.low, low_edge), min(value.high, high_edge)], color=INK, lw=1.3, zorder=4)
            axes.plot(size, value.estimate, marker, ms=6, mfc=PAPER, mec=INK, mew=1.1, zorder=6)
        ends.append((line[-1][0] * 1.3, line[-1][1].estimate, name))
    _labels(axes, ends)


def need_panel(
    axes: Axes, valleys: Sequence[Valley], title: str, marks: Sequence[Sequence[tuple[float, str]]], x_label: str
) -> None:
    """Events or steps to a target against B, log-log: the runs and hyperbola of each size; `marks` are batches.

    Names stand at the left, where batches are too small to matter and the sizes are apart.
    """
    titled(axes, title, x_label=x_label)
    x = np.concatenate([valley.x_R for valley in valleys])
    y = np.concatenate([valley.y_R for valley in valleys])
    low, high = float(x.min()), float(x.max())
    log_axis(axes, low, high)
    axes.set_xlim(left=low / (high / low) ** 0.32)
    log_values(axes, float(y.min()), float(y.max()), format_count)
    starts = []
    for valley, marked in zip(valleys, marks, strict=True):
        axes.scatter(valley.x_R, valley.y_R, color=valley.colour, **_POINT)
        place = int(np.argmin(valley.x_R))
        start = float(valley.y_R[place])
        if valley.curve is not None:
            _draw_curve(axes, valley.curve, valley.x_R, valley.colour, axes.get_ylim())
            start = float(valley.curve(valley.x_R[place : place + 1])[0])
            for batch, marker in marked:
                if axes.get_xlim()[0] < batch < axes.get_xlim()[1]:
                    height = float(valley.curve(np.array([batch]))[0])
                    axes.plot(batch, height, marker, ms=6.5, mfc=valley.colour, mec=INK, mew=1.0, zorder=6)
        starts.append((float(valley.x_R[place]), start, valley.label))
    _labels(axes, starts, left=True)


def correlation_panel(
    axes: Axes, lines: Sequence[tuple[str, Any, Sequence[tuple[float, Estimate]]]], flops: Sequence[float]
) -> None:
    """Spearman correlations with intervals against C, one line per metric, named at its last point."""
    rung_axis(axes, list(flops), air_right=0.28)
    value_axis(axes)
    axes.set_ylim(-1.1, 1.1)
    axes.axhline(0.0, color=MUTED, lw=0.9, zorder=1)
    step = math.log10(min((b / a for a, b in itertools.pairwise(flops)), default=2.0))
    ends = []
    for place, (name, colour, points) in enumerate(lines):
        # Side by side, so that the bars of several metrics at one C are all seen.
        shift = 10 ** (0.07 * step * (place - (len(lines) - 1) / 2))
        x = [at * shift for at, _ in points]
        axes.plot(x, [value.estimate for _, value in points], color=colour, lw=1.3, zorder=3)
        for at, (_, value) in zip(x, points, strict=True):
            axes.plot([at, at], [value.low, value.high], color=colour, lw=1.4, alpha=0.7, zorder=4)
            axes.plot(at, value.estimate, "o", ms=5.5, mfc=colour, mec=PAPER, mew=0.7, zorder=5)
        ends.append((points[-1][0] * 10 ** (0.07 * step * len(lines) / 2), points[-1][1].estimate, name))
    _labels(axes, ends)


def extrapolation_panel(
    axes: Axes,
    points: Sequence[tuple[float, float, float]],
    line: Band | None,
    metric: str,
    beyond: float,
) -> None:
    """The best of each rung, (C, value, standard error), and the law at its optimum: dashed beyond the last rung."""
    titled(axes, with_goal(metric))
    rungs = [at for at, _, _ in points]
    rung_axis(axes, [*rungs, beyond])
    axes.xaxis.set_major_locator(FixedLocator([*rungs[:: math.ceil(len(rungs) / 4)], beyond]))
    values = [value for _, value, _ in points]
    reach: list[float] = []
    if line is not None:
        middle_2, low_2, high_2 = line(np.array([rungs[0], beyond]))
        reach = [value for value in (*middle_2, *low_2, *high_2) if math.isfinite(value)]
        reach = [value for value in reach if abs(value - middle_2[1]) <= 3 * (np.ptp([*values, *middle_2]) or 1.0)]
    value_axis(axes)
    low, high = min(values + reach), max(values + reach)
    air = 0.08 * max(high - low, 1e-9)
    axes.set_ylim(low - air, high + air)
    if line is not None:
        _draw_band(axes, line, rungs[0], rungs[-1], INK)
        _draw_band(axes, line, rungs[-1], beyond, INK, dashed=True)
        at_end = line(np.array([beyond]))
        middle, lower, upper = (float(part[0]) for part in at_end)
        above = goal_of(metric) == "minimize"
        ends = [f"{end:.4g}" if abs(end) < 0.99 * FAR else "open" for end in (lower, upper)]
        text = f"{middle:.4g} [{ends[0]}, {ends[1]}]"
        place = high if above else low
        axes.plot(beyond, middle, "D", ms=6, mfc=PAPER, mec=INK, mew=1.1, zorder=6)
        axes.annotate(
            f"predicted at {power_text(beyond)}:\n{text}", (beyond, place), ha="right", va="top" if above else "bottom",
            fontsize=8, color=INK, zorder=7,
        )  # fmt: skip
    for at, value, error in points:
        if math.isfinite(error):
            axes.plot([at, at], [value - 2 * error, value + 2 * error], color=MUTED, lw=0.9, zorder=2)
        axes.plot(at, value, "o", ms=5.5, mfc=INK, mec=PAPER, mew=0.7, zorder=6)


def log_values(axes: Axes, low: float, high: float, text: Callable[[float], str]) -> None:
    """A logarithmic y axis over [low, high] with a little air and few ticks."""
    air = max((high / low) ** 0.12, 1.15)
    axes.set_yscale("log")
    axes.set_ylim(low / air, high * air)
    decades = math.log10(high * air**2 / low)
    subs = (1.0,) if decades > 2.2 else (1.0, 3.0) if decades > 0.9 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=9))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(LogLocator(subs=()))
    axes.grid(False, axis="x")
    axes.spines["left"].set_visible(False)


def _zero_lane(axes: Axes, low: float, high: float, text: Callable[[float], str]) -> float:
    """Room for x = 0 at the left of a log axis: where it stands."""
    ticks = [tick for tick in axes.xaxis.get_majorticklocs() if low * 0.99 <= tick <= high * 1.01]
    width = max(high / low, 4.0) ** 0.14
    place = low / width
    axes.set_xlim(left=place / width**0.5)
    axes.xaxis.set_major_locator(FixedLocator([place, *ticks]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: "0" if value < low * 0.99 else text(value)))
    axes.axvline(low / width**0.5, color=MUTED, lw=0.8, ls=":", zorder=1)
    return place


def _draw_curve(
    axes: Axes, curve: Curve, x_R: np.ndarray, colour: Any, window: tuple[float, float]
) -> tuple[float, float]:
    """The curve over its runs' range and a little beyond; returns its visible right end."""
    x_P = np.geomspace(float(x_R.min()) / 1.12, float(x_R.max()) * 1.12, _PLACES)
    y_P = curve(x_P)
    seen_P = np.isfinite(y_P) & (y_P >= window[0]) & (y_P <= window[1])
    axes.plot(x_P, np.where(seen_P, y_P, np.nan), color=colour, lw=1.5, zorder=2)
    last = int(np.flatnonzero(seen_P)[-1]) if seen_P.any() else len(x_P) - 1
    return float(x_P[last]), float(np.clip(y_P[last], *window))


def _vertex(axes: Axes, optimum: Estimate, best: float, colour: Any) -> None:
    """The optimum as a diamond on a bar from end to end of its interval; an open end runs to the edge."""
    left, right = axes.get_xlim()
    ends = [max(optimum.low, left), min(optimum.high, right)]
    if not any(math.isnan(end) for end in ends):
        axes.plot(ends, [best, best], color=colour, lw=6.0, alpha=0.32, solid_capstyle="butt", zorder=4)
    axes.plot(optimum.estimate, best, "D", ms=6.5, mfc=colour, mec=INK, mew=1.0, zorder=6)


def _draw_band(axes: Axes, line: Band, low: float, high: float, colour: Any, *, dashed: bool = False) -> None:
    x_P = np.geomspace(low, high, _PLACES)
    middle_P, low_P, high_P = line(x_P)
    floor, top = axes.get_ylim()
    axes.plot(x_P, middle_P, color=colour, lw=1.3, ls=(0, (5, 3)) if dashed else "-", zorder=3, scaley=False)
    axes.fill_between(
        x_P, np.clip(low_P, floor, top), np.clip(high_P, floor, top), color=colour, alpha=0.12, lw=0, zorder=1
    )
    axes.set_ylim(floor, top)


def _inside(axes: Axes) -> tuple[float, float]:
    """The x axis without its last tenth, which belongs to labels."""
    left, right = axes.get_xlim()
    return left, right * (left / right) ** 0.1


def _labels(axes: Axes, ends: Sequence[tuple[float, float, str]], *, left: bool = False) -> None:
    """Names at the right (or left) ends of curves, pushed apart where they would overlap."""
    place, box = axes.get_subplotspec(), axes.get_figure(root=True)
    rows = place.get_gridspec().nrows if place else 1
    height_pt = (box.get_size_inches()[1] if box else 3.0) * 72 * 0.76 / rows
    to_axes = axes.transData + axes.transAxes.inverted()
    at = [to_axes.transform((x, y)) for x, y, _ in ends]
    tall = [10.5 * (1 + text.count("\n")) / height_pt for _, _, text in ends]
    for (x, _), height, (_, _, text) in zip(at, _apart([y for _, y in at], tall), ends, strict=True):
        axes.annotate(
            text, (min(x, 0.99), height), xycoords="axes fraction", xytext=(-9 if left else 6, 0),
            textcoords="offset points", ha="right" if left else "left", va="center", fontsize=8, color=INK, zorder=7,
            linespacing=1.1,
        )  # fmt: skip


def _apart(wanted: Sequence[float], tall: Sequence[float]) -> list[float]:
    """Centres as near as can be to the wanted ones so that none of these heights overlap: touching ones form blocks."""
    blocks: list[list[int]] = []

    def centre(block: list[int]) -> float:
        return sum(wanted[label] for label in block) / len(block)

    def half(block: list[int]) -> float:
        return sum(tall[label] for label in block) / 2

    for label in np.argsort(wanted, kind="stable").tolist():
        blocks.append([label])
        while len(blocks) > 1 and centre(blocks[-1]) - half(blocks[-1]) < centre(blocks[-2]) + half(blocks[-2]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    found = [0.0] * len(wanted)
    for block in blocks:
        low = centre(block) - half(block)
        for label in block:
            found[label] = low + tall[label] / 2
            low += tall[label]
    return found


def _footnote(axes: Axes, text: str) -> None:
    axes.text(0.01, 0.02, text, transform=axes.transAxes, fontsize=8, color=BAD, va="bottom", zorder=7)
