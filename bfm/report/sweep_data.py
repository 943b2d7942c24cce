"""What the figures and tables of a sweep's results are made of: ledger rows in, a column per thing told of them out.

The page holds every result once, as columns of texts and numbers; the browser draws the figures from them by the metric
and the colour that a person chooses (templates/page.js), and lists them. R rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bfm.laws.frontier import FrontierPoint, Results, Row, goal_of, metric_error, metric_value, rung_rows
from bfm.report.digits import power_text, value_text
from bfm.report.floors import AgainstFloor, floors_at
from bfm.report.plots import (
    RUNG_SCALE,
    SIZE_SCALE,
    Window,
    floor_lines,
    linear_axis,
    log_axis,
    rung_axis,
    short,
    value_window,
    with_goal,
)
from bfm.report.sweep_view import SweepView
from bfm.report.tables import behind_text, change_text, size_words, trials_in_order
from bfm.report.words import plural
from bfm.units import format_count, format_seconds

_LOG_FROM = 4.0
"""Positive numbers that spread by this factor stand on a log axis."""
_FAN = 0.3
_LINE = 90


@dataclass(frozen=True)
class Column:
    """One thing told of every row. An axis is what its numbers stand on; without one nobody can choose it."""

    name: str
    text: Sequence[str]
    value: Sequence[float] | None = None
    """To draw and sort by; NaN where a row has none."""
    remark: Sequence[str] | None = None
    axis: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form of what there is."""
        return {name: value for name, value in vars(self).items() if value is not None}


def columns_of(view: SweepView) -> list[Column]:
    """What is told of each rung row; a metric's value stands above its difference from the best of its rung."""
    rows = rung_rows(view.rows)
    fields = [name for name in varied_fields(rows) if name != "embedder_share"]
    columns = [
        Column("trial", [str(row["trial"]) for row in rows]),
        Column("status", [str(row.get("status", "ok")) for row in rows]),
        _numbers("C", [row.get("rung_flops") for row in rows], power_text),
        _numbers("N", [row.get("params") for row in rows], format_count),
        _numbers("s", [row.get("embedder_share") for row in rows], "{:.2%}".format),
        *[_metric(view, rows, metric) for metric in view.results.metrics],
        *[_numbers(name.replace("_", " "), [_config(row, name) for row in rows], "{:.4g}".format) for name in fields],
        *[_choices(name, rows) for name in varied_choices(rows)],
        _numbers("D", [row.get("events") for row in rows], format_count),
        _numbers("D/N", [_ratio(row.get("events"), row.get("params")) for row in rows], "{:.3g}".format),
        _numbers("epochs", [row.get("epochs") for row in rows], "{:.2f}".format),
        _numbers("B", [row.get("batch_events") for row in rows], format_count),
        _numbers("steps", [row.get("steps") for row in rows], format_count),
        _numbers("training", [row.get("train_s") for row in rows], format_seconds),
        Column("engine", [engine_text(row) for row in rows]),
    ]
    # A setting may be called as one of ours is.
    names = [column.name for column in columns]
    return [
        replace(column, name=f"{column.name} (setting)") if column.name in names[:place] else column
        for place, column in enumerate(columns)
    ]


def sweep_data(view: SweepView) -> dict[str, Any] | None:
    """What the page's script draws the figures of results from and lists; None where there is none."""
    rows, rungs = rung_rows(view.rows), view.results.by_rung
    if not rows:
        return None
    ladder, fanned = list(rungs), _fanned(rows, rungs)
    trials = {trial: place for place, trial in enumerate(dict.fromkeys(str(row["trial"]) for row in rows))}
    places = {id(row): place for place, row in enumerate(rows)}
    return {
        "columns": [column.as_dict() for column in columns_of(view)],
        "trials": [places[id(row)] for row in trials_in_order(view.results)],
        "trial": [trials[str(row["trial"])] for row in rows],
        "label": [short(row["trial"]) for row in rows],
        "flops": [float(row["rung_flops"]) for row in rows],
        "fanned": fanned,
        "failed": [row.get("status", "ok") != "ok" for row in rows],
        "rungs": {"axis": rung_axis(ladder, beside=fanned), "flops": ladder},
        "scales": {"size": SIZE_SCALE, "rung": RUNG_SCALE},
        "metrics": {metric: _metric_facts(view, metric, places) for metric in view.bests},
    }


def _metric_facts(view: SweepView, metric: str, places: Mapping[int, int]) -> dict[str, Any]:
    """The frontier of a metric, its floors, the best of each rung, and the axis that shows them."""
    points, floors = view.frontiers[metric], floors_at(view.floors, metric)
    window = _window(view.results, metric, points, [*floors.values()])
    beside = [view.beside_floor(point.row, metric) for point in points]
    return {
        "label": short(metric),
        "goal": goal_of(metric),
        "axis": linear_axis(with_goal(metric), *window.ends),
        "edges": window.edges,
        "said": _frontier_sentence(metric, points[-1], beside[-1]),
        "floors": floor_lines(floors, window),
        "frontier": [
            {
                "flops": point.flops,
                "value": point.value,
                "bar": 2 * point.error,
                "row": places[id(point.row)],
                "carried": point.carried,
                "change": change_text(point),
                "floor": "" if floor is None else short(floor.words, _LINE),
            }
            for point, floor in zip(points, beside, strict=True)
        ],
        "bests": [
            {"row": places[id(row)], "bar": 2 * metric_error(row, metric)}
            for row in view.results.bests(metric).values()
        ],
    }


