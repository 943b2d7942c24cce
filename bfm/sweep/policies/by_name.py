"""Policies by their names in a space."""

from __future__ import annotations

from collections.abc import Callable

from bfm.sweep.policies.arena import Arena
from bfm.sweep.policies.baselines import AshaPromote, AshaStop, FullLength, IsoflopWindow
from bfm.sweep.policies.frontier import FrontierPolicy
from bfm.sweep.policies.policy import Policy
from bfm.sweep.space.settings import SweepSpec

_POLICIES: dict[str, Callable[[SweepSpec, Arena], Policy]] = {
    "frontier": FrontierPolicy,
    "asha-promote": AshaPromote,
    "asha-stop": AshaStop,
    "isoflop-window": IsoflopWindow,
    "random": FullLength,
    "grid": FullLength,
}


def make_policy(spec: SweepSpec, arena: Arena) -> Policy:
    """The policy that `scheduler.type` names."""
    return _POLICIES[spec.scheduler.type](spec, arena)
