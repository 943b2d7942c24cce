"""Policies by name: which trial goes on, and when a new one is begun."""

from __future__ import annotations

from collections.abc import Callable

from bfm.errors import UserError
from bfm.sweep.arena import Arena
from bfm.sweep.policies.baselines import AshaPromote, AshaStop, FullLength, IsoflopWindow
from bfm.sweep.policies.frontier import FrontierPolicy
from bfm.sweep.policies.strata import StrataPolicy
from bfm.sweep.policy import Policy
from bfm.sweep.settings import SweepSpec
from bfm.sweep.space_arena import SpaceArena

_BY_ARENA: dict[str, Callable[[SweepSpec, Arena], Policy]] = {
    "frontier": FrontierPolicy,
    "asha-promote": AshaPromote,
    "asha-stop": AshaStop,
    "isoflop-window": IsoflopWindow,
    "random": FullLength,
    "grid": FullLength,
}


def make_policy(spec: SweepSpec, arena: Arena) -> Policy:
    """The policy that `scheduler.type` names. Raises UserError where it does not go with the arena."""
    if spec.scheduler.type in _BY_ARENA:
        return _BY_ARENA[spec.scheduler.type](spec, arena)
    if not isinstance(arena, SpaceArena):
        raise UserError("strata need a space", key="policy", fix=f"one of {', '.join(_BY_ARENA)}")
    return StrataPolicy(spec, arena.feasible)
