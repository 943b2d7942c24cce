"""The loss of a target among sampled candidates, and its exact value over the full catalogue: reference versions.

    loss_t = -log( e^{s_p} / (e^{s_p} + sum_{j != hit} e^{s_j - log pi_j}) ),   s = scale * <h, v>

The positive is always present, so it is not corrected; a negative stands for 1/pi of its kind, so it is. The sum then
estimates the full softmax's sum without bias, and with pi = 1 for every item the loss is the full softmax.

T = target rows, K = candidates shared by the rows, R = rows of the table they are taken from, V = catalogue items,
D = retrieval width.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Scores of one block of a chunked pass: small enough to stay near the core, large enough for the matmul.
_BLOCK_BYTES = 16 * 2**20


def sampled_softmax(
    h_TD: Tensor,
    positive_TD: Tensor,
    table_RD: Tensor,
    ids_K: Tensor,
    log_pi_K: Tensor,
    hit_T: Tensor,
    scale: Tensor,
) -> Tensor:
    """The corrected sampled softmax loss of every row, loss_T.

    The candidates are the rows ids_K (int64, distinct) of the table.

    hit_T (int64) is the column of the row's own target among the candidates, -1 where it is not among them; that
    column is left out of the row's sum. scale is a scalar. Differentiable in h, positive, table and scale.
    Stores T x K scores: the plain reference behind an interface that needs no such table. What follows the matmul is
    done in the wider dtype of h and log_pi (bfloat16 scores times a scale of 100 would be off by whole units).
    """
    dtype = torch.promote_types(h_TD.dtype, log_pi_K.dtype)
    positive_T = scale * (h_TD.to(dtype) * positive_TD.to(dtype)).sum(-1)
    logits_TK = scale * (h_TD @ table_RD[ids_K].T).to(dtype) - log_pi_K
    hit_rows = (hit_T >= 0).nonzero()[:, 0]
    logits_TK[hit_rows, hit_T[hit_rows]] = -torch.inf
    # The positive joins the sum as a column: a row without any other candidate keeps a finite gradient.
    all_TK1 = torch.cat([positive_T[:, None], logits_TK], dim=1)
    return torch.logsumexp(all_TK1, dim=1) - positive_T


@torch.no_grad()
def full_softmax_nll(
    h_TD: Tensor, catalogue_VD: Tensor, target_T: Tensor, scale: Tensor | float, block_bytes: int = _BLOCK_BYTES
) -> Tensor:
    """-log softmax of every row's target (item id in target_T) over the full catalogue, nll_T, without gradient.

    Goes over the catalogue in blocks of scores of at most block_bytes (one score at the least).
    """
    num_rows, num_items = len(h_TD), len(catalogue_VD)
    block_scores = max(1, block_bytes // h_TD.element_size())
    columns = min(num_items, max(1024, block_scores // 256))
    rows = max(1, block_scores // columns)
    parts = []
    for row in range(0, num_rows, rows):
        scaled_RD = h_TD[row : row + rows] * scale
        total_R = torch.full_like(scaled_RD[:, 0], -torch.inf)
        for column in range(0, num_items, columns):
            block_RC = scaled_RD @ catalogue_VD[column : column + columns].T
            total_R = torch.logaddexp(total_R, torch.logsumexp(block_RC, dim=1))
        parts.append(total_R - (scaled_RD * catalogue_VD[target_T[row : row + rows]]).sum(-1))
    return torch.cat(parts) if parts else h_TD.new_zeros(0)
