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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bfm.errors import UserError
from bfm.events.clean import BAG_COUNTS, Losses, context_column
from bfm.events.encoding import Encoding
from bfm.events.fields import FittedField, Kind, Side
from bfm.events.hashing import hash_column
from bfm.events.histogram import Histogram, from_ordered_bits, ordered_bits
from bfm.events.items import summed
from bfm.events.schema import MAX_LENGTH
from bfm.ragged import runs
from bfm.tables.values import per_distinct, plain, to_mask

MAX_VALUES = 1 << 16
_FIRST_ID = 2
_NUM_EDGES = 31
_KEPT_TOKENS = 1 << 18
_LEAST_HASH_ROWS = 1 << 10
_TEXT = pa.large_string()
_HASH_SEEDS = (0x68617368_31, 0x68617368_32)


@dataclass(frozen=True)
class Statistics:
    """Mergeable statistics of one column."""

    known: int
    """Weight of the values that are not missing."""
    counts: pa.Table | None = None
    """value (text; vector: an int64 length), count; None for other kinds, and for more than MAX_VALUES categories."""
    longest: int = 0
    """text, list: length of the longest bag."""
    histogram: Histogram | None = None
    """numeric: of the ordered bits of x'."""


def measure(values: pa.Array, kind: str, weights: np.ndarray) -> Statistics:
    """Statistics of a column in the type that `clean.field_values` gives its kind (text may be dictionary-encoded).

    Args:
        weights: int64 [n], how often each value counts (training events of an item; 1 or 0 for an event).
    """
    used = (weights > 0) & to_mask(values.is_valid())
    known = int(weights[used].sum())
    if kind == "time":
        return Statistics(known)
    kept, kept_weights = values.filter(pa.array(used)), weights[used]
    if kind == "numeric":
        numbers = kept.to_numpy(zero_copy_only=False).astype(np.float64)
        squashed = np.sign(numbers) * np.log1p(np.abs(numbers))
        return Statistics(known, histogram=Histogram.of(ordered_bits(squashed), kept_weights))
    if kind == "categorical":
        counts = _count(kept, kept_weights)
        return Statistics(known, counts if counts.num_rows <= MAX_VALUES else None)
    if kind == "vector":
        return Statistics(known, _count(pc.list_value_length(kept), kept_weights))
    bags = _words(kept) if kind == "text" else kept
    parents = pc.list_parent_indices(bags).to_numpy(zero_copy_only=False)
    counts = _count(plain(pc.list_flatten(bags)), kept_weights[parents])
    return Statistics(known, _most_frequent(counts, _KEPT_TOKENS), int(np.bincount(parents).max(initial=0)))


def merge(parts: list[Statistics]) -> Statistics:
    """Statistics of the whole column."""
    counts = [part.counts for part in parts if part.counts is not None]
    histograms = [part.histogram for part in parts if part.histogram is not None]
    return Statistics(
        known=sum(part.known for part in parts),
        counts=summed(pa.concat_tables(counts), ["value"], {"count": "sum"}) if len(counts) == len(parts) else None,
        longest=max(part.longest for part in parts),
        histogram=functools.reduce(Histogram.merged, histograms) if histograms else None,
    )


Fit = tuple[FittedField, pa.Array | None]
"""A field, and the values behind its ids: large strings, entry i with the id i + 2; None where ids are hashed, or there
are none."""


def fit(name: str, side: Side, kind: Kind, statistics: Statistics, max_length: int | None = None) -> Fit:
    """The field as its training values say.

    Args:
        max_length: words or elements that are kept of a value, at most; None: the default of the kind.

    Raises:
        UserError: a vector field without a single vector.
    """
    if kind == "time":
        return FittedField(name, side, "time"), None
    if kind == "numeric":
        return _fit_numbers(name, side, statistics), None
    counts = statistics.counts
    if counts is None or (kind == "categorical" and counts.num_rows > MAX_VALUES):
        return hashed_field(name, side, MAX_VALUES), None
    if kind == "vector":
        if counts.num_rows == 0:
            fix = "remove the field, or check its column and separator"
            raise UserError("has no vector in the training range", key=f"{side}_fields.{name}", fix=fix)
        return FittedField(name, side, "vector", columns=_most_frequent(counts, 1)["value"][0].as_py()), None
    limit = MAX_VALUES if kind == "categorical" else MAX_VALUES - _FIRST_ID
    vocabulary = plain(_most_frequent(counts, limit)["value"])
    longest = 1 if kind == "categorical" else min(statistics.longest, max_length or MAX_LENGTH[kind])
    return FittedField(name, side, kind, rows=len(vocabulary) + _FIRST_ID, columns=max(1, longest)), vocabulary


def hashed_field(name: str, side: Side, rows: int) -> FittedField:
    """A field of two hashes into one table of `rows` (0 missing, 1 unused)."""
    return FittedField(name, side, "hashed", rows=rows, columns=2)


