"""What training tells those who watch it: a record after every optimizer step.

Enters: the counters and losses of a step. Leaves: records, and rates and losses over the last steps.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Phase = Literal["trunk", "cooldown"]
RATE_STEPS = 50
"""Steps over which rates and the recent loss are taken."""


@dataclass(frozen=True)
class StepLoss:
    """Losses of a step over all workers, and the mean gates of its target rows."""

    loss: float
    """What is minimised: the mean over groups of the mean over a group's rows."""
    loss_headline: float
    """Mean over the rows whose target has a later timestamp; NaN in a step without any."""
    loss_basket: float
    """Mean over the rows whose target shares their timestamp; NaN in a step without any."""
    gates: dict[str, float]
    """Mean gate of each component of the output distribution; empty for the softmax alone."""

    @classmethod
    def of(cls, loss: float, sums: Sequence[float], components: Sequence[str]) -> StepLoss:
        """From the objective's `row_sums`, flat: all may be divided by the same number."""
        half = len(sums) // 2
        (basket, num_basket, *basket_gates), (headline, num_headline, *headline_gates) = sums[:half], sums[half:]
        rows = num_basket + num_headline
        gates = [_mean(a + b, rows) for a, b in zip(basket_gates, headline_gates, strict=True)]
        named = dict(zip(components, gates, strict=True)) if len(components) > 1 else {}
        return cls(loss, _mean(headline, num_headline), _mean(basket, num_basket), named)


@dataclass(frozen=True)
class StepRecord:
    """What an observer sees after every optimizer step."""

    step: int
    stage: int
    phase: Phase
    path_flops: int
    events: int
    loss: float
    """The next three: as in StepLoss."""
    loss_headline: float
    loss_basket: float
    gates: dict[str, float]
    learning_rate: float
    grad_norm: float
    events_per_s: float
    flops_per_s: float
    elapsed_s: float


Observer = Callable[[StepRecord], None]


class RecentSteps:
    """Rates over the last RATE_STEPS steps, the making of batches and other pauses included."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=RATE_STEPS)

    def begin(self, begin_s: float, events: int, path_flops: int) -> None:
        """Where the first step begins; later calls change nothing."""
        if not self._marks:
            self._marks.append((begin_s, events, path_flops))

    def rates(self, events: int, path_flops: int) -> tuple[float, float]:
        """A step ends here: events/s and FLOP/s."""
        self._marks.append((time.monotonic(), events, path_flops))
        first_s, first_events, first_flops = self._marks[0]
        elapsed_s = max(self._marks[-1][0] - first_s, 1e-9)
        return (events - first_events) / elapsed_s, (path_flops - first_flops) / elapsed_s


def _mean(total: float, number: float) -> float:
    return total / number if number else math.nan
