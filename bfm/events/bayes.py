"""The world of the synthetic logs, and its Bayes-optimal predictor, computed exactly.

Each user carries a hidden interest z in 1..M that follows z' = z with probability 1 - switch, else z' ~ prior.
An event repeats one of the user's last `recent` events with probability `repeat` (uniformly over those events), else

    p(i | z) = (1 - leak) * pop_i * [cluster(i) = z] / P_z + leak * pop_i,      P_z = sum of pop over cluster z,

with pop ~ rank^-zipf. So given the belief b over the next z, the predictive of item i is

    p(i) = r * count_i / n + pop_i * w_cluster(i),     w_c = (1 - r) * ((1 - leak) * b_c / P_c + leak),

where count_i is its number among the last n events, and b is the forward filter's. The conditional entropy and the mass
of the k most probable items follow in O(M + recent) and O(M * (k + recent)) per prediction, so the optimal NLL and
recall@k are averages of exact values over histories, free of the next item's noise.

Shapes: N users, M interests, V items, W recent events, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bfm.events.mixing import stream_key

_WORLD_STREAM = 0x3017D


@dataclass(frozen=True)
class WorldSpec:
    """Parameters of a world; everything else is a function of them."""

    items: int
    seed: int
    interests: int = 16
    switch: float = 0.05
    """Probability that the interest is drawn anew before an event."""
    repeat: float = 0.25
    """Probability that an event repeats a recent one."""
    recent: int = 5
    """How many of the last events can be repeated."""
    leak: float = 0.1
    """Share of the other events that ignore the interest."""
    zipf: float = 1.0
    """Exponent of the popularity over ranks."""


class World:
    """Items, clusters and popularity of a spec."""

    def __init__(self, spec: WorldSpec) -> None:
        """Draw the world; O(items)."""
        self.spec = spec
        rng = np.random.Generator(np.random.Philox(key=int(stream_key(spec.seed, _WORLD_STREAM))))
        rank_V = rng.permutation(spec.items)
        popularity_V = (1.0 + rank_V) ** -spec.zipf
        self.popularity_V: np.ndarray = popularity_V / popularity_V.sum()
        cluster_V = rng.integers(0, spec.interests, spec.items)
        # No cluster may be empty.
        cluster_V[rng.permutation(spec.items)[: spec.interests]] = np.arange(spec.interests)
        self.cluster_V: np.ndarray = cluster_V
        prior_M = (1.0 + np.arange(spec.interests)) ** -0.5
        self.prior_M: np.ndarray = prior_M / prior_M.sum()
        self.mass_M: np.ndarray = np.bincount(cluster_V, self.popularity_V, spec.interests)
        log_V = self.popularity_V * np.log(self.popularity_V)
        self.log_mass_M: np.ndarray = np.bincount(cluster_V, log_V, spec.interests)
        self.order_V: np.ndarray = np.lexsort((-self.popularity_V, cluster_V))
        """Items by cluster, then by falling popularity."""
        self.cumulative_V: np.ndarray = np.cumsum(self.popularity_V[self.order_V])
        self.start_M: np.ndarray = np.searchsorted(cluster_V[self.order_V], np.arange(spec.interests + 1))

    @cached_property
    def marginal_nll(self) -> float:
        """Entropy of an event's marginal in nats: the best NLL of a predictor that ignores the history."""
        weight_M = (1 - self.spec.leak) * self.prior_M / self.mass_M + self.spec.leak
        return float(-np.sum(_plogp(weight_M) * self.mass_M + weight_M * self.log_mass_M))

    def head(self, depth: int) -> np.ndarray:
        """Int64 [M, depth]: the most popular items of each cluster; -1 where a cluster is smaller."""
        place = self.start_M[:-1, None] + np.arange(depth)
        inside = place < self.start_M[1:, None]
        return np.where(inside, self.order_V[np.minimum(place, self.spec.items - 1)], -1)

    def draw(self, rng: np.random.Generator, interest_N: np.ndarray) -> np.ndarray:
        """Items [N] given the interests, no repeats."""
        ends = np.concatenate([[0.0], self.cumulative_V])[self.start_M]
        low_N, high_N = ends[interest_N], ends[interest_N + 1]
        leaked_N = rng.random(len(interest_N)) < self.spec.leak
        low_N, high_N = np.where(leaked_N, 0.0, low_N), np.where(leaked_N, self.cumulative_V[-1], high_N)
        place_N = np.searchsorted(self.cumulative_V, low_N + rng.random(len(interest_N)) * (high_N - low_N), "right")
        return self.order_V[np.minimum(place_N, self.spec.items - 1)]

    def draw_histories(self, rng: np.random.Generator, lengths_N: np.ndarray) -> np.ndarray:
        """Items of all events, one user after the other (lengths at least 1)."""
        spec = self.spec
        by_length = np.argsort(-lengths_N, kind="stable")
        falling = lengths_N[by_length]
        first_N = (np.cumsum(lengths_N) - lengths_N)[by_length]
        items = np.empty(int(lengths_N.sum()), np.int32)
        interest_N = rng.choice(spec.interests, len(lengths_N), p=self.prior_M)
        recent_NW = np.zeros((len(lengths_N), spec.recent), np.int32)
        for step in range(int(falling[0])):
            active = int(np.searchsorted(-falling, -step, side="left"))
            if step:
                switched = np.flatnonzero(rng.random(active) < spec.switch)
                interest_N[switched] = rng.choice(spec.interests, len(switched), p=self.prior_M)
            drawn = self.draw(rng, interest_N[:active]).astype(np.int32)
            if step:
                repeated = np.flatnonzero(rng.random(active) < spec.repeat)
                which = rng.integers(0, min(step, spec.recent), len(repeated))
                drawn[repeated] = recent_NW[repeated, which]
            recent_NW[:active, step % spec.recent] = drawn
            items[first_N[:active] + step] = drawn
        return items


