"""The sum over the candidates of a sampled softmax in flat memory: one tile of rows and candidates at a time.

Enters: queries q = scale * h, a table whose rows are the candidates, the log of their inclusion probabilities and the
column each row leaves out. Leaves: the log of the corrected sum of exponentials of every row, differentiable in q.
`softmax_state` serves a constant table: the gradient is accumulated with the sum, so a score is computed once (as
FlashAttention does, arXiv 2205.14135, with the candidates as keys and values). `two_pass_log_sum` serves a table that
is trained: it computes the scores again for the gradients of q and of the table.

A state (max_T, sum_T, weighted_TD) stands for the candidates seen so far, with logit_k = <q, c_k> - log pi_k:
sum = sum_k exp(logit_k - max), weighted = sum_k exp(logit_k - max) c_k. Any `max` serves for which neither overflows
and the sum does not vanish; no candidate at all is max -inf, sum 0.

T = target rows, K = candidates, G = windows with a pi of their own (two passes only), R = rows of the table,
D = retrieval width; P, C = rows and candidates of a tile.
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
_RANGE_CHECK = 1 << 17


def softmax_state(q_TD: Tensor, table_RD: Tensor, ids_K: Tensor, log_pi_K: Tensor, hit_T: Tensor) -> State:
    """The state of every row over the candidates ids_K except its hit; no gradient.

    The state has the dtype of q, float32 or float64. Matmuls take it too, except that a bfloat16 table on a GPU is
    multiplied as it is, with sums in float32.
    """
    tiles = _Tiles.of(q_TD, table_RD, ids_K, hit_T)
    with torch.no_grad(), torch.autocast(q_TD.device.type, enabled=False):
        if len(ids_K) and len(q_TD) and float(torch.linalg.vector_norm(q_TD, dim=1).max()) <= _PLAIN_NORM:
            state = _plain_state(tiles, q_TD, log_pi_K)
            # Nothing has bounded the table's rows: where the sums left the range, the careful way is taken.
            fits = (state[1] > _PLAIN_LEAST_SUM).all() & state[1].isfinite().all() & state[2].isfinite().all()
            if fits:
                return state
        return _online_state(tiles, q_TD, log_pi_K)


def merge(first: State, second: State) -> State:
    """The state of two disjoint candidate sets together."""
    max_T = torch.maximum(first[0], second[0])
    reference_T = _or_zero(max_T)
    factors = [torch.exp(state[0] - reference_T) for state in (first, second)]
    sum_T = first[1] * factors[0] + second[1] * factors[1]
    return max_T, sum_T, first[2] * factors[0][:, None] + second[2] * factors[1][:, None]


def loss_from_state(q_TD: Tensor, positive_TD: Tensor, state: State) -> Tensor:
    """loss_T of the positive against a state computed without gradient; differentiable in q and the positive."""
    return loss_from_log_sum(q_TD, positive_TD, _StateLogSum.apply(q_TD, *state))


def loss_from_log_sum(q_TD: Tensor, positive_TD: Tensor, log_sum_T: Tensor) -> Tensor:
    """-log(e^p / (e^p + e^log_sum)) with p = <q, positive>; NaN where p is not finite."""
    positive_T = (q_TD * positive_TD.to(q_TD.dtype)).sum(-1)
    loss_T = -torch.nn.functional.logsigmoid(positive_T - log_sum_T)
    # An infinite score of the positive would otherwise be a perfect loss.
    return torch.where(positive_T.isfinite(), loss_T, torch.nan)


def two_pass_log_sum(
    q_TD: Tensor, table_RD: Tensor, ids_K: Tensor, log_pi_GK: Tensor, hit_T: Tensor, window_T: Tensor | None = None
) -> Tensor:
    """Log of the sum over the candidates except the hit, log_sum_T; differentiable in q and the table.

    log_pi_GK is [K] where no window_T picks its lines.
    """
    return _TwoPassLogSum.apply(q_TD, table_RD, ids_K, log_pi_GK, hit_T, window_T)


@dataclass(frozen=True)
class _Tile:
    """Candidates `columns` (of K) against rows `rows` (of T); hit_rows and hit_columns count from the tile's corner."""

    rows: slice
    columns: slice
    vectors_CD: Tensor
    hit_rows: Tensor
    hit_columns: Tensor


