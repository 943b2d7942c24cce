"""Packed windows of L events, negative groups of G windows, and their global order; packed contexts of queries.

The training stream of an epoch: users in an order that is a pure function of (seed, epoch), each user's training events
one after the other. It is cut into W windows of L positions, the last one padded. Window i of the endless order is
window i % W of epoch i // W, and group g is windows g*G .. (g+1)*G - 1. So the cursor of a run is one integer, the
index of the next group, whatever the number of workers.

Shapes: R rows (windows), L positions, N events, Q queries.
"""

from __future__ import annotations

import bisect
import copy
from dataclasses import dataclass

import numpy as np

from bfm.events.mixing import keyed, stream_key
from bfm.events.protocol import QueryTable, Ragged, distinct_items, query_targets
from bfm.events.shards import Shards

_ORDER_STREAM = 0x0DE2
_KEPT_EPOCHS = 2


@dataclass(frozen=True)
class Windows:
    """R rows of L positions; a negative group is R = G rows."""

    item_RL: np.ndarray
    """Int32 item ids; -1 where padded."""
    target_RL: np.ndarray
    """Int32 item id of the user's next training event; -1 where there is none."""
    segment_RL: np.ndarray
    """Int32; equal number = same user inside the row, counted from 0; -1 where padded."""
    later_RL: np.ndarray
    """Bool: the target has a later timestamp than the position (False where there is no target)."""
    time_RL: np.ndarray
    """Int64 milliseconds or positions; 0 where padded."""
    gap_RL: np.ndarray
    """Float32 seconds (or positions) since the user's previous event; 0 for a user's first event."""
    context: dict[str, np.ndarray]
    """Encoded context fields, leading dimensions R, L; missing where padded."""


@dataclass(frozen=True)
class EvalWindows:
    """Contexts of Q queries packed into rows. Query q reads the model's output at (row[q], column[q])."""

    windows: Windows
    """Targets are all -1; later is True at headline queries, False at basket queries, the true bit elsewhere."""
    row: np.ndarray
    """Int64 [Q]."""
    column: np.ndarray
    """Int64 [Q]."""
    targets: Ragged
    """Distinct target items of each query, cold ones included."""
    seen: Ragged | None
    """Distinct items of each query's history; None where the protocol does not filter them."""
    user: np.ndarray
    """Int64 [Q]."""


@dataclass(frozen=True)
class _Places:
    """Where the positions of windows lie among the shards' events; all int64 [R, L]."""

    event_RL: np.ndarray
    """Global event index; -1 where padded."""
    segment_RL: np.ndarray
    """As in Windows."""
    first_RL: np.ndarray
    """Global index of the user's first event."""
    stop_RL: np.ndarray
    """Global index after the user's last event that may be known; 0 where padded."""

    @classmethod
    def stack(cls, pieces: list[_Places]) -> _Places:
        """One piece after the other."""
        columns = ("event_RL", "segment_RL", "first_RL", "stop_RL")
        return cls(*(np.concatenate([getattr(piece, name) for piece in pieces]) for name in columns))


