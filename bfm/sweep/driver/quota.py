"""Which trunk checkpoints go when they take more room than they may.

Enters: the state and the policy of a sweep. Leaves: `evicted` records, with the reason of each. First what a higher
rung's trunk of the same trial has made obsolete, then trials that failed or were given up, then those at the top rung,
then the least promising paused trials; never a trunk that a task goes on from. A trial whose trunk is gone can still be
promoted: from its highest trunk that stands, or from nothing. Cooled models are results and stay.
"""

from __future__ import annotations

from collections.abc import Iterator

from bfm.sweep.ledger.state import Record, SweepState, comparable_value
from bfm.sweep.policies.policy import Forecaster, Policy
from bfm.sweep.space.settings import SweepSpec
from bfm.units import GIB

Place = tuple[str, int]


def evictions(spec: SweepSpec, state: SweepState, policy: Policy) -> list[Record]:
    """What has to go for the kept trunks to be within the quota; empty where they are, or nothing may go."""
    if spec.storage.checkpoints_gib is None:
        return []
    kept = state.kept_trunks
    excess = sum(kept.values()) - spec.storage.checkpoints_gib * GIB
    records: list[Record] = []
    if excess <= 0:
        return records
    for (trial, rung), reason in _order(spec, state, policy, kept):
        checkpoint = state.trials[trial].rows[rung]["checkpoint"]
        record = {"kind": "evicted", "trial": trial, "rung": rung, "reason": reason, "bytes": kept[trial, rung]}
        records.append({**record, "checkpoint": checkpoint})
        excess -= kept[trial, rung]
        if excess <= 0:
            break
    return records


def _order(spec: SweepSpec, state: SweepState, policy: Policy, kept: dict[Place, int]) -> Iterator[tuple[Place, str]]:
    in_use = {(trial, attempt.task["from_rung"]) for (trial, _), attempt in state.attempts.items()}
    highest: dict[str, int] = {}
    for trial, rung in kept:
        highest[trial] = max(rung, highest.get(trial, rung))
    for trial, rung in kept:
        if rung < highest[trial] and (trial, rung) not in in_use:
            yield (trial, rung), f"the trunk of rung {highest[trial]} of the same trial stands"
    given_up = state.given_up
    left = [(trial, rung) for trial, rung in highest.items() if (trial, rung) not in in_use]
    paused = []
    for trial, rung in left:
        rows = state.trials[trial].rows
        last = rows[max(rows)]["status"]
        if trial in given_up or last != "ok":
            yield (trial, rung), "the trial was given up" if trial in given_up else f"the trial ended ({last})"
        else:
            paused.append((trial, rung))
    top = len(spec.budget.ladder_flops) - 1
    for trial, rung in paused:
        if rung == top:
            yield (trial, rung), "no rung above goes on from it"
    yield from _least_promising(spec, state, policy, [place for place in paused if place[1] < top])


def _least_promising(
    spec: SweepSpec, state: SweepState, policy: Policy, places: list[Place]
) -> Iterator[tuple[Place, str]]:
    """By what the policy expects of them, else by the share of their rung's rows that are better."""
    promises = policy.promises(state, [trial for trial, _ in places]) if isinstance(policy, Forecaster) else None
    if promises is not None:
        for place in sorted(places, key=lambda place: promises[place[0]]):
            rate = f"{promises[place[0]]:.3g} per share of the cap"
            yield place, f"least expected improvement per FLOP of {len(places)} paused trials ({rate})"
        return
    behind = {place: _share_of_better(spec, state, place) for place in places}
    # Among equals the lower rung goes: less is to be trained again.
    for place in sorted(places, key=lambda place: (-behind[place], place[1])):
        name = spec.metric.name
        yield (
            place,
            f"{behind[place]:.0%} of the rows at rung {place[1]} have a better {name}; {len(places)} are paused",
        )


def _share_of_better(spec: SweepSpec, state: SweepState, place: Place) -> float:
    metric, tolerance = spec.metric, spec.budget.tolerance
    values = {trial: comparable_value(row, metric.name, tolerance) for trial, row in state.rungs[place[1]].items()}
    own = values.pop(place[0])
    if own is None:
        return 1.0
    losses = [metric.loss(value) for value in values.values() if value is not None]
    return sum(loss < metric.loss(own) for loss in losses) / max(1, len(losses))
