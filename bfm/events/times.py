"""Times of any Arrow type to milliseconds since the epoch, vectorised; without a zone, UTC.

Each value is judged by itself alone, as in bfm/tables/values.py.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bfm.errors import UserError
from bfm.events.schema import TimeSpec
from bfm.tables.values import NUMBER, are_numbers, integers, is_plain, keys, known, numbers, to_mask

_ISO = (
    r"^(?P<year>[0-9]{4})[-/](?P<month>[0-9]{1,2})[-/](?P<day>[0-9]{1,2})"
    r"(?:[T ]+(?P<hour>[0-9]{1,2}):(?P<minute>[0-9]{2})(?::(?P<second>[0-9]{2})(?:[.,](?P<fraction>[0-9]{1,9}))?)?)?"
    r" ?(?:Z|z|UTC|(?P<sign>[-+])(?P<zone_hour>[0-9]{2})(?::?(?P<zone_minute>[0-9]{2}))?)?$"
)
# Years 1 to 9999.
_MIN_MS, _MAX_MS = -62_135_596_800_000, 253_402_300_799_999
_UNIT_PER_MS = {"s": 1e-3, "ms": 1.0, "us": 1e3, "ns": 1e6, "days": 1 / 86_400_000, "sheet_days": 1 / 86_400_000}
_DAY_EPOCH_MS = {"days": 0, "sheet_days": -2_209_161_600_000}
CLOCK_MS = 315_532_800_000, 4_102_444_800_000
"""1980 to 2100: times outside are taken for something else."""
_COUNTED_MS = 0, 31_622_400_000
"""1970: where all that is no number of seconds comes to lie, days and written dates among it."""
_LOOKS_LIKE = (
    (1000, 3_652, 29_219, "days since 1970: `time: {column: ..., unit: days}`; of a counter write `position: ...`"),
    (1000, 29_220, 80_000, "days of a spreadsheet: `time: {column: ..., unit: sheet_days}`"),
    (1000, 19_000_101, 21_001_231, "written dates: `time: {column: ..., format: '%Y%m%d'}`"),
    (1, 190_001_010_000, 210_012_312_359, "written times: `time: {column: ..., format: '%Y%m%d%H%M'}`"),
    (1, 19_000_101_000_000, 21_001_231_235_959, "written times: `time: {column: ..., format: '%Y%m%d%H%M%S'}`"),
)
"""Milliseconds per unit as guessed, lowest, highest, and what such numbers are."""
TimeRange = tuple[int, int] | None
"""First and last, in milliseconds, of times that are numbers whose unit was guessed; None where there are none."""


def times(column: pa.Array, spec: TimeSpec) -> tuple[pa.Array, np.ndarray]:
    """Milliseconds since the epoch from timestamps, dates, epoch numbers or text; without a zone, UTC.

    Returns:
        int64, null where missing or wrong; mask of values that are no time between the years 1 and 9999.
    """
    kind = column.type
    if not is_plain(kind) or pa.types.is_boolean(kind) or pa.types.is_time(kind):
        return pa.nulls(len(column), pa.int64()), to_mask(column.is_valid())
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        # safe=False: finer units are cut to milliseconds (floor for the years after 1970).
        return _in_range(column.cast(pa.timestamp("ms", getattr(kind, "tz", None)), safe=False).cast(pa.int64()))
    if spec.format is not None:
        text = keys(column)[0]
        parsed = _formatted(text, spec.format)
        values, wrong = _in_range(parsed)
        return values, wrong | to_mask(pc.and_(text.is_valid(), parsed.is_null()))
    if not pa.types.is_large_string(kind):
        return _epoch(column, spec.unit)
    text = known(column)
    numeric = pc.match_substring_regex(text, NUMBER)
    from_number, wrong_number = _epoch(pc.if_else(numeric, text, None), spec.unit)
    from_text, wrong_text = _iso(pc.if_else(numeric, None, text))
    return pc.coalesce(from_number, from_text), wrong_number | wrong_text


def guessed_range(column: pa.Array, time: pa.Array, spec: TimeSpec) -> TimeRange:
    """The range of `time`, read from a column, where it was numbers of an unknown unit."""
    if (spec.unit, spec.format) != ("auto", None) or not are_numbers(column):
        return None
    found = pc.min_max(time).as_py()
    return None if found["min"] is None else (found["min"], found["max"])


def merged(ranges: Iterable[TimeRange]) -> TimeRange:
    """One range over several."""
    known = [found for found in ranges if found is not None]
    return (min(first for first, _ in known), max(last for _, last in known)) if known else None


def check_clock(guessed: TimeRange, key: str = "time", file: str | None = None) -> None:
    """Raise UserError where times whose unit was guessed look like something else: those of events where all are before
    1980 or after 2100, those of a field (which may be dates of birth) where all are in 1970."""
    if guessed is None:
        return
    first_ms, last_ms = guessed
    if key == "time" and are_plausible(first_ms, last_ms):
        return
    if key != "time" and not (_COUNTED_MS[0] <= first_ms and last_ms <= _COUNTED_MS[1]):
        return
    first, last = (np.datetime64(ms, "ms").astype("datetime64[D]") for ms in guessed)
    fix = "name it, e.g. `time: {column: ..., unit: s}`; of a counter write `position: ...`"
    for per_ms, low, high, setting in _LOOKS_LIKE:
        if low <= first_ms / per_ms and last_ms / per_ms <= high:
            fix = f"these look like {setting}"
    raise UserError(f"times from {first} to {last}, is the unit right?", file=file, key=key, fix=fix)


def are_plausible(first_ms: int, last_ms: int) -> bool:
    """Whether some of a log's times are where logs are."""
    return CLOCK_MS[0] <= last_ms and first_ms <= CLOCK_MS[1]


