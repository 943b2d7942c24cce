"""The written parts of fitted laws: fits (or the reasons why there are none) in, pieces of HTML out.

Beside our numbers stand those of arXiv 2606.05257 (retail events, 600 runs, C from 1e15 to 1e19; read off its text, so
a digit is approximate). It gives no intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bfm.laws.compare import differences
from bfm.laws.result import BudgetOptimum, Estimate, LawFit
from bfm.report.digits import estimate_text, value_text
from bfm.report.law_curves import agreements, hardest_groups, ranked_metrics
from bfm.report.law_fits import Fitted
from bfm.report.law_text import union
from bfm.report.style import power_text
from bfm.report.template import Cell, escape, paragraph, table
from bfm.sweep.recipe.verdicts import calibration_text
from bfm.units import format_count

HEADINGS = {
    "isoflop": "Model size or data (iso-FLOP)",
    "surface": "Surface L(N, D)",
    "hull": "Model size or data (envelope of the training curves)",
    "share": "Embedder share",
    "batch": "Critical batch size",
    "negatives": "Sampled negatives",
    "agreement": "Agreement of loss and ranking",
}
_PUBLISHED = {
    ("isoflop", "N_exponent"): ".617 by loss, .57-.66 over metrics",
    ("isoflop", "D_exponent"): ".383",
    ("isoflop", "D/N"): "344 at 10\u00b9\u2075 to 36 at 10\u00b9\u2079",
    ("surface", "a"): ".617 (iso-FLOP)",
    ("surface", "b"): ".383 (iso-FLOP)",
    ("hull", "N_exponent"): ".617 (iso-FLOP)",
    ("hull", "D_exponent"): ".383 (iso-FLOP)",
    ("share", "share_exponent"): "about 0: nearly constant in C",
    ("share", "s_opt"): "1.1 % to 3.7 %, about 2 %",
    ("negatives", "K_exponent"): "above 0",
    ("negatives", "beta"): "about 1.2 by loss, .4-.56 by ranking metrics",
    ("negatives", "K_opt"): "at 10\u00b9\u2077: 1M by loss, 65k by recall@10",
    ("batch", "overhead20"): "about 570 sequences by loss and recall@10, 200-275 by NDCG@10 and MRR@10",
    ("agreement", "recall@10"): "+.93 at 10\u00b9\u2075 to -1.00 at 10\u00b9\u2078",
}
_CRITICAL = {"overhead20": "20 % more events", "gain_halving": "twice the least events"}
_ENDS = ("low", "high")
_SHARE = ("s_opt",)
_COUNTS = ("N_opt", "D_opt", "K_opt", "B_opt", "CBS")
_MOST_NOTES = 6


def law_parts(laws: Sequence[Fitted]) -> str:
    """Every law with its table, what differs between metrics, warnings, and the reasons of what could not be fitted."""
    return "".join(_law_part(law, [found for found in laws if found.law == law]) for law in HEADINGS)


def headline_table(axes: Sequence[tuple[str, Sequence[Fitted]]]) -> str:
    """One line per law and metric over all axes: what a recipe takes from it, or why it says nothing."""
    lines: list[list[Cell | str]] = []
    for name, laws in axes:
        refused: dict[tuple[str, str], list[str]] = {}
        for found in laws:
            if found.fit is None:
                refused.setdefault((found.law, found.refused), []).append(found.metric)
                continue
            said = Cell("; ".join(_headlines(found.law, found.fit)), kind="wrap")
            lines.append([name, Cell(HEADINGS[found.law], kind="text"), found.metric, said, str(found.fit.runs)])
        for (law, reason), metrics in refused.items():
            said = Cell(f"not fitted: {reason}", kind="wrap")
            lines.append([name, Cell(HEADINGS[law], kind="text"), ", ".join(metrics), said, "-"])
    note = "Estimate [95 % interval]; optima at the largest C that has one, critical batches at the largest N."
    return table(["axis", "law", "metric", "what it says", "runs"], lines) + (paragraph(note, "muted") if lines else "")


def recipe_part(recipe: Mapping[str, Any] | None, checks: Sequence[Mapping[str, Any]]) -> str:
    """Every prediction that was trained (ledger records), and that of recipe.json: predicted, measured, inside."""
    shown = list(checks)
    if recipe and not any(_same(recipe, check) for check in checks):
        shown.append(recipe.get("check") or recipe)
    lines: list[list[Cell | str]] = []
    for one in shown:
        measured, error = one.get("measured"), one.get("error")
        verdict = Cell("not trained")
        if measured is not None:
            verdict = Cell("inside") if one["inside"] else Cell("outside", kind="bad")
        ends = ["open" if one["predicted"].get(end) is None else f"{one['predicted'][end]:.4g}" for end in _ENDS]
        lines.append(
            [
                Cell(power_text(float(one["flops"]))),
                Cell(str(one["metric"])),
                Cell(f"{one['predicted']['estimate']:.4g}"),
                Cell(f"[{ends[0]}, {ends[1]}]"),
                Cell("-" if measured is None else value_text(measured, math.nan if error is None else error)),
                verdict,
            ]
        )
    held = paragraph(f"{calibration_text(checks)}.", "muted") if checks else ""
    return table(["C", "metric", "predicted", "95 % interval", "measured", ""], lines) + held


def _law_part(law: str, found: Sequence[Fitted]) -> str:
    if not found:
        return ""
    fits = {one.metric: one.fit for one in found if one.fit is not None}
    parts = [f"<h3>{escape(HEADINGS[law])}</h3>"]
    if fits:
        tables = {"batch": _batch_table, "agreement": _agreement_table}
        parts += [tables[law](fits) if law in tables else _law_table(law, fits), _differing(fits), _warnings(fits)]
    reasons: dict[str, list[str]] = {}
    for one in found:
        if one.fit is None:
            reasons.setdefault(one.refused, []).append(one.metric)
    for reason, metrics in reasons.items():
        parts.append(paragraph(f"Not fitted for {', '.join(metrics)}: {reason}.", "muted"))
    return "".join(parts)


def _law_table(law: str, fits: Mapping[str, LawFit]) -> str:
    """Parameters, then the optima of each budget; a column per metric and one of published values."""
    lines: list[list[Cell | str]] = []
    for name in union([fit.parameters for fit in fits.values()]):
        cells = [Cell(estimate_text(fit.parameters[name]) if name in fit.parameters else "-") for fit in fits.values()]
        lines.append([Cell(_words(law, name)), *cells, _published(law, name)])
    flops = sorted({budget.flops for fit in fits.values() for budget in fit.budgets})
    names = union([_optima(budget) for fit in fits.values() for budget in fit.budgets])
    for name in names:
        for place, at in enumerate(flops):
            cells = [_optimum_cell(fit, at, name) for fit in fits.values()]
            known = _published(law, name) if place == 0 else Cell("")
            lines.append([Cell(f"{_symbol(name)} at C = {power_text(at)}"), *cells, known])
    lines.append([Cell("runs"), *[Cell(str(fit.runs)) for fit in fits.values()], Cell("")])
    return table(["", *fits, "arXiv 2606.05257"], lines)


def _optimum_cell(fit: LawFit, flops: float, name: str) -> Cell:
    budget = next((budget for budget in fit.budgets if math.isclose(budget.flops, flops, rel_tol=1e-9)), None)
    if budget is None:
        return Cell("-")
    value = _optima(budget).get(name)
    if value is None:
        return Cell("-", budget.reason)
    return Cell(estimate_text(value, _text_of(name)), budget.reason if not budget.bracketed else "")


def _optima(budget: BudgetOptimum) -> dict[str, Estimate]:
    """The optima of a budget, D/N among them: at one C the largest D goes with the smallest N."""
    optima = dict(budget.optima)
    if "N_opt" in optima and "D_opt" in optima:
        size, data = optima["N_opt"], optima["D_opt"]
        low = data.low / size.high if math.isfinite(size.high) else 0.0
        high = data.high / size.low if size.low > 0 else math.inf
        optima["D/N"] = Estimate(data.estimate / size.estimate, low, high)
    return optima


def _batch_table(fits: Mapping[str, LawFit]) -> str:
    """Critical batches of each size by both definitions, and their exponents in N."""
    lines: list[list[Cell | str]] = []
    for key, words in _CRITICAL.items():
        by_metric = [
            {group.get("params"): fit.parameters[f"{key}[{group['group']}]"] for group in hardest_groups(fit)}
            for fit in fits.values()
        ]
        sizes = dict.fromkeys(size for values in by_metric for size in values)
        for place, size in enumerate(sizes):
            cells = [_batch_cell(values.get(size)) for values in by_metric]
            named = "" if size is None else f" at N = {format_count(size)}"
            lines.append([Cell(f"B, {words}{named}"), *cells, _published("batch", key) if place == 0 else ""])
    for name in ("cbs_exponent", "gain_halving_exponent"):
        cells = [Cell(estimate_text(fit.parameters[name])) for fit in fits.values()]
        lines.append([Cell(f"{name.replace('_', ' ')} in N"), *cells, ""])
    lines.append([Cell("runs"), *[Cell(str(fit.runs)) for fit in fits.values()], ""])
    note = "B in events (target positions) per step; a sequence of the paper holds 256. Its definition is not ours."
    return table(["", *fits, "arXiv 2606.05257"], lines) + paragraph(note, "muted")


def _agreement_table(fits: Mapping[str, LawFit]) -> str:
    """Spearman of the loss with each ranking metric at each C, and the change per factor 10 in C."""
    (fit,) = fits.values()
    metrics = ranked_metrics(fit)
    by_metric = [dict(agreements(fit, metric)) for metric in metrics]
    lines: list[list[Cell | str]] = []
    for flops in sorted({flops for found in by_metric for flops in found}):
        cells = [Cell(estimate_text(found[flops], "{:+.2f}".format)) if flops in found else "-" for found in by_metric]
        lines.append([f"Spearman at C = {power_text(flops)}", *cells])
    trends = [Cell(estimate_text(fit.parameters[f"trend[{metric}]"], "{:+.2f}".format)) for metric in metrics]
    lines.append(["change of Fisher's z per factor 10 in C", *trends])
    lines.append(["arXiv 2606.05257", *[_published("agreement", metric) for metric in metrics]])
    return table(["", *[f"{fit.metric} with {metric}" for metric in metrics]], lines)


def _batch_cell(value: Estimate | None) -> Cell:
    return Cell("-" if value is None else estimate_text(value, format_count))


def _differing(fits: Mapping[str, LawFit]) -> str:
    """Which answers of two metrics are apart by more than their intervals."""
    if len(fits) < 2:
        return ""
    # Levels and coefficients are in each metric's own units.
    found = [one for one in differences(fits) if " at C = " in one.quantity or one.quantity.endswith("exponent")]
    apart = [f"{one.quantity.replace('_', ' ')}: {one.first} and {one.second}" for one in found if one.differs]
    unknown = sum(one.differs is None for one in found)
    text = (
        f"Apart by more than their intervals: {'; '.join(apart[:_MOST_NOTES])}"
        if apart
        else ("No answers of two metrics are apart by more than their intervals")
    )
    more = f"; and {len(apart) - _MOST_NOTES} more" if len(apart) > _MOST_NOTES else ""
    open_ones = f" {unknown} of {len(found)} comparisons are open: an interval has no end." if unknown else ""
    return paragraph(f"{text}{more}.{open_ones}") if found else ""


def _warnings(fits: Mapping[str, LawFit]) -> str:
    said: dict[str, list[str]] = {}
    for metric, fit in fits.items():
        for warning in fit.warnings:
            said.setdefault(warning, []).append(metric)
        if fit.outliers and not any("outlier" in warning for warning in fit.warnings):
            names = ", ".join(f"{outlier.run} ({outlier.residual:+.2g})" for outlier in fit.outliers[:3])
            said.setdefault(
                f"outliers ({len(fit.outliers)}): {names}{' ...' if len(fit.outliers) > 3 else ''}", []
            ).append(metric)
    shown = [f"{', '.join(metrics)}: {text}" for text, metrics in said.items()]
    if len(shown) > _MOST_NOTES:
        shown = [*shown[:_MOST_NOTES], f"and {len(shown) - _MOST_NOTES} more; bfm fit tells all"]
    return "".join(paragraph(text, "muted") for text in shown)


def _headlines(law: str, fit: LawFit) -> list[str]:
    """The exponents and the optima at the largest C that has them; of a batch law those of the largest N."""
    if law == "agreement":
        last_of = {metric: agreements(fit, metric)[-1:] for metric in ranked_metrics(fit)}
        return [
            f"Spearman with {metric} at C = {power_text(flops)}: {estimate_text(value, '{:+.2f}'.format)}"
            for metric, points in last_of.items()
            for flops, value in points
        ]
    said = [
        f"{_words(law, name)} {estimate_text(value)}"
        for name, value in fit.parameters.items()
        if name.endswith("exponent") or (law == "surface" and name in ("a", "b"))
    ]
    if law == "batch":
        last = hardest_groups(fit)[-1]
        size = f" at N = {format_count(last['params'])}" if "params" in last else ""
        batches = {words: fit.parameters[f"{key}[{last['group']}]"] for key, words in _CRITICAL.items()}
        said += [f"B, {words}{size}: {estimate_text(value, format_count)}" for words, value in batches.items()]
    told_budgets = [budget for budget in fit.budgets if budget.bracketed and budget.optima]
    if told_budgets:
        top = max(told_budgets, key=lambda budget: budget.flops)
        optima = [f"{_symbol(name)} {estimate_text(v, _text_of(name))}" for name, v in _optima(top).items()]
        said.append(f"at C = {power_text(top.flops)}: {', '.join(optima)}")
    elif fit.budgets:
        said.append("no budget encloses its optimum")
    return said or ["; ".join(f"{name} {estimate_text(value)}" for name, value in fit.parameters.items())]


def _text_of(name: str) -> Callable[[float], str]:
    if name in _SHARE:
        return lambda share: f"{100 * share:.3g} %"
    return format_count if name in _COUNTS else "{:.3g}".format


def _words(law: str, name: str) -> str:
    exponents = {"a": "N exponent a", "b": "D exponent b"} if law == "surface" else {}
    return exponents.get(name, name.replace("_", " "))


def _symbol(name: str) -> str:
    return name.replace("_opt", "*")


def _published(law: str, name: str) -> Cell:
    return Cell(_PUBLISHED.get((law, name), ""), kind="text")


def _same(recipe: Mapping[str, Any], check: Mapping[str, Any]) -> bool:
    return (recipe["flops"], recipe["metric"]) == (check["flops"], check["metric"])
