"""The report of a sweep: ledger rows in; index.html (one file that fetches nothing) and runs.parquet out."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from bfm.laws.frontier import Compare, Results, Row, no_answers
from bfm.report import sections
from bfm.report.floors import Baselines
from bfm.report.law_figures import law_figures
from bfm.report.law_fits import Fitted
from bfm.report.law_sections import Answer, answers, law_parts, rows_note
from bfm.report.recipe_section import recipe_table
from bfm.report.render import render
from bfm.report.runs_file import runs_parquet
from bfm.report.sweep_data import columns_of, sweep_data
from bfm.sweep.state import SweepState


def render_report(
    rows: Sequence[Row],
    state: SweepState,
    baselines: Baselines,
    extra: Mapping[str, Any],
    *,
    laws: Sequence[Fitted] = (),
    compare: Compare = no_answers,
) -> dict[str, bytes]:
    """The files of the report by name, index.html last: it stands only where all that it names stands.

    extra: manifest, protocol, provenance {name: value}, recipe (recipe.json), each of which may be missing;
    laws: what `law_fits.sweep_laws` tells from the rows; compare: what differences of rows are told by.
    """
    html = report_html(rows, state, baselines, extra, laws, compare)
    return {"runs.parquet": runs_parquet(rows), "index.html": html.encode()}


def report_html(
    rows: Sequence[Row],
    state: SweepState,
    baselines: Baselines,
    extra: Mapping[str, Any],
    laws: Sequence[Fitted],
    compare: Compare,
) -> str:
    """The page as text: first what the sweep answers, then the frontier, the laws, and all that they rest on."""
    results, spec = Results(rows), state.spec or {}
    columns = columns_of(results, compare)
    sweep = sweep_data(results, columns, baselines, compare)
    name = str(spec.get("name") or "sweep")
    manifest, protocol = extra.get("manifest"), extra.get("protocol")
    return render(
        "sweep.html",
        f"{name}: compute frontier",
        law_figures(laws, baselines),
        sweep,
        name=name,
        standing="finished" if state.finished else "unfinished",
        lede=sections.lede(rows, state, baselines, compare),
        answers=_by_question(answers(laws)),
        rows_note=rows_note(laws),
        cards=sections.cards(rows, state, baselines, compare),
        best=sections.best_table(results, baselines, compare),
        laws=law_parts(laws),
        recipe=recipe_table(extra.get("recipe"), state.checks),
        baselines=sections.baseline_table(rows, baselines),
        spend=sections.spend_table(rows, state),
        failures=[sections.failure_table(rows, state), sections.refusal_table(state)],
        events=sections.event_facts(manifest) if manifest else [],
        protocol=sections.protocol_facts(protocol, _scored(spec)) if protocol else [],
        definitions=sections.DEFINITIONS,
        provenance=sections.provenance_facts(rows, extra),
        settings=yaml.safe_dump(_plain(spec), sort_keys=False, allow_unicode=True) if spec else "",
    )


def _by_question(said: Sequence[Answer]) -> list[tuple[str, list[Answer]]]:
    return [(question, list(of)) for question, of in itertools.groupby(said, lambda answer: answer.question)]


def _scored(spec: Mapping[str, Any]) -> int | None:
    """How many validation queries the rows were scored on; None: all."""
    return (spec.get("data") or {}).get("evaluation_queries")


def _plain(value: Any) -> Any:
    """Mappings and sequences of any kind as dicts and lists, which YAML prints without tags."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
