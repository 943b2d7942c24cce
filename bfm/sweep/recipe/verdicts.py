"""Checks of recipes as a ledger holds them, in words: what was predicted, what was measured, how many held."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bfm.laws.result import Estimate
from bfm.units import format_flops

Check = Mapping[str, Any]


def calibration(checks: Sequence[Check]) -> dict[str, int]:
    """How many measured values fell inside their predicted interval, of how many."""
    return {"inside": sum(bool(check["inside"]) for check in checks), "checks": len(checks)}


def calibration_text(checks: Sequence[Check]) -> str:
    """The same as a sentence."""
    count = calibration(checks)
    return f"{count['inside']} of {count['checks']} measured values inside their 95 % prediction interval"


def predicted(check: Check) -> Estimate:
    """What was foretold; an end that was open is NaN."""
    ends = (check["predicted"][name] for name in ("estimate", "low", "high"))
    return Estimate(*(math.nan if end is None else float(end) for end in ends))


def check_text(check: Check) -> str:
    """One line."""
    error = "" if check.get("error") is None else f" +- {check['error']:.2g}"
    verdict = "inside" if check["inside"] else "outside"
    return (
        f"{format_flops(check['flops'])} FLOPs: {check['metric']} {check['measured']:.4g}{error}, {verdict} "
        f"the predicted {range_text(predicted(check), '{:.4g}'.format)}"
    )


def checks_lines(checks: Sequence[Check]) -> list[str]:
    """How many held, then a line each; nothing where there is none."""
    if not checks:
        return []
    return [f"checks of recipes: {calibration_text(checks)}", *(f"  {check_text(check)}" for check in checks)]


def range_text(value: Estimate, words: Callable[[float], str]) -> str:
    """An estimate with its ends; an open end is a question mark, and where both are there is no interval."""
    if not value.is_known or not (math.isfinite(value.low) or math.isfinite(value.high)):
        return f"{words(value.estimate)} (no interval)"
    ends = [words(end) if math.isfinite(end) else "?" for end in (value.low, value.high)]
    return f"{words(value.estimate)} [{ends[0]}, {ends[1]}]"
