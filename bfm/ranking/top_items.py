"""The first k items of every row from blocks of scores that stream by, with nothing sorted but a few items per row.

Enters: blocks of scores, item ids rising from block to block, and the largest score of every group of neighbours.
Leaves: for each row the first k items by (score falling, id rising), and how many items equal the k-th.

The k-th largest of the group maxima seen so far is a bound: k items reach it, so an item below it is in no list, and a
group whose maximum is below it is never looked into. A later item that only equals a bound of earlier blocks is in no
list either (k earlier ids reach it) and is just counted. What is left is a few dozen items per row.

`TopItems` keeps only what reaches the bound, and waits for every block to know how much that is. `TopKeys` never waits,
as a GPU wants it: it always looks into k groups, since those with the k largest maxima hold the first k of a block.

R = rows, C = items of a block, W = GROUP neighbours, G = groups of a block, P = groups that are looked into,
E = items kept, k = list length, g = min(k, G), J = items of g groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 64


class TopRows(NamedTuple):
    """The first k items of each row."""

    value_Rk: Tensor
    """Falling; -inf where fewer than k items are left."""
    id_Rk: Tensor
    """Equal scores by rising id; -1 where fewer are left."""
    equal_R: Tensor
    """Items of the row that equal its k-th, the k-th included; meaningless where there is none."""


class _Kept(NamedTuple):
    """Items that may be in a list: of one row by rising id."""

    row_E: Tensor
    id_E: Tensor
    value_E: Tensor


class TopItems:
    """Collects the first k items of rows over blocks with rising item ids; -inf stands for no item."""

    def __init__(self, num_rows: int, k: int, like: Tensor) -> None:
        self._best_Rk = like.new_full((num_rows, k), -torch.inf)
        self._tied_R = torch.zeros(num_rows, dtype=torch.int64, device=like.device)
        """Items left out because they equal the bound and k earlier ones reach it."""
        self._kept: list[_Kept] = []
        self._num_kept = 0

    def add(self, block_RC: Tensor, largest_RG: Tensor, first_id: int) -> None:
        """Take in a block whose width is a multiple of GROUP; largest_RG are the maxima of its groups."""
        num_rows, k = self._best_Rk.shape
        num_groups = largest_RG.shape[1]
        before_R = self._best_Rk[:, -1]
        # The k-th of fewer than k maxima bounds nothing, and a first block would be kept whole.
        bounding = num_groups >= k or self._kept
        best = largest_RG if bounding else torch.topk(block_RC, min(k, block_RC.shape[1])).values
        self._best_Rk = torch.topk(torch.cat([self._best_Rk, best], 1), k).values
        bound_R = self._best_Rk[:, -1]
        group_P = (largest_RG >= bound_R[:, None]).view(-1).nonzero()[:, 0]
        row_P = group_P // num_groups
        value_PW = block_RC.reshape(-1, GROUP).index_select(0, group_P)
        place_E = (value_PW >= bound_R[row_P, None]).view(-1).nonzero()[:, 0]
        row_E, value_E = row_P[place_E // GROUP], value_PW.view(-1)[place_E]
        id_E = first_id + group_P[place_E // GROUP] % num_groups * GROUP + place_E % GROUP
        self._tied_R.masked_fill_(bound_R > before_R, 0)
        above_E = value_E > before_R[row_E]
        if not above_E.all():
            self._tied_R += torch.bincount(row_E[~above_E], minlength=num_rows)
            row_E, id_E, value_E = row_E[above_E], id_E[above_E], value_E[above_E]
        self._kept.append(_Kept(row_E, id_E, value_E))
        self._num_kept += len(id_E)
        if self._num_kept > 2 * block_RC.numel():
            self._drop_below_bound()

    def finish(self) -> TopRows:
        """Sort what was kept."""
        num_rows, k = self._best_Rk.shape
        kept = self._drop_below_bound()
        # Stable sorts keep the ids of equal scores rising.
        order_E = kept.value_E.argsort(descending=True, stable=True)
        order_E = order_E[kept.row_E[order_E].argsort(stable=True)]
        row_E, id_E, value_E = (part[order_E] for part in kept)
        length_R = torch.bincount(row_E, minlength=num_rows)
        place_E = torch.arange(len(row_E), device=row_E.device) - (length_R.cumsum(0) - length_R)[row_E]
        listed_E = place_E < k
        at = row_E[listed_E], place_E[listed_E]
        value_Rk = self._best_Rk.new_full((num_rows, k), -torch.inf).index_put_(at, value_E[listed_E])
        id_Rk = id_E.new_full((num_rows, k), -1).index_put_(at, id_E[listed_E])
        last_R = value_Rk[:, -1]
        equal_R = torch.bincount(row_E[value_E == last_R[row_E]], minlength=num_rows)
        return TopRows(value_Rk, id_Rk, equal_R + torch.where(last_R == self._best_Rk[:, -1], self._tied_R, 0))

    def _drop_below_bound(self) -> _Kept:
        row_E, id_E, value_E = (torch.cat(parts) for parts in zip(*self._kept, strict=True))
        left_E = value_E >= self._best_Rk[row_E, -1]
        kept = _Kept(row_E[left_E], id_E[left_E], value_E[left_E])
        self._kept, self._num_kept = [kept], len(kept.id_E)
        return kept


class TopKeys:
    """The same as TopItems for float32 scores, by operations whose shapes do not depend on the scores.

    A kept item is one number that orders as the list does: the score's bits above, the id's complement below.
    """

    def __init__(self, num_rows: int, k: int, like: Tensor) -> None:
        assert like.dtype == torch.float32, "keys are made of the bits of float32 scores"
        nothing = _keys(like.new_full((1,), -torch.inf), torch.full((1,), _LARGEST_ID, device=like.device))
        self._best_Rk = nothing.repeat(num_rows, k)
        self._equal_R = torch.zeros(num_rows, dtype=torch.int64, device=like.device)

    def add(self, block_RC: Tensor, largest_RG: Tensor, first_id: int) -> None:
        """Take in a block whose width is a multiple of GROUP; largest_RG are the maxima of its groups."""
        k, num_groups = self._best_Rk.shape[1], largest_RG.shape[1]
        place_G, place_W = (torch.arange(number, device=block_RC.device) for number in (num_groups, GROUP))
        group_Rg = _ids(torch.topk(_keys(largest_RG, place_G), min(k, num_groups)).values)
        value_RgW = block_RC.unflatten(1, (-1, GROUP)).gather(1, group_Rg[:, :, None].expand(-1, -1, GROUP))
        key_RJ = _keys(value_RgW, first_id + group_Rg[:, :, None] * GROUP + place_W).flatten(1)
        before_Rk = self._best_Rk
        self._best_Rk = torch.topk(torch.cat([before_Rk, key_RJ], 1), k).values
        last_R1 = _values(self._best_Rk[:, -1:])
        # What was left out of the earlier blocks equals the k-th of these, if it equals the new one.
        kept_R = (_values(before_Rk) == last_R1).sum(1)
        earlier_R = torch.where(_values(before_Rk[:, -1]) == last_R1[:, 0], self._equal_R, kept_R)
        self._equal_R = earlier_R + (block_RC == last_R1).sum(1)

    def finish(self) -> TopRows:
        """Take the keys apart."""
        value_Rk = _values(self._best_Rk)
        return TopRows(value_Rk, _ids(self._best_Rk).masked_fill_(value_Rk == -torch.inf, -1), self._equal_R)


_LARGEST_ID = (1 << 32) - 1


def _keys(value: Tensor, ids: Tensor) -> Tensor:
    """int64 keys that fall with the value and, where it is equal, rise with ids below 2^32."""
    # A sum with 0 makes -0 equal to 0. Negative floats order by their bits the other way round.
    bits = (value + 0.0).view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFF_FFFF, bits)
    return (bits.long() << 32) | (_LARGEST_ID - ids)


def _values(key: Tensor) -> Tensor:
    bits = (key >> 32).int()
    return torch.where(bits < 0, bits ^ 0x7FFF_FFFF, bits).view(torch.float32)


def _ids(key: Tensor) -> Tensor:
    return _LARGEST_ID - (key & _LARGEST_ID)
