"""Columns of any Arrow type to the few types of a cleaned log, vectorised. Each value is judged by itself alone.

Nothing here depends on the other values of a column, so the result does not depend on how a log is cut into files and
blocks. Every parser returns the values (null where there is none) and boolean masks [n] of what was wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bfm.events.schema import TimeSpec

SEPARATOR = "\x1f"
"""Joins the parts of composite keys and of lists written as one text."""
_NUMBER = r"^(?:[0-9]+\.?[0-9]*|-[0-9]+\.?[0-9]*|-?\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?$"
_INFINITE = r"(?i)^-?inf(?:inity)?$"
_MISSING = pa.array(
    ["", "NULL", "Null", "null", "NaN", "NAN", "nan", "None", "<NA>", "N/A", "n/a", "#N/A", "NaT", "\\N"],
    pa.large_string(),
)
"""Texts by which tools say that there is nothing. `NA` is not among them: it is Namibia too."""
_WHOLE = r"^(-?(?:0|[1-9][0-9]*))\.0+$"
_ROUNDED = r"^-?[0-9](?:\.[0-9]+)?[eE]\+[0-9]+$"
_INTEGER = r"^[-+]?(?:[0-9]{1,18}|[0-8][0-9]{18})(?:\.0*)?$"
_EXACT = 2.0**53
"""Doubles below it are exact whole numbers."""
_ISO = (
    r"^(?P<year>[0-9]{4})[-/](?P<month>[0-9]{1,2})[-/](?P<day>[0-9]{1,2})"
    r"(?:[T ]+(?P<hour>[0-9]{1,2}):(?P<minute>[0-9]{2})(?::(?P<second>[0-9]{2})(?:[.,](?P<fraction>[0-9]{1,9}))?)?)?"
    r" ?(?:Z|z|UTC|(?P<sign>[-+])(?P<zone_hour>[0-9]{2})(?::?(?P<zone_minute>[0-9]{2}))?)?$"
)
# Years 1 to 9999.
_MIN_MS, _MAX_MS = -62_135_596_800_000, 253_402_300_799_999
_UNIT_PER_MS = {"s": 1e-3, "ms": 1.0, "us": 1e3, "ns": 1e6, "sheet_days": 1 / 86_400_000}
_SHEET_EPOCH_MS = -2_209_161_600_000


def plain(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """One contiguous array; dictionaries are decoded, strings are large strings, null columns are strings.

    Bytes are UTF-8 text; of those that are not, every wrong byte becomes `\\x` and two digits.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_null(kind) or pa.types.is_string(kind) or pa.types.is_string_view(kind):
        return column.cast(pa.large_string())
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        codes = column.dictionary_encode()
        texts = [value.decode("utf-8", "backslashreplace") for value in codes.dictionary.to_pylist()]
        return pa.array(texts, pa.large_string()).take(codes.indices)
    return column


def encoded(values: pa.Array) -> pa.Array:
    """Text as a dictionary, so that each distinct one is looked at once; other types as they are."""
    return values.dictionary_encode() if pa.types.is_large_string(values.type) else values


def per_distinct(values: pa.Array, make: Callable[[pa.Array], np.ndarray], missing: Any) -> np.ndarray:
    """What `make` says of texts: [n] or [n, M], asked of each distinct one once; `missing` for nulls."""
    distinct = encoded(values)
    made = make(distinct.dictionary)
    table = np.append(made, np.full((1, *made.shape[1:]), missing, made.dtype), axis=0)
    return table[distinct.indices.fill_null(len(made)).to_numpy(zero_copy_only=False)]


def is_plain(kind: pa.DataType) -> bool:
    """Text, numbers, booleans, dates and times: what has a text form (after `plain`)."""
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    temporal = pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_time(kind)
    return numeric or temporal or pa.types.is_large_string(kind) or pa.types.is_boolean(kind)


