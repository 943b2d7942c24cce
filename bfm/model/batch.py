"""Packed windows as the tensors of a step.

Enters: the `Windows` (numpy) of whole negative groups, or those of evaluation queries.
Leaves: one `ModelBatch`, in which every distinct item of a group stands once, so that the embedder runs per
distinct item, and in which the live candidates of a group (its distinct targets, and what was drawn to them) are rows
of the same item list.

Shape legend: R windows (rows), L positions, U distinct items of all groups one after the other, T targets (row-major),
Q queries (distinct positions from which targets are predicted: a basket of targets has one), M last events of a
target's query, N events that are of a target's item, C live candidates of all groups one after the other.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bfm.model.attended import Pairs
from bfm.model.attention import Segments
from bfm.model.index import Index, index_items
from bfm.ragged import begins, place_among_equal

if TYPE_CHECKING:
    from bfm.events.windows import EvalWindows, Windows

NO_ITEMS = np.zeros(0, np.int64)
_ALIGNED = 16


@dataclass(frozen=True)
class QueryPlaces:
    """Where queries lie among the positions of their windows, and a slot for each among S of its window."""

    position_Q: Tensor
    """int64 flat index r * L + l; ascending in training."""
    window_Q: Tensor
    """int64 r."""
    column_Q: Tensor
    """int64 l."""
    first_Q: Tensor
    """int64 column where the query's user begins."""
    slot_Q: Tensor
    """int64 index r * S + s."""
    slots: int
    """S: most queries of a window."""
    num_pairs: int
    """Pairs of a query and an event of its user up to it."""

    @cached_property
    def pairs(self) -> Pairs:
        """Of all queries."""
        return Pairs.of(self.first_Q, self.column_Q, self.position_Q, self.num_pairs)

    def take(self, x_RLX: Tensor) -> Tensor:
        """What stands at the queries' positions, [Q, ...]."""
        return x_RLX.flatten(0, 1).index_select(0, self.position_Q)

    def spread(self, x_QX: Tensor, windows: int) -> Tensor:
        """Queries in their slots, [R, S, ...]; 0 where a slot is free."""
        room = x_QX.new_zeros(windows * self.slots, *x_QX.shape[1:])
        return room.index_copy(0, self.slot_Q, x_QX).unflatten(0, (windows, self.slots))

    def gather(self, x_RSX: Tensor) -> Tensor:
        """Inverse of `spread`."""
        return x_RSX.flatten(0, 1).index_select(0, self.slot_Q)


@dataclass(frozen=True)
class Group:
    """Counts of one negative group of a batch, as if it were alone in it.

    Python ints: they slice tensors and count FLOPs without waiting for a device.
    """

    index: int
    """In the endless order; seeds everything random of the group."""
    windows: int
    items: int
    """Distinct ones."""
    queries: int
    targets: int
    candidates: int
    """Live ones: distinct targets, and what was drawn."""
    attended_pairs: int
    """Pairs of a position and a user's event up to it, itself included."""
    query_pairs: int
    """The same pairs of the queries alone."""


