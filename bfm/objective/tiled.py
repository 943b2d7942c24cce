"""The sum over the candidates of a sampled softmax in flat memory: one tile of queries and candidates at a time.

Enters: queries q = scale * h, a table whose rows are the candidates, the log of their inclusion probabilities. Leaves:
the log of the corrected sum of exponentials of every query, differentiable in q. And what is multiplied in which
precision: `as_multiplied` rounds queries and vectors once, for all who score with them.
`softmax_state` serves a constant table: the gradient is accumulated with the sum, so a score is computed once (as
FlashAttention does, arXiv 2205.14135, with the candidates as keys and values). `two_pass_log_sum` serves a table that
is trained: it computes the scores again for the gradients of q and of the table.

A state (max_Q, sum_Q, weighted_QD) stands for the candidates seen so far, with logit_k = <q, c_k> - log pi_k:
sum = sum_k exp(logit_k - max), weighted = sum_k exp(logit_k - max) c_k. Any `max` serves for which neither overflows
and the sum does not vanish. A log pi of +inf says that the candidate is absent; no candidate at all is max -inf, sum 0.

Q = queries, K = candidates, G = windows with a pi of their own (two passes only), R = rows of the table,
D = retrieval width; P, C = queries and candidates of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

State = tuple[Tensor, Tensor, Tensor]

# Most rows, columns and scores of a tile: on a CPU it stays in a core's cache, a GPU only has to be filled by it.
_CPU_TILE = (256, 8192, 1 << 19)
_GPU_TILE = (8192, 1 << 17, 1 << 25)
# exp(40) times a sum over millions of candidates, each of which stands for millions, is within float32.
_PLAIN_NORM, _PLAIN_LEAST_SUM = 40.0, 1e-20


def softmax_state(q_QD: Tensor, table_RD: Tensor, ids_K: Tensor, log_pi_K: Tensor) -> State:
    """The state of every query over the candidates ids_K; no gradient.

    The state has the dtype of q, float32 or float64; products are taken as `product_dtype` says.
    """
    operand = product_dtype(q_QD, table_RD)
    with torch.no_grad(), torch.autocast(q_QD.device.type, enabled=False):
        if len(ids_K) and len(q_QD) and float(torch.linalg.vector_norm(q_QD, dim=1).max()) <= _PLAIN_NORM:
            state = _plain_state(_tiles(q_QD, table_RD, ids_K, operand), q_QD, log_pi_K)
            # Nothing has bounded the table's rows: where the sums left the range, the careful way is taken.
            fits = (state[1] > _PLAIN_LEAST_SUM).all() & state[1].isfinite().all() & state[2].isfinite().all()
            if fits:
                return state
        tiles, weighted_QD = _tiles(q_QD, table_RD, ids_K, operand), torch.zeros_like(q_QD)
        return *_online_sum(tiles, q_QD, log_pi_K, None, weighted_QD), weighted_QD


def merge(first: State, second: State) -> State:
    """The state of two disjoint candidate sets together; there may be leading dimensions."""
    max_Q = torch.maximum(first[0], second[0])
    reference_Q = or_zero(max_Q)
    factors = [torch.exp(state[0] - reference_Q) for state in (first, second)]
    sum_Q = first[1] * factors[0] + second[1] * factors[1]
    return max_Q, sum_Q, first[2] * factors[0][..., None] + second[2] * factors[1][..., None]


def log_sum_of_state(q_QD: Tensor, state: State) -> Tensor:
    """log_sum_Q of a state that was computed from q without gradient; differentiable in q."""
    return _StateLogSum.apply(q_QD, *state)


def two_pass_log_sum(
    q_QD: Tensor, table_RD: Tensor, ids_K: Tensor, log_pi_GK: Tensor, window_Q: Tensor | None
) -> Tensor:
    """Log of the sum over the candidates, log_sum_Q; differentiable in q and the table.

    log_pi_GK is [K] where no window_Q picks its lines.
    """
    return _TwoPassLogSum.apply(q_QD, table_RD, ids_K, log_pi_GK, window_Q, product_dtype(q_QD, table_RD))


def as_multiplied(x_ND: Tensor) -> Tensor:
    """x with the values that matmuls see: rounded to bfloat16 where autocast says so; dtype and gradient are x's.

    Products of bfloat16 numbers are exact in float32, so what has been rounded here has one score everywhere: in the
    sum over the candidates by any method, and as a target, where it must cancel against its own term of the sum.
    """
    if not _autocasts_to_bfloat16(x_ND.device):
        return x_ND
    # The difference is exact in float32.
    return x_ND + (x_ND.detach().bfloat16().to(x_ND.dtype) - x_ND.detach())


def product_dtype(q_QD: Tensor, table_RD: Tensor) -> torch.dtype:
    """What q and the table are multiplied in; sums have the dtype of q.

    On a GPU bfloat16, where the table is or autocast says so (float16 would overflow: plain weights reach exp(40)); on
    a CPU the dtype of q, which is faster there and the same for what `as_multiplied` has rounded.
    """
    half = table_RD.dtype == torch.bfloat16 or _autocasts_to_bfloat16(q_QD.device)
    return torch.bfloat16 if half and q_QD.device.type != "cpu" else q_QD.dtype


def _autocasts_to_bfloat16(device: torch.device) -> bool:
    return torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.bfloat16


def nan_unless_finite(vectors_CD: Tensor) -> Tensor:
    """0, or NaN: a score of -inf adds nothing to a sum of exponentials, but it is no score."""
    return 0.0 * vectors_CD.sum()


@dataclass(frozen=True)
class _Tile:
    """Queries `rows` (of Q) against candidates `columns` (of K)."""

    rows: slice
    columns: slice
    q_PD: Tensor
    vectors_CD: Tensor
    room_PC: Tensor
    """Where the scores are written: the same memory for every tile."""

    def scores(self) -> Tensor:
        """<q, c>, in the dtype of the room."""
        return _product(self.q_PD, self.vectors_CD.T, self.room_PC)

    def logits(self, log_pi_GK: Tensor, window_Q: Tensor | None) -> Tensor:
        """Corrected scores, -inf for absent candidates."""
        logits_PC, log_pi_GC = self.scores(), log_pi_GK[..., self.columns].to(self.q_PD.dtype)
        return logits_PC.sub_(log_pi_GC if window_Q is None else log_pi_GC.index_select(0, window_Q[self.rows]))


def _tiles(q_QD: Tensor, table_RD: Tensor, ids_K: Tensor, operand: torch.dtype) -> Iterator[_Tile]:
    """All tiles: block by block of candidates, so that one is gathered once, and for each over the queries."""
    most_rows, most_columns, scores = _CPU_TILE if q_QD.device.type == "cpu" else _GPU_TILE
    rows = max(1, min(len(q_QD), most_rows))
    columns = max(1, min(len(ids_K), most_columns, scores // rows))
    room = q_QD.new_empty(rows * columns)
    for column in range(0, len(ids_K), columns):
        chosen = slice(column, column + columns)
        vectors_CD = table_RD.index_select(0, ids_K[chosen]).to(operand)
        for row in range(0, len(q_QD), rows):
            part = slice(row, row + rows)
            q_PD = q_QD[part]
            room_PC = room[: len(q_PD) * len(vectors_CD)].view(len(q_PD), -1)
            yield _Tile(part, chosen, q_PD, vectors_CD, room_PC)


def _product(left_PX: Tensor, right_XY: Tensor, out_PY: Tensor) -> Tensor:
    """left @ right, multiplied in the dtype of right and summed in that of out."""
    left_PX = left_PX.to(right_XY.dtype)
    if right_XY.dtype == out_PY.dtype:
        return torch.mm(left_PX, right_XY, out=out_PY)
    return torch.mm(left_PX, right_XY, out_dtype=out_PY.dtype, out=out_PY)


def _add_product(total_PD: Tensor, weight_PC: Tensor, vectors_CD: Tensor) -> None:
    """total += weight @ vectors, multiplied in the dtype of vectors."""
    if weight_PC.dtype == vectors_CD.dtype:
        total_PD.addmm_(weight_PC, vectors_CD)
    else:
        total_PD += _product(weight_PC, vectors_CD, torch.empty_like(total_PD))


def _plain_state(tiles: Iterator[_Tile], q_QD: Tensor, log_pi_K: Tensor) -> State:
    """The state with max = 0: no pass over the scores but exp, since 1 / pi is a factor of the candidate instead."""
    sum_Q, weighted_QD = torch.zeros_like(q_QD[:, 0]), torch.zeros_like(q_QD)
    for tile in tiles:
        if tile.rows.start == 0:
            factor_C = log_pi_K[tile.columns].to(q_QD.dtype).neg().exp_()
            scaled_CD = tile.vectors_CD * factor_C[:, None].to(tile.vectors_CD.dtype)
        weight_PC = tile.scores().exp_()
        sum_Q[tile.rows].addmv_(weight_PC, factor_C)
        _add_product(weighted_QD[tile.rows], weight_PC, scaled_CD)
    return torch.zeros_like(sum_Q), sum_Q, weighted_QD


def _online_sum(
    tiles: Iterator[_Tile], q_QD: Tensor, log_pi_GK: Tensor, window_Q: Tensor | None, weighted_QD: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(max_Q, sum_Q) for any scores: the running maximum rescales what came before, also what is added to weighted."""
    max_Q, sum_Q = torch.full_like(q_QD[:, 0], -torch.inf), torch.zeros_like(q_QD[:, 0])
    for tile in tiles:
        factor_P, weight_PC = _exponentials(tile.logits(log_pi_GK, window_Q), max_Q[tile.rows])
        sum_Q[tile.rows] = sum_Q[tile.rows] * factor_P + weight_PC.sum(1)
        if weighted_QD is not None:
            weighted_QD[tile.rows] *= factor_P[:, None]
            _add_product(weighted_QD[tile.rows], weight_PC, tile.vectors_CD)
        if tile.rows.start == 0:
            sum_Q += nan_unless_finite(tile.vectors_CD)
    return max_Q, sum_Q


