"""Packed windows as the tensors of a step.

Enters: `Windows` (numpy) of one or more whole negative groups, or the windows of evaluation queries.
Leaves: one `ModelBatch`, in which every distinct item of a group stands once, so that the embedder runs per
distinct item, and in which the live candidates of a group (its distinct targets, and what was drawn to them) are rows
of the same item list.

Shape legend: R windows (rows), L positions, U distinct items of all groups one after the other, T targets (row-major),
Q queries (distinct positions from which targets are predicted: a basket of targets has one), M last events of a
target's query, N events that are of a target's item, C live candidates of all groups one after the other.
Offsets and counts are Python ints: they slice tensors and count FLOPs without waiting for a device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bfm.events.ragged import place_among_equal, runs

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
class ModelBatch:
    """Whole negative groups (training) or packed query contexts (evaluation) on one device."""

    group_indices: tuple[int, ...]
    """Global index of each group in the endless order; seeds everything random of that group."""
    windows: tuple[int, ...]
    """Rows of each group."""
    items_offset: tuple[int, ...]
    """Group g owns items_U[items_offset[g] : items_offset[g + 1]]."""
    query_offset: tuple[int, ...]
    """Group g owns queries query_offset[g] : query_offset[g + 1]."""
    target_offset: tuple[int, ...]
    """Group g owns targets target_offset[g] : target_offset[g + 1]."""
    candidate_offset: tuple[int, ...]
    """Group g owns candidates_C[candidate_offset[g] : candidate_offset[g + 1]]."""
    attended_pairs: tuple[int, ...]
    """Per group: pairs of a position and a user's event up to it, itself included."""
    query_pairs: tuple[int, ...]
    """Per group: the same pairs of the queries alone."""
    free_slots: tuple[int, ...]
    """Per group, as if it were alone in the batch: slots of its windows that no query has."""
    items_U: Tensor
    """int64 item ids, distinct and ascending inside each group: its inputs and its targets."""
    item_RL: Tensor
    """int64 index into items_U; 0 where padded."""
    segment_RL: Tensor
    """int32; equal numbers inside a row are one user; -1 where padded."""
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

    @property
    def num_groups(self) -> int:
        """Groups in the batch."""
        return len(self.windows)

    @property
    def distinct_items(self) -> tuple[int, ...]:
        """Distinct items of each group."""
        return _lengths(self.items_offset)

    @property
    def queries(self) -> tuple[int, ...]:
        """Queries of each group."""
        return _lengths(self.query_offset)

    @property
    def targets(self) -> tuple[int, ...]:
        """Targets of each group."""
        return _lengths(self.target_offset)

    @property
    def candidates(self) -> tuple[int, ...]:
        """Live candidates (distinct targets and what was drawn) of each group."""
        return _lengths(self.candidate_offset)

    def queries_of(self, group: int) -> slice:
        """A group's queries."""
        return slice(*self.query_offset[group : group + 2])

    def targets_of(self, group: int) -> slice:
        """A group's targets."""
        return slice(*self.target_offset[group : group + 2])

    def candidates_of(self, group: int) -> Tensor:
        """A group's live candidates, as index into items_U."""
        return self.candidates_C[slice(*self.candidate_offset[group : group + 2])]

    def window_Q(self, group: int) -> Tensor:
        """Window of each of a group's queries, counted from the group's first; int64."""
        position_Q = self.places.position_Q[self.queries_of(group)]
        return position_Q // self.item_RL.shape[1] - sum(self.windows[:group])

    def window_T(self, group: int) -> Tensor:
        """The same of its targets."""
        return self.window_Q(group)[self.query_T[self.targets_of(group)] - self.query_offset[group]]

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
    indices = tuple(range(len(groups)) if group_indices is None else map(int, group_indices))
    if len(indices) != len(groups):
        raise ValueError(f"{len(groups)} groups, but {len(indices)} group indices")
    parts = [_index_group(*part) for part in zip(groups, drawn or [NO_ITEMS] * len(groups), strict=True)]
    return _assemble(groups, parts, indices, device)