class WindowOrder:
    """The endless order of training windows and groups of one (shard set, L, G, seed). Memory: O(users)."""

    def __init__(self, shards: Shards, window: int, group_windows: int, seed: int) -> None:
        """Prepare the order. `window` (L) and `group_windows` (G) are at least 1.

        Raises:
            ValueError: L or G below 1, or a shard set without training events.
        """
        if window < 1 or group_windows < 1:
            raise ValueError(f"window {window} and group_windows {group_windows} must be at least 1")
        if shards.manifest.train_events < 1:
            raise ValueError(f"{shards.path}: no training events")
        self.shards, self.window, self.group_windows, self.seed = shards, window, group_windows, seed
        self._users = np.flatnonzero(shards.train_lengths)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def reshaped(self, window: int, group_windows: int) -> WindowOrder:
        """The same order of users cut into other windows and groups; shares what is O(users)."""
        other = copy.copy(self)
        other.window, other.group_windows = window, group_windows
        return other

    @property
    def windows_per_epoch(self) -> int:
        """W: windows that hold every training event once."""
        return -(-self.shards.manifest.train_events // self.window)

    @property
    def groups_per_epoch(self) -> float:
        """W / G; groups may straddle epochs."""
        return self.windows_per_epoch / self.group_windows

    @property
    def targets_per_epoch(self) -> int:
        """Training positions with a target, once each."""
        return self.shards.manifest.train_targets

    def group(self, index: int) -> Windows:
        """The windows of a group (index from 0, endless)."""
        return _gather(self.shards, self._places(index), with_targets=True)

    def group_item_ids(self, index: int) -> np.ndarray:
        """Items of a group's filled positions [N], in order (repeats included)."""
        event_RL = self._places(index).event_RL
        return self.shards.take_item(self.shards.locate(event_RL[event_RL >= 0]))

    def group_targets(self, index: int) -> np.ndarray:
        """Target items of a group's positions [T], in order (repeats included)."""
        places = self._places(index)
        following = places.event_RL[places.event_RL + 1 < places.stop_RL] + 1
        return self.shards.take_item(self.shards.locate(following))

    def group_target_ids(self, index: int) -> np.ndarray:
        """Sorted distinct target items of a group, without building its windows."""
        return np.unique(self.group_targets(index))

    def _places(self, index: int) -> _Places:
        first, stop = index * self.group_windows, (index + 1) * self.group_windows
        pieces = []
        while first < stop:
            epoch, low = divmod(first, self.windows_per_epoch)
            high = min(low + stop - first, self.windows_per_epoch)
            pieces.append(self._epoch_places(epoch, low, high))
            first += high - low
        return pieces[0] if len(pieces) == 1 else _Places.stack(pieces)

    def stretch(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Items [N] and target items [T] of positions start..stop-1 of the first epoch's stream."""
        event_N, _, _, stop_N = self._stream(0, start, stop)
        following = event_N[event_N + 1 < stop_N] + 1
        return self.shards.take_item(self.shards.locate(event_N)), self.shards.take_item(self.shards.locate(following))

    def _epoch_places(self, epoch: int, low: int, high: int) -> _Places:
        """Windows low..high-1 of one epoch."""
        start, stop = low * self.window, min(high * self.window, self.shards.manifest.train_events)

        def spread(values: np.ndarray, pad: int) -> np.ndarray:
            out = np.full((high - low) * self.window, pad)
            out[: stop - start] = values
            return out.reshape(-1, self.window)

        event_N, slot_N, first_N, stop_N = self._stream(epoch, start, stop)
        slot_RL = spread(slot_N, -1)
        segment_RL = np.where(slot_RL >= 0, slot_RL - slot_RL[:, :1], -1)
        return _Places(spread(event_N, -1), segment_RL, spread(first_N, 0), spread(stop_N, 0))

    def _stream(self, epoch: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Positions start..stop-1 of an epoch's stream [N]: event, rank of its user here, the user's first and stop."""
        users, ends = self._epoch(epoch)
        first_slot, last_slot = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop, side="left")
        end, user = ends[first_slot : last_slot + 1], users[first_slot : last_slot + 1]
        first, length = self.shards.user_starts[user], self.shards.train_lengths[user]
        counts = np.minimum(end, stop) - np.maximum(end - length, start)
        # An event's global index and its place in the stream differ by a constant per user.
        event_N = np.arange(start, stop) + np.repeat(first + length - end, counts)
        slot_N = np.repeat(np.arange(len(user)), counts)
        return event_N, slot_N, np.repeat(first, counts), np.repeat(first + length, counts)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Users in the epoch's order, and the place in the stream after each one's last event."""
        if epoch not in self._epochs:
            if len(self._epochs) >= _KEPT_EPOCHS:
                del self._epochs[min(self._epochs)]
            order = np.argsort(keyed(stream_key(self.seed, _ORDER_STREAM, epoch), self._users))
            users = self._users[order]
            self._epochs[epoch] = users, np.cumsum(self.shards.train_lengths[users])
        return self._epochs[epoch]


def _gather(shards: Shards, places: _Places, *, with_targets: bool) -> Windows:
    """Read the events of windows; the following event is known where it lies before `stop_RL`."""
    filled_RL = places.event_RL >= 0
    event_N = places.event_RL[filled_RL]
    located = shards.locate(event_N)
    time_N = shards.take_time(located)
    followed_N = event_N + 1 < places.stop_RL[filled_RL]
    following = shards.locate(event_N + followed_N)
    later_N = shards.take_time(following) > time_N
    previous = shards.locate(np.maximum(event_N - 1, places.first_RL[filled_RL]))
    gap_N = (time_N - shards.take_time(previous)).astype(np.float64)
    if shards.has_clock:
        gap_N /= 1000.0

    def spread(values: np.ndarray, pad: float, dtype: type) -> np.ndarray:
        out = np.full((*filled_RL.shape, *values.shape[1:]), pad, dtype)
        out[filled_RL] = values
        return out

    context = {}
    for field in shards.context_fields:
        values = shards.take_context(field.name, located)
        missing = np.nan if field.kind == "numeric" else 0
        context[field.name] = spread(values, missing, values.dtype.type)
    target_N = np.where(followed_N & with_targets, shards.take_item(following), -1)
    return Windows(
        item_RL=spread(shards.take_item(located), -1, np.int32),
        target_RL=spread(target_N, -1, np.int32),
        segment_RL=places.segment_RL.astype(np.int32),
        later_RL=spread(later_N, False, np.bool_),
        time_RL=spread(time_N, 0, np.int64),
        gap_RL=spread(gap_N, 0.0, np.float32),
        context=context,
    )


def eval_windows(shards: Shards, queries: QueryTable, window: int) -> EvalWindows:
    """Pack the contexts of queries: each is the last `window` events up to its position, whole, as one segment.

    Args:
        shards: the shard set.
        queries: a slice of a protocol's table; memory grows with the slice.
        window: L, at least 1.
    """
    first, position = shards.user_starts[queries.user], queries.position
    length = np.minimum(position + 1, window)
    row, column, num_rows = _pack(length, window)
    step = np.arange(int(length.sum())) - np.repeat(np.cumsum(length) - length, length)
    place = np.repeat(row * window + column, length) + step

    def spread(values: np.ndarray, pad: int) -> np.ndarray:
        out = np.full(num_rows * window, pad)
        out[place] = values
        return out.reshape(-1, window)

    # Inside a context the following event is known up to the query's own position.
    places = _Places(
        event_RL=spread(np.repeat(first + position + 1 - length, length) + step, -1),
        segment_RL=spread(np.repeat(_number_inside_rows(row, column), length), -1),
        first_RL=spread(np.repeat(first, length), 0),
        stop_RL=spread(np.repeat(first + position + 1, length), 0),
    )
    windows = _gather(shards, places, with_targets=False)
    last = column + length - 1
    windows.later_RL[row, last] = ~queries.basket
    seen = distinct_items(shards, first, position + 1) if queries.filter_seen else None
    return EvalWindows(windows, row, last, query_targets(shards, queries), seen, queries.user)


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


def _number_inside_rows(row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Rank of each context inside its row, by column."""
    order = np.lexsort((column, row))
    starts = np.flatnonzero(np.diff(row[order], prepend=-1))
    rank = np.empty(len(row), np.int64)
    rank[order] = np.arange(len(row)) - np.repeat(starts, np.diff(np.append(starts, len(row))))
    return rank
