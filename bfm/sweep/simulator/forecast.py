"""What a sweep would bring and cost under a planted law, before any of it is trained.

Enters: a SweepSpec, a Law, a fleet. Leaves: per policy when each rung's best row came, how far it is from the best that
the law has in the space, the worker-hours that are paid and their cost, and what training every configuration of a grid
would have taken without a pause.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from bfm.errors import UserError
from bfm.sweep.plan.plan import task_flops
from bfm.sweep.policies.space_arena import SpaceArena
from bfm.sweep.simulator.fleet import Fleet
from bfm.sweep.simulator.law import Law, LawCosts, law_row
from bfm.sweep.simulator.run import Progress, Timeline, decision_times, run_all, simulate
from bfm.sweep.space.settings import Budget, SweepSpec
from bfm.sweep.space.space import Feasible, FeasibleSet
from bfm.units import format_flops, format_seconds

_OPTIMUM_DRAWS = 2000
_SEED = 77


@dataclass(frozen=True)
class Found:
    """The best row of one rung, in one simulated sweep."""

    rung_flops: int
    rows: int
    gap: float
    """Its loss under the law (noise apart) above the best of the space; NaN without a row."""
    hours: float
    """When it came."""


@dataclass(frozen=True)
class Forecast:
    """One policy, one seed."""

    policy: str
    rungs: tuple[Found, ...]
    timeline: Timeline
    spent_flops: int
    trials: int


def forecast(
    spec: SweepSpec,
    law: Law,
    fleet: Fleet,
    policies: Sequence[str],
    seeds: Sequence[int],
    progress: Progress = lambda words, share: None,
) -> list[Forecast]:
    """Run all, without the space's further metrics: a law tells nll alone.

    Raises UserError where a sweep selects by something else too, or the space has no feasible point.
    """
    if spec.metric.name != "nll" or spec.metric.constraints:
        raise UserError("a law tells nll alone", key="metric", fix="simulate with metric {name: nll}, no constraints")
    spec = replace(spec, metric=replace(spec.metric, others=()))
    if "grid" in policies and spec.method != "grid":
        raise UserError("the space is no grid", key="--policy", fix="write method: grid and finite values in the space")
    run = partial(_run, spec, law, fleet, best_losses(spec, law))
    return [made for own in run_all(run, policies, seeds, progress) for made in own]


def best_losses(spec: SweepSpec, law: Law) -> list[float]:
    """Per rung, the lowest loss of many feasible points under the law, noise apart; inf where none has a row."""
    feasible, rng = FeasibleSet(spec, LawCosts()), np.random.default_rng(_SEED)
    points = list(feasible.sample[0])
    for _ in range(_OPTIMUM_DRAWS):
        verdict = feasible.judge(feasible.draw(rng))
        points += [verdict] if isinstance(verdict, Feasible) else []
    return [
        min(
            (law.loss_of(point.config.as_dict(), point.cost.params, flops) for point in points if rung in point.rungs),
            default=np.inf,
        )
        for rung, flops in enumerate(spec.budget.ladder_flops)
    ]


def _run(spec: SweepSpec, law: Law, fleet: Fleet, optimum: Sequence[float], policy: str, seed: int) -> Forecast:
    method = "random" if policy == "random" else "grid" if policy == "grid" else spec.method
    seeds = tuple(seed + 1000 * place for place in range(len(spec.seeds)))
    spec = replace(spec, method=method, seeds=seeds, scheduler=replace(spec.scheduler, type=policy))
    arena = SpaceArena(FeasibleSet(spec, LawCosts()))
    state, timeline = simulate(spec, arena, partial(law_row, law), fleet, np.random.default_rng(seed))
    rungs = []
    for rung, flops in enumerate(spec.budget.ladder_flops):
        rows = [(now_s, row) for now_s, row in timeline.rows if row["rung"] == rung]
        if not rows:
            rungs.append(Found(flops, 0, math.nan, math.nan))
            continue
        now_s, best = min(rows, key=lambda found: found[1]["metrics"]["nll"])
        gap = law.loss_of(best["config"], best["params"], flops) - optimum[rung]
        rungs.append(Found(flops, len(rows), gap, now_s / 3600))
    return Forecast(policy, tuple(rungs), timeline, state.spent_flops, len(state.trials))


def as_dict(
    spec: SweepSpec, law: str, fleet: Fleet, price_per_hour: float, forecasts: Sequence[Forecast]
) -> dict[str, Any]:
    """JSON-able result: means over seeds."""
    policies = list(dict.fromkeys(made.policy for made in forecasts))
    return {
        "space": spec.name,
        "law": law,
        "left_out": [metric.name for metric in spec.metric.others],
        "workers": [list(change) for change in fleet.schedule],
        "budget_flops": spec.budget.total_flops,
        "grid": _grid(spec, fleet, price_per_hour),
        "policies": [
            _policy(policy, [made for made in forecasts if made.policy == policy], price_per_hour)
            for policy in policies
        ],
    }


def _grid(spec: SweepSpec, fleet: Fleet, price_per_hour: float) -> dict[str, Any] | None:
    """What all configurations take to the top without a pause: those of a grid, else as many as the space allows.

    None where the space is no grid and sets no max_trials: nobody has said how many there are.
    """
    budget = spec.budget
    if spec.method == "grid":
        points = FeasibleSet(spec, LawCosts()).sample[0][: budget.max_trials]
        count, flops = len(points), sum(task_flops(spec, point, rung) for point in points for rung in point.rungs)
    elif budget.max_trials != Budget.max_trials:
        ascent_flops = spec.ascent_flops(spec.cooldown_fractions[1], len(budget.ladder_flops) - 1)
        count, flops = budget.max_trials, budget.max_trials * ascent_flops
    else:
        return None
    hours = flops / fleet.flops_per_s / 3600
    return {"configurations": count, "flops": flops, "worker_hours": hours, "cost": hours * price_per_hour}


def _policy(policy: str, made: Sequence[Forecast], price_per_hour: float) -> dict[str, Any]:
    timelines = [one.timeline for one in made]
    worker_hours = _mean(line.provisioned_s for line in timelines) / 3600
    return {
        "policy": policy,
        "seeds": len(made),
        "rungs": [_rung(found) for found in zip(*(one.rungs for one in made), strict=True)],
        "trials": _mean(one.trials for one in made),
        "spent_flops": _mean(one.spent_flops for one in made),
        "hours": _mean(line.elapsed_s for line in timelines) / 3600,
        "worker_hours": worker_hours,
        "busy_hours": _mean(line.busy_s for line in timelines) / 3600,
        "cost": worker_hours * price_per_hour,
        "lost_tasks": _mean(line.lost for line in timelines),
        "yielded_tasks": _mean(line.yielded for line in timelines),
        **decision_times(timelines),
    }


def _rung(found: Sequence[Found]) -> dict[str, Any]:
    """Over seeds; gap and hours over those that have a row there."""
    known = [one for one in found if one.rows]
    return {
        "rung": found[0].rung_flops,
        "rows": _mean(one.rows for one in found),
        "gap": _mean(one.gap for one in known) if known else None,
        "hours": _mean(one.hours for one in known) if known else None,
    }


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def render(result: dict[str, Any]) -> str:
    """For a terminal."""
    grid = result["grid"]
    lines = [f"{result['space']} under the law {result['law']!r}, cap {format_flops(result['budget_flops'])} FLOPs"]
    if result["left_out"]:
        lines.append(f"a law tells nll alone, so without {', '.join(result['left_out'])}")
    if grid is not None:
        lines.append(
            f"a grid of {grid['configurations']} configurations to the top: {format_flops(grid['flops'])} FLOPs, "
            f"{grid['worker_hours']:,.0f} worker-hours, cost {grid['cost']:,.0f}"
        )
    for policy in result["policies"]:
        share = "" if grid is None else f" ({policy['spent_flops'] / grid['flops']:.1%} of the grid)"
        lines.append(
            f"{policy['policy']}: {policy['trials']:.0f} trials, {format_flops(policy['spent_flops'])} FLOPs{share}, "
            f"{format_seconds(policy['hours'] * 3600)}, "
            f"{policy['worker_hours']:,.0f} worker-hours ({policy['busy_hours']:,.0f} busy), "
            f"cost {policy['cost']:,.0f}, {policy['lost_tasks']:.0f} tasks lost, "
            f"{policy['yielded_tasks']:.0f} yielded, decisions {policy['decision_ms']['median']:.0f} ms"
        )
        for rung in policy["rungs"]:
            if rung["gap"] is None:
                lines.append(f"  {rung['rung']:.3g}: no row")
            else:
                when = format_seconds(rung["hours"] * 3600)
                lines.append(
                    f"  {rung['rung']:.3g}: best of {rung['rows']:.0f} rows {rung['gap']:+.4f} nats off, after {when}"
                )
    return "\n".join(lines)
