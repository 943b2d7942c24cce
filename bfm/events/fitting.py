"""Fields fitted on the training range: partial statistics of partitions, their merger, the fit, the encoding.

Statistics are counts of values (categorical: of values, text: of words, list: of elements, numeric: of x' = sign(x)
log(1 + |x|) in the bins of a `Histogram`, vector: of lengths), so no step holds more than the distinct values of one
field. Partitions are a function of the rows and the seed, so is everything here.

Text is a bag of its first lower-case words, a list of its first elements, as many as the schema's `max_length` and at
most as many as the longest one in training has; what that cuts off is counted. Words and elements beyond the 65,534
most frequent ones, or never seen in training, share the id 1. A categorical field with more than 65,536 values is
hashed instead: two hashes into one table of 65,536 rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bfm.errors import UserError
from bfm.events.fields import FittedField, Kind, Side
from bfm.events.hashing import hash_strings
from bfm.events.histogram import Histogram, from_ordered_bits, ordered_bits
from bfm.events.parse import plain, to_mask
from bfm.events.ragged import runs
from bfm.events.schema import MAX_LENGTH

MAX_VALUES = 1 << 16
_FIRST_ID = 2
_NUM_EDGES = 31
_KEPT_TOKENS = 1 << 18
_LEAST_HASH_ROWS = 1 << 10
_TEXT = pa.large_string()
_COUNTS = pa.schema([("value", _TEXT), ("count", pa.int64())])
_LENGTHS = pa.schema([("value", pa.int64()), ("count", pa.int64())])
LOST = {"vector": "another length", "time": "missing, written as the epoch"}
"""Why `encode` makes values missing, by kind."""
_HASH_SEEDS = (0x68617368_31, 0x68617368_32)


@dataclass(frozen=True)
class Statistics:
    """Mergeable statistics of one column."""

    counts: pa.Table
    """value (text, or an int64 length), count."""
    known: int = 0
    """Weight of the values that are not missing."""
    histogram: Histogram | None = None
    """numeric: of the ordered bits of x'."""
    extra: dict[str, float] = field(default_factory=dict)
    """numeric: sum and sum of squares of x'; text, list: longest bag; categorical: overflow."""


@dataclass(frozen=True)
class Fitted:
    """A fitted field and the values behind its ids."""

    field: FittedField
    vocabulary: pa.Array | None = None
    """Large strings; entry i has the id i + 2. None for kinds without ids or with hashed ids."""


@dataclass(frozen=True)
class Cut:
    """How far the bags of a field were cut."""

    values: int = 0
    """Values with at least one word or element."""
    cut: int = 0
    """Values that lost some."""
    lost: int = 0
    """Words or elements lost."""

    def __add__(self, other: Cut) -> Cut:
        return Cut(self.values + other.values, self.cut + other.cut, self.lost + other.lost)


@dataclass(frozen=True)
class Encoded:
    """An encoded column."""

    array: np.ndarray
    """As in the field contract (see fields.py)."""
    missing: int = 0
    """Known values that had to become missing; `LOST` says why."""
    cut: Cut = Cut()
    """Of text and lists."""


def measure(values: pa.Array, kind: str, weights: np.ndarray) -> Statistics:
    """Statistics of a column in the type that `clean.field_values` gives its kind (text may be dictionary-encoded).

    Args:
        weights: int64 [n], how often each value counts (training events of an item; 1 or 0 for an event).
    """
    used = (weights > 0) & to_mask(values.is_valid())
    known = int(weights[used].sum())
    if kind == "time":
        return Statistics(_LENGTHS.empty_table(), known)
    kept, kept_weights = values.filter(pa.array(used)), weights[used]
    if kind == "numeric":
        return _measure_numbers(kept.to_numpy(zero_copy_only=False), kept_weights, known)
    if kind == "categorical":
        counts = _count_texts(kept, kept_weights)
        if counts.num_rows > MAX_VALUES:
            return Statistics(_COUNTS.empty_table(), known, extra={"overflow": 1})
        return Statistics(counts, known)
    if kind == "vector":
        lengths = pc.list_value_length(kept).to_numpy(zero_copy_only=False)
        return Statistics(_count_lengths(lengths, kept_weights), known)
    bags = _words(kept) if kind == "text" else kept
    parents = pc.list_parent_indices(bags).to_numpy(zero_copy_only=False)
    counts = _most_frequent(_count_texts(plain(pc.list_flatten(bags)), kept_weights[parents]), _KEPT_TOKENS)
    longest = int(np.bincount(parents).max()) if len(parents) else 0
    return Statistics(counts, known, extra={"longest": longest})


