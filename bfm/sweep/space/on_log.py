"""A search space on its log: what the log decides is filled in, and the trunk that trials share is looked at.

Enters: a SweepSpec. Leaves: the SweepSpec that plans, sweeps and ledgers hold, with the opened log and its costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from bfm.events.protocol import Protocol
from bfm.events.shards import Shards
from bfm.sweep.space.costs import Costs
from bfm.sweep.space.settings import SweepSpec
from bfm.sweep.space.space import FeasibleSet
from bfm.sweep.space.stage1 import with_stage1
from bfm.training.config import log_defaults


@dataclass(frozen=True)
class OpenedSpace:
    """A space and the log that it is searched on."""

    spec: SweepSpec
    """Nothing in it is left to the log."""
    shards: Shards
    protocol: Protocol
    costs: Costs

    @cached_property
    def feasible(self) -> FeasibleSet:
        """Its points that can be trained."""
        return FeasibleSet(self.spec, self.costs)


def open_space(spec: SweepSpec) -> OpenedSpace:
    """Open the shard set that a space names; raises what Shards.open, Protocol.load and `on_log` raise."""
    shards = Shards.open(spec.data.shards)
    protocol = Protocol.load(shards)
    costs = Costs.on(shards, protocol, spec.data.evaluation_queries)
    return OpenedSpace(on_log(spec, shards, protocol), shards, protocol, costs)


def on_log(spec: SweepSpec, shards: Shards, protocol: Protocol) -> SweepSpec:
    """The space with a constant for every value that it leaves to the log; raises what with_stage1 raises."""
    named = {parameter.name for parameter in spec.parameters}
    decided = log_defaults(named, protocol.filter_seen, shards.history_length)
    return with_stage1(spec.with_constants(decided), shards.hash)
