"""Where training diverges: the probability that a candidate is still alive at the rung that it is on its way to.

Enters: Views of a growing ledger. Leaves: a probability per candidate, 1 for all as long as nothing has diverged. What
a diverged row would have been is not known, and a trend that points into a region says nothing of whether it can be
trained there: that is learnt apart from the losses. Every task is a trial by itself, to the end or not (a hazard per
rung, so that trials which stopped early for other reasons do not count as safe above): a logistic regression on the
trend of the surrogate (parabolas along the axes, log C), with a normal prior on its coefficients.

Shape legend: M candidates, T tasks that ended, P coefficients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from bfm.sweep.ledger.state import Trial
from bfm.sweep.policies.candidates import Ways
from bfm.sweep.policies.ground import View
from bfm.sweep.policies.surrogate import Places, trend

_STEEPNESS = 6.0
"""Prior standard deviation of a coefficient in log odds, over that of the surrogate in spreads of the loss."""
_HOPELESS = 0.25
"""Below this chance a candidate is left out for as long as another one of its rung has it. The better a sweep knows
where its frontier is, the less it expects elsewhere: without a bound, whatever looks good and was never seen because it
cannot be would be tried to the end."""
_MOST = 1000
"""Of more tasks of one kind so many, evenly spaced over time, stand for all."""
_Task = tuple[Trial, int]


class Survival:
    """See the module."""

    def __init__(self, center: float, places: Callable[[list[Trial], list[int]], Places]) -> None:
        """`center`: middle of the ladder, in log C. `places`: coordinates of the rows of trials."""
        self._center, self._places = center, places
        self._ended: tuple[list[_Task], list[_Task]] = [], []
        """(trial, rung) that went well, and those that diverged."""
        self._seen = 0
        self._fitted: tuple[int, np.ndarray] | None = None
        """After so many tasks, the coefficients."""

    def take(self, view: View) -> None:
        """New rows."""
        for name, rung in view.state.arrivals[self._seen :]:
            trial = view.state.trials[name]
            status = trial.rows[rung]["status"]
            if status in ("ok", "diverged"):
                self._ended[status == "diverged"].append((trial, rung))
        self._seen = len(view.state.arrivals)

    def chance_M(self, ways: Ways) -> np.ndarray:
        """Probability that no task of the way diverges; 0 where it is hopeless and others are not."""
        alive_M = np.ones(len(ways))
        if not self._ended[1]:
            return alive_M
        places, first_M, coefficient_P = ways.places, ways.at("first"), self._coefficients()
        for rung in range(int(first_M.min()), int(ways.rungs_M.max()) + 1):
            # Where there is no row there are no FLOPs either, and nothing is multiplied.
            row_flops_M = ways.at("row_flops", rung)
            here = replace(places, log_flops_M=np.log(np.maximum(1.0, row_flops_M)))
            hazard_M = expit(self._features(here) @ coefficient_P)
            trains_M = (first_M <= rung) & (rung <= ways.rungs_M) & (row_flops_M > 0)
            alive_M *= np.where(trains_M, 1.0 - hazard_M, 1.0)
        return np.where(alive_M >= min(_HOPELESS, float(alive_M.max())), alive_M, 0.0)

    def _features(self, places: Places) -> np.ndarray:
        return trend(places, self._center, _STEEPNESS)

    def _coefficients(self) -> np.ndarray:
        count = sum(map(len, self._ended))
        if self._fitted is None or self._fitted[0] != count:
            chosen = [_spaced(ended) for ended in self._ended]
            tasks = [task for kept, _ in chosen for task in kept]
            weight_T = np.repeat([weight for _, weight in chosen], [len(kept) for kept, _ in chosen])
            side_T = np.repeat([-1.0, 1.0], [len(kept) for kept, _ in chosen])
            x_TP = self._features(self._places([trial for trial, _ in tasks], [rung for _, rung in tasks]))

            def objective(coefficient_P: np.ndarray) -> tuple[float, np.ndarray]:
                margin_T = side_T * (x_TP @ coefficient_P)
                value = weight_T @ np.logaddexp(0.0, -margin_T) + 0.5 * coefficient_P @ coefficient_P
                return value, coefficient_P - x_TP.T @ (weight_T * side_T * expit(-margin_T))

            found = minimize(objective, np.zeros(x_TP.shape[1]), jac=True, method="L-BFGS-B")
            self._fitted = count, found.x
        return self._fitted[1]


def _spaced(ended: list[_Task]) -> tuple[list[_Task], float]:
    """At most _MOST, and how many each of them stands for."""
    if len(ended) <= _MOST:
        return ended, 1.0
    places = np.linspace(0, len(ended) - 1, _MOST).round().astype(int)
    return [ended[place] for place in places], len(ended) / _MOST
