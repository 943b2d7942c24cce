"""One panel each: runs and fitted curves drawn on given axes. Figures are put together in `law_figures`.

R runs of one budget (or size), P places of a curve.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator

from bfm.laws.frontier import goal_of
from bfm.laws.result import Estimate
from bfm.laws.transform import from_loss, to_loss
from bfm.report.digits import estimate_text
from bfm.report.law_details import AxisWords
from bfm.report.panels import beside, empty, label_ends, titled, value_window, with_goal
from bfm.report.style import BAD, INK, MUTED, PAPER, log_axis, log_values, power_text, rung_axis, value_axis
from bfm.units import format_count

_LEAST, _MOST = 1e-300, 1e300
_BEYOND_ALPHA = 0.55
"""What lies beyond the largest C is paler: no run was there."""
_POINT: dict[str, Any] = {"s": 20.0, "linewidths": 0.6, "edgecolors": PAPER, "alpha": 0.8, "zorder": 3}
_PLACES = 160
_LEAST_SPAN = 4.0
Curve = Callable[[np.ndarray], np.ndarray]
Band = Sequence[tuple[float, Estimate]]
"""Places, ascending, and a curve with its interval there: straight between them on the axes' own scales."""


@dataclass(frozen=True)
class Valley:
    """Runs that share a budget (or a size), the curve through them and the optimum on it."""

    label: str
    colour: Any
    x_R: np.ndarray
    y_R: np.ndarray
    curve: Curve
    optimum: Estimate | None = None
    best: float = math.nan
    """The curve's value at the optimum."""
    note: str = ""
    """Why there is no optimum."""


def valley_panel(axes: Axes, valleys: Sequence[Valley], metric: str, words: AxisWords) -> None:
    """A metric against what was varied, on a log scale; x = 0 stands apart at the left, without a curve."""
    titled(axes, with_goal(metric), x_label=words.label)
    if not valleys:
        empty(axes, "no budget has runs of its own")
        return
    positive = np.concatenate([valley.x_R[valley.x_R > 0] for valley in valleys])
    low, high = float(positive.min()), float(positive.max())
    log_axis(axes, low, high, air_right=0.34)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words.text(value)))
    if high < 2000 * low:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=9))
    zero = _zero_lane(axes, low, high, words.text) if any((valley.x_R == 0).any() for valley in valleys) else math.nan
    values = np.concatenate([valley.y_R for valley in valleys]).tolist()
    window = value_window(axes, values, metric, [valley.best for valley in valleys])
    ends = []
    for valley in valleys:
        y_R, at_zero_R = np.clip(valley.y_R, *window), valley.x_R == 0
        axes.scatter(valley.x_R[~at_zero_R], y_R[~at_zero_R], color=valley.colour, **_POINT)
        axes.plot(np.full(at_zero_R.sum(), zero), y_R[at_zero_R], "s", ms=4.5, mfc=PAPER, mec=valley.colour, mew=1.3)
        end = _draw_curve(axes, valley.curve, valley.x_R[~at_zero_R], valley.colour, window)
        if valley.optimum is not None:
            best, (left, right) = float(np.clip(valley.best, *window)), axes.get_xlim()
            reach = [max(valley.optimum.low, left), min(valley.optimum.high, right)]
            axes.plot(reach, [best] * 2, color=valley.colour, lw=6.0, alpha=0.32, solid_capstyle="butt", zorder=4)
            axes.plot(valley.optimum.estimate, best, "D", ms=6.5, mfc=valley.colour, mec=INK, mew=1.0, zorder=6)
        ends.append((*end, valley.label + (f"\n{valley.note}" if valley.note else "")))
    label_ends(axes, ends)


def trend_panel(
    axes: Axes,
    points: Sequence[tuple[float, Estimate, Any]],
    flops: Sequence[float],
    band: Band,
    text: Callable[[float], str],
) -> None:
    """An optimum against C on log scales: (C, optimum, colour) where it is told, the law and its band over all C."""
    if not points:
        empty(axes, "no budget encloses its optimum")
        return
    _axis_to(axes, flops, max(flops[-1], *(at for at, _ in band)) if band else flops[-1])
    _log_window(axes, [*(value for _, value, _ in points), *(value for _, value in band)], text)
    _draw_band(axes, band, flops[-1])
    low_edge, high_edge = axes.get_ylim()
    for at, optimum, colour in points:
        axes.plot([at, at], [max(optimum.low, low_edge), min(optimum.high, high_edge)], color=colour, lw=1.6, zorder=5)
        axes.plot(at, optimum.estimate, "D", ms=6.5, mfc=colour, mec=INK, mew=1.0, zorder=6)
    if missing := [at for at in flops if at not in [told for told, _, _ in points]]:
        words = f"no optimum at C = {', '.join(map(power_text, missing))}"
        axes.text(0.01, 0.02, words, transform=axes.transAxes, fontsize=8, color=BAD, va="bottom", zorder=7)


