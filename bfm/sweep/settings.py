"""What a sweep is told to do, as frozen values; `bfm.sweep.spec` reads them from YAML.

`SweepSpec.as_dict` is the resolved sweep.yaml: every default written out, readable again, hashed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bfm.files import canonical_json, sha256_bytes
from bfm.training.config import TrainConfig
from bfm.training.schedule import trunk_flops

RANGES = ("uniform", "log_uniform_values", "int_uniform", "q_uniform", "q_log_uniform_values")
POLICIES = ("frontier", "asha-promote", "asha-stop", "isoflop-window", "random", "grid")
DISTRIBUTIONS = ("constant", "categorical", *RANGES)
_LOGIT_EDGE = 1e-5
Scalar = float | int | bool | str | None


@dataclass(frozen=True)
class Metric:
    """What the sweep selects by, at equal C."""

    name: str
    goal: str
    """minimize or maximize."""

    def loss(self, value: float) -> float:
        """The value, signed so that smaller is better; of a loss, the value again."""
        return value if self.goal == "minimize" else -value

    @property
    def is_bounded(self) -> bool:
        """Whether values lie in [0, 1]: all but losses."""
        return not self.name.rsplit(".", 1)[-1].startswith(("nll", "loss"))

    def to_model(self, loss: float) -> float:
        """A loss as surrogates see it: of bounded metrics minus the logit of the value (kept off 0 and 1)."""
        if not self.is_bounded:
            return loss
        value = min(max(loss if self.goal == "minimize" else -loss, _LOGIT_EDGE), 1 - _LOGIT_EDGE)
        logit = math.log(value / (1 - value))
        return logit if self.goal == "minimize" else -logit

    def from_model(self, modelled: float) -> float:
        """The metric's own value of what a surrogate sees."""
        if not self.is_bounded:
            return modelled
        return 1 / (1 + math.exp(-modelled if self.goal == "minimize" else modelled))


@dataclass(frozen=True)
class Constraint:
    """A bound that a useful model keeps."""

    metric: Metric
    bound: float
    """Smallest value of a maximised metric, largest of a minimised one."""

    def holds(self, value: float) -> bool:
        """Whether a row's value keeps it."""
        return value >= self.bound if self.metric.goal == "maximize" else value <= self.bound

    @property
    def loss_bound(self) -> float:
        """As surrogates see it."""
        return self.metric.to_model(self.metric.loss(self.bound))

    @property
    def text(self) -> str:
        """As YAML has it: coverage@10 >= 0.05."""
        return f"{self.metric.name} {'>=' if self.metric.goal == 'maximize' else '<='} {self.bound:g}"


