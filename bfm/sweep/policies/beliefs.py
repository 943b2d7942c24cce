"""What the frontier policy expects: one surrogate per metric and constraint, kept up with the ledger.

Enters: Views of a growing ledger. Leaves: expected improvements at a rung. A surrogate is fitted to at most MAX_ROWS
rows, the best of each rung first, and only when somebody asks. All hypotheses are weighed again when the rows have
grown by a quarter, on the rows that stood then (so that a resumed sweep weighs the same ones); in between only the
likely ones are. Of the candidates for a rung only CLOSELY are judged by all of them: the most promising at a glance
(Surrogate.glance, an approximation that is cheap for very many).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bfm.sweep.ledger.state import Trial
from bfm.sweep.policies.arena import Arena, Proposal
from bfm.sweep.policies.candidates import Ways
from bfm.sweep.policies.ground import View
from bfm.sweep.policies.surrogate import MAX_ROWS, Places, Prediction, Surrogate, draw_hypotheses
from bfm.sweep.policies.survival import Survival
from bfm.sweep.space.metric import Metric
from bfm.sweep.space.settings import SweepSpec

_WEIGHED_UP_TO = 48
_GROWTH = 1.25
_MAX_LIKELY = 6
_UNSEEN_MARGIN = 0.05
"""Where a rung has no row its frontier is taken to lie so many spreads above the best prediction."""
_OTHER_AXES = 0.3
CLOSELY = 64
"""So many candidates for a rung are looked at closely; of more, the most promising at a glance."""


@dataclass(frozen=True)
class Judged:
    """Candidates at a rung."""

    improvement_M: np.ndarray
    """Expected improvement, in spreads, summed over metrics, times the probability of the constraints and of a row."""
    mean_M: np.ndarray
    """Of the first metric."""
    sd_M: np.ndarray
    best: float


class Beliefs:
    """The surrogates of one sweep."""

    def __init__(self, spec: SweepSpec, arena: Arena) -> None:
        self.spec, self.arena = spec, arena
        ladder = spec.budget.ladder_flops
        self.center = float(np.mean(np.log(np.array(ladder, dtype=float))))
        """Middle of the ladder, in log C."""
        self._models = [_Model(self, metric) for metric in spec.metrics]
        self._bounds = [(_Model(self, bound.metric, bound.loss_bound), bound) for bound in spec.metric.constraints]
        self._survival = Survival(self.center, self.places)
        self._known: dict[str, tuple[np.ndarray, np.ndarray, int]] = {}

    @property
    def num_rows(self) -> int:
        """Comparable rows of the first metric."""
        return self._models[0].num_rows

    @property
    def noise(self) -> float:
        """Standard error of a row of the first metric, as the surrogate sees it."""
        return self._models[0].noise

    def take(self, view: View) -> None:
        """Learn what the ledger has by now."""
        for model in [*self._models, *(model for model, _ in self._bounds)]:
            model.take(view)
        self._survival.take(view)

    def screen(self, ways: Ways) -> Ways:
        """The candidates for a rung that are worth a close look: at most CLOSELY, those that promise most per FLOP."""
        if len(ways) <= CLOSELY:
            return ways
        rate_M = self.judge(ways, at_a_glance=True).improvement_M / ways.cost_M.astype(float)
        return ways.take(np.sort(np.argsort(-rate_M, kind="stable")[:CLOSELY]))

    def judge(self, ways: Ways, at_a_glance: bool = False) -> Judged:
        """What candidates for one rung are worth there, by all hypotheses or roughly."""
        places, rung = ways.places, ways.rung
        first: tuple[Prediction, float] | None = None
        keeps_M, improvement_M = self._survival.chance_M(ways), np.zeros(len(ways))
        for model, constraint in self._bounds:
            if model.num_rows:
                at = replace(places, log_flops_M=places.log_flops_M + model.judged_below(rung, constraint.loss_bound))
                keeps_M = keeps_M * model.predict(at, at_a_glance).below_M(constraint.loss_bound)
        for model in self._models:
            if not model.num_rows:
                continue
            prediction = model.predict(places, at_a_glance)
            best = model.best(rung, prediction, keeps_M)
            improvement_M += prediction.improvement_M(best) / model.spread
            first = first or (prediction, best)
        assert first is not None
        return Judged(keeps_M * improvement_M, first[0].mean_M, first[0].sd_M, first[1])

    def breaks(self, view: View, trial: str, rung: int) -> bool:
        """Whether a row is known to break a constraint; of a task that is running, the trial's last row."""
        rows = view.state.trials[trial].rows
        row = rows.get(rung) or rows.get(max(rows, default=rung))
        if row is None:
            return False
        values = ((bound, row["metrics"].get(bound.metric.name)) for bound in self.spec.metric.constraints)
        return any(value is not None and not bound.holds(value) for bound, value in values)

    def spread_out(self, view: View, new: Places, target: float) -> int:
        """The new proposal nearest to a quantile of all their sizes, and unlike the trials begun on other axes."""
        score = np.abs(new.numbers_MX[:, 0] - np.quantile(new.numbers_MX[:, 0], target))
        trials = list(view.state.trials.values())
        if trials and new.numbers_MX.shape[1] + new.codes_MG.shape[1] > 1:
            begun = self.places(trials, [self.arena.rungs(trial.config)[0] for trial in trials])
            apart = ((new.numbers_MX[:, None, 1:] - begun.numbers_MX[None, :, 1:]) ** 2).sum(-1)
            apart = apart + (new.codes_MG[:, None] != begun.codes_MG[None]).sum(-1)
            score = score - _OTHER_AXES * np.minimum(1.0, np.sqrt(apart.min(1)))
        return int(np.argmin(score))

    def places(self, subjects: Sequence[Trial | Proposal], rungs: Sequence[int]) -> Places:
        """Coordinates of trials and proposals at rungs."""
        known = [self.coordinates(subject) for subject in subjects]
        log_flops = np.log([self.arena.row_flops(s.config, rung) for s, rung in zip(subjects, rungs, strict=True)])
        return Places(
            np.array([numbers for numbers, _, _ in known]),
            np.array([codes for _, codes, _ in known]),
            log_flops,
            np.array([number for _, _, number in known]),
        )

    def coordinates(self, subject: Trial | Proposal) -> tuple[np.ndarray, np.ndarray, int]:
        """Numbers, codes of choices, and who it is: a trial keeps its own for good, a proposal is nobody yet (0)."""
        if isinstance(subject, Trial) and subject.trial in self._known:
            return self._known[subject.trial]
        numbers, codes = self.arena.axes.encode([subject.config], [subject.params])
        if not isinstance(subject, Trial):
            return numbers[0], codes[0], 0
        self._known[subject.trial] = numbers[0], codes[0], 1 + len(self._known)
        return self._known[subject.trial]


