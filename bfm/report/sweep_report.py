"""The report of a sweep, written into its storage: `bfm report`."""

from __future__ import annotations

import json
from typing import Any

from bfm.errors import CorruptError, UserError
from bfm.events.protocol import Protocol
from bfm.events.shards import Shards
from bfm.files import Store
from bfm.report.page import render_report
from bfm.report.sweep_view import SweepView
from bfm.report.tables import failures_text, frontier_text
from bfm.sweep.recipe.verdicts import checks_lines
from bfm.sweep.state import SweepState
from bfm.sweep.status import spec_of


def publish_report(view: SweepView) -> list[str]:
    """Write report/ into the sweep's storage; returns the locations of its files, index.html first."""
    shown = {**_data(view.state), "recipe": read_recipe(view.store)}
    files = render_report(view.rows, view.state, view.floors, shown, laws=view.laws, compare=view.compare)
    folder = view.store.child("report")
    for name, data in files.items():
        folder.put(name, data)
    return [f"{folder.uri}/{name}" for name in reversed(files)]


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
