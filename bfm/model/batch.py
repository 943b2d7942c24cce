"""Packed windows as the tensors of a step.

Enters: `Windows` (numpy) of one or more whole negative groups, or the windows of evaluation queries.
Leaves: one `ModelBatch`, in which every distinct item of a group stands once, so that the embedder runs per
distinct item, and in which the live candidates of a group (its distinct targets, and what was drawn to them) are rows
of the same item list.

Shape legend: G groups, R windows (rows), L positions, U distinct items of all groups one after the other,
T target rows (positions with a target, row-major), M last events of a row, C live candidates of all groups one after
the other.
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

if TYPE_CHECKING:
    from bfm.events.windows import EvalWindows, Windows

NO_ITEMS = np.zeros(0, np.int64)


@dataclass(frozen=True)
class ModelBatch:
    """Whole negative groups (training) or packed query contexts (evaluation) on one device."""

    group_indices: tuple[int, ...]
    """Global index of each group in the endless order; seeds everything random of that group."""
    windows: tuple[int, ...]
    """Rows of each group."""
    items_offset: tuple[int, ...]
    """Group g owns items_U[items_offset[g] : items_offset[g + 1]]."""
    row_offset: tuple[int, ...]
    """Group g owns target rows row_offset[g] : row_offset[g + 1]."""
    candidate_offset: tuple[int, ...]
    """Group g owns candidates_C[candidate_offset[g] : candidate_offset[g + 1]]."""
    attended_pairs: tuple[int, ...]
    """Per group: (query, key) pairs inside a user's segment, causal, the diagonal included."""
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
    target_position_T: Tensor
    """int64 flat index r * L + l of where each row's target is predicted from."""
    target_index_T: Tensor
    """int64 index into items_U of each row's target; empty for queries."""
    target_item_T: Tensor
    """int64 item id of each row's target; empty for queries."""
    candidates_C: Tensor
    """int64 index into items_U of each group's distinct targets and drawn candidates, ascending; empty for queries."""
    hit_T: Tensor
    """int64 index of a row's own target among its group's candidates; empty for queries."""
    weight_T: Tensor
    """float32 weight of each row's target in the loss of its group; empty for queries."""
    counted_TM: Tensor | None = None
    """int64 ids of a row's last items that have counted neighbours, -1 elsewhere; None where nothing was counted."""
    share_TM: Tensor | None = None
    """float32 counted share of each row's target among the neighbours of those items; 0 for queries."""

    @property
    def num_groups(self) -> int:
        """Groups in the batch."""
        return len(self.windows)

    @property
    def distinct_items(self) -> tuple[int, ...]:
        """Distinct items of each group."""
        return _lengths(self.items_offset)

    @property
    def target_rows(self) -> tuple[int, ...]:
        """Target rows of each group."""
        return _lengths(self.row_offset)

    def window_T(self, group: int) -> Tensor:
        """Window of each of a group's target rows, counted from the group's first; int64."""
        position_T = self.target_position_T[self.row_offset[group] : self.row_offset[group + 1]]
        return position_T // self.item_RL.shape[1] - sum(self.windows[:group])

    @property
    def candidates(self) -> tuple[int, ...]:
        """Live candidates (distinct targets and what was drawn) of each group."""
        return _lengths(self.candidate_offset)


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
    items_offset = _offsets([len(part.items_U) for part in parts])
    row_offset = _offsets([len(part.hit_T) for part in parts])
    position_offset = _offsets([group.item_RL.size for group in groups])
    starts = items_offset[:-1]
    return ModelBatch(
        group_indices=indices,
        windows=tuple(len(group.item_RL) for group in groups),
        items_offset=items_offset,
        row_offset=row_offset,
        candidate_offset=_offsets([len(part.candidates_C) for part in parts]),
        attended_pairs=tuple(count_attended_pairs(group.segment_RL) for group in groups),
        items_U=_tensor([part.items_U for part in parts], device),
        item_RL=_tensor(
            [
                np.where(group.item_RL >= 0, part.item_RL + start, 0)
                for group, part, start in zip(groups, parts, starts, strict=True)
            ],
            device,
        ),
        target_position_T=_tensor(
            [part.position_T + start for part, start in zip(parts, position_offset, strict=False)], device
        ),
        target_index_T=_tensor([part.target_T + start for part, start in zip(parts, starts, strict=True)], device),
        target_item_T=_tensor([part.items_U[part.target_T] for part in parts], device),
        candidates_C=_tensor([part.candidates_C + start for part, start in zip(parts, starts, strict=True)], device),
        hit_T=_tensor([part.hit_T for part in parts], device),
        weight_T=_tensor([group.weight_RL[group.target_RL >= 0] for group in groups], device),
        **_row_tensors(groups, device),
        **_counted_tensors(groups, [np.flatnonzero(group.target_RL >= 0) for group in groups], device),
    )


