"""What a sweep is told to do: the sections of a search-space file, each described once.

The classes are both what YAML is checked against and the frozen values that everybody uses. `SweepSpec.as_dict` is the
resolved sweep.yaml: every default written out, readable again, hashed. What ties sections to each other is checked
where a file is read (`bfm.sweep.space.spec`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, TypeAdapter, WithJsonSchema
from pydantic.dataclasses import dataclass

from bfm.errors import UserError
from bfm.files import canonical_json, sha256_bytes
from bfm.sweep.space.keys import SECTION, Count, Number, Positive, at_least
from bfm.sweep.space.measured import Probes
from bfm.sweep.space.metric import Metric, Selection
from bfm.sweep.space.parameters import Parameter, Parameters
from bfm.sweep.space.tiers import Alternatives, Tier
from bfm.training.config import TrainConfig
from bfm.training.schedule import TOLERANCE, trunk_flops
from bfm.units import parse_count

TENSORBOARD = "tensorboard"
LOGGERS = (TENSORBOARD, "mlflow", "wandb")
POLICIES = ("frontier", "asha-promote", "asha-stop", "isoflop-window", "random", "grid")


@dataclass(frozen=True, config=SECTION)
class Budget:
    """What may be spent, and on which ladder."""

    ladder_flops: tuple[Count, ...]
    """C of the rungs, strictly increasing."""
    total_flops: Annotated[Count, at_least(1)]
    """Hard cap on everything that is trained, lost and redone work included."""
    max_trials: Annotated[Count, at_least(1)] = 1_000_000
    tolerance: Number = 0.01
    """A row has spent its C within this share."""
    events_per_param: tuple[Number, ...] = (2.0, 10_000.0)
    """Smallest and largest D/N of a row; a configuration has no row at rungs outside."""
    max_epochs: Positive | None = None
    """Largest D/unique of a row; None: no bound."""

    def __post_init__(self) -> None:
        ladder, bounds = self.ladder_flops, self.events_per_param
        if not ladder:
            raise UserError("has no rungs", key="ladder_flops", fix="list the C of at least one rung")
        if min(ladder) <= 0:
            raise UserError("a rung needs FLOPs", key="ladder_flops", fix="write numbers above 0, such as 1e11")
        if any(above <= below for below, above in itertools.pairwise(ladder)):
            raise UserError("is not strictly increasing", key="ladder_flops", fix="sort it and drop repetitions")
        if not 0 < self.tolerance <= TOLERANCE:
            fix = f"must be above 0 and at most {TOLERANCE:g}"
            raise UserError(f"{self.tolerance:g} is out of range", key="tolerance", fix=fix)
        if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1]:
            fix = "write [smallest D/N, largest D/N]"
            raise UserError(f"{list(bounds)} is no range", key="events_per_param", fix=fix)


@dataclass(frozen=True, config=SECTION)
class Scheduler:
    """The rule for promotions."""

    type: Literal[*POLICIES] = "frontier"  # type: ignore[valid-type]
    eta: Number = 3.0
    """ASHA: one of eta trials of a rung goes on to the next."""
    shares: tuple[Number, ...] | None = None
    """Share of the spend per rung, summing to 1; None: the policy's own."""

    def __post_init__(self) -> None:
        if self.eta <= 1:
            raise UserError(f"{self.eta:g} promotes everything", key="eta", fix="must be above 1")
        if self.shares is not None and (min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6):
            raise UserError("are not parts of one", key="shares", fix="write shares above 0 that sum to 1")


@dataclass(frozen=True, config=SECTION)
class Scaling:
    """How much runs at once, and how."""

    slots: Annotated[Count, at_least(1)] = 1
    """Tasks that run at the same time, at most: live resources decide how many do."""
    max_retries: Annotated[Count, at_least(0)] = 2
    """How often a task whose worker died is started again."""
    tiers: tuple[Alternatives, ...] = ((Tier(),),)


@dataclass(frozen=True, config=SECTION)
class Data:
    """What is trained and scored on."""

    shards: str
    """Folder or URI written by `bfm data prepare`."""
    evaluation_queries: Annotated[Count, at_least(1)] | None = None
    """The first so many queries of the validation part; None: all."""


@dataclass(frozen=True, config=SECTION)
class Storage:
    """Room for what a sweep keeps."""

    checkpoints_gib: Positive | None = None
    """Of the trunks that promotions go on from; None: all are kept."""


@dataclass(frozen=True, config=SECTION)
class Stage1:
    """The one trunk that every trial goes on from; whoever trained it has paid for it."""

    checkpoint: str
    """Its folder or URI, as `bfm train` left it."""
    sha256: str | None = None
    """Of its state, filled in when the sweep begins; None: not looked at yet (bfm.sweep.space.stage1)."""


def _read_seeds(value: Any) -> tuple[int, ...]:
    """Seeds, or how many."""
    seeds = [parse_count(seed) for seed in value] if isinstance(value, (list, tuple)) else range(parse_count(value))
    if not seeds:
        raise UserError("no seed", fix="write a list such as [0, 1], or how many")
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"{list(seeds)} repeats a seed or has one below 0", fix="write different seeds from 0 up")
    return tuple(seeds)


_SEEDS_SCHEMA = {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]}
Seeds = Annotated[tuple[int, ...], BeforeValidator(_read_seeds), WithJsonSchema(_SEEDS_SCHEMA)]


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise UserError(f"{list(names)} repeats one", fix="name every logger once")
    return names