# ---------------------------------------------------------------- inside


def _formatted(text: pa.Array, form: str) -> pa.Array:
    """Int64 milliseconds of text in a strptime format, to which %f is added."""
    before, mark, after = form.partition("%f")
    if not mark:
        return pc.strptime(text, format=form, unit="ms", error_is_null=True).cast(pa.int64())
    pattern = rf"^(?P<before>.*)\{before[-1]}(?P<fraction>[0-9]{{1,9}})(?P<after>{'[^0-9].*' if after else ''})$"
    parts = pc.extract_regex(text, pattern)
    around = (pc.struct_field(parts, name) for name in ("before", "after"))
    whole = pc.binary_join_element_wise(*around, pa.scalar("", pa.large_string()))
    milli = pc.utf8_slice_codeunits(pc.utf8_rpad(pc.struct_field(parts, "fraction"), 3, "0"), 0, 3)
    return pc.add(_formatted(whole, before[:-1] + after), milli.cast(pa.int64()))


def _in_range(values: pa.Array) -> tuple[pa.Array, np.ndarray]:
    inside = pc.and_(pc.greater_equal(values, _MIN_MS), pc.less_equal(values, _MAX_MS))
    return pc.if_else(inside, values, None), to_mask(pc.invert(inside))


def _epoch(column: pa.Array, unit: str) -> tuple[pa.Array, np.ndarray]:
    """Epoch numbers to milliseconds; `auto` goes by size."""
    values, wrong, infinite = numbers(column)
    raw = values.fill_null(0).to_numpy(zero_copy_only=False)
    if unit == "auto":
        size = np.abs(raw)
        per_ms = np.select([size < 1e11, size < 1e14, size < 1e17], [1e-3, 1.0, 1e3], 1e6)
    else:
        per_ms = np.full(len(raw), _UNIT_PER_MS[unit])
    out_of_range = np.abs(raw / per_ms) > 1e15
    ms = np.floor(np.where(out_of_range, 0, raw) / per_ms).astype(np.int64)
    if (per_ms > 1).any():
        # Nanoseconds exceed the 53 bits of a float.
        exact = integers(column)
        divided = exact.fill_null(0).to_numpy(zero_copy_only=False) // np.maximum(per_ms, 1).astype(np.int64)
        ms = np.where((per_ms > 1) & to_mask(exact.is_valid()), divided, ms)
    if unit in _DAY_EPOCH_MS:
        # Fractions of days are rounded; what is meant, and what a sheet shows, are seconds.
        ms = (ms + 500) // 1000 * 1000 + _DAY_EPOCH_MS[unit]
    parsed, outside = _in_range(pc.if_else(values.is_valid(), pa.array(ms), None))
    return pc.if_else(pa.array(out_of_range), None, parsed), wrong | infinite | outside | out_of_range


def _iso(text: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """ISO 8601 text (also with slashes or a blank) to milliseconds."""
    parts = pc.extract_regex(text, _ISO)

    def number(digits: pa.Array) -> np.ndarray:
        filled = pc.if_else(pc.equal(digits, ""), "0", digits).fill_null("0")
        return filled.cast(pa.int64()).to_numpy(zero_copy_only=False)

    names = ("year", "month", "day", "hour", "minute", "second", "zone_hour", "zone_minute")
    year, month, day, hour, minute, second, *zone = (number(pc.struct_field(parts, name)) for name in names)
    milli = number(pc.utf8_slice_codeunits(pc.utf8_rpad(pc.struct_field(parts, "fraction"), 3, "0"), 0, 3))
    good = to_mask(parts.is_valid()) & (month >= 1) & (month <= 12) & (day >= 1) & (hour < 24) & (minute < 60)
    good &= (second <= 60) & (year >= 1)
    first = ((year - 1970) * 12 + np.clip(month, 1, 12) - 1).astype("datetime64[M]")
    days = first.astype("datetime64[D]").astype(np.int64) + day - 1
    good &= days < (first + 1).astype("datetime64[D]").astype(np.int64)
    east_s = np.where(to_mask(pc.equal(pc.struct_field(parts, "sign"), "-")), -1, 1) * (zone[0] * 3600 + zone[1] * 60)
    ms = (days * 86_400 + hour * 3600 + minute * 60 + second - east_s) * 1000 + milli
    return pc.if_else(pa.array(good), pa.array(ms), None), to_mask(text.is_valid()) & ~good