def _frontier_sentence(metric: str, best: FrontierPoint, floor: AgainstFloor | None) -> str:
    """The best value of a metric, who has it, and how it stands beside the strongest floor."""
    who = [str(best.row["trial"]), size_words(best.row), f"at C = {power_text(best.row['rung_flops'])}"]
    beside = "" if floor is None else f", {floor.words}"
    return f"Best {metric}: {value_text(best.value, best.error)} ({', '.join(filter(None, who))}){beside}."


def _window(results: Results, metric: str, points: Sequence[FrontierPoint], floors: Sequence[float]) -> Window:
    values = [metric_value(row, metric) for here in results.finished.values() for row in here]
    reach = [point.value + side * 2 * point.error for point in points for side in (-1, 1)]
    return value_window([value for value in values if math.isfinite(value)], metric, reach, floors)


def varied_fields(rows: Sequence[Row]) -> list[str]:
    """Numbers of the configuration, other than N, that take at least two values over the rung rows."""
    return [name for name in _varied(rows, (int, float)) if name != "params"]


def varied_choices(rows: Sequence[Row]) -> list[str]:
    """Settings that are no numbers and take at least two values over the rung rows."""
    return _varied(rows, (str,))


def _varied(rows: Sequence[Row], kinds: tuple[type, ...]) -> list[str]:
    values: dict[str, set[object]] = {}
    for row in rung_rows(rows):
        for name in row.get("config") or {}:
            if isinstance(value := _config(row, name), kinds):
                values.setdefault(name, set()).add(value)
    return sorted(name for name, found in values.items() if len(found) > 1)


def engine_text(row: Row) -> str:
    """Which engine trained a row, on how many workers."""
    name = row.get("engine") or "-"
    if name == "zero" and row.get("zero_stage") is not None:
        name = f"ZeRO-{row['zero_stage']}"
    return f"{name}, {plural(int(row.get('workers') or 1), 'worker')}"


def _metric(view: SweepView, rows: Sequence[Row], metric: str) -> Column:
    bests, values = view.results.bests(metric), [metric_value(row, metric) for row in rows]
    text = [value_text(value, metric_error(row, metric)) for row, value in zip(rows, values, strict=True)]
    behind = [behind_text(row, bests.get(row["rung_flops"]), metric, view.compare) for row in rows]
    known = [value for value in values if math.isfinite(value)]
    axis = linear_axis(with_goal(metric), *value_window(known, metric).ends) if known else None
    return Column(metric, text, values, behind, axis)


def _numbers(name: str, values: Sequence[object], text: Callable[[float], str]) -> Column:
    numbers = [float(value) if isinstance(value, (int, float)) else math.nan for value in values]
    texts = [text(number) if math.isfinite(number) else "-" for number in numbers]
    known = sorted({number for number in numbers if math.isfinite(number)})
    if len(known) < 2:
        return Column(name, texts, numbers)
    low, high = known[0], known[-1]
    if low > 0 and high >= _LOG_FROM * low:
        axis = log_axis(name, low, high, text)
    else:
        axis = linear_axis(name, low - 0.06 * (high - low), high + 0.06 * (high - low))
    few = {"tickvals": known, "ticktext": [text(number) for number in known]} if len(known) <= 5 else {}
    return Column(name, texts, numbers, axis=axis | few)


def _choices(name: str, rows: Sequence[Row]) -> Column:
    """Values by their place in the alphabet, which name the ticks."""
    texts = [str(_config(row, name)) for row in rows]
    names = sorted(set(texts))
    axis = linear_axis(name.replace("_", " "), -0.5, len(names) - 0.5)
    named = {"tickvals": [*range(len(names))], "ticktext": [*map(short, names)]}
    return Column(name.replace("_", " "), texts, [float(names.index(text)) for text in texts], axis=axis | named)


def _fanned(rows: Sequence[Row], rungs: Mapping[float, Sequence[Row]]) -> list[float]:
    """C of the dots: the rung, a little to the left for its small N and to the right for its large, so that none
    hides."""
    width = _FAN * math.log10(min((high / low for low, high in itertools.pairwise(rungs)), default=1.4))
    sizes = {flops: [row["params"] for row in here if row.get("params")] for flops, here in rungs.items()}
    ends = {flops: (min(known), max(known)) for flops, known in sizes.items() if known}

    def share(row: Row) -> float:
        low, high = ends.get(row["rung_flops"], (1, 1))
        return math.log(row["params"] / low) / math.log(high / low) - 0.5 if row.get("params") and high > low else 0.0

    return [row["rung_flops"] * 10 ** (width * share(row)) for row in rows]


def _config(row: Row, name: str) -> object:
    value = (row.get("config") or {}).get(name)
    return str(value) if isinstance(value, bool) else value


def _ratio(upper: object, lower: object) -> float:
    numbers = isinstance(upper, (int, float)) and isinstance(lower, (int, float))
    return upper / lower if numbers and lower else math.nan  # type: ignore[operator]
