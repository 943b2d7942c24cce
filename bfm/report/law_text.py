"""A fitted law as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bfm.laws.compare import Difference
from bfm.laws.result import Estimate, LawFit
from bfm.report.digits import estimate_text
from bfm.report.tables import ruled
from bfm.units import format_flops

_SHOWN_OUTLIERS = 5


def law_text(fit: LawFit) -> str:
    """Parameters and optima with their intervals, what was fitted and how, and what to doubt."""
    head = f"{fit.law} of {fit.metric} on {fit.runs} runs"
    if math.isfinite(fit.objective):
        head += f"; {fit.objective_name} {fit.objective:.6g}"
    parts = [head, _parameters(fit), _budgets(fit), f"intervals (95 %): {fit.interval_method}"]
    parts.append("\n".join(f"{name}: {meaning}" for name, meaning in fit.definitions.items()))
    if fit.outliers:
        shown = [f"{o.run} ({o.residual:+.3g}{', ' + o.detail if o.detail else ''})" for o in fit.outliers]
        more = f" and {len(shown) - _SHOWN_OUTLIERS} more" if len(shown) > _SHOWN_OUTLIERS else ""
        parts.append(f"outliers: {', '.join(shown[:_SHOWN_OUTLIERS])}{more}")
    parts.append("\n".join(f"warning: {warning}" for warning in fit.warnings))
    return "\n\n".join(part for part in parts if part)


def _parameters(fit: LawFit) -> str:
    lines = [[name, *_cells(value)] for name, value in fit.parameters.items()]
    return ruled(["parameter", "estimate", "low", "high"], lines) if lines else ""


def _budgets(fit: LawFit) -> str:
    names = union(budget.optima for budget in fit.budgets)
    lines = []
    for budget in fit.budgets:
        optima = [estimate_text(budget.optima[name], _digits) if name in budget.optima else "-" for name in names]
        best = _digits(budget.best) if math.isfinite(budget.best) else "-"
        note = budget.reason or ("" if budget.bracketed else "not bracketed")
        lines.append([format_flops(budget.flops), *optima, best, note])
    return ruled(["C", *names, "best", ""], lines) if lines else ""


def _cells(value: Estimate) -> list[str]:
    return [_digits(value.estimate) if value.is_known else "-", _digits(value.low), _digits(value.high)]


def _digits(value: float) -> str:
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "open"
    return f"{value:.4g}"


def union(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of several mappings, each once."""
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def differences_text(found: Sequence[Difference]) -> str:
    """Which answers of two metrics are apart by more than their intervals."""
    words = {True: "differ", False: "overlap", None: "cannot be told apart"}
    lines = [[one.quantity, one.first, one.second, words[one.differs]] for one in found]
    return ruled(["quantity", "metric", "and", "their intervals"], lines) if lines else ""