def to_mask(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Arrow booleans (null counts as False) to numpy."""
    return values.fill_null(False).to_numpy(zero_copy_only=False).astype(bool)


def keys(column: pa.Array) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """Ids and categories as text: equal values are equal texts, whatever the type of their column.

    A number is written exactly and without zeros at the end of its fraction: 7, 7.0, decimal 7.00 and text `7.0` are
    `7`. Other text is as it is, but for blanks around it.

    Returns:
        large strings, null where missing (null, NaN, `_MISSING`); mask of values of a nested type; mask of infinities.
    """
    kind = column.type
    wrong = infinite = np.zeros(len(column), bool)
    if not is_plain(kind):
        return pa.nulls(len(column), pa.large_string()), to_mask(column.is_valid()), infinite
    if pa.types.is_float16(kind):
        column, kind = column.cast(pa.float32()), pa.float32()
    if pa.types.is_floating(kind):
        numbers = column.cast(pa.float64())
        infinite = to_mask(pc.is_inf(numbers))
        kept = pc.if_else(pc.is_finite(numbers), numbers, None)
        whole = to_mask(pc.and_(pc.equal(pc.round(kept), kept), pc.less(pc.abs(kept), _EXACT)))
        as_int = pc.if_else(pa.array(whole), kept, None).cast(pa.int64()).cast(pa.large_string())
        # The shortest text of a float32 is not that of the same value as float64.
        exact = pc.if_else(pc.is_finite(column), column, None).cast(pa.large_string())
        return pc.coalesce(as_int, exact), wrong, infinite
    # Casting and trimming each distinct value once.
    codes = column.dictionary_encode()
    text = codes.dictionary.cast(pa.large_string())
    if pa.types.is_large_string(kind):
        text = pc.replace_substring_regex(_known(text), _WHOLE, r"\1")
        text = pc.if_else(pc.equal(text, "-0"), "0", text)
    elif pa.types.is_decimal(kind) and kind.scale > 0:
        text = pc.replace_substring_regex(pc.replace_substring_regex(text, r"^-?0E-[0-9]+$", "0"), r"\.?0+$", "")
        text = pc.if_else(pc.equal(text, ""), "0", text)
    return text.take(codes.indices), wrong, infinite


def inexact(column: pa.Array) -> np.ndarray:
    """Mask of ids that are numbers with a fraction, or that were rounded: by a float, or by a sheet to `4.01E+12`."""
    kind = column.type
    if pa.types.is_floating(kind):
        values = column.cast(pa.float64())
        whole = pc.and_(pc.equal(pc.round(values), values), pc.less(pc.abs(values), _EXACT))
        return to_mask(pc.and_(pc.is_finite(values), pc.invert(whole)))
    if pa.types.is_decimal(kind):
        return to_mask(pc.not_equal(pc.floor(column), column))
    if pa.types.is_large_string(kind) and pc.any(pc.match_substring(column, "+")).as_py():
        return to_mask(pc.match_substring_regex(column, _ROUNDED))
    return np.zeros(len(column), bool)


def numbers(column: pa.Array) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """Float64.

    Returns:
        numbers, null where missing (null, NaN, `_MISSING`); mask of text that is no number; mask of infinities.
    """
    kind = column.type
    wrong = np.zeros(len(column), bool)
    if not is_plain(kind):
        return pa.nulls(len(column), pa.float64()), to_mask(column.is_valid()), wrong
    if pa.types.is_large_string(kind):
        # Each distinct text is read once.
        codes = column.dictionary_encode()
        values, good, endless = _read_numbers(codes.dictionary)
        infinite = to_mask(endless.take(codes.indices))
        wrong = to_mask(pc.invert(pc.or_(good, endless)).take(codes.indices))
        values = values.take(codes.indices)
    else:
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            column = column.cast(pa.timestamp("ms"))
        if pa.types.is_temporal(kind):
            column = column.cast(pa.int64())
        values = column.cast(pa.float64(), safe=False)
        infinite = wrong.copy()
    infinite = infinite | to_mask(pc.is_inf(values))
    return pc.if_else(pc.is_finite(values), values, None), wrong, infinite


def positions(column: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Whole numbers as int64; mask of what is there but is no whole number."""
    values, wrong, infinite = numbers(column)
    exact = _integers(column)
    whole = to_mask(pc.and_(pc.equal(pc.round(values), values), pc.less(pc.abs(values), _EXACT)))
    found = pc.coalesce(exact, pc.if_else(pa.array(whole), values, None).cast(pa.int64()))
    return found, wrong | infinite | (to_mask(values.is_valid()) & to_mask(found.is_null()))


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
    text = _known(column)
    numeric = pc.match_substring_regex(text, _NUMBER)
    from_number, wrong_number = _epoch(pc.if_else(numeric, text, None), spec.unit)
    from_text, wrong_text = _iso(pc.if_else(numeric, None, text))
    return pc.coalesce(from_number, from_text), wrong_number | wrong_text


def are_numbers(column: pa.Array) -> bool:
    """Whether a column is of numbers, or of text whose first known value is one."""
    if not pa.types.is_large_string(column.type):
        return is_plain(column.type) and not pa.types.is_temporal(column.type)
    first = _known(column.slice(0, 1000)).drop_null()
    return len(first) > 0 and pc.match_substring_regex(first[0], _NUMBER).as_py()


def lists(column: pa.Array, separator: str | None) -> tuple[pa.Array, np.ndarray]:
    """Lists of texts; blank elements are left out, empty lists are null. Mask of values that are no list."""
    kind = column.type
    if pa.types.is_large_string(kind) and separator:
        column = pc.split_pattern(column, separator)
    elif is_plain(kind):
        column = pa.LargeListArray.from_arrays(pa.array(np.arange(len(column) + 1)), keys(column)[0])
    elif not _is_list(kind) or not is_plain(plain(pc.list_flatten(column)).type):
        return pa.nulls(len(column), pa.large_list(pa.large_string())), to_mask(column.is_valid())
    elements, _, _ = keys(plain(pc.list_flatten(column)))
    kept = to_mask(elements.is_valid())
    parents = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)[kept]
    return _relist(elements.filter(pa.array(kept)), parents, len(column)), np.zeros(len(column), bool)


