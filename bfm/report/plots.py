"""What a figure is before a browser draws it (templates/page.js): panels of plotly traces and axes, plain JSON.

Colours are hex or names of the page's theme (`@ink`), which follow light and dark. Texts that may come from outside
pass `plain`: plotly reads a few tags in what it draws.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bfm.laws.frontier import goal_of
from bfm.laws.result import Estimate
from bfm.report.digits import power_text

INK, MUTED, PAPER, BAD = "@ink", "@muted", "@paper", "@bad"
# Colours with enough contrast on white and on near-black; lightness still rises with the value.
SIZE_SCALE = ("#4457d6", "#9b51c4", "#d9527f", "#ee7b4d", "#eda93a")
RUNG_SCALE = ("#5fb3a6", "#3f9fb5", "#4a83cc", "#7f75dd", "#b45fc4")
_MOST_TICKS = 7
_LONGEST = 48
_LEAST, _MOST = 1e-300, 1e300
Trace = dict[str, Any]
Band = Sequence[tuple[float, Estimate]]
"""Places, ascending, and a curve with its interval there: straight between them on the axes' own scales."""


@dataclass(frozen=True)
class Panel:
    """One plot. layout: plotly's axes, shapes and annotations; floors: as `floor_lines` makes them."""

    title: str
    traces: Sequence[Trace]
    layout: Mapping[str, Any]
    floors: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Variant:
    """A figure for one metric, and the sentence that it shows."""

    metric: str
    said: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Figure:
    """A figure under its heading and caption; with several variants a person chooses."""

    name: str
    heading: str
    caption: str
    variants: Sequence[Variant]

    def as_dict(self) -> list[dict[str, Any]]:
        """JSON-able form of the variants."""
        return [{"said": one.said, "panels": [vars(panel) for panel in one.panels]} for one in self.variants]


def plain(text: object) -> str:
    """Text that plotly draws as it is."""
    return html.escape(str(text), quote=False)


def short(name: object, longest: int = _LONGEST) -> str:
    """Text from outside for a label: not too long, and of its own direction."""
    text = str(name)
    cut = text if len(text) <= longest else f"{text[: longest - 13]}\u2026{text[-12:]}"
    return f"\u2068{plain(cut)}\u2069"


def rung_colours(rungs: Sequence[float]) -> dict[float, str]:
    """One colour per rung."""
    return {flops: _between(RUNG_SCALE, place / max(len(rungs) - 1, 1)) for place, flops in enumerate(rungs)}


def _between(scale: Sequence[str], share: float) -> str:
    place = share * (len(scale) - 1)
    low = min(int(place), len(scale) - 2)
    ends = [np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) for colour in scale[low : low + 2]]
    return "#" + "".join(f"{round(part):02x}" for part in ends[0] + (place - low) * (ends[1] - ends[0]))


def with_goal(metric: str) -> str:
    """The metric and an arrow in the direction of better."""
    return f"{metric} \u2193" if goal_of(metric) == "minimize" else f"{metric} \u2191"


def log_axis(
    label: str, low: float, high: float, text: Callable[[float], str], *, left: float = 0.06, right: float = 0.06
) -> dict[str, Any]:
    """A logarithmic axis over [low, high], with air as shares of it, and ticks as people read them."""
    width = max(math.log10(high / low), 0.3)
    ends = math.log10(low) - left * width, math.log10(high) + right * width
    ticks = log_ticks(10 ** ends[0], 10 ** ends[1])
    axis = {"title": {"text": short(label)}, "type": "log", "range": list(ends)}
    return axis | {"tickvals": ticks, "ticktext": [text(tick) for tick in ticks]}


def log_ends(axis: Mapping[str, Any]) -> tuple[float, float]:
    """The ends of a logarithmic axis as they are read, not as their logarithms."""
    low, high = axis["range"]
    return 10.0**low, 10.0**high


def log_ticks(low: float, high: float) -> list[float]:
    """A few round values within [low, high]."""
    decades = math.log10(high / low)
    of_decade = (
        (1,) if decades > 2.2 else (1, 3) if decades > 0.9 else (1, 2, 5) if decades > 0.5 else (1, 1.5, 2, 3, 5, 7)
    )
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{sub}e{exponent}") for exponent in exponents for sub in of_decade]
    within = [tick for tick in ticks if low <= tick <= high] or [float(f"{math.sqrt(low * high):.2g}")]
    return within[:: math.ceil(len(within) / _MOST_TICKS)]


def linear_axis(label: str, low: float, high: float) -> dict[str, Any]:
    """An axis over [low, high] whose ticks plotly chooses."""
    return {"type": "linear", "title": {"text": short(label)}, "range": [low, high], "nticks": 6}


def rung_axis(rungs: Sequence[float], beyond: float | None = None, beside: Sequence[float] = ()) -> dict[str, Any]:
    """A logarithmic C axis whose ticks are the rungs, and a place beyond them; it shows what is drawn `beside` them."""
    drawn = [*rungs, *beside]
    first, last = min(drawn), max(*drawn, beyond or 0.0)
    width = max(math.log10(last / first), 0.6)
    ends = [math.log10(first) - 0.08 * width, math.log10(last) + 0.08 * width]
    ticks = [*rungs[:: math.ceil(len(rungs) / _MOST_TICKS)], *([] if beyond is None else [beyond])]
    axis = {"title": {"text": "C, training FLOPs of one trial"}, "type": "log", "range": ends}
    return axis | {"tickvals": ticks, "ticktext": [power_text(tick) for tick in ticks]}


