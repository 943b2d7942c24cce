"""The world of the synthetic logs, and its Bayes-optimal predictor, computed exactly.

Items lie in A aisles. A user's events come in baskets that share a timestamp. A basket of n items visits n different
aisles, drawn uniformly, so its items are distinct; n = 1..A has probability proportional to (1 - 1 / basket)^(n - 1),
whatever came before. Each user carries a hidden interest z in 1..M that follows z' = z from basket to basket with
probability 1 - switch, else z' ~ prior. Given z, the history before the basket and the aisles, its items are
independent. In aisle a

    p(i | a, z) = r_a * 1{i = c_a} + (1 - r_a) * f(i | a, z)
    f(i | a, z) = (1 - leak) * pop_i * [cluster(i) = z] / P_az + leak * pop_i / P_a,        pop ~ rank^-zipf,

P_a, P_az the sums of pop over the aisle and its part in cluster z (where that is empty, all leaks). c_a is what the
user bought last in the aisle, r_a = repeat where there is any, else 0. A protocol scores a query by the mean over its
distinct targets T, and the best distribution for that is E[1{i in T} / |T|]. Here it does not depend on n, as |T| = n
and an aisle is visited with probability n / A:

    q(i) = p(i | a_i, belief) / A = r 1{i = c_a} / A + pop_i * w,   w a number per aisle and cluster,

the belief over the next z being the forward filter's. So the optimal NLL and recall@k are averages of exact values over
histories, free of the next basket's noise. Baskets of one item (basket = 1) have one aisle and n = 1.

Shapes: U users, N of them, A aisles, M interests or clusters, V items, E events, B baskets. last_NA: the item that a
user bought last in an aisle, -1 none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bfm.randomness import generator

_WORLD_STREAM = 0x3017D
# Aisles per event that an average basket has beyond its first: the law of sizes is cut where 2 % of it are left.
_SPREAD = 4


@dataclass(frozen=True)
class WorldSpec:
    """Parameters of a world; everything else is a function of them."""

    items: int
    seed: int
    interests: int = 16
    switch: float = 0.05
    """Probability that the interest is drawn anew before a basket."""
    repeat: float = 0.3
    """Probability that an item is what the user bought last in its aisle, where there is any."""
    basket: float = 10.0
    """Mean of the geometric law of basket sizes before it is cut at the number of aisles; 1: no baskets."""
    leak: float = 0.1
    """Share of the other events that ignore the interest."""
    zipf: float = 1.0
    """Exponent of the popularity over ranks."""

    @property
    def aisles(self) -> int:
        """A, the largest basket."""
        return min(self.items, 1 + math.ceil(_SPREAD * (self.basket - 1)))


class World:
    """Items, aisles, clusters and popularity of a spec."""

    def __init__(self, spec: WorldSpec) -> None:
        """Draw the world; O(items)."""
        self.spec = spec
        rng = generator(spec.seed, _WORLD_STREAM)
        rank_V = rng.permutation(spec.items)
        popularity_V = (1.0 + rank_V) ** -spec.zipf
        self.popularity_V: np.ndarray = popularity_V / popularity_V.sum()
        self.cluster_V: np.ndarray = _partition(rng, spec.items, spec.interests)
        self.aisle_V: np.ndarray = _partition(rng, spec.items, spec.aisles)
        prior_M = (1.0 + np.arange(spec.interests)) ** -0.5
        self.prior_M: np.ndarray = prior_M / prior_M.sum()
        shape = (spec.aisles, spec.interests)
        cell_V = self.aisle_V * spec.interests + self.cluster_V
        self.mass_AM: np.ndarray = np.bincount(cell_V, self.popularity_V, math.prod(shape)).reshape(shape)
        self.leak_AM: np.ndarray = np.where(self.mass_AM > 0, spec.leak, 1.0)
        self.order_V: np.ndarray = np.lexsort((-self.popularity_V, cell_V))
        """Items by aisle, then cluster, then falling popularity."""
        self.cumulative_V: np.ndarray = np.concatenate([[0.0], np.cumsum(self.popularity_V[self.order_V])])
        """Sums of popularity in that order, [V + 1]."""
        self.start_C: np.ndarray = np.searchsorted(cell_V[self.order_V], np.arange(math.prod(shape) + 1))
        """Where each aisle's part in a cluster begins, [A * M + 1]."""
        # Of f(i | a, z) / pop_i: what every item of aisle a gets under z, and what those of cluster z get beside it.
        self.common_AM: np.ndarray = self.leak_AM / self.mass_AM.sum(axis=1, keepdims=True)
        self.own_AM: np.ndarray = (1 - self.leak_AM) / np.where(self.mass_AM > 0, self.mass_AM, 1.0)
        size_A = (1 - 1 / spec.basket) ** np.arange(spec.aisles)
        self.size_A: np.ndarray = size_A / size_A.sum()
        """Probability of a basket of 1..A items."""

    def likelihood(self, item_E: np.ndarray, last_E: np.ndarray) -> np.ndarray:
        """[E, M]: p(item | its aisle, z), given the last purchase in that aisle."""
        aisle_E, cluster_E = self.aisle_V[item_E], self.cluster_V[item_E]
        fresh_EM = self.common_AM[aisle_E]
        fresh_EM[np.arange(len(item_E)), cluster_E] += self.own_AM[aisle_E, cluster_E]
        fresh_EM *= ((1 - self.repeat(last_E)) * self.popularity_V[item_E])[:, None]
        return fresh_EM + self.spec.repeat * (last_E == item_E)[:, None]

    def repeat(self, last: np.ndarray) -> np.ndarray:
        """r of aisles with these last purchases, of any shape."""
        return np.where(last >= 0, self.spec.repeat, 0.0)

    # ---------------------------------------------------------------- drawing

    def draw_sizes(self, rng: np.random.Generator, lengths_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sizes [B] of the baskets of histories of so many events (at least 1), one user after the other.

        Returns:
            the sizes, a user's last one cut to fit, and int64 [N]: how many baskets each user has.
        """
        start_N = np.cumsum(lengths_N) - lengths_N
        # One size per event is enough; those that would begin behind the history are left out.
        drawn_E = 1 + rng.choice(self.spec.aisles, int(lengths_N.sum()), p=self.size_A)
        begin_E = np.cumsum(drawn_E) - drawn_E
        left_E = np.repeat(lengths_N + begin_E[start_N], lengths_N) - begin_E
        return np.minimum(drawn_E, left_E)[left_E > 0], np.add.reduceat(left_E > 0, start_N, dtype=np.int64)

    def draw_baskets(
        self, rng: np.random.Generator, interest_N: np.ndarray, last_NA: np.ndarray, size_N: np.ndarray
    ) -> np.ndarray:
        """Items [E] of a basket of each user, in random order: aisles, then p(i | a, z)."""
        spec = self.spec
        shuffled_NA = rng.random(last_NA.shape).argsort(axis=1)
        user_E, place_E = np.nonzero(np.arange(spec.aisles) < size_N[:, None])
        aisle_E, interest_E = shuffled_NA[user_E, place_E], interest_N[user_E]
        leaked_E = rng.random(len(aisle_E)) < self.leak_AM[aisle_E, interest_E]
        first_E = aisle_E * spec.interests
        start_E = self.start_C[first_E + np.where(leaked_E, 0, interest_E)]
        stop_E = self.start_C[first_E + np.where(leaked_E, spec.interests, interest_E + 1)]
        low_E, high_E = self.cumulative_V[start_E], self.cumulative_V[stop_E]
        place_E = np.searchsorted(self.cumulative_V, low_E + rng.random(len(aisle_E)) * (high_E - low_E), "right") - 1
        # A product that is rounded up must not leave the range.
        place_E = np.clip(place_E, start_E, stop_E - 1)
        last_E = last_NA[user_E, aisle_E]
        return np.where(rng.random(len(aisle_E)) < self.repeat(last_E), last_E, self.order_V[place_E])


class BayesFilter:
    """The optimal predictor of N users side by side: predict, observe a basket, predict, ..."""

    def __init__(self, world: World, num_users: int) -> None:
        """Before the first basket of every user."""
        self.world = world
        self.belief_NM: np.ndarray = np.tile(world.prior_M, (num_users, 1))
        """Over the interest of the next basket."""
        self.last_NA: np.ndarray = np.full((num_users, world.spec.aisles), -1, np.int32)

    def observe(self, user_N: np.ndarray, item_E: np.ndarray, size_N: np.ndarray) -> None:
        """Take in the next baskets of some users: one basket's items after the other's, size_N (at least 1) of each."""
        world, switch = self.world, self.world.spec.switch
        user_E, aisle_E = np.repeat(user_N, size_N), world.aisle_V[item_E]
        likelihood_EM = world.likelihood(item_E, self.last_NA[user_E, aisle_E])
        # Only ratios count; scaled, products over a basket do not underflow.
        likelihood_EM /= likelihood_EM.max(axis=1, keepdims=True)
        belief_NM = self.belief_NM[user_N] * np.multiply.reduceat(likelihood_EM, np.cumsum(size_N) - size_N, axis=0)
        belief_NM /= belief_NM.sum(axis=1, keepdims=True)
        self.belief_NM[user_N] = (1 - switch) * belief_NM + switch * world.prior_M
        self.last_NA[user_E, aisle_E] = item_E

    def probability(self, users: slice | np.ndarray = slice(None)) -> np.ndarray:
        """[N, V]: q of every item, for all users or some."""
        world, belief_NM, last_NA = self.world, self.belief_NM[users], self.last_NA[users]
        # f of an aisle's items by cluster, over pop, expected under the belief.
        weight_NAM = world.own_AM * belief_NM[:, None, :] + (belief_NM @ world.common_AM.T)[:, :, None]
        weight_NAM *= (1 - world.repeat(last_NA))[:, :, None]
        sum_NV = world.popularity_V * weight_NAM[:, world.aisle_V, world.cluster_V]
        user_X, aisle_X = np.nonzero(last_NA >= 0)
        sum_NV[user_X, last_NA[user_X, aisle_X]] += world.spec.repeat
        return sum_NV / world.spec.aisles


def histories(
    world: World, rng: np.random.Generator, size_B: np.ndarray, baskets_U: np.ndarray
) -> Iterator[tuple[BayesFilter, np.ndarray, np.ndarray, np.ndarray]]:
    """Draw the baskets of users side by side: first all first ones, then all second ones, ...

    Args:
        size_B, baskets_U: as `World.draw_sizes` gives them.

    Yields the predictor as it is before these baskets, their users [N], their numbers [N], and their items [E].
    """
    predictor = BayesFilter(world, len(baskets_U))
    interest_U = rng.choice(world.spec.interests, len(baskets_U), p=world.prior_M)
    first_U = np.cumsum(baskets_U) - baskets_U
    for step in range(int(baskets_U.max(initial=0))):
        user_N = np.flatnonzero(baskets_U > step)
        basket_N = first_U[user_N] + step
        item_E = world.draw_baskets(rng, interest_U[user_N], predictor.last_NA[user_N], size_B[basket_N])
        yield predictor, user_N, basket_N, item_E
        predictor.observe(user_N, item_E, size_B[basket_N])
        switched = user_N[rng.random(len(user_N)) < world.spec.switch]
        interest_U[switched] = rng.choice(world.spec.interests, len(switched), p=world.prior_M)


def _partition(rng: np.random.Generator, items: int, parts: int) -> np.ndarray:
    """Int64 [V]: a random part of every item; none is empty."""
    part_V = rng.integers(0, parts, items)
    part_V[rng.permutation(items)[:parts]] = np.arange(parts)
    return part_V
