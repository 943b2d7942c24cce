"""Packed windows of L events, negative groups of G windows, and their global order; packed contexts of queries.

The training stream: users as the shards hold them (their order is a hash), each user's training events one after the
other. It is cut into W windows of L positions, the last one padded. An epoch is a permutation of the windows, a pure
function of (seed, epoch, place) that is computed place by place. Window i of the endless order is place i % W of epoch
i // W, and group g is windows g*G .. (g+1)*G - 1. So the windows of a group are of unrelated users, and the cursor of a
run is one integer, the index of the next group, whatever the number of workers.

Every event that follows one of its user's is a target. It is predicted either from the event before it (`next_event`)
or, as headline queries are, from the last event at an earlier time (`next_basket`): all items of a basket from where
the basket before it ended. A basket of n targets then weighs n^power in the loss: one at power 0, as each is one query
of the headline NLL, n at power 1. Between them lies what also ranks the items of large baskets well.

Shapes: R rows (windows), L positions, N events, Q queries, M last events (neighbours.py), J events around a target.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from bfm.events.neighbours import LAST_EVENTS, REACH, Neighbours
from bfm.events.protocol import QueryTable
from bfm.events.shards import Shards
from bfm.ragged import begins, place_among_equal, place_in_run, runs
from bfm.randomness import permuted, stream_key

_ORDER_STREAM = 0x0DE2
_ORDER_BLOCK = 1024
"""Windows of the order that are computed together: one by one they would take as long as reading them."""
Targets = Literal["next_basket", "next_event"]


@dataclass(frozen=True)
class Windows:
    """R rows of L positions; a negative group is R = G rows."""

    item_RL: np.ndarray
    """Int32 item ids; -1 where padded."""
    target_RL: np.ndarray
    """Int32 item id of the user's next training event; -1 where there is none."""
    segment_RL: np.ndarray
    """Int32; equal number = same user inside the row, counted from 0; -1 where padded."""
    query_RL: np.ndarray
    """Int32 column from which the position's target is predicted."""
    weight_RL: np.ndarray
    """Float32 weight of the position's target in the loss; 0 where there is none."""
    later_RL: np.ndarray
    """Bool: the target has a later timestamp than the position (False where there is no target)."""
    time_RL: np.ndarray
    """Int64 milliseconds or positions; 0 where padded."""
    gap_RL: np.ndarray
    """Float32 seconds (or positions) since the user's previous event; 0 for a user's first event."""
    context: dict[str, np.ndarray]
    """Encoded context fields, leading dimensions R, L; missing where padded."""
    counted: Counted | None = None
    """Where neighbours were asked for."""


@dataclass(frozen=True)
class Counted:
    """The last M events at the query of every position, the latest first, that have counted neighbours."""

    item_RLM: np.ndarray
    """Int64 item ids; -1 where the window holds no such event of the user, or it has no neighbours."""
    share_RLM: np.ndarray
    """Float32 p(target | item), counted without the target's own event; 0 where there is no target."""


@dataclass(frozen=True)
class EvalWindows:
    """Contexts of Q queries packed into rows. Query q reads the model's output at (row[q], column[q])."""

    windows: Windows
    """Targets are all -1; later is True at headline queries, False at basket queries, the true bit elsewhere."""
    row: np.ndarray
    """Int64 [Q]."""
    column: np.ndarray
    """Int64 [Q]."""


