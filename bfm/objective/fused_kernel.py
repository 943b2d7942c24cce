"""The Triton kernel behind bfm.objective.fused; imported only where it runs, since CPU builds of torch lack triton.

One program takes one tile of rows over one split of the candidates and leaves their state. It is the inner loop of
FlashAttention (arXiv 2205.14135) with the candidates as both keys and values: a tile of candidates is gathered once
and used in both products, and scores live in registers only.

R = rows of a tile, C = candidates of a tile, D = retrieval width padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


# Not specialised on sizes that change with every batch: each new value could compile again.
@triton.jit(do_not_specialize=["num_rows", "num_candidates", "candidates_per_split"])
def state_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    table_ptr,
    ids_ptr,
    log_pi_ptr,
    hit_ptr,
    max_ptr,
    sum_ptr,
    weighted_ptr,
    num_rows,
    num_candidates,
    candidates_per_split,
    table_stride,
    width,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE_WIDTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Write max, sum and weighted of one row tile over one split, float32; q is contiguous, rows of splits follow."""
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d_D = tl.arange(0, PADDED)
    row_inside_R = row_R < num_rows
    row_R = row_R.to(tl.int64)
    inside_RD = row_inside_R[:, None] & (d_D < width)[None, :]
    q_RD = tl.load(q_ptr + row_R[:, None] * width + d_D[None, :], mask=inside_RD, other=0.0)
    hit_R = tl.load(hit_ptr + row_R, mask=row_inside_R, other=-1).to(tl.int32)

    first = tl.program_id(1) * candidates_per_split
    end = tl.minimum(first + candidates_per_split, num_candidates)
    max_R = tl.full([ROWS], -float("inf"), tl.float32)
    sum_R = tl.zeros([ROWS], tl.float32)
    weighted_RD = tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(first, end, COLUMNS):
        column_C = start + tl.arange(0, COLUMNS)
        # Past the end the last candidate is read again and taken out by log pi = inf: the gather needs no mask.
        id_C = tl.load(ids_ptr + tl.minimum(column_C, end - 1))
        log_pi_C = tl.load(log_pi_ptr + column_C, mask=column_C < end, other=float("inf"))
        pointer_CD = table_ptr + id_C[:, None] * table_stride + d_D[None, :]
        c_CD = tl.load(pointer_CD) if WHOLE_WIDTH else tl.load(pointer_CD, mask=(d_D < width)[None, :], other=0.0)
        if WIDEN:
            c_CD = c_CD.to(tl.float32)
        logit_RC = tl.dot(q_RD.to(c_CD.dtype), tl.trans(c_CD), input_precision="ieee") - log_pi_C[None, :]
        logit_RC = tl.where(column_C[None, :] == hit_R[:, None], -float("inf"), logit_RC)
        new_max_R = tl.maximum(max_R, tl.max(logit_RC, 1))
        # -inf - -inf is NaN: while a row has no candidate it is measured against 0.
        reference_R = tl.where(new_max_R == -float("inf"), 0.0, new_max_R)
        weight_RC = tl.exp(logit_RC - reference_R[:, None])
        fade_R = tl.exp(max_R - reference_R)
        sum_R = sum_R * fade_R + tl.sum(weight_RC, 1)
        weighted_RD = tl.dot(weight_RC.to(c_CD.dtype), c_CD, weighted_RD * fade_R[:, None], input_precision="ieee")
        max_R = new_max_R

    out_R = tl.program_id(1).to(tl.int64) * num_rows + row_R
    tl.store(max_ptr + out_R, max_R, mask=row_inside_R)
    tl.store(sum_ptr + out_R, sum_R, mask=row_inside_R)
    tl.store(weighted_ptr + out_R[:, None] * width + d_D[None, :], weighted_RD, mask=inside_RD)
