"""Item vectors without gradient, dealt out over the ranks of the default process group, and the sampled softmax there.

Enters: on every rank its vectors, its own queries and its own candidates. Leaves: vectors by item id, and the loss of
the rank's rows, differentiable in the queries. Each rank turns the candidates of every rank's negative group that it
holds into a partial state (see bfm.objective.tiled); a group's partial states are merged by a max- and a sum-reduction.
Needs 1/W of the catalogue's memory per rank.

Data may differ between ranks in every way, down to no rows and no candidates: what decides about a collective is
known to all ranks, so all issue the same ones in the same order. The gradient needs none.

W = ranks, S = items of a rank, T = target rows of a rank, K = candidates of a rank's group, N = ids sent,
M = ids received, D = retrieval width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bfm.objective.fused import fused_softmax_state, prefers_fused
from bfm.objective.tiled import State, loss_from_state, softmax_state


@dataclass(frozen=True)
class _Route:
    """How ids reach the ranks that hold them: order_N sorts them by rank; sent and received count them per rank."""

    owner_N: Tensor
    order_N: Tensor
    sent: list[int]
    received: list[int]
    # Target rows of every rank.
    rows: list[int]


class DealtItems:
    """The vectors of items r, r + W, r + 2W, ... on rank r, and the operations on those of all ranks.

    Items are often numbered by popularity: contiguous shards would leave most of the work to the first rank.
    Every method is collective: all ranks call the same methods in the same order.
    """

    def __init__(self, rows_SD: Tensor, num_items: int) -> None:
        """Hold this rank's vectors of the catalogue's `num_items`, in the order of their ids."""
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        assert len(rows_SD) == len(range(self.rank, num_items, self.world)), "not what is dealt to this rank"
        self.rows_SD, self.num_items = rows_SD.detach(), num_items
        self._state_of = fused_softmax_state if prefers_fused(rows_SD) else softmax_state

    def vectors(self, ids_N: Tensor) -> Tensor:
        """The vectors of the items ids_N (int64), [N, D], in the dtype in which they are held; N may differ by rank.

        A rank sends N ids and receives N x D values, and answers the others likewise. Raises ValueError, on every
        rank, where one asks for an unknown item.
        """
        route = self._route(ids_N, 0)
        asked_M = self._exchange(ids_N[route.order_N], route.sent, route.received)
        answer_ND = self._exchange(self.rows_SD[asked_M // self.world], route.received, route.sent)
        return torch.empty_like(answer_ND).index_copy_(0, route.order_N, answer_ND)

    def loss(
        self, h_TD: Tensor, target_T: Tensor, ids_K: Tensor, log_pi_K: Tensor, hit_T: Tensor, scale: Tensor
    ) -> Tensor:
        """loss_T of this rank's rows among its own candidates; differentiable in h and scale.

        target_T and ids_K (int64, the latter distinct) are item ids, log_pi_K floats; hit_T is the column of the row's
        target among ids_K or -1. T and K may differ by rank, dtypes must not.

        Per rank, in units of one number: 2 K for its candidates (and about as many received), W x T x D for the
        queries of all groups, W x T x (D + 2) for their partial states, T x (W + D + 1) for hits and targets.
        Computes W x T rows against the candidates that it holds: about the work of one group.
        """
        q_TD = scale.float() * h_TD.float()
        return loss_from_state(q_TD, self.vectors(target_T), self._state(q_TD, ids_K, log_pi_K, hit_T))

    @torch.no_grad()
    def _state(self, q_TD: Tensor, ids_K: Tensor, log_pi_K: Tensor, hit_T: Tensor) -> State:
        """The state of this rank's rows over its own candidates, wherever they are held; arguments as of `loss`."""
        route = self._route(ids_K, len(q_TD))
        ids_M = self._exchange(ids_K[route.order_N], route.sent, route.received) // self.world
        log_pi_M = self._exchange(log_pi_K[route.order_N], route.sent, route.received)
        hits_M = self._exchange(_hits_by_owner(route, hit_T), [len(q_TD)] * self.world, route.rows)
        parts = zip(ids_M.split(route.received), log_pi_M.split(route.received), hits_M.split(route.rows), strict=True)
        own = None
        for source, (ids_m, log_pi_m, hit_t) in enumerate(parts):
            query_tD = q_TD.contiguous() if source == self.rank else q_TD.new_empty(route.rows[source], q_TD.shape[1])
            if len(query_tD):
                dist.broadcast(query_tD, source)
            state = self._merge(self._state_of(query_tD, self.rows_SD, ids_m, log_pi_m, hit_t), source)
            own = state if source == self.rank else own
        assert own is not None
        return own

    def _merge(self, state: State, receiver: int) -> State:
        """On the receiver the merge of all ranks' states of its rows, elsewhere nothing meaningful."""
        max_T, sum_T, weighted_TD = state
        if not len(max_T):
            return state
        top_T = max_T.clone()
        dist.all_reduce(top_T, dist.ReduceOp.MAX)
        # -inf - -inf is NaN: a row without a candidate on any rank is measured against 0. A NaN that the reduction
        # loses stays in its own rank's factor.
        factor_T = torch.exp(max_T - torch.where(top_T == -torch.inf, 0.0, top_T))
        both_TD1 = torch.cat([weighted_TD, sum_T[:, None]], dim=1) * factor_T[:, None]
        dist.reduce(both_TD1, receiver)
        return top_T, both_TD1[:, -1], both_TD1[:, :-1]

    def _route(self, ids_N: Tensor, num_rows: int) -> _Route:
        """Raises ValueError on every rank where any rank's ids are not all of the catalogue."""
        known = not len(ids_N) or bool((ids_N.min() >= 0) & (ids_N.max() < self.num_items))
        owner_N = ids_N % self.world
        sent = torch.bincount(owner_N, minlength=self.world).tolist()
        gathered = self._gather([int(known), num_rows, *sent])
        if unknown := [rank for rank, values in enumerate(gathered) if not values[0]]:
            raise ValueError(f"ranks {unknown} ask for items outside 0 to {self.num_items - 1}")
        return _Route(
            owner_N,
            owner_N.argsort(stable=True),
            sent,
            received=[values[2 + self.rank] for values in gathered],
            rows=[values[1] for values in gathered],
        )

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


def _hits_by_owner(route: _Route, hit_T: Tensor) -> Tensor:
    """For every rank in turn, the hit of every row as a place among the candidates sent there, -1 elsewhere; [W T]."""
    rows = (hit_T >= 0).nonzero()[:, 0]
    column = hit_T[rows]
    place_N = torch.empty_like(route.order_N)
    place_N[route.order_N] = torch.arange(len(place_N), device=place_N.device)
    sent_W = torch.tensor(route.sent, device=place_N.device)
    start_W = sent_W.cumsum(0) - sent_W
    hit_WT = hit_T.new_full((len(route.sent), len(hit_T)), -1)
    owner = route.owner_N[column]
    hit_WT[owner, rows] = place_N[column] - start_W[owner]
    return hit_WT.flatten()
