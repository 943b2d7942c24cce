"""Fixed 64-bit hashes of Arrow columns and rows, vectorised: the same value gives the same hash in every process.

A string's UTF-8 bytes are read as little-endian 8-byte words that are chained through splitmix64's finaliser; the
length enters first, so padding cannot collide.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from bfm.ragged import runs
from bfm.randomness import mix64, stream_key
from bfm.tables.values import per_distinct

_NULL = 0x6E756C6C
_STEP = np.uint64(0x9E3779B97F4A7C15)


def hash_column(values: pa.Array, seed: int = 0) -> np.ndarray:
    """Uint64 [n] hash of a column of strings, numbers, lists or dictionaries of either; nulls share one hash."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        return per_distinct(values, lambda distinct: hash_column(distinct, seed), stream_key(seed, _NULL))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        hashed = _hash_lists(values, seed)
    elif pa.types.is_floating(kind) or pa.types.is_integer(kind):
        bits = values.fill_null(0).to_numpy(zero_copy_only=False)
        if pa.types.is_floating(kind):
            # Adding zero turns -0.0 into 0.0.
            bits = (bits.astype(np.float64) + 0.0).view(np.uint64)
        hashed = mix64(mix64(bits) ^ stream_key(seed))
    else:
        hashed = _hash_strings(values, seed)
    if values.null_count:
        hashed[values.is_null().to_numpy(zero_copy_only=False)] = stream_key(seed, _NULL)
    return hashed


def _hash_lists(values: pa.Array, seed: int) -> np.ndarray:
    offsets = values.offsets.to_numpy().astype(np.int64)
    flat = hash_column(values.values.slice(offsets[0], offsets[-1] - offsets[0]), seed)
    lengths = np.diff(offsets)
    summed = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mix64(flat ^ mix64(runs(0, lengths))), dtype=np.uint64)])
    return mix64(np.diff(summed[offsets - offsets[0]]) ^ mix64(lengths))


def _hash_strings(values: pa.Array, seed: int) -> np.ndarray:
    binary = values.cast(pa.large_string()).cast(pa.large_binary())
    _, offset_buffer, data_buffer = binary.buffers()
    num = len(binary)
    if num == 0:
        return np.zeros(0, np.uint64)
    offsets = np.frombuffer(offset_buffer, np.int64)[binary.offset : binary.offset + num + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    padded = np.zeros(last - first + 8, np.uint8)
    if last > first:
        padded[:-8] = np.frombuffer(data_buffer, np.uint8)[first:last]
    # word_at[b]: the 8 bytes from byte b on, unaligned.
    word_at = np.ndarray((last - first + 1,), "<u8", padded, strides=(1,))
    starts, lengths = offsets[:-1] - first, np.diff(offsets)
    hashed = mix64(lengths.astype(np.uint64) ^ stream_key(seed))
    rows = np.flatnonzero(lengths)
    done = 0
    while len(rows):
        words = word_at[starts[rows] + done]
        left = np.minimum(lengths[rows] - done, 8).astype(np.uint64)
        words &= np.uint64(0xFFFFFFFFFFFFFFFF) >> (np.uint64(64) - left * np.uint64(8))
        hashed[rows] = mix64(hashed[rows] ^ words) + _STEP
        done += 8
        rows = rows[lengths[rows] > done]
    return hashed


def hash_rows(columns: list[pa.Array], seed: int) -> np.ndarray:
    """Uint64 [n] hash of whole rows; the order of the columns matters."""
    hashed = np.full(len(columns[0]), stream_key(seed), np.uint64)
    for column in columns:
        hashed = mix64(hashed ^ hash_column(column, seed)) + _STEP
    return hashed


def moments(user: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Int64 [n]: the place of each row's (user, time) among all distinct ones, in their order; users are small numbers.

    Sorting one whole number is several times quicker than several in turn.
    """
    _, time_rank = np.unique(time, return_inverse=True)
    return np.unique(user.astype(np.int64) * len(time) + time_rank, return_inverse=True)[1]


def order_events(user: np.ndarray, time: np.ndarray, row_hash: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The final order of events, and which places [n] of it repeat the row before.

    By user, time and the hash of the row: equal rows are interchangeable, and that different rows of one user and time
    share 64 bits is not to be expected in any log.
    """
    moment = moments(user, time)
    bits = np.uint64(len(moment).bit_length())
    key = (moment.astype(np.uint64) << (np.uint64(64) - bits)) | (row_hash >> bits)
    order = np.argsort(key)
    if ((np.diff(key[order]) == 0) & (np.diff(row_hash[order]) != 0)).any():
        order = np.lexsort((row_hash, moment))
    repeated = np.zeros(len(order), bool)
    repeated[1:] = np.logical_and.reduce([np.diff(of[order]) == 0 for of in (moment, row_hash)])
    return order, repeated
