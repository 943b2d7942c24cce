"""The frontier policy: spend where a rung's frontier is expected to fall most per FLOP.

Curves cross: at equal C small models lead early and lose late, so no rank at one rung says who wins at the next. A
surrogate (surrogate.py) predicts every paused trial and every new proposal at every rung above it. For each rung
the candidate is taken whose expected improvement of that rung's frontier is largest per FLOP of the whole way there:
a large model that cannot look good early is started for what it is expected to be later.

Which rung is served: from the bottom up, each rung may spend up to its share of the cap (what it leaves falls to those
above), as long as its best candidate improves at no less than a stated part of the best rate above it.
Running tasks are taken to bring what is expected of them; diverged ones brought the worst loss of their rung, and where
they are likely (bfm.sweep.policies.survival) an improvement counts for as much less. Several metrics have a frontier
each: improvements, in units of their spread, are added. A constraint multiplies by the probability that it holds.
Everything is a function of the ledger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bfm.sweep.ledger.state import SweepState, Trial
from bfm.sweep.ledger.task import Wait
from bfm.sweep.policies.arena import Arena
from bfm.sweep.policies.beliefs import Beliefs
from bfm.sweep.policies.candidates import Candidates, Ways
from bfm.sweep.policies.ground import Step, View, ascent_flops
from bfm.sweep.policies.policy import Decision, Start, Stop
from bfm.sweep.policies.replicas import REPLICA, kept_flops, next_replica
from bfm.sweep.space.settings import SweepSpec
from bfm.units import format_count, format_flops

OPENING_ROWS = 4
"""Before so many rows there is nothing to predict from: sizes are spread."""
_RATE_FLOOR = 0.2
"""A lower rung is served while it improves at this part of the best rate above it."""
_PATIENCE = 0.5
"""A step waits for running tasks that cost at most this part of it..."""
_SCARCE = 2.0
"""... where its rung's share pays for at most so many like it per slot."""
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Offer:
    """The best candidate for a rung."""

    step: Step
    rate: float
    """Expected improvement per share of the cap."""
    predicted: float
    sd: float
    best: float
    """What the frontier is now taken to be."""
    rivals: int


def default_shares(num_rungs: int) -> tuple[float, ...]:
    """Half of the cap for the top rung; of the rest, each rung 1.6 times what the one below gets."""
    weights = [1.6**rung for rung in range(num_rungs - 1)]
    return (*(0.5 * weight / sum(weights) for weight in weights), 0.5 if weights else 1.0)


