"""A mergeable histogram of int64 or float values whose result does not depend on how the values were divided.

Bins are 2^k wide and start at multiples of 2^k; k is the smallest for which at most MAX_BINS bins are occupied. A part
never needs a larger k than the whole, so merging in any order gives the same bins and counts: exact values while they
are few, otherwise a relative resolution of the range of about 1 / MAX_BINS.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_BINS = 1 << 16


@dataclass(frozen=True)
class Histogram:
    """Occupied bins in ascending order: bin b holds the values in [b * 2^shift, (b + 1) * 2^shift)."""

    shift: int
    bins: np.ndarray
    """Int64, strictly ascending."""
    counts: np.ndarray
    """Int64, positive."""

    @classmethod
    def of(cls, values: np.ndarray, weights: np.ndarray | None = None) -> Histogram:
        """Histogram of int64 values, each counted once or with its whole weight."""
        if weights is not None:
            values, weights = values[weights > 0], weights[weights > 0]
        if weights is None or weights.max(initial=1) == 1:
            return _coarsened(0, *np.unique(values.astype(np.int64), return_counts=True))
        return _coarsened(0, values.astype(np.int64), weights.astype(np.int64))

    def merged(self, other: Histogram) -> Histogram:
        """Histogram of the values of both."""
        shift = max(self.shift, other.shift)
        bins = np.concatenate([part.bins >> (shift - part.shift) for part in (self, other)])
        return _coarsened(shift, bins, np.concatenate([self.counts, other.counts]))

    @property
    def total(self) -> int:
        """Values counted."""
        return int(self.counts.sum())

    @property
    def starts(self) -> np.ndarray:
        """Int64: lower end of each bin."""
        return self.bins << self.shift

    def quantiles(self, shares: np.ndarray) -> np.ndarray:
        """Int64: for each share in (0, 1), the start of the first bin up to whose end that share of the values lies."""
        reached = np.cumsum(self.counts)
        wanted = np.ceil(np.asarray(shares) * self.total)
        return self.starts[np.searchsorted(reached, wanted, side="left").clip(0, len(self.bins) - 1)]


def ordered_bits(values: np.ndarray) -> np.ndarray:
    """Float32 values to int64 that sort alike and are dense where floats are."""
    bits = (values.astype(np.float32) + np.float32(0)).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def from_ordered_bits(bits: np.ndarray) -> np.ndarray:
    """Inverse of `ordered_bits`, as float32."""
    raw = np.where(bits < 0, (-bits) | 0x80000000, bits)
    return raw.astype(np.uint32).view(np.float32)


def _coarsened(shift: int, bins: np.ndarray, counts: np.ndarray) -> Histogram:
    """The histogram of counts in bins of any order, equal ones among them."""
    while True:
        bins, place = np.unique(bins, return_inverse=True)
        # Sums of whole numbers below 2^53 are exact.
        summed = np.bincount(place, counts, len(bins)).astype(np.int64)
        if len(bins) <= MAX_BINS:
            return Histogram(shift, bins, summed)
        shift, bins, counts = shift + 1, bins >> 1, summed