def make_query_batch(eval_windows: EvalWindows, device: torch.device | str = "cpu") -> ModelBatch:
    """Query contexts as one group whose target rows are the queries, in their order; no targets, no candidates."""
    windows = eval_windows.windows
    valid_RL = windows.item_RL >= 0
    items_U, inverse = np.unique(windows.item_RL[valid_RL], return_inverse=True)
    item_RL = np.zeros(windows.item_RL.shape, np.int64)
    item_RL[valid_RL] = inverse
    positions_T = np.asarray(eval_windows.row, np.int64) * windows.item_RL.shape[1] + eval_windows.column
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return ModelBatch(
        group_indices=(0,),
        windows=(len(windows.item_RL),),
        items_offset=(0, len(items_U)),
        row_offset=(0, len(positions_T)),
        candidate_offset=(0, 0),
        attended_pairs=(count_attended_pairs(windows.segment_RL),),
        items_U=_tensor([items_U.astype(np.int64)], device),
        item_RL=_tensor([item_RL], device),
        target_position_T=_tensor([positions_T], device),
        target_index_T=none,
        target_item_T=none,
        candidates_C=none,
        hit_T=none,
        weight_T=none.float(),
        **_row_tensors([windows], device),
        **_counted_tensors([windows], [positions_T], device),
    )


def count_attended_pairs(segment_RL: np.ndarray) -> int:
    """Sum over the users of every row of n (n + 1) / 2, n the user's events in that row; pads count nothing."""
    stride = int(segment_RL.max(initial=0)) + 1
    row_R1 = np.arange(len(segment_RL), dtype=np.int64)[:, None]
    keys = (row_R1 * stride + segment_RL)[segment_RL >= 0]
    lengths = np.unique(keys, return_counts=True)[1].astype(np.int64)
    return int((lengths * (lengths + 1) // 2).sum())


@dataclass(frozen=True)
class _GroupIndex:
    items_U: np.ndarray
    item_RL: np.ndarray
    position_T: np.ndarray
    target_T: np.ndarray
    candidates_C: np.ndarray
    hit_T: np.ndarray


def _index_group(group: Windows, drawn: np.ndarray) -> _GroupIndex:
    """Distinct items of a group and everything that points into them. Pads carry an arbitrary index."""
    row_T, column_T = np.nonzero(group.target_RL >= 0)
    targets_T = group.target_RL[row_T, column_T]
    items_U = np.unique(np.concatenate([group.item_RL.ravel(), targets_T, drawn]))
    if len(items_U) and items_U[0] < 0:
        items_U = items_U[1:]
    candidates = np.unique(np.concatenate([targets_T, drawn]))
    return _GroupIndex(
        items_U=items_U.astype(np.int64),
        item_RL=np.searchsorted(items_U, group.item_RL),
        position_T=row_T * group.item_RL.shape[1] + group.query_RL[row_T, column_T],
        target_T=np.searchsorted(items_U, targets_T),
        candidates_C=np.searchsorted(items_U, candidates),
        hit_T=np.searchsorted(candidates, targets_T),
    )


def _row_tensors(groups: Sequence[Windows], device: torch.device | str) -> dict:
    names = groups[0].context
    return {
        "segment_RL": _tensor([group.segment_RL.astype(np.int32) for group in groups], device),
        "gap_RL": _tensor([group.gap_RL.astype(np.float32) for group in groups], device),
        "time_RL": _tensor([group.time_RL.astype(np.int64) for group in groups], device),
        "later_RL": _tensor([group.later_RL for group in groups], device),
        "context": {name: _tensor([group.context[name] for group in groups], device) for name in names},
    }


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
