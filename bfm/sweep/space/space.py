"""The feasible set: which points of the space can be trained to every rung, and why the others cannot.

Enters: a SweepSpec and a cost model. Leaves: verdicts with a counted reason, feasible samples.
Steps follow from C and the configuration; a rung is feasible for a point if it has at least 100 steps within the
tolerance, D/N is sensible, its workers can share the batch and its memory suffices. A point enters at the first such
rung and goes up to the last one without a gap: a large model has no place on the lowest rungs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from bfm.errors import InfeasibleError, UserError
from bfm.sweep.space.costs import ConfigCost, CostModel
from bfm.sweep.space.parameters import ConfigKey, config_key
from bfm.sweep.space.settings import SweepSpec
from bfm.sweep.space.tiers import Tier
from bfm.training.config import TrainConfig
from bfm.training.schedule import trunk_flops
from bfm.units import GIB, format_count, format_flops

SAMPLE_SIZE = 256
SAMPLE_TRIES = 4096
_SAMPLE_SEED = 20_260_613


@dataclass(frozen=True)
class Feasible:
    """A point that can be trained."""

    config: TrainConfig
    cost: ConfigCost
    rungs: range
    """From its entry rung to its last one."""


@dataclass(frozen=True)
class Rejection:
    """A point that cannot, by the first bound that it breaks."""

    reason: str
    """The bound in few words: equal text is counted together."""
    detail: str
    """This point's figures."""
    key: str
    """The YAML key to change."""
    fix: str


@dataclass(frozen=True)
class Place:
    """A way to train a configuration: a tier, how its task is run there, what a worker is estimated to need."""

    tier: Tier
    scaling: dict[str, Any]
    needed_bytes: int

    @classmethod
    def at(cls, tier: Tier, config: TrainConfig, cost: ConfigCost) -> Place:
        """Whether the tier holds it or not."""
        scaling = tier.scaling(config.groups_per_step)
        return cls(tier, scaling, cost.memory_bytes(tier, scaling["micro_groups"], config.averaging))

    def ran_out(self, limits: Mapping[str, int]) -> bool:
        """`limits`: kind of tier -> the smallest estimate that ran out of memory there (SweepState.memory_limits)."""
        return self.needed_bytes >= limits.get(self.tier.kind, math.inf)


