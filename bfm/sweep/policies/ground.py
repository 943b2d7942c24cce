"""What every promotion policy sees of a sweep: paused trials, running tasks, nominal spend, what may come next.

Enters: a SweepState and an Arena. Leaves: a View of one moment. Costs are nominal (the arena's), rows are compared by
the signed metric, and a rung is an integer index.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bfm.sweep.arena import Arena, Config, Proposal
from bfm.sweep.policy import Promote, Propose
from bfm.sweep.settings import Metric, SweepSpec
from bfm.sweep.state import SweepState, Trial, metric_value


@dataclass(frozen=True)
class Step:
    """A candidate: a paused trial or a new proposal, on its way to a rung, one task at a time."""

    trial: Trial | None
    proposal: Proposal | None
    first: int
    """The rung of the task that would be started now."""
    rung: int
    """The rung that it is meant for."""
    cost_flops: int
    """All tasks up to `rung`."""

    @property
    def subject(self) -> Trial | Proposal:
        """Whose step it is."""
        found = self.trial or self.proposal
        assert found is not None
        return found

    @property
    def params(self) -> int:
        """Nominal N."""
        return self.subject.params

    @property
    def config(self) -> dict[str, Any]:
        """The configuration."""
        return self.subject.config

    @property
    def key(self) -> str:
        """Who it is: a new proposal is nobody yet."""
        return "" if self.trial is None else self.trial.trial

    def decision(self, reason: str, seed: int | None = None) -> Promote | Propose:
        """Start its first task."""
        if self.trial is not None:
            return Promote(self.trial.trial, self.first, reason, self.rung)
        return Propose(self.first, reason, self.proposal, self.rung, seed)


class View:
    """One moment of a sweep."""

    def __init__(self, spec: SweepSpec, arena: Arena, state: SweepState, available_flops: int) -> None:
        self.spec, self.arena, self.state, self.available_flops = spec, arena, state, available_flops
        self.num_rungs = len(spec.budget.ladder_flops)
        self.running: dict[str, int] = {trial: rung for trial, rung in state.attempts}
        """Trial -> the rung of its task."""
        self.meant = {trial: attempt.meant_for for (trial, _), attempt in state.attempts.items()}
        """Trial -> the rung that it is on its way to."""
        self._given_up = state.given_up

    def is_paused(self, trial: Trial) -> bool:
        """Whether it may be trained on: its last row is good, and nothing of it runs or was given up."""
        if trial.trial in self.running or trial.trial in self._given_up:
            return False
        return bool(trial.rows) and trial.rows[max(trial.rows)]["status"] == "ok"

    def loss(self, trial: Trial, rung: int, metric: Metric | None = None) -> float | None:
        """The signed metric of a trial's row; None where there is none that may be compared."""
        row, metric = trial.rows.get(rung), metric or self.spec.metric
        if row is None:
            return None
        value = metric_value(row, metric.name, self.spec.budget.tolerance)
        return None if value is None else metric.loss(value)

    def losses(self, rung: int) -> dict[str, float]:
        """Trial -> loss at a rung, where it may be compared."""
        found = ((name, self.loss(self.state.trials[name], rung)) for name in self.state.rungs.get(rung, ()))
        return {name: loss for name, loss in found if loss is not None}

    @cached_property
    def paused(self) -> list[Trial]:
        """Trials that may be trained on, in order of their proposals."""
        return [trial for trial in self.state.trials.values() if self.is_paused(trial)]

    def climb(self, trial: Trial, rung: int) -> Step | None:
        """A paused trial on its way to a rung; None where it has no row to reach there."""
        ways = [step for step in self.arena.rungs(trial.config) if max(trial.rows) < step <= rung]
        if not ways or ways[-1] != rung:
            return None
        first = ways[0] if self.arena.climbs(trial.config) else rung
        limits = self.state.memory_limits
        if limits and not all(self.arena.fits(trial.config, step, limits) for step in ways if step >= first):
            return None
        below = self.state.trunk_below(trial.trial, first)
        return Step(trial, None, first, rung, ascent_flops(self.arena, trial.config, below, first, rung))

    def enter(self, proposal: Proposal, rung: int) -> Step | None:
        """A new proposal on its way to a rung."""
        rungs = self.arena.rungs(proposal.config)
        if rung not in rungs:
            return None
        first = rungs[0] if self.arena.climbs(proposal.config) else rung
        return Step(None, proposal, first, rung, ascent_flops(self.arena, proposal.config, None, first, rung))

    def trunk_of(self, step: Step) -> int | None:
        """The rung whose trunk a step's first task goes on from."""
        return None if step.trial is None else self.state.trunk_below(step.trial.trial, step.first)

    @cached_property
    def promised_flops(self) -> list[int]:
        """Per rung, what running trials will still cost on the way to where they are meant to go."""
        promised = [0] * self.num_rungs
        for name, rung in self.running.items():
            config = self.state.trials[name].config
            for step in range(rung + 1, self.meant[name] + 1):
                promised[step] += self.arena.reserve_flops(config, step, step - 1)
        return promised

    @cached_property
    def spent_flops(self) -> list[int]:
        """Nominal FLOPs per rung of all tasks, running and failed ones included, and what is promised."""
        return [self.state.nominal_flops[rung] + self.promised_flops[rung] for rung in range(self.num_rungs)]


def ascent_flops(arena: Arena, config: Config, from_rung: int | None, first: int, rung: int) -> int:
    """All reservations from a trunk (None: from nothing) over a first task up to a rung."""
    total = 0
    for step in range(first, rung + 1):
        total += arena.reserve_flops(config, step, from_rung)
        from_rung = step
    return total


def affordable(steps: Iterable[Step | None], available_flops: int) -> list[Step]:
    """Steps whose whole way may be reserved."""
    return [step for step in steps if step is not None and step.cost_flops <= available_flops]
