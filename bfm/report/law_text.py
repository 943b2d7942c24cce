"""A fitted law as text for a terminal: what it says in words first."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from bfm.laws.compare import differences
from bfm.laws.result import LawFit
from bfm.report.digits import estimate_text
from bfm.report.law_words import rows_text, sentences
from bfm.report.words import first_words
from bfm.units import format_flops, ruled

_SHOWN = 5


def law_text(fit: LawFit) -> str:
    """Sentences, parameters and optima with their intervals, what was fitted and how, and what to doubt."""
    head = f"{fit.law} of {fit.metric} on {fit.runs} runs"
    if math.isfinite(fit.objective):
        head += f"; {fit.objective_name} {fit.objective:.6g}"
    said = [f"{about}: {text}" for about, text in sentences(fit)]
    parts = ["\n".join(filter(None, [*said, rows_text(fit)])), head]
    lines = [[name, estimate_text(value, _digits)] for name, value in fit.parameters.items()]
    parts += [ruled(["parameter", "estimate [95 % interval]"], lines) if lines else "", _budgets(fit)]
    parts.append(f"intervals (95 %): {fit.interval_method}")
    parts.append("\n".join(f"{name}: {meaning}" for name, meaning in fit.definitions.items()))
    parts += [outliers_text(fit), "\n".join(f"warning: {warning}" for warning in fit.warnings)]
    return "\n\n".join(part for part in parts if part)


def outliers_text(fit: LawFit) -> str:
    """The runs that the fit gives least weight; empty where there is none."""
    names = [f"{o.run} ({o.residual:+.3g}{', ' + o.detail if o.detail else ''})" for o in fit.outliers]
    return f"outliers: {first_words(names, _SHOWN)}" if names else ""


def _budgets(fit: LawFit) -> str:
    names = union(budget.optima for budget in fit.budgets)
    lines = []
    for budget in fit.budgets:
        optima = [estimate_text(budget.optima[name], _digits) if name in budget.optima else "-" for name in names]
        note = budget.reason or ("" if budget.bracketed else "not bracketed")
        lines.append([format_flops(budget.flops), *optima, _digits(budget.best), note])
    return ruled(["C", *names, "best", ""], lines) if lines else ""


def _digits(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"


def union(mappings: Iterable[Mapping[Any, Any]]) -> list[Any]:
    """The names of several mappings, each once."""
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def by_reason(refused: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Each reason once, with the metrics that it concerns; of (metric, reason), which may name its metric."""
    found: dict[str, list[str]] = {}
    for metric, reason in refused:
        unnamed = re.sub(rf"\b(of|has) {re.escape(metric)}(?![\w@.])", r"\1 it", reason)
        found.setdefault(unnamed, []).append(metric)
    return {reason: first_words(metrics, _SHOWN) for reason, metrics in found.items()}


def differences_text(fits: Mapping[str, LawFit]) -> str:
    """Which exponents and optima of two metrics are apart by more than their intervals, the same metrics together.

    Levels and coefficients are in each metric's own units, and D follows N.
    """
    found = [one for one in differences(fits) if re.match(r"(?!D_).*( at C = |exponent$)", one.quantity)]
    apart: dict[str, list[str]] = {}
    for one in found:
        if one.differs:
            apart.setdefault(f"{one.first} and {one.second}", []).append(one.quantity.replace("_", " "))
    if not found:
        return ""
    said = "; ".join(f"{pair} in {first_words(quantities, _SHOWN)}" for pair, quantities in apart.items())
    unknown = sum(one.differs is None for one in found)
    open_ones = f" {unknown} of {len(found)} comparisons are open: an interval has no end." if unknown else ""
    return f"Apart by more than their intervals: {said or 'no answers of two metrics'}.{open_ones}"