Loggers = Annotated[tuple[Literal[*LOGGERS], ...], AfterValidator(_distinct)]  # type: ignore[valid-type]


@dataclass(frozen=True, config=SECTION, kw_only=True)
class SweepSpec:
    """A whole sweep: the search-space file."""

    name: str
    axis: str | None = None
    """What the space measures, for fits and reports (bfm.sweep.space.measured); None: no single axis."""
    metric: Selection
    method: Literal["optuna", "random", "grid"] = "optuna"
    parameters: Parameters
    budget: Budget
    scheduler: Scheduler = Scheduler()
    scaling: Scaling = Scaling()
    data: Data
    storage: Storage = Storage()
    stage1: Stage1 | None = None
    """Where every trial begins; None: at initial weights."""
    seeds: Seeds = (0,)
    """The first one seeds the proposals and explores; the others are of near-ties at the top (frontier policy)."""
    probes: Probes = ()
    """C at which the trunk is evaluated on its way."""
    loggers: Loggers | None = None
    """Who is told of rows, beside the ledger and the report: tensorboard, mlflow, wandb (where their packages are
    installed); None: TensorBoard."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """All that have a frontier, the one that selects first."""
        return self.metric, *self.metric.others

    @property
    def listeners(self) -> tuple[str, ...]:
        """The loggers by name."""
        return (TENSORBOARD,) if self.loggers is None else self.loggers

    @property
    def free_parameters(self) -> tuple[Parameter, ...]:
        """The axes with a choice."""
        return tuple(parameter for parameter in self.parameters if parameter.is_free)

    @property
    def swept(self) -> tuple[str, ...]:
        """The settings in which its trials differ."""
        return tuple(parameter.name for parameter in self.free_parameters)

    @property
    def cooldown_fractions(self) -> tuple[float, float]:
        """Smallest and largest cooldown_fraction that a proposal can have."""
        for parameter in self.parameters:
            if parameter.name == "cooldown_fraction":
                return parameter.ends
        return TrainConfig.cooldown_fraction, TrainConfig.cooldown_fraction

    def with_constants(self, values: Mapping[str, Any]) -> SweepSpec:
        """The space with these values in place of what it says of their settings."""
        others = (parameter for parameter in self.parameters if parameter.name not in values)
        constants = (Parameter(name, "constant", (value,)) for name, value in values.items())
        return replace(self, parameters=tuple(sorted((*others, *constants), key=lambda parameter: parameter.name)))

    def config(self, values: Mapping[str, Any]) -> TrainConfig:
        """The configuration of a point of the space; raises UserError where TrainConfig refuses it."""
        constants = {parameter.name: parameter.values[0] for parameter in self.parameters if not parameter.is_free}
        averaging = {"averaging": True} if self.probes else {}
        return TrainConfig.from_dict({**averaging, **constants, **values})

    def tiers_at(self, rung_flops: float, params: float) -> tuple[Tier, ...]:
        """The alternatives of the last thresholds that are reached, fewest workers first."""
        return next(
            tiers
            for tiers in reversed(self.scaling.tiers)
            if rung_flops >= tiers[0].from_rung_flops and params >= tiers[0].from_params
        )

    @property
    def stage1_flops(self) -> int:
        """C that every trial begins with and that this sweep does not pay."""
        if self.stage1 is None:
            return 0
        frozen = next((axis for axis in self.parameters if axis.name == "freeze_at_flops"), None)
        return 0 if frozen is None else math.floor(frozen.ends[0])

    def task_flops(self, cooldown_fraction: float, rung: int, from_rung: int | None) -> int:
        """Upper bound of what a task trains: from the trunk of `from_rung` (None: from the start) to the row of `rung`.

        A trunk ends at most one step before (1 - f) C of its rung. The mean step is within the tolerance of C; twice
        that is allowed for, because groups differ.
        """
        ladder = self.budget.ladder_flops
        if from_rung is None:
            return ladder[rung] - self.stage1_flops
        start = trunk_flops(ladder[from_rung], cooldown_fraction) - 2 * self.budget.tolerance * ladder[from_rung]
        return ladder[rung] - max(0, math.floor(start))

    def ascent_flops(self, cooldown_fraction: float, rung: int) -> int:
        """Cost of climbing rung by rung to `rung`, every rung's row included."""
        return sum(self.task_flops(cooldown_fraction, step, step - 1 if step else None) for step in range(rung + 1))

    def probes_between(self, cooldown_fraction: float, rung: int, from_rung: int | None) -> tuple[int, ...]:
        """The probes that lie on the part of the trunk which a task trains."""
        ladder = self.budget.ladder_flops
        above = self.stage1_flops if from_rung is None else trunk_flops(ladder[from_rung], cooldown_fraction)
        return tuple(c for c in self.probes if above < c <= trunk_flops(ladder[rung], cooldown_fraction))

    def as_dict(self) -> dict[str, Any]:
        """The resolved YAML form; `bfm.sweep.space.spec.from_dict` inverts it."""
        return dict(_SPEC.dump_python(self, mode="json"))

    @property
    def hash(self) -> str:
        """sha256 of the resolved form."""
        return sha256_bytes(canonical_json(self.as_dict()))


_SPEC: TypeAdapter[SweepSpec] = TypeAdapter(SweepSpec)
