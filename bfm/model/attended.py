"""What an event may look at: its user's events of the window up to itself, one run of columns from `first` to `last`.

Enters: the columns of runs. Leaves: additive masks, or the pairs of an event and each of those that it looks at, and
sums over these. Rows of a mask are cut out of one vector, a step, each at a place of its own: copies of memory, where
comparing columns and filling by a mask take a CPU ten times as long.

N runs, L columns of a window, Q queries, A pairs of a query and an event that it attends to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

STEPS = 96
"""Half powers of two up to 2^47: events, or 4,000 years in milliseconds."""


def attention_mask(first_N: Tensor, last_N: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """[N, L], additive: 0 from column `first` to column `last` (int64), else -inf."""
    outside = torch.full((length,), -torch.inf, dtype=dtype, device=first_N.device)
    inside = torch.zeros_like(outside)
    mask_NL = _cut(torch.cat([inside, outside]), length - 1 - last_N)
    return mask_NL.add_(_cut(torch.cat([outside, inside]), length - first_N))


@dataclass(frozen=True)
class Pairs:
    """Queries and the events that each attends to: query after query, an oldest event first, the query's own last."""

    query_A: Tensor
    """int64."""
    position_A: Tensor
    """int64 flat index r * L + l of the event."""
    distance_A: Tensor
    """int64: events from the query back to it."""
    length_Q: Tensor
    """int64: pairs of each query, one at least."""

    @classmethod
    def of(cls, first_Q: Tensor, column_Q: Tensor, position_Q: Tensor, number: int) -> Pairs:
        """Of queries at flat positions, that attend from one column to another; `number` of pairs in all."""
        length_Q = column_Q - first_Q + 1
        queries = torch.arange(len(length_Q), device=length_Q.device)
        query_A = queries.repeat_interleave(length_Q, output_size=number)
        last_Q = length_Q.cumsum(0) - 1
        distance_A = last_Q.index_select(0, query_A) - torch.arange(number, device=length_Q.device)
        return cls(query_A, position_Q.index_select(0, query_A) - distance_A, distance_A, length_Q)

    def softmax(self, score_A: Tensor) -> Tensor:
        """Of the scores of each query."""
        return _Softmax.apply(score_A, self.query_A, self.length_Q)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score_A: Tensor, query_A: Tensor, length_Q: Tensor) -> Tensor:
        e_A = (score_A - _of_each("max", score_A, query_A, length_Q)).exp_()
        probability_A = e_A.div_(_of_each("sum", e_A, query_A, length_Q))
        ctx.save_for_backward(probability_A, query_A, length_Q)
        return probability_A

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        probability_A, query_A, length_Q = ctx.saved_tensors
        moved_A = probability_A * grads[0]
        return moved_A.addcmul_(probability_A, _of_each("sum", moved_A, query_A, length_Q), value=-1), None, None


def _of_each(reduce: str, value_A: Tensor, query_A: Tensor, length_Q: Tensor) -> Tensor:
    """The reduction over its query's values, for each pair."""
    return torch.segment_reduce(value_A, reduce, lengths=length_Q, unsafe=True).index_select(0, query_A)


def half_octave(numbers: Tensor) -> Tensor:
    """0 below 1, then one more for every half power of two (1, 1.5, 2, 3, 4, ...), at most 95; int32."""
    # The exponent and the first bit of the mantissa; the sign bit makes negative numbers negative.
    bits = numbers.float().view(torch.int32) >> 22
    return bits.sub_(2 * 127 - 1).clamp_(0, STEPS - 1)


def _cut(both: Tensor, start_N: Tensor) -> Tensor:
    """Half as many elements as there are, from each start on, [N, L]."""
    return both.unfold(0, len(both) // 2, 1).index_select(0, start_N)
