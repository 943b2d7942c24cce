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
        counts = np.ones(len(values), np.int64) if weights is None else weights.astype(np.int64)
        order = np.argsort(values, kind="stable")
        bins, counts = _sum_by_bin(values[order].astype(np.int64), counts[order])
        return _coarsen(0, bins[counts > 0], counts[counts > 0])

    def merged(self, other: Histogram) -> Histogram:
        """Histogram of the values of both."""
        shift = max(self.shift, other.shift)
        bins = np.concatenate([self.bins >> (shift - self.shift), other.bins >> (shift - other.shift)])
        order = np.argsort(bins, kind="stable")
        return _coarsen(shift, *_sum_by_bin(bins[order], np.concatenate([self.counts, other.counts])[order]))

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


def _sum_by_bin(bins: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct bins and their summed counts; `bins` must ascend."""
    if len(bins) == 0:
        return bins, counts
    firsts = np.flatnonzero(np.append(True, bins[1:] != bins[:-1]))
    return bins[firsts], np.add.reduceat(counts, firsts)


def _coarsen(shift: int, bins: np.ndarray, counts: np.ndarray) -> Histogram:
    while len(bins) > MAX_BINS:
        shift += 1
        bins, counts = _sum_by_bin(bins >> 1, counts)
    return Histogram(shift, bins, counts)
