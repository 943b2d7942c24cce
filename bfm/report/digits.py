"""Values and differences with the digits that their errors support."""

from __future__ import annotations

import math

from bfm.laws.frontier import Gap

UNPAIRED = "~ unpaired, far too wide: a row holds no scores of its queries"
"""What the mark of `gap_text` means."""


def value_text(value: float, error: float = math.nan) -> str:
    """Value and error with the digits that the error supports; four significant ones without an error; '-' for NaN."""
    if not math.isfinite(value):
        return "-"
    if not (math.isfinite(error) and error > 0):
        return f"{value:.4g}"
    digits = min(max(1 - math.floor(math.log10(error)), 0), 6)
    return f"{value:.{digits}f} \u00b1 {error:.{digits}f}"


def gap_text(gap: Gap) -> str:
    """A difference with its sign and error; `~` where it is unpaired."""
    text = value_text(gap.value, gap.error)
    sign = "+" if gap.value >= 0 else ""
    return f"{sign}{text}" + ("" if gap.paired or math.isnan(gap.error) else "~")
