"""Which items stand near which in the training histories: a sparse table of counted pairs, and what it says.

Enters: a shard set's training events, and ways to count (`count_neighbours`; a log of more than MOST_EVENTS is counted
on its first users, whose order is a hash). Leaves: the share of an item among the neighbours of another,

    p(v | u) = w_uv / sum_v w_uv,     w_uv = c_uv / n_v^damping

and the shares that training events would have had, had they not been counted themselves (`left_out`).
c_uv sums lag_decay^(lag - 1) over pairs of training events of one user at most REACH events apart: one where u comes
first, `backward` where v does; u = v counts too (repeats). n_v are training counts. Only the strongest neighbours of an
item are kept.

V = catalogue items, E = training events, P = pairs (of a table: the kept ones), N = looked-up pairs, T = targets,
M = last events before each, J = events around it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bfm.events.shards import Shards
from bfm.ragged import Ragged, begins, chunks, place_in_run, runs

REACH = 10
LAST_EVENTS = 20
"""M: so many of a user's last events point to their neighbours."""
NEIGHBOURS = 100
MOST_EVENTS = 5_000_000
_PASS_PAIRS = 1 << 23
_ROUNDING = 1e-6
_AWAY_J = np.arange(1, REACH + 1)


@dataclass(frozen=True)
class Counting:
    """How pairs are weighted. The constants of both kinds do well on the validation parts of public logs."""

    name: str
    lag_decay: float
    """Per event between the two of a pair."""
    age_decay: float
    """Per event between a context event and the query: of the floor alone, the model learns its own."""
    damping: float
    """Power of an item's training count that a weight is divided by."""
    backward: float
    """Weight of a pair read against time."""

    @property
    def near_J(self) -> NDArray[np.float64]:
        """What a pair of events counts where v stands 1..REACH events after u, then 1..REACH before it."""
        forward = self.lag_decay ** (_AWAY_J - 1.0)
        return np.concatenate([forward, self.backward * forward])


BROAD = Counting("broad", lag_decay=1.0, age_decay=0.9, damping=0.3, backward=0.5)
"""Baskets and long tastes: what stands somewhere near."""
SHARP = Counting("sharp", lag_decay=0.6, age_decay=0.7, damping=0.2, backward=0.3)
"""Orders of events: what comes next."""
COUNTINGS = (BROAD, SHARP)