@dataclass(frozen=True)
class _Tiles:
    """Walks over candidates, and for every block of them over rows, so that a candidate is gathered once."""

    table_RD: Tensor
    ids_K: Tensor
    first_id: int | None
    num_rows: int
    rows: int
    columns: int
    operand: torch.dtype
    hit_row_H: Tensor
    hit_column_H: Tensor
    hit_offset: list[int]

    @classmethod
    def of(cls, q_TD: Tensor, table_RD: Tensor, ids_K: Tensor, hit_T: Tensor) -> _Tiles:
        """Tile sizes by device; the H rows with a hit sorted by tile."""
        num_rows, num_columns = len(q_TD), len(ids_K)
        on_cpu = q_TD.device.type == "cpu"
        most_rows, most_columns, scores = _CPU_TILE if on_cpu else _GPU_TILE
        rows = max(1, min(num_rows, most_rows))
        columns = max(1, min(num_columns, most_columns, scores // rows))
        blocks = -(-num_rows // rows)
        row_H = (hit_T >= 0).nonzero()[:, 0]
        column_H = hit_T[row_H]
        tile_H, order_H = torch.sort(column_H // columns * blocks + row_H // rows)
        edges = torch.arange(-(-num_columns // columns) * blocks + 1, device=tile_H.device)
        # float16 would overflow: the plain weights reach exp(40).
        half = table_RD.dtype == torch.bfloat16 and not on_cpu
        return cls(
            table_RD,
            ids_K,
            _first_of_range(ids_K),
            num_rows,
            rows,
            columns,
            table_RD.dtype if half else q_TD.dtype,
            row_H[order_H] % rows,
            column_H[order_H] % columns,
            torch.searchsorted(tile_H, edges).tolist(),
        )

    def __iter__(self) -> Iterator[_Tile]:
        num_columns, cell = len(self.ids_K), 0
        for column in range(0, num_columns, self.columns):
            columns = slice(column, min(column + self.columns, num_columns))
            vectors_CD = self._gather(columns)
            for row in range(0, self.num_rows, self.rows):
                hits = slice(self.hit_offset[cell], self.hit_offset[cell + 1])
                rows = slice(row, min(row + self.rows, self.num_rows))
                yield _Tile(rows, columns, vectors_CD, self.hit_row_H[hits], self.hit_column_H[hits])
                cell += 1

    def _gather(self, columns: slice) -> Tensor:
        if self.first_id is None:
            rows_CD = self.table_RD.index_select(0, self.ids_K[columns])
        else:
            rows_CD = self.table_RD[self.first_id + columns.start : self.first_id + columns.stop]
        return rows_CD.to(self.operand)

    def workspace(self, like: Tensor) -> Tensor:
        """Room for the scores of one tile."""
        return like.new_empty(self.rows * self.columns)


def _first_of_range(ids_K: Tensor) -> int | None:
    """The first id where the ids are consecutive, so that a view replaces the gather; None where they are not."""
    num = len(ids_K)
    if num == 0 or int(ids_K[-1] - ids_K[0]) != num - 1:
        return None
    for start in range(0, num, _RANGE_CHECK):
        if not (ids_K[start : start + _RANGE_CHECK + 1].diff() == 1).all():
            return None
    return int(ids_K[0])


def _scores(q_TD: Tensor, tile: _Tile, room: Tensor) -> Tensor:
    """<q, c> of the tile, written into `room`."""
    out_PC = room[: (tile.rows.stop - tile.rows.start) * len(tile.vectors_CD)].view(-1, len(tile.vectors_CD))
    q_PD = q_TD[tile.rows].to(tile.vectors_CD.dtype)
    if q_PD.dtype == out_PC.dtype:
        return torch.mm(q_PD, tile.vectors_CD.T, out=out_PC)
    return torch.mm(q_PD, tile.vectors_CD.T, out_dtype=out_PC.dtype, out=out_PC)


def _add_product(total_PD: Tensor, weight_PC: Tensor, vectors_CD: Tensor) -> None:
    """total += weight @ vectors, summed in the dtype of total."""
    if weight_PC.dtype == vectors_CD.dtype:
        total_PD.addmm_(weight_PC, vectors_CD)
    else:
        total_PD += torch.mm(weight_PC.to(vectors_CD.dtype), vectors_CD, out_dtype=total_PD.dtype)


def _plain_state(tiles: _Tiles, q_TD: Tensor, log_pi_K: Tensor) -> State:
    """The state with max = 0: no pass over the scores but exp, since 1 / pi is a factor of the candidate instead."""
    sum_T, weighted_TD, room = torch.zeros_like(q_TD[:, 0]), torch.zeros_like(q_TD), tiles.workspace(q_TD)
    for tile in tiles:
        if tile.rows.start == 0:
            factor_C = log_pi_K[tile.columns].to(q_TD.dtype).neg().exp_()
            scaled_CD = tile.vectors_CD * factor_C[:, None].to(tile.vectors_CD.dtype)
        weight_PC = _scores(q_TD, tile, room).exp_()
        if len(tile.hit_rows):
            weight_PC[tile.hit_rows, tile.hit_columns] = 0.0
        sum_T[tile.rows].addmv_(weight_PC, factor_C)
        _add_product(weighted_TD[tile.rows], weight_PC, scaled_CD)
    return torch.zeros_like(sum_T), sum_T, weighted_TD


def _online_state(tiles: _Tiles, q_TD: Tensor, log_pi_K: Tensor) -> State:
    """The state for any scores: the running maximum rescales what came before."""
    max_T, sum_T = torch.full_like(q_TD[:, 0], -torch.inf), torch.zeros_like(q_TD[:, 0])
    weighted_TD, room = torch.zeros_like(q_TD), tiles.workspace(q_TD)
    for tile in tiles:
        factor_P, weight_PC = _exponentials(_logits(q_TD, log_pi_K, None, tile, room), max_T[tile.rows])
        sum_T[tile.rows] = sum_T[tile.rows] * factor_P + weight_PC.sum(1)
        weighted_TD[tile.rows] *= factor_P[:, None]
        _add_product(weighted_TD[tile.rows], weight_PC, tile.vectors_CD)
        if tile.rows.start == 0:
            sum_T += _nan_unless_finite(tile.vectors_CD)
    return max_T, sum_T, weighted_TD


def _exponentials(logits_PC: Tensor, max_P: Tensor) -> tuple[Tensor, Tensor]:
    """Raise max_P to the tile's; the factor of earlier sums, and exp(logits - max_P) in place of the logits."""
    before_P = max_P.clone()
    torch.maximum(max_P, logits_PC.amax(1), out=max_P)
    reference_P = _or_zero(max_P)
    return torch.exp(before_P - reference_P), logits_PC.sub_(reference_P[:, None]).exp_()


def _or_zero(max_T: Tensor) -> Tensor:
    """The maximum, 0 for rows that have met no candidate but their hit: -inf - -inf would be NaN."""
    return torch.where(max_T == -torch.inf, 0.0, max_T)


def _nan_unless_finite(vectors_CD: Tensor) -> Tensor:
    """0, or NaN: a score of -inf adds nothing to a sum of exponentials, but it is no score."""
    return 0.0 * vectors_CD.sum()


def _logits(q_TD: Tensor, log_pi_GK: Tensor, window_T: Tensor | None, tile: _Tile, room: Tensor) -> Tensor:
    """Corrected scores of the tile, -inf for hits."""
    logits_PC = _scores(q_TD, tile, room)
    log_pi_GC = log_pi_GK[..., tile.columns].to(q_TD.dtype)
    logits_PC -= log_pi_GC if window_T is None else log_pi_GC.index_select(0, window_T[tile.rows])
    if len(tile.hit_rows):
        logits_PC[tile.hit_rows, tile.hit_columns] = -torch.inf
    return logits_PC


class _StateLogSum(torch.autograd.Function):
    """log_sum_T of a state, whose gradient in q is weighted / sum."""

    @staticmethod
    def forward(ctx: Any, q_TD: Tensor, max_T: Tensor, sum_T: Tensor, weighted_TD: Tensor) -> Tensor:
        # Without a candidate the sum is 0 and so is what it would divide.
        ctx.save_for_backward(weighted_TD / torch.where(sum_T == 0, 1.0, sum_T)[:, None])
        return max_T + sum_T.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (mean_TD,) = ctx.saved_tensors
        return grads[0][:, None] * mean_TD, None, None, None


class _TwoPassLogSum(torch.autograd.Function):
    """log_sum_T; the backward pass computes every tile's scores again."""

    @staticmethod
    def forward(
        ctx: Any,
        q_TD: Tensor,
        table_RD: Tensor,
        ids_K: Tensor,
        log_pi_GK: Tensor,
        hit_T: Tensor,
        window_T: Tensor | None,
    ) -> Tensor:
        tiles = _Tiles.of(q_TD, table_RD, ids_K, hit_T)
        max_T, sum_T = torch.full_like(q_TD[:, 0], -torch.inf), torch.zeros_like(q_TD[:, 0])
        room = tiles.workspace(q_TD)
        with torch.autocast(q_TD.device.type, enabled=False):
            for tile in tiles:
                logits_PC = _logits(q_TD, log_pi_GK, window_T, tile, room)
                factor_P, weight_PC = _exponentials(logits_PC, max_T[tile.rows])
                sum_T[tile.rows] = sum_T[tile.rows] * factor_P + weight_PC.sum(1)
                if tile.rows.start == 0:
                    sum_T += _nan_unless_finite(tile.vectors_CD)
        # Not log_sum: scores below -1000 with their rounding would come out of exp as wrong shares.
        ctx.save_for_backward(q_TD, table_RD, ids_K, log_pi_GK, hit_T, window_T, max_T, sum_T)
        return max_T + sum_T.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_TD, table_RD, ids_K, log_pi_GK, hit_T, window_T, max_T, sum_T = ctx.saved_tensors
        tiles = _Tiles.of(q_TD, table_RD, ids_K, hit_T)
        grad_q_TD = torch.zeros_like(q_TD)
        grad_table_RD = torch.zeros_like(table_RD, dtype=q_TD.dtype) if ctx.needs_input_grad[1] else None
        reference_T, factor_T = _or_zero(max_T), grads[0] / torch.where(sum_T == 0, 1.0, sum_T)
        room = tiles.workspace(q_TD)
        with torch.autocast(q_TD.device.type, enabled=False):
            for tile in tiles:
                logits_PC = _logits(q_TD, log_pi_GK, window_T, tile, room)
                grad_PC = logits_PC.sub_(reference_T[tile.rows, None]).exp_().mul_(factor_T[tile.rows, None])
                _add_product(grad_q_TD[tile.rows], grad_PC, tile.vectors_CD)
                if grad_table_RD is not None:
                    grad_CD = torch.zeros_like(tile.vectors_CD, dtype=q_TD.dtype)
                    _add_product(grad_CD, grad_PC.T, q_TD[tile.rows].to(tile.vectors_CD.dtype))
                    grad_table_RD.index_add_(0, ids_K[tile.columns], grad_CD)
        grad_table_RD = None if grad_table_RD is None else grad_table_RD.to(table_RD.dtype)
        return grad_q_TD, grad_table_RD, None, None, None, None
