"""Rank agreement against its definitions, and intervals against planted correlation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from bfm.errors import UserError
from bfm.laws.agreement import agreement, fit_agreement
from bfm.laws.runs import Runs, from_rows
from tests.laws.test_frontier import row


def found_in(rows):
    return fit_agreement(from_rows(rows)).details["agreement"]["recall@10"]


def test_agreement_turns_with_the_order_of_the_trials():
    same = [row(f"t{k}", 1e9, 5.0 - k, 0.1 * k) for k in range(5)]
    turned = [row(f"t{k}", 4e9, 5.0 - k, 0.5 - 0.1 * k) for k in range(5)]
    few = [row(f"t{k}", 9e9, 5.0 - k, 0.1 * k) for k in range(3)]
    found = found_in(same + turned + few)
    told = [(one["flops"], round(one["spearman"]["estimate"], 12), one["runs"]) for one in found]
    assert told == [(1e9, 1.0, 5), (4e9, -1.0, 5)]
    assert [round(one["kendall"]["estimate"], 12) for one in found] == [1.0, -1.0]


def test_agreement_shares_ranks_of_equal_values_and_skips_constant_metrics():
    tied = [row(f"t{k}", 1e9, nll, recall) for k, (nll, recall) in enumerate([(1, 4), (2, 3), (2, 3), (3, 1)])]
    assert found_in(tied)[0]["spearman"]["estimate"] == pytest.approx(1.0)
    with pytest.raises(UserError, match="no budget has 4 runs"):
        found_in([row(f"t{k}", 1e9, 1.0 + k, 0.5) for k in range(5)])


def test_complete_agreement_is_no_certainty():
    found = agreement(1.0, np.arange(8.0), np.arange(8.0))
    assert found.spearman.estimate == pytest.approx(1)
    assert 0.5 < found.spearman.low < 1
    assert found.spearman.high == 1.0
    assert 0.2 < found.kendall.low < found.spearman.low


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_intervals_cover_gaussian_correlation(correlation):
    noise = np.random.default_rng(1)
    truth = 6 / math.pi * math.asin(correlation / 2), 2 / math.pi * math.asin(correlation)
    held = np.zeros(2)
    for _ in range(400):
        first, other = noise.standard_normal((2, 20))
        found = agreement(1.0, first, correlation * first + math.sqrt(1 - correlation**2) * other)
        held += [e.low <= t <= e.high for e, t in zip((found.spearman, found.kendall), truth, strict=True)]
    # The standard error of 400 draws is 1.1 %; both variances are approximations.
    assert (held / 400 > 0.92).all()


def runs_of(correlations: dict[float, float], count: int = 40) -> Runs:
    noise = np.random.default_rng(0)
    flops, nll, recall = [], [], []
    for budget, correlation in correlations.items():
        first, other = noise.standard_normal((2, count))
        flops += [budget] * count
        nll += first.tolist()
        recall += (-correlation * first + math.sqrt(1 - correlation**2) * other).tolist()
    columns = {"flops": np.array(flops), "loss": np.array(nll)}
    metrics = {"nll": columns["loss"], "recall@10": np.array(recall)}
    return Runs("t", columns, tuple(f"r{k}" for k in range(len(nll))), "nll", metrics, {}, {})


def test_trend_over_budgets():
    falls = fit_agreement(runs_of({1e15: 0.93, 1e16: 0.5, 1e17: -0.5, 1e18: -0.95}))
    first, *_, last = falls.details["agreement"]["recall@10"]
    assert first["spearman"]["estimate"] > 0.8
    assert last["spearman"]["estimate"] < -0.8
    assert falls.parameters["trend[recall@10]"].high < 0
    level = fit_agreement(runs_of(dict.fromkeys((1e15, 1e16, 1e17), 0.6))).parameters["trend[recall@10]"]
    assert level.low < 0 < level.high
    one = fit_agreement(runs_of({1e15: 0.9})).parameters["trend[recall@10]"]
    assert math.isnan(one.estimate)
    assert one.high == math.inf


def test_trials_at_several_budgets_have_one_error():
    """A trial's own luck in both metrics is at all budgets: it says nothing of the trend."""
    rng = np.random.default_rng(2)
    held, apart = [], []
    for _ in range(40):
        own = rng.standard_normal((2, 24))
        nll = np.concatenate([own[0] + 0.3 * rng.standard_normal(24) for _ in range(3)])
        recall = np.concatenate([-(own[0] + own[1]) + 0.3 * rng.standard_normal(24) for _ in range(3)])
        curve = np.tile(np.arange(24), 3).astype(str)
        columns = {"flops": np.repeat([1e15, 1e16, 1e17], 24), "loss": nll, "curve": curve}
        runs = Runs("t", columns, tuple(map(str, range(72))), "nll", {"nll": nll, "recall@10": recall}, {}, {})
        trend = fit_agreement(runs).parameters["trend[recall@10]"]
        held.append(trend.low < 0 < trend.high)
        alone = replace(runs, columns={name: columns[name] for name in ("flops", "loss")})
        wide = fit_agreement(alone).parameters["trend[recall@10]"]
        apart.append((wide.high - wide.low) / (trend.high - trend.low))
    assert sum(held) >= 35
    assert np.median(apart) > 1.3


def test_too_few_runs_are_refused_with_what_is_missing():
    with pytest.raises(UserError, match="no budget has 4 runs"):
        fit_agreement(runs_of({1e15: 0.9}, count=3))
    both = runs_of({1e15: 0.9})
    with pytest.raises(UserError, match="needs two metrics"):
        fit_agreement(replace(both, metrics={both.metric: both["loss"]}))


def test_a_perfect_order_is_no_trend_however_many_runs_have_it():
    counts = {1e9: 40, 1e10: 10, 1e11: 5}
    rows = [row(f"t{c:g}-{k}", c, 50.0 - k, 0.01 * k) for c, count in counts.items() for k in range(count)]
    trend = fit_agreement(from_rows(rows)).parameters["trend[recall@10]"]
    assert trend.estimate == pytest.approx(0, abs=1e-9)
    assert trend.low < 0 < trend.high


def test_seeds_of_a_configuration_are_one_run():
    """Their means agree entirely, and three of each are no more certainty than one."""
    noise = np.random.default_rng(0)
    rows = []
    for k in range(6):
        off = noise.standard_normal((3, 2))
        off -= off.mean(0)
        for seed in range(3):
            made = row(f"t{k}-{seed}", 1e9, 5.0 - k + off[seed, 0], 0.1 * k + 0.1 * off[seed, 1], params=1000 * (k + 1))
            rows.append({**made, "seed": seed})
    (found,) = found_in(rows)
    assert (round(found["spearman"]["estimate"], 12), found["runs"]) == (1.0, 6)
