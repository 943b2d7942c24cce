"""A sweep seen from outside: its ledger read without a lease, for `bfm status` and `bfm report`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bfm.errors import CorruptError, UserError
from bfm.events.protocol import Protocol
from bfm.events.shards import Shards
from bfm.files import Store
from bfm.laws.frontier import FrontierPoint, Gap, frontier, metric_names
from bfm.ranking.paired import Pairing
from bfm.report.floors import Baselines, read_floor_scores, read_floors
from bfm.report.law_fits import Fitted, sweep_laws
from bfm.report.page import render_report
from bfm.report.summary import sweep_rows, sweep_summary
from bfm.report.tables import failures_text, frontier_text, spend_text, trials_text
from bfm.sweep.ledger import read_state
from bfm.sweep.recipe.verdicts import checks_lines
from bfm.sweep.spec import from_dict
from bfm.sweep.status import life_text, summarise


@dataclass(frozen=True)
class SweepView:
    """What a sweep's ledger says."""

    store: Store
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    """What the report shows beside the rows."""
    status: dict[str, Any]
    """What `bfm status --json` prints."""
    spec: dict[str, Any]

    def frontiers(self) -> dict[str, list[dict[str, Any]]]:
        """Per metric, the best value reachable at each rung, who reached it, the change, and who is within error."""
        return {
            metric: [_point_dict(point) for point in frontier(self.rows, metric, self.compare)]
            for metric in metric_names(self.rows)
        }

    @cached_property
    def compare(self) -> Pairing:
        """Differences of the rows, and from the floors, by their scores of the same queries."""
        return Pairing(self.store, read_floor_scores(self.store))

    @cached_property
    def data(self) -> dict[str, Any]:
        """Manifest and protocol of the sweep's shards; a reason where they are out of reach."""
        try:
            shards = Shards.open(from_dict(self.spec).shards)
            protocol = Protocol.load(shards)
            return {"manifest": shards.manifest.as_dict(), "protocol": {**protocol.info, "hash": protocol.hash}}
        except (UserError, CorruptError) as error:
            return {"provenance": {"shards": str(error)}}

    @cached_property
    def floors(self) -> Baselines:
        """What counting reaches on the same queries, by floor; none where the sweep has not run yet."""
        return read_floors(self.store)

    @cached_property
    def laws(self) -> list[Fitted]:
        """The laws of the sweep's axis, fitted on its rows."""
        return sweep_laws(self.rows, self.spec.get("axis"))


def read_sweep(sweep_dir: str) -> SweepView:
    """Read a sweep's ledger. Raises UserError where there is none, CorruptError where a segment is damaged."""
    store = Store(sweep_dir)
    state = read_state(store)
    if state.spec is None:
        raise UserError("there is no sweep here", file=sweep_dir, fix="name the folder <storage>/<name> of a sweep")
    return SweepView(store, sweep_rows(state), sweep_summary(state), summarise(state), state.spec)


def read_recipe(store: Store) -> dict[str, Any] | None:
    """report/recipe.json of a sweep or study, where it was written."""
    name = "report/recipe.json"
    return json.loads(store.get(name)) if store.exists(name) else None


def status_text(view: SweepView) -> str:
    """For a terminal: the frontier so far, spend against the cap, the best trials, failures, the last decisions."""
    parts = [frontier_text(view.rows, view.floors, view.compare), spend_text(view.rows, view.summary)]
    parts += [trials_text(view.rows, view.compare), failures_text(view.rows, view.summary), life_text(view.status)]
    return "\n\n".join(part for part in parts if part)


def publish_report(view: SweepView, *, overview: bool = False) -> list[str]:
    """Write report/ into the sweep's storage; returns the locations of its files, index.html first."""
    shown = {**view.data, "recipe": read_recipe(view.store), "checks": view.status["checks"]}
    files = render_report(
        view.rows,
        view.summary,
        view.floors,
        view.spec,
        shown,
        laws=view.laws,
        compare=view.compare,
        overview=overview,
    )
    folder = view.store.child("report")
    # index.html is last in `files`: it stands only where all that it names stands.
    for name, data in files.items():
        folder.put(name, data)
    return [f"{folder.uri}/{name}" for name in reversed(files)]


def report_text(view: SweepView, files: list[str]) -> str:
    """The frontier table and where the report lies."""
    shown = [frontier_text(view.rows, view.floors, view.compare), failures_text(view.rows, view.summary)]
    shown.append("\n".join(checks_lines(view.status["checks"])))
    paths = f"report       {files[0]}\ntensorboard  tensorboard --logdir {view.store.uri}/tensorboard"
    return "\n\n".join(part for part in [*shown, paths] if part)


def _point_dict(point: FrontierPoint) -> dict[str, Any]:
    return {
        "flops": point.flops,
        "value": point.value,
        "error": _known(point.error),
        "trial": point.row["trial"],
        "params": point.row["params"],
        "change": None if point.change is None else _gap_dict(point.change),
        "within_error": {str(row["trial"]): _gap_dict(gap) for row, gap in point.rivals},
    }


def _gap_dict(gap: Gap) -> dict[str, Any]:
    return {"value": gap.value, "error": _known(gap.error), "paired": gap.paired}


def _known(value: float) -> float | None:
    """JSON has no word for NaN."""
    return value if math.isfinite(value) else None