class WindowOrder:
    """The endless order of training windows and groups of one (shard set, L, G, seed)."""

    def __init__(
        self,
        shards: Shards,
        window: int,
        group_windows: int,
        seed: int,
        neighbours: Neighbours | None = None,
        targets: Targets = "next_event",
        basket_power: float = 0.0,
    ) -> None:
        """`window` (L) and `group_windows` (G) are at least 1; with `neighbours`, windows come with what they say.

        `basket_power` is of targets that are whole baskets.

        Raises:
            ValueError: L or G below 1, or a shard set without training events.
        """
        if window < 1 or group_windows < 1:
            raise ValueError(f"window {window} and group_windows {group_windows} must be at least 1")
        if shards.manifest.train_events < 1:
            raise ValueError(f"{shards.path}: no training events")
        self.shards, self.window, self.group_windows, self.seed = shards, window, group_windows, seed
        self.neighbours, self.targets, self.basket_power = neighbours, targets, basket_power

    @property
    def windows_per_epoch(self) -> int:
        """W: windows that hold every training event once."""
        return self.shards.manifest.windows_per_epoch(self.window)

    @property
    def targets_per_epoch(self) -> int:
        """Training positions with a target, once each."""
        return self.shards.manifest.train_targets

    def groups(self, indices: Sequence[int]) -> Windows:
        """The windows of groups (each from 0, endless), one group after the other."""
        index_R = np.repeat(np.asarray(indices) * self.group_windows, self.group_windows)
        index_R += np.tile(np.arange(self.group_windows), len(indices))
        first, last = int(index_R.min()) // _ORDER_BLOCK, int(index_R.max()) // _ORDER_BLOCK
        order = np.concatenate([_ordered(self.seed, self.windows_per_epoch, block) for block in range(first, last + 1)])
        return self.windows(order[index_R - first * _ORDER_BLOCK])

    def windows(self, window_R: np.ndarray) -> Windows:
        """Windows by their number in the stream, 0..W-1."""
        pieces = self._pieces(window_R)
        windows = _read(self.shards, pieces, len(window_R), self.window)
        if self.targets == "next_basket":
            windows = _from_the_basket_before(windows, self.basket_power)
        if self.neighbours is None:
            return windows
        target_N = windows.target_RL.ravel()[pieces.places] >= 0
        event_T, first_T, stop_T, user_T = (
            of_N[target_N]
            for of_N in (pieces.events, *map(pieces.each, (pieces.first_P, pieces.stop_P, pieces.user_P)))
        )
        around_TJ = _items_around(self.shards, event_T, first_T, stop_T)
        left_out = _left_out(self.neighbours, windows, around_TJ, user_T < self.neighbours.users)
        return dataclasses.replace(windows, counted=left_out)

    def _pieces(self, window_R: np.ndarray) -> _Pieces:
        """The users of windows."""
        shards, begin_R = self.shards, window_R * self.window
        stop_R = np.minimum(begin_R + self.window, shards.manifest.train_events)
        first_user_R = np.searchsorted(shards.train_stops, begin_R, side="right")
        users_R = np.searchsorted(shards.train_stops, stop_R - 1, side="right") - first_user_R + 1
        row_P, user_P = np.repeat(np.arange(len(window_R)), users_R), runs(first_user_R, users_R)
        train_P, until_P = shards.train_lengths[user_P], shards.train_stops[user_P]
        from_P = np.maximum(begin_R[row_P], until_P - train_P)
        length_P = np.minimum(stop_R[row_P], until_P) - from_P
        some_P = length_P > 0
        row_P, user_P, from_P, length_P = (of_P[some_P] for of_P in (row_P, user_P, from_P, length_P))
        first_P = shards.user_starts[user_P]
        stop_P = first_P + train_P[some_P]
        return _Pieces(
            event_P=stop_P - (until_P[some_P] - from_P),
            length_P=length_P,
            place_P=row_P * self.window + from_P - begin_R[row_P],
            segment_P=place_in_run(row_P),
            user_P=user_P,
            first_P=first_P,
            stop_P=stop_P,
        )


@lru_cache(maxsize=4)
def _ordered(seed: int, windows_per_epoch: int, block: int) -> np.ndarray:
    """Numbers of the windows block * _ORDER_BLOCK, ... of the endless order."""
    epoch_B, place_B = np.divmod(np.arange(block * _ORDER_BLOCK, (block + 1) * _ORDER_BLOCK), windows_per_epoch)
    window_B = np.empty_like(place_B)
    for epoch in range(int(epoch_B[0]), int(epoch_B[-1]) + 1):
        here = epoch_B == epoch
        key = stream_key(seed, _ORDER_STREAM, epoch)
        window_B[here] = permuted(key, place_B[here], windows_per_epoch)
    return window_B


