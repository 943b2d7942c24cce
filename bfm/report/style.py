"""House style of the figures: one look for SVG in the page, SVG files and PNG; ink and grid follow the page's theme.

Figures are built without pyplot (no global state), drawn by Agg or as SVG. Text in SVG stays text. `inline_svg` swaps
the ink colours for CSS variables, so one figure reads well on a light and on a dark page.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from bfm.units import format_count, format_flops

INK, MUTED, GRID, PAPER, BAD = "#1f2430", "#6b7280", "#e4e6eb", "#ffffff", "#c92a2a"
_THEMED = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)", BAD: "var(--bad)"}
# Colours with enough contrast on white and on near-black; lightness still rises with the value.
SIZE_MAP = LinearSegmentedColormap.from_list("size", ["#4457d6", "#9b51c4", "#d9527f", "#ee7b4d", "#eda93a"])
RUNG_MAP = LinearSegmentedColormap.from_list("rung", ["#7cc4b8", "#3f9fb5", "#3473b8", "#5a4fb5", "#7a3a9a"])
_FONTS = "Inter, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
_SUPERSCRIPT = str.maketrans("0123456789-", "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b")

_RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9.0,
    "axes.labelsize": 9.0,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "axes.titlecolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "xtick.minor.size": 0.0,
    "ytick.minor.size": 0.0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.4,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "bfm",
}


P = ParamSpec("P")
T = TypeVar("T")


def house_style(draw: Callable[P, T]) -> Callable[P, T]:
    """Decorator: everything drawn inside takes the house's look (matplotlib reads its settings late and globally)."""

    @functools.wraps(draw)
    def inside(*arguments: P.args, **keywords: P.kwargs) -> T:
        with matplotlib.rc_context(_RC):
            return draw(*arguments, **keywords)

    return inside


def new_figure(width_in: float, height_in: float) -> Figure:
    """An empty figure, laid out by constrained layout."""
    return Figure(figsize=(width_in, height_in), layout="constrained")


def new_axes(figure: Figure, rows: int, columns: int, count: int, **keywords: Any) -> list[Axes]:
    """`count` axes in reading order on a grid; places past `count` stay blank."""
    axes = list(figure.subplots(rows, columns, squeeze=False, **keywords).flat)
    for blank in axes[count:]:
        blank.remove()
    return axes[:count]


@house_style
def svg_text(figure: Figure) -> str:
    """The figure as an SVG file on white, the same text for the same figure."""
    buffer = io.StringIO()
    # Without metadata the file holds no date and no foreign address.
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", facecolor=PAPER, metadata=nothing)
    return buffer.getvalue().replace("'DejaVu Sans', sans-serif", _FONTS).replace("'DejaVu Sans'", _FONTS)


def inline_svg(text: str, name: str, description: str) -> str:
    """An SVG file of `svg_text` as an <svg> element for a page: themed colours, ids of its own, width from the page."""
    text = text[text.index("<svg") :]
    for colour, variable in _THEMED.items():
        text = text.replace(colour, variable)
    # matplotlib names every group; several figures on one page would repeat the names.
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", text)
    head, rest = text.split(">", 1)
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)
    # 1 pt is 4/3 CSS px; below 600 px a figure scrolls and does not shrink further.
    width_px = float(re.findall(r'viewBox="0 0 ([0-9.]+)', head)[0]) * 4 / 3
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    width = f"width:100%;min-width:{min(width_px, 600):.0f}px;max-width:{width_px:.0f}px"
    return f'{head} role="img" aria-label="{label}" style="{width}">{rest}'


@house_style
def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG file on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor=PAPER)
    return buffer.getvalue()


def size_norm(params: Iterable[float]) -> LogNorm:
    """Colour scale over model sizes N; a single size still gives a scale."""
    found = [value for value in params if value and value > 0 and math.isfinite(value)]
    low, high = (min(found), max(found)) if found else (1.0, 10.0)
    return LogNorm(low, high) if high > 4 * low else LogNorm(low / 2, high * 2)


def size_bar(figure: Figure, norm: LogNorm, axes: Sequence[Axes]) -> None:
    """The colour bar of N beside the axes."""
    mappable = matplotlib.cm.ScalarMappable(norm=norm, cmap=SIZE_MAP)
    bar = figure.colorbar(mappable, ax=list(axes), fraction=0.03, pad=0.015, aspect=32)
    bar.outline.set_visible(False)
    bar.ax.set_title("N", fontsize=8.5, color=MUTED, fontweight="normal", loc="center")
    bar.ax.yaxis.set_major_locator(_log_ticks(norm.vmin or 1.0, norm.vmax or 10.0))
    bar.ax.yaxis.set_minor_locator(LogLocator(subs=()))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    bar.ax.tick_params(length=0)


def rung_colours(rungs: list[float]) -> dict[float, Any]:
    """One colour per rung, darker as C grows."""
    return {flops: RUNG_MAP(place / max(len(rungs) - 1, 1)) for place, flops in enumerate(rungs)}


def power_text(value: float) -> str:
    """1e12 -> '10' with a raised 12; 4e11 -> '4x10' with a raised 11."""
    if not (value > 0 and math.isfinite(value)):
        return "0"
    mantissa, exponent = format_flops(value).split("e")
    raised = "10" + exponent.translate(_SUPERSCRIPT)
    return raised if mantissa == "1" else f"{mantissa}\u00d7{raised}"


def rung_axis(axes: Axes, rungs: Sequence[float], *, air_right: float = 0.0) -> None:
    """A logarithmic C axis whose ticks are the rungs; `air_right` is free room, as a share of the ladder."""
    spread = max(math.log10(rungs[-1] / rungs[0]), 0.6)
    axes.set_xscale("log")
    axes.set_xlim(rungs[0] / 10 ** (0.12 * spread), rungs[-1] * 10 ** ((0.12 + air_right) * spread))
    axes.xaxis.set_major_locator(FixedLocator(list(rungs[:: math.ceil(len(rungs) / 7)])))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: power_text(value)))
    axes.xaxis.set_minor_locator(LogLocator(subs=()))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("C, training FLOPs of one trial")


def log_axis(axes: Axes, low: float, high: float, *, air_right: float = 0.0) -> None:
    """A logarithmic x axis over [low, high] with a little air and ticks such as 10k; `air_right` as in `rung_axis`."""
    air = max((high / low) ** 0.06, 1.15)
    axes.set_xscale("log")
    axes.set_xlim(low / air, high * air * max(high / low, 2.0) ** air_right)
    axes.xaxis.set_major_locator(_log_ticks(low / air, high * air))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    axes.xaxis.set_minor_locator(LogLocator(subs=()))
    axes.xaxis.set_minor_formatter(NullFormatter())


def value_axis(axes: Axes) -> None:
    """A linear y axis with few, round ticks and a light grid; vertical grid lines off."""
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(False, axis="x")
    axes.spines["left"].set_visible(False)


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


def _log_ticks(low: float, high: float) -> LogLocator:
    decades = math.log10(high / low)
    if decades > 2.2:
        return LogLocator(subs=(1.0,), numticks=7)
    return LogLocator(subs=(1.0, 3.0) if decades > 0.9 else (1.0, 2.0, 5.0), numticks=9)
