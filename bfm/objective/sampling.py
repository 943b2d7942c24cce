"""Which items are negatives of a group, and with what probability (arXiv 2606.05257, sampled softmax).

Enters: popularity counts or the in-batch inclusion probabilities of the catalogue, a seed and a group index.
Leaves: inclusion probabilities pi_V (each item's chance to be a candidate of a group) and draws that have exactly
those probabilities, at a cost that grows with the draw and not with the catalogue.

A draw has two steps. Items are laid out once in layers of nearly equal pi, an item as long as its pi. First every layer
is cut into cells of equal length, no shorter than any of its items, from an offset that is fresh for every draw; some
cells are drawn without replacement, and a point in each. Every point stands for the same share of its layer, so an
item that holds a point is worth pi on average, and never more than 1, since it reaches into two cells at most. Then
systematic sampling picks from the few items that hold points: in a fresh random order their worths are laid end to end
on a line, which is always as long as all pi together, and a comb of unit spacing takes what it hits.

First-order inclusion is exact and the number of items is fixed. Joint inclusion is not exact, but no pair is left out
(of three items or more): the second step's order is fresh, and the offset puts a cell's boundary between any two items.
On average over pairs it is within a few percent of the product; of neighbours on a layer's line half to five sixths.

V = catalogue items, K = negatives of a group, F = items that are neither certain nor impossible, N = items of a layer,
M = points of a layer, C = items that the second step picks from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bfm.errors import UserError
from bfm.ragged import begins

# Keeps draws of negatives apart from every other use of (seed, index) in the platform.
_STREAM = 0x6E65_6761
_FIXED_SAMPLE = 0x6669_7865
# Layers with fewer items are taken whole into the second step; of others at least so many points are drawn.
_FEW_ITEMS, _LEAST_POINTS = 64, 8


def group_rng(seed: int, group_index: int) -> np.random.Generator:
    """The generator of one group's draws: a pure function of (seed, group index), both non-negative."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([_STREAM, seed, group_index])))


def drawn_inclusion(popularity_V: NDArray[np.integer], num_negatives: int, exponent: float) -> NDArray[np.float64]:
    """pi = min(1, c * popularity^exponent) with c such that pi sums to num_negatives.

    Raises UserError where num_negatives is below 1 or above the number of items, ValueError for a popularity that is
    not positive (such an item could never be drawn, so no correction would exist for it).
    """
    num_items = len(popularity_V)
    if not 1 <= num_negatives <= num_items:
        raise UserError(
            f"{num_negatives:,} negatives cannot be drawn from a catalogue of {num_items:,} items",
            key="negatives",
            fix=f"use 1 to {num_items:,}",
        )
    if np.min(popularity_V) <= 0:
        raise ValueError("popularity must be positive for every item of the catalogue")
    if num_negatives == num_items:
        return np.ones(num_items)
    log_weight_V = exponent * np.log(np.asarray(popularity_V, dtype=np.float64))
    weight_V = np.exp(log_weight_V - log_weight_V.max())
    # With the m heaviest items certain, the rest share K - m in proportion; m is the least that leaves no pi above 1.
    falling_V = np.sort(weight_V)[::-1]
    rest_V = np.cumsum(falling_V[::-1])[::-1]
    num_certain_m = np.arange(num_negatives)
    factor_m = (num_negatives - num_certain_m) / rest_V[:num_negatives]
    num_certain = int(np.argmax(factor_m * falling_V[:num_negatives] <= 1.0))
    return np.minimum(1.0, factor_m[num_certain] * weight_V)


def mix_inclusion(pi_batch_V: NDArray[np.float64], pi_drawn_V: NDArray[np.float64]) -> NDArray[np.float64]:
    """Chance to be in the union of two independent samples: 1 - (1 - pi_batch)(1 - pi_drawn)."""
    # This form keeps small probabilities exact where 1 - (1 - a)(1 - b) cancels.
    return pi_batch_V + pi_drawn_V * (1.0 - pi_batch_V)