def vectors(column: pa.Array, separator: str | None) -> tuple[pa.Array, np.ndarray]:
    """Lists of float32. Mask of values with a missing, infinite or unreadable element (null then)."""
    if pa.types.is_large_string(column.type):
        column = pc.split_pattern(column, separator or ",")
    elif not _is_list(column.type):
        return pa.nulls(len(column), pa.large_list(pa.float32())), to_mask(column.is_valid())
    parents = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
    values, _, _ = numbers(plain(pc.list_flatten(column)))
    wrong = np.zeros(len(column), bool)
    wrong[parents[to_mask(values.is_null())]] = True
    good = ~wrong[parents]
    return _relist(values.filter(pa.array(good)).cast(pa.float32()), parents[good], len(column)), wrong


def bucket_names(values: pa.Array, edges: list[float]) -> pa.Array:
    """Numbers to the names of half-open buckets: `..10`, `10..50`, `50..`."""
    marks = [f"{edge:g}" for edge in edges]
    names = [f"..{marks[0]}", *(f"{a}..{b}" for a, b in itertools.pairwise(marks)), f"{marks[-1]}.."]
    index = np.searchsorted(edges, values.fill_null(0).to_numpy(zero_copy_only=False), side="right")
    taken = pa.array(names, pa.large_string()).take(pa.array(index))
    return pc.if_else(values.is_valid(), taken, None)


# ---------------------------------------------------------------- inside


def _known(column: pa.Array) -> pa.Array:
    """Trimmed texts, null where one says that there is nothing."""
    text = pc.utf8_trim_whitespace(column)
    return pc.if_else(pc.is_in(text, _MISSING), None, text)


def _read_numbers(texts: pa.Array) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Float64 of texts, which of them are a number or missing, and which an infinity."""
    # Arrow's number parser refuses a leading plus.
    known = pc.replace_substring_regex(_known(texts), r"^\+([0-9.])", r"\1")
    number = pc.match_substring_regex(known, _NUMBER)
    infinite = pc.match_substring_regex(known, _INFINITE).fill_null(False)
    return pc.if_else(number, known, None).cast(pa.float64()), number.fill_null(True), infinite


def _integers(column: pa.Array) -> pa.Array:
    """Int64 of integers, and of decimals and text that are one; null elsewhere."""
    if pa.types.is_uint64(column.type):
        column = pc.if_else(pc.less_equal(column, pa.scalar(2**63 - 1, pa.uint64())), column, None)
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64())
    if pa.types.is_decimal(column.type):
        column, _, _ = keys(column)
    if not pa.types.is_large_string(column.type):
        return pa.nulls(len(column), pa.int64())
    text = pc.utf8_trim_whitespace(column)
    whole = pc.if_else(pc.match_substring_regex(text, _INTEGER), text, None)
    return pc.replace_substring_regex(whole, r"^\+|\.0*$", "").cast(pa.int64())


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


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _relist(elements: pa.Array, parents: np.ndarray, count: int) -> pa.Array:
    """Lists from elements and the row of each; rows without elements are null."""
    lengths = np.bincount(parents, minlength=count)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]))
    return pa.LargeListArray.from_arrays(offsets, elements, mask=pa.array(lengths == 0))


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
        exact = _integers(column)
        divided = exact.fill_null(0).to_numpy(zero_copy_only=False) // np.maximum(per_ms, 1).astype(np.int64)
        ms = np.where((per_ms > 1) & to_mask(exact.is_valid()), divided, ms)
    if unit == "sheet_days":
        # What a sheet shows are seconds; its days are rounded.
        ms = (ms + 500) // 1000 * 1000 + _SHEET_EPOCH_MS
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
