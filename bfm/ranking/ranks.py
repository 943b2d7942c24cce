"""One pass over the catalogue: the rank and the likelihood of every target, the first k items of every query.

Enters: a function that gives the scores of some query rows for some items, and every query's targets. Leaves:

    rank_t = 1 + #{s > s_t} + 1/2 #{s == s_t, other items}     over the catalogue, filtered items left out;
                                                               inf where t itself is filtered: no list can hold it
    nll_t  = log sum_v e^{s_v} - s_t                           over the whole catalogue, nothing filtered

Never a table of all queries times all items: blocks of rows and columns stream by, and what stays of a row is its
first k items, a count, a running log sum and its targets' scores. A target behind the first k needs no exact rank; for
one among them, every better item is in the list too, so nothing is sorted or counted over the catalogue.

On a CPU row chunks run on as many threads as torch has, each with one: blocks stay in the cache of the core that made
them, and the result does not depend on the number of threads. On a GPU blocks are as large as fills it, and the host
waits for nothing but the end of a chunk.

Q = queries, R = query rows of a chunk, C = items of a block, G = groups of neighbours in it, N = targets,
P = filtered pairs, k = list length, D = width of the vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bfm.errors import DivergedError
from bfm.ragged import Ragged
from bfm.ranking.top_items import GROUP, TopItems, TopKeys, TopRows

Scores = Callable[[slice], Callable[[slice], Tensor]]
"""query rows -> (items -> fresh scores [R, C] in float32, on a CPU also float64, which the caller may overwrite)."""

# e^x of such scores, and a block's sum of them, neither overflow nor vanish in float32.
_PLAIN_EXP = 60.0
_NOT_FINITE = "a score is NaN or infinite: nothing can be ranked by it"


@dataclass(frozen=True)
class Pass:
    """How the catalogue is passed over on a kind of device."""

    rows: int
    """Most query rows of a chunk."""
    block_scores: int
    """Most scores of a block."""
    waits: bool
    """Whether every block's results are looked at by the host before the next one is made."""

    def block_shape(self, num_queries: int, num_items: int) -> tuple[int, int]:
        """Rows and columns of a block."""
        columns = max(1, min(num_items, self.block_scores // min(self.rows, max(1, num_queries))))
        # Whole groups need no padding.
        columns = columns // GROUP * GROUP or columns
        return max(1, min(self.rows, self.block_scores // columns)), columns


# Measured best on one thread: a block stays near its core from the matmul to the last reduction.
_CPU_PASS = Pass(256, 1 << 19, waits=True)
# A few blocks of this size are within any card's memory, and each is a millisecond of work; wide ones have few lists to
# merge. Not measured.
_GPU_PASS = Pass(1024, 1 << 27, waits=False)


def pass_on(device: torch.device) -> Pass:
    """What suits the device."""
    return _CPU_PASS if device.type == "cpu" else _GPU_PASS


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
        self.num_items, self.device = len(items_VD), items_VD.device
        # The matmul of a block is faster where the items of a row of the operand are neighbours.
        self._items_DV = items_VD.T.contiguous()
        longest = [vectors.norm(dim=1).amax().double() for vectors in (queries_QD, items_VD) if len(vectors)]
        self.finite = bool(math.prod(longest) < torch.finfo(queries_QD.dtype).max / 2)
        """No score can be NaN or infinite: |<q, v>| <= |q| |v|."""

    def __call__(self, rows: slice) -> Callable[[slice], Tensor]:
        """Scores of some queries."""
        queries_RD = self._queries_QD[rows]
        return lambda items: queries_RD @ self._items_DV[:, items]


def rank_targets(scores: Scores, targets: Ragged, num_items: int, max_k: int, seen: Ragged | None = None) -> Ranked:
    """Rank every target (distinct ids per query) among the num_items items of the catalogue.

    Items in `seen` are filtered: they are in no list of their query, targets or not. Working memory is a few blocks of
    scores per thread, as suits the device of the scores (their `device`, if they have one, else the CPU). `scores` is
    called from several threads, unless torch is set to one or they are on a GPU.
    Raises DivergedError where a score is NaN or infinite.
    """
    num_queries, device = len(targets), getattr(scores, "device", torch.device("cpu"))
    way = pass_on(device)
    rows, columns = way.block_shape(num_queries, num_items)
    nothing = Ragged(np.zeros(0, np.int32), np.zeros(num_queries + 1, np.int64))
    rank_N = np.full(len(targets.ids), np.inf)
    nll_N = np.full(len(targets.ids), np.nan)
    top_Qk = np.full((num_queries, max_k), -1, dtype=np.int64)
    top_score_Qk = np.full((num_queries, max_k), -np.inf, dtype=np.float32)

    @torch.no_grad()
    def rank_rows(start: int) -> None:
        chunk = slice(start, min(start + rows, num_queries))
        place_N, own = _listed(targets, chunk, num_items, device)
        _, hidden = _listed(nothing if seen is None else seen, chunk, num_items, device)
        blocks = [slice(low, min(low + columns, num_items)) for low in range(0, num_items, columns)]
        first, log_total_R, score_N = _pass_over_catalogue(scores, chunk, own, hidden, blocks, max_k, way.waits)
        rank_N[place_N] = _ranks(first, own.row_N, score_N)
        nll_N[place_N] = (log_total_R[own.row_N] - score_N).double().cpu().numpy()
        top_Qk[chunk] = first.id_Rk.cpu().numpy()
        top_score_Qk[chunk] = first.value_Rk.float().cpu().numpy()

    _for_each(rank_rows, range(0, num_queries, rows), torch.get_num_threads() if way.waits else 1)
    filtered_N = None if seen is None else targets.within(seen)
    if filtered_N is not None:
        rank_N[filtered_N] = np.inf
    return Ranked(rank_N, nll_N, top_Qk, top_score_Qk, filtered_N)


def _for_each(work: Callable[[int], None], starts: range, threads: int) -> None:
    """Run `work` for every start on so many threads, each of which torch gives one."""
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


@dataclass(frozen=True)
class Pairs:
    """Query rows of a chunk and items, by rising item. Where a block's lie is known without asking the device."""

    row_N: Tensor
    item_N: Tensor
    host_item_N: NDArray[np.integer]

    def inside(self, items: slice) -> tuple[slice, tuple[Tensor, Tensor]]:
        """Those of some items, and where they lie in a block of these."""
        here = slice(*np.searchsorted(self.host_item_N, [items.start, items.stop]).tolist())
        return here, (self.row_N[here], self.item_N[here] - items.start)


def _listed(lists: Ragged, rows: slice, num_items: int, device: torch.device) -> tuple[NDArray[np.int64], Pairs]:
    """Places, in the lists of all queries, of the catalogue items that are listed for some, and these items."""
    low, high = lists.offsets[rows.start], lists.offsets[rows.stop]
    place_N = low + np.flatnonzero(lists.ids[low:high] < num_items)
    place_N = place_N[np.argsort(lists.ids[place_N], kind="stable")]
    item_N = lists.ids[place_N]
    row_N = torch.from_numpy(lists.rows[place_N] - rows.start).to(device)
    return place_N, Pairs(row_N, torch.from_numpy(item_N.astype(np.int64)).to(device), item_N)


def _pass_over_catalogue(
    scores: Scores, rows: slice, own: Pairs, hidden: Pairs, blocks: Sequence[slice], max_k: int, waits: bool
) -> tuple[TopRows, Tensor, Tensor]:
    """The first k items of the rows, the log of their sums of e^score [R], and the scores of their targets [N].

    Where it waits, a block's largest scores say how its exponentials are summed; else they are always shifted.
    """
    finite, scores_of = getattr(scores, "finite", False), scores(rows)
    log_totals, target_scores, ranges, first = [], [], [], None
    for items in blocks:
        block_RC = scores_of(items)
        # 0, or NaN where a score is not finite.
        unfit = 0.0 if finite else 0.0 * block_RC.amin()
        # The target's own score comes from the same block as its competitors', so equal items stay equal.
        (_, own_N), (_, hidden_P) = own.inside(items), hidden.inside(items)
        target_scores.append(block_RC[own_N])
        if block_RC.shape[1] % GROUP:
            block_RC = torch.nn.functional.pad(block_RC, (0, -block_RC.shape[1] % GROUP), value=-torch.inf)
        hidden_score_P = block_RC[hidden_P]
        block_RC[hidden_P] = -torch.inf
        largest_RG = block_RC.unflatten(1, (-1, GROUP)).amax(-1)
        largest_R = largest_RG.amax(1).scatter_reduce(0, hidden_P[0], hidden_score_P, "amax")
        ranges.append(torch.stack(torch.aminmax(largest_R)) + unfit)
        shifted = not waits or _reach(ranges[-1]) > _PLAIN_EXP
        first = first or (TopItems if waits else TopKeys)(len(block_RC), max_k, block_RC)
        first.add(block_RC, largest_RG, items.start)
        block_RC[hidden_P] = hidden_score_P
        log_totals.append(_log_sum_exp_(block_RC, largest_R, shifted))
    assert first is not None, "an empty catalogue"
    _reach(torch.stack(ranges))
    log_total_R = torch.logsumexp(torch.stack(log_totals), dim=0)
    return first.finish(), log_total_R, torch.cat(target_scores)


def _reach(range_N: Tensor) -> float:
    """The largest magnitude of some scores. Raises DivergedError where one is not finite."""
    reach = float(range_N.abs().amax())
    if not math.isfinite(reach):
        raise DivergedError(_NOT_FINITE)
    return reach


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