@dataclass(frozen=True)
class _Pieces:
    """P runs of neighbouring events of a user each, in their places among windows; N events of all of them."""

    event_P: np.ndarray
    """Global index of the first event."""
    length_P: np.ndarray
    place_P: np.ndarray
    """Flat index r * L + l of the first event."""
    segment_P: np.ndarray
    user_P: np.ndarray
    first_P: np.ndarray
    """Global index of the user's first event."""
    stop_P: np.ndarray
    """Global index after the user's last event that may be known."""

    @cached_property
    def events(self) -> np.ndarray:
        """Global index of every event [N]."""
        return runs(self.event_P, self.length_P)

    @cached_property
    def places(self) -> np.ndarray:
        """Flat index r * L + l of every event [N]."""
        return runs(self.place_P, self.length_P)

    def each(self, of_P: np.ndarray) -> np.ndarray:
        """What is said of pieces, of their events [N]."""
        return np.repeat(of_P, self.length_P)


def _read(shards: Shards, pieces: _Pieces, rows: int, length: int) -> Windows:
    """Windows whose events are these, and whose targets are the events after them, as far as they may be known."""
    event_N, place_N = pieces.events, pieces.places
    # An event of the user more at either side of every piece: what came before, and what follows.
    around_E = runs(pieces.event_P - 1, pieces.length_P + 2)
    np.clip(around_E, 0, shards.manifest.events - 1, out=around_E)
    item_E, time_E = shards.item_at(around_E), shards.time_at(around_E)
    inside_N = np.arange(len(event_N)) + 1 + 2 * pieces.each(np.arange(len(pieces.length_P)))
    time_N = time_E[inside_N]
    last_P = np.cumsum(pieces.length_P) - 1
    target_N, later_N = item_E[inside_N + 1], time_E[inside_N + 1] > time_N
    unknown_N = last_P[pieces.event_P + pieces.length_P >= pieces.stop_P]
    target_N[unknown_N], later_N[unknown_N] = -1, False
    gap_N = (time_N - time_E[inside_N - 1]).astype(np.float64)
    gap_N[(last_P - pieces.length_P + 1)[pieces.event_P == pieces.first_P]] = 0.0
    if shards.manifest.has_clock:
        gap_N /= 1000.0
    in_order = len(place_N) == rows * length and bool((np.diff(pieces.place_P) > 0).all())

    def spread(values: np.ndarray, pad: float, dtype: type) -> np.ndarray:
        if in_order:
            return values.astype(dtype, copy=False).reshape(rows, length, *values.shape[1:])
        out = np.full((rows * length, *values.shape[1:]), pad, dtype)
        out[place_N] = values
        return out.reshape(rows, length, *values.shape[1:])

    context = {}
    for field in shards.context_fields:
        values = shards.context_at(field.name, event_N)
        context[field.name] = spread(values, np.nan if field.kind == "numeric" else 0, values.dtype.type)
    return Windows(
        item_RL=spread(item_E[inside_N], -1, np.int32),
        target_RL=spread(target_N, -1, np.int32),
        segment_RL=spread(pieces.each(pieces.segment_P), -1, np.int32),
        query_RL=np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        weight_RL=spread(target_N >= 0, 0.0, np.float32),
        later_RL=spread(later_N, False, np.bool_),
        time_RL=spread(time_N, 0, np.int64),
        gap_RL=spread(gap_N, 0.0, np.float32),
        context=context,
    )


def _from_the_basket_before(windows: Windows, basket_power: float) -> Windows:
    """Targets predicted from the user's last event at an earlier time, n^power the weight of a basket of n targets.

    A basket that began before the window, or with the user, has no such event there: its targets stay where they are.
    """
    segment_RL, columns = windows.segment_RL, windows.query_RL
    ends_RL = np.maximum.accumulate(np.where(windows.later_RL, columns, -1), axis=1)
    known_RL = (ends_RL >= 0) & (np.take_along_axis(segment_RL, np.maximum(ends_RL, 0), 1) == segment_RL)
    query_RL = np.where(known_RL, ends_RL, columns)
    # A basket has a number inside its row: its query, or L + the user, of whom only the first basket may stay. Its
    # targets are neighbours.
    rows, length = columns.shape
    basket_RL = np.where(known_RL, ends_RL, length + segment_RL) + 2 * length * np.arange(rows)[:, None]
    target_RL = windows.target_RL >= 0
    starts_B = np.flatnonzero(begins(basket_RL[target_RL]))
    size_B = np.diff(starts_B, append=np.count_nonzero(target_RL))
    weight_RL = np.zeros(segment_RL.shape, np.float32)
    weight_RL[target_RL] = np.repeat(size_B ** (basket_power - 1.0), size_B)
    return dataclasses.replace(windows, query_RL=query_RL, weight_RL=weight_RL)


