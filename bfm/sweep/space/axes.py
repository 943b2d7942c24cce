"""Configurations as coordinates: log N first, then the other axes of a space, numbers standardised, choices coded.

Enters: what is known of each axis (a parameter of the space, or a column of a table). Leaves: arrays that a surrogate
measures distances in. Numbers that are positive and span more than a factor of three are taken on a log scale; values
that are not all numbers are choices without order. A constant axis has no coordinate.

Shape legend: M configurations, X numeric axes (log N is the first), G axes of choices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bfm.sweep.space.parameters import Parameter

_LOG_SPAN = 3.0
_DRAWS = 256
_SEED = 20_261_122
_FAR = 4.0
"""Spreads from the middle at which zero stands on a log axis."""


@dataclass(frozen=True)
class NumberAxis:
    """A standardised number."""

    name: str
    is_log: bool
    center: float
    spread: float

    @classmethod
    def of(cls, name: str, values: Sequence[float], is_log: bool | None = None) -> NumberAxis | None:
        """Scaled by the values it will see; None where they are all equal."""
        array = np.asarray(values, dtype=float)
        # Not by the spread: the mean of equal numbers is rounded, and may differ from them.
        if array.min() == array.max():
            return None
        if is_log is None:
            is_log = bool(array.min() > 0 and array.max() > _LOG_SPAN * array.min())
        array = np.log(array) if is_log else array
        spread = float(array.std())
        return cls(name, is_log, float(array.mean()), spread) if spread > 0 else None

    def at(self, value: Any) -> float:
        """The coordinate of a value; of one from another space that is no number here, the middle."""
        if not _is_number(value):
            return 0.0
        if self.is_log and value <= 0:
            return -_FAR
        return ((math.log(value) if self.is_log else float(value)) - self.center) / self.spread


@dataclass(frozen=True)
class ChoiceAxis:
    """A choice among named values."""

    name: str
    levels: tuple[Any, ...]

    def at(self, value: Any) -> int:
        """The code of a value; one that was never named gets a code of its own."""
        return self.levels.index(value) if value in self.levels else len(self.levels)


@dataclass(frozen=True)
class Axes:
    """The coordinates of a space."""

    size: NumberAxis | None
    """log N; None where all models have one size."""
    numbers: tuple[NumberAxis, ...]
    choices: tuple[ChoiceAxis, ...]

    @classmethod
    def of_columns(cls, params: Sequence[float], columns: Mapping[str, Sequence[Any]]) -> Axes:
        """From the values that a table holds."""
        numbers, choices = [], []
        for name, values in columns.items():
            if all(_is_number(value) for value in values):
                axis = NumberAxis.of(name, values)
                numbers += [] if axis is None else [axis]
            else:
                levels = tuple(sorted(set(values), key=str))
                choices += [ChoiceAxis(name, levels)] if len(levels) > 1 else []
        return cls(NumberAxis.of("params", params, True), tuple(numbers), tuple(choices))

    @classmethod
    def of_parameters(cls, params: Sequence[float], parameters: Sequence[Parameter]) -> Axes:
        """From the distributions of a space; `params` are realised sizes of its feasible points."""
        rng = np.random.default_rng(_SEED)
        columns = {
            parameter.name: parameter.values or tuple(parameter.draw(rng) for _ in range(_DRAWS))
            for parameter in parameters
            if parameter.name != "params"
        }
        return cls.of_columns(params, columns)

    def encode(self, configs: Sequence[Mapping[str, Any]], params: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """(numbers_MX, codes_MG) of configurations and their sizes."""
        numbers = np.zeros((len(configs), 1 + len(self.numbers)))
        codes = np.zeros((len(configs), len(self.choices)), dtype=int)
        for place, (config, size) in enumerate(zip(configs, params, strict=True)):
            numbers[place, 0] = 0.0 if self.size is None else self.size.at(size)
            numbers[place, 1:] = [axis.at(config[axis.name]) for axis in self.numbers]
            codes[place] = [axis.at(config[axis.name]) for axis in self.choices]
        return numbers, codes


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)
