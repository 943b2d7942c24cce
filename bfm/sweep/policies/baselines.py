"""What others would do, honestly, behind the same interface: full-length runs, two kinds of ASHA, an iso-FLOP window.

Each climbs the ladder from checkpoints and pays what every policy pays. None models anything.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import count, takewhile

import numpy as np

from bfm.sweep.ledger.state import SweepState, Trial
from bfm.sweep.ledger.task import Wait
from bfm.sweep.policies.arena import OPTUNA, Arena, Proposal
from bfm.sweep.policies.ground import Step, View, ascent_flops
from bfm.sweep.policies.policy import Decision, Stop
from bfm.sweep.space.settings import SweepSpec
from bfm.units import format_count, format_flops

_WINDOW = 3.0
_EVENTS_PER_PARAM = 20.0


class _Baseline(ABC):
    """What they share."""

    def __init__(self, spec: SweepSpec, arena: Arena) -> None:
        self.spec, self.arena = spec, arena

    def decide(self, state: SweepState, available_flops: int) -> Decision:
        """See Policy."""
        view = View(self.spec, self.arena, state, available_flops)
        return self._next(view) or self._idle(view)

    @abstractmethod
    def _next(self, view: View) -> Decision | None:
        """The step that the rule asks for; None where it has none now."""

    def _idle(self, view: View) -> Decision:
        left = format_flops(max(0, view.available_flops))
        if view.running:
            return Wait(f"its rule has no further step before a task ends; {left} FLOPs may be reserved")
        return Stop(f"its rule has no further step that the cap allows; {left} FLOPs are left")

    def _may_begin(self, view: View) -> bool:
        """Whether one more trial is allowed."""
        return view.state.num_proposals < self.spec.budget.max_trials

    def _entry(self, proposal: Proposal) -> int:
        """The rung of a new trial's first row."""
        return self.arena.rungs(proposal.config)[0]

    def _start(self, view: View, why: str) -> Decision | None:
        """The arena's next point at its entry rung, Optuna's before others."""
        pool = self.arena.pool(view.state, view.state.num_proposals) if self._may_begin(view) else ()
        for proposal in sorted(pool, key=lambda proposal: proposal.source != OPTUNA):
            if steps := view.steps(proposal):
                entry = self._entry(proposal)
                fitting = (step for step in steps if step.rung == entry and step.cost_flops <= view.available_flops)
                return next((step.start(why) for step in fitting), None)
        return None


class FullLength(_Baseline):
    """Every configuration to its last rung, in the arena's order: a random search, or a grid. Imported runs stay."""

    def _next(self, view: View) -> Decision | None:
        own = (view.next_climb(trial) for trial in view.paused if trial.number is not None)
        step = next(filter(None, own), None)
        if step is not None:
            return step.start("every configuration is trained to the end")
        owed = sum(self._rest(view.state.trials[name], rung) for name, rung in view.running.items())
        if owed >= view.available_flops:
            return None
        return self._start(view, "the next configuration, to be trained to the end")

    def _entry(self, proposal: Proposal) -> int:
        rungs = self.arena.rungs(proposal.config)
        return rungs[0] if self.arena.climbs(proposal.config) else rungs[-1]

    def _rest(self, trial: Trial, rung: int) -> int:
        """What a trial will still ask for after its task at a rung."""
        return ascent_flops(self.arena, trial.config, rung, self.arena.rungs(trial.config)[-1])


class AshaStop(_Baseline):
    """The stopping rule of Ray's AsyncHyperBand: go on unless worse than the best 1/eta recorded there so far."""

    def _next(self, view: View) -> Decision | None:
        eta = self.spec.scheduler.eta
        for trial in view.paused:
            step = view.next_climb(trial)
            if step is None:
                continue
            rung = max(trial.rows)
            losses = view.losses(rung)
            own = losses.get(trial.trial)
            arrived = list(view.state.rungs[rung])
            before = [losses[name] for name in arrived[: arrived.index(trial.trial)] if name in losses]
            if own is not None and (not before or own <= np.percentile(before, 100 / eta)):
                return step.start(f"within the best 1/{eta:g} of the {len(before)} rows before it")
        return self._start(view, "no trial goes on; a new one")


class AshaPromote(_Baseline):
    """Asynchronous successive halving by promotion: the best 1/eta of a rung so far go on, highest rung first."""

    def _next(self, view: View) -> Decision | None:
        eta = self.spec.scheduler.eta
        paused = {trial.trial for trial in view.paused}
        for rung in range(view.num_rungs - 2, -1, -1):
            losses = view.losses(rung)
            quota = int(len(losses) / eta + 1e-9)
            for name in sorted(losses, key=lambda name: losses[name])[:quota]:
                trial = view.state.trials[name]
                step = view.next_climb(trial) if name in paused and max(trial.rows) == rung else None
                if step is not None:
                    return step.start(f"among the best {quota} of {len(losses)} at rung {rung}")
        return self._start(view, "no row is among the best of its rung; a new trial")


class IsoflopWindow(_Baseline):
    """At every rung the configurations nearest to N = sqrt(C / 120), within a factor of three: D about 20 N."""

    def _next(self, view: View) -> Decision | None:
        pool = self.arena.pool(view.state, view.state.num_proposals) if self._may_begin(view) else ()
        best: tuple[int, int, Step] | None = None
        for rung in range(view.num_rungs):
            done, step = self._nearest(view, pool, rung)
            if (
                step is not None
                and step.cost_flops <= view.available_flops
                and (best is None or (done, rung) < best[:2])
            ):
                best = (done, rung, step)
        if best is None:
            return None
        done, rung, step = best
        reason = (
            f"the next nearest to N = {format_count(self._target(rung))} for rung {rung}: "
            f"N = {format_count(step.params)}, {done} nearer ones are there"
        )
        return step.start(reason)

    def _target(self, rung: int) -> float:
        return math.sqrt(self.spec.budget.ladder_flops[rung] / (6 * _EVENTS_PER_PARAM))

    def _nearest(self, view: View, pool: Sequence[Proposal], rung: int) -> tuple[int, Step | None]:
        """How many of the nearest are there already, and the next one."""
        target, numbers = self._target(rung), count()
        ways: list[tuple[float, int, Step | None]] = []
        for trial in view.state.trials.values():
            if rung in self.arena.rungs(trial.config):
                ups = view.steps(trial) if view.is_paused(trial) and max(trial.rows) < rung else []
                way = next((step for step in ups if step.rung == rung), None)
                ways.append((abs(math.log(trial.params / target)), next(numbers), way))
        for proposal in pool:
            way = next((step for step in view.steps(proposal) if step.rung == rung), None)
            if way is not None:
                ways.append((abs(math.log(proposal.params / target)), next(numbers), way))
        near = sorted((way for way in ways if way[0] <= math.log(_WINDOW)), key=lambda way: way[:2])
        done = len(list(takewhile(lambda way: way[2] is None, near)))
        return done, near[done][2] if done < len(near) else None
