"""A search space on its log: what the log decides is filled in, and the trunk that trials share is looked at.

Enters: a SweepSpec, the opened shard set and its protocol. Leaves: the SweepSpec that plans, sweeps and ledgers hold.
"""

from __future__ import annotations

from dataclasses import replace

from bfm.events.protocol import Protocol
from bfm.events.shards import Shards
from bfm.sweep.parameters import Parameter
from bfm.sweep.settings import SweepSpec
from bfm.sweep.stage1 import with_stage1
from bfm.training.config import log_defaults


def on_log(spec: SweepSpec, shards: Shards, protocol: Protocol) -> SweepSpec:
    """The space with a constant for every value that it leaves to the log; raises what with_stage1 raises."""
    named = {parameter.name for parameter in spec.parameters}
    decided = log_defaults(named, protocol.filter_seen, shards.history_length)
    added = [Parameter(name, "constant", (value,)) for name, value in decided.items()]
    parameters = tuple(sorted((*spec.parameters, *added), key=lambda parameter: parameter.name))
    return with_stage1(replace(spec, parameters=parameters), shards.hash)