def make_query_batch(eval_windows: EvalWindows, device: torch.device | str = "cpu") -> ModelBatch:
    """Query contexts as one group with the queries in their order; no targets, no candidates."""
    windows = eval_windows.windows
    items_U, item_RL = np.unique(np.where(windows.item_RL >= 0, windows.item_RL, -1), return_inverse=True)
    pads = int(len(items_U) and items_U[0] < 0)
    position_Q = np.asarray(eval_windows.row, np.int64) * windows.item_RL.shape[1] + eval_windows.column
    none = np.zeros(0, np.int64)
    index = _GroupIndex(
        items_U=items_U[pads:].astype(np.int64),
        item_RL=item_RL.reshape(windows.item_RL.shape) - pads,
        position_Q=position_Q,
        query_T=np.arange(len(position_Q)),
        position_T=position_Q,
        target_T=none,
        candidates_C=none,
        candidate_T=none,
        weight_T=none.astype(np.float32),
        copies_T=np.zeros(len(position_Q), np.int64),
        copy_N=none,
    )
    return _assemble([windows], [index], (0,), device)


def attended_events(segment_RL: np.ndarray) -> np.ndarray:
    """Int64 [R, L]: how many events of its user a position attends to, those up to itself; 0 at pads."""
    columns = np.arange(segment_RL.shape[1])
    begins_RL = np.diff(segment_RL, axis=1, prepend=-2) != 0
    first_RL = np.maximum.accumulate(np.where(begins_RL, columns, 0), axis=1)
    return np.where(segment_RL >= 0, columns - first_RL + 1, 0)


@dataclass(frozen=True)
class _GroupIndex:
    """One group's part of a batch, counted from its own first window, query and item."""

    items_U: np.ndarray
    item_RL: np.ndarray
    """Arbitrary at pads."""
    position_Q: np.ndarray
    query_T: np.ndarray
    position_T: np.ndarray
    """Where the counted neighbours of a target stand."""
    target_T: np.ndarray
    candidates_C: np.ndarray
    candidate_T: np.ndarray
    weight_T: np.ndarray
    copies_T: np.ndarray
    copy_N: np.ndarray


def _index_group(group: Windows, drawn: np.ndarray) -> _GroupIndex:
    """Distinct items of a group and everything that points into them."""
    known_RL = group.target_RL >= 0
    row_T, column_T = np.nonzero(known_RL)
    targets_T = group.target_RL[known_RL]
    items_U = np.unique(np.concatenate([group.item_RL.ravel(), targets_T, drawn]))
    items_U = items_U[items_U >= 0].astype(np.int64)
    candidates = np.unique(np.concatenate([targets_T, drawn]))
    from_T = row_T * group.item_RL.shape[1] + group.query_RL[known_RL]
    position_Q, query_T = np.unique(from_T, return_inverse=True)
    item_RL, target_T = np.searchsorted(items_U, group.item_RL), np.searchsorted(items_U, targets_T)
    copies_T, copy_N = _find_copies(group.segment_RL, item_RL, from_T, target_T, query_T)
    return _GroupIndex(
        items_U=items_U,
        item_RL=item_RL,
        position_Q=position_Q,
        query_T=query_T,
        position_T=row_T * group.item_RL.shape[1] + column_T,
        target_T=target_T,
        candidates_C=np.searchsorted(items_U, candidates),
        candidate_T=np.searchsorted(candidates, targets_T),
        weight_T=group.weight_RL[known_RL],
        copies_T=copies_T,
        copy_N=copy_N,
    )


