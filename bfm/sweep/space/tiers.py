"""The tiers of a search space: how tasks are run, by the size of the model and the rung.

Enters: the items of `scaling.tiers`. Leaves: of each item its alternatives, one Tier per number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import PlainSerializer, PlainValidator, TypeAdapter, WithJsonSchema
from pydantic.dataclasses import dataclass

from bfm.errors import UserError
from bfm.files import canonical_json
from bfm.objective.methods import Method
from bfm.sweep.space.keys import SECTION, Count, Number, Positive, at_least
from bfm.yaml import validate


@dataclass(frozen=True, config=SECTION)
class Tier:
    """How a task is run; the last tier whose thresholds the task reaches applies."""

    from_rung_flops: Number = 0.0
    from_params: Number = 0.0
    engine: Literal["plain", "deepspeed"] = "plain"
    workers: Annotated[Count, at_least(1)] = 1
    """In the file also a list: as many of these as are free and pay."""
    zero_stage: Count = 0
    cpus: Positive = 1.0
    """Per worker."""
    gpus: Number = 0.0
    """Per worker; fractions share a GPU."""
    micro_groups: Annotated[Count, at_least(1)] = 1
    """At most so many groups go through the model at once, per worker."""
    softmax: Method = "auto"
    """How the loss is computed (bfm.objective.methods)."""
    memory_gib: Positive | None = None
    """Memory of one worker; configurations estimated above it are infeasible. None: not checked."""

    def __post_init__(self) -> None:
        if self.engine == "plain" and (self.workers > 1 or self.zero_stage > 0):
            raise UserError("the plain engine has one worker and no ZeRO", fix="write engine: deepspeed")
        if not 0 <= self.zero_stage <= 3:
            raise UserError(f"there is no ZeRO stage {self.zero_stage}", key="zero_stage", fix="write 0, 1, 2 or 3")
        if self.gpus < 0 or (self.gpus > 1 and self.gpus != int(self.gpus)):
            fix = "write 0, a fraction or a whole number"
            raise UserError(f"{self.gpus:g} GPUs cannot be given", key="gpus", fix=fix)
        if self.workers > 1 and 0 < self.gpus < 1:
            raise UserError(
                f"{self.workers} workers cannot share GPUs (NCCL takes one process on each)",
                key="gpus",
                fix="write a whole number of GPUs per worker, or workers: 1",
            )

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


_TIER: TypeAdapter[Tier] = TypeAdapter(Tier)


def tier_of_options(workers: int, zero_stage: int, gpus: float, micro_groups: int, softmax: str) -> Tier:
    """How `bfm train` runs one task. Raises UserError that names the option."""
    alone = workers == 1
    values: dict[str, Any] = {"engine": "plain" if alone else "deepspeed", "zero_stage": 0 if alone else zero_stage}
    values |= {"workers": workers, "gpus": gpus, "micro_groups": micro_groups, "softmax": softmax}
    try:
        return validate(Tier, values)
    except UserError as error:
        key = error.key and f"--{error.key.replace('_', '-')}"
        raise UserError(error.what, key=key, fix=error.fix) from None


def _read(value: Any) -> tuple[Tier, ...]:
    if isinstance(value, tuple):
        return value
    numbers = value.get("workers") if isinstance(value, Mapping) else None
    if not isinstance(numbers, list):
        return (_TIER.validate_python(value),)
    tiers = [_TIER.validate_python({**value, "workers": number}) for number in numbers]
    if not tiers or len({tier.workers for tier in tiers}) < len(tiers):
        fix = "write each number once, such as [1, 2, 4]"
        raise UserError(f"{numbers} is empty or repeats a number", key="workers", fix=fix)
    return tuple(sorted(tiers, key=lambda tier: tier.workers))


def _write(tiers: tuple[Tier, ...]) -> dict[str, Any]:
    workers = [tier.workers for tier in tiers]
    return {**asdict(tiers[0]), "workers": workers if len(workers) > 1 else workers[0]}


def _schema() -> dict[str, Any]:
    schema = _TIER.json_schema()
    number = schema["properties"]["workers"]
    schema["properties"]["workers"] = {**number, "anyOf": [*number["anyOf"], {"type": "array"}]}
    return schema


Alternatives = Annotated[tuple[Tier, ...], PlainValidator(_read), PlainSerializer(_write), WithJsonSchema(_schema())]
"""An item of `scaling.tiers`: tiers that differ in their workers alone, fewest first."""
