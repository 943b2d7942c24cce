"""Policies against each other on known curves: frontier regret per rung at equal spend, over seeds.

Enters: curves, a ladder, a share of what training all of them would cost. Leaves: regrets (loss above the best that the
curves have within a rung's C) with standard errors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from bfm.errors import UserError
from bfm.sweep.ledger.state import SweepState
from bfm.sweep.simulator.fleet import Fleet
from bfm.sweep.simulator.run import Progress, Timeline, decision_times, run_all, simulate
from bfm.sweep.simulator.table import UNKNOWN_SIZE, Curve, TableArena
from bfm.sweep.space.metric import Selection
from bfm.sweep.space.settings import Budget, Data, Scaling, Scheduler, SweepSpec
from bfm.units import aligned

LOSS = Selection("loss")


@dataclass(frozen=True)
class Contest:
    """What the policies compete in; what none of them could run is a UserError."""

    curves: tuple[Curve, ...]
    rungs_flops: tuple[int, ...]
    budget_fraction: float
    subset: float = 1.0
    """Share of the curves, drawn anew for every seed."""
    cooldown_fraction: float = 0.0
    eta: float = 4.0
    max_retries: int = 2
    fleet: Fleet = field(default_factory=Fleet)

    def __post_init__(self) -> None:
        ladder = self.rungs_flops
        if not ladder or min(ladder) <= 0:
            raise UserError("a rung needs FLOPs", key="--rungs", fix="write numbers above 0")
        if any(above <= below for below, above in itertools.pairwise(ladder)):
            raise UserError("are not strictly increasing", key="--rungs", fix="sort them and drop repetitions")
        if not 0 < self.budget_fraction < math.inf:
            raise UserError("must be a number above 0", key="--budget-fraction", fix="write e.g. 0.15")
        if not 0 < self.subset <= 1:
            raise UserError("must be above 0 and at most 1", key="--subset", fix="write e.g. 0.7")
        if not 0 <= self.cooldown_fraction < 1:
            raise UserError("must be at least 0 and below 1", key="--cooldown-fraction", fix="write e.g. 0.2")
        if not 1 < self.eta < math.inf:
            raise UserError("must be a number above 1", key="--eta", fix="write e.g. 4")
        for rung in range(len(ladder)):
            if all(curve.row_at(ladder, rung) is None for curve in self.curves):
                raise UserError(
                    f"no configuration has a row at rung {ladder[rung]:.3g}", key="--rungs", fix="leave that rung out"
                )


@dataclass(frozen=True)
class Entry:
    """One policy in one seed."""

    regret_R: np.ndarray
    budget_flops: int
    spent_flops: int
    timeline: Timeline
    state: SweepState


@dataclass(frozen=True)
class Standing:
    """One policy over all seeds."""

    policy: str
    entries: tuple[Entry, ...]

    def as_dict(self, rungs_flops: Sequence[int]) -> dict[str, Any]:
        """JSON-able figures."""
        regret_SR = np.array([entry.regret_R for entry in self.entries])
        timelines = [entry.timeline for entry in self.entries]
        return {
            "policy": self.policy,
            "regret": [{"rung": flops, **_mean(regret_SR[:, rung])} for rung, flops in enumerate(rungs_flops)],
            "regret_sum": _mean(regret_SR.sum(1)),
            "spent_fraction": float(np.mean([entry.spent_flops / entry.budget_flops for entry in self.entries])),
            "decisions": sum(timeline.decisions for timeline in timelines),
            **decision_times(timelines),
            "hours": float(np.mean([timeline.elapsed_s for timeline in timelines])) / 3600,
            "lost_tasks": sum(timeline.lost for timeline in timelines),
        }


def compete(
    contest: Contest,
    policies: Sequence[str],
    seeds: Sequence[int],
    progress: Progress = lambda words, share: None,
) -> list[Standing]:
    """All policies on the same subsets. Raises UserError for a subset or a budget of nothing."""
    if "isoflop-window" in policies and all(curve.params == UNKNOWN_SIZE for curve in contest.curves):
        raise UserError("isoflop-window needs the size of models", key="--params-column", fix="name the column of N")
    entries = run_all(partial(enter, contest), policies, seeds, progress)
    return [Standing(policy, tuple(own)) for policy, own in zip(policies, entries, strict=True)]


def enter(contest: Contest, policy: str, seed: int) -> Entry:
    """One policy, one seed: the subset, its order and the fleet's luck are functions of the seed alone."""
    rng = np.random.default_rng(seed)
    count = max(1, round(contest.subset * len(contest.curves)))
    chosen = rng.permutation(len(contest.curves))[:count]
    order = np.sort(chosen) if policy == "grid" else chosen
    arena = TableArena([contest.curves[place] for place in order], contest.rungs_flops, contest.cooldown_fraction)
    budget_flops = int(contest.budget_fraction * arena.full_flops(contest.rungs_flops[-1]))
    if arena.num_points == 0:
        raise UserError("no configuration of a subset reaches a rung", key="--subset", fix="draw a larger share")
    if budget_flops < 1:
        raise UserError("leaves less than 1 FLOP", key="--budget-fraction", fix="write e.g. 0.15")
    spec = contest_spec(contest, policy, budget_flops, seed)
    state, timeline = simulate(spec, arena, arena.execute, contest.fleet, rng)
    return Entry(arena.regrets(state), budget_flops, state.spent_flops, timeline, state)


def as_dict(table: str, contest: Contest, standings: Sequence[Standing]) -> dict[str, Any]:
    """JSON-able result; the budget is the mean over seeds."""
    budgets = [entry.budget_flops for standing in standings for entry in standing.entries]
    return {
        "table": table,
        "rungs": list(contest.rungs_flops),
        "budget_flops": float(np.mean(budgets)),
        "policies": [standing.as_dict(contest.rungs_flops) for standing in standings],
    }


def render(result: dict[str, Any]) -> str:
    """A table for a terminal."""
    rungs = [f"{flops:.3g}" for flops in result["rungs"]]
    rows = [("policy", *rungs, "sum", "s.e.", "spent", "decisions", "ms")]
    for policy in result["policies"]:
        regrets = [f"{regret['mean']:.4f}" for regret in policy["regret"]]
        total = policy["regret_sum"]
        ms = policy["decision_ms"]["median"]
        figures = (f"{total['mean']:.4f}", f"{total['se']:.4f}", f"{policy['spent_fraction']:.0%}")
        rows.append((policy["policy"], *regrets, *figures, str(policy["decisions"]), f"{ms:.1f}"))
    return "\n".join([f"regret per rung, {result['budget_flops']:.3g} FLOPs each", *aligned(rows)])


def contest_spec(contest: Contest, policy: str, budget_flops: int, seed: int) -> SweepSpec:
    """The spec of one entry."""
    return SweepSpec(
        name="table",
        metric=LOSS,
        method="random",
        parameters=(),
        budget=Budget(contest.rungs_flops, budget_flops, max_trials=1_000_000),
        scheduler=Scheduler(policy, eta=contest.eta),
        scaling=Scaling(slots=contest.fleet.most, max_retries=contest.max_retries),
        data=Data(""),
        seeds=(seed,),
    )


def _mean(values_S: np.ndarray) -> dict[str, float]:
    error = float(values_S.std(ddof=1) / np.sqrt(len(values_S))) if len(values_S) > 1 else 0.0
    return {"mean": float(values_S.mean()), "se": error}
