"""What an event may look at: its user's events of the window up to itself, one run of columns from `first` to `last`.

Enters: the columns of runs. Leaves: additive masks, and a number for every event of a run and one for all others. Rows
are cut out of one vector, a step or a staircase, each at a place of its own: copies of memory, where comparing columns
and filling by a mask take a CPU ten times as long.

N runs, L columns of a window.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 96
"""Half powers of two up to 2^47: events, or 4,000 years in milliseconds."""
NOT_ATTENDED = STEPS * STEPS
"""The number of what lies outside of a run."""


def attention_mask(first_N: Tensor, last_N: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """[N, L], additive: 0 from column `first` to column `last` (int64), else -inf."""
    outside = torch.full((length,), -torch.inf, dtype=dtype, device=first_N.device)
    inside = torch.zeros_like(outside)
    mask_NL = _cut(torch.cat([inside, outside]), length - 1 - last_N)
    return mask_NL.add_(_cut(torch.cat([outside, inside]), length - first_N))


def past_numbers(first_N: Tensor, last_N: Tensor, time_N: Tensor, time_NL: Tensor) -> Tensor:
    """Int32 [N, L]: distance in events times STEPS + elapsed time, both as half octaves; NOT_ATTENDED outside a run.

    Times are float64 and whole numbers.
    """
    length, device = time_NL.shape[1], first_N.device
    away = half_octave(torch.arange(length - 1, -1, -1, device=device)) * STEPS
    outside = torch.full((length,), NOT_ATTENDED, dtype=torch.int32, device=device)
    number_NL = half_octave(time_N[:, None] - time_NL)
    number_NL += _cut(torch.cat([away, outside]), length - 1 - last_N)
    number_NL += _cut(torch.cat([outside, torch.zeros_like(outside)]), length - first_N)
    return number_NL.clamp_(max=NOT_ATTENDED)


def half_octave(numbers: Tensor) -> Tensor:
    """0 below 1, then one more for every half power of two (1, 1.5, 2, 3, 4, ...), at most 95; int32."""
    # The exponent and the first bit of the mantissa; the sign bit makes negative numbers negative.
    bits = numbers.float().view(torch.int32) >> 22
    return bits.sub_(2 * 127 - 1).clamp_(0, STEPS - 1)


def _cut(both: Tensor, start_N: Tensor) -> Tensor:
    """Half as many elements as there are, from each start on, [N, L]."""
    return both.unfold(0, len(both) // 2, 1).index_select(0, start_N)
