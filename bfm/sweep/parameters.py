"""The `parameters:` block: W&B-shaped mappings to checked axes of TrainConfig fields.

Every single value and both ends of every range must be ones that TrainConfig takes; combinations are judged later,
by the feasible set.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from bfm.errors import UserError
from bfm.sweep.settings import RANGES, Parameter
from bfm.training.config import TrainConfig, check_value
from bfm.units import parse_number
from bfm.yaml import did_you_mean

_TYPES = typing.get_type_hints(TrainConfig)
NAMES = tuple(field.name for field in dataclasses.fields(TrainConfig))


def read_parameters(raw: Mapping[str, Mapping[str, Any]], *, finite: bool) -> tuple[Parameter, ...]:
    """Axes by name, in alphabetical order (so that nothing depends on the order in the file).

    `finite`: refuse ranges without a grid. Raises UserError with keys `parameters.NAME...`.
    """
    for name in raw:
        if name not in NAMES:
            raise UserError("unknown parameter", key=f"parameters.{name}", fix=did_you_mean(name, NAMES))
    if "params" not in raw:
        raise UserError("is missing", key="parameters.params", fix="give the model sizes to search")
    parameters = tuple(_read(name, raw[name]) for name in sorted(raw))
    for parameter in parameters:
        if finite and parameter.distribution in ("uniform", "log_uniform_values"):
            raise UserError(
                "a grid needs finitely many values", key=f"parameters.{parameter.name}", fix="write values, or q"
            )
    return parameters


def _read(name: str, raw: Mapping[str, Any]) -> Parameter:
    key = f"parameters.{name}"
    kinds = [kind for kind in ("value", "values") if kind in raw] + (["min/max"] if {"min", "max"} & set(raw) else [])
    if len(kinds) != 1:
        what = f"has {' and '.join(kinds)}" if kinds else "has no value"
        raise UserError(what, key=key, fix="give one of value, values, or min and max")
    if kinds == ["min/max"]:
        return _range(name, key, raw)
    expected = "constant" if kinds == ["value"] else "categorical"
    if raw.get("distribution", expected) != expected:
        raise UserError(
            f"{kinds[0]} does not go with {raw['distribution']}", key=f"{key}.distribution", fix=f"write {expected}"
        )
    if "q" in raw:
        raise UserError("rounds ranges only", key=f"{key}.q", fix="leave it out")
    if kinds == ["value"]:
        return Parameter(name, "constant", (check_value(name, raw["value"], f"{key}.value"),))
    values = tuple(check_value(name, value, f"{key}.values.{index}") for index, value in enumerate(raw["values"] or ()))
    if not values:
        raise UserError("is empty", key=f"{key}.values", fix="list at least one value")
    if len({(type(value), value) for value in values}) < len(values):
        raise UserError("repeats a value", key=f"{key}.values", fix="list every value once")
    return Parameter(name, "categorical" if len(values) > 1 else "constant", values)


def _range(name: str, key: str, raw: Mapping[str, Any]) -> Parameter:
    for end in ("min", "max"):
        if end not in raw:
            raise UserError("is missing", key=f"{key}.{end}", fix="a range needs min and max")
    if _TYPES[name] is bool:
        raise UserError("is true or false", key=key, fix="write values: [false, true]")
    low, high = (check_value(name, raw[end], f"{key}.{end}") for end in ("min", "max"))
    if low is None or high is None:
        raise UserError("a range has no null end", key=key, fix="write numbers")
    low_number, high_number = float(low), float(high)
    if low_number > high_number:
        raise UserError(f"min {low_number:g} is above max {high_number:g}", key=key, fix="swap them")
    is_count = _TYPES[name] in (int, int | None)
    distribution = raw.get("distribution") or ("int_uniform" if is_count else "uniform")
    if distribution not in RANGES:
        raise UserError(
            f"min/max do not go with {distribution}", key=f"{key}.distribution", fix=f"one of {', '.join(RANGES)}"
        )
    if "log" in distribution and low_number <= 0:
        raise UserError(f"the logarithm of {low_number:g}", key=f"{key}.min", fix="a log range begins above 0")
    quantum = _quantum(distribution, raw, key)
    if quantum is not None and low_number > high_number // quantum * quantum:
        raise UserError(
            f"no multiple of {quantum:g} lies in the range", key=f"{key}.q", fix="lower q or widen the range"
        )
    if distribution == "int_uniform" and (low_number != int(low_number) or high_number != int(high_number)):
        raise UserError("int_uniform has whole ends", key=key, fix="write whole numbers")
    if is_count and distribution != "int_uniform" and (quantum is None or quantum != int(quantum)):
        fix = "write int_uniform, or q_log_uniform_values with q: 1"
        raise UserError(f"{name} is a whole number", key=f"{key}.distribution", fix=fix)
    if low_number == high_number:
        return Parameter(name, "constant", (low,))
    return Parameter(name, distribution, (), low_number, high_number, quantum)


def _quantum(distribution: str, raw: Mapping[str, Any], key: str) -> float | None:
    if not distribution.startswith("q_"):
        if "q" in raw:
            raise UserError(f"does not go with {distribution}", key=f"{key}.q", fix=f"write q_{distribution}")
        return None
    quantum = parse_number(raw.get("q", 1), key=f"{key}.q")
    if quantum <= 0:
        raise UserError(f"{quantum:g} is no step", key=f"{key}.q", fix="must be above 0")
    return quantum
