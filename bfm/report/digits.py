"""Values, differences and estimates with the digits that their errors support."""

from __future__ import annotations

import math
from collections.abc import Callable

from bfm.laws.frontier import Gap
from bfm.laws.result import Estimate
from bfm.units import format_flops

UNPAIRED = "~ unpaired, far too wide: a row holds no scores of its queries"
"""What the mark of `gap_text` means."""
_FAR = 1e6
_SUPERSCRIPT = str.maketrans("0123456789-", "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b")


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


def closed(value: Estimate) -> Estimate:
    """The estimate whose ends are open where they are as good as that: a factor of 1e6 from what is above 0, and else
    1e6 times its size."""
    middle, low, high = value.estimate, value.low, value.high
    if low >= 0 and middle > 0:
        return Estimate(middle, 0.0 if middle > _FAR * low else low, math.inf if high > _FAR * middle else high)
    far = _FAR * max(abs(middle), 1.0)
    return Estimate(middle, -math.inf if low < middle - far else low, math.inf if high > middle + far else high)


def estimate_text(value: Estimate, text: Callable[[float], str] = "{:.3g}".format) -> str:
    """`0.512 [0.498, 0.527]`; an end that the data leave open is named."""
    value = closed(value)
    if not value.is_known:
        if math.isfinite(value.low) and value.low > 0:
            return f"at least {text(value.low)}"
        return f"at most {text(value.high)}" if math.isfinite(value.high) else "not identifiable"
    if math.isnan(value.low) or math.isnan(value.high):
        return text(value.estimate)
    ends = [text(end) if math.isfinite(end) else "open" for end in (value.low, value.high)]
    return f"{text(value.estimate)} [{ends[0]}, {ends[1]}]"


def power_text(value: float) -> str:
    """1e12 -> '10' with a raised 12; 4e11 -> '4x10' with a raised 11."""
    if not (value > 0 and math.isfinite(value)):
        return "0"
    mantissa, exponent = format_flops(value).split("e")
    raised = "10" + exponent.translate(_SUPERSCRIPT)
    return raised if mantissa == "1" else f"{mantissa}\u00d7{raised}"