class BayesFilter:
    """The optimal predictor of N users side by side: predict, observe, predict, ..."""

    def __init__(self, world: World, num_users: int) -> None:
        """Before the first event of every user."""
        self.world, self.step = world, 0
        self.belief_NM: np.ndarray = np.tile(world.prior_M, (num_users, 1))
        """Belief over the interest of the next event."""
        self.recent_NW: np.ndarray = np.full((num_users, world.spec.recent), -1)

    def observe(self, item_N: np.ndarray) -> None:
        """Take in the next event of each user that goes on; the first len(item_N) users do, the others are dropped."""
        spec, world = self.world.spec, self.world
        belief_NM, self.recent_NW = self.belief_NM[: len(item_N)], self.recent_NW[: len(item_N)]
        cluster_N = world.cluster_V[item_N]
        fresh_NM = np.full(belief_NM.shape, spec.leak)
        fresh_NM[np.arange(len(item_N)), cluster_N] += (1 - spec.leak) / world.mass_M[cluster_N]
        count_N = (self.recent_NW == item_N[:, None]).sum(axis=1)
        likelihood_NM = (1 - self._repeat) * world.popularity_V[item_N][:, None] * fresh_NM
        likelihood_NM += (self._repeat * count_N / self._memory)[:, None]
        belief_NM = belief_NM * likelihood_NM
        belief_NM /= belief_NM.sum(axis=1, keepdims=True)
        self.belief_NM = (1 - spec.switch) * belief_NM + spec.switch * world.prior_M
        self.recent_NW[:, self.step % spec.recent] = item_N
        self.step += 1

    def subset(self, rows: np.ndarray) -> BayesFilter:
        """The predictor of some of the users, to look at (copies)."""
        other = BayesFilter(self.world, 0)
        other.step, other.belief_NM, other.recent_NW = self.step, self.belief_NM[rows], self.recent_NW[rows]
        return other

    @property
    def _repeat(self) -> float:
        return self.world.spec.repeat if self.step else 0.0

    @property
    def _memory(self) -> int:
        return max(min(self.step, self.world.spec.recent), 1)

    def _weight(self) -> np.ndarray:
        """[N, M]: what multiplies an item's popularity in its predictive, by cluster."""
        spec = self.world.spec
        return (1 - self._repeat) * ((1 - spec.leak) * self.belief_NM / self.world.mass_M + spec.leak)

    def _recent(self, weight_NM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[N, W], [N, W]: predictive of recent items without and with repeats; zero where empty or doubled."""
        recent_NW = self.recent_NW
        same_NWW = recent_NW[:, :, None] == recent_NW[:, None, :]
        earlier_NW = np.any(same_NWW & np.tri(recent_NW.shape[1], k=-1, dtype=bool), axis=2)
        kept_NW = (recent_NW >= 0) & ~earlier_NW
        item_NW = np.maximum(recent_NW, 0)
        fresh_NW = self.world.popularity_V[item_NW] * np.take_along_axis(weight_NM, self.world.cluster_V[item_NW], 1)
        full_NW = fresh_NW + self._repeat * same_NWW.sum(axis=2) / self._memory
        return np.where(kept_NW, fresh_NW, 0.0), np.where(kept_NW, full_NW, 0.0)

    def probability(self, item_NK: np.ndarray) -> np.ndarray:
        """[N, K]: predictive probability of any items [N, K]."""
        weight_NK = np.take_along_axis(self._weight(), self.world.cluster_V[item_NK], 1)
        count_NK = (self.recent_NW[:, None, :] == item_NK[:, :, None]).sum(axis=2)
        return self.world.popularity_V[item_NK] * weight_NK + self._repeat * count_NK / self._memory

    def entropy(self) -> np.ndarray:
        """[N] nats: expected NLL of the optimal prediction of the next item."""
        weight_NM = self._weight()
        fresh_NW, full_NW = self._recent(weight_NM)
        smooth_N = -(_plogp(weight_NM) @ self.world.mass_M) - weight_NM @ self.world.log_mass_M
        return smooth_N + (_plogp(fresh_NW) - _plogp(full_NW)).sum(axis=1)

    def top_mass(self, k: int) -> np.ndarray:
        """[N]: expected recall@k of the optimal prediction = mass of its k most probable items."""
        weight_NM = self._weight()
        _, full_NW = self._recent(weight_NM)
        # The k best items that are not recent lie among each cluster's k + recent most popular ones.
        head_K = self.world.head(k + self.world.spec.recent).ravel()
        head_K = head_K[head_K >= 0]
        mass_NK = self.world.popularity_V[head_K] * weight_NM[:, self.world.cluster_V[head_K]]
        for column in range(self.recent_NW.shape[1]):
            mass_NK[self.recent_NW[:, column, None] == head_K] = 0.0
        mass_NK = np.concatenate([mass_NK, full_NW], axis=1)
        kept = min(k, mass_NK.shape[1])
        return -np.partition(-mass_NK, kept - 1, axis=1)[:, :kept].sum(axis=1)


def _plogp(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values * np.log(np.where(values > 0, values, 1.0)), 0.0)
