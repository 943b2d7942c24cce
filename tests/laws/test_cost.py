"""What an event costs is found in its parts, and optima at equal C are those of the cost that runs really had."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from bfm.laws.cost import cost_levels, cost_of
from bfm.laws.joint_law import axis_law, joint_law
from bfm.laws.runs import Runs

BASE, PER_NEGATIVE = 3e4, 60.0
LADDER = np.logspace(10, 12, 5)


def loss(params, events):
    """A planted surface of small models."""
    return 7.0 + 40.0 / params**0.5 + 300.0 / events**0.45


def table(seed=0, sd=0.002, **columns):
    rng = np.random.default_rng(seed)
    columns = {name: np.asarray(values, float) for name, values in columns.items()}
    columns["loss"] = columns["loss"] + sd * rng.standard_normal(len(columns["loss"]))
    names = tuple(f"run {place}" for place in range(len(columns["loss"])))
    settings = tuple(name for name in ("share", "negatives") if name in columns)
    return Runs("planted", columns, names, "nll", {"nll": columns["loss"]}, {}, {}, settings=settings)


def allocation(seed=0):
    """Nine sizes at five C, whose events cost a fixed part beside 6 N."""
    flops = np.repeat(LADDER, 9)
    middle = 700 * (flops / 1e10) ** 0.4
    params = middle * np.tile(np.geomspace(0.2, 5, 9), 5)
    events = flops / (BASE + 6 * params)
    return table(seed, params=params, events=events, flops=flops, budget=flops, loss=loss(params, events))


def best_size(flops):
    found = minimize_scalar(
        lambda log_n: loss(np.exp(log_n), flops / (BASE + 6 * np.exp(log_n))), bounds=(3, 14), method="bounded"
    )
    return float(np.exp(found.x))


def test_the_parts_of_a_cost_are_found():
    rng = np.random.default_rng(0)
    params, share, negatives = (np.exp(rng.uniform(low, high, 40)) for low, high in ((6, 11), (-3, -1), (3, 9)))
    events = 1e11 / (BASE + 6 * params * (1 - share) + 15 * params * share + PER_NEGATIVE * negatives)
    runs = table(params=params, events=events, flops=np.full(40, 1e11), share=share, negatives=negatives, loss=share)
    cost = cost_of(runs)
    assert cost.weight_T == pytest.approx([BASE, 0, 6, 15, PER_NEGATIVE], rel=1e-3, abs=1)
    assert cost.per_event(1e4, 0.2, 100.0) == pytest.approx(BASE + 6 * 8e3 + 15 * 2e3 + 6e3, rel=1e-3)
    nearby = [np.log(cost.per_event(1e4 * factor)) for factor in (0.999, 1.001)]
    assert cost.slope(1e4) == pytest.approx((nearby[1] - nearby[0]) / np.log(1.001 / 0.999), rel=1e-3)


def test_sizes_are_compared_at_what_their_events_really_cost():
    held, ratios = [], []
    for seed in range(8):
        fit = joint_law(allocation(seed))
        assert len(fit.budgets) == len(LADDER)
        for budget in fit.budgets:
            best = best_size(budget.flops)
            held.append(budget.optima["N_opt"].low <= best <= budget.optima["N_opt"].high)
            ratios.append(budget.optima["N_opt"].estimate / best)
        middle = fit.budgets[2]
        assert middle.optima["D_opt"].estimate == pytest.approx(
            middle.flops / (BASE + 6 * middle.optima["N_opt"].estimate), rel=0.01
        )
    assert np.mean(held) >= 0.85
    assert np.median(ratios) == pytest.approx(1, abs=0.1)


def test_that_negatives_cost_events_is_a_part_of_their_valley():
    swept = np.array([16, 64, 256, 1024, 4096, 16384, 65536])
    flops, negatives = np.repeat(LADDER[:3], 7), np.tile(swept, 3)
    params = np.full(21, 6e3)

    def reached(flops, negatives):
        return 7.5 + 4 / (flops / (BASE + 6 * 6e3 + PER_NEGATIVE * negatives)) ** 0.3 + 0.1 / negatives**0.5

    runs = table(
        params=params,
        events=flops / (BASE + 6 * params + PER_NEGATIVE * negatives),
        flops=flops,
        budget=flops,
        negatives=negatives,
        loss=reached(flops, negatives),
    )
    fit = axis_law(runs, "negatives")
    for budget in fit.budgets:
        least = minimize_scalar(lambda x, c=budget.flops: reached(c, np.exp(x)), bounds=(2, 12), method="bounded")
        assert budget.bracketed
        assert budget.optima["K_opt"].low <= np.exp(least.x) <= budget.optima["K_opt"].high


def test_a_rate_by_rule_at_three_sizes_is_no_choice():
    params, flops = np.tile([1e3, 3e3, 9e3], 5), np.repeat(LADDER, 3)
    events = flops / (6 * params)
    runs = table(params=params, events=events, flops=flops, rate=6e-3 * params**-0.1, loss=loss(params, events))
    fit = joint_law(replace(runs, settings=("rate",)))
    assert fit.definitions["varied"] == "N and D alone"


def test_what_grows_faster_than_the_size_is_found():
    """C as N^1.2 D: the best size goes with another power of C than 6 N D would have it."""
    flops = np.repeat(LADDER, 9)
    params = 700 * (flops / 1e10) ** 0.4 * np.tile(np.geomspace(0.2, 5, 9), 5)
    events = flops / (6 * params**1.2)
    fit = joint_law(table(params=params, events=events, flops=flops, loss=loss(params, events)))
    assert fit.parameters["N_exponent"].estimate == pytest.approx(0.45 / (0.5 + 1.2 * 0.45), abs=0.02)
    assert not any("within" in warning for warning in fit.warnings)


def test_a_cost_that_n_and_d_do_not_tell_is_named():
    runs = allocation()
    flops = runs["flops"] * np.exp(0.3 * np.random.default_rng(0).standard_normal(len(runs)))
    fit = joint_law(replace(runs, columns={**runs.columns, "flops": flops}))
    assert any("C is that of N and D within" in warning for warning in fit.warnings)


def test_where_learning_curves_happen_to_meet_is_no_budget():
    """Rows every so many steps of curves that have no C in common."""
    sizes, steps = np.geomspace(1e6, 3e7, 12), np.arange(1, 41)
    params = np.repeat(sizes, 40)
    events = np.tile(steps, 12) * 4e7 * np.repeat(np.random.default_rng(0).uniform(0.7, 1.4, 12), 40)
    flops = 6 * params * events
    levels = cost_levels(table(params=params, events=events, flops=flops, loss=flops), np.log(flops))
    assert len(levels) < 6
    assert levels[-1] == pytest.approx(flops.max())
    assert levels[0] <= 10 * flops.min()
