"""A search space in YAML, in the shape that users of W&B sweeps know, to a checked SweepSpec.

Enters: a file and overrides (`budget.total_flops=1e12`). Leaves: a frozen SweepSpec, or one line that names file, key,
fault and fix. Nothing here opens data or starts Ray; whether the space is feasible on a log is `bfm.sweep.space`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from bfm.errors import UserError
from bfm.sweep.keys import Count, Number, Section, at_least
from bfm.sweep.measured import AXES, check_axis, read_probes
from bfm.sweep.parameters import read_parameters
from bfm.sweep.settings import DISTRIBUTIONS, POLICIES, Budget, Constraint, Metric, Scheduler, Stage1, SweepSpec
from bfm.sweep.tiers import TierKeys, alternatives, check_tiers
from bfm.training.schedule import MIN_STEPS, TOLERANCE
from bfm.units import format_flops, parse_count, parse_number
from bfm.yaml import did_you_mean, load_yaml, parse_yaml, validate

_TARGET_METRICS = ("recall@10", "ndcg@10", "mrr@10")
METRICS = (
    "nll",
    *_TARGET_METRICS,
    "coverage@10",
    *(f"warm.{name}" for name in _TARGET_METRICS),
    "basket.nll",
    *(f"basket.{name}" for name in _TARGET_METRICS),
)


class _MetricKeys(Section):
    name: str = Field(description=f"One of {', '.join(METRICS)}")
    goal: Literal["minimize", "maximize"] | None = None
    others: list[str] = Field([], description="further metrics with a frontier of their own; the spend is shared")
    constraints: list[str] = Field([], description="such as coverage@10 >= 0.05")


class _ParameterKeys(Section):
    value: Any = None
    values: list[Any] | None = None
    min: Any = None
    max: Any = None
    q: Any = None
    distribution: Literal[*DISTRIBUTIONS] | None = None  # type: ignore[valid-type]


def _mapping(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise UserError(f"{value!r} is not a mapping", fix=f"write {{value: {value}}}")
    return value


class _BudgetKeys(Section):
    ladder_flops: list[Count] = Field(description="C of the rungs, strictly increasing")
    total_flops: Count = Field(description="hard cap on everything trained")
    max_trials: Count = 1_000_000
    tolerance: Number = 0.01
    events_per_param: list[Number] = Field(default=[2.0, 10_000.0])
    max_epochs: Number | None = None


class _SchedulerKeys(Section):
    type: Literal[*POLICIES] = "frontier"  # type: ignore[valid-type]
    eta: Number = 3.0
    shares: list[Number] | None = None


class _ScalingKeys(Section):
    slots: Count = 1
    max_retries: Count = 2
    tiers: list[TierKeys] = Field(default=[TierKeys()])


class _DataKeys(Section):
    shards: str = Field(description="folder or URI written by `bfm data prepare`")
    evaluation_queries: Count | None = None


class _Stage1Keys(Section):
    checkpoint: str = Field(description="stage-1 trunk that all trials share: a folder or URI that `bfm train` left")
    sha256: str | None = Field(None, description="of its state; filled in when the sweep begins")


class _StorageKeys(Section):
    checkpoints_gib: Number | None = None


_SEEDS_SCHEMA = WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]})


def _read_seeds(value: Any) -> list[int]:
    """A list of seeds, or how many."""
    seeds = [parse_count(seed) for seed in value] if isinstance(value, list) else list(range(parse_count(value)))
    if not seeds:
        raise UserError("no seed", fix="write a list such as [0, 1], or how many")
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"{seeds} repeats a seed or has one below 0", fix="write different seeds from 0 up")
    return seeds


_PROBES_SCHEMA = WithJsonSchema(
    {
        "anyOf": [
            {"type": "array", "items": {"anyOf": [{"type": "number"}, {"type": "string"}]}},
            {"type": "object", "required": ["count", "from", "to"]},
        ]
    }
)


class _SweepKeys(Section):
    """The search-space file."""

    name: str
    axis: str | None = Field(None, description=f"what the space measures, one of {', '.join(AXES)}; null: no one axis")
    metric: _MetricKeys
    method: Literal["optuna", "random", "grid"] = "optuna"
    parameters: dict[str, Annotated[_ParameterKeys, BeforeValidator(_mapping)]]
    budget: _BudgetKeys
    scheduler: _SchedulerKeys = _SchedulerKeys()
    scaling: _ScalingKeys = _ScalingKeys()
    data: _DataKeys
    storage: _StorageKeys = _StorageKeys()
    stage1: _Stage1Keys | None = None
    seeds: Annotated[list[int], BeforeValidator(_read_seeds), _SEEDS_SCHEMA] = Field(default=[0])
    probes: Annotated[list[int], BeforeValidator(read_probes), _PROBES_SCHEMA] = Field(default=[])


def resolve(path: str | Path, overrides: Sequence[str] = ()) -> SweepSpec:
    """Read a search space. `overrides` are `dotted.key=value` with the value in YAML. Raises UserError."""
    values = load_yaml(path)
    for override in overrides:
        _override(values, override)
    return from_dict(values, file=str(path))


def from_dict(values: Mapping[str, Any], *, file: str | None = None) -> SweepSpec:
    """A checked SweepSpec from the YAML form (also from `SweepSpec.as_dict`). Raises UserError naming `file`."""
    try:
        return _build(validate(_SweepKeys, values))
    except UserError as error:
        raise type(error)(error.what, file=file, key=error.key, fix=error.fix) from None


def check_name(name: str, key: str) -> None:
    """Raises UserError where a sweep or study of this name could not have its folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise UserError(f"{name!r} cannot name a folder", key=key, fix="use letters, digits, '.', '-' and '_'")


