"""One pass over the catalogue: the rank and the likelihood of every target, the first k items of every query.

Enters: a function that gives the scores of some query rows for some items, and every query's targets. Leaves:

    rank_t = 1 + #{s > s_t} + 1/2 #{s == s_t, other items}     over the catalogue, filtered items left out
    nll_t  = log sum_v e^{s_v} - s_t                           over the whole catalogue, nothing filtered

Never a table of all queries times all items: blocks of rows and columns stream by, and what stays of a row is its
first k items, a count, a running log sum and its targets' scores. A target behind the first k needs no exact rank; for
one among them, every better item is in the list too, so nothing is sorted or counted over the catalogue.

Q = queries, R = query rows of a block, C = items of a block, N = targets, P = filtered pairs, k = list length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bfm.errors import DivergedError
from bfm.events.protocol import Ragged

ScoreBlock = Callable[[slice, slice], Tensor]
"""(query rows, items) -> fresh scores [R, C], which the caller may overwrite."""

# Measured best on one thread: scores of a block stay near the core from the matmul to the last reduction.
BLOCK_BYTES = 8 * 2**20
_MIN_ROWS = 64
_GROUP = 64


@dataclass(frozen=True)
class Ranked:
    """What the catalogue pass leaves of each target and query."""

    rank_N: NDArray[np.float64]
    """inf for targets behind the first max_k, and for cold ones."""
    nll_N: NDArray[np.float64]
    """NaN for cold targets."""
    top_Qk: NDArray[np.int64]
    """Best items of each query, equal scores by ascending id; -1 where fewer are left unfiltered."""


def rank_targets(
    score_block: ScoreBlock,
    targets: Ragged,
    num_items: int,
    max_k: int,
    seen: Ragged | None = None,
    *,
    block_bytes: int = BLOCK_BYTES,
    element_bytes: int = 4,
) -> Ranked:
    """Rank every target (distinct ids per query) among the num_items items of the catalogue.

    Items in `seen` are no competitors of their query, unless they are targets of it. Working memory is a few blocks
    of scores. Raises DivergedError where a score is NaN or infinite.
    """
    num_queries = len(targets)
    columns = max(1, min(num_items, block_bytes // (element_bytes * min(_MIN_ROWS, max(1, num_queries)))))
    rows = max(1, block_bytes // (element_bytes * columns))
    query_N = np.repeat(np.arange(num_queries), np.diff(targets.offsets))
    rank_N = np.full(len(query_N), np.inf)
    nll_N = np.full(len(query_N), np.nan)
    top_Qk = np.full((num_queries, max_k), -1, dtype=np.int64)
    hidden = _hidden_pairs(targets, seen, num_items)
    for start in range(0, num_queries, rows):
        stop = min(start + rows, num_queries)
        first, last = targets.offsets[start], targets.offsets[stop]
        warm_N = first + np.flatnonzero(targets.ids[first:last] < num_items)
        chunk = _Chunk(start, stop, query_N[warm_N] - start, targets.ids[warm_N].astype(np.int64))
        passed = _pass_over_catalogue(score_block, chunk, num_items, columns, max_k, hidden)
        rank_N[warm_N], nll_N[warm_N] = _ranks_and_nll(passed, chunk)
        # A list may be longer than what is left of the catalogue; filtered items then stand at its end.
        top_Qk[start:stop] = torch.where(passed.top.value_Rk > -torch.inf, passed.top.id_Rk, -1).cpu().numpy()
    return Ranked(rank_N, nll_N, top_Qk)


class _Chunk(NamedTuple):
    start: int
    stop: int
    row_N: NDArray[np.int64]
    item_N: NDArray[np.int64]


class _Top(NamedTuple):
    """The first k items of each row by (score falling, id rising), and how many items of the row equal the k-th."""

    value_Rk: Tensor
    id_Rk: Tensor
    equal_R: Tensor


class _Passed(NamedTuple):
    top: _Top
    log_total_R: Tensor
    target_score_N: Tensor


def _hidden_pairs(targets: Ragged, seen: Ragged | None, num_items: int) -> tuple[NDArray, NDArray]:
    """(query, item) pairs that do not compete, by ascending query: seen catalogue items that are no targets."""
    if seen is None:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    pairs = []
    for lists in (seen, targets):
        query_N = np.repeat(np.arange(len(lists), dtype=np.int64), np.diff(lists.offsets))
        known_N = lists.ids < num_items
        pairs.append(query_N[known_N] * num_items + lists.ids[known_N])
    query_P, item_P = np.divmod(np.setdiff1d(pairs[0], pairs[1]), num_items)
    return query_P, item_P


def _pass_over_catalogue(
    score_block: ScoreBlock,
    chunk: _Chunk,
    num_items: int,
    columns: int,
    max_k: int,
    hidden: tuple[NDArray, NDArray],
) -> _Passed:
    low, high = np.searchsorted(hidden[0], [chunk.start, chunk.stop])
    hidden_row_P, hidden_item_P = hidden[0][low:high] - chunk.start, hidden[1][low:high]
    tops, log_totals, target_scores = [], [], []
    for start in range(0, num_items, columns):
        stop = min(start + columns, num_items)
        block_RC = score_block(slice(chunk.start, chunk.stop), slice(start, stop))
        if not torch.isfinite(torch.stack(torch.aminmax(block_RC))).all():
            raise DivergedError("a score is NaN or infinite: nothing can be ranked by it")
        log_totals.append(torch.logsumexp(block_RC, dim=1))
        # The target's own score comes from the same block as its competitors', so equal items stay equal.
        here_N = (chunk.item_N >= start) & (chunk.item_N < stop)
        score_N = block_RC.new_full((len(here_N),), -torch.inf)
        score_N[_tensor(here_N, block_RC)] = block_RC[
            _tensor(chunk.row_N[here_N], block_RC), _tensor(chunk.item_N[here_N] - start, block_RC)
        ]
        target_scores.append(score_N)
        out_P = (hidden_item_P >= start) & (hidden_item_P < stop)
        block_RC[_tensor(hidden_row_P[out_P], block_RC), _tensor(hidden_item_P[out_P] - start, block_RC)] = -torch.inf
        tops.append(_top_of_block(block_RC, max_k, start))
    log_total_R = torch.logsumexp(torch.stack(log_totals), dim=0)
    return _Passed(functools.reduce(_merge, tops), log_total_R, torch.stack(target_scores).amax(0))


def _tensor(values: NDArray, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device)


def _top_of_block(block_RC: Tensor, max_k: int, first_id: int) -> _Top:
    num_columns = block_RC.shape[1]
    # One more than asked shows whether the k-th value goes on behind the list.
    value, index = _largest(block_RC, min(max_k + 1, num_columns))
    if num_columns < max_k:
        missing = max_k - num_columns
        value = torch.nn.functional.pad(value, (0, missing), value=-torch.inf)
        index = torch.nn.functional.pad(index, (0, missing), value=-1 - first_id)
    value_Rk, index_Rk = value[:, :max_k], index[:, :max_k]
    last_R1 = value_Rk[:, -1:]
    equal_R = (value_Rk == last_R1).sum(1)
    if num_columns > max_k:
        open_rows = ((value[:, max_k] == last_R1[:, 0]) & (last_R1[:, 0] > -torch.inf)).nonzero()[:, 0]
        if len(open_rows):
            equal_RC = block_RC[open_rows] == last_R1[open_rows]
            equal_R[open_rows] = equal_RC.sum(1)
            better_R1 = (value_Rk[open_rows] > last_R1[open_rows]).sum(1, keepdim=True)
            place_k = torch.arange(max_k, device=block_RC.device)
            lowest_Rk = _first_true(equal_RC, max_k).gather(1, (place_k - better_R1).clamp(min=0))
            index_Rk = index_Rk.clone()
            index_Rk[open_rows] = torch.where(place_k < better_R1, index_Rk[open_rows], lowest_Rk)
    order = index_Rk.argsort(dim=1)
    return _Top(*_by_falling_value(value_Rk.gather(1, order), index_Rk.gather(1, order) + first_id), equal_R)


def _largest(block_RC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """topk, several times faster on long rows: the k largest values lie in the k groups with the largest maxima."""
    num_rows, num_columns = block_RC.shape
    num_groups = num_columns // _GROUP
    if num_groups <= 4 * k:
        value, index = torch.topk(block_RC, k, dim=1)
        return value, index
    grouped = block_RC[:, : num_groups * _GROUP].unflatten(1, (num_groups, _GROUP))
    best_Rk = torch.topk(grouped.amax(-1), k, dim=1).indices
    inside = best_Rk[:, :, None] * _GROUP + torch.arange(_GROUP, device=block_RC.device)
    rest = torch.arange(num_groups * _GROUP, num_columns, device=block_RC.device).expand(num_rows, -1)
    chosen = torch.cat([inside.flatten(1), rest], dim=1)
    value, place = torch.topk(block_RC.gather(1, chosen), k, dim=1)
    return value, chosen.gather(1, place)


def _first_true(mask_RC: Tensor, k: int) -> Tensor:
    """Columns of the first k true entries of each row, ascending; each row has at least one, its places behind vary."""
    columns = torch.arange(mask_RC.shape[1], device=mask_RC.device)
    return torch.topk(torch.where(mask_RC, columns, mask_RC.shape[1]), k, dim=1, largest=False).indices


def _by_falling_value(value: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    value, order = torch.sort(value, dim=1, descending=True, stable=True)
    return value, ids.gather(1, order)


def _merge(old: _Top, new: _Top) -> _Top:
    """Lists of two disjoint sets of items, the ids of `new` above those of `old`."""
    max_k = old.value_Rk.shape[1]
    value, ids = _by_falling_value(torch.cat([old.value_Rk, new.value_Rk], 1), torch.cat([old.id_Rk, new.id_Rk], 1))
    last_R1 = value[:, max_k - 1 : max_k]
    # A list is complete above its own last value; at it, only its count knows all.
    counts = [
        torch.where(part.value_Rk[:, -1] == last_R1[:, 0], part.equal_R, (part.value_Rk == last_R1).sum(1))
        for part in (old, new)
    ]
    return _Top(value[:, :max_k], ids[:, :max_k], counts[0] + counts[1])


def _ranks_and_nll(passed: _Passed, chunk: _Chunk) -> tuple[NDArray, NDArray]:
    row_N = _tensor(chunk.row_N, passed.log_total_R)
    score_N = passed.target_score_N
    value_Nk = passed.top.value_Rk[row_N]
    better_N = (value_Nk > score_N[:, None]).sum(1)
    listed_N = (value_Nk == score_N[:, None]).sum(1)
    equal_N = torch.where(score_N == value_Nk[:, -1], passed.top.equal_R[row_N], listed_N)
    # Fewer than k items are better than a listed target, so all of them are in the list.
    rank_N = torch.where(listed_N > 0, 1.0 + better_N + 0.5 * (equal_N - 1), torch.inf)
    nll_N = passed.log_total_R[row_N] - score_N
    return rank_N.double().cpu().numpy(), nll_N.double().cpu().numpy()