def _assemble(
    groups: Sequence[Windows], parts: Sequence[_GroupIndex], indices: tuple[int, ...], device: torch.device | str
) -> ModelBatch:
    """Groups one after the other."""
    length = groups[0].item_RL.shape[1]
    items_offset, query_offset, target_offset, candidate_offset = (
        _offsets([len(getattr(part, name)) for part in parts])
        for name in ("items_U", "position_Q", "candidate_T", "candidates_C")
    )
    position_offset = _offsets([group.item_RL.size for group in groups])
    attended = [attended_events(group.segment_RL) for group in groups]
    queried = [attended_RL.flat[part.position_Q] for attended_RL, part in zip(attended, parts, strict=True)]

    def joined(name: str, starts: Sequence[int], factor: int = 1) -> Tensor:
        values = (getattr(part, name) for part in parts)
        return _tensor([own + factor * start for own, start in zip(values, starts, strict=False)], device)

    position_Q = np.concatenate([part.position_Q + start for part, start in zip(parts, position_offset, strict=False)])
    pads_RL = torch.from_numpy(np.concatenate([group.item_RL for group in groups]) < 0).to(device)
    return ModelBatch(
        group_indices=indices,
        windows=tuple(len(group.item_RL) for group in groups),
        items_offset=items_offset,
        query_offset=query_offset,
        target_offset=target_offset,
        candidate_offset=candidate_offset,
        attended_pairs=tuple(int(attended_RL.sum()) for attended_RL in attended),
        query_pairs=tuple(int(attended_Q.sum()) for attended_Q in queried),
        free_slots=tuple(
            len(group.item_RL) * _most_of_a_window(part.position_Q, length) - len(part.position_Q)
            for group, part in zip(groups, parts, strict=True)
        ),
        items_U=_tensor([part.items_U for part in parts], device),
        item_RL=joined("item_RL", items_offset).masked_fill(pads_RL, 0),
        places=_query_places(position_Q, length, device),
        query_T=joined("query_T", query_offset),
        target_index_T=joined("target_T", items_offset),
        candidates_C=joined("candidates_C", items_offset),
        candidate_T=_tensor([part.candidate_T for part in parts], device),
        weight_T=_tensor([part.weight_T for part in parts], device),
        copies_T=_tensor([part.copies_T for part in parts], device),
        copy_N=joined("copy_N", query_offset, factor=length),
        **_row_tensors(groups, device),
        **_counted_tensors(groups, [part.position_T for part in parts], device),
    )


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


def _row_tensors(groups: Sequence[Windows], device: torch.device | str) -> dict:
    names = groups[0].context
    return {
        "segment_RL": _tensor([group.segment_RL.astype(np.int32) for group in groups], device),
        "gap_RL": _tensor([group.gap_RL.astype(np.float32) for group in groups], device),
        "time_RL": _tensor([group.time_RL.astype(np.int64) for group in groups], device),
        "later_RL": _tensor([group.later_RL for group in groups], device),
        "context": {name: _tensor([group.context[name] for group in groups], device) for name in names},
    }


def _query_places(position_Q: np.ndarray, length: int, device: torch.device | str) -> QueryPlaces:
    row_Q = position_Q // length
    slot_Q = place_among_equal(row_Q, np.argsort(row_Q, kind="stable"))
    slots = _most_of_a_window(position_Q, length)
    return QueryPlaces(_tensor([position_Q], device), _tensor([row_Q * slots + slot_Q], device), slots)


def _most_of_a_window(position_Q: np.ndarray, length: int) -> int:
    """Queries of the window with most of them; at least 1."""
    return int(np.bincount(position_Q // length).max(initial=1))


def _counted_tensors(groups: Sequence[Windows], positions: Sequence[np.ndarray], device: torch.device | str) -> dict:
    counted = [group.counted for group in groups if group.counted is not None]
    if not counted:
        return {}

    def rows(values: list[np.ndarray]) -> Tensor:
        flat = [value.reshape(-1, value.shape[-1])[chosen] for value, chosen in zip(values, positions, strict=True)]
        return _tensor(flat, device)

    return {
        "counted_TM": rows([part.item_RLM for part in counted]),
        "share_TM": rows([part.share_RLM for part in counted]),
    }


def _tensor(parts: list[np.ndarray], device: torch.device | str) -> Tensor:
    whole = np.concatenate(parts) if len(parts) > 1 else np.array(parts[0])
    return torch.from_numpy(whole).to(device, non_blocking=True)


def _offsets(lengths: list[int]) -> tuple[int, ...]:
    return tuple(int(total) for total in np.cumsum([0, *lengths]))


def _lengths(offsets: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in itertools.pairwise(offsets))