def json_schema() -> dict[str, Any]:
    """The JSON schema of the file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_SweepKeys.model_json_schema()}


def _build(keys: _SweepKeys) -> SweepSpec:
    check_name(keys.name, "name")
    raw = {name: parameter.model_dump(exclude_unset=True) for name, parameter in keys.parameters.items()}
    parameters = read_parameters(raw, finite=keys.method == "grid")
    spec = SweepSpec(
        name=keys.name,
        metric=_metric(keys.metric.name, keys.metric.goal, "metric.name"),
        other_metrics=_others(keys.metric),
        constraints=tuple(
            _constraint(text, f"metric.constraints.{place}") for place, text in enumerate(keys.metric.constraints)
        ),
        method=keys.method,
        parameters=parameters,
        budget=_budget(keys.budget),
        scheduler=_scheduler(keys.scheduler, len(keys.budget.ladder_flops)),
        tiers=tuple(
            tier
            for index, tier_keys in enumerate(keys.scaling.tiers)
            for tier in alternatives(tier_keys, f"scaling.tiers.{index}")
        ),
        slots=at_least(keys.scaling.slots, 1, "scaling.slots"),
        max_retries=at_least(keys.scaling.max_retries, 0, "scaling.max_retries"),
        shards=keys.data.shards,
        evaluation_queries=keys.data.evaluation_queries,
        seeds=tuple(keys.seeds),
        probes=tuple(sorted(set(keys.probes))),
        checkpoints_gib=keys.storage.checkpoints_gib,
        axis=keys.axis,
        stage1=None if keys.stage1 is None else Stage1(**keys.stage1.model_dump()),
    )
    if spec.evaluation_queries is not None:
        at_least(spec.evaluation_queries, 1, "data.evaluation_queries")
    if spec.checkpoints_gib is not None and spec.checkpoints_gib <= 0:
        raise UserError("must be above 0", key="storage.checkpoints_gib", fix="write GiB, or leave it out to keep all")
    if spec.scheduler.type in ("random", "grid") and spec.method != spec.scheduler.type:
        raise UserError(
            f"{spec.scheduler.type} trains points of {spec.method} proposals to the end",
            key="scheduler.type",
            fix=f"write method: {spec.scheduler.type}, or another type",
        )
    check_tiers(spec, keys.scaling.tiers)
    _check_probes(spec)
    _check_cap(spec)
    check_axis(spec)
    return spec


def _metric(name: str, goal: str | None, key: str) -> Metric:
    if name not in METRICS:
        raise UserError(f"unknown metric {name!r}", key=key, fix=did_you_mean(name, METRICS))
    only = "minimize" if name.endswith("nll") else "maximize"
    if goal not in (None, only):
        raise UserError(f"{name} is to be {only}d, not {goal}d", key="metric.goal", fix=f"write {only}")
    return Metric(name, only)


def _others(keys: _MetricKeys) -> tuple[Metric, ...]:
    names = [keys.name, *keys.others]
    for place, name in enumerate(keys.others):
        if name in names[: place + 1]:
            raise UserError(f"{name!r} is named twice", key=f"metric.others.{place}", fix="name every metric once")
    return tuple(_metric(name, None, f"metric.others.{place}") for place, name in enumerate(keys.others))


def _constraint(text: str, key: str) -> Constraint:
    parts = re.fullmatch(r"\s*(\S+?)\s*(>=|<=)\s*(\S+)\s*", text)
    if parts is None:
        raise UserError(f"{text!r} is no bound", key=key, fix="write e.g. coverage@10 >= 0.05")
    metric = _metric(parts[1], None, key)
    if parts[2] != (">=" if metric.goal == "maximize" else "<="):
        raise UserError(f"{metric.name} is to be {metric.goal}d", key=key, fix="turn the bound round")
    return Constraint(metric, parse_number(parts[3], key=key))


def _budget(keys: _BudgetKeys) -> Budget:
    ladder = keys.ladder_flops
    if not ladder:
        raise UserError("has no rungs", key="budget.ladder_flops", fix="list the C of at least one rung")
    if min(ladder) <= 0:
        raise UserError("a rung needs FLOPs", key="budget.ladder_flops", fix="write numbers above 0, such as 1e11")
    if any(above <= below for below, above in itertools.pairwise(ladder)):
        raise UserError("is not strictly increasing", key="budget.ladder_flops", fix="sort it and drop repetitions")
    if not 0 < keys.tolerance <= TOLERANCE:
        raise UserError(
            f"{keys.tolerance:g} is out of range",
            key="budget.tolerance",
            fix=f"must be above 0 and at most {TOLERANCE:g}",
        )
    bounds = keys.events_per_param
    if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1]:
        raise UserError(f"{bounds} is no range", key="budget.events_per_param", fix="write [smallest D/N, largest D/N]")
    if keys.max_epochs is not None and keys.max_epochs <= 0:
        raise UserError("must be above 0", key="budget.max_epochs", fix="write a number of epochs, or leave it out")
    return Budget(
        ladder_flops=tuple(ladder),
        total_flops=at_least(keys.total_flops, 1, "budget.total_flops"),
        max_trials=at_least(keys.max_trials, 1, "budget.max_trials"),
        tolerance=keys.tolerance,
        events_per_param=(bounds[0], bounds[1]),
        max_epochs=keys.max_epochs,
    )


def _scheduler(keys: _SchedulerKeys, num_rungs: int) -> Scheduler:
    if keys.eta <= 1:
        raise UserError(f"{keys.eta:g} promotes everything", key="scheduler.eta", fix="must be above 1")
    shares = keys.shares
    if shares is not None:
        if len(shares) != num_rungs:
            raise UserError(
                f"{len(shares)} shares for {num_rungs} rungs", key="scheduler.shares", fix="give one per rung"
            )
        if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise UserError("are not parts of one", key="scheduler.shares", fix="write shares above 0 that sum to 1")
    return Scheduler(keys.type, keys.eta, tuple(shares) if shares else None)


def _check_probes(spec: SweepSpec) -> None:
    if not spec.probes:
        return
    longest = (1 - spec.cooldown_fractions[0]) * spec.budget.ladder_flops[-1]
    if spec.probes[0] <= 0 or spec.probes[-1] > longest:
        raise UserError(
            "lie outside every trunk", key="probes", fix=f"write C above 0 and up to {format_flops(longest)}"
        )
    for parameter in spec.parameters:
        if parameter.name == "averaging" and False in parameter.values:
            raise UserError("probes need averaged weights", key="parameters.averaging", fix="write value: true")


def _check_cap(spec: SweepSpec) -> None:
    budget = spec.budget
    needed = spec.ascent_flops(spec.cooldown_fractions[1], len(budget.ladder_flops) - 1)
    if needed > budget.total_flops:
        raise UserError(
            f"{format_flops(budget.total_flops)} cannot pay for one trial up to the top rung ({format_flops(needed)})",
            key="budget.total_flops",
            fix=f"raise it to at least {format_flops(needed)}, or lower the ladder",
        )
    if budget.ladder_flops[0] < MIN_STEPS:
        raise UserError(
            f"a rung takes at least {MIN_STEPS} steps", key="budget.ladder_flops", fix="raise the first rung"
        )


def _override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"{override!r} is not KEY=VALUE", file="--set", fix="write e.g. budget.total_flops=1e12")
    value = parse_yaml(f"value: {text}", file=f"--set {override}")["value"]
    *parents, last = dotted.split(".")
    here: Any = values
    for part in parents:
        here = here[_index(here, part, dotted)] if isinstance(here, list) else here.setdefault(part, {})
        if not isinstance(here, (dict, list)):
            raise UserError("leads through a value", file="--set", key=dotted, fix=f"set {part!r} itself")
    here[_index(here, last, dotted) if isinstance(here, list) else last] = value


def _index(values: list[Any], part: str, dotted: str) -> int:
    if not part.isdigit() or int(part) >= len(values):
        raise UserError(
            f"{part!r} is no place in a list of {len(values)}", file="--set", key=dotted, fix="count from 0"
        )
    return int(part)
