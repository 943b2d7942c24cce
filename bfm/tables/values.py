"""Columns of any Arrow type to ids, numbers, lists and vectors, vectorised. Each value is judged by itself alone.

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

SEPARATOR = "\x1f"
"""Joins the parts of composite keys and of lists written as one text."""
NUMBER = r"^(?:[0-9]+\.?[0-9]*|-[0-9]+\.?[0-9]*|-?\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?$"
_INFINITE = r"(?i)^-?inf(?:inity)?$"
_MISSING = pa.array(
    ["", "NULL", "Null", "null", "NaN", "NAN", "nan", "None", "<NA>", "N/A", "n/a", "#N/A", "NaT", "\\N"],
    pa.large_string(),
)
"""Texts by which tools say that there is nothing. `NA` is not among them: it is Namibia too."""
_WHOLE = r"^(-?(?:0|[1-9][0-9]*))\.0+$"
_ROUNDED = r"^-?[0-9](?:\.[0-9]+)?[eE]\+[0-9]+$"
_INTEGER = r"^[-+]?(?:[0-9]{1,18}|[0-8][0-9]{18})(?:\.0*)?$"
_COMMA_NUMBER = r"^\s*[-+]?([0-9]{1,3}(\.[0-9]{3})+|[0-9]*)(,[0-9]*)?([eE][-+]?[0-9]+)?\s*$"
_EXACT = 2.0**53
"""Doubles below it are exact whole numbers."""


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
        as_int = pc.if_else(_are_whole(kept), kept, None).cast(pa.int64()).cast(pa.large_string())
        # The shortest text of a float32 is not that of the same value as float64.
        exact = pc.if_else(pc.is_finite(column), column, None).cast(pa.large_string())
        return pc.coalesce(as_int, exact), wrong, infinite
    # Casting and trimming each distinct value once.
    codes = column.dictionary_encode()
    text = codes.dictionary.cast(pa.large_string())
    if pa.types.is_large_string(kind):
        text = pc.replace_substring_regex(known(text), _WHOLE, r"\1")
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
        return to_mask(pc.and_(pc.is_finite(values), pc.invert(_are_whole(values))))
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
    exact = integers(column)
    found = pc.coalesce(exact, pc.if_else(_are_whole(values), values, None).cast(pa.int64()))
    return found, wrong | infinite | (to_mask(values.is_valid()) & to_mask(found.is_null()))


def known(column: pa.Array) -> pa.Array:
    """Trimmed texts, null where one says that there is nothing."""
    text = pc.utf8_trim_whitespace(column)
    return pc.if_else(pc.is_in(text, _MISSING), None, text)


def integers(column: pa.Array) -> pa.Array:
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


def are_numbers(column: pa.Array) -> bool:
    """Whether a column is of numbers, or of text whose first known value is one."""
    if not pa.types.is_large_string(column.type):
        return is_plain(column.type) and not pa.types.is_temporal(column.type)
    first = known(column.slice(0, 1000)).drop_null()
    return len(first) > 0 and pc.match_substring_regex(first[0], NUMBER).as_py()


def with_points(column: pa.Array) -> pa.Array:
    """Text numbers such as 1.234,5 as 1234.5; all else as it is."""
    if not pa.types.is_large_string(column.type):
        return column
    changed = pc.replace_substring(pc.replace_substring(column, ".", ""), ",", ".")
    return pc.if_else(pc.match_substring_regex(column, _COMMA_NUMBER), changed, column)


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


def _are_whole(values: pa.Array) -> pa.Array:
    """Booleans: doubles that are exact whole numbers."""
    return pc.and_(pc.equal(pc.round(values), values), pc.less(pc.abs(values), _EXACT))


def _read_numbers(texts: pa.Array) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Float64 of texts, which of them are a number or missing, and which an infinity."""
    # Arrow's number parser refuses a leading plus.
    text = pc.replace_substring_regex(known(texts), r"^\+([0-9.])", r"\1")
    number = pc.match_substring_regex(text, NUMBER)
    infinite = pc.match_substring_regex(text, _INFINITE).fill_null(False)
    return pc.if_else(number, text, None).cast(pa.float64()), number.fill_null(True), infinite


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _relist(elements: pa.Array, parents: np.ndarray, count: int) -> pa.Array:
    """Lists from elements and the row of each; rows without elements are null."""
    lengths = np.bincount(parents, minlength=count)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]))
    return pa.LargeListArray.from_arrays(offsets, elements, mask=pa.array(lengths == 0))
