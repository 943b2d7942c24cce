"""The report of a sweep: ledger rows in; index.html (self-contained), runs.parquet and SVG figures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from bfm.laws.frontier import Compare, Row, no_answers
from bfm.report import sections
from bfm.report.figures import NamedFigure, overview_png, sweep_figures
from bfm.report.floors import Baselines
from bfm.report.law_figures import law_figures
from bfm.report.law_fits import Fitted
from bfm.report.law_sections import law_parts, opening
from bfm.report.recipe_section import recipe_part
from bfm.report.runs_file import runs_parquet
from bfm.report.style import inline_svg, svg_text
from bfm.report.template import escape, page, paragraph, section
from bfm.sweep.state import SweepState

_TRIALS_NOTE = "Click a head to sort. Under a value: its difference from the best of its rung, on the same queries."


def render_report(
    rows: Sequence[Row],
    state: SweepState,
    baselines: Baselines,
    extra: Mapping[str, Any],
    *,
    laws: Sequence[Fitted] = (),
    compare: Compare = no_answers,
    overview: bool = False,
) -> dict[str, bytes]:
    """The files of the report by name, index.html last: it stands only where all that it names stands.

    extra: manifest, protocol, provenance {name: value}, recipe (recipe.json), each of which may be missing;
    laws: what `law_fits.sweep_laws` tells from the rows; compare: what differences of rows are told by.
    """
    figures, of_laws = sweep_figures(rows, state, baselines), law_figures(laws)
    drawn = {figure.name: svg_text(figure.figure) for figure in [*of_laws, *figures]}
    files = {f"figures/{name}.svg": text.encode() for name, text in drawn.items()}
    if overview:
        files["figures/overview.png"] = overview_png(rows, baselines)
    shown = _laws_part(laws, of_laws, drawn, recipe_part(extra.get("recipe"), state.checks)) + "\n".join(
        section(figure.name, figure.heading, shown_figure(figure, drawn[figure.name])) for figure in figures
    )
    files["runs.parquet"] = runs_parquet(rows)
    files["index.html"] = report_html(rows, state, baselines, extra, shown, compare).encode()
    return files


def report_html(
    rows: Sequence[Row],
    state: SweepState,
    baselines: Baselines,
    extra: Mapping[str, Any],
    figures: str,
    compare: Compare = no_answers,
) -> str:
    """The page as text; `figures` is the part of it that shows them."""
    spec = state.spec or {}
    name = str(spec.get("name") or "sweep")
    best = section("best", "Best so far", sections.best_table(rows, compare))
    every = sections.trial_table(rows, compare, every_row=True)
    all_rows = f"<details><summary>Every result at every rung</summary>{every}</details>" if every else ""
    settings = yaml.safe_dump(_plain(spec), sort_keys=False, allow_unicode=True) if spec else ""
    shown_spec = (
        f"<details><summary>The resolved sweep.yaml</summary><pre>{escape(settings)}</pre></details>" if spec else ""
    )
    parts = [
        best,
        figures,
        section("trials", "Trials", _with_note(sections.trial_table(rows, compare), _TRIALS_NOTE) + all_rows),
        section("baselines", "Baselines", _with_note(sections.baseline_table(rows, baselines), "On the same queries.")),
        section("data", "Data and protocol", sections.data_part(extra, _scored(spec))),
        section("failures", "Failures", sections.failures_part(rows, state)),
        section("definitions", "Definitions", sections.definitions_part()),
        section("provenance", "Provenance", sections.provenance_part(rows, extra) + shown_spec),
    ]
    standing = "finished" if state.finished else "unfinished"
    head = (
        f'<header><p class="eyebrow">bfm report: {standing} sweep</p><h1>{escape(name)}</h1>'
        f"{paragraph(sections.lede(rows, state, baselines, compare), 'lede')}"
        f"{sections.cards(rows, state, baselines, compare)}"
        f"<nav>{_links(parts)}</nav></header>"
    )
    foot = (
        "<footer>Every number of this page is in runs.parquet beside it, one line per ledger row; the figures are in "
        "figures/ as SVG.</footer>"
    )
    return page(f"{name}: compute frontier", "\n".join([head, *parts, foot]))


def shown_figure(figure: NamedFigure, drawn: str, name: str | None = None) -> str:
    """The figure's SVG file as a <figure> with its caption; `name` is its ids' own where a page shows several alike."""
    svg = inline_svg(drawn, name or figure.name, f"{figure.heading}. {figure.caption}")
    return f"<figure>{svg}<figcaption>{escape(figure.caption)}</figcaption></figure>"


def _laws_part(laws: Sequence[Fitted], figures: Sequence[NamedFigure], drawn: Mapping[str, str], recipe: str) -> str:
    shown = "".join(
        f"<h3>{escape(figure.heading)}</h3>{shown_figure(figure, drawn[figure.name])}" for figure in figures
    )
    predictions = f"<h3>Recipe: predicted and measured</h3>{recipe}" if recipe else ""
    return section("laws", "Scaling laws", opening(laws) + shown + law_parts(laws) + predictions)


def _scored(spec: Mapping[str, Any]) -> int | None:
    """How many validation queries the rows were scored on; None: all."""
    return (spec.get("data") or {}).get("evaluation_queries")


def _with_note(body: str, note: str) -> str:
    return paragraph(note, "muted") + body if body else ""


def _links(parts: Sequence[str]) -> str:
    names = {
        "best": "Best so far",
        "laws": "Scaling laws",
        "frontier": "Frontier",
        "isoflop": "Model size",
        "trials": "Trials",
        "baselines": "Baselines",
        "data": "Data",
        "failures": "Failures",
        "definitions": "Definitions",
        "provenance": "Provenance",
    }
    shown = "\n".join(parts)
    return "".join(f'<a href="#{name}">{text}</a>' for name, text in names.items() if f'<section id="{name}">' in shown)


def _plain(value: Any) -> Any:
    """Mappings and sequences of any kind as dicts and lists, which YAML prints without tags."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
