"""Seeds beyond the first: near-ties at the top rung are trained with all of them before a winner is named.

Enters: a View and the noise of a row. Leaves: the next replica to train, and what is kept of the cap for replicas.
A replica goes from nothing to the top at once: its lower rungs tell nothing new.
"""

from __future__ import annotations

import math

from bfm.sweep.ledger.state import SweepState
from bfm.sweep.ledger.winner import by_config
from bfm.sweep.policies.arena import Proposal
from bfm.sweep.policies.ground import View
from bfm.sweep.policies.policy import Start
from bfm.sweep.space.settings import SweepSpec

REPLICA = "replica"
_MOST = 3
"""So many configurations are compared over seeds, the leader among them."""
_NEAR = 2.0 * math.sqrt(2.0)
"""A near-tie: within so many standard errors of one row, two of the difference of two."""
_LARGEST_SHARE = 0.2


def kept_flops(spec: SweepSpec, state: SweepState) -> int:
    """What other decisions leave for replicas, those begun counted off; nothing with one seed."""
    if len(spec.seeds) == 1:
        return 0
    top, total = spec.budget.ladder_flops[-1], spec.budget.total_flops
    wanted = (len(spec.seeds) - 1) * _MOST * top
    # What is kept must leave something to compare.
    beyond = total - spec.ascent_flops(spec.cooldown_fractions[1], len(spec.budget.ladder_flops) - 1)
    kept = min(wanted, math.floor(_LARGEST_SHARE * total), beyond)
    return max(0, kept - top * sum(trial.source == REPLICA for trial in state.trials.values()))


def next_replica(view: View, noise: float) -> Start | None:
    """The next (configuration, seed) to compare; None where the leader has no near rival or all are begun."""
    top = view.num_rungs - 1
    groups = by_config(view.state, top, view.spec)
    means = {key: sum(losses.values()) / len(losses) for key, (_, losses) in groups.items()}
    order = sorted(means, key=lambda key: means[key])
    near = [key for key in order if means[key] <= means[order[0]] + _NEAR * noise][:_MOST]
    if len(near) < 2:
        return None
    for key in near:
        trial = groups[key][0]
        begun = {other.seed for other in view.state.trials.values() if other.key == key}
        for seed in view.spec.seeds:
            cost_flops = view.arena.reserve_flops(trial.config, top, None)
            if seed not in begun and cost_flops <= view.available_flops:
                reason = f"{len(near)} configurations are within the noise of the best at the top: {trial.trial} again"
                return Start(Proposal(trial.config, trial.params, REPLICA, seed), top, reason, top)
    return None
