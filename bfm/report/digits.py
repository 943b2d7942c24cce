"""Values, differences and estimates with the digits that their errors support."""

from __future__ import annotations

import math
from collections.abc import Callable

from bfm.laws.frontier import Gap
from bfm.laws.result import Estimate

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


def estimate_text(value: Estimate, text: Callable[[float], str] = "{:.3g}".format) -> str:
    """`0.512 [0.498, 0.527]`; an end that the data leave open is named."""
    if not value.is_known:
        if math.isfinite(value.low) and value.low > 0:
            return f"at least {text(value.low)}"
        return f"at most {text(value.high)}" if math.isfinite(value.high) else "not identifiable"
    if math.isnan(value.low) or math.isnan(value.high):
        return text(value.estimate)
    ends = [text(end) if math.isfinite(end) else "open" for end in (value.low, value.high)]
    return f"{text(value.estimate)} [{ends[0]}, {ends[1]}]"