def id_table_rows(num_values: int) -> int:
    """Rows R of the table of V hashed ids: the least power of two that is at least V, and at least 1,024.

    Two hashes of V values on R >= V rows: a row has two values or fewer on average, and about (V / R)^2 <= 1 pairs of
    values share both rows and cannot be told apart, whatever V.
    """
    return max(_LEAST_HASH_ROWS, 1 << max(num_values - 1, 0).bit_length())


def encode(values: pa.Array, field: FittedField, vocabulary: pa.Array | None, losses: Losses) -> np.ndarray:
    """A column (as in `measure`) as the model reads it (see fields.py); what that leaves out is added to `losses`."""
    if field.kind == "numeric":
        return values.fill_null(float("nan")).to_numpy(zero_copy_only=False).astype(np.float32)
    if field.kind == "time":
        # The kind has no missing value; the epoch stands for it.
        losses[field.name, "missing, written as the epoch"] += values.null_count
        return values.fill_null(0).to_numpy(zero_copy_only=False)
    if field.kind == "vector":
        return _encode_vectors(values, field, losses)
    if field.kind == "hashed":
        return per_distinct(values, lambda distinct: _hash_ids(distinct, field.rows), 0)
    assert vocabulary is not None
    if field.kind == "categorical":
        return per_distinct(values, lambda distinct: _ids(distinct, vocabulary), 0)
    return _encode_bags(_words(values) if field.kind == "text" else values, field, vocabulary, losses)


def encode_fields(
    values: Mapping[str, pa.Array], fields: Iterable[FittedField], vocabularies: Mapping[str, pa.Array], losses: Losses
) -> dict[str, np.ndarray]:
    """The columns of several fields, each as in `encode`."""
    return {field.name: encode(values[field.name], field, vocabularies.get(field.name), losses) for field in fields}


def encode_context(table: pa.Table, encoding: Encoding, losses: Losses) -> dict[str, np.ndarray]:
    """The context fields of cleaned rows, encoded."""
    fields = encoding.context_fields
    values = {field.name: table[context_column(field.name)].combine_chunks() for field in fields}
    return encode_fields(values, fields, encoding.vocabularies, losses)


# ---------------------------------------------------------------- inside


def _count(values: pa.Array, weights: np.ndarray) -> pa.Table:
    """value, count: the summed weights of each value."""
    return summed(pa.table({"value": values, "count": weights}), ["value"], {"count": "sum"})


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


def _fit_numbers(name: str, side: Side, statistics: Statistics) -> FittedField:
    if statistics.known == 0 or statistics.histogram is None:
        return FittedField(name, side, "numeric")
    histogram = statistics.histogram
    quantiles = histogram.quantiles(np.arange(1, _NUM_EDGES + 1) / (_NUM_EDGES + 1))
    edges = tuple(np.unique(from_ordered_bits(quantiles)).astype(float).tolist())
    values, shares = from_ordered_bits(histogram.starts).astype(np.float64), histogram.counts / histogram.total
    mean = float(values @ shares)
    std = float(np.sqrt((values - mean) ** 2 @ shares)) if len(values) > 1 else 1.0
    return FittedField(name, side, "numeric", edges=edges, mean=mean, std=std)


def _ids(texts: pa.Array, vocabulary: pa.Array) -> np.ndarray:
    """Int32 [n]."""
    found = pc.index_in(texts, value_set=vocabulary).fill_null(1 - _FIRST_ID).to_numpy(zero_copy_only=False)
    return found + np.int32(_FIRST_ID)


def _hash_ids(texts: pa.Array, rows: int) -> np.ndarray:
    """Int32 [n, 2]."""
    hashes = np.stack([hash_column(texts, seed) for seed in _HASH_SEEDS], axis=1)
    return (hashes % np.uint64(rows - _FIRST_ID)).astype(np.int32) + np.int32(_FIRST_ID)


def _encode_bags(bags: pa.Array, field: FittedField, vocabulary: pa.Array, losses: Losses) -> np.ndarray:
    """Int32 [n, columns]: the first ids of each bag, then zeros."""
    ids = per_distinct(plain(pc.list_flatten(bags)), lambda distinct: _ids(distinct, vocabulary), 0)
    parents = pc.list_parent_indices(bags).to_numpy(zero_copy_only=False)
    lengths = np.bincount(parents, minlength=len(bags))
    place = runs(0, lengths)
    inside = place < field.columns
    table = np.zeros((len(bags), field.columns), np.int32)
    table[parents[inside], place[inside]] = ids[inside]
    for what, flags in zip(BAG_COUNTS, (lengths > 0, lengths > field.columns, ~inside), strict=True):
        losses[field.name, what] += int(flags.sum())
    return table


def _encode_vectors(values: pa.Array, field: FittedField, losses: Losses) -> np.ndarray:
    lengths = pc.list_value_length(values).fill_null(0).to_numpy(zero_copy_only=False)
    fits = lengths == field.columns
    table = np.zeros((len(values), field.columns), np.float32)
    flat = pc.list_flatten(values.filter(pa.array(fits))).to_numpy(zero_copy_only=False)
    table[fits] = flat.reshape(-1, field.columns)
    losses[field.name, "another length"] += int(((lengths > 0) & ~fits).sum())
    return table