def error_bars(axes: Axes, metric: str, errors: Mapping[str, float]) -> None:
    """Right of the panel, to its scale: by name, the standard deviation of an error of the loss, either way."""
    low, high = axes.get_ylim()
    middle = (low + high) / 2
    loss = float(to_loss(metric, np.array([middle]))[0])
    for place, (name, size) in enumerate((name, size) for name, size in errors.items() if size > 0):
        ends = [from_loss(metric, loss - size), from_loss(metric, loss + size)]
        x, across = 1.02 + 0.045 * place, axes.get_yaxis_transform()
        axes.plot([x, x], ends, "_-", color=MUTED, ms=5, lw=1.3, transform=across, clip_on=False, zorder=6)
        small: dict[str, Any] = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 7.5, "color": MUTED}
        axes.text(x, max(ends), f" {name}", transform=across, **small)
    axes.set_ylim(low, high)


def reference_line(axes: Axes, points: Sequence[tuple[float, float]], exponent: float, text: str) -> None:
    """A thin dashed power law of a given exponent through the (geometric) middle of points, named at its end."""
    x, y = np.log([point[0] for point in points]), np.log([point[1] for point in points])
    left, right = axes.get_xlim()
    # The last tenth belongs to labels.
    x_P = np.geomspace(left, right * (left / right) ** 0.1, _PLACES)
    y_P = np.exp(y.mean() + exponent * (np.log(x_P) - x.mean()))
    axes.plot(x_P, y_P, color=MUTED, lw=0.9, ls=(0, (4, 3)), zorder=1, scaley=False)
    low, high = axes.get_ylim()
    seen_P = np.flatnonzero((y_P > low) & (y_P < high))
    place = seen_P[round(0.92 * (len(seen_P) - 1))]
    beside(axes, text, float(x_P[place]), float(y_P[place]), MUTED, offset=(-8, 2), align="right")


def reference_range(axes: Axes, low: float, high: float, text: Callable[[float], str]) -> None:
    """A published range of an optimum as a pale strip, named at its right end."""
    floor, top = axes.get_ylim()
    if high > floor and low < top:
        axes.axhspan(max(low, floor), min(high, top), color=MUTED, alpha=0.09, lw=0, zorder=0)
        words, across = f"arXiv 2606.05257: {text(low)} to {text(high)}", axes.get_yaxis_transform()
        axes.text(0.99, min(high, top), words, transform=across, ha="right", va="top", fontsize=8, color=MUTED)
        axes.set_ylim(floor, top)


def critical_panel(axes: Axes, series: Sequence[tuple[str, str, Sequence[tuple[float, Estimate]], Band]]) -> None:
    """Critical batches against N on log scales: (name, marker, points, power law or nothing) of each definition."""
    titled(axes, "Critical batch", x_label="N, dense parameters")
    points = [point for _, _, line, _ in series for point in line]
    if not points:
        empty(axes, "no critical batch is closed")
        return
    sizes = [size for size, _ in points]
    log_axis(axes, min(sizes), max(sizes), air_right=0.45)
    _log_window(axes, [value for _, value in points], format_count)
    low_edge, high_edge = axes.get_ylim()
    ends = []
    for name, marker, line, power in series:
        _draw_band(axes, power, max(sizes) * 1.3)
        for size, value in line:
            axes.plot([size] * 2, [max(value.low, low_edge), min(value.high, high_edge)], color=INK, lw=1.3, zorder=4)
            axes.plot(size, value.estimate, marker, ms=6, mfc=PAPER, mec=INK, mew=1.1, zorder=6)
        ends += [(size * 1.3, value.estimate, name) for size, value in line[-1:]]
    label_ends(axes, ends)


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
        _draw_curve(axes, valley.curve, valley.x_R, valley.colour, axes.get_ylim())
        for batch, marker in marked:
            if axes.get_xlim()[0] < batch < axes.get_xlim()[1]:
                height = float(valley.curve(np.array([batch]))[0])
                axes.plot(batch, height, marker, ms=6.5, mfc=valley.colour, mec=INK, mew=1.0, zorder=6)
        start = float(valley.curve(valley.x_R[place : place + 1])[0])
        starts.append((float(valley.x_R[place]), start, valley.label))
    label_ends(axes, starts, left=True)


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
    label_ends(axes, ends)


