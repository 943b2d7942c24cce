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
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from bfm.events.neighbours import LAST_EVENTS, REACH, Neighbours
from bfm.events.protocol import QueryTable
from bfm.events.ragged import place_among_equal, runs
from bfm.events.randomness import permuted, stream_key
from bfm.events.shards import Shards

_ORDER_STREAM = 0x0DE2
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

    def group(self, index: int) -> Windows:
        """The windows of a group (index from 0, endless)."""
        epoch_R, place_R = np.divmod(
            np.arange(index * self.group_windows, (index + 1) * self.group_windows), self.windows_per_epoch
        )
        window_R = np.empty_like(place_R)
        for epoch in range(int(epoch_R[0]), int(epoch_R[-1]) + 1):
            here = epoch_R == epoch
            key = stream_key(self.seed, _ORDER_STREAM, epoch)
            window_R[here] = permuted(key, place_R[here], self.windows_per_epoch)
        return self.windows(window_R)

    def windows(self, window_R: np.ndarray) -> Windows:
        """Windows by their number in the stream, 0..W-1."""
        shards = self.shards
        position_RL = window_R[:, None] * self.window + np.arange(self.window)
        filled_RL = position_RL < shards.manifest.train_events
        position_RL = np.minimum(position_RL, shards.manifest.train_events - 1)
        user_RL = np.searchsorted(shards.train_stops, position_RL, side="right")
        first_RL = shards.user_starts[user_RL]
        stop_RL = first_RL + shards.train_lengths[user_RL]
        event_RL = stop_RL - (shards.train_stops[user_RL] - position_RL)
        segment_RL = np.cumsum(np.diff(user_RL, axis=1, prepend=user_RL[:, :1]) != 0, axis=1)
        event_RL, segment_RL = (np.where(filled_RL, of, -1) for of in (event_RL, segment_RL))
        windows = _gather(shards, event_RL, segment_RL, first_RL, stop_RL, with_targets=True)
        if self.targets == "next_basket":
            windows = _from_the_basket_before(windows, self.basket_power)
        if self.neighbours is None:
            return windows
        target = windows.target_RL >= 0
        around_TJ = _items_around(shards, event_RL[target], first_RL[target], stop_RL[target])
        counted_T = user_RL[target] < self.neighbours.users
        return dataclasses.replace(windows, counted=_left_out(self.neighbours, windows, around_TJ, counted_T))


def _gather(
    shards: Shards,
    event_RL: np.ndarray,
    segment_RL: np.ndarray,
    first_RL: np.ndarray,
    stop_RL: np.ndarray,
    *,
    with_targets: bool,
) -> Windows:
    """Read the events of windows.

    Args:
        event_RL: global event index, -1 where padded. segment_RL: as in Windows.
        first_RL: global index of the user's first event.
        stop_RL: global index after the user's last event that may be known.
    """
    filled_RL = event_RL >= 0
    event_N = event_RL[filled_RL]
    events = shards.at(event_N)
    item_N, time_N = events.item, events.time
    followed_N = event_N + 1 < stop_RL[filled_RL]
    following = shards.at(event_N + followed_N)
    later_N = following.time > time_N
    previous = shards.at(np.maximum(event_N - 1, first_RL[filled_RL]))
    gap_N = (time_N - previous.time).astype(np.float64)
    if shards.manifest.has_clock:
        gap_N /= 1000.0

    def spread(values: np.ndarray, pad: float, dtype: type) -> np.ndarray:
        out = np.full((*filled_RL.shape, *values.shape[1:]), pad, dtype)
        out[filled_RL] = values
        return out

    context = {}
    for field in shards.context_fields:
        values = events.context(field.name)
        missing = np.nan if field.kind == "numeric" else 0
        context[field.name] = spread(values, missing, values.dtype.type)
    target_N = np.where(followed_N & with_targets, following.item, -1)
    columns = np.arange(filled_RL.shape[1], dtype=np.int32)
    return Windows(
        item_RL=spread(item_N, -1, np.int32),
        target_RL=spread(target_N, -1, np.int32),
        segment_RL=segment_RL.astype(np.int32),
        query_RL=np.broadcast_to(columns, filled_RL.shape),
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
    # A basket has a number inside its row: its query, or L + the user, of whom only the first basket may stay.
    rows, length = columns.shape
    basket_RL = np.where(known_RL, ends_RL, length + segment_RL) + 2 * length * np.arange(rows)[:, None]
    target_RL = windows.target_RL >= 0
    _, basket_T, size_B = np.unique(basket_RL[target_RL], return_inverse=True, return_counts=True)
    weight_RL = np.zeros(segment_RL.shape, np.float32)
    weight_RL[target_RL] = size_B[basket_T] ** (basket_power - 1.0)
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
    items_TJ[inside_TJ] = shards.at(around_TJ[inside_TJ]).item
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
    place = runs(row * window + column, length)

    def spread(values: np.ndarray, pad: int) -> np.ndarray:
        out = np.full(num_rows * window, pad)
        out[place] = values
        return out.reshape(-1, window)

    windows = _gather(
        shards,
        event_RL=spread(runs(first + position + 1 - length, length), -1),
        segment_RL=spread(np.repeat(place_among_equal(row, np.lexsort((column, row))), length), -1),
        first_RL=spread(np.repeat(first, length), 0),
        # Inside a context the following event is known up to the query's own position.
        stop_RL=spread(np.repeat(first + position + 1, length), 0),
        with_targets=False,
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
