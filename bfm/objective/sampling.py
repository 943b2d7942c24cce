"""Which items are negatives of a group, and with what probability (arXiv 2606.05257, sampled softmax).

Enters: popularity counts or the in-batch inclusion probabilities of the catalogue, a seed and a group index.
Leaves: inclusion probabilities pi_V (each item's chance to be a candidate of a group) and draws that have exactly
those probabilities. Systematic sampling: lay the probabilities end to end on a line, put a comb of unit spacing with
a uniform offset on it, take the items that are hit; since pi <= 1 no item is hit twice. The order on the line is
fresh for every draw: a fixed one would make some pairs of items impossible together.

V = catalogue items, K = negatives of a group, F = items that are neither certain nor impossible, P = places on the
line, C = places of one step of a draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bfm.errors import UserError

# Keeps draws of negatives apart from every other use of (seed, index) in the platform.
_STREAM = 0x6E65_6761
_FIXED_SAMPLE = 0x6669_7865
# Places on the line that one step of a draw works on: its arrays stay in the cache.
_PLACES = 1 << 15
_EMPTY, _EMPTY_PLACES = -1, 64


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
class Proposal:
    """Inclusion probabilities ready to be drawn from many times: all that does not depend on the draw.

    A draw passes over the F items whose probability is strictly between 0 and 1 a few thousand at a time, and needs no
    memory but a mark per item and the ids. Few items are put in order by a random permutation. For many that would
    take longer than all the rest: they are permuted once, among empty places, and a draw takes the order
    j -> (a j + b) mod P with random a, b and P a prime. It puts two given items at every distance from each other
    equally often, as a permutation does; the scattered empty places keep equal probabilities from turning a distance
    that is always even into a pair that always or never comes together.
    """

    certain_V: NDArray[np.bool_]
    item_P: NDArray[np.int64]
    pi_P: NDArray[np.float64]
    total: float

    @classmethod
    def of(cls, pi_V: NDArray[np.float64]) -> Proposal:
        """Raises ValueError for probabilities outside [0, 1]."""
        if not (np.min(pi_V, initial=0.0) >= 0.0 and np.max(pi_V, initial=0.0) <= 1.0):
            raise ValueError("inclusion probabilities must lie in [0, 1]")
        free_F = np.flatnonzero((pi_V > 0.0) & (pi_V < 1.0))
        item_P = free_F
        if len(free_F) > _PLACES:
            num_places = _prime_from(len(free_F) + _EMPTY_PLACES)
            place_F = np.random.Generator(np.random.Philox(_STREAM)).permutation(num_places)[: len(free_F)]
            item_P = np.full(num_places, _EMPTY)
            item_P[place_F] = free_F
        pi_P = np.where(item_P == _EMPTY, 0.0, pi_V[item_P])
        # A sum that should be whole misses it by rounding, and the comb's last tooth could then miss or double.
        total = float(pi_P.sum())
        nearest = float(np.round(total))
        total = nearest if abs(total - nearest) < 1e-9 * len(free_F) else total
        return cls(pi_V == 1.0, item_P, pi_P, total)

    def draw(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Distinct ids, ascending; item i is among them with probability exactly pi_V[i].

        Their number is the sum of the probabilities, its floor or ceiling where that is not whole.
        """
        drawn_V, offset, length, places = self.certain_V.copy(), rng.random(), 0.0, 0
        for order_C in self._order(rng):
            edge_C1 = np.concatenate([[length], self.pi_P[order_C]])
            np.cumsum(edge_C1, out=edge_C1)
            length, places = edge_C1[-1], places + len(order_C)
            np.minimum(edge_C1, self.total, out=edge_C1)
            if places == len(self.pi_P):
                edge_C1[-1] = self.total
            edge_C1 += offset
            tooth_C1 = np.floor(edge_C1, out=edge_C1)
            drawn_V[self.item_P[order_C[tooth_C1[1:] > tooth_C1[:-1]]]] = True
        return np.flatnonzero(drawn_V)

    def _order(self, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
        """Every place of the line once; the last one holds an item, for it takes what rounding leaves of the line."""
        prime = len(self.pi_P)
        if prime <= _PLACES:
            yield rng.permutation(prime)
            return
        step, last = int(rng.integers(1, prime)), int(rng.integers(prime))
        while self.item_P[last] == _EMPTY:
            last = int(rng.integers(prime))
        step_C = (np.arange(_PLACES) * step % prime).astype(np.uint64)
        for place in range(0, prime, _PLACES):
            order_C = step_C[: prime - place] + np.uint64(((place + 1) * step + last) % prime)
            # Modulo: below zero an unsigned number is huge.
            np.minimum(order_C, order_C - np.uint64(prime), out=order_C)
            yield order_C.view(np.int64)


def _prime_from(number: int) -> int:
    """The least prime >= number."""
    candidate = max(2, number)
    while any(candidate % factor == 0 for factor in range(2, math.isqrt(candidate) + 1)):
        candidate += 1
    return candidate


def fixed_candidates(pi_V: NDArray[np.float64], seed: int) -> NDArray[np.int64]:
    """One seeded draw for evaluation (ascending ids), the same for every model that is scored with (pi_V, seed).

    pi_V is that of training (`Objective.pi_V`): a fixed sample of what it draws.
    """
    sequence = np.random.SeedSequence([_STREAM, _FIXED_SAMPLE, seed])
    return Proposal.of(pi_V).draw(np.random.Generator(np.random.Philox(sequence)))
