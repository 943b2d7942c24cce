"""Losses of a step from the sums over its rows."""

import math

import pytest

from bfm.training.records import StepLoss


def test_means_are_over_the_rows_of_a_kind_and_gates_over_all():
    basket, headline = [30.0, 10.0, 8.0, 2.0], [16.0, 2.0, 1.0, 1.0]
    losses = StepLoss.of(3.5, basket + headline, ("softmax", "pointer"))
    assert (losses.loss, losses.loss_basket, losses.loss_headline) == (3.5, 3.0, 8.0)
    assert losses.gates == {"softmax": pytest.approx(0.75), "pointer": pytest.approx(0.25)}


def test_a_step_without_a_kind_of_row_has_no_mean_of_it():
    losses = StepLoss.of(4.0, [0.0, 0.0, 0.0, 20.0, 5.0, 5.0], ("softmax",))
    assert math.isnan(losses.loss_basket)
    assert losses.loss_headline == 4.0
    assert losses.gates == {}, "a softmax alone has no gate to show"
