"""The loss of a target among sampled candidates.

    loss_t = -log( e^{s_p} / (e^{s_p} + sum_{j != hit} e^{s_j - log pi_j}) ),   s = scale * <h, v>

The positive is always present, so it is not corrected; a negative stands for 1/pi of its kind, so it is, pi being its
chance to be a candidate of this row. The sum then estimates the full softmax's sum without bias, and with pi = 1 for
every item the loss is the full softmax.

Enters: queries, positives, a table with the ids of the candidates, log inclusion probabilities. Leaves: loss_T. One
contract, several implementations; `sampled_softmax` chooses.

T = target rows, K = candidates shared by the rows, G = windows whose rows have one pi, R = rows of the table that
candidates are taken from, D = retrieval width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bfm.model.blocks import look_up
from bfm.objective.fused import fused_softmax_state, prefers_fused
from bfm.objective.methods import METHODS
from bfm.objective.tiled import loss_from_log_sum, loss_from_state, softmax_state, two_pass_log_sum

# All but `sharded`, which needs other ranks: bfm.objective.sharded.
_METHODS = tuple(method for method in METHODS if method != "sharded")
# Scores up to which the dense form is the fastest, for a constant and for a trained table (measured, one CPU thread).
_DENSE_SCORES, _DENSE_SCORES_LIVE = 1 << 17, 1 << 18
# e to this is 0 in every dtype.
_NO_SCORE = -1e9


def sampled_softmax(
    h_TD: Tensor,
    positive_TD: Tensor,
    table_RD: Tensor,
    ids_K: Tensor,
    log_pi_GK: Tensor,
    hit_T: Tensor,
    scale: Tensor,
    *,
    window_T: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    """The corrected sampled softmax loss of every row, loss_T, float32 or wider.

    The candidates are the rows ids_K (int64, distinct; fastest ascending) of the table. hit_T (int64) is the column
    of the row's own target among the candidates, -1 where it is not among them; that column is left out of the row's
    sum. window_T (int64) is the row's line of log_pi_GK; without it pi is the same for all rows, and log_pi_GK is [K].
    scale is a scalar. Differentiable in h, positive, scale and, by `reference` and `two_pass`, the table.

    `reference` stores T x K scores; the others keep one tile of them. A score that is not finite gives its row a loss
    of NaN or infinity. Raises ValueError for an unknown method, and for a table that needs a gradient or windows that
    the method does not know; `triton` what fused_softmax_state raises where it cannot run.
    """
    live = window_T is not None or (table_RD.requires_grad and torch.is_grad_enabled())
    if method == "auto":
        method = choose_method(len(h_TD), len(ids_K), table_RD, live)
    if method not in _METHODS:
        raise ValueError(f"no method {method!r}: one of {', '.join(_METHODS)}")
    dtype = torch.promote_types(torch.promote_types(h_TD.dtype, log_pi_GK.dtype), torch.float32)
    q_TD = scale.to(dtype) * h_TD.to(dtype)
    if method in ("reference", "two_pass"):
        log_sum = _reference_log_sum if method == "reference" else two_pass_log_sum
        return loss_from_log_sum(q_TD, positive_TD, log_sum(q_TD, table_RD, ids_K, log_pi_GK, hit_T, window_T))
    if live:
        raise ValueError(
            f"{method} gives the table no gradient and knows one window: use two_pass, or detach the table"
        )
    state_of = fused_softmax_state if method == "triton" else softmax_state
    return loss_from_state(q_TD, positive_TD, state_of(q_TD, table_RD, ids_K, log_pi_GK, hit_T))


def choose_method(num_rows: int, num_candidates: int, table_RD: Tensor, live: bool) -> str:
    """What `auto` takes for a problem of these sizes; live: the table needs a gradient, or pi differs by window."""
    if live:
        return "two_pass" if computes_scores_twice(num_rows, num_candidates) else "reference"
    if num_rows * num_candidates <= _DENSE_SCORES:
        return "reference"
    return "triton" if prefers_fused(table_RD) else "one_pass"


def computes_scores_twice(num_rows: int, num_candidates: int, *, live: bool = True, method: str = "auto") -> bool:
    """Whether a method computes the scores again in the backward pass rather than keep them or their sum."""
    if method == "auto":
        return live and num_rows * num_candidates > _DENSE_SCORES_LIVE
    return method == "two_pass"


def _reference_log_sum(
    q_TD: Tensor, table_RD: Tensor, ids_K: Tensor, log_pi_GK: Tensor, hit_T: Tensor, window_T: Tensor | None
) -> Tensor:
    """The formula, with all T x K scores."""
    log_pi_XK = log_pi_GK if window_T is None else log_pi_GK.index_select(0, window_T)
    logits_TK = (q_TD @ look_up(table_RD, ids_K).to(q_TD.dtype).T).to(q_TD.dtype) - log_pi_XK
    hit_rows = (hit_T >= 0).nonzero()[:, 0]
    # Not -inf: a row without any other candidate keeps a gradient.
    logits_TK[hit_rows, hit_T[hit_rows]] = _NO_SCORE
    return torch.logsumexp(logits_TK, dim=1)


def log_sum(q_QD, table_RD, ids_K, log_pi_GK, *, window_Q=None, method="auto"):
    hit_Q = torch.full((len(q_QD),), -1)
    live = True
    if method == "auto":
        method = choose_method(len(q_QD), len(ids_K), table_RD, live)
    f = _reference_log_sum if method == "reference" else two_pass_log_sum
    return f(q_QD.float(), table_RD, ids_K, log_pi_GK, hit_Q, window_Q)
