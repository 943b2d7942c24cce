"""The report of a sweep, written into its storage: index.html (one file that fetches nothing) and runs.parquet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from bfm.errors import CorruptError, UserError
from bfm.events.protocol import Protocol
from bfm.events.shards import Shards
from bfm.files import Store
from bfm.report import sections
from bfm.report.law_figures import law_figures
from bfm.report.law_sections import answer_table, law_parts, rows_note
from bfm.report.render import render
from bfm.report.runs_file import runs_parquet
from bfm.report.sweep_data import sweep_data
from bfm.report.sweep_view import SweepView
from bfm.report.tables import failures_text, frontier_text
from bfm.sweep.ledger.state import SweepState, spec_of
from bfm.sweep.recipe.verdicts import checks_lines


def publish_report(view: SweepView) -> list[str]:
    """Write report/ into the sweep's storage; returns the locations of its files, index.html first."""
    html = report_html(view, recipe=read_recipe(view.store), **_data(view.state))
    folder = view.store.child("report")
    # The page stands only where all that it names stands.
    folder.put("runs.parquet", runs_parquet(view.rows))
    folder.put("index.html", html.encode())
    return [f"{folder.uri}/{name}" for name in ("index.html", "runs.parquet")]


def report_html(
    view: SweepView,
    *,
    recipe: Mapping[str, Any] | None = None,
    manifest: Mapping[str, Any] | None = None,
    protocol: Mapping[str, Any] | None = None,
    provenance: Mapping[str, object] | None = None,
) -> str:
    """The page: first what the sweep answers, then the frontier, the laws, and all that they rest on.

    recipe: recipe.json; manifest, protocol: of the sweep's shards; provenance: what else is known of them, by name.
    """
    state, spec = view.state, view.state.spec or {}
    name = str(spec.get("name") or "sweep")
    return render(
        "sweep.html",
        f"{name}: compute frontier",
        law_figures(view.laws, view.floors),
        sweep_data(view),
        name=name,
        standing="finished" if state.finished else "unfinished",
        lede=sections.lede(view),
        answers=answer_table([("", view.laws)]),
        rows_note=rows_note(view.laws),
        cards=sections.cards(view),
        best=sections.best_table(view),
        laws=law_parts(view.laws),
        recipe=sections.recipe_table(recipe, state.checks),
        floors=sections.floor_table(view),
        spend=sections.spend_table(view),
        failures=[sections.failure_table(view), sections.refusal_table(state)],
        events=sections.event_facts(manifest) if manifest else [],
        protocol=sections.protocol_facts(protocol, (spec.get("data") or {}).get("evaluation_queries"))
        if protocol
        else [],
        provenance=sections.provenance_facts(view.rows, provenance or {}),
        settings=yaml.safe_dump(spec, sort_keys=False, allow_unicode=True) if spec else "",
    )


def report_text(view: SweepView, files: list[str]) -> str:
    """The frontier table and where the report lies."""
    shown = [frontier_text(view.results, view.floors, view.compare), failures_text(view.rows, view.state)]
    shown.append("\n".join(checks_lines(view.state.checks)))
    paths = f"report       {files[0]}\ntensorboard  tensorboard --logdir {view.store.uri}/tensorboard/_sweep"
    return "\n\n".join(part for part in [*shown, paths] if part)


def read_recipe(store: Store) -> dict[str, Any] | None:
    """report/recipe.json of a sweep or study, where it was written."""
    name = "report/recipe.json"
    return json.loads(store.get(name)) if store.exists(name) else None


def _data(state: SweepState) -> dict[str, Any]:
    """Manifest and protocol of the sweep's shards; a reason where they are out of reach."""
    try:
        shards = Shards.open(spec_of(state).data.shards)
        protocol = Protocol.load(shards)
        return {"manifest": shards.manifest.as_dict(), "protocol": {**protocol.info, "hash": protocol.hash}}
    except (UserError, CorruptError) as error:
        return {"provenance": {"shards": str(error)}}