@dataclass(frozen=True)
class Parameter:
    """One axis: the values of a TrainConfig field that may be proposed."""

    name: str
    distribution: str
    values: tuple[Scalar, ...] = ()
    """Of constant and categorical."""
    low: float = 0.0
    high: float = 0.0
    quantum: float | None = None
    """Of the q_ distributions: proposals are multiples of it."""

    @property
    def is_free(self) -> bool:
        """Whether there is anything to choose."""
        return self.distribution != "constant"

    @property
    def is_log(self) -> bool:
        """Whether the range is drawn on a log scale."""
        return "log" in self.distribution

    @property
    def is_whole(self) -> bool:
        """Whether proposals are whole numbers."""
        return self.distribution == "int_uniform" or (self.quantum is not None and self.quantum == int(self.quantum))

    def draw(self, rng: np.random.Generator) -> Scalar:
        """One value from the distribution."""
        if self.values:
            return self.values[int(rng.integers(len(self.values)))]
        if self.distribution == "int_uniform":
            return int(rng.integers(int(self.low), int(self.high) + 1))
        if self.is_log:
            return self.quantise(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return self.quantise(rng.uniform(self.low, self.high))

    def quantise(self, value: float) -> Scalar:
        """The nearest multiple of the quantum inside the range; the value itself where there is none."""
        if self.quantum is None:
            return min(max(float(value), self.low), self.high)
        first, last = math.ceil(self.low / self.quantum), math.floor(self.high / self.quantum)
        nearest = min(max(round(value / self.quantum), first), last) * self.quantum
        return int(nearest) if self.is_whole else nearest

    def grid(self) -> tuple[Scalar, ...]:
        """All values in order; only where there are finitely many."""
        if self.values:
            return self.values
        quantum = self.quantum or 1.0
        first, last = math.ceil(self.low / quantum), math.floor(self.high / quantum)
        return tuple(self.quantise(k * quantum) if self.quantum else k for k in range(first, last + 1))

    def contains(self, value: Any) -> bool:
        """Whether a value could be proposed (multiples of a quantum are not asked for)."""
        if self.values:
            return value in self.values
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and self.low <= value <= self.high

    @property
    def ends(self) -> tuple[float, float]:
        """Smallest and largest number that can be proposed; null apart."""
        numbers = [float(value) for value in self.values if value is not None]
        return (min(numbers), max(numbers)) if numbers else (self.low, self.high)

    def as_dict(self) -> dict[str, Any]:
        """The W&B-shaped YAML form."""
        if self.distribution == "constant":
            return {"value": self.values[0]}
        if self.distribution == "categorical":
            return {"values": list(self.values)}
        shape = {"distribution": self.distribution, "min": self.low, "max": self.high}
        return shape if self.quantum is None else {**shape, "q": self.quantum}


@dataclass(frozen=True)
class Budget:
    """What may be spent, and on which ladder."""

    ladder_flops: tuple[int, ...]
    """C of the rungs, strictly increasing."""
    total_flops: int
    """Cap on everything that is trained, lost and redone work included."""
    max_trials: int
    tolerance: float = 0.01
    """A row has spent its C within this share."""
    events_per_param: tuple[float, float] = (2.0, 10_000.0)
    """Smallest and largest D/N of a row; a configuration has no row at rungs outside."""
    max_epochs: float | None = None
    """Largest D/unique of a row; None: no bound."""


@dataclass(frozen=True)
class Scheduler:
    """The rule for promotions."""

    type: str = "frontier"
    """One of POLICIES."""
    eta: float = 3.0
    """ASHA: one of eta trials of a rung goes on to the next."""
    shares: tuple[float, ...] | None = None
    """Share of the spend per rung, summing to 1; None: the policy's own."""


@dataclass(frozen=True)
class Tier:
    """How a task is run; the last thresholds that the task reaches apply. Tiers that have the same ones, with different
    workers, are alternatives."""

    from_rung_flops: float = 0.0
    from_params: float = 0.0
    engine: str = "plain"
    workers: int = 1
    zero_stage: int = 0
    cpus: float = 1.0
    """Per worker."""
    gpus: float = 0.0
    """Per worker; fractions share a GPU."""
    micro_groups: int = 1
    """At most so many groups go through the model at once, per worker."""
    softmax: str = "auto"
    """How the loss is computed (bfm.objective.methods)."""
    memory_gib: float | None = None
    """Memory of one worker; configurations estimated above it are infeasible. None: not checked."""

    @property
    def thresholds(self) -> tuple[float, float]:
        """What a task must reach."""
        return self.from_rung_flops, self.from_params

    @property
    def kind(self) -> str:
        """Equal where tasks run alike, whatever thresholds led there."""
        settings = {name: value for name, value in asdict(self).items() if not name.startswith("from_")}
        return canonical_json(settings).decode()

    def scaling(self, groups_per_step: int) -> dict[str, Any]:
        """The scaling of a task: micro_groups is the largest allowed divisor of a worker's groups."""
        groups = groups_per_step // self.workers
        micro_groups = max(size for size in range(1, min(self.micro_groups, groups) + 1) if groups % size == 0)
        return {
            "engine": self.engine,
            "workers": self.workers,
            "zero_stage": self.zero_stage,
            "cpus": self.cpus,
            "gpus": self.gpus,
            "micro_groups": micro_groups,
            "softmax": self.softmax,
        }


@dataclass(frozen=True)
class Stage1:
    """The one trunk that every trial goes on from; whoever trained it has paid for it."""

    checkpoint: str
    """Its folder or URI."""
    sha256: str | None = None
    """Of its state; None: not looked at yet (bfm.sweep.stage1)."""


@dataclass(frozen=True)
class SweepSpec:
    """A whole sweep."""

    name: str
    metric: Metric
    method: str
    """optuna, random or grid."""
    parameters: tuple[Parameter, ...]
    budget: Budget
    scheduler: Scheduler
    tiers: tuple[Tier, ...]
    slots: int
    """Tasks that run at the same time, at most: live resources decide how many do."""
    max_retries: int
    """How often a task whose worker died is started again."""
    shards: str
    evaluation_queries: int | None
    """The first so many queries of the validation part; None: all."""
    seeds: tuple[int, ...]
    """The first one seeds the proposals and explores; the others are of near-ties at the top (frontier policy)."""
    probes: tuple[int, ...]
    """C at which the trunk is evaluated on its way."""
    other_metrics: tuple[Metric, ...] = ()
    """Further metrics with a frontier of their own; the spend is shared."""
    constraints: tuple[Constraint, ...] = ()
    """What a useful model keeps to."""
    checkpoints_gib: float | None = None
    """Room for the trunks that promotions go on from; None: all are kept."""
    axis: str | None = None
    """What the space measures, for fits and reports (bfm.sweep.measured); None: no single axis."""
    stage1: Stage1 | None = None
    """Where every trial begins; None: at initial weights."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """All that have a frontier, the one that selects first."""
        return self.metric, *self.other_metrics

    @property
    def free_parameters(self) -> tuple[Parameter, ...]:
        """The axes with a choice."""
        return tuple(parameter for parameter in self.parameters if parameter.is_free)

    @property
    def cooldown_fractions(self) -> tuple[float, float]:
        """Smallest and largest cooldown_fraction that a proposal can have."""
        for parameter in self.parameters:
            if parameter.name == "cooldown_fraction":
                return parameter.ends
        return TrainConfig.cooldown_fraction, TrainConfig.cooldown_fraction

    def config(self, values: Mapping[str, Any]) -> TrainConfig:
        """The configuration of a point of the space; raises UserError where TrainConfig refuses it."""
        constants = {parameter.name: parameter.values[0] for parameter in self.parameters if not parameter.is_free}
        averaging = {"averaging": True} if self.probes else {}
        return TrainConfig.from_dict({**averaging, **constants, **values})

    def tiers_at(self, rung_flops: float, params: float) -> tuple[Tier, ...]:
        """The alternatives of the last thresholds that are reached, fewest workers first."""
        reached = [tier for tier in self.tiers if rung_flops >= tier.from_rung_flops and params >= tier.from_params]
        alike = [tier for tier in reached if tier.thresholds == reached[-1].thresholds]
        return tuple(sorted(alike, key=lambda tier: tier.workers))

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

    def ascent_flops(self, cooldown_fraction: float, rung: int, from_rung: int | None = None) -> int:
        """Cost of climbing rung by rung to `rung`, every rung's row included."""
        first = 0 if from_rung is None else from_rung + 1
        return sum(
            self.task_flops(cooldown_fraction, step, step - 1 if step else None) for step in range(first, rung + 1)
        )

    def probes_between(self, cooldown_fraction: float, rung: int, from_rung: int | None) -> tuple[int, ...]:
        """The probes that lie on the part of the trunk which a task trains."""
        ladder = self.budget.ladder_flops
        above = self.stage1_flops if from_rung is None else trunk_flops(ladder[from_rung], cooldown_fraction)
        return tuple(c for c in self.probes if above < c <= trunk_flops(ladder[rung], cooldown_fraction))

    def as_dict(self) -> dict[str, Any]:
        """The resolved YAML form; `bfm.sweep.spec.from_dict` inverts it."""
        budget = asdict(self.budget)
        budget["ladder_flops"] = list(self.budget.ladder_flops)
        budget["events_per_param"] = list(self.budget.events_per_param)
        scheduler = asdict(self.scheduler)
        if self.scheduler.shares is not None:
            scheduler["shares"] = list(self.scheduler.shares)
        return {
            "name": self.name,
            "axis": self.axis,
            "metric": {
                **asdict(self.metric),
                "others": [metric.name for metric in self.other_metrics],
                "constraints": [constraint.text for constraint in self.constraints],
            },
            "method": self.method,
            "parameters": {parameter.name: parameter.as_dict() for parameter in self.parameters},
            "budget": budget,
            "scheduler": scheduler,
            "scaling": {
                "slots": self.slots,
                "max_retries": self.max_retries,
                "tiers": [asdict(tier) for tier in self.tiers],
            },
            "data": {"shards": self.shards, "evaluation_queries": self.evaluation_queries},
            "storage": {"checkpoints_gib": self.checkpoints_gib},
            "stage1": None if self.stage1 is None else asdict(self.stage1),
            "seeds": list(self.seeds),
            "probes": list(self.probes),
        }

    @property
    def hash(self) -> str:
        """sha256 of the resolved form."""
        return sha256_bytes(canonical_json(self.as_dict()))