class FeasibleSet:
    """The points of a space that its ladder, its workers and a log allow."""

    def __init__(self, spec: SweepSpec, costs: CostModel) -> None:
        self.spec, self.costs = spec, costs
        self._places: dict[tuple[Any, ...], list[Place]] = {}
        self._known: dict[ConfigKey, range] = {}
        """Rungs of points that were found feasible: what is proposed is asked for again."""

    def judge(self, values: Mapping[str, Any]) -> Feasible | Rejection:
        """The verdict on the values of the free parameters."""
        try:
            config = self.spec.config(values)
        except UserError as error:
            return _from_error("is contradictory", error)
        return self.judge_config(config)

    def judge_config(self, config: TrainConfig) -> Feasible | Rejection:
        """The verdict on a whole configuration."""
        try:
            if (too_many := self._negatives(config)) is not None:
                return too_many
            cost = self.costs.of(config)
        except InfeasibleError as error:
            return _from_error("cannot be built", error)
        verdict = self._rungs(config, cost)
        if isinstance(verdict, Feasible):
            self._known[config_key(config.as_dict())] = verdict.rungs
        return verdict

    def own(self, values: Mapping[str, Any]) -> Feasible:
        """The verdict on a configuration of the user's own, which may lie outside the ranges of the free parameters.

        Raises UserError where TrainConfig refuses it or it differs from the space in what is no coordinate of it,
        InfeasibleError where it has no row at any rung.
        """
        config = self.spec.config(values)
        free = {parameter.name for parameter in self.spec.free_parameters}
        asked = config.as_dict()
        inside = self.spec.config({name: asked[name] for name in free}).as_dict()
        # What was written first: what follows from it, such as the rate of a rule, is nobody's fault.
        for name in (*(name for name in values if name in asked), *asked):
            if asked[name] != inside[name]:
                what = f"is {inside[name]!r} all over this space, not {asked[name]!r}"
                raise UserError(what, key=name, fix="leave it out, or give it a range and go on with --extend")
        verdict = self.judge_config(config)
        if isinstance(verdict, Rejection):
            raise InfeasibleError(f"{verdict.reason} ({verdict.detail})", key=verdict.key, fix=verdict.fix)
        return verdict

    def rungs(self, config: Mapping[str, Any]) -> range:
        """Of a whole configuration: from the first rung that has 100 steps and a sensible D/N to the last one.

        All, where none has: a trial from before the space was changed goes where its rows are.
        """
        key = config_key(config)
        if key not in self._known:
            verdict, whole = self.judge_config(TrainConfig.from_dict(config)), range(len(self.spec.budget.ladder_flops))
            self._known[key] = verdict.rungs if isinstance(verdict, Feasible) else whole
        return self._known[key]

    def _rungs(self, config: TrainConfig, cost: ConfigCost) -> Feasible | Rejection:
        rejections = [self._at(config, cost, rung) for rung in range(len(self.spec.budget.ladder_flops))]
        refused = [rejection for rejection in rejections if rejection is not None]
        if len(refused) == len(rejections):
            return refused[0]
        entry = rejections.index(None)
        after = next((rung for rung in range(entry, len(rejections)) if rejections[rung]), len(rejections))
        return Feasible(config, cost, range(entry, after))

    def _at(self, config: TrainConfig, cost: ConfigCost, rung: int) -> Rejection | None:
        rung_flops = self.spec.budget.ladder_flops[rung]
        return (
            self._steps(config, cost, rung_flops)
            or self._data(config, cost, rung_flops)
            or self._no_tier(config, cost, rung_flops)
        )

    def places(self, config: Mapping[str, Any], rung: int, limits: Mapping[str, int]) -> list[Place]:
        """How a whole configuration may be trained to a rung, fewest workers first: the tiers that hold it and at which
        nothing estimated as small or smaller ran out of memory."""
        key = rung, config_key(config)
        if key not in self._places:
            whole = TrainConfig.from_dict(config)
            self._places[key] = self.holding(whole, self.costs.of(whole), rung)
        return [place for place in self._places[key] if not place.ran_out(limits)]

    def holding(self, config: TrainConfig, cost: ConfigCost, rung: int) -> list[Place]:
        """The same without limits; never none, because a trial from before the space was changed goes on as it can."""
        tiers = self.spec.tiers_at(self.spec.budget.ladder_flops[rung], cost.params)
        tried = [_tried(tier, config, cost) for tier in tiers]
        if held := [place for place in tried if isinstance(place, Place)]:
            return held
        workers = math.gcd(tiers[0].workers, config.groups_per_step)
        return [Place.at(replace(tiers[0], workers=workers), config, cost)]

    def draw(self, rng: np.random.Generator) -> dict[str, Any]:
        """Values of the free parameters, from their distributions, feasible or not."""
        return {parameter.name: parameter.draw(rng) for parameter in self.spec.free_parameters}

    def grid(self) -> Iterator[dict[str, Any]]:
        """All points, the last parameter fastest; only where every axis is finite."""
        axes = self.spec.free_parameters
        for point in product(*(parameter.grid() for parameter in axes)):
            yield {parameter.name: value for parameter, value in zip(axes, point, strict=True)}

    @cached_property
    def sample(self) -> tuple[tuple[Feasible, ...], tuple[Rejection, ...]]:
        """A fixed random sample of the space (a grid: all of it): feasible points, and the rejected ones.

        Raises InfeasibleError naming the bound that rejects most, where no draw is feasible at all, or at a rung.
        """
        rng = np.random.default_rng(_SAMPLE_SEED)
        feasible: list[Feasible] = []
        rejected: list[Rejection] = []
        draws = self.grid() if self.spec.method == "grid" else (self.draw(rng) for _ in range(SAMPLE_TRIES))
        for values in draws:
            verdict = self.judge(values)
            if isinstance(verdict, Feasible):
                feasible.append(verdict)
            else:
                rejected.append(verdict)
            if len(feasible) >= SAMPLE_SIZE and self.spec.method != "grid":
                break
        if not feasible:
            raise binding_bound(rejected)
        for rung in range(len(self.spec.budget.ladder_flops)):
            if not any(rung in point.rungs for point in feasible):
                here = (self._at(point.config, point.cost, rung) for point in feasible)
                raise binding_bound([rejection for rejection in here if rejection is not None])
        return tuple(feasible), tuple(rejected)

    def _steps(self, config: TrainConfig, cost: ConfigCost, rung_flops: int) -> Rejection | None:
        tolerance = self.spec.budget.tolerance
        try:
            steps = cost.steps(rung_flops, config.cooldown_fraction)
        except InfeasibleError as error:
            begins = error.key == "freeze_at_flops"
            reason = "stage 2 does not begin below rung" if begins else "fewer than 100 steps at rung"
            return _from_error(f"{reason} {format_flops(rung_flops)}", error, exact=True)
        last_flops = cost.step_flops if cost.stage2_step_flops is None else cost.stage2_step_flops
        if last_flops > tolerance * rung_flops:
            return Rejection(
                reason=f"a step exceeds the tolerance at rung {format_flops(rung_flops)}",
                detail=f"{steps} steps of {format_flops(last_flops)} FLOPs",
                key="budget.tolerance",
                fix="use a smaller batch or model, a higher rung, or the full tolerance",
            )
        return None

    def _data(self, config: TrainConfig, cost: ConfigCost, rung_flops: int) -> Rejection | None:
        budget = self.spec.budget
        c = format_flops(rung_flops)
        events = cost.events(rung_flops)
        ratio = events / cost.params
        low, high = budget.events_per_param
        if not low <= ratio <= high:
            side, bound = ("below", low) if ratio < low else ("above", high)
            size = "smaller" if ratio < low else "larger"
            return Rejection(
                reason=f"D/N {side} {bound:g} at rung {c}",
                detail=f"D/N = {ratio:.3g} at N = {format_count(cost.params)}",
                key="budget.events_per_param",
                fix=f"search {size} models, or widen events_per_param",
            )
        warmup_events = cost.params if config.warmup_events is None else config.warmup_events
        trunk_events = cost.events(trunk_flops(rung_flops, config.cooldown_fraction))
        if warmup_events > trunk_events:
            return Rejection(
                reason=f"warmup longer than the trunk of rung {c}",
                detail=f"{format_count(warmup_events)} events of warmup, {format_count(trunk_events)} of trunk",
                key="parameters.warmup_events",
                fix="shorten the warmup, search smaller models, or raise the first rung",
            )
        epochs = cost.epochs(rung_flops)
        if budget.max_epochs is not None and epochs > budget.max_epochs:
            return Rejection(
                reason=f"more than {budget.max_epochs:g} epochs at rung {c}",
                detail=f"{epochs:.3g} epochs",
                key="budget.max_epochs",
                fix="search larger models, lower the top rung, or allow more epochs",
            )
        return None

    def _negatives(self, config: TrainConfig) -> Rejection | None:
        for name in ("negatives", "live_negatives"):
            if getattr(config, name) > self.costs.num_catalogue:
                return Rejection(
                    reason="more negatives than items in the catalogue",
                    detail=f"K = {getattr(config, name)} of {self.costs.num_catalogue} items",
                    key=f"parameters.{name}",
                    fix=f"use at most {self.costs.num_catalogue}",
                )
        return None

    def _no_tier(self, config: TrainConfig, cost: ConfigCost, rung_flops: int) -> Rejection | None:
        tried = [_tried(tier, config, cost) for tier in self.spec.tiers_at(rung_flops, cost.params)]
        refusals = [refusal for refusal in tried if isinstance(refusal, Rejection)]
        return refusals[0] if len(refusals) == len(tried) else None


