"""One pass over the catalogue: the rank and the likelihood of every target, the first k items of every query.

Enters: a function that gives the scores of some query rows for some items, and every query's targets. Leaves:

    rank_t = 1 + #{s > s_t} + 1/2 #{s == s_t, other items}     over the catalogue, filtered items left out;
                                                               inf where t itself is filtered: no list can hold it
    nll_t  = log sum_v e^{s_v} - s_t                           over the whole catalogue, nothing filtered

Never a table of all queries times all items: blocks of rows and columns stream by, and what stays of a row is its
first k items, a count, a running log sum and its targets' scores. A target behind the first k needs no exact rank; for
one among them, every better item is in the list too, so nothing is sorted or counted over the catalogue.

Row chunks run on as many threads as torch has, each with one: blocks stay in the cache of the core that made them, and
the result does not depend on the number of threads.

Q = queries, R = query rows of a chunk, C = items of a block, G = groups of neighbours in it, N = targets,
P = filtered pairs, k = list length, D = width of the vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bfm.errors import DivergedError
from bfm.events.ragged import Ragged
from bfm.ranking.top_items import GROUP, TopItems, TopRows

Scores = Callable[[slice], Callable[[slice], Tensor]]
"""query rows -> (items -> fresh scores [R, C] in float32 or float64, which the caller may overwrite)."""

# Measured best on one thread: a block stays near its core from the matmul to the last reduction.
BLOCK_BYTES = 2 * 2**20
_ROWS = 256
_SCORE_BYTES = 4
# e^x of such scores, and a block's sum of them, neither overflow nor vanish in float32.
_PLAIN_EXP = 60.0
_NOT_FINITE = "a score is NaN or infinite: nothing can be ranked by it"


@dataclass(frozen=True)
class Ranked:
    """What the catalogue pass leaves of each target and query."""

    rank_N: NDArray[np.float64]
    """inf for targets behind the first max_k, for filtered and for cold ones."""
    nll_N: NDArray[np.float64]
    """NaN for cold targets."""
    top_Qk: NDArray[np.int64]
    """Best items of each query, equal scores by ascending id; -1 where fewer are left unfiltered."""
    top_score_Qk: NDArray[np.float32]
    """Their scores; -inf beside -1."""
    filtered_N: NDArray[np.bool_] | None = None
    """Whether a target is among the items that its list leaves out; None where lists leave out nothing."""


class DotScores:
    """Scores of items by their inner products with queries: Scores that need no check one by one."""

    def __init__(self, queries_QD: Tensor, items_VD: Tensor) -> None:
        self._queries_QD = queries_QD
        self.num_items = len(items_VD)
        # The matmul of a block is faster where the items of a row of the operand are neighbours.
        self._items_DV = items_VD.T.contiguous()
        longest = [vectors.norm(dim=1).amax().double() for vectors in (queries_QD, items_VD) if len(vectors)]
        self.finite = bool(math.prod(longest) < torch.finfo(queries_QD.dtype).max / 2)
        """No score can be NaN or infinite: |<q, v>| <= |q| |v|."""

    def __call__(self, rows: slice) -> Callable[[slice], Tensor]:
        """Scores of some queries."""
        queries_RD = self._queries_QD[rows]
        return lambda items: queries_RD @ self._items_DV[:, items]


def rank_targets(
    scores: Scores,
    targets: Ragged,
    num_items: int,
    max_k: int,
    seen: Ragged | None = None,
    *,
    block_bytes: int = BLOCK_BYTES,
) -> Ranked:
    """Rank every target (distinct ids per query) among the num_items items of the catalogue.

    Items in `seen` are filtered: they are in no list of their query, targets or not. Working memory is a few blocks of
    scores per thread. `scores` is called from several threads, unless torch is set to one.
    Raises DivergedError where a score is NaN or infinite.
    """
    num_queries = len(targets)
    columns = max(1, min(num_items, block_bytes // (_SCORE_BYTES * min(_ROWS, max(1, num_queries)))))
    # Whole groups need no padding.
    columns = columns // GROUP * GROUP or columns
    rows = max(1, min(_ROWS, block_bytes // (_SCORE_BYTES * columns)))
    nothing = Ragged(np.zeros(0, np.int32), np.zeros(num_queries + 1, np.int64))
    rank_N = np.full(len(targets.ids), np.inf)
    nll_N = np.full(len(targets.ids), np.nan)
    top_Qk = np.full((num_queries, max_k), -1, dtype=np.int64)
    top_score_Qk = np.full((num_queries, max_k), -np.inf, dtype=np.float32)

    @torch.no_grad()
    def rank_rows(start: int) -> None:
        chunk = slice(start, min(start + rows, num_queries))
        own = _Pairs.of(targets, chunk, num_items)
        hidden = _Pairs.of(nothing if seen is None else seen, chunk, num_items)
        first, log_total_R, score_N = _pass_over_catalogue(scores, chunk, own, hidden, num_items, columns, max_k)
        row_N = torch.from_numpy(own.row_N).to(score_N.device)
        rank_N[own.place_N] = _ranks(first, row_N, score_N)
        nll_N[own.place_N] = (log_total_R[row_N] - score_N).double().cpu().numpy()
        top_Qk[chunk] = first.id_Rk.cpu().numpy()
        top_score_Qk[chunk] = first.value_Rk.float().cpu().numpy()

    _for_each(rank_rows, range(0, num_queries, rows))
    filtered_N = None if seen is None else targets.within(seen)
    if filtered_N is not None:
        rank_N[filtered_N] = np.inf
    return Ranked(rank_N, nll_N, top_Qk, top_score_Qk, filtered_N)


def _for_each(work: Callable[[int], None], starts: range) -> None:
    """Run `work` for every start on torch's number of threads."""
    threads = torch.get_num_threads()
    num_threads = min(threads, len(starts))
    if num_threads <= 1:
        for start in starts:
            work(start)
        return
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            # The first error is raised, and what has not begun is given up.
            list(pool.map(work, starts))
        finally:
            # What a thread sets is what torch gives to all threads that are started later.
            torch.set_num_threads(threads)


