"""What training tells those who watch it: a record after every optimizer step, and of every validation on the way.

Enters: the counters and losses of a step. Leaves: records, and rates and losses of late.
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
"""Steps over which the recent loss is taken."""
RATE_S = 60.0
"""Seconds over which rates are taken: beside other work those of a second are chance."""
_MARK_EVERY_S = 1.0
RISE_ERRORS = 2.0
"""nll has risen where it is above its best by more than so many paired standard errors."""


@dataclass(frozen=True)
class StepLoss:
    """Losses of a step over all workers, and the mean gates of its target rows."""

    loss: float
    """What is minimised: the mean over groups of the weighted mean over a group's rows."""
    loss_headline: float
    """Weighted mean over the rows whose target has a later timestamp; NaN in a step without any."""
    loss_basket: float
    """Weighted mean over the rows whose target shares their timestamp; NaN in a step without any."""
    gates: dict[str, float]
    """Mean gate of each component of the output distribution; empty for the softmax alone."""

    @staticmethod
    def of(loss: float, sums: Sequence[float], components: Sequence[str]) -> StepLoss:
        """From the sums of the objective, flat: all may be divided by the same number."""
        half = len(sums) // 2
        (basket, of_basket, *basket_gates), (headline, of_headline, *headline_gates) = sums[:half], sums[half:]
        weight = of_basket + of_headline
        gates = [_mean(a + b, weight) for a, b in zip(basket_gates, headline_gates, strict=True)]
        named = dict(zip(components, gates, strict=True)) if len(components) > 1 else {}
        return StepLoss(loss, _mean(headline, of_headline), _mean(basket, of_basket), named)


@dataclass(frozen=True)
class StepRecord(StepLoss):
    """What an observer sees after every optimizer step."""

    step: int
    stage: int
    phase: Phase
    path_flops: int
    events: int
    learning_rate: float
    grad_norm: float
    events_per_s: float
    flops_per_s: float
    elapsed_s: float


@dataclass(frozen=True)
class Validation:
    """The model on the first validation queries: on the way along the trunk, or cooled at the end."""

    step: int
    phase: Phase
    path_flops: int
    epochs: float
    """Targets trained on, as a share of those of the log."""
    train_loss: float | None
    """Mean over the last RATE_STEPS steps; None where none was taken since a restart."""
    metrics: dict[str, float]
    errors: dict[str, float]
    floors: dict[str, dict[str, float]]
    """Metrics of every floor on the same queries."""
    best_flops: int
    """Where nll was lowest so far, this validation included."""
    best_epochs: float
    best_nll: float
    rise: float = 0.0
    """How far nll is above its best; 0 where it is the best."""
    rise_error: float | None = None
    """Standard error of `rise`, paired by query and clustered by user; None below two users."""
    loss_fall: float | None = None
    """How far the training loss has fallen since the best; None where it is not known."""
    memorises: bool = False
    """`risen` twice running, or at the cooled end: along the trunk the rate is high, and one look may be a wobble."""

    @property
    def risen(self) -> bool:
        """Whether nll rose beyond chance while the training loss fell, on targets that were seen before."""
        if self.rise_error is None or self.loss_fall is None or self.epochs <= 1:
            return False
        return self.rise > RISE_ERRORS * self.rise_error and self.loss_fall > 0

    @property
    def is_best(self) -> bool:
        """Whether none before had a lower nll."""
        return self.best_flops == self.path_flops and self.rise == 0.0


Record = StepRecord | Validation
Observer = Callable[[Record], None]
_Mark = tuple[float, int, int]
"""Seconds, events, FLOPs of the path."""


class RecentSteps:
    """Loss over the last RATE_STEPS steps, and rates over the last RATE_S seconds, or the last step if that is longer;
    the making of batches and other pauses count in the rates."""

    def __init__(self) -> None:
        self._marks: deque[_Mark] = deque()
        """Where steps ended, one a second at most."""
        self._last: _Mark | None = None
        self._losses: deque[float] = deque(maxlen=RATE_STEPS)

    def begin(self, begin_s: float, events: int, path_flops: int) -> None:
        """Where the first step begins; later calls change nothing."""
        if not self._marks:
            self._marks.append((begin_s, events, path_flops))

    def end(self, events: int, path_flops: int, loss: float) -> None:
        """A step ends here."""
        now_s = time.monotonic()
        if self._last is not None and self._last[0] - self._marks[-1][0] >= _MARK_EVERY_S:
            self._marks.append(self._last)
        while len(self._marks) > 1 and now_s - self._marks[1][0] >= RATE_S:
            self._marks.popleft()
        self._last = now_s, events, path_flops
        self._losses.append(loss)

    @property
    def loss(self) -> float | None:
        """Mean loss; None before the first step."""
        return sum(self._losses) / len(self._losses) if self._losses else None

    def rates(self) -> tuple[float, float]:
        """Events/s and FLOP/s; 0 before the first step."""
        if self._last is None:
            return 0.0, 0.0
        (first_s, first_events, first_flops), (last_s, last_events, last_flops) = self._marks[0], self._last
        elapsed_s = max(last_s - first_s, 1e-9)
        return (last_events - first_events) / elapsed_s, (last_flops - first_flops) / elapsed_s


def _mean(total: float, number: float) -> float:
    return total / number if number else math.nan