def _exponentials(logits_PC: Tensor, max_P: Tensor) -> tuple[Tensor, Tensor]:
    """Raise max_P to the tile's; the factor of earlier sums, and exp(logits - max_P) in place of the logits."""
    before_P = max_P.clone()
    torch.maximum(max_P, logits_PC.amax(1), out=max_P)
    reference_P = or_zero(max_P)
    return torch.exp(before_P - reference_P), logits_PC.sub_(reference_P[:, None]).exp_()


def or_zero(max_Q: Tensor) -> Tensor:
    """The maximum, 0 for queries that have met no candidate yet: -inf - -inf would be NaN."""
    return torch.where(max_Q == -torch.inf, 0.0, max_Q)


class _StateLogSum(torch.autograd.Function):
    """log_sum_Q of a state, whose gradient in q is weighted / sum."""

    @staticmethod
    def forward(ctx: Any, q_QD: Tensor, max_Q: Tensor, sum_Q: Tensor, weighted_QD: Tensor) -> Tensor:
        # Without a candidate the sum is 0 and so is what it would divide.
        ctx.save_for_backward(weighted_QD / torch.where(sum_Q == 0, 1.0, sum_Q)[:, None])
        return max_Q + sum_Q.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (mean_QD,) = ctx.saved_tensors
        return grads[0][:, None] * mean_QD, None, None, None


