"""Counter-based randomness: 64-bit mixing of integers, so that every order is a pure function of (seed, indices).

The finaliser is splitmix64's (Steele, Lea and Flood, 2014). It is a bijection: distinct counters give distinct values,
so sorting by them has no ties and does not depend on the sort.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_FEISTEL_ROUNDS = 4


def mix64(values: np.ndarray) -> np.ndarray:
    """Splitmix64's finaliser, elementwise: a bijection of uint64."""
    mixed = values.astype(np.uint64)
    mixed *= _GOLDEN
    shifted = mixed >> np.uint64(30)
    mixed ^= shifted
    mixed *= _FIRST
    mixed ^= np.right_shift(mixed, np.uint64(27), out=shifted)
    mixed *= _SECOND
    mixed ^= np.right_shift(mixed, np.uint64(31), out=shifted)
    return mixed


def stream_key(*words: int) -> np.uint64:
    """One 64-bit key of a tuple of whole numbers (a seed, an epoch, ...)."""
    key = np.zeros(1, np.uint64)
    for word in words:
        key = mix64(key ^ np.uint64(word & 0xFFFFFFFFFFFFFFFF)) + _GOLDEN
    return key[0]


def generator(*words: int) -> np.random.Generator:
    """Random numbers of a tuple of whole numbers."""
    return np.random.Generator(np.random.Philox(key=int(stream_key(*words))))


def keyed(key: np.uint64, values: np.ndarray) -> np.ndarray:
    """Uint64 of each value under a key: distinct where the values are."""
    return mix64(mix64(values) ^ key)


def permuted(key: np.uint64, index_N: np.ndarray, size: int) -> np.ndarray:
    """Where a keyed permutation of 0..size-1 sends each index; int64, no memory beyond the indices.

    A balanced Feistel network over the smallest even number of bits that holds `size`; what lands outside is sent on
    until it lands inside (cycle walking: Black and Rogaway, 2002), less than four times on average.
    """
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    low = (np.uint64(1) << half) - np.uint64(1)
    out_N = index_N.astype(np.uint64)
    outside = np.ones(len(out_N), bool)
    while outside.any():
        left, right = out_N[outside] >> half, out_N[outside] & low
        for turn in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (keyed(key ^ np.uint64(turn), right) & low)
        out_N[outside] = (left << half) | right
        outside = out_N >= size
    return out_N.astype(np.int64)
