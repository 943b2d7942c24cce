"""Losses of a step from the sums over its rows; rates of late."""

import math
import random
import time

import pytest

from bfm.training.records import RATE_S, RecentSteps, StepLoss


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


@pytest.mark.parametrize("longest_s", [0.01, 3.0, 200.0])
def test_rates_are_of_the_last_minute_however_long_steps_are(longest_s, monkeypatch):
    dice, recent, now_s = random.Random(0), RecentSteps(), 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    ends = [(now_s, 0, 0)]
    recent.begin(*ends[0])
    for _ in range(round(min(20_000, 600 / longest_s) + 20)):
        now_s += dice.uniform(0.2, 1.0) * longest_s
        ends.append((now_s, ends[-1][1] + dice.randrange(1, 9), ends[-1][2] + dice.randrange(10**9)))
        recent.end(ends[-1][1], ends[-1][2], 1.0)
        # Of the steps that could have opened the window, the last: marks lie a second apart, or a step.
        since = [end for end in ends[:-1] if end[0] <= now_s - RATE_S] or ends[:1]
        possible = [end for end in since if end[0] >= since[-1][0] - 1.0 - longest_s]
        rates = [
            tuple((b - a) / (now_s - end[0]) for a, b in zip(end[1:], ends[-1][1:], strict=True)) for end in possible
        ]
        assert any(recent.rates() == pytest.approx(rate) for rate in rates)
    assert len(recent._marks) <= RATE_S + 2
