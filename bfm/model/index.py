"""The items of a batch: one sort says which are distinct, where each stands, and where a user has had it before.

Enters: the windows of whole negative groups and what was drawn for them. Leaves: every distinct item of a group once,
positions, targets and candidates as places in that list, and the earlier events of each target's item.

What is sorted are numbers, one for each event, target and drawn item: its group, its item and its place among them,
where the target of position p has its place right after p. So equal items of a group stand together, in the order of
positions, and those of one user are neighbours.

R windows, L positions, P = R L flat positions, T targets (row-major), D drawn items of all groups, U distinct items of
all groups one after the other, C live candidates likewise, S events in the order of the sort, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bfm.events.windows import Windows
from bfm.ragged import begins, runs


@dataclass(frozen=True)
class Index:
    """Items of a batch; the counts are of each group."""

    items_U: np.ndarray
    item_RL: np.ndarray
    target_T: np.ndarray
    candidates_C: np.ndarray
    candidate_T: np.ndarray
    copies_T: np.ndarray
    copied_N: np.ndarray
    """Column of each of these events, target after target."""
    items_G: np.ndarray
    candidates_G: np.ndarray


def index_items(
    windows: Windows,
    group_R: np.ndarray,
    first_RL: np.ndarray,
    position_T: np.ndarray,
    from_T: np.ndarray,
    drawn: Sequence[np.ndarray],
) -> Index:
    """Index what stands in windows.

    group_R: the group of each window, from 0 without gaps; first_RL: column where each position's user begins;
    position_T, from_T: flat positions that have the targets, and that they are predicted from; drawn: distinct item ids
    for each group.
    """
    rows, length = windows.item_RL.shape
    positions, num_groups = rows * length, len(drawn)
    item_P, target_P, group_P = windows.item_RL.ravel(), windows.target_RL.ravel(), np.repeat(group_R, length)
    filled_P = np.flatnonzero(item_P >= 0)
    drawn_D, group_D = np.concatenate(drawn), np.repeat(np.arange(num_groups), [len(ids) for ids in drawn])
    place_D = 2 * positions + np.arange(len(drawn_D))

    ids = np.concatenate([item_P[filled_P], target_P[position_T], drawn_D]).astype(np.int64)
    place = np.concatenate([2 * filled_P, 2 * position_T + 1, place_D])
    of_group = np.concatenate([group_P[filled_P], group_P[position_T], group_D])
    place_bits, item_bits = (int(n).bit_length() for n in (2 * positions + len(drawn_D), ids.max(initial=0)))
    assert num_groups.bit_length() + item_bits + place_bits < 64, "too many positions and items for one batch"
    key = (((of_group << item_bits) | ids) << place_bits) | place
    key.sort()
    place, thing = key & ((1 << place_bits) - 1), key >> place_bits

    new = begins(thing)
    item_at = np.zeros(2 * positions + len(drawn_D), np.int64)
    item_at[place] = np.cumsum(new) - 1
    group_U, items_U = thing[new] >> item_bits, thing[new] & ((1 << item_bits) - 1)
    target_T = item_at[2 * position_T + 1]
    candidate_U = np.zeros(len(items_U), bool)
    candidate_U[target_T] = candidate_U[item_at[place_D]] = True
    candidates_C = np.flatnonzero(candidate_U)
    candidates_G = np.bincount(group_U[candidates_C], minlength=num_groups)
    first_G = np.cumsum(candidates_G) - candidates_G
    copies_T, copied_N = _copies(place, item_at, position_T, from_T, first_RL)
    return Index(
        items_U=items_U,
        item_RL=item_at[0 : 2 * positions : 2].reshape(rows, length),
        target_T=target_T,
        candidates_C=candidates_C,
        candidate_T=(np.cumsum(candidate_U) - 1)[target_T] - first_G[group_P[position_T]],
        copies_T=copies_T,
        copied_N=copied_N,
        items_G=np.bincount(group_U, minlength=num_groups),
        candidates_G=candidates_G,
    )


def _copies(
    place: np.ndarray, item_at: np.ndarray, position_T: np.ndarray, from_T: np.ndarray, first_RL: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How many events up to its query have each target's item, and their columns; places are sorted by item."""
    length, positions = first_RL.shape[1], first_RL.size
    is_event = (place < 2 * positions) & (place % 2 == 0)
    position_S = place[is_event] // 2
    item_S = item_at[2 * position_S]
    user_P = (first_RL + length * np.arange(len(first_RL))[:, None]).ravel()
    user_S = user_P[position_S]
    begin_S = np.maximum.accumulate((begins(item_S) | begins(user_S)) * np.arange(len(position_S)))
    # The last event of the item before the target; where it is of the target's own basket, those before that.
    events_before = np.empty(len(item_at), np.int64)
    events_before[place] = np.cumsum(is_event)
    last_T, item_T = events_before[2 * position_T + 1] - 1, item_at[2 * position_T + 1]
    copied_T = np.flatnonzero(last_T >= 0)
    copied_T = copied_T[item_S[last_T[copied_T]] == item_T[copied_T]]
    late_T = copied_T
    while len(late_T := late_T[position_S[last_T[late_T]] > from_T[late_T]]):
        last_T[late_T] -= 1
        late_T = late_T[(last_T[late_T] >= 0) & (item_S[last_T[late_T]] == item_T[late_T])]
    copied_T = copied_T[(last_T[copied_T] >= 0) & (user_S[last_T[copied_T]] == user_P[from_T[copied_T]])]
    copied_T = copied_T[item_S[last_T[copied_T]] == item_T[copied_T]]
    begin_K, last_K = begin_S[last_T[copied_T]], last_T[copied_T]
    copies_T = np.zeros(len(position_T), np.int64)
    copies_T[copied_T] = last_K + 1 - begin_K
    return copies_T, position_S[runs(begin_K, last_K + 1 - begin_K)] % length