def extrapolation_panel(axes: Axes, points: Sequence[tuple[float, float, float]], band: Band, metric: str) -> None:
    """The best of each rung, (C, value, standard error), and what the law foretells: dashed beyond the last rung."""
    titled(axes, with_goal(metric))
    rungs, beyond, last = [at for at, _, _ in points], *band[-1]
    _axis_to(axes, rungs, beyond)
    value_axis(axes)
    values = [value for _, value, _ in points]
    middles = [value.estimate for _, value in band]
    reach = 3 * float(np.ptp([*values, *middles]) or 1.0)
    ends = [max(last.low, last.estimate - reach), min(last.high, last.estimate + reach)]
    low, high = min(*values, *middles, *ends), max(*values, *middles, *ends)
    air = 0.08 * max(high - low, 1e-9)
    axes.set_ylim(low - air, high + air)
    _draw_band(axes, band, rungs[-1])
    axes.plot(beyond, last.estimate, "D", ms=6, mfc=PAPER, mec=INK, mew=1.1, zorder=6)
    above = goal_of(metric) == "minimize"
    axes.annotate(
        f"foretold at {power_text(beyond)}:\n{estimate_text(last, '{:.4g}'.format)}", (beyond, high if above else low),
        ha="right", va="top" if above else "bottom", fontsize=8, color=INK, zorder=7,
    )  # fmt: skip
    for at, value, error in points:
        if math.isfinite(error):
            axes.plot([at, at], [value - 2 * error, value + 2 * error], color=MUTED, lw=0.9, zorder=2)
        axes.plot(at, value, "o", ms=5.5, mfc=INK, mec=PAPER, mew=0.7, zorder=6)


def _log_window(axes: Axes, values: Sequence[Estimate], text: Callable[[float], str]) -> None:
    """A logarithmic y axis that shows estimates and their intervals."""
    middles = [value.estimate for value in values]
    # An open interval must not squeeze the optima into a corner: it leaves through the edge.
    reach = 4 * max(max(middles) / min(middles), 2.0) ** 0.5
    ends = [end for value in values for end in (value.estimate, value.low, value.high)]
    near = [end for end in ends if min(middles) / reach <= end <= max(middles) * reach]
    # Optima that do not move with C must look as if they do not.
    middle = math.sqrt(min(near) * max(near))
    log_values(axes, min(*near, middle / _LEAST_SPAN**0.5), max(*near, middle * _LEAST_SPAN**0.5), text)


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


def _draw_band(axes: Axes, band: Band, measured: float) -> None:
    """Solid up to the last place that was measured, dashed and paler beyond."""
    if len(band) < 2:
        return
    log, window, edge = axes.get_yscale() == "log", axes.get_ylim(), min(measured, band[-1][0])
    log_x = np.log([at for at, _ in band])
    # Open ends are drawn beyond any axis.
    parts = np.clip([[value.estimate, value.low, value.high] for _, value in band], _LEAST if log else -_MOST, _MOST).T
    for low, high, dashes, alpha in ((band[0][0], edge, "-", 1.0), (edge, band[-1][0], (0, (5, 3)), _BEYOND_ALPHA)):
        x_P = np.geomspace(low, high, _PLACES)
        lines = [np.interp(np.log(x_P), log_x, np.log(part) if log else part) for part in parts]
        middle_P, low_P, high_P = np.exp(lines) if log else lines
        axes.plot(x_P, middle_P, color=INK, lw=1.3, ls=dashes, alpha=alpha, zorder=3, scaley=False)
        ends = np.clip(low_P, *window), np.clip(high_P, *window)
        axes.fill_between(x_P, *ends, color=INK, alpha=0.12 * alpha, lw=0, zorder=1)
    axes.set_ylim(*window)


def _axis_to(axes: Axes, rungs: Sequence[float], beyond: float) -> None:
    """A C axis over the rungs and on to a place beyond them."""
    rung_axis(axes, sorted({*rungs, beyond}))
    axes.xaxis.set_major_locator(FixedLocator([*rungs[:: math.ceil(len(rungs) / 4)], beyond]))
