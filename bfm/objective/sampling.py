"""Which items are negatives of a group, and with what probability (arXiv 2606.05257, sampled softmax).

Enters: popularity counts or the in-batch inclusion probabilities of the catalogue, a seed and a group index.
Leaves: inclusion probabilities pi_V (each item's chance to be a candidate of a group) and draws that have exactly
those probabilities. Systematic sampling: lay the probabilities end to end on a line, put a comb of unit spacing with
a uniform offset on it, take the items that are hit; since pi <= 1 no item is hit twice.

V = catalogue items, K = negatives of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bfm.errors import UserError

# Keeps draws of negatives apart from every other use of (seed, index) in the platform.
_STREAM = 0x6E65_6761
_FIXED_SAMPLE = 0x6669_7865


@dataclass(frozen=True)
class Candidates:
    """A fixed set of negatives: distinct item ids, ascending, with the log of their inclusion probabilities."""

    ids_K: NDArray[np.int64]
    log_pi_K: NDArray[np.float64]


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


def draw_systematic(pi_V: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw distinct ids, ascending, so that item i is drawn with probability exactly pi_V[i].

    The number drawn is the sum of pi_V (its floor or ceiling where that is not whole). The order on the line is a
    fresh permutation per draw: a fixed one would make some pairs of items impossible together.
    Raises ValueError for probabilities outside [0, 1].
    """
    if not (np.min(pi_V, initial=0.0) >= 0.0 and np.max(pi_V, initial=0.0) <= 1.0):
        raise ValueError("inclusion probabilities must lie in [0, 1]")
    certain = np.flatnonzero(pi_V == 1.0)
    order = rng.permutation(np.flatnonzero((pi_V > 0.0) & (pi_V < 1.0)))
    edge = np.cumsum(pi_V[order])
    if len(edge):
        # A sum that should be whole misses it by rounding, and the comb's last tooth could then miss or double.
        nearest = np.round(edge[-1])
        total = nearest if abs(edge[-1] - nearest) < 1e-9 * len(edge) else edge[-1]
        edge = np.minimum(edge, total)
        edge[-1] = total
    tooth = np.floor(edge + rng.random())
    drawn = order[np.diff(tooth, prepend=0.0) > 0]
    return np.sort(np.concatenate([certain, drawn])).astype(np.int64)


def fixed_candidates(pi_V: NDArray[np.float64], seed: int) -> Candidates:
    """One seeded draw for evaluation, the same for every model that is scored with (pi_V, seed)."""
    sequence = np.random.SeedSequence([_STREAM, _FIXED_SAMPLE, seed])
    ids_K = draw_systematic(pi_V, np.random.Generator(np.random.Philox(sequence)))
    return Candidates(ids_K, np.log(pi_V[ids_K]))
