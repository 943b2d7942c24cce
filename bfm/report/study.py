"""The page of a study, which shows the laws of its sweeps side by side, and its rows for a fit.

Enters: the folder or URI of a study (bfm.sweep.ledger.study) or of one sweep. Leaves: rows for a fit, and
<study>/report/index.html beside the sweeps' own reports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from bfm.errors import UserError
from bfm.files import Store
from bfm.laws.fitting import LAWS
from bfm.laws.frontier import Row, metric_names
from bfm.report.floors import Baselines
from bfm.report.law_figures import law_figures
from bfm.report.law_fits import Fitted, sweep_laws
from bfm.report.law_sections import answer_table, law_parts, rows_note
from bfm.report.render import render
from bfm.report.sections import recipe_table
from bfm.report.sweep_report import publish_report, read_recipe
from bfm.report.sweep_view import SweepView
from bfm.sweep.ledger.study import by_axis, joined, read_sweeps


def read_study(location: str) -> list[SweepView]:
    """The sweeps of a study in its order, begun or not. Raises as `read_sweeps`."""
    return [SweepView(sweep.store, sweep.state, sweep.folder) for sweep in read_sweeps(location)]


def law_rows(location: str, law: str) -> tuple[Sequence[Row], list[str]]:
    """Rows to fit a law on, and their headline metrics, losses first: of a sweep, or of a study's sweeps of its axis.

    Sweeps without an axis serve every law. Raises UserError where no sweep of a study can.
    """
    needed = LAWS[law].axis
    begun = [sweep for sweep in read_sweeps(location) if sweep.has_begun]
    fitting = [sweep for sweep in begun if not sweep.folder or needed is None or sweep.axis in (needed, None)]
    if not fitting:
        measured = ", ".join(f"{sweep.folder} ({sweep.axis or 'no axis'})" for sweep in begun)
        raise UserError(
            f"no sweep of the study measures {needed or 'anything yet'}; begun: {measured or 'none'}",
            file=location,
            fix=f"run one with axis: {needed}" if needed else "run its sweeps",
        )
    rows = joined(fitting)
    return rows, metric_names(rows)


@dataclass(frozen=True)
class Chapter:
    """The sweeps of one axis, whose rows are fitted together; one sweep where it names no axis."""

    title: str
    sweeps: tuple[SweepView, ...]

    @cached_property
    def laws(self) -> list[Fitted]:
        """The laws of the axis; none where no sweep has begun."""
        begun = [sweep for sweep in self.sweeps if sweep.has_begun]
        if len(begun) < 2:
            return [law for sweep in begun for law in sweep.laws]
        return sweep_laws(joined(begun), begun[0].axis)

    @property
    def floors(self) -> Baselines:
        """Of its first sweep that has them: rows that are fitted together answer the same queries."""
        return next((sweep.floors for sweep in self.sweeps if sweep.has_begun and sweep.floors), {})


def chapters(sweeps: Sequence[SweepView]) -> list[Chapter]:
    """In the order in which their first sweep stands."""
    return [Chapter((group[0].axis or group[0].folder).replace("_", " "), tuple(group)) for group in by_axis(sweeps)]


def publish_study(location: str) -> list[str]:
    """Write the reports of a study's sweeps and its own page; returns the locations of files, its page first."""
    sweeps, store = read_study(location), Store(location)
    files = [file for sweep in sweeps if sweep.has_begun for file in publish_report(sweep)]
    folder = store.child("report")
    folder.put("index.html", _study_html(store.uri.rsplit("/", 1)[-1], sweeps, read_recipe(store)).encode())
    return [f"{folder.uri}/index.html", *files]


def _study_html(name: str, sweeps: Sequence[SweepView], recipe: Mapping[str, Any] | None) -> str:
    """The study's page: every answer in one table, then a chapter per axis."""
    checks = [check for sweep in sweeps for check in sweep.state.checks]
    begun, results = sum(sweep.has_begun for sweep in sweeps), sum(len(sweep.state.arrivals) for sweep in sweeps)
    told, figures, parts = chapters(sweeps), [], []
    for place, chapter in enumerate(told):
        laws = chapter.laws
        drawn = [replace(one, name=f"chapter-{place}-{one.name}") for one in law_figures(laws, chapter.floors)]
        figures += drawn
        parts.append({"chapter": chapter, "figures": drawn, "laws": law_parts(laws), "rows_note": rows_note(laws)})
    return render(
        "study.html",
        f"{name}: scaling laws",
        figures,
        None,
        name=name,
        lede=f"{begun} of {len(sweeps)} sweeps begun, {results} results. Sweeps of one axis are fitted together.",
        answers=answer_table([(chapter.title, chapter.laws) for chapter in told]),
        recipe=recipe_table(recipe, checks),
        chapters=parts,
    )