@dataclass(frozen=True)
class ModelBatch:
    """Whole negative groups (training) or packed query contexts (evaluation) on one device."""

    groups: tuple[Group, ...]
    """What is of a group lies, in every tensor, after what is of the groups before it."""
    items_U: Tensor
    """int64 item ids, distinct and ascending inside each group: its inputs and its targets."""
    item_RL: Tensor
    """int64 index into items_U; 0 where padded."""
    first_RL: Tensor
    """int64 column where the position's user begins in the window; pads are a user of their own."""
    segments: Segments
    """The same, as packed attention reads it."""
    gap_RL: Tensor
    """float32 seconds (positions where the log has no clock) since the user's previous event."""
    time_RL: Tensor
    """int64 milliseconds since the epoch, or position."""
    later_RL: Tensor
    """bool: the event to be predicted has a later timestamp."""
    context: dict[str, Tensor]
    """Encoded context fields, [R, L] or [R, L, columns]."""
    places: QueryPlaces
    """Of the queries."""
    query_T: Tensor
    """int64 index of the query of each target; for queries without targets each is its own."""
    target_index_T: Tensor
    """int64 index into items_U of each target; empty in evaluation, like what follows."""
    candidates_C: Tensor
    """int64 index into items_U of each group's distinct targets and drawn candidates, ascending."""
    candidate_T: Tensor
    """int64 index of a target among its group's candidates."""
    weight_T: Tensor
    """float32 weight of each target in the loss of its group."""
    share_T: Tensor
    """float32: the same as a share of the group's weight and of the batch, whose groups count alike."""
    copies_T: Tensor
    """int64: how many of the user's events up to a target's query have its item; 0 in evaluation."""
    copy_N: Tensor
    """int64 index of those events among `places.pairs`, target after target."""
    counted_TM: Tensor | None = None
    """int64 ids of the last items at a target's query that have counted neighbours, -1 elsewhere; None: not counted."""
    share_TM: Tensor | None = None
    """float32 counted share of each target among the neighbours of those items; 0 in evaluation."""
    frozen: tuple[Tensor, ...] = ()
    """int64 ids of further candidates of each group, none of them live: their vectors are constants; stage 2 alone."""

    def to(self, device: torch.device) -> ModelBatch:
        """The batch on another device, by one transfer that the host does not wait for."""
        return self if device.type == "cpu" else self._sent(device)

    def _sent(self, device: torch.device) -> ModelBatch:
        """A copy whose tensors lie in one block of memory on the device."""
        parts: list[Tensor] = []

        def note(part: Tensor) -> Tensor:
            parts.append(part)
            return part

        _replaced(self, note)
        # Every part begins where any number may.
        starts = list(itertools.accumulate((-(-part.nbytes // _ALIGNED) * _ALIGNED for part in parts), initial=0))
        host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
        for start, part in zip(starts, parts, strict=False):
            host[start : start + part.nbytes] = part.contiguous().view(-1).view(torch.uint8)
        sent, begin = host.to(device, non_blocking=True), iter(starts)

        def place(part: Tensor) -> Tensor:
            start = next(begin)
            return sent[start : start + part.nbytes].view(part.dtype).view(part.shape)

        return _replaced(self, place)

    def queries_of(self, group: int) -> slice:
        """A group's queries."""
        return self._span("queries", group)

    def targets_of(self, group: int) -> slice:
        """A group's targets."""
        return self._span("targets", group)

    def candidates_of(self, group: int) -> Tensor:
        """A group's live candidates, as index into items_U."""
        return self.candidates_C[self._span("candidates", group)]

    def _span(self, what: str, group: int) -> slice:
        *before, own = (getattr(counts, what) for counts in self.groups[: group + 1])
        return slice(sum(before), sum(before) + own)

    def window_Q(self, group: int) -> Tensor:
        """Window of each of a group's queries, counted from the group's first; int64."""
        return self.places.window_Q[self.queries_of(group)] - self._span("windows", group).start

    def window_T(self, group: int) -> Tensor:
        """The same of its targets."""
        return self.window_Q(group)[self.query_T[self.targets_of(group)] - self.queries_of(group).start]


def make_batch(
    windows: Windows,
    group_indices: Sequence[int],
    drawn: Sequence[np.ndarray] | None = None,
    group_windows: Sequence[int] | None = None,
) -> ModelBatch:
    """A batch of whole groups, of which the windows stand one after the other.

    `group_indices` are their global indices, `drawn` further candidates of each (distinct item ids), which join its
    items and its candidates, `group_windows` how many windows each has (without: all the same number).
    """
    rows, length = windows.item_RL.shape
    groups = len(group_indices)
    windows_G = np.full(groups, rows // groups) if group_windows is None else np.asarray(group_windows)
    group_R, first_RL = np.repeat(np.arange(groups), windows_G), first_columns(windows.segment_RL)
    position_T = np.flatnonzero(windows.target_RL >= 0)
    from_T = position_T // length * length + windows.query_RL.ravel()[position_T]
    index = index_items(windows, group_R, first_RL, position_T, from_T, drawn or [NO_ITEMS] * groups)
    is_query_P = np.zeros(rows * length, bool)
    is_query_P[from_T] = True
    position_Q, query_T = np.flatnonzero(is_query_P), (np.cumsum(is_query_P) - 1)[from_T]
    places = query_places(position_Q, first_RL)
    weight_T, group_T = windows.weight_RL.ravel()[position_T], group_R[position_T // length]
    weight_G = np.maximum(np.bincount(group_T, weight_T, groups), 1e-9)
    arrays = {
        "items_U": index.items_U,
        "item_RL": index.item_RL,
        "query_T": query_T,
        "target_index_T": index.target_T,
        "candidates_C": index.candidates_C,
        "candidate_T": index.candidate_T,
        "weight_T": weight_T,
        "share_T": (weight_T / weight_G[group_T] / groups).astype(np.float32),
        "copies_T": index.copies_T,
        "copy_N": _pairs_of_copies(places, query_T, index),
    }
    counts = _counts(group_indices, windows_G, windows, first_RL, position_Q, position_T, index)
    return _batch(counts, windows, arrays, first_RL, places, position_T)


def make_query_batch(eval_windows: EvalWindows) -> ModelBatch:
    """Query contexts as one group with the queries in their order; no targets, no candidates."""
    windows, rows = eval_windows.windows, len(eval_windows.windows.item_RL)
    first_RL = first_columns(windows.segment_RL)
    position_Q = np.asarray(eval_windows.row, np.int64) * windows.item_RL.shape[1] + eval_windows.column
    index = index_items(windows, np.zeros(rows, np.int64), first_RL, NO_ITEMS, NO_ITEMS, [NO_ITEMS])
    arrays = {
        "items_U": index.items_U,
        "item_RL": index.item_RL,
        "query_T": np.arange(len(position_Q)),
        **dict.fromkeys(("target_index_T", "candidates_C", "candidate_T", "copy_N"), NO_ITEMS),
        **dict.fromkeys(("weight_T", "share_T"), np.zeros(0, np.float32)),
        "copies_T": np.zeros(len(position_Q), np.int64),
    }
    counts = _counts([0], np.array([rows]), windows, first_RL, position_Q, NO_ITEMS, index)
    return _batch(counts, windows, arrays, first_RL, query_places(position_Q, first_RL), position_Q)


def first_columns(segment_RL: np.ndarray) -> np.ndarray:
    """Int64 [R, L]: where the run of equal numbers that a position is in begins."""
    return np.maximum.accumulate(begins(segment_RL) * np.arange(segment_RL.shape[1]), axis=1)


def _counts(
    indices: Sequence[int],
    windows_G: np.ndarray,
    windows: Windows,
    first_RL: np.ndarray,
    position_Q: np.ndarray,
    position_T: np.ndarray,
    index: Index,
) -> tuple[Group, ...]:
    """Counts of groups whose queries stand at these positions."""
    rows, length = first_RL.shape
    start_G = np.cumsum(windows_G) - windows_G
    attended_RL = np.where(windows.segment_RL >= 0, np.arange(1, length + 1) - first_RL, 0)
    window_Q = position_Q // length
    queries_R = np.bincount(window_Q, minlength=rows)
    of_queries_R = np.bincount(window_Q, attended_RL.ravel()[position_Q], rows).astype(np.int64)
    sums = (queries_R, np.bincount(position_T // length, minlength=rows), attended_RL.sum(1), of_queries_R)
    queries_G, targets_G, attended_G, of_queries_G = (np.add.reduceat(of_R, start_G) for of_R in sums)
    numbers = (windows_G, index.items_G, queries_G, targets_G, index.candidates_G, attended_G, of_queries_G)
    return tuple(itertools.starmap(Group, zip(indices, *(of_G.tolist() for of_G in numbers), strict=True)))


def _batch(
    counts: tuple[Group, ...],
    windows: Windows,
    arrays: dict[str, np.ndarray],
    first_RL: np.ndarray,
    places: QueryPlaces,
    position_T: np.ndarray,
) -> ModelBatch:
    """With what windows say of all their positions, and what is counted at the positions of targets."""
    arrays |= {
        "first_RL": first_RL,
        "gap_RL": windows.gap_RL,
        "time_RL": windows.time_RL,
        "later_RL": windows.later_RL,
    }
    if windows.counted is not None:
        counted = {"counted_TM": windows.counted.item_RLM, "share_TM": windows.counted.share_RLM}
        arrays |= {name: of_RLM.reshape(-1, of_RLM.shape[-1])[position_T] for name, of_RLM in counted.items()}
    return ModelBatch(
        groups=counts,
        context={name: _tensor(values) for name, values in windows.context.items()},
        places=places,
        segments=Segments.of(first_RL),
        frozen=(),
        **{name: _tensor(values) for name, values in arrays.items()},
    )


def query_places(position_Q: np.ndarray, first_RL: np.ndarray) -> QueryPlaces:
    """Of queries at these flat positions of windows in which every position's user begins at a column."""
    window_Q, column_Q = np.divmod(position_Q, first_RL.shape[1])
    slots = int(np.bincount(window_Q).max(initial=1))
    slot_Q = window_Q * slots + place_among_equal(window_Q, np.argsort(window_Q, kind="stable"))
    places = {
        "position_Q": position_Q,
        "window_Q": window_Q,
        "column_Q": column_Q,
        "first_Q": first_RL.ravel()[position_Q],
        "slot_Q": slot_Q,
    }
    num_pairs = int((column_Q - places["first_Q"] + 1).sum())
    return QueryPlaces(**{name: _tensor(of_Q) for name, of_Q in places.items()}, slots=slots, num_pairs=num_pairs)


def _pairs_of_copies(places: QueryPlaces, query_T: np.ndarray, index: Index) -> np.ndarray:
    """Where the events of targets' items stand among the pairs of their queries."""
    first_Q, column_Q = places.first_Q.numpy(), places.column_Q.numpy()
    # Where column 0 would stand: the last pair is that of the query's own column.
    zero_Q = np.cumsum(column_Q - first_Q + 1) - 1 - column_Q
    return np.repeat(zero_Q[query_T], index.copies_T) + index.copied_N


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def _replaced(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A dataclass, tuple or dict with all tensors inside changed, in a fixed order."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _replaced(part, change) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_replaced(part, change) for part in value)
    if isinstance(value, (ModelBatch, QueryPlaces, Segments)):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: _replaced(part, change) for name, part in parts.items()})
    return value
