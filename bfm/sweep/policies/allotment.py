"""How many configurations a budget carries to each rung.

Enters: the cost of one configuration at each rung, the cap, and either eta (the shape n_r = n_0 / eta^r) or a share of
the spend per rung. Leaves: counts, falling with the rung and at least 1, whose cost keeps under the cap: the top rung
always has its part, whatever the rungs below would like to use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

_HALVINGS = 80


def allot(
    rung_costs_flops: Sequence[int],
    total_flops: int,
    max_configurations: int,
    eta: float,
    shares: Sequence[float] | None = None,
) -> tuple[int, ...]:
    """Configurations per rung. At least one reaches the top, which the caller has made sure the cap pays for.

    Without `shares` the counts are the largest with n_r = n_0 / eta^r; where `max_configurations` binds n_0 first,
    eta is lowered instead, so that the cap is used.
    """

    def fits(counts: Sequence[int]) -> bool:
        return sum(n * c for n, c in zip(counts, rung_costs_flops, strict=True)) <= total_flops

    def shaped(first: float, ratio: float) -> tuple[int, ...]:
        return tuple(max(1, math.floor(first / ratio**rung + 1e-9)) for rung in range(len(rung_costs_flops)))

    def shared(spend_flops: float) -> tuple[int, ...]:
        assert shares is not None
        counts: list[int] = []
        for share, cost_flops in zip(shares, rung_costs_flops, strict=True):
            most = counts[-1] if counts else max_configurations
            counts.append(min(most, max(1, math.floor(share * spend_flops / cost_flops))))
        return tuple(counts)

    if shares is not None:
        return _largest(lambda x: shared(x * total_flops), fits)
    counts = _largest(lambda x: shaped(max(1, math.floor(x * max_configurations)), eta), fits)
    if counts[0] < max_configurations:
        return counts
    return _largest(lambda x: shaped(max_configurations, eta ** (1 - x)), fits)


def _largest(counts_at: Callable[[float], tuple[int, ...]], fits: Callable[[Sequence[int]], bool]) -> tuple[int, ...]:
    """Counts at the largest x in [0, 1] whose cost fits; costs grow with x."""
    if fits(counts_at(1.0)):
        return counts_at(1.0)
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(counts_at(middle)) else (low, middle)
    return counts_at(low)