@dataclass(frozen=True)
class _Layer:
    """Items whose pi is within a factor of two, end to end on a line."""

    item_N: NDArray[np.int64]
    end_N: NDArray[np.float64]
    """Where each item ends: sums of pi."""
    first_N: NDArray[np.int32]
    """The item at each N-th of the line: where the search for a point begins, at most a few items before it."""
    cells: int
    points: int
    """At most as many as cells, and at least twice the layer's length: an item with two of them is worth 1 or less."""

    @classmethod
    def of(cls, item_N: NDArray[np.int64], pi_N: NDArray[np.float64]) -> _Layer | None:
        """None where they are few, or a draw would take up most of them."""
        if len(item_N) < _FEW_ITEMS:
            return None
        end_N = np.cumsum(pi_N)
        cells, points = int(end_N[-1] / pi_N.max()), max(_LEAST_POINTS, math.ceil(2 * end_N[-1]))
        if cells < points:
            return None
        nth_N = np.arange(len(item_N)) * (end_N[-1] / len(item_N))
        return cls(item_N, end_N, np.searchsorted(end_N, nth_N, side="right").astype(np.int32), cells, points)

    def draw(self, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The items that hold points, and what they are worth."""
        length = self.end_N[-1]
        cell_M = rng.choice(self.cells, self.points, replace=False, shuffle=False)
        place_M = (cell_M + rng.random(self.points) + rng.random()) * (length / self.cells)
        place_M -= length * (place_M >= length)
        place_M.sort()
        index_M = self._item_at(place_M)
        first_C = np.flatnonzero(begins(index_M))
        return self.item_N[index_M[first_C]], np.diff(first_C, append=self.points) * (length / self.points)

    def _item_at(self, place_M: NDArray[np.float64]) -> NDArray[np.int64]:
        """The first item that ends behind each place; as np.searchsorted, in a few steps."""
        last = len(self.item_N) - 1
        nth_M = (place_M * (len(self.item_N) / self.end_N[-1])).astype(np.int64)
        # Rounding may put a place on the line's end, or an item too far.
        index_M = self.first_N[np.minimum(nth_M, last)].astype(np.int64)
        while (before_M := (self.end_N[index_M] <= place_M) & (index_M < last)).any():
            index_M += before_M
        return index_M


@dataclass(frozen=True)
class Proposal:
    """Inclusion probabilities ready to be drawn from many times: all that does not depend on the draw.

    It takes three numbers per item, a draw a few per negative.
    """

    certain: NDArray[np.int64]
    """Ids with pi = 1."""
    item_C: NDArray[np.int64]
    """Ids of items that every draw's second step takes in, and their pi: the likely ones, and those with few alike."""
    pi_C: NDArray[np.float64]
    layers: tuple[_Layer, ...]
    total: float
    """Of all pi that are neither 0 nor 1."""

    @classmethod
    def of(cls, pi_V: NDArray[np.float64]) -> Proposal:
        """Raises ValueError for probabilities outside [0, 1]."""
        if not (np.min(pi_V, initial=0.0) >= 0.0 and np.max(pi_V, initial=0.0) <= 1.0):
            raise ValueError("inclusion probabilities must lie in [0, 1]")
        free_F = np.flatnonzero((pi_V > 0.0) & (pi_V < 1.0))
        octave_F = np.frexp(pi_V[free_F])[1].astype(np.int16)
        order_F = octave_F.argsort(kind="stable")
        _, first = np.unique(octave_F[order_F], return_index=True)
        items = np.split(free_F[order_F], first[1:])
        layers = [_Layer.of(item_N, pi_V[item_N]) for item_N in items]
        few = [item_N for item_N, layer in zip(items, layers, strict=True) if layer is None]
        item_C = np.concatenate([free_F[:0], *few])
        # A sum that should be whole misses it by rounding, and the comb's last tooth could then miss or double.
        total = float(pi_V[free_F].sum())
        nearest = float(np.round(total))
        total = nearest if abs(total - nearest) < 1e-9 * len(free_F) else total
        return cls(np.flatnonzero(pi_V == 1.0), item_C, pi_V[item_C], tuple(filter(None, layers)), total)

    def draw(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Distinct ids, ascending; item i is among them with probability exactly pi_V[i].

        Their number is the sum of the probabilities, its floor or ceiling where that is not whole.
        """
        drawn = [(self.item_C, self.pi_C), *(layer.draw(rng) for layer in self.layers)]
        item_C, worth_C = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
        order_C = rng.permutation(len(item_C))
        edge_C1 = np.concatenate([[0.0], np.cumsum(worth_C[order_C])])
        np.minimum(edge_C1, self.total, out=edge_C1)
        # The last item takes what rounding leaves of the line.
        edge_C1[1:][-1:] = self.total
        tooth_C1 = np.floor(edge_C1 + rng.random())
        picked = item_C[order_C[tooth_C1[1:] > tooth_C1[:-1]]]
        return np.sort(np.concatenate([self.certain, picked]))


def fixed_candidates(pi_V: NDArray[np.float64], seed: int) -> NDArray[np.int64]:
    """One seeded draw for evaluation (ascending ids), the same for every model that is scored with (pi_V, seed).

    pi_V is that of training (`Objective.pi_V`): a fixed sample of what it draws.
    """
    sequence = np.random.SeedSequence([_STREAM, _FIXED_SAMPLE, seed])
    return Proposal.of(pi_V).draw(np.random.Generator(np.random.Philox(sequence)))
