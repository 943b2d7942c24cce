"""The Triton kernel behind bfm.objective.fused; imported only where it runs, since CPU builds of torch lack triton.

One program takes one tile of queries over one split of the candidates and leaves their state. It is the inner loop of
FlashAttention (arXiv 2205.14135) with the candidates as both keys and values: a tile of candidates is gathered once
and used in both products, and scores live in registers only.

P = queries of a tile, C = candidates of a tile, D = retrieval width padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


# Not specialised on sizes that change with every batch: each new value could compile again.
@triton.jit(do_not_specialize=["num_queries", "num_candidates", "candidates_per_split"])
def state_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    table_ptr,
    ids_ptr,
    log_pi_ptr,
    max_ptr,
    sum_ptr,
    weighted_ptr,
    num_queries,
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
    """Write max, sum and weighted of one tile of queries over one split, float32; q is contiguous, splits follow."""
    row_P = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d_D = tl.arange(0, PADDED)
    row_inside_P = row_P < num_queries
    row_P = row_P.to(tl.int64)
    inside_PD = row_inside_P[:, None] & (d_D < width)[None, :]
    q_PD = tl.load(q_ptr + row_P[:, None] * width + d_D[None, :], mask=inside_PD, other=0.0)

    first = tl.program_id(1) * candidates_per_split
    end = tl.minimum(first + candidates_per_split, num_candidates)
    max_P = tl.full([ROWS], -float("inf"), tl.float32)
    sum_P = tl.zeros([ROWS], tl.float32)
    weighted_PD = tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(first, end, COLUMNS):
        column_C = start + tl.arange(0, COLUMNS)
        # Past the end the last candidate is read again and taken out by log pi = inf: the gather needs no mask.
        id_C = tl.load(ids_ptr + tl.minimum(column_C, end - 1))
        log_pi_C = tl.load(log_pi_ptr + column_C, mask=column_C < end, other=float("inf"))
        pointer_CD = table_ptr + id_C[:, None] * table_stride + d_D[None, :]
        c_CD = tl.load(pointer_CD) if WHOLE_WIDTH else tl.load(pointer_CD, mask=(d_D < width)[None, :], other=0.0)
        if WIDEN:
            c_CD = c_CD.to(tl.float32)
        logit_PC = tl.dot(q_PD.to(c_CD.dtype), tl.trans(c_CD), input_precision="ieee") - log_pi_C[None, :]
        new_max_P = tl.maximum(max_P, tl.max(logit_PC, 1))
        # -inf - -inf is NaN: while a query has no candidate it is measured against 0.
        reference_P = tl.where(new_max_P == -float("inf"), 0.0, new_max_P)
        weight_PC = tl.exp(logit_PC - reference_P[:, None])
        fade_P = tl.exp(max_P - reference_P)
        sum_P = sum_P * fade_P + tl.sum(weight_PC, 1)
        weighted_PD = tl.dot(weight_PC.to(c_CD.dtype), c_CD, weighted_PD * fade_P[:, None], input_precision="ieee")
        max_P = new_max_P

    out_P = tl.program_id(1).to(tl.int64) * num_queries + row_P
    tl.store(max_ptr + out_P, max_P, mask=row_inside_P)
    tl.store(sum_ptr + out_P, sum_P, mask=row_inside_P)
    tl.store(weighted_ptr + out_P[:, None] * width + d_D[None, :], weighted_PD, mask=inside_PD)
