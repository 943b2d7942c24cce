"""The `parameters:` block: W&B-shaped mappings to checked axes of TrainConfig fields.

Every single value and both ends of every range must be ones that TrainConfig takes; combinations are judged later,
by the feasible set.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, PlainSerializer, TypeAdapter, WithJsonSchema
from pydantic.dataclasses import dataclass as section

from bfm.errors import UserError
from bfm.sweep.space.keys import SECTION
from bfm.sweep.space.words import CHOICES, KEYS
from bfm.training.config import TrainConfig, check_value
from bfm.training.words import SETTINGS
from bfm.units import parse_number
from bfm.yaml import did_you_mean, validate

_TYPES = typing.get_type_hints(TrainConfig)
NAMES = tuple(field.name for field in dataclasses.fields(TrainConfig))
RANGES = ("uniform", "log_uniform_values", "int_uniform", "q_uniform", "q_log_uniform_values")
Scalar = float | int | bool | str | None
ConfigKey = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
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
        first, last = _multiples(self.low, self.high, self.quantum)
        nearest = min(max(round(value / self.quantum), first), last) * self.quantum
        return int(nearest) if self.is_whole else min(max(nearest, self.low), self.high)

    def grid(self) -> tuple[Scalar, ...]:
        """All values in order; only where there are finitely many."""
        if self.values:
            return self.values
        quantum = self.quantum or 1.0
        first, last = _multiples(self.low, self.high, quantum)
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


@section(frozen=True, config=SECTION)
class _Keys:
    """One of value, values, or min and max."""

    value: Any = None
    values: list[Any] | None = None
    min: Any = None
    max: Any = None
    q: Any = None
    distribution: Literal["constant", "categorical", *RANGES] | None = None  # type: ignore[valid-type]


def config_key(config: Mapping[str, Any]) -> ConfigKey:
    """What equal configurations have in common, in whatever order their keys stand."""
    return tuple(sorted(config.items()))


def check_finite(parameters: tuple[Parameter, ...]) -> None:
    """Raises UserError for a range without a grid."""
    for parameter in parameters:
        if parameter.distribution in ("uniform", "log_uniform_values"):
            raise UserError(
                "a grid needs finitely many values", key=f"parameters.{parameter.name}", fix="write values, or q"
            )


def read_parameters(raw: Any) -> tuple[Parameter, ...]:
    """Axes by name, in alphabetical order (so that nothing depends on the order in the file).

    Raises UserError with keys `NAME...`.
    """
    if isinstance(raw, tuple):
        return raw
    if not isinstance(raw, Mapping):
        raise UserError("is no mapping", fix="write NAME: {value: ...} for each of them")
    for name in raw:
        if name not in NAMES:
            raise UserError("unknown parameter", key=str(name), fix=did_you_mean(str(name), NAMES, SETTINGS))
        if not isinstance(raw[name], Mapping):
            raise UserError(f"{raw[name]!r} is not a mapping", key=name, fix=f"write {{value: {raw[name]}}}")
    if "params" not in raw:
        raise UserError("is missing", key="params", fix="give the model sizes to search")
    return tuple(_read(name, raw[name]) for name in sorted(raw))


def _read(name: str, raw: Mapping[str, Any]) -> Parameter:
    try:
        validate(_Keys, raw, words={**KEYS, **CHOICES})
    except UserError as error:
        raise UserError(error.what, key=f"{name}.{error.key}", fix=error.fix) from None
    kinds = [kind for kind in ("value", "values") if kind in raw] + (["min/max"] if {"min", "max"} & set(raw) else [])
    if len(kinds) != 1:
        what = f"has {' and '.join(kinds)}" if kinds else "has no value"
        raise UserError(what, key=name, fix="give one of value, values, or min and max")
    made = _range(name, raw) if kinds == ["min/max"] else _listed(name, raw, kinds)
    if name == "learning_rate" and made.is_free and made.ends[0] == 0.0:
        fix = "write value: 0 for the rule at every trial's own (N, B), or rates above 0"
        raise UserError("0 stands for the rule in (N, B), which is no rate to search among others", key=name, fix=fix)
    return made


def _listed(name: str, raw: Mapping[str, Any], kinds: list[str]) -> Parameter:
    expected = "constant" if kinds == ["value"] else "categorical"
    if raw.get("distribution", expected) != expected:
        raise UserError(
            f"{kinds[0]} does not go with {raw['distribution']}", key=f"{name}.distribution", fix=f"write {expected}"
        )
    if "q" in raw:
        raise UserError("rounds ranges only", key=f"{name}.q", fix="leave it out")
    if kinds == ["value"]:
        return Parameter(name, "constant", (check_value(name, raw["value"], f"{name}.value"),))
    values = tuple(
        check_value(name, value, f"{name}.values.{index}") for index, value in enumerate(raw["values"] or ())
    )
    if not values:
        raise UserError("is empty", key=f"{name}.values", fix="list at least one value")
    if len({(type(value), value) for value in values}) < len(values):
        raise UserError("repeats a value", key=f"{name}.values", fix="list every value once")
    return Parameter(name, "categorical" if len(values) > 1 else "constant", values)


def _range(name: str, raw: Mapping[str, Any]) -> Parameter:
    for end in ("min", "max"):
        if end not in raw:
            raise UserError("is missing", key=f"{name}.{end}", fix="a range needs min and max")
    if _TYPES[name] is bool:
        raise UserError("is true or false", key=name, fix="write values: [false, true]")
    low, high = (check_value(name, raw[end], f"{name}.{end}") for end in ("min", "max"))
    if low is None or high is None:
        raise UserError("a range has no null end", key=name, fix="write numbers")
    low_number, high_number = float(low), float(high)
    if low_number > high_number:
        raise UserError(f"min {low_number:g} is above max {high_number:g}", key=name, fix="swap them")
    is_count = _TYPES[name] in (int, int | None)
    distribution = raw.get("distribution") or ("int_uniform" if is_count else "uniform")
    if distribution not in RANGES:
        raise UserError(
            f"min/max do not go with {distribution}", key=f"{name}.distribution", fix=f"one of {', '.join(RANGES)}"
        )
    if "log" in distribution and low_number <= 0:
        raise UserError(f"the logarithm of {low_number:g}", key=f"{name}.min", fix="a log range begins above 0")
    quantum = _quantum(name, distribution, raw)
    first, last = _multiples(low_number, high_number, quantum or 1.0)
    if quantum is not None and first > last:
        raise UserError(
            f"no multiple of {quantum:g} lies in the range", key=f"{name}.q", fix="lower q or widen the range"
        )
    if distribution == "int_uniform" and (low_number != int(low_number) or high_number != int(high_number)):
        raise UserError("int_uniform has whole ends", key=name, fix="write whole numbers")
    if is_count and distribution != "int_uniform" and (quantum is None or quantum != int(quantum)):
        fix = "write int_uniform, or q_log_uniform_values with q: 1"
        raise UserError(f"{name} is a whole number", key=f"{name}.distribution", fix=fix)
    if low_number == high_number:
        return Parameter(name, "constant", (low,))
    return Parameter(name, distribution, (), low_number, high_number, quantum)


def _multiples(low: float, high: float, quantum: float) -> tuple[int, int]:
    """The first and the last multiple in a range: 0.3 is three times 0.1, whatever floats say."""
    return math.ceil(low / quantum - 1e-9), math.floor(high / quantum + 1e-9)


def _quantum(name: str, distribution: str, raw: Mapping[str, Any]) -> float | None:
    if not distribution.startswith("q_"):
        if "q" in raw:
            raise UserError(f"does not go with {distribution}", key=f"{name}.q", fix=f"write q_{distribution}")
        return None
    quantum = parse_number(raw.get("q", 1), key=f"{name}.q")
    if quantum <= 0:
        raise UserError(f"{quantum:g} is no step", key=f"{name}.q", fix="must be above 0")
    return quantum


_SCHEMA = {"type": "object", "additionalProperties": TypeAdapter(_Keys).json_schema()}
Parameters = Annotated[
    tuple[Parameter, ...],
    BeforeValidator(read_parameters),
    PlainSerializer(lambda parameters: {parameter.name: parameter.as_dict() for parameter in parameters}),
    WithJsonSchema(_SCHEMA),
]
"""The block, as a tuple by name."""
