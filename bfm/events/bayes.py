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

Shapes: N users, A aisles, M interests or clusters, V items, E events, B baskets, Q queries. last_NA: the item that a
user bought last in an aisle, -1 none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bfm.events.ragged import runs
from bfm.events.randomness import stream_key

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
        rng = np.random.Generator(np.random.Philox(key=int(stream_key(spec.seed, _WORLD_STREAM))))
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

    def draw_histories(self, rng: np.random.Generator, lengths_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Histories of so many events (at least 1), one user after the other; the last basket is cut to fit.

        Returns:
            int32 [E] items, in random order inside a basket, and bool [E]: the event is the first of its basket.
        """
        spec = self.spec
        end_N = np.cumsum(lengths_N)
        next_N = end_N - lengths_N
        items, opens = np.empty(int(lengths_N.sum()), np.int32), np.zeros(int(lengths_N.sum()), np.bool_)
        interest_N = rng.choice(spec.interests, len(lengths_N), p=self.prior_M)
        last_NA = no_purchases(spec, len(lengths_N))
        active = np.arange(len(lengths_N))
        while len(active):
            size = 1 + rng.choice(spec.aisles, len(active), p=self.size_A)
            size = np.minimum(size, end_N[active] - next_N[active])
            shuffled = rng.random((len(active), spec.aisles)).argsort(axis=1)
            aisle_E = shuffled[np.arange(spec.aisles) < size[:, None]]
            user_E = np.repeat(active, size)
            item_E = self._draw(rng, interest_N[user_E], aisle_E, last_NA[user_E, aisle_E])
            last_NA[user_E, aisle_E] = item_E
            opens[next_N[active]] = True
            items[runs(next_N[active], size)] = item_E
            next_N[active] += size
            active = active[next_N[active] < end_N[active]]
            switched = active[rng.random(len(active)) < spec.switch]
            interest_N[switched] = rng.choice(spec.interests, len(switched), p=self.prior_M)
        return items, opens

    def _draw(
        self, rng: np.random.Generator, interest_E: np.ndarray, aisle_E: np.ndarray, last_E: np.ndarray
    ) -> np.ndarray:
        """Items [E] ~ p(i | a, z)."""
        spec = self.spec
        first_E = aisle_E * spec.interests
        leaked_E = rng.random(len(aisle_E)) < self.leak_AM[aisle_E, interest_E]
        start_E = self.start_C[first_E + np.where(leaked_E, 0, interest_E)]
        stop_E = self.start_C[first_E + np.where(leaked_E, spec.interests, interest_E + 1)]
        low_E, high_E = self.cumulative_V[start_E], self.cumulative_V[stop_E]
        place_E = np.searchsorted(self.cumulative_V, low_E + rng.random(len(aisle_E)) * (high_E - low_E), "right") - 1
        # A product that is rounded up must not leave the range.
        place_E = np.clip(place_E, start_E, stop_E - 1)
        return np.where(rng.random(len(aisle_E)) < self.repeat(last_E), last_E, self.order_V[place_E])


class BayesFilter:
    """The optimal predictor of N users side by side: predict, observe a basket, predict, ..."""

    def __init__(self, world: World, num_users: int) -> None:
        """Before the first basket of every user."""
        self.world = world
        self.belief_NM: np.ndarray = np.tile(world.prior_M, (num_users, 1))
        """Over the interest of the next basket."""
        self.last_NA = no_purchases(world.spec, num_users)

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


def filter_at(
    world: World, item_E: np.ndarray, size_B: np.ndarray, first_Q: np.ndarray, basket_Q: np.ndarray
) -> BayesFilter:
    """The optimal predictor of each query, one row each, as it is before a basket.

    Args:
        item_E, size_B: items of all baskets, one basket after the other, and their sizes.
        first_Q, basket_Q: numbers of the first basket of the query's user and of a later one, which is to come.
    """
    first_N, slot_Q = np.unique(first_Q, return_inverse=True)
    known_Q = basket_Q - first_Q
    known_N = np.zeros(len(first_N), np.int64)
    np.maximum.at(known_N, slot_Q, known_Q)
    start_B = np.cumsum(size_B) - size_B
    predictor, asked = BayesFilter(world, len(first_N)), BayesFilter(world, len(first_Q))
    for step in range(int(known_N.max(initial=0)) + 1):
        now = np.flatnonzero(known_Q == step)
        asked.belief_NM[now] = predictor.belief_NM[slot_Q[now]]
        asked.last_NA[now] = predictor.last_NA[slot_Q[now]]
        going_on = np.flatnonzero(known_N > step)
        basket = first_N[going_on] + step
        predictor.observe(going_on, item_E[runs(start_B[basket], size_B[basket])], size_B[basket])
    return asked


def no_purchases(spec: WorldSpec, num_users: int) -> np.ndarray:
    """Int32 [N, A] of users without a history."""
    return np.full((num_users, spec.aisles), -1, np.int32)


def _partition(rng: np.random.Generator, items: int, parts: int) -> np.ndarray:
    """Int64 [V]: a random part of every item; none is empty."""
    part_V = rng.integers(0, parts, items)
    part_V[rng.permutation(items)[:parts]] = np.arange(parts)
    return part_V
