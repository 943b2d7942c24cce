"""The figures of a sweep, as a paper would show them: ledger rows and baselines in, figures with captions out.

Frontier per metric; the loss of every trial along its ladder; iso-FLOP scatter in N and in the other swept numbers;
agreement of the loss with a ranking metric; where the FLOPs went. Any number of rows is drawn, none included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from bfm.laws.agreement import rank_agreement
from bfm.laws.frontier import Row, metric_names, rung_ladder, rung_rows
from bfm.report.floors import Baselines
from bfm.report.panels import (
    agreement_panel,
    curves_panel,
    field_panel,
    frontier_panel,
    size_panel,
    spend_panel,
    titled,
    with_goal,
)
from bfm.report.style import (
    BAD,
    MUTED,
    house_style,
    new_axes,
    new_figure,
    png_bytes,
    power_text,
    rung_colours,
    size_bar,
    size_norm,
)
from bfm.report.tables import failed_rows
from bfm.sweep.state import SweepState

_WIDTH_IN = 10.6


@dataclass(frozen=True)
class NamedFigure:
    """A figure with the file name, heading and caption it is shown under."""

    name: str
    heading: str
    caption: str
    figure: Figure


def sweep_figures(rows: Sequence[Row], state: SweepState, baselines: Baselines) -> list[NamedFigure]:
    """All figures that the rows allow, in the order of the page."""
    loss, ranking = _lead_metrics(rows)
    figures = [
        NamedFigure(
            "frontier",
            "Compute frontier",
            "Best value reachable with at most C in one trial (step), with every result at its rung, fanned out by "
            "N. Colour is model size N, labels name the N of the best, bars are two standard errors over queries "
            "(clustered by user); those of differences on the same queries are far smaller, in the table above. "
            "Dashed lines are baselines without a model.",
            frontier_figure(rows, baselines),
        ),
        NamedFigure(
            "curves",
            "Loss against C",
            "One line per trial. A ring marks a trial that was not promoted (so far), a cross one that diverged. "
            "Values far beyond the rest are drawn at the edge.",
            curves_figure(rows, loss),
        ),
        NamedFigure(
            "isoflop",
            "Model size at equal C",
            "Every result, one colour per rung; the diamond is the best of its rung with two standard errors, thin "
            "lines are convex hulls as a guide for the eye and no fit, the dotted line joins the best.",
            isoflop_figure(rows, [name for name in (loss, ranking) if name]),
        ),
    ]
    fields = varied_fields(rows)
    if fields:
        caption = f"{loss} against the other swept numbers of the configuration; diamonds are the best of each rung."
        figures.append(NamedFigure("settings", "The other settings", caption, fields_figure(rows, loss, fields)))
    agreed = rank_agreement(rows, loss, ranking) if ranking and ranking != loss else []
    if agreed:
        caption = (
            f"Whether {loss} and {ranking} prefer the same trials: Spearman correlation at each rung, +1 where they "
            "agree. Colour is model size N."
        )
        figures.append(
            NamedFigure("agreement", "Loss and ranking", caption, agreement_figure(rows, loss, ranking or loss))
        )
    caption = "Training FLOPs by rung. Lost and redone work counts against the cap; evaluation does not."
    figures.append(NamedFigure("spend", "Where the FLOPs went", caption, spend_figure(rows, state)))
    return figures


@house_style
def frontier_figure(rows: Sequence[Row], baselines: Baselines) -> Figure:
    """One panel per headline metric."""
    metrics = metric_names(rows)[:9] or ["nll"]
    columns = min(len(metrics), 3)
    lines = math.ceil(len(metrics) / columns)
    figure = new_figure(_WIDTH_IN * (0.62 if columns == 1 else 1.0), 2.75 * lines + 0.2)
    axes = new_axes(figure, lines, columns, len(metrics))
    norm = size_norm(_sizes(rows))
    for panel, metric in zip(axes, metrics, strict=True):
        frontier_panel(panel, rows, metric, baselines, norm)
        if panel not in axes[-columns:]:
            panel.set_xlabel("")
    size_bar(figure, norm, axes)
    return figure


@house_style
def curves_figure(rows: Sequence[Row], metric: str) -> Figure:
    """A metric of every trial against C."""
    figure = new_figure(_WIDTH_IN * 0.78, 4.4)
    axes = new_axes(figure, 1, 1, 1)
    norm = size_norm(_sizes(rows))
    curves_panel(axes[0], rows, metric, norm)
    size_bar(figure, norm, axes)
    return figure


@house_style
def isoflop_figure(rows: Sequence[Row], metrics: Sequence[str]) -> Figure:
    """Metrics against N at equal C, side by side."""
    figure = new_figure(_WIDTH_IN, 4.0)
    for panel, metric in zip(new_axes(figure, 1, len(metrics), len(metrics)), metrics, strict=True):
        size_panel(panel, rows, metric)
    return figure


@house_style
def fields_figure(rows: Sequence[Row], metric: str, fields: Sequence[str]) -> Figure:
    """A metric against the swept numbers, at most six, the value axis shared."""
    shown = fields[:6]
    columns = min(len(shown), 3)
    lines = math.ceil(len(shown) / columns)
    figure = new_figure(_WIDTH_IN * (0.4 + 0.2 * columns), 2.6 * lines)
    axes = new_axes(figure, lines, columns, len(shown), sharey=True)
    for place, (panel, field) in enumerate(zip(axes, shown, strict=True)):
        field_panel(panel, rows, metric, field)
        panel.set_ylabel(metric if place % columns == 0 else "")
    colours = rung_colours(rung_ladder(rows))
    handles = [
        axes[0].plot([], [], "o", ms=5, color=colour, label=f"C = {power_text(flops)}")[0]
        for flops, colour in colours.items()
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=min(len(handles), 6), handletextpad=0.1)
    return figure


@house_style
def agreement_figure(rows: Sequence[Row], first: str, second: str) -> Figure:
    """Two metrics against each other, one panel per rung (the last four), with their Spearman correlation."""
    agreed = rank_agreement(rows, first, second)[-4:]
    figure = new_figure(min(_WIDTH_IN, 1.4 + 3.0 * len(agreed)), 3.1)
    axes = new_axes(figure, 1, len(agreed), len(agreed))
    norm = size_norm(_sizes(rows))
    for place, (panel, found) in enumerate(zip(axes, agreed, strict=True)):
        agreement_panel(panel, rows, first, second, found.flops, norm)
        panel.set_title(f"C = {power_text(found.flops)}")
        note = f"Spearman {found.spearman.estimate:+.2f}, {found.rows} trials"
        panel.set_title(note, loc="right", fontsize=8.5, fontweight="normal", color=MUTED)
        if place:
            panel.set_ylabel("")
    size_bar(figure, norm, axes)
    return figure


@house_style
def spend_figure(rows: Sequence[Row], state: SweepState) -> Figure:
    """FLOPs per rung, diverged and lost work, and what is left under the cap."""
    bars: list[tuple[str, float, Any, bool]] = []
    for flops, colour in rung_colours(rung_ladder(rows)).items():
        here = [row for row in rung_rows(rows) if row["rung_flops"] == flops and row.get("status", "ok") == "ok"]
        spent = sum(_spent(row) for row in here)
        bars.append((f"rung {power_text(flops)}: {len(here)} results", spent, colour, True))
    if failed := failed_rows(rows):
        bars.append((f"without a result: {len(failed)}", sum(_spent(row) for row in failed), BAD, True))
    in_rows = sum(bar[1] for bar in bars)
    spent_all = float(state.spent_flops or in_rows)
    cap = float(state.cap_flops or 0.0)
    if spent_all - in_rows > 1e-3 * max(spent_all, 1.0):
        bars.append(("lost, redone, probes", spent_all - in_rows, MUTED, True))
    if cap > spent_all:
        bars.append(("left under the cap", cap - spent_all, MUTED, False))
    figure = new_figure(_WIDTH_IN * 0.78, 0.55 + 0.34 * max(len(bars), 1))
    axes = new_axes(figure, 1, 1, 1)[0]
    titled(axes, f"{power_text(spent_all)} FLOPs spent" + (f" of {power_text(cap)}" if cap else ""))
    spend_panel(axes, bars, cap or spent_all)
    return figure


@house_style
def overview_figure(rows: Sequence[Row], baselines: Baselines) -> Figure:
    """Four panels for a README: frontier of the loss and of a ranking metric, all trials, iso-FLOP."""
    loss, ranking = _lead_metrics(rows)
    figure = new_figure(_WIDTH_IN, 6.6)
    axes = new_axes(figure, 2, 2, 4)
    norm = size_norm(_sizes(rows))
    frontier_panel(axes[0], rows, loss, baselines, norm)
    frontier_panel(axes[1], rows, ranking or loss, baselines, norm)
    curves_panel(axes[2], rows, loss, norm, title=f"{with_goal(loss)}  of every trial")
    size_panel(axes[3], rows, loss)
    axes[0].set_title(f"Frontier of {with_goal(loss)}")
    axes[1].set_title(f"Frontier of {with_goal(ranking or loss)}")
    size_bar(figure, norm, axes[:2])
    return figure


def overview_png(rows: Sequence[Row], baselines: Baselines) -> bytes:
    """The overview as a PNG file."""
    return png_bytes(overview_figure(rows, baselines))


def varied_fields(rows: Sequence[Row]) -> list[str]:
    """Numbers of the configuration, other than N, that take at least two values over the rung rows."""
    values: dict[str, set[float]] = {}
    for row in rung_rows(rows):
        for field, value in (row.get("config") or {}).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                values.setdefault(field, set()).add(float(value))
    return [field for field, found in sorted(values.items()) if len(found) > 1 and field != "params"]


def _lead_metrics(rows: Sequence[Row]) -> tuple[str, str | None]:
    """The loss and the ranking metric that stand for the rest."""
    names = metric_names(rows)
    ranking = [name for name in names if name != "nll"]
    if "nll" in names or not names:
        return "nll", ranking[0] if ranking else None
    return names[0], ranking[1] if len(ranking) > 1 else None


def _sizes(rows: Sequence[Row]) -> list[float]:
    return [float(row["params"]) for row in rung_rows(rows) if row.get("params")]


def _spent(row: Row) -> float:
    return float(row.get("task_flops") or 0.0)
