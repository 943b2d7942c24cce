"""Item vectors without gradient as stage 2 reads them: all of them on every rank, or dealt out over the ranks.

Enters: a model whose embedder is frozen, and on every rank its own queries and its own candidates. Leaves: vectors by
item id, and the log sum of the rank's queries, differentiable in them. Value, gradient and C are the same either way.

Dealt out, a rank needs 1/W of the catalogue's memory. It turns the candidates of every rank's negative group that it
holds into a partial state (see bfm.objective.tiled); a group's partial states are merged by a max- and a sum-reduction.
Data may differ between ranks in every way, down to no queries and no candidates: what decides about a collective is
known to all ranks, so all issue the same ones in the same order. The gradient needs none.

I = all items, W = ranks, S = items of a rank, Q = queries of a rank, K = candidates of a rank's group, N = ids asked
for or sent, M = ids received, D = retrieval width; q, m = queries and candidates of the rank whose turn it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bfm.model.two_part import TwoPartModel
from bfm.objective.fused import fused_softmax_state, prefers_fused
from bfm.objective.methods import shares_catalogue
from bfm.objective.softmax import log_sum
from bfm.objective.tiled import State, log_sum_of_state, or_zero, softmax_state


@dataclass(frozen=True)
class WholeItems:
    """Every rank holds all vectors."""

    vectors_ID: Tensor
    method: str = "auto"
    """Of softmax.log_sum."""

    def vectors(self, ids_N: Tensor) -> Tensor:
        """Rows of the items, [N, D]."""
        return self.vectors_ID[ids_N]

    def log_sum(self, q_QD: Tensor, ids_K: Tensor, log_pi_K: Tensor) -> Tensor:
        """log_sum_Q as of softmax.log_sum, ids_K being item ids; differentiable in q."""
        return log_sum(q_QD, self.vectors_ID, ids_K, log_pi_K, method=self.method)


@dataclass(frozen=True)
class _Route:
    """How ids reach the ranks that hold them: order_N sorts them by rank; sent and received count them per rank."""

    order_N: Tensor
    sent: list[int]
    received: list[int]
    # Of every rank.
    queries: list[int]


class DealtItems:
    """The vectors of items r, r + W, r + 2W, ... on rank r, and the operations on those of all ranks.

    Items are often numbered by popularity: contiguous shards would leave most of the work to the first rank.
    Every method is collective: all ranks call the same methods in the same order.
    """

    def __init__(self, rows_SD: Tensor) -> None:
        """Hold this rank's vectors, in the order of their items' ids."""
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.rows_SD = rows_SD.detach()
        self._state_of = fused_softmax_state if prefers_fused(rows_SD) else softmax_state

    def vectors(self, ids_N: Tensor) -> Tensor:
        """The vectors of the items ids_N (int64), [N, D], in the dtype in which they are held; N may differ by rank.

        A rank sends N ids and receives N x D values, and answers the others likewise.
        """
        route = self._route(ids_N, 0)
        asked_M = self._exchange(ids_N[route.order_N], route.sent, route.received)
        answer_ND = self._exchange(self.rows_SD[asked_M // self.world], route.received, route.sent)
        return torch.empty_like(answer_ND).index_copy_(0, route.order_N, answer_ND)

    def log_sum(self, q_QD: Tensor, ids_K: Tensor, log_pi_K: Tensor) -> Tensor:
        """log_sum_Q of this rank's queries over its own candidates, as of softmax.log_sum; differentiable in q.

        ids_K (int64, distinct) are item ids, log_pi_K floats. Q and K may differ by rank, dtypes must not.

        Per rank, in units of one number: 2 K for its candidates (and about as many received), W x Q x D for the
        queries of all groups, W x Q x (D + 2) for their partial states.
        Computes W x Q queries against the candidates that it holds: about the work of one group.
        """
        return log_sum_of_state(q_QD, self._state(q_QD, ids_K, log_pi_K))

    @torch.no_grad()
    def _state(self, q_QD: Tensor, ids_K: Tensor, log_pi_K: Tensor) -> State:
        """The state of this rank's queries over its own candidates, wherever they are held."""
        route = self._route(ids_K, len(q_QD))
        ids_M = self._exchange(ids_K[route.order_N], route.sent, route.received) // self.world
        log_pi_M = self._exchange(log_pi_K[route.order_N], route.sent, route.received)
        own = None
        parts = zip(route.queries, ids_M.split(route.received), log_pi_M.split(route.received), strict=True)
        for source, (num_queries, ids_m, log_pi_m) in enumerate(parts):
            query_qD = q_QD.contiguous() if source == self.rank else q_QD.new_empty(num_queries, q_QD.shape[1])
            if num_queries:
                dist.broadcast(query_qD, source)
            state = self._merge(self._state_of(query_qD, self.rows_SD, ids_m, log_pi_m), source)
            own = state if source == self.rank else own
        assert own is not None
        return own

    def _merge(self, state: State, receiver: int) -> State:
        """On the receiver the merge of all ranks' states of its queries, elsewhere nothing meaningful."""
        max_Q, sum_Q, weighted_QD = state
        if not len(max_Q):
            return state
        top_Q = max_Q.clone()
        dist.all_reduce(top_Q, dist.ReduceOp.MAX)
        # A NaN that the reduction loses stays in its own rank's factor.
        factor_Q = torch.exp(max_Q - or_zero(top_Q))
        both_QD1 = torch.cat([weighted_QD, sum_Q[:, None]], dim=1) * factor_Q[:, None]
        dist.reduce(both_QD1, receiver)
        return top_Q, both_QD1[:, -1], both_QD1[:, :-1]

    def _route(self, ids_N: Tensor, num_queries: int) -> _Route:
        owner_N = ids_N % self.world
        sent = torch.bincount(owner_N, minlength=self.world).tolist()
        gathered = self._gather([num_queries, *sent])
        received = [values[1 + self.rank] for values in gathered]
        return _Route(owner_N.argsort(stable=True), sent, received, [values[0] for values in gathered])

    def _gather(self, values: list[int]) -> list[list[int]]:
        """The values of every rank, in the order of the ranks."""
        own = torch.tensor(values, device=self.rows_SD.device)
        gathered = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(gathered, own)
        return torch.stack(gathered).tolist()

    def _exchange(self, values_N: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Deal out consecutive runs of the first axis to the ranks; the runs from every rank, one after the other."""
        out_M = values_N.new_empty(sum(received), *values_N.shape[1:])
        dist.all_to_all_single(out_M, values_N.contiguous(), received, sent)
        return out_M


FrozenItems = WholeItems | DealtItems


def freeze_items(model: TwoPartModel, dtype: torch.dtype, method: str, rank: int, world: int) -> FrozenItems:
    """Embed the catalogue with a model outside any engine, on its device; this rank's share where it is dealt out."""
    if shares_catalogue(method, world, 4 * model.item_store.num_items * model.shape.d_item):
        return DealtItems(model.embed_all(first=rank, step=world).to(dtype))
    return WholeItems(model.embed_all().to(dtype), method)