def merge(kind: str, parts: list[Statistics]) -> Statistics:
    """Statistics of the whole column."""
    known = sum(part.known for part in parts)
    if kind == "numeric":
        histogram = functools.reduce(Histogram.merged, (part.histogram for part in parts if part.histogram))
        moments = {name: float(sum(part.extra[name] for part in parts)) for name in ("sum", "squares")}
        return Statistics(_LENGTHS.empty_table(), known, histogram, moments)
    together = pa.concat_tables([part.counts for part in parts]).group_by("value").aggregate([("count", "sum")])
    table = together.rename_columns(["value", "count"])
    if kind == "categorical":
        if table.num_rows > MAX_VALUES or any(part.extra.get("overflow") for part in parts):
            return Statistics(_COUNTS.empty_table(), known, extra={"overflow": 1})
        return Statistics(table, known)
    return Statistics(table, known, extra={"longest": max(part.extra.get("longest", 0) for part in parts)})


def fit(name: str, side: Side, kind: Kind, statistics: Statistics, max_length: int | None = None) -> Fitted:
    """The field as its training values say.

    Args:
        max_length: words or elements that are kept of a value, at most; None: the default of the kind.

    Raises:
        UserError: a vector field without a single vector.
    """
    if kind == "time":
        return Fitted(FittedField(name, side, "time"))
    if kind == "numeric":
        return Fitted(_fit_numbers(name, side, statistics))
    if kind == "vector":
        if statistics.counts.num_rows == 0:
            fix = "remove the field, or check its column and separator"
            raise UserError("has no vector in the training range", key=f"{side}_fields.{name}", fix=fix)
        order = np.lexsort((statistics.counts["value"].to_numpy(), -statistics.counts["count"].to_numpy()))
        return Fitted(FittedField(name, side, "vector", columns=int(statistics.counts["value"][order[0]].as_py())))
    if statistics.extra.get("overflow"):
        return Fitted(hashed_field(name, side, MAX_VALUES))
    limit = MAX_VALUES if kind == "categorical" else MAX_VALUES - _FIRST_ID
    vocabulary = plain(_most_frequent(statistics.counts, limit)["value"])
    rows = len(vocabulary) + _FIRST_ID
    if kind == "categorical":
        return Fitted(FittedField(name, side, "categorical", rows=rows), vocabulary)
    columns = max(1, min(int(statistics.extra["longest"]), max_length or MAX_LENGTH[kind]))
    return Fitted(FittedField(name, side, kind, rows=rows, columns=columns), vocabulary)


def hashed_field(name: str, side: Side, rows: int) -> FittedField:
    """A field of two hashes into one table of `rows` (0 missing, 1 unused)."""
    return FittedField(name, side, "hashed", rows=rows, columns=2)


def id_table_rows(num_values: int) -> int:
    """Rows R of the table of V hashed ids: the least power of two that is at least V, and at least 1,024.

    Two hashes of V values on R >= V rows: a row has two values or fewer on average, and about (V / R)^2 <= 1 pairs of
    values share both rows and cannot be told apart, whatever V.
    """
    return max(_LEAST_HASH_ROWS, 1 << max(num_values - 1, 0).bit_length())


def encode(values: pa.Array, fitted: Fitted) -> Encoded:
    """A column as the model reads it, and what that left out.

    Args:
        values: as in `measure`.
    """
    field = fitted.field
    if field.kind == "numeric":
        return Encoded(values.fill_null(float("nan")).to_numpy(zero_copy_only=False).astype(np.float32))
    if field.kind == "time":
        # The kind has no missing value; the epoch stands for it.
        return Encoded(values.fill_null(0).to_numpy(zero_copy_only=False), missing=values.null_count)
    if field.kind == "vector":
        return _encode_vectors(values, field.columns)
    if field.kind == "hashed":
        return Encoded(_hash_ids(values, field.rows))
    assert fitted.vocabulary is not None
    if field.kind == "categorical":
        return Encoded(_ids(values, fitted.vocabulary))
    return _encode_bags(_words(values) if field.kind == "text" else values, fitted.vocabulary, field.columns)


# ---------------------------------------------------------------- inside


def _dictionary(values: pa.Array) -> pa.DictionaryArray:
    return values if pa.types.is_dictionary(values.type) else values.dictionary_encode()


def _count_texts(values: pa.Array, weights: np.ndarray) -> pa.Table:
    encoded = _dictionary(values)
    counts = np.zeros(len(encoded.dictionary), np.int64)
    np.add.at(counts, encoded.indices.to_numpy(zero_copy_only=False), weights)
    used = np.flatnonzero(counts)
    return pa.table([encoded.dictionary.take(pa.array(used)), pa.array(counts[used])], schema=_COUNTS)


