"""Numbers with units: what users write (1e17, 64k, 2M, 1.5 GB) to numbers, numbers to what users read, in columns."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from bfm.errors import UserError

GIB = 1 << 30
"""Bytes."""
_YEAR_S = 365.25 * 86_400
_NUMBER_FIX = "write a number such as 1e17 or 64k"
_SUFFIX = {"": 0, "k": 3, "K": 3, "M": 6, "G": 9, "B": 9, "T": 12, "P": 15, "E": 18}
"""Powers of ten."""
_NUMBER = re.compile(r"([+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([kKMGBTPE]?)\s*(?:FLOPs?)?")


def parse_number(value: object, *, file: str | None = None, key: str | None = None) -> float:
    """A finite number from a YAML scalar. YAML 1.1 reads `1e17` as text; here it is a number.

    Raises UserError for booleans, text without a number, NaN and infinities.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise UserError(f"expected a number, got {value!r}", file=file, key=key, fix=_NUMBER_FIX)
    if isinstance(value, str):
        match = _NUMBER.fullmatch(value.strip())
        if match is None:
            raise UserError(f"{value!r} is not a number", file=file, key=key, fix=_NUMBER_FIX)
        digits, _, power = match[1].replace("_", "").lower().partition("e")
        # One conversion: in floats 8.2 * 1e12 is no whole number.
        number = float(f"{digits}e{int(power or 0) + _SUFFIX[match[2]]}")
    else:
        number = float(value)
    if not math.isfinite(number):
        raise UserError(f"{value!r} is not finite", file=file, key=key, fix="write a finite number")
    return number


def parse_count(value: object, *, key: str | None = None) -> int:
    """A whole number (`4096`, `64k`, `1e5`). Raises UserError where a fraction is left."""
    if isinstance(value, str) and value.strip().isdecimal():
        # Exact, however large; a float holds 53 bits.
        return int(value)
    number = parse_number(value, key=key)
    if number != int(number):
        raise UserError(f"{value!r} is not a whole number", key=key, fix="write a whole number")
    return int(number)


def format_count(number: float) -> str:
    """1234567 -> '1.23M'; exact below 1,000."""
    # Rounded first: 999,999 is a million of the next suffix.
    rounded = float(f"{number:.3g}")
    for suffix, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(rounded) >= scale:
            return f"{number / scale:.3g}{suffix}"
    return f"{number:.3g}" if number != int(number) else str(int(number))


def format_flops(flops: float) -> str:
    """1.8e11 -> '1.8e11'."""
    if flops == 0:
        return "0"
    mantissa, exponent = f"{flops:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def format_seconds(elapsed_s: float) -> str:
    """75 -> '1m15s': the largest unit and the next smaller one; from a year on '1.96k years'."""
    if not math.isfinite(elapsed_s):
        return "?"
    if elapsed_s >= _YEAR_S:
        return f"{format_count(elapsed_s / _YEAR_S)} years"
    whole_s = round(elapsed_s)
    if whole_s < 60:
        return f"{elapsed_s:.1f}s" if elapsed_s < 9.95 else f"{whole_s}s"
    minutes, seconds = divmod(whole_s, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def aligned(rows: Sequence[Sequence[str]], *, left: int = 0) -> list[str]:
    """Lines with columns of equal width: the first `left` of them to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pads = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    return [
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True)).rstrip() for row in rows
    ]


def ruled(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left, with a rule below the heads."""
    head, *body = aligned([heads, *lines], left=1)
    return "\n".join([head, "-" * len(head), *body])