class FrontierPolicy:
    """See the module."""

    def __init__(self, spec: SweepSpec, arena: Arena) -> None:
        self.spec, self.arena = spec, arena
        self.shares = spec.scheduler.shares or default_shares(len(spec.budget.ladder_flops))
        self._beliefs = Beliefs(spec, arena)
        self._candidates = Candidates(arena, self._beliefs.coordinates, len(spec.budget.ladder_flops))

    def decide(self, state: SweepState, available_flops: int) -> Decision:
        """See Policy."""
        kept = kept_flops(self.spec, state)
        decision = self._explore(state, available_flops - kept)
        if isinstance(decision, Start) or len(self.spec.seeds) == 1:
            return decision
        if any(state.trials[name].source != REPLICA for name, _ in state.attempts):
            return decision
        if self._beliefs.num_rows:
            replica = next_replica(View(self.spec, self.arena, state, available_flops), self._beliefs.noise)
            if replica is not None or state.attempts:
                return replica or decision
        # There is no tie to settle: what was kept for it goes where all else goes.
        return self._explore(state, available_flops)

    def _explore(self, state: SweepState, available_flops: int) -> Decision:
        view = View(self.spec, self.arena, state, available_flops)
        can_propose = state.num_proposals < self.spec.budget.max_trials
        pool = self.arena.pool(state, state.num_proposals) if can_propose else ()
        self._beliefs.take(view)
        self._candidates.take(view, pool)
        if self._beliefs.num_rows < OPENING_ROWS:
            opening = self._open(view)
            if opening is not None:
                return opening
        if self._beliefs.num_rows == 0:
            return self._idle(view, "no run has given a comparable row")
        return self._serve(view) or self._idle(view, "nothing more fits under the cap")

    def promises(self, state: SweepState, trials: Sequence[str]) -> dict[str, float] | None:
        """See Forecaster."""
        total_flops = self.spec.budget.total_flops
        view = View(self.spec, self.arena, state, total_flops)
        self._beliefs.take(view)
        if self._beliefs.num_rows == 0:
            return None
        rates = dict.fromkeys(trials, 0.0)
        self._candidates.take(view, (), [state.trials[name] for name in trials])
        for rung in range(view.num_rungs):
            ways = self._candidates.trials_to(rung)
            if len(ways):
                for place, gain in enumerate(self._beliefs.judge(ways).improvement_M):
                    step = ways.step(place)
                    assert isinstance(step.subject, Trial)
                    name = step.subject.trial
                    rates[name] = max(rates[name], float(gain) * total_flops / step.cost_flops)
        return rates

    def _open(self, view: View) -> Decision | None:
        """Spread the first sizes over the space; other axes as far from those begun as can be."""
        entries = self._candidates.entries().within(self._opening_flops(view))
        fitting = self._beside_the_top(view, entries, self._cheapest_to_the_top(view))
        if not len(fitting):
            return self._idle(view, "the first rows decide what comes next") if view.running else None
        number = view.state.num_proposals
        target = (0.1 + number * _GOLDEN) % 1.0
        step = fitting.step(self._beliefs.spread_out(view, fitting.places, target))
        reason = f"size {number + 1} of the opening: N = {format_count(step.params)}, {target:.0%} up the pool's sizes"
        return step.start(reason)

    def _opening_flops(self, view: View) -> int:
        """While rows are few only the lowest rung's share may go into new configurations, at whichever rung they enter;
        but one can always start."""
        if not view.state.num_proposals:
            return view.available_flops
        share = round(self.shares[0] * self.spec.budget.total_flops) - sum(view.spent_flops)
        return min(view.free_flops, share)

    def _serve(self, view: View) -> Decision | None:
        ways = self._ways(view)
        if not ways:
            return None
        total, spent = self.spec.budget.total_flops, view.spent_flops
        under = [rung for rung in ways if sum(spent[: rung + 1]) < sum(self.shares[: rung + 1]) * total]
        over = [rung for rung in reversed(ways) if rung not in under]
        if over and not under and view.running:
            return Wait(
                f"shares are taken; what is left is given out when the {len(view.running)} running tasks are done"
            )
        # From the top down, and no further than has to be known: rungs below whose share is taken are never asked.
        offers: dict[int, Offer] = {}
        for rung in [*under, *over]:
            for at in reversed(ways):
                if at >= rung and at not in offers:
                    offers[at] = self._offer(ways[at])
            above = max((offer.rate for at, offer in offers.items() if at > rung), default=0.0)
            if offers[rung].rate >= _RATE_FLOOR * above:
                return self._patience(view, rung, offers[rung].step) or self._take(view, rung, offers[rung])
        raise AssertionError("the top rung always has the best rate above it")

    def _patience(self, view: View, rung: int, step: Step) -> Wait | None:
        """Hold a step that few like it can follow while much cheaper tasks are running: they may change the choice."""
        subject = step.subject
        trunk = view.state.trunk_below(subject.trial, step.first) if isinstance(subject, Trial) else None
        task_flops = self.arena.reserve_flops(step.config, step.first, trunk)
        left = self.shares[rung] * self.spec.budget.total_flops - view.spent_flops[rung]
        if left > _SCARCE * self.spec.scaling.slots * task_flops:
            return None
        attempts = view.state.attempts.values()
        cheap = [attempt for attempt in attempts if attempt.nominal_flops <= _PATIENCE * task_flops]
        if not cheap:
            return None
        return Wait(f"{len(cheap)} much cheaper tasks are running that may change what is chosen for rung {rung}")

    def _ways(self, view: View) -> dict[int, Ways]:
        """Rungs, ascending, with the candidates that could be brought there."""
        cheapest = self._cheapest_to_the_top(view)
        every = (self._candidates.to(rung).within(view.free_flops) for rung in range(view.num_rungs))
        found = {rung: self._beside_the_top(view, ways, cheapest) for rung, ways in enumerate(every)}
        return {rung: ways for rung, ways in found.items() if len(ways)}

    def _offer(self, ways: Ways) -> Offer:
        kept = self._beliefs.screen(ways)
        judged = self._beliefs.judge(kept)
        rates = judged.improvement_M / (kept.cost_M.astype(float) / self.spec.budget.total_flops)
        top = int(np.argmax(rates))
        return Offer(
            kept.step(top),
            float(rates[top]),
            float(judged.mean_M[top]),
            float(judged.sd_M[top]),
            judged.best,
            len(ways) - 1,
        )

    def _cheapest_to_the_top(self, view: View) -> float | None:
        """What bringing a paused trial to the top costs, or a running one beyond where it is meant to go.

        None: something is there already and has a value, or is on its way.
        """
        top, limits = view.num_rungs - 1, view.state.memory_limits
        if view.losses(top) or top in view.meant.values():
            return None
        ways = self._candidates.trials_to(top).cost_M.tolist()
        for name, rung in view.meant.items():
            config = view.state.trials[name].config
            if top in self.arena.rungs(config) and self.arena.places(config, top, limits):
                ways.append(ascent_flops(self.arena, config, rung, top))
        return min(ways, default=math.inf)

    def _beside_the_top(self, view: View, ways: Ways, cheapest: float | None) -> Ways:
        """As long as nothing is at the top, a step must leave enough for something to get there."""
        if cheapest is None or not len(ways):
            return ways
        needed_M = ways.cost_M + np.minimum(ways.at("beyond_flops"), cheapest)
        kept = ways.take(np.asarray(needed_M <= view.free_flops, dtype=bool))
        # Where the cap does not pay for the top at all, the rungs below have it.
        return kept if len(kept) or cheapest <= view.free_flops else ways

    def _take(self, view: View, rung: int, offer: Offer) -> Decision:
        metric, total = self.spec.metric, self.spec.budget.total_flops
        spent = view.spent_flops[rung] / total
        expected, best = metric.from_model(offer.predicted), metric.from_model(offer.best)
        reason = (
            f"for rung {rung} ({spent:.0%} of the cap spent there, share {self.shares[rung]:.0%}): {metric.name} "
            f"{expected:.5g} expected (sd {offer.sd:.2g}), best {best:.5g}; "
            f"most expected improvement per FLOP of {offer.rivals + 1} "
            f"(N = {format_count(offer.step.params)}, {format_flops(offer.step.cost_flops)} FLOPs to get there)"
        )
        return offer.step.start(reason)

    def _idle(self, view: View, why: str) -> Decision:
        left = format_flops(max(0, view.available_flops))
        if view.running:
            return Wait(f"{why}; {len(view.running)} tasks are running, {left} FLOPs may be reserved")
        return Stop(f"{why}; {left} FLOPs are left")