def _last_items(windows: Windows) -> np.ndarray:
    """Int64 item ids [R, L, M] of the user's last events inside the window, the latest first; -1 elsewhere."""
    padded = [
        np.pad(of, ((0, 0), (LAST_EVENTS - 1, 0)), constant_values=-1) for of in (windows.item_RL, windows.segment_RL)
    ]
    item_RLM, segment_RLM = (sliding_window_view(of, LAST_EVENTS, axis=1)[..., ::-1] for of in padded)
    return np.where(segment_RLM == windows.segment_RL[:, :, None], item_RLM, np.int64(-1))


def _items_around(shards: Shards, event_T: np.ndarray, first_T: np.ndarray, stop_T: np.ndarray) -> np.ndarray:
    """Int64 [T, J]: items 1..REACH events before and then after the targets of positions; -1 beyond the user's."""
    # The target is the event after its position.
    away_J = np.arange(1, REACH + 1)
    around_TJ = event_T[:, None] + 1 + np.concatenate([-away_J, away_J])
    inside_TJ = (around_TJ >= first_T[:, None]) & (around_TJ < stop_T[:, None])
    items_TJ = np.full(around_TJ.shape, -1, np.int64)
    items_TJ[inside_TJ] = shards.item_at(around_TJ[inside_TJ])
    return items_TJ


def _left_out(neighbours: Neighbours, windows: Windows, around_TJ: np.ndarray, counted_T: np.ndarray) -> Counted:
    """What the table says at the query of every position, the event of the position's own target left out."""
    last_RLM = np.take_along_axis(_last_items(windows), windows.query_RL[:, :, None].astype(np.int64), axis=1)
    target = windows.target_RL >= 0
    share_RLM = np.zeros(last_RLM.shape, np.float32)
    last_RLM[target], share_RLM[target] = neighbours.left_out(
        windows.target_RL[target], last_RLM[target], around_TJ, counted_T
    )
    return Counted(last_RLM, share_RLM)


def eval_windows(shards: Shards, queries: QueryTable, window: int, neighbours: Neighbours | None = None) -> EvalWindows:
    """Pack the contexts of queries: each is the last `window` events up to its position, whole, as one segment.

    Args:
        shards: the shard set.
        queries: a slice of a protocol's table; memory grows with the slice.
        window: L, at least 1.
        neighbours: the table that what is counted is looked up in, if any.
    """
    first, position = shards.user_starts[queries.user], queries.position
    length = np.minimum(position + 1, window)
    row, column, num_rows = _pack(length, window)
    pieces = _Pieces(
        event_P=first + position + 1 - length,
        length_P=length,
        place_P=row * window + column,
        segment_P=place_among_equal(row, np.lexsort((column, row))),
        user_P=queries.user,
        first_P=first,
        # Inside a context the following event is known up to the query's own position.
        stop_P=first + position + 1,
    )
    windows = _read(shards, pieces, num_rows, window)
    windows = dataclasses.replace(
        windows, target_RL=np.full_like(windows.target_RL, -1), weight_RL=np.zeros_like(windows.weight_RL)
    )
    last = column + length - 1
    windows.later_RL[row, last] = ~queries.basket
    if neighbours is not None:
        item_RLM = neighbours.known(_last_items(windows))
        windows = dataclasses.replace(windows, counted=Counted(item_RLM, np.zeros(item_RLM.shape, np.float32)))
    return EvalWindows(windows, row, last)


def _pack(length: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Best fit, longest first: row and first column of each context, and the number of rows."""
    row, column = np.zeros(len(length), np.int64), np.zeros(len(length), np.int64)
    open_rows: list[tuple[int, int]] = []  # (room left, row), ascending
    num_rows = 0
    for query in np.argsort(-length, kind="stable").tolist():
        needed = int(length[query])
        found = bisect.bisect_left(open_rows, (needed, -1))
        if found < len(open_rows):
            room, chosen = open_rows.pop(found)
        else:
            room, chosen = window, num_rows
            num_rows += 1
        row[query], column[query] = chosen, window - room
        if room > needed:
            bisect.insort(open_rows, (room - needed, chosen))
    return row, column, num_rows
