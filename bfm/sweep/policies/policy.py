"""Which trial goes on, and when a new one is proposed: a pure function of the ledger's state.

Enters: a SweepState and what may still be reserved under the cap. Leaves: one decision with its reason in words and
numbers. Policies see committed rows and pending tasks at their nominal costs, never redone work (that counts against
the cap alone), so decisions after a crash equal the unbroken ones until the cap ends the sweep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from bfm.sweep.ledger.state import SweepState, Trial
from bfm.sweep.ledger.task import Wait
from bfm.sweep.policies.arena import Proposal


@dataclass(frozen=True)
class Start:
    """Train a paused trial on from its trunk, or a proposal from nothing, to a rung."""

    subject: Trial | Proposal
    rung: int
    reason: str
    meant_for: int
    """The rung that it is trained for, step by step."""
    request: str | None = None
    """Id of the request (bfm.sweep.driver.requests) that it answers."""


@dataclass(frozen=True)
class Stop:
    """Nothing more is to be done."""

    reason: str


Decision = Start | Wait | Stop


class Policy(Protocol):
    """What the driver asks for every free slot."""

    def decide(self, state: SweepState, available_flops: int) -> Decision:
        """The next step. Its reservation must not exceed `available_flops`; Wait only while tasks are pending."""
        ...


@runtime_checkable
class Forecaster(Protocol):
    """A policy that can tell what paused trials are still good for."""

    def promises(self, state: SweepState, trials: Sequence[str]) -> Mapping[str, float] | None:
        """Trial -> the largest expected improvement per share of the cap over all rungs; None: nothing is known yet."""
        ...