@dataclass(frozen=True)
class Window:
    """The range of a value axis, and what values beyond it are drawn at."""

    low: float
    high: float
    air: float

    @property
    def ends(self) -> tuple[float, float]:
        """Of the axis."""
        return self.low - self.air, self.high + self.air

    @property
    def edges(self) -> tuple[float, float]:
        """Where what lies beyond is drawn."""
        return self.low - self.air / 2, self.high + self.air / 2


def value_window(
    values: Sequence[float], metric: str, reach: Sequence[float] = (), references: Sequence[float] = ()
) -> Window:
    """What shows the values, `reach` (ends of error bars) and near references.

    A run that nearly diverged must not flatten the picture: it is drawn at the edge. Neither must a far reference.
    """
    minimise, middle = goal_of(metric) == "minimize", float(np.median(values))
    low, high = min(values), max(values)
    bulk = 3 * max(middle - low if minimise else high - middle, 0.02 * abs(middle))
    low, high = (low, min(high, middle + bulk)) if minimise else (max(low, middle - bulk), high)
    known = [value for value in reach if math.isfinite(value)]
    low, high = min([low, *known]), max([high, *known])
    span = max(high - low, 0.02 * abs(high), 1e-9)
    # Ranking metrics have a natural zero, so a floor near it may stretch the axis; a loss has none.
    near = max(1.5 * span, (0.05 if minimise else 0.6) * abs(high))
    for value in references:
        if low - near <= value <= high + near:
            low, high = min(low, value), max(high, value)
    return Window(low, high, 0.1 * max(high - low, span))


def floor_lines(floors: Mapping[str, float], window: Window) -> list[dict[str, Any]]:
    """Floors by name for a panel: lines across it, or a remark where they are beyond its window."""
    low, high = window.ends
    return [{"name": short(name), "value": value, "near": low <= value <= high} for name, value in floors.items()]


def dots(x: Any, y: Any, colour: str, texts: Sequence[str], **more: Any) -> Trace:
    """Points that say their text when they are looked at."""
    marker = {"color": colour, "size": 7, "opacity": 0.85, "line": {"color": PAPER, "width": 0.6}}
    trace = {"type": "scatter", "mode": "markers", "x": x, "y": y, "text": texts, "hoverinfo": "text"}
    return trace | {"showlegend": False, **more, "marker": marker | more.get("marker", {})}


def line(x: Any, y: Any, colour: str, *, dash: str = "solid", width: float = 1.6, **more: Any) -> Trace:
    """A line that says nothing when it is looked at."""
    trace: Trace = {"type": "scatter", "mode": "lines", "x": x, "y": y, "hoverinfo": "skip", "showlegend": False}
    return trace | {"line": {"color": colour, "dash": dash, "width": width}, **more}


def diamonds(x: Any, y: Any, colours: Any, texts: Sequence[str], **more: Any) -> Trace:
    """Optima."""
    marker = {"symbol": "diamond", "size": 10, "opacity": 1.0, "line": {"color": INK, "width": 1.2}}
    return dots(x, y, colours, texts, **more, marker=marker)


def bars(values: Iterable[Estimate], colour: str, axis: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Error bars over intervals, which end where a logarithmic axis ends."""
    lowest, highest = (-math.inf, math.inf) if axis is None else log_ends(axis)
    values = list(values)
    above = [min(value.high, highest) - value.estimate for value in values]
    below = [value.estimate - max(value.low, lowest) for value in values]
    known = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
    return known | {"color": colour, "thickness": 1.4, "width": 0}


def band_traces(band: Band, measured: float, *, log: bool) -> list[Trace]:
    """Solid up to the last place that was measured, dashed and paler beyond."""
    if len(band) < 2:
        return []
    log_x = np.log([at for at, _ in band])
    # Open ends are drawn beyond any axis.
    parts = np.clip([[value.estimate, value.low, value.high] for _, value in band], _LEAST if log else -_MOST, _MOST)
    if log:
        parts = np.log(parts)
    edge = min(math.log(measured), log_x[-1])
    traces: list[Trace] = []
    for inside, dash, opacity in ((log_x <= edge, "solid", 1.0), (log_x >= edge, "dash", 0.55)):
        at = np.union1d(log_x[inside], [edge])
        if len(at) < 2:
            continue
        middle, low, high = (np.interp(at, log_x, part) for part in parts.T)
        if log:
            middle, low, high = np.exp([middle, low, high])
        x = np.exp(at)
        fill: Trace = {"fill": "toself", "fillcolor": INK, "opacity": 0.12 * opacity}
        outline = np.concatenate([x, x[::-1]]), np.concatenate([high, low[::-1]])
        traces += [line(*outline, INK, width=0, **fill), line(x, middle, INK, dash=dash, opacity=opacity)]
    return traces


def words_at(x: float, y: float, text: str, **more: Any) -> dict[str, Any]:
    """A remark inside a panel, at shares of its width and height."""
    place = {"xref": "paper", "yref": "paper", "x": x, "y": y, "showarrow": False}
    return place | {"text": plain(text), "font": {"size": 11, "color": MUTED}, **more}


def empty(title: str, why: str) -> Panel:
    """Says why there is nothing to see."""
    hidden = {"visible": False}
    return Panel(title, [], {"xaxis": hidden, "yaxis": hidden, "annotations": [words_at(0.5, 0.5, why)]})