class _TwoPassLogSum(torch.autograd.Function):
    """log_sum_Q; the backward pass computes every tile's scores again."""

    @staticmethod
    def forward(
        ctx: Any,
        q_QD: Tensor,
        table_RD: Tensor,
        ids_K: Tensor,
        log_pi_GK: Tensor,
        window_Q: Tensor | None,
        operand: torch.dtype,
    ) -> Tensor:
        ctx.operand = operand
        with torch.autocast(q_QD.device.type, enabled=False):
            max_Q, sum_Q = _online_sum(_tiles(q_QD, table_RD, ids_K, operand), q_QD, log_pi_GK, window_Q, None)
        # Not log_sum: scores below -1000 with their rounding would come out of exp as wrong shares.
        ctx.save_for_backward(q_QD, table_RD, ids_K, log_pi_GK, window_Q, max_Q, sum_Q)
        return max_Q + sum_Q.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_QD, table_RD, ids_K, log_pi_GK, window_Q, max_Q, sum_Q = ctx.saved_tensors
        grad_q_QD = torch.zeros_like(q_QD)
        grad_table_RD = torch.zeros_like(table_RD, dtype=q_QD.dtype) if ctx.needs_input_grad[1] else None
        reference_Q, factor_Q = or_zero(max_Q), grads[0] / torch.where(sum_Q == 0, 1.0, sum_Q)
        with torch.autocast(q_QD.device.type, enabled=False):
            for tile in _tiles(q_QD, table_RD, ids_K, ctx.operand):
                logits_PC = tile.logits(log_pi_GK, window_Q)
                grad_PC = logits_PC.sub_(reference_Q[tile.rows, None]).exp_().mul_(factor_Q[tile.rows, None])
                _add_product(grad_q_QD[tile.rows], grad_PC, tile.vectors_CD)
                if grad_table_RD is not None:
                    grad_CD = torch.zeros_like(tile.vectors_CD, dtype=q_QD.dtype)
                    _add_product(grad_CD, grad_PC.T, tile.q_PD.to(tile.vectors_CD.dtype))
                    grad_table_RD.index_add_(0, ids_K[tile.columns], grad_CD)
        grad_table_RD = None if grad_table_RD is None else grad_table_RD.to(table_RD.dtype)
        return grad_q_QD, grad_table_RD, None, None, None, None
