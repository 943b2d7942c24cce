"""What every promotion policy sees of a sweep: paused trials, running tasks, nominal spend, what may come next.

Enters: a SweepState and an Arena. Leaves: a View of one moment. Costs are nominal (the arena's), rows are compared by
the signed metric, and a rung is an integer index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, takewhile
from typing import Any

from bfm.sweep.ledger.state import SweepState, Trial, comparable_value
from bfm.sweep.policies.arena import Arena, Config, Proposal
from bfm.sweep.policies.policy import Start
from bfm.sweep.space.metric import Metric
from bfm.sweep.space.settings import SweepSpec


@dataclass(frozen=True)
class Step:
    """A candidate: a paused trial or a new proposal, on its way to a rung, one task at a time."""

    subject: Trial | Proposal
    first: int
    """The rung of the task that would be started now."""
    rung: int
    """The rung that it is meant for."""
    cost_flops: int
    """All tasks up to `rung`."""

    @property
    def params(self) -> int:
        """Nominal N."""
        return self.subject.params

    @property
    def config(self) -> dict[str, Any]:
        """The configuration."""
        return self.subject.config

    def start(self, reason: str) -> Start:
        """The decision to begin with its first task."""
        return Start(self.subject, self.first, reason, self.rung)


class View:
    """One moment of a sweep."""

    def __init__(self, spec: SweepSpec, arena: Arena, state: SweepState, available_flops: int) -> None:
        self.spec, self.arena, self.state, self.available_flops = spec, arena, state, available_flops
        self.num_rungs = len(spec.budget.ladder_flops)
        self.running: dict[str, int] = {trial: rung for trial, rung in state.attempts}
        """Trial -> the rung of its task."""
        self.meant = {trial: attempt.meant_for for (trial, _), attempt in state.attempts.items()}
        """Trial -> the rung that it is on its way to."""
        self.withheld = {*self.running, *state.given_up}
        """Trials of which something runs or was given up."""

    def is_paused(self, trial: Trial) -> bool:
        """Whether it may be trained on: its last row is good, and nothing of it runs or was given up."""
        return trial.trial not in self.withheld and self.is_good(trial)

    def is_good(self, trial: Trial) -> bool:
        """Whether its last row is good."""
        return bool(trial.rows) and trial.rows[max(trial.rows)]["status"] == "ok"

    def loss(self, trial: Trial, rung: int, metric: Metric | None = None) -> float | None:
        """The signed metric of a trial's row; None where there is none that may be compared."""
        row, metric = trial.rows.get(rung), metric or self.spec.metric
        if row is None:
            return None
        value = comparable_value(row, metric.name, self.spec.budget.tolerance)
        return None if value is None else metric.loss(value)

    def losses(self, rung: int) -> dict[str, float]:
        """Trial -> loss at a rung, where it may be compared."""
        found = ((name, self.loss(self.state.trials[name], rung)) for name in self.state.rungs.get(rung, ()))
        return {name: loss for name, loss in found if loss is not None}

    @cached_property
    def paused(self) -> list[Trial]:
        """Trials that may be trained on, in order of their proposals."""
        return [trial for trial in self.state.trials.values() if self.is_paused(trial)]

    def steps(self, subject: Trial | Proposal) -> list[Step]:
        """On the way to each of its rungs, of a paused trial those above its rows.

        They end below a rung at which it would run out of memory; a proposal then has none.
        """
        config, limits, trunk = subject.config, self.state.memory_limits, None
        rungs = self.arena.rungs(config)
        if isinstance(subject, Trial):
            rungs = [rung for rung in rungs if rung > max(subject.rows)]
            trunk = self.state.trunk_below(subject.trial, self.num_rungs)
        if limits:
            held = list(takewhile(lambda rung: self.arena.places(config, rung, limits), rungs))
            rungs = held if isinstance(subject, Trial) or len(held) == len(rungs) else []
        if not self.arena.climbs(config):
            return [Step(subject, rung, rung, self.arena.reserve_flops(config, rung, None)) for rung in rungs]
        costs = accumulate(_climb_flops(self.arena, config, rungs, trunk))
        return [Step(subject, rungs[0], rung, cost_flops) for rung, cost_flops in zip(rungs, costs, strict=True)]

    def next_climb(self, trial: Trial) -> Step | None:
        """The first of a paused trial's steps, if it may be reserved."""
        return next((step for step in self.steps(trial)[:1] if step.cost_flops <= self.available_flops), None)

    @cached_property
    def promised_flops(self) -> list[int]:
        """Per rung, what running trials will still cost on the way to where they are meant to go."""
        promised = [0] * self.num_rungs
        for name, rung in self.running.items():
            config = self.state.trials[name].config
            ways = [way for way in self.arena.rungs(config) if rung < way <= self.meant[name]]
            for way, flops in zip(ways, _climb_flops(self.arena, config, ways, rung), strict=True):
                promised[way] += flops
        return promised

    @property
    def free_flops(self) -> int:
        """What may be reserved beside what is promised."""
        return self.available_flops - sum(self.promised_flops)

    @cached_property
    def spent_flops(self) -> list[int]:
        """Nominal FLOPs per rung of all tasks, running and failed ones included, and what is promised."""
        return [self.state.nominal_flops[rung] + self.promised_flops[rung] for rung in range(self.num_rungs)]


def ascent_flops(arena: Arena, config: Config, from_rung: int, rung: int) -> int:
    """All reservations from a rung's trunk up to another rung."""
    ways = [way for way in arena.rungs(config) if from_rung < way <= rung]
    return sum(_climb_flops(arena, config, ways if arena.climbs(config) else ways[-1:], from_rung))


def _climb_flops(arena: Arena, config: Config, rungs: Sequence[int], trunk: int | None) -> list[int]:
    """The reservation of each of some rungs, from a trunk (None: from nothing) to the first, and on from there."""
    trunks = [trunk, *rungs[:-1]]
    return [arena.reserve_flops(config, rung, below) for rung, below in zip(rungs, trunks, strict=False)]
