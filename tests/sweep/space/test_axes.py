"""Coordinates: what is a number and on which scale, what is a choice, what has none."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bfm.sweep.policies.space_arena import SpaceArena
from bfm.sweep.space.axes import Axes, ChoiceAxis, NumberAxis
from bfm.sweep.space.space import FeasibleSet
from tests.sweep.world import PlantedCosts, make_spec

SIZES = [10, 100, 1000]


def axes_of(**columns):
    return Axes.of_columns(SIZES, columns)


@pytest.mark.parametrize(
    ("values", "is_log"),
    [([1, 2, 3], False), ([1, 2, 3.01], True), ([0.0, 1, 100], False), ([-1, 1, 100], False), ([1e-4, 1e-2, 1], True)],
)
def test_positive_numbers_that_span_more_than_three_are_logs(values, is_log):
    (axis,) = axes_of(x=values).numbers
    assert axis.is_log == is_log


@given(st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=9))
def test_numbers_are_standardised_or_dropped(values):
    axis = NumberAxis.of("x", values)
    if len(set(values)) == 1:
        assert axis is None
    elif max(values) > 1.001 * min(values):
        coordinates = np.array([axis.at(value) for value in values])
        assert coordinates.mean() == pytest.approx(0, abs=1e-6)
        assert coordinates.std() == pytest.approx(1, abs=1e-6)
        # Neighbours whose logarithms round to one number may tie.
        assert (np.diff(coordinates[np.argsort(values)]) >= 0).all()


@pytest.mark.parametrize("constant", [0.1, 3, "a", None, True])
def test_a_constant_axis_has_no_coordinate(constant):
    axes = axes_of(x=[constant] * 3, y=[1, 2, 3])
    assert [axis.name for axis in axes.numbers] == ["y"]
    assert axes.choices == ()


def test_one_size_has_no_coordinate():
    axes = Axes.of_columns([1234] * 3, {"y": [1, 2, 3]})
    assert axes.size is None
    numbers, codes = axes.encode([{"y": 1}, {"y": 3}], [1234, 1234])
    assert numbers[:, 0].tolist() == [0, 0]
    assert numbers[0, 1] == -numbers[1, 1] != 0
    assert codes.shape == (2, 0)


@pytest.mark.parametrize("values", [[True, False, True], [None, 2, 4], ["a", "b", "a"], [1, math.inf, 2], [1, "x", 2]])
def test_what_is_not_all_numbers_is_a_choice(values):
    axes = axes_of(x=values)
    assert axes.numbers == ()
    assert set(axes.choices[0].levels) == set(values)
    _, codes = axes.encode([{"x": value} for value in values], SIZES)
    for left in range(3):
        for right in range(3):
            assert (codes[left, 0] == codes[right, 0]) == (values[left] == values[right])


def test_a_level_never_named_has_a_code_of_its_own():
    axis = ChoiceAxis("x", ("a", "b"))
    assert len({axis.at("a"), axis.at("b"), axis.at("c")}) == 3


def test_log_size_comes_first_and_shares_one_scale():
    axes = axes_of(x=[5, 6, 7])
    numbers, _ = axes.encode([{"x": 5}, {"x": 6}, {"x": 7}], SIZES)
    assert numbers[1, 0] == pytest.approx(0, abs=1e-12)
    assert numbers[2, 0] - numbers[1, 0] == pytest.approx(numbers[1, 0] - numbers[0, 0])
    assert numbers[:, 1].std() == pytest.approx(1)


def test_a_space_has_its_free_parameters_as_axes():
    parameters = {
        "params": {"distribution": "log_uniform_values", "min": 300, "max": 10000},
        "learning_rate": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1},
        "depth": {"values": [None, 2, 4]},
        "window": {"value": 64},
    }
    spec = make_spec(parameters=parameters)
    arena = SpaceArena(FeasibleSet(spec, PlantedCosts()))
    assert [(axis.name, axis.is_log) for axis in arena.axes.numbers] == [("learning_rate", True)]
    assert [(axis.name, set(axis.levels)) for axis in arena.axes.choices] == [("depth", {None, 2, 4})]
    assert arena.axes.size.is_log
    again = SpaceArena(FeasibleSet(spec, PlantedCosts()))
    assert again.axes == arena.axes