@dataclass(frozen=True)
class _Rows:
    """In order of arrival."""

    places: Places
    rung_M: np.ndarray
    loss_M: np.ndarray
    """NaN: diverged."""
    breaks_M: np.ndarray
    """Whether a constraint is broken."""

    def __len__(self) -> int:
        return len(self.rung_M)

    def take(self, index: slice) -> _Rows:
        """Some of them."""
        return _Rows(self.places.take(index), self.rung_M[index], self.loss_M[index], self.breaks_M[index])

    def and_also(self, other: _Rows) -> _Rows:
        """These, then others."""
        return _Rows(
            self.places.and_also(other.places),
            np.concatenate([self.rung_M, other.rung_M]),
            np.concatenate([self.loss_M, other.loss_M]),
            np.concatenate([self.breaks_M, other.breaks_M]),
        )


_Running = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class _Fitted:
    """A surrogate, and the frontier that its rows make."""

    surrogate: Surrogate
    best: dict[int, float]
    """Rung -> the best loss with at most its C that keeps the constraints."""
    held: frozenset[int]
    """Rungs with a row of their own (or an expected one) that keeps the constraints."""


class _Model:
    """The surrogate of one metric."""

    def __init__(self, beliefs: Beliefs, metric: Metric, believed_to: float = -math.inf) -> None:
        self.beliefs, self.metric = beliefs, metric
        self._believed_to = believed_to
        """Rows up to this loss are believed wholly, be they above the frontier: what matters is a bound there."""
        self._rows: _Rows | None = None
        self._lowest: dict[int, float] = {}
        """Rung -> the best loss of a row."""
        self._seen = 0
        self._finite = 0
        self._likely = draw_hypotheses()
        self._weighed_at = 0
        self._view: View | None = None
        """The last one."""
        self._running: _Running = ()
        """(trial, rung) of the tasks that run, and of where they are meant to go."""
        self._known: tuple[int, _Fitted] | None = None
        """To so many rows alone."""
        self._with_running: tuple[tuple[int, _Running], _Fitted] | None = None

    @property
    def num_rows(self) -> int:
        """Rows with a value."""
        return self._finite

    @property
    def spread(self) -> float:
        """Unit of the losses."""
        return self._fitted.surrogate.spread

    @property
    def noise(self) -> float:
        """Standard error of a row at the frontier."""
        return self._fitted.surrogate.noise

    def take(self, view: View) -> None:
        """New rows; running tasks count as what is expected of them."""
        arrived: list[tuple[str, int]] = []
        losses: list[float] = []
        for trial, rung in view.state.arrivals[self._seen :]:
            loss = view.loss(view.state.trials[trial], rung, self.metric)
            diverged = view.state.trials[trial].rows[rung]["status"] == "diverged"
            if loss is not None or diverged:
                arrived.append((trial, rung))
                losses.append(math.nan if loss is None else self.metric.to_model(loss))
                if loss is not None:
                    self._finite += 1
                    self._lowest[rung] = min(losses[-1], self._lowest.get(rung, math.inf))
        if arrived:
            new = self._at(view, arrived, np.array(losses))
            self._rows = new if self._rows is None else self._rows.and_also(new)
        self._seen = len(view.state.arrivals)
        self._view = view
        self._running = tuple(sorted({*view.running.items(), *view.meant.items()}))

    @property
    def _fitted(self) -> _Fitted:
        """As of the last view."""
        view, rows, running = self._view, self._rows, self._running
        assert view is not None
        assert rows is not None
        if self._with_running is not None and self._with_running[0] == (len(rows), running):
            return self._with_running[1]
        self._weigh(view, rows)
        if self._known is None or self._known[0] != len(rows):
            self._known = len(rows), self._fit(view, rows)
        fitted = self._known[1]
        if running:
            expected = fitted.surrogate.predict(self._places(view, running)).mean_M
            fitted = self._fit(view, rows.and_also(self._at(view, running, expected)))
        self._with_running = (len(rows), running), fitted
        return fitted

    def _weigh(self, view: View, rows: _Rows) -> None:
        """All hypotheses, on a schedule that is a function of the number of rows alone."""
        due = count = len(rows)
        if count > _WEIGHED_UP_TO:
            steps = math.floor(math.log(count / _WEIGHED_UP_TO) / math.log(_GROWTH) + 1e-9)
            due = math.ceil(_WEIGHED_UP_TO * _GROWTH**steps - 1e-9)
        if due != self._weighed_at:
            self._weighed_at = due
            self._likely = draw_hypotheses()
            stood = rows.take(slice(due))
            if np.isfinite(stood.loss_M).any():
                fitted = self._fit(view, stood)
                self._likely = fitted.surrogate.likely[:_MAX_LIKELY]

    def _fit(self, view: View, rows: _Rows) -> _Fitted:
        rung_M, loss_M = rows.rung_M, rows.loss_M.copy()
        # What breaks a constraint is no part of the frontier.
        keeps_M, finite_M = ~rows.breaks_M, np.isfinite(loss_M)
        anywhere = loss_M[finite_M].max()
        best: dict[int, float] = {}
        for rung in np.unique(rung_M).tolist():
            here_M = rung_M == rung
            known_M = loss_M[here_M & finite_M]
            loss_M[here_M & ~finite_M] = known_M.max() if len(known_M) else anywhere
            if (here_M & keeps_M & finite_M).any():
                best[rung] = float(loss_M[here_M & keeps_M & finite_M].min())
        held = frozenset(best)
        for rung in range(1, view.num_rungs):
            best[rung] = min(best.get(rung, math.inf), best.get(rung - 1, math.inf))
        kept = _best_of_each_rung(rung_M, loss_M)
        loss_M = loss_M[kept]
        worst_loss = float(loss_M.max())
        frontier_M = np.array([min(best.get(rung, math.inf), worst_loss) for rung in rung_M[kept].tolist()])
        frontier_M = np.maximum(frontier_M, self._believed_to)
        return _Fitted(
            Surrogate(rows.places.take(kept), loss_M, frontier_M, self.beliefs.center, self._likely), best, held
        )

    def _at(self, view: View, places: Sequence[tuple[str, int]], loss_M: np.ndarray) -> _Rows:
        """Rows with these losses."""
        breaks = [self.beliefs.breaks(view, *place) for place in places]
        return _Rows(self._places(view, places), np.array([rung for _, rung in places]), loss_M, np.array(breaks))

    def _places(self, view: View, places: Sequence[tuple[str, int]]) -> Places:
        return self.beliefs.places([view.state.trials[trial] for trial, _ in places], [rung for _, rung in places])

    def predict(self, places: Places, at_a_glance: bool) -> Prediction:
        """At candidates."""
        surrogate = self._fitted.surrogate
        return surrogate.glance(places) if at_a_glance else surrogate.predict(places)

    def judged_below(self, rung: int, bound: float) -> float:
        """Where a bound on this metric is judged, in log C from a rung: there, or where no row is there, lower.

        That is at the highest rung below that has a row, as long as one of them keeps the bound: beyond its rows the
        trend says too little of who will keep to it, and one that does not should not climb to find out.
        """
        below = [at for at in self._lowest if at < rung]
        if rung in self._lowest or not below or self._lowest[max(below)] > bound:
            return 0.0
        ladder = self.beliefs.spec.budget.ladder_flops
        return math.log(ladder[max(below)] / ladder[rung])

    def best(self, rung: int, prediction: Prediction, keeps_M: np.ndarray) -> float:
        """The frontier at a rung; where it has no row, a little above the best that is expected there.

        `keeps_M` is the probability that the candidates have a row there and keep the constraints.
        """
        fitted = self._fitted
        carried = fitted.best.get(rung, math.inf)
        if rung in fitted.held:
            return carried
        likely_M = keeps_M >= min(0.5, keeps_M.max())
        return min(carried, float(prediction.mean_M[likely_M].min()) + _UNSEEN_MARGIN * self.spread)


def _best_of_each_rung(rung_M: np.ndarray, loss_M: np.ndarray) -> np.ndarray:
    """Indices of at most MAX_ROWS rows, in order of arrival; of equal places the higher rung's go first."""
    if len(loss_M) <= MAX_ROWS:
        return np.arange(len(loss_M))
    order = np.argsort(loss_M, kind="stable")
    place_M = np.empty(len(loss_M), dtype=int)
    for rung in np.unique(rung_M):
        own = order[rung_M[order] == rung]
        place_M[own] = np.arange(len(own))
    return np.sort(np.lexsort((-rung_M, place_M))[:MAX_ROWS])
