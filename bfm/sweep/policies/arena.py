"""What a policy may choose from and what it costs, whoever trains it: a space on a log, or a table of known curves.

Enters: configurations as JSON-able mappings, rungs as integer indices. Leaves: proposals, costs, places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bfm.sweep.ledger.state import SweepState
from bfm.sweep.space.axes import Axes
from bfm.sweep.space.space import Place

Config = Mapping[str, Any]
OPTUNA = "optuna"
"""Source of the points that Optuna drew."""
ASKED = "asked"
"""Source of what somebody enqueued (bfm.sweep.driver.requests)."""


@dataclass(frozen=True)
class Proposal:
    """A configuration that could be trained, with a seed."""

    config: dict[str, Any]
    params: int
    """Nominal N."""
    source: str
    """optuna, random, grid, table, replica or asked."""
    seed: int | None = None
    """None: the sweep's first."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Reason -> draws that were not feasible, on the way to this one."""


class Arena(Protocol):
    """Points, their costs and their tasks."""

    @property
    def axes(self) -> Axes:
        """Coordinates of the points."""
        ...

    def rungs(self, config: Config) -> Sequence[int]:
        """The rungs that a configuration has rows at, its entry first."""
        ...

    def climbs(self, config: Config) -> bool:
        """Whether its lower rungs' rows lie on the way to the higher ones; otherwise every row is a run of its own."""
        ...

    def row_flops(self, config: Config, rung: int) -> float:
        """C of its row at a rung."""
        ...

    def reserve_flops(self, config: Config, rung: int, from_rung: int | None) -> int:
        """Upper bound of what training from a lower rung's trunk (None: from nothing) to a rung's row costs."""
        ...

    def places(self, config: Config, rung: int, limits: Mapping[str, int]) -> Sequence[Place]:
        """The ways in which it may be trained to a rung, fewest workers first; none where all of them are estimated as
        large as something that ran out of memory (`limits`: SweepState.memory_limits)."""
        ...

    def own(self, values: Config) -> Proposal:
        """A configuration of the user's own; settings that it does not name are the space's constants, else defaults.

        Raises UserError where a setting is unknown, or a constant here and another one there, InfeasibleError where it
        has no row at any rung.
        """
        ...

    def pool(self, state: SweepState, number: int) -> Sequence[Proposal]:
        """Points that proposal `number` may be chosen from, none of them tried before; empty at the end."""
        ...