def _tried(tier: Tier, config: TrainConfig, cost: ConfigCost) -> Place | Rejection:
    if config.groups_per_step % tier.workers:
        return Rejection(
            reason=f"{tier.workers} workers do not divide groups_per_step",
            detail=f"groups_per_step = {config.groups_per_step}",
            key="parameters.groups_per_step",
            fix=f"use multiples of {tier.workers}, or a smaller group_windows with more groups per step",
        )
    place = Place.at(tier, config, cost)
    needed_gib = place.needed_bytes / GIB
    if tier.memory_gib is None or needed_gib <= tier.memory_gib:
        return place
    return Rejection(
        reason=f"more than {tier.memory_gib:g} GiB per worker",
        detail=f"about {needed_gib:.3g} GiB with {tier.workers} workers at ZeRO {tier.zero_stage}",
        key="scaling.tiers",
        fix="use fewer micro_groups, more workers, a higher ZeRO stage or smaller models",
    )


def binding_bound(rejected: list[Rejection] | tuple[Rejection, ...]) -> InfeasibleError:
    """The error for a space without a feasible point: names the bound that rejects most draws."""
    counts = Counter(rejection.reason for rejection in rejected)
    (reason, count), *_ = counts.most_common(1)
    example = next(rejection for rejection in rejected if rejection.reason == reason)
    return InfeasibleError(
        f"no point of the space is feasible; {count} of {len(rejected)} tries: {reason} ({example.detail})",
        key=example.key,
        fix=example.fix,
    )


def _from_error(reason: str, error: UserError, *, exact: bool = False) -> Rejection:
    name = error.key or "parameters"
    reason = reason if exact else f"{name} {reason}"
    return Rejection(reason=reason, detail=error.what, key=f"parameters.{name}", fix=error.fix or "change the space")
