"""Packed windows as the tensors of a step.

Enters: `Windows` (numpy) of one or more whole negative groups, or the windows of evaluation queries.
Leaves: one `ModelBatch`, in which every distinct item of a group stands once, so that the embedder runs per
distinct item, and in which the live candidates of a group (its distinct targets, and what was drawn to them) are rows
of the same item list.

Shape legend: R windows (rows), L positions, U distinct items of all groups one after the other, T targets (row-major),
Q queries (distinct positions from which targets are predicted: a basket of targets has one), M last events of a
target's query, N events that are of a target's item, C live candidates of all groups one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bfm.events.ragged import place_among_equal, runs
from bfm.model.attention import Segments

if TYPE_CHECKING:
    from bfm.events.windows import EvalWindows, Windows

NO_ITEMS = np.zeros(0, np.int64)


@dataclass(frozen=True)
class QueryPlaces:
    """Where queries lie among the positions of their windows, and a slot for each among S of its window."""

    position_Q: Tensor
    """int64 flat index r * L + l; ascending in training."""
    slot_Q: Tensor
    """int64 index r * S + s."""
    slots: int
    """S: most queries of a window."""

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
    free_slots: int
    """Slots of its windows that no query has."""


@dataclass(frozen=True)
class ModelBatch:
    """Whole negative groups (training) or packed query contexts (evaluation) on one device."""

    groups: tuple[Group, ...]
    """What is of a group lies, in every tensor, after what is of the groups before it."""
    items_U: Tensor
    """int64 item ids, distinct and ascending inside each group: its inputs and its targets."""
    item_RL: Tensor
    """int64 index into items_U; 0 where padded."""
    segment_RL: Tensor
    """int32; equal numbers inside a row are one user; -1 where padded."""
    segments: Segments
    """The same, as attention reads them."""
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
    copies_T: Tensor
    """int64: how many of the user's events up to a target's query have its item; 0 in evaluation."""
    copy_N: Tensor
    """int64 flat index q * L + l of those events, target after target: of query q, at position l of its window."""
    counted_TM: Tensor | None = None
    """int64 ids of the last items at a target's query that have counted neighbours, -1 elsewhere; None: not counted."""
    share_TM: Tensor | None = None
    """float32 counted share of each target among the neighbours of those items; 0 in evaluation."""
    frozen: tuple[Tensor, ...] = ()
    """int64 ids of further candidates of each group, none of them live: their vectors are constants; stage 2 alone."""

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
        position_Q = self.places.position_Q[self.queries_of(group)]
        return position_Q // self.item_RL.shape[1] - self._span("windows", group).start

    def window_T(self, group: int) -> Tensor:
        """The same of its targets."""
        return self.window_Q(group)[self.query_T[self.targets_of(group)] - self.queries_of(group).start]

    def attended_QL(self) -> Tensor:
        """bool: whether a position of the query's window is an event of its user up to the query."""
        length, position_Q = self.item_RL.shape[1], self.places.position_Q
        own_QL = self.segment_RL.index_select(0, position_Q // length) == self.places.take(self.segment_RL)[:, None]
        return own_QL & (torch.arange(length, device=position_Q.device) <= (position_Q % length)[:, None])


def make_batch(
    groups: Sequence[Windows],
    device: torch.device | str = "cpu",
    group_indices: Sequence[int] | None = None,
    drawn: Sequence[np.ndarray] | None = None,
) -> ModelBatch:
    """A batch of whole groups. `group_indices` are their global indices (0, 1, ... where not given).

    `drawn` are further candidates of each group (distinct item ids): they join its items and its candidates.
    """
    if not groups:
        raise ValueError("a batch needs at least one group")
    indices = range(len(groups)) if group_indices is None else group_indices
    counts: list[Group] = []
    parts: list[dict[str, np.ndarray]] = []
    for index, group, more in zip(indices, groups, drawn or [NO_ITEMS] * len(groups), strict=True):
        own, part = _index_group(index, group, more, counts)
        counts.append(own)
        parts.append(part)
    return _join(groups, counts, parts, device)


def make_query_batch(eval_windows: EvalWindows, device: torch.device | str = "cpu") -> ModelBatch:
    """Query contexts as one group with the queries in their order; no targets, no candidates."""
    windows = eval_windows.windows
    items_U = _distinct(windows.item_RL)
    position_Q = np.asarray(eval_windows.row, np.int64) * windows.item_RL.shape[1] + eval_windows.column
    part = {
        "items_U": items_U,
        "item_RL": _places(windows.item_RL, items_U),
        "position_Q": position_Q,
        "query_T": np.arange(len(position_Q)),
        **dict.fromkeys(("target_index_T", "candidates_C", "candidate_T", "copy_N"), NO_ITEMS),
        "weight_T": np.zeros(0, np.float32),
        "copies_T": np.zeros(len(position_Q), np.int64),
        **_known_at(windows, position_Q),
    }
    return _join([windows], [_count(0, windows, position_Q, part)], [part], device)


def attended_events(segment_RL: np.ndarray) -> np.ndarray:
    """Int64 [R, L]: how many events of its user a position attends to, those up to itself; 0 at pads."""
    columns = np.arange(segment_RL.shape[1])
    begins_RL = np.diff(segment_RL, axis=1, prepend=-2) != 0
    first_RL = np.maximum.accumulate(np.where(begins_RL, columns, 0), axis=1)
    return np.where(segment_RL >= 0, columns - first_RL + 1, 0)


def _index_group(
    index: int, group: Windows, drawn: np.ndarray, before: Sequence[Group]
) -> tuple[Group, dict[str, np.ndarray]]:
    """Counts of a group, and its part of a batch's tensors, which comes after those of the groups before it."""
    first_row, first_item, first_query = (
        sum(getattr(counts, what) for counts in before) for what in ("windows", "items", "queries")
    )
    length, known_RL = group.item_RL.shape[1], group.target_RL >= 0
    row_T, column_T = np.nonzero(known_RL)
    targets_T = group.target_RL[known_RL]
    items_U, candidates = _distinct(group.item_RL, targets_T, drawn), _distinct(targets_T, drawn)
    from_T = row_T * length + group.query_RL[known_RL]
    position_Q, query_T = np.unique(from_T, return_inverse=True)
    item_RL, target_T = (_places(ids, items_U, first_item) for ids in (group.item_RL, targets_T))
    copies_T, copy_N = _find_copies(group.segment_RL, item_RL, from_T, target_T, first_query + query_T)
    part = {
        "items_U": items_U,
        "item_RL": item_RL,
        "position_Q": first_row * length + position_Q,
        "query_T": first_query + query_T,
        "target_index_T": target_T,
        "candidates_C": _places(candidates, items_U, first_item),
        "candidate_T": _places(targets_T, candidates),
        "weight_T": group.weight_RL[known_RL],
        "copies_T": copies_T,
        "copy_N": copy_N,
        **_known_at(group, row_T * length + column_T),
    }
    return _count(index, group, position_Q, part), part


def _distinct(*ids: np.ndarray) -> np.ndarray:
    """Ascending int64 ids without pads."""
    distinct = np.unique(np.concatenate([part.ravel() for part in ids])).astype(np.int64)
    return distinct[distinct >= 0]


def _places(ids: np.ndarray, distinct_U: np.ndarray, first: int = 0) -> np.ndarray:
    """Where ids stand in a list of them that begins at `first`; 0 for pads."""
    return np.where(ids >= 0, first + np.searchsorted(distinct_U, ids), 0)


def _count(index: int, windows: Windows, position_Q: np.ndarray, part: dict[str, np.ndarray]) -> Group:
    """Counts of a group whose queries stand at these positions of its windows."""
    rows, length = windows.item_RL.shape
    attended_RL = attended_events(windows.segment_RL)
    return Group(
        index=int(index),
        windows=rows,
        items=len(part["items_U"]),
        queries=len(position_Q),
        targets=len(part["candidate_T"]),
        candidates=len(part["candidates_C"]),
        attended_pairs=int(attended_RL.sum()),
        query_pairs=int(attended_RL.flat[position_Q].sum()),
        free_slots=rows * _most_of_a_window(position_Q, length) - len(position_Q),
    )


def _join(
    groups: Sequence[Windows],
    counts: Sequence[Group],
    parts: Sequence[dict[str, np.ndarray]],
    device: torch.device | str,
) -> ModelBatch:
    """Groups one after the other."""
    tensors = {name: _tensor([part[name] for part in parts], device) for name in parts[0] if name != "position_Q"}
    position_Q = np.concatenate([part["position_Q"] for part in parts])
    return ModelBatch(
        groups=tuple(counts),
        context={name: _tensor([group.context[name] for group in groups], device) for name in groups[0].context},
        segments=Segments.of(np.concatenate([group.segment_RL for group in groups]), device),
        places=_query_places(position_Q, groups[0].item_RL.shape[1], device),
        frozen=(),
        **tensors,
    )


def _known_at(windows: Windows, position_T: np.ndarray) -> dict[str, np.ndarray]:
    """What windows say of all their positions, and what is counted at the positions of targets."""
    known: dict[str, np.ndarray] = {
        "segment_RL": windows.segment_RL.astype(np.int32),
        "gap_RL": windows.gap_RL.astype(np.float32),
        "time_RL": windows.time_RL.astype(np.int64),
        "later_RL": windows.later_RL,
    }
    if windows.counted is not None:
        counted = {"counted_TM": windows.counted.item_RLM, "share_TM": windows.counted.share_RLM}
        known |= {name: of_RLM.reshape(-1, of_RLM.shape[-1])[position_T] for name, of_RLM in counted.items()}
    return known


def _find_copies(
    segment_RL: np.ndarray, item_RL: np.ndarray, from_T: np.ndarray, target_T: np.ndarray, query_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """copies_T and copy_N of a group; from_T is where each target is predicted from."""
    rows, length = segment_RL.shape
    positions, num_items = rows * length, 1 + int(max(item_RL.max(initial=0), target_T.max(initial=0)))
    # A user of a window has a number of his own; pads, all -1, get one that no position of a target has.
    user_P = (segment_RL + (length + 1) * np.arange(rows)[:, None]).ravel()
    key_P = (user_P * num_items + item_RL.ravel()) * positions + np.arange(positions)
    key_P.sort()
    first_T = (user_P[from_T] * num_items + target_T) * positions
    low_T = np.searchsorted(key_P, first_T)
    copies_T = np.searchsorted(key_P, first_T + from_T, side="right") - low_T
    return copies_T, np.repeat(query_T * length, copies_T) + key_P[runs(low_T, copies_T)] % length


def _query_places(position_Q: np.ndarray, length: int, device: torch.device | str) -> QueryPlaces:
    row_Q = position_Q // length
    slot_Q = place_among_equal(row_Q, np.argsort(row_Q, kind="stable"))
    slots = _most_of_a_window(position_Q, length)
    return QueryPlaces(_tensor([position_Q], device), _tensor([row_Q * slots + slot_Q], device), slots)


def _most_of_a_window(position_Q: np.ndarray, length: int) -> int:
    """Queries of the window with most of them; at least 1."""
    return int(np.bincount(position_Q // length).max(initial=1))


def _tensor(parts: list[np.ndarray], device: torch.device | str) -> Tensor:
    whole = np.concatenate(parts) if len(parts) > 1 else np.array(parts[0])
    return torch.from_numpy(whole).to(device, non_blocking=True)