class _Pairs(NamedTuple):
    """Catalogue items that are listed for the queries of a chunk, by rising item."""

    place_N: NDArray[np.int64]
    """In the lists of all queries."""
    row_N: NDArray[np.int64]
    item_N: NDArray[np.int64]

    @classmethod
    def of(cls, lists: Ragged, rows: slice, num_items: int) -> _Pairs:
        low, high = lists.offsets[rows.start], lists.offsets[rows.stop]
        place_N = low + np.flatnonzero(lists.ids[low:high] < num_items)
        place_N = place_N[np.argsort(lists.ids[place_N], kind="stable")]
        return cls(place_N, lists.rows[place_N] - rows.start, lists.ids[place_N].astype(np.int64))

    def inside(self, items: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where those of some items lie in a block of these."""
        low, high = np.searchsorted(self.item_N, [items.start, items.stop])
        row, column = self.row_N[low:high], self.item_N[low:high] - items.start
        return torch.from_numpy(row).to(device), torch.from_numpy(column).to(device)


def _pass_over_catalogue(
    scores: Scores, rows: slice, own: _Pairs, hidden: _Pairs, num_items: int, columns: int, max_k: int
) -> tuple[TopRows, Tensor, Tensor]:
    """The first k items of the rows, the log of their sums of e^score [R], and the scores of their targets [N]."""
    finite, scores_of = getattr(scores, "finite", False), scores(rows)
    log_totals, target_scores, first = [], [], None
    for start in range(0, num_items, columns):
        items = slice(start, min(start + columns, num_items))
        block_RC = scores_of(items)
        if not finite and not torch.isfinite(block_RC.amin()):
            raise DivergedError(_NOT_FINITE)
        # The target's own score comes from the same block as its competitors', so equal items stay equal.
        target_scores.append(block_RC[own.inside(items, block_RC.device)])
        hidden_P = hidden.inside(items, block_RC.device)
        if block_RC.shape[1] % GROUP:
            block_RC = torch.nn.functional.pad(block_RC, (0, -block_RC.shape[1] % GROUP), value=-torch.inf)
        hidden_score_P = block_RC[hidden_P]
        block_RC[hidden_P] = -torch.inf
        largest_RG = block_RC.unflatten(1, (-1, GROUP)).amax(-1)
        largest_R = largest_RG.amax(1).scatter_reduce(0, hidden_P[0], hidden_score_P, "amax")
        least, most = map(float, torch.aminmax(largest_R))
        if not math.isfinite(least) or not math.isfinite(most):
            raise DivergedError(_NOT_FINITE)
        first = first or TopItems(len(block_RC), max_k, block_RC)
        first.add(block_RC, largest_RG, start)
        block_RC[hidden_P] = hidden_score_P
        log_totals.append(_log_sum_exp_(block_RC, largest_R, max(-least, most) > _PLAIN_EXP))
    assert first is not None, "an empty catalogue"
    log_total_R = torch.logsumexp(torch.stack(log_totals), dim=0)
    return first.finish(), log_total_R, torch.cat(target_scores)


def _log_sum_exp_(block_RC: Tensor, largest_R: Tensor, shifted: bool) -> Tensor:
    """log sum of e^score of each row, whose largest score is given; overwrites the block."""
    if shifted:
        return block_RC.sub_(largest_R[:, None]).exp_().sum(1).log() + largest_R
    return block_RC.exp_().sum(1).log()


def _ranks(first: TopRows, row_N: Tensor, score_N: Tensor) -> NDArray[np.float64]:
    value_Nk = first.value_Rk[row_N]
    better_N = (value_Nk > score_N[:, None]).sum(1)
    listed_N = (value_Nk == score_N[:, None]).sum(1)
    equal_N = torch.where(score_N == value_Nk[:, -1], first.equal_R[row_N], listed_N)
    # Fewer than k items are better than a listed target, so all of them are in the list.
    rank_N = torch.where(listed_N > 0, 1.0 + better_N + 0.5 * (equal_N - 1), torch.inf)
    return rank_N.double().cpu().numpy()
