"""The log of the sum over a group's candidates, by which the sampled softmax of a query is normalised.

    log_sum_q = log sum_k e^{<q, c_k> - log pi_qk}        loss_t = log_sum_q - <q, c_t> for each target t of q

A candidate stands for 1/pi of its kind, pi being its chance to be a candidate of this query, so the sum estimates the
full softmax's sum without bias. The query's own targets are always candidates: their pi is 1. With pi = 1 for every
item the loss is the full softmax.

Enters: queries q = scale * h, a table with the ids of the candidates, log inclusion probabilities. Leaves: log_sum_Q.
One contract, several implementations; `log_sum` chooses.

Q = queries, K = candidates shared by the queries, G = windows whose queries have one pi, R = rows of the table that
candidates are taken from, D = retrieval width; T = targets of a fixed sample, C = candidates of a block of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bfm.model.blocks import add_rows
from bfm.objective.fused import fused_softmax_state, prefers_fused
from bfm.objective.methods import CONSTANT_ONLY
from bfm.objective.tiled import log_sum_of_state, nan_unless_finite, or_zero, softmax_state, two_pass_log_sum

# Scores up to which the dense form is the fastest, for a constant table, and for a trained one, of which it keeps 16 MB
# for the backward pass (measured, one CPU thread).
_DENSE_SCORES, _DENSE_SCORES_LIVE = 1 << 17, 1 << 22
# Of a fixed sample's loss; a GPU only has to be filled.
_BLOCK_SCORES, _GPU_BLOCK_SCORES = 1 << 22, 1 << 27


def log_sum(
    q_QD: Tensor,
    table_RD: Tensor,
    ids_K: Tensor,
    log_pi_GK: Tensor,
    *,
    window_Q: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    """The log of every query's corrected sum over the candidates, log_sum_Q, in the dtype of q (float32 or wider).

    The candidates are the rows ids_K (int64, distinct; fastest ascending) of the table. window_Q (int64) is the query's
    line of log_pi_GK; without it pi is the same for all queries, and log_pi_GK is [K]. A log pi of +inf says that the
    candidate is absent; where all of a line are, the log sum is -inf and its gradient 0. Differentiable in q and, by
    `reference` and `two_pass`, the table.

    All methods have one value, up to the rounding of sums, where q and the table have passed `as_multiplied`; where
    products are bfloat16, so are the weights of the gradient's means. `reference` stores Q x K scores; the others keep
    one tile of them. A score that is not finite gives its query a log sum of NaN or infinity. Where the table needs a
    gradient or there are windows, methods that serve neither (CONSTANT_ONLY) stand for `auto`. Raises ValueError for a
    method that is none of one process, and what fused_softmax_state raises where `triton` cannot run.
    """
    live = window_Q is not None or (table_RD.requires_grad and torch.is_grad_enabled())
    if method == "auto" or (live and method in CONSTANT_ONLY):
        method = choose_method(len(q_QD), len(ids_K), table_RD, live)
    if method == "reference":
        return _ReferenceLogSum.apply(q_QD, table_RD, ids_K, log_pi_GK, window_Q)
    if method == "two_pass":
        return two_pass_log_sum(q_QD, table_RD, ids_K, log_pi_GK, window_Q)
    if method not in ("one_pass", "triton"):
        raise ValueError(f"no method {method!r}")
    state_of = fused_softmax_state if method == "triton" else softmax_state
    return log_sum_of_state(q_QD, state_of(q_QD, table_RD, ids_K, log_pi_GK))


def choose_method(num_queries: int, num_candidates: int, table_RD: Tensor, live: bool) -> str:
    """What `auto` takes for a problem of these sizes; live: the table needs a gradient, or pi differs by window."""
    # The dense form multiplies in the dtype of q, which leaves a GPU's tensor cores idle.
    dense = table_RD.device.type == "cpu"
    if live:
        return "reference" if dense and not computes_scores_twice(num_queries, num_candidates) else "two_pass"
    if dense and num_queries * num_candidates <= _DENSE_SCORES:
        return "reference"
    return "triton" if prefers_fused(table_RD) else "one_pass"


def computes_scores_twice(num_queries: int, num_candidates: int, *, live: bool = True, method: str = "auto") -> bool:
    """Whether a method computes the scores again in the backward pass rather than keep them or their sum."""
    if method == "auto" or (live and method in CONSTANT_ONLY):
        return live and num_queries * num_candidates > _DENSE_SCORES_LIVE
    return method == "two_pass"


@torch.no_grad()
def fixed_sample_loss(q_TD: Tensor, target_T: Tensor, table_RD: Tensor, ids_K: Tensor, log_pi_K: Tensor) -> Tensor:
    """log( e^{s_t} + sum_{k != t} e^{s_k - log pi_k} ) - s_t, loss_T in the dtype of q; no gradient.

    The loss of single targets on a sample that was drawn without regard to them: each row of q_TD has one, row target_T
    of the table, beside the candidates ids_K (distinct rows of the table), among which it is not counted again.
    """
    s_T = (q_TD * table_RD[target_T]).sum(-1)
    most = _BLOCK_SCORES if q_TD.device.type == "cpu" else _GPU_BLOCK_SCORES
    log_sum_T, block = s_T, max(1, most // max(1, len(q_TD)))
    for ids_C, log_pi_C in zip(ids_K.split(block), log_pi_K.split(block), strict=True):
        logits_TC = q_TD @ table_RD[ids_C].T - log_pi_C
        logits_TC.masked_fill_(ids_C == target_T[:, None], -torch.inf)
        log_sum_T = torch.logaddexp(log_sum_T, logits_TC.logsumexp(1))
    return log_sum_T - s_T


class _ReferenceLogSum(torch.autograd.Function):
    """The formula, with all Q x K weights in one matrix: the gradient needs no further pass over them."""

    @staticmethod
    def forward(
        ctx: Any, q_QD: Tensor, table_RD: Tensor, ids_K: Tensor, log_pi_GK: Tensor, window_Q: Tensor | None
    ) -> Tensor:
        vectors_KD, negative_GK = table_RD.index_select(0, ids_K).to(q_QD.dtype), -log_pi_GK.to(q_QD.dtype)
        # Scores in half precision would be no sum of exact products.
        with torch.autocast(q_QD.device.type, enabled=False):
            if window_Q is None:
                weight_QK = torch.addmm(negative_GK, q_QD, vectors_KD.T)
            else:
                weight_QK = negative_GK.index_select(0, window_Q).addmm_(q_QD, vectors_KD.T)
        max_Q = weight_QK.amax(1) if len(ids_K) else torch.full_like(q_QD[:, 0], -torch.inf)
        sum_Q = weight_QK.sub_(or_zero(max_Q)[:, None]).exp_().sum(1)
        ctx.save_for_backward(q_QD, vectors_KD, ids_K, weight_QK, sum_Q)
        ctx.table = table_RD.shape, table_RD.dtype
        return max_Q + sum_Q.log() + nan_unless_finite(vectors_KD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_QD, vectors_KD, ids_K, weight_QK, sum_Q = ctx.saved_tensors
        factor_Q1 = (grads[0] / torch.where(sum_Q == 0, 1.0, sum_Q))[:, None]
        grad_table_RD = None
        if ctx.needs_input_grad[1]:
            shape, dtype = ctx.table
            grad_table_RD = q_QD.new_zeros(shape)
            add_rows(grad_table_RD, ids_K, weight_QK.T @ (q_QD * factor_Q1))
            grad_table_RD = grad_table_RD.to(dtype)
        return (weight_QK @ vectors_KD).mul_(factor_Q1), grad_table_RD, None, None, None
