"""The written parts of fitted laws: fits (or the reasons why there are none) in, sentences and tables out.

Sentences come first, tables last. Beside our numbers stand the published ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bfm.laws.result import BudgetOptimum, Estimate, LawFit
from bfm.report.digits import estimate_text, power_text
from bfm.report.law_details import CRITICAL, agreements, asked_axes, axis_words, hardest_groups, ranked_metrics
from bfm.report.law_fits import Fitted, told
from bfm.report.law_published import SOURCE, TEXTS
from bfm.report.law_text import by_reason, differences_text, outliers_text, union
from bfm.report.law_words import rows_text, sentences
from bfm.report.render import Cell, Table
from bfm.units import format_count

_HEADINGS = {"joint": "Joint law", "batch": "Critical batch size", "agreement": "Agreement of loss and ranking"}
_MOST_NOTES = 6


@dataclass(frozen=True)
class Answer:
    """What the runs say of one question by some metrics."""

    question: str
    metrics: str
    text: str


@dataclass(frozen=True)
class LawPart:
    """A law in full: its tables, what differs between metrics, what to doubt, and why some metrics have no fit."""

    heading: str
    tables: Sequence[Table]
    remarks: Sequence[str]


def answers(laws: Sequence[Fitted]) -> list[Answer]:
    """One sentence per axis and metric, those of an axis together; metrics that say the same stand in one."""
    said = []
    for law, heading in _HEADINGS.items():
        by_question: dict[str, dict[str, list[str]]] = {}
        for metric, fit in _fits(laws, law).items():
            for question, text in sentences(fit):
                by_question.setdefault(question, {}).setdefault(text, []).append(metric)
        said += [
            Answer(question, ", ".join(metrics), text)
            for question, by_text in by_question.items()
            for text, metrics in by_text.items()
        ]
        said += [Answer(heading, names, f"not fitted: {why}.") for why, names in _refused(laws, law).items()]
    return said


def answer_table(chapters: Sequence[tuple[str, Sequence[Fitted]]]) -> Table:
    """One line per chapter, question and metric: what a recipe takes from it, or why it says nothing.

    The chapters of a study are told apart by their names; a sweep alone has none.
    """
    heads, lines = ["question", "by", "answer"], []
    named = any(name for name, _ in chapters)
    for name, laws in chapters:
        for answer in answers(laws):
            about = [Cell(answer.question, kind="text"), Cell(answer.metrics, kind="text")]
            lines.append([*([Cell(name)] if named else []), *about, Cell(answer.text, kind="wrap")])
    return Table("What the runs say, by axis and metric", ["sweeps of", *heads] if named else heads, lines)


def rows_note(laws: Sequence[Fitted]) -> str:
    """How the rows came to be, and which noise was found in them."""
    return next((rows_text(found.fit) for found in laws if found.fit is not None), "")


def law_parts(laws: Sequence[Fitted]) -> list[LawPart]:
    """Every law that was asked for."""
    tables = {"joint": _joint_tables, "batch": _batch_tables, "agreement": _agreement_tables}
    parts = []
    for law, heading in _HEADINGS.items():
        fits, refused = _fits(laws, law), _refused(laws, law)
        remarks = [differences_text(fits), *_notes(fits)] if fits else []
        remarks += [f"Not fitted for {metrics}: {reason}." for reason, metrics in refused.items()]
        if fits or refused:
            parts.append(LawPart(heading, tables[law](fits) if fits else [], [*filter(None, remarks)]))
    return parts


def _joint_tables(fits: Mapping[str, LawFit]) -> list[Table]:
    """A table per axis, exponents and optima; then what else was fitted. A column per metric, one of published."""
    tables, shown = [], set()
    for name in dict.fromkeys(axis.name for fit in fits.values() for axis in asked_axes(fit)):
        words, sizes = axis_words(name), name == "params"
        exponents = [words.exponent, "D_exponent"] if sizes else [words.exponent]
        lines = [_parameter_line(fits, exponent) for exponent in exponents]
        lines += _optimum_lines(fits, words.optimum, words.text)
        lines += _optimum_lines(fits, "D/N", "{:.3g}".format) if sizes else []
        tables.append(Table(words.heading, ["", *fits, SOURCE], lines))
        shown |= set(exponents)
    # Coefficients are optima at C = 1, which no one trains at.
    names = union(fit.parameters for fit in fits.values())
    rest = [name for name in names if name not in shown and not name.endswith("coefficient")]
    lines = [*(_parameter_line(fits, name) for name in rest), ["runs", *(str(fit.runs) for fit in fits.values()), ""]]
    return [*tables, Table("Parameters", ["", *fits, SOURCE], lines)]


def _parameter_line(fits: Mapping[str, LawFit], name: str) -> list[Cell | str]:
    published = _published(next(iter(fits.values())).law, name)
    return [name.replace("_", " "), *[_cell(fit.parameters.get(name)) for fit in fits.values()], published]


def _optimum_lines(fits: Mapping[str, LawFit], name: str, text: Callable[[float], str]) -> list[list[Cell | str]]:
    """An optimum at each budget, and why there is none."""
    lines: list[list[Cell | str]] = []
    budgets = [{budget.flops: budget for budget in fit.budgets} for fit in fits.values()]
    for flops in sorted(union(budgets)):
        found = [of_fit.get(flops) for of_fit in budgets]
        reasons = [one.reason if one and name == "N_opt" else "" for one in found]
        values = [_optima(one).get(name) if one else None for one in found]
        cells = [_cell(value, text, reason) for value, reason in zip(values, reasons, strict=True)]
        known = "" if lines else _published("joint", name)
        lines.append([f"{name.replace('_opt', '*')} at C = {power_text(flops)}", *cells, known])
    return lines


def _optima(budget: BudgetOptimum) -> dict[str, Estimate]:
    """The optima of a budget, D/N among them: at one C the largest D goes with the smallest N."""
    if "N_opt" not in budget.optima:
        return dict(budget.optima)
    size, data = budget.optima["N_opt"], budget.optima["D_opt"]
    ends = data.low / size.high, data.high / size.low if size.low > 0 else math.inf
    return {**budget.optima, "D/N": Estimate(data.estimate / size.estimate, *ends)}


def _batch_tables(fits: Mapping[str, LawFit]) -> list[Table]:
    """Critical batches of each size by both definitions, and their exponents in N."""
    lines: list[list[Cell | str]] = []
    for one in CRITICAL:
        by_size = [{group.get("params"): one.of(fit, group) for group in hardest_groups(fit)} for fit in fits.values()]
        for place, size in enumerate(union(by_size)):
            named = "" if size is None else f" at N = {format_count(size)}"
            cells = [_cell(values.get(size), format_count) for values in by_size]
            lines.append([f"B, {one.words}{named}", *cells, "" if place else _published("batch", one.name)])
    lines += [_parameter_line(fits, one.exponent) for one in CRITICAL]
    lines.append(["runs", *(str(fit.runs) for fit in fits.values()), ""])
    note = "B in events (target positions) per step; a sequence of the paper holds 256. Its definition is not ours."
    return [Table("Critical batch", ["", *fits, SOURCE], lines, note)]


def _agreement_tables(fits: Mapping[str, LawFit]) -> list[Table]:
    """Spearman of the loss with each ranking metric at each C, and the change per factor 10 in C."""
    (fit,) = fits.values()
    metrics = ranked_metrics(fit)
    by_metric = [dict(agreements(fit, metric)) for metric in metrics]
    lines: list[list[Cell | str]] = []
    for flops in sorted({flops for found in by_metric for flops in found}):
        cells = [_cell(found.get(flops), "{:+.2f}".format) for found in by_metric]
        lines.append([f"Spearman at C = {power_text(flops)}", *cells])
    trends = [_cell(fit.parameters[f"trend[{metric}]"], "{:+.2f}".format) for metric in metrics]
    lines.append(["change of Fisher's z per factor 10 in C", *trends])
    lines.append([SOURCE, *[_published("agreement", metric) for metric in metrics]])
    heads = ["", *[f"{fit.metric} with {metric}" for metric in metrics]]
    return [Table("Spearman correlation of the loss with ranking metrics", heads, lines)]


def _cell(value: Estimate | None, text: Callable[[float], str] = "{:.3g}".format, remark: str = "") -> Cell:
    return Cell("-" if value is None else estimate_text(value, text), remark)


def _notes(fits: Mapping[str, LawFit]) -> list[str]:
    """What to doubt, each doubt once."""
    doubts = {metric: [*fit.warnings, outliers_text(fit)] for metric, fit in fits.items()}
    said = by_reason((metric, doubt) for metric, found in doubts.items() for doubt in found if doubt)
    shown = [f"{metrics}: {text}" for text, metrics in said.items()]
    if more := shown[_MOST_NOTES:]:
        shown[_MOST_NOTES:] = [f"and {len(more)} more; bfm fit tells all"]
    return shown


def _fits(laws: Sequence[Fitted], law: str) -> dict[str, LawFit]:
    return {fit.metric: fit for _, fit in told(laws, law)}


def _refused(laws: Sequence[Fitted], law: str) -> dict[str, str]:
    return by_reason((one.metric, one.refused) for one in laws if one.law == law and one.fit is None)


def _published(law: str, name: str) -> Cell:
    return Cell(TEXTS.get((law, name), ""), kind="text")
