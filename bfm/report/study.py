"""The page of a study, which shows the laws of its sweeps side by side, and its rows for a fit.

Enters: the folder or URI of a study (bfm.sweep.study) or of one sweep. Leaves: rows for a fit, and
<study>/report/index.html beside the sweeps' own reports.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bfm.errors import UserError
from bfm.files import Store
from bfm.laws.fitting import AXIS_OF_LAW
from bfm.laws.frontier import Row, metric_names, rung_rows
from bfm.report.law_figures import law_figures
from bfm.report.law_fits import Fitted, sweep_laws
from bfm.report.law_sections import headline_table, law_parts, recipe_part
from bfm.report.page import shown_figure
from bfm.report.style import svg_text
from bfm.report.sweep_report import publish_report, read_recipe
from bfm.report.sweep_view import SweepView, read_sweep
from bfm.report.template import escape, page, paragraph, section
from bfm.sweep.ledger import has_begun
from bfm.sweep.study import by_axis, is_study, joined, study_folders


@dataclass(frozen=True)
class Member:
    """One sweep of a study."""

    folder: str
    """Relative to the study."""
    view: SweepView | None
    """None: not begun."""

    @property
    def axis(self) -> str | None:
        """What the sweep measures."""
        return self.view.axis if self.view else None


def _begun(members: Iterable[Member]) -> list[tuple[str, SweepView]]:
    """(folder, view) of those that have begun."""
    return [(member.folder, member.view) for member in members if member.view is not None]


def _rows(members: Iterable[Member]) -> list[Row]:
    return joined([(folder, view.rows) for folder, view in _begun(members)])


def read_study(location: str) -> list[Member]:
    """The sweeps of a study in its order. Raises UserError for a study.yaml that names none."""
    store = Store(location)
    return [Member(folder, _read_begun(store.child(folder))) for folder in study_folders(store, location)]


def law_rows(location: str, law: str) -> tuple[list[Row], list[str]]:
    """Rows to fit a law on, and their headline metrics, losses first: of a sweep, or of a study's sweeps of its axis.

    Sweeps without an axis serve every law. Raises UserError where no sweep of a study can.
    """
    if not is_study(location):
        rows: list[Row] = list(read_sweep(location).rows)
        return rows, metric_names(rows)
    needed = AXIS_OF_LAW[law]
    members = read_study(location)
    fitting = [member for member in members if needed is None or member.axis in (needed, None)]
    if not _begun(fitting):
        begun = ", ".join(f"{member.folder} ({member.axis or 'no axis'})" for member in members if member.view)
        raise UserError(
            f"no sweep of the study measures {needed or 'anything yet'}; begun: {begun or 'none'}",
            file=location,
            fix=f"run one with axis: {needed}" if needed else "run its sweeps",
        )
    rows = _rows(fitting)
    return rows, metric_names(rows)


@dataclass(frozen=True)
class Chapter:
    """The sweeps of one axis, whose rows are fitted together; one sweep where it names no axis."""

    title: str
    members: tuple[Member, ...]

    @cached_property
    def laws(self) -> list[Fitted]:
        """The laws of the axis; none where no sweep has begun."""
        begun = _begun(self.members)
        if len(begun) < 2:
            return begun[0][1].laws if begun else []
        return sweep_laws(_rows(self.members), self.members[0].axis)


def chapters(members: Sequence[Member]) -> list[Chapter]:
    """In the order in which their first sweep stands."""
    return [Chapter(title.replace("_", " "), tuple(group)) for title, group in by_axis(members).items()]


def publish_study(location: str, *, overview: bool = False) -> list[str]:
    """Write the reports of a study's sweeps and its own page; returns the locations of files, its page first."""
    members = read_study(location)
    files = [file for _, view in _begun(members) for file in publish_report(view, overview=overview)]
    folder = Store(location).child("report")
    drawn: dict[str, bytes] = {}
    html = study_html(location.rstrip("/").rsplit("/", 1)[-1], members, drawn, read_recipe(Store(location)))
    for name, data in [*drawn.items(), ("index.html", html.encode())]:
        folder.put(name, data)
    return [f"{folder.uri}/index.html", *[f"{folder.uri}/{name}" for name in drawn], *files]


def study_html(
    name: str, members: list[Member], drawn: dict[str, bytes], recipe: Mapping[str, Any] | None = None
) -> str:
    """The study's page; its figures' SVG files are added to `drawn`."""
    views = [view for _, view in _begun(members)]
    checks = [check for view in views for check in view.state.checks]
    told = chapters(members)
    parts = [
        section("summary", "All laws", headline_table([(chapter.title, chapter.laws) for chapter in told])),
        section("recipe", "Recipe: predicted and measured", recipe_part(recipe, checks)),
    ]
    for place, chapter in enumerate(told):
        parts.append(section(f"chapter-{place}", chapter.title.capitalize(), _chapter_part(chapter, place, drawn)))
    results = sum(len(rung_rows(view.rows)) for view in views)
    lede = f"{len(views)} of {len(members)} sweeps begun, {results} results. Sweeps of one axis are fitted together."
    links = "".join(f'<a href="#chapter-{place}">{escape(chapter.title)}</a>' for place, chapter in enumerate(told))
    head = (
        f'<header><p class="eyebrow">bfm report: study</p><h1>{escape(name)}</h1>{paragraph(lede, "lede")}'
        f'<nav><a href="#summary">All laws</a>{links}</nav></header>'
    )
    foot = "<footer>Intervals are 95 %. The rows behind each law are in its sweeps' report/runs.parquet.</footer>"
    return page(f"{name}: scaling laws", "\n".join([head, *parts, foot]))


def _chapter_part(chapter: Chapter, place: int, drawn: dict[str, bytes]) -> str:
    parts = [_about(member) for member in chapter.members]
    for figure in law_figures(chapter.laws):
        unique = f"{place}-{figure.name}"
        text = svg_text(figure.figure)
        drawn[f"figures/{unique}.svg"] = text.encode()
        parts.append(shown_figure(figure, text, f"chapter-{unique}"))
    return "".join([*parts, law_parts(chapter.laws)])


def _about(member: Member) -> str:
    """One line with a link to the sweep's own report."""
    if member.view is None:
        return paragraph(f"{member.folder}: not begun.", "muted")
    trials = len({str(row["trial"]) for row in member.view.rows})
    state = "finished" if member.view.state.finished else "unfinished"
    link = f'<a href="../{escape(member.folder)}/report/index.html">{escape(member.folder)}</a>'
    return f"<p>{link}: axis {escape(member.axis or 'none')}, {trials} trials, {state}.</p>"


def _read_begun(store: Store) -> SweepView | None:
    return read_sweep(store.uri) if has_begun(store) else None
