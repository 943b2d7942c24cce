"""The arena of a real sweep: the feasible points of a space on a log, trained at the ladder's C.

Enters: a FeasibleSet. Leaves: proposals, nominal costs, places (see bfm.sweep.policies.arena).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from bfm.sweep.ledger.state import SweepState
from bfm.sweep.policies.arena import ASKED, Proposal
from bfm.sweep.policies.proposer import Proposer
from bfm.sweep.space.axes import Axes
from bfm.sweep.space.parameters import Parameter
from bfm.sweep.space.space import FeasibleSet, Place


class SpaceArena:
    """Points of a search space."""

    def __init__(self, feasible: FeasibleSet, past: Sequence[Sequence[Parameter]] = ()) -> None:
        """`past`: parameters of earlier spaces of the same sweep; what varied in them stays a coordinate.

        Raises InfeasibleError for a space without a point.
        """
        self.spec, self.feasible, self._past = feasible.spec, feasible, past
        self._params = [point.cost.params for point in feasible.sample[0]]
        self.proposer = Proposer(feasible)
        self._pool: tuple[int, Sequence[Proposal]] = (-1, ())

    @cached_property
    def axes(self) -> Axes:
        """Realised log N and the free parameters, then those that were free in earlier spaces of the sweep."""
        free = {parameter.name: parameter for parameter in self.spec.free_parameters}
        for parameters in reversed(self._past):
            for parameter in parameters:
                if parameter.is_free:
                    free.setdefault(parameter.name, parameter)
        return Axes.of_parameters(self._params, tuple(free.values()))

    def rungs(self, config: Mapping[str, Any]) -> range:
        """See FeasibleSet."""
        return self.feasible.rungs(config)

    def climbs(self, config: Mapping[str, Any]) -> bool:
        """A trunk passes every rung."""
        del config
        return True

    def row_flops(self, config: Mapping[str, Any], rung: int) -> float:
        """The ladder's C."""
        del config
        return float(self.spec.budget.ladder_flops[rung])

    def reserve_flops(self, config: Mapping[str, Any], rung: int, from_rung: int | None) -> int:
        """See SweepSpec.task_flops."""
        return self.spec.task_flops(config["cooldown_fraction"], rung, from_rung)

    def places(self, config: Mapping[str, Any], rung: int, limits: Mapping[str, int]) -> list[Place]:
        """See Arena."""
        return self.feasible.places(config, rung, limits)

    def own(self, values: Mapping[str, Any]) -> Proposal:
        """See Arena."""
        point = self.feasible.own(values)
        return Proposal(point.config.as_dict(), point.cost.params, ASKED)

    def pool(self, state: SweepState, number: int) -> Sequence[Proposal]:
        """Drawn once per proposal number: decisions in between see the same points.

        It rests on what stood before the last proposal, so a driver that resumes in between draws the same ones.
        """
        if self._pool[0] != number:
            self._pool = number, self.proposer.pool(state, number)
        return self._pool[1]
