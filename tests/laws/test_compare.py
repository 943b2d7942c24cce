"""One law per metric, and which answers differ."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from bfm.errors import UserError
from bfm.laws.compare import differences
from bfm.laws.joint_law import axis_law
from bfm.laws.result import BudgetOptimum, Estimate, LawFit
from bfm.laws.runs import Runs
from tests.laws.axes import NOISE, two_term


def two_metrics() -> Runs:
    """NLL wants a share of 2 %, recall one of 6 %."""
    flops, shares = np.logspace(15, 17, 3), np.geomspace(0.002, 0.5, 12)
    losses = [
        two_term("share", flops, shares, np.full(3, best), (0.8, 0.5), 1, np.random.default_rng(place), NOISE)
        for place, best in enumerate((0.02, 0.06))
    ]
    nll, recall = losses[0]["loss"], np.exp(-losses[1]["loss"])
    few = np.where(np.arange(len(nll)) < 3, recall, np.nan)
    return replace(losses[0], metrics={"nll": nll, "recall@10": recall, "mrr@10": few})


def test_metrics_that_want_different_shares_differ():
    runs = two_metrics()
    with pytest.raises(UserError, match="3 share above 0"):
        axis_law(runs.fitting("mrr@10"), "share")
    fits = {metric: axis_law(runs.fitting(metric), "share") for metric in ("nll", "recall@10")}
    table = {(d.quantity, d.first, d.second): d.differs for d in differences(fits)}
    assert table["s_opt at C = 1e+16", "nll", "recall@10"] is True
    assert table["alpha", "nll", "recall@10"] is False
    assert table["share_exponent", "nll", "recall@10"] is False
    with pytest.raises(UserError, match="there is no metric 'ndcg@10'"):
        runs.fitting("ndcg@10")


def test_open_intervals_differ_only_where_they_are_apart():
    def fit(value: Estimate) -> LawFit:
        budget = BudgetOptimum(1e15, True, {"K_opt": value})
        return LawFit("negatives", "m", {}, {}, 10, "", budgets=(budget,))

    closed, above, over = Estimate(1, 0.5, 2), Estimate(math.nan, 3, math.inf), Estimate(math.nan, 1, math.inf)
    fits = {"a": fit(closed), "b": fit(above), "c": fit(over), "d": fit(Estimate(1))}
    found = {(d.first, d.second): d.differs for d in differences(fits)}
    assert found["a", "b"] is True
    assert found["a", "c"] is None
    assert found["a", "d"] is None