@dataclass(frozen=True)
class Neighbours:
    """Rows of the item-item table: item u is followed by ids[offsets[u] : offsets[u + 1]], with their counts."""

    lists: Ragged
    count_P: NDArray[np.float32]
    """c_uv."""
    train_counts: NDArray[np.int64]
    """n_v [V]."""
    users: int
    """The first so many users of the shard set were counted."""
    counting: Counting

    @cached_property
    def weight_P(self) -> NDArray[np.float32]:
        """w_uv."""
        return (self.count_P / self.damp(self.train_counts[self.lists.ids])).astype(np.float32)

    @cached_property
    def total_V(self) -> NDArray[np.float64]:
        """Sum of w_uv over the neighbours of every item; 0 where it has none."""
        running = np.concatenate([[0.0], np.cumsum(self.weight_P, dtype=np.float64)])
        return running[self.lists.offsets[1:]] - running[self.lists.offsets[:-1]]

    @cached_property
    def edge_V(self) -> NDArray[np.float32]:
        """The smallest weight in the list of every item whose list is full, 0 elsewhere: less is not listed."""
        edge_V = np.zeros(len(self.lists), np.float32)
        full = np.flatnonzero(np.diff(self.lists.offsets) >= NEIGHBOURS)
        place = self.lists.offsets[full][:, None] + np.arange(NEIGHBOURS)
        edge_V[full] = self.weight_P[place].min(1)
        return edge_V

    def known(self, item: NDArray[np.integer]) -> NDArray[np.int64]:
        """The same items of any shape, -1 in the place of those that have no neighbours."""
        inside = (item >= 0) & (item < len(self.lists))
        return np.where(inside & (self.total_V[np.where(inside, item, 0)] > 0), item, -1)

    def find(self, item_N: NDArray[np.integer], other_N: NDArray[np.integer]) -> NDArray[np.int64]:
        """Places of pairs in the table, -1 where `other` is no neighbour; -1 as an item has none. Shapes broadcast."""
        item_N, other_N = np.broadcast_arrays(item_N, other_N)
        offsets, ids = self.lists.offsets, self.lists.ids
        if len(ids) == 0:
            return np.full(item_N.shape, -1)
        place_N, stop_N = offsets[item_N], np.where(item_N >= 0, offsets[item_N + 1], 0)
        step = 1 << int(np.diff(offsets).max()).bit_length()
        while step := step // 2:
            ahead_N = place_N + step
            before_N = (ahead_N <= stop_N) & (ids[np.minimum(ahead_N, len(ids)) - 1] < other_N)
            place_N = np.where(before_N, ahead_N, place_N)
        found_N = (place_N < stop_N) & (ids[np.minimum(place_N, len(ids) - 1)] == other_N)
        return np.where(found_N, place_N, -1)

    def shares(self, item_N: NDArray[np.integer], other_N: NDArray[np.integer]) -> NDArray[np.float32]:
        """p(other | item), 0 where it is no neighbour; shapes broadcast."""
        place_N = self.find(item_N, other_N)
        return (self._at(self.weight_P, place_N) / np.where(place_N >= 0, self.total_V[item_N], 1.0)).astype(np.float32)

    def spread(self, item_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Places of all neighbours of some items, and the index into `item_N` of each place."""
        start_N = self.lists.offsets[item_N]
        length_N = self.lists.offsets[item_N + 1] - start_N
        return runs(start_N, length_N), np.repeat(np.arange(len(item_N)), length_N)

    def left_out(
        self,
        target_T: NDArray[np.integer],
        last_TM: NDArray[np.integer],
        around_TJ: NDArray[np.integer],
        counted_T: NDArray[np.bool_],
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """What the table says of training events, each target's own event (its pairs, and one of n_v) left out.

        last_TM: items of the user's last events, -1 where there are fewer. around_TJ: items 1..REACH events before the
        target, then 1..REACH after it, -1 where the user has no such training event. counted_T: whether the event was
        counted at all. Returns last_TM with -1 where no neighbours are left, and p(target | last) [T, M].
        """
        target_T1 = target_T[:, None]
        around_TJ = np.where(counted_T[:, None], around_TJ, -1)
        into_J = self.counting.near_J
        out_J = np.concatenate([into_J[REACH:], into_J[:REACH]])
        own_TM = last_TM == target_T1
        lost_TM = ((around_TJ[:, None, :] == last_TM[:, :, None]) @ into_J) * (last_TM >= 0)
        lost_TM += own_TM * ((around_TJ == target_T1) @ out_J)[:, None]

        place_TM = self.find(last_TM, target_T1)
        count_TM = self._at(self.count_P, place_TM) - lost_TM
        # Every pair counts at least into_J.min(): less is rounding, or no neighbour.
        count_TM[count_TM < into_J.min() / 2] = 0.0
        weight_TM = count_TM / self.damp(np.maximum(self.train_counts[target_T1] - counted_T[:, None], 1))
        weight_TM[(lost_TM > 0) & (weight_TM <= self.edge_V[last_TM])] = 0.0

        whole_TM = np.where(last_TM >= 0, self.total_V[last_TM], 0.0)
        total_TM = whole_TM + weight_TM - self._at(self.weight_P, place_TM)
        total_TM -= own_TM * self._given(target_T, around_TJ, out_J, own_TM.any(1))[:, None]
        known_TM = total_TM > _ROUNDING * whole_TM
        share_TM = weight_TM / np.where(known_TM, total_TM, np.inf)
        return np.where(known_TM, last_TM, -1), np.minimum(share_TM, 1.0).astype(np.float32)

    def _given(
        self,
        target_T: NDArray[np.integer],
        around_TJ: NDArray[np.integer],
        out_J: NDArray[np.float64],
        wanted_T: NDArray[np.bool_],
    ) -> NDArray[np.float64]:
        """Weight that the target's event gave to the other items of its own list; 0 where not wanted."""
        given_T = np.zeros(len(target_T))
        target_X1, around_XJ = target_T[wanted_T, None], around_TJ[wanted_T]
        listed_XJ = (around_XJ >= 0) & (around_XJ != target_X1) & (self.find(target_X1, around_XJ) >= 0)
        given_T[wanted_T] = (listed_XJ / self.damp(self.train_counts[around_XJ])) @ out_J
        return given_T

    def damp(self, counts: NDArray[np.integer]) -> NDArray[np.float64]:
        """n^damping."""
        return counts.astype(np.float64) ** self.counting.damping

    @staticmethod
    def _at(values_P: NDArray[np.float32], place_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """Values at places, 0 where the place is -1."""
        values_N = np.zeros(place_N.shape, np.float32)
        values_N[place_N >= 0] = values_P[place_N[place_N >= 0]]
        return values_N

    # ---------------------------------------------------------------- as bytes

    def to_bytes(self) -> bytes:
        """The table as an .npz file; `from_bytes` inverts it."""
        arrays: dict[str, Any] = {
            "ids": self.lists.ids,
            "offsets": self.lists.offsets,
            "count": self.count_P,
            "train_counts": self.train_counts,
            "users": self.users,
            **{f"counting_{name}": value for name, value in asdict(self.counting).items()},
        }
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Neighbours:
        """The table of which these are the bytes."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            found = dict(arrays)
        facts = {name.removeprefix("counting_"): found[name].item() for name in found if name.startswith("counting_")}
        lists = Ragged(found["ids"], found["offsets"])
        return cls(lists, found["count"], found["train_counts"], int(found["users"]), Counting(**facts))


# ---------------------------------------------------------------- counting


def count_neighbours(shards: Shards, countings: Sequence[Counting]) -> list[Neighbours]:
    """The strongest neighbours of every catalogue item, in each way of counting, from one reading of the log.

    Memory: a bounded number of pairs, and the tables themselves.
    """
    num_items, counts_V = shards.num_catalogue, shards.train_counts
    found: list[list[_Lists]] = [[] for _ in countings]
    # No item has more pairs than this; a pass takes a run of items that fits.
    for low, high in chunks(2 * REACH * counts_V, _PASS_PAIRS):
        key_P, times_P = np.unique(np.concatenate(list(_pairs(shards, low, high))), return_counts=True)
        for of_counting, counting in zip(found, countings, strict=True):
            first_P, second_P, count_P = _totals(key_P, times_P, num_items, counting)
            weight_P = count_P / counts_V[second_P].astype(np.float64) ** counting.damping
            of_counting.append(_strongest(first_P - low, second_P, count_P, weight_P, high - low))
    users, tables = counted_users(shards), []
    for of_counting, counting in zip(found, countings, strict=True):
        ids, counts, lengths = (np.concatenate(parts) for parts in zip(*of_counting, strict=True))
        lists = Ragged(ids, np.concatenate([[0], np.cumsum(lengths)]))
        tables.append(Neighbours(lists, counts, counts_V, users, counting))
    return tables


def _totals(
    key_P: NDArray[np.int64], times_P: NDArray[np.int64], num_items: int, counting: Counting
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """First item, second item and c_uv of each distinct pair, ascending."""
    pair_P, kind_P = np.divmod(key_P, 2 * REACH)
    counted_P = counting.near_J[kind_P] * times_P
    starts = np.flatnonzero(begins(pair_P))
    first, second = np.divmod(pair_P[starts], num_items)
    return first, second, np.add.reduceat(counted_P, starts)


_Lists = tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int64]]
"""Neighbours of consecutive items one after the other, their counts, and how many each item has."""


def _strongest(
    row_P: NDArray[np.int64],
    second_P: NDArray[np.int64],
    count_P: NDArray[np.float64],
    weight_P: NDArray[np.float64],
    num_rows: int,
) -> _Lists:
    """The first NEIGHBOURS of each row by weight; row_P rises."""
    # One key instead of two: pairs stand by their row already, a weight below 1 orders inside it.
    order = np.argsort(row_P - weight_P / (2.0 * weight_P.max(initial=1.0)), kind="stable")
    kept = np.sort(order[place_in_run(row_P) < NEIGHBOURS])
    lengths = np.bincount(row_P[kept], minlength=num_rows)
    return second_P[kept].astype(np.int32), count_P[kept].astype(np.float32), lengths


def counted_users(shards: Shards) -> int:
    """The first so many users are counted."""
    return max(1, int(np.searchsorted(shards.train_stops, MOST_EVENTS, side="right")))


def _pairs(shards: Shards, low: int, high: int) -> Iterator[NDArray[np.int64]]:
    """((first * V + second) * 2 + backward) * REACH + lag - 1 of all pairs whose first item lies in low..high-1.

    Each pair of events comes both ways round.
    """
    yield np.zeros(0, np.int64)
    for user_E, _, event_E in shards.user_events(shards.train_events, counted_users(shards)):
        item_E = shards.item_at(event_E).astype(np.int64)
        for lag in range(1, REACH + 1):
            together = user_E[:-lag] == user_E[lag:]
            early, late = item_E[:-lag][together], item_E[lag:][together]
            for backward, (first, second) in enumerate(((early, late), (late, early))):
                wanted = (first >= low) & (first < high)
                pair = first[wanted] * shards.num_catalogue + second[wanted]
                yield (pair * 2 + backward) * REACH + lag - 1
