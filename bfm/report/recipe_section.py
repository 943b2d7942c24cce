"""The part of the page that holds recipes against what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bfm.report.digits import power_text, value_text
from bfm.report.render import Cell, Table
from bfm.sweep.recipe.verdicts import calibration_text


def recipe_table(recipe: Mapping[str, Any] | None, checks: Sequence[Mapping[str, Any]]) -> Table:
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
        ends = [
            "open" if one["predicted"].get(end) is None else f"{one['predicted'][end]:.4g}" for end in ("low", "high")
        ]
        lines.append(
            [
                power_text(float(one["flops"])),
                str(one["metric"]),
                Cell(f"{one['predicted']['estimate']:.4g}"),
                Cell(f"[{ends[0]}, {ends[1]}]"),
                Cell("-" if measured is None else value_text(measured, math.nan if error is None else error)),
                verdict,
            ]
        )
    held = f"{calibration_text(checks)}." if checks else ""
    return Table(
        "Recipe: predicted and measured", ["C", "metric", "predicted", "95 % interval", "measured", ""], lines, held
    )


def _same(recipe: Mapping[str, Any], check: Mapping[str, Any]) -> bool:
    return (recipe["flops"], recipe["metric"]) == (check["flops"], check["metric"])