def _count_lengths(values: np.ndarray, weights: np.ndarray) -> pa.Table:
    bins, inverse = np.unique(values, return_inverse=True)
    counts = np.zeros(len(bins), np.int64)
    np.add.at(counts, inverse, weights)
    return pa.table({"value": bins, "count": counts}).cast(_LENGTHS)


def _most_frequent(counts: pa.Table, limit: int) -> pa.Table:
    """Rows by falling count, ties by value; at most `limit`."""
    order = pc.sort_indices(counts, sort_keys=[("count", "descending"), ("value", "ascending")])
    return counts.take(order[:limit])


def _words(texts: pa.Array) -> pa.Array:
    """Lower-case words of letters and digits of each text."""
    if pa.types.is_dictionary(texts.type):
        # Splitting each distinct text once.
        return _words(texts.dictionary).take(texts.indices)
    spaced = pc.replace_substring_regex(pc.utf8_lower(texts), r"[^\pL\pN]+", " ")
    spaced = pc.if_else(pc.equal(pc.utf8_trim_whitespace(spaced), ""), None, pc.utf8_trim_whitespace(spaced))
    return pc.split_pattern(spaced, " ").cast(pa.large_list(_TEXT))


def _squash(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.log1p(np.abs(values))


def _measure_numbers(values: np.ndarray, weights: np.ndarray, known: int) -> Statistics:
    squashed = _squash(values.astype(np.float64))
    histogram = Histogram.of(ordered_bits(squashed), weights)
    sums = {"sum": float((weights * squashed).sum()), "squares": float((weights * squashed**2).sum())}
    return Statistics(_LENGTHS.empty_table(), known, histogram, sums)


def _fit_numbers(name: str, side: Side, statistics: Statistics) -> FittedField:
    if statistics.known == 0 or statistics.histogram is None:
        return FittedField(name, side, "numeric")
    quantiles = statistics.histogram.quantiles(np.arange(1, _NUM_EDGES + 1) / (_NUM_EDGES + 1))
    edges = np.unique(from_ordered_bits(quantiles))
    mean = statistics.extra["sum"] / statistics.known
    variance = max(statistics.extra["squares"] / statistics.known - mean**2, 0.0)
    # Below the rounding of the sums the column is constant.
    std = variance**0.5 if variance > 1e-12 * max(mean**2, 1e-12) else 1.0
    return FittedField(name, side, "numeric", edges=tuple(float(edge) for edge in edges), mean=mean, std=std)


def _ids(values: pa.Array, vocabulary: pa.Array) -> np.ndarray:
    encoded = _dictionary(values)
    found = pc.index_in(encoded.dictionary, value_set=vocabulary).fill_null(-1).to_numpy(zero_copy_only=False)
    ids = np.append(np.where(found < 0, 1, found + _FIRST_ID), 0).astype(np.int32)
    return ids[encoded.indices.fill_null(len(encoded.dictionary)).to_numpy(zero_copy_only=False)]


def _hash_ids(values: pa.Array, rows: int) -> np.ndarray:
    encoded = _dictionary(values)
    table = np.zeros((len(encoded.dictionary) + 1, 2), np.int32)
    for column, seed in enumerate(_HASH_SEEDS):
        hashed = hash_strings(encoded.dictionary, seed) % np.uint64(rows - _FIRST_ID)
        table[:-1, column] = hashed.astype(np.int32) + _FIRST_ID
    return table[encoded.indices.fill_null(len(encoded.dictionary)).to_numpy(zero_copy_only=False)]


def _encode_bags(bags: pa.Array, vocabulary: pa.Array, columns: int) -> Encoded:
    """Int32 [n, columns]: the first ids of each bag, then zeros."""
    ids = _ids(plain(pc.list_flatten(bags)), vocabulary)
    parents = pc.list_parent_indices(bags).to_numpy(zero_copy_only=False)
    lengths = np.bincount(parents, minlength=len(bags))
    place = runs(0, lengths)
    inside = place < columns
    table = np.zeros((len(bags), columns), np.int32)
    table[parents[inside], place[inside]] = ids[inside]
    cut = Cut(int((lengths > 0).sum()), int((lengths > columns).sum()), int((~inside).sum()))
    return Encoded(table, cut=cut)


def _encode_vectors(values: pa.Array, columns: int) -> Encoded:
    lengths = pc.list_value_length(values).fill_null(0).to_numpy(zero_copy_only=False)
    fits = lengths == columns
    table = np.zeros((len(values), columns), np.float32)
    table[fits] = pc.list_flatten(values.filter(pa.array(fits))).to_numpy(zero_copy_only=False).reshape(-1, columns)
    return Encoded(table, missing=int(((lengths > 0) & ~fits).sum()))
