"""The joint model as a law: planted optima of every axis, known ends beyond the range, refusals in one line."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from bfm.errors import UserError
from bfm.laws.joint_law import axis_law, joint_law
from bfm.laws.runs import Runs, from_rows, from_table
from tests.helpers import published
from tests.laws import test_joint as joint
from tests.laws.axes import NOISE, coverage, design, estimate, two_term
from tests.report import planted_laws

FLOPS = np.logspace(15, 18, 4)
SHARES = np.geomspace(0.002, 0.5, 12)
NEGATIVES = np.geomspace(1e3, 2**21, 12)


def draw(column: str, x: np.ndarray, optimum: np.ndarray, exponents=(0.8, 0.5), sd: float = 0.0, seed: int = 0) -> Runs:
    return two_term(column, FLOPS[: len(optimum)], x, optimum, exponents, 1, np.random.default_rng(seed), sd)


def changed(runs: Runs, **columns: np.ndarray) -> Runs:
    return replace(runs, columns={**runs.columns, **columns}, metrics={runs.metric: columns.get("loss", runs["loss"])})


@pytest.mark.parametrize("name", ["share 1", "share 2", "negatives 1", "negatives 2"])
def test_without_noise_the_truth_comes_back(name):
    planted = design(name)
    fit = planted.fit(planted.draw(np.random.default_rng(0), 1e-6))
    for quantity, truth in planted.truth.items():
        assert estimate(fit, quantity).estimate == pytest.approx(truth, rel=5e-3, abs=1e-3)
    assert all(budget.bracketed for budget in fit.budgets)
    json.dumps(fit.as_dict(), allow_nan=False)


@pytest.mark.parametrize("name", ["share 1", "negatives 2"])
def test_intervals_cover_planted_truth(name):
    # 12 draws of a 95 % interval: fewer than 9 covers happen once in 500 times; the benchmark has more draws.
    assert min(coverage(design(name), 12).values()) >= 0.75


def test_one_wild_run_is_named_and_moves_little():
    runs = draw("share", SHARES, np.full(4, 0.02), sd=NOISE)
    loss = runs["loss"].copy()
    loss[17] += 0.3
    clean, spoilt = axis_law(runs, "share"), axis_law(changed(runs, loss=loss), "share")
    assert [outlier.run for outlier in spoilt.outliers] == ["run 17"]
    for before, after in zip(clean.budgets, spoilt.budgets, strict=True):
        clean_value, value = before.optima["s_opt"], after.optima["s_opt"]
        assert clean_value.low < value.estimate < clean_value.high
        assert value.high - value.low < 1.5 * (clean_value.high - clean_value.low)


def test_a_best_size_lies_between_the_runs_where_they_have_one():
    """What the form misses is not known a decade below them, where it can be lower than at the runs' own valley."""
    where = "dataset == 'rw' and hparams == 'base' and warmup == 'long' and param_count == 'kaplan'"
    columns = [("params", "n"), ("events", "tokens"), ("flops", "flops"), ("loss", "loss")]
    runs = from_table(published("porian/isoflop_points.parquet"), columns, where)
    left_out = np.random.default_rng(0).permutation(len(runs)) % 20 == 9
    fit = joint_law(runs.select(~left_out))
    assert fit.budgets[-1].optima["N_opt"].estimate == pytest.approx(3.9e8, rel=0.1)
    assert fit.parameters["N_exponent"].estimate == pytest.approx(0.84, abs=0.02)


def test_rates_that_change_with_C_are_doubted():
    runs = draw("share", SHARES, np.full(4, 0.02), sd=NOISE)
    assert not axis_law(runs, "share").warnings
    budget, u = np.repeat(np.arange(4), len(SHARES)), np.log(runs["share"] / 0.02)
    rate = 0.3 * 1.5**budget
    loss = 8.0 - 0.5 * budget + 0.02 * (np.expm1(rate * u) / rate + np.expm1(-0.5 * u) / 0.5)
    noisy = loss + NOISE * np.random.default_rng(1).standard_normal(len(loss))
    assert "not the same at every C" in axis_law(changed(runs, loss=noisy), "share").warnings[0]


def test_runs_at_zero_have_a_step_of_their_own():
    runs = draw("negatives", NEGATIVES, np.full(4, 3e4), sd=NOISE)
    zeros, loss = runs["negatives"].copy(), runs["loss"].copy()
    zeros[::12], loss[::12] = 0.0, 8.0 - 0.5 * np.arange(4) + 0.25
    fit = axis_law(changed(runs, negatives=zeros, loss=loss), "negatives")
    assert fit.parameters["at_zero"].low < 0.25 < fit.parameters["at_zero"].high
    assert fit.runs == len(runs)
    for budget in fit.budgets:
        assert budget.optima["K_opt"].estimate == pytest.approx(3e4, rel=0.2)


def test_an_optimum_beyond_the_tested_range_has_its_known_end_alone():
    optimum = np.array([2e4, 1e5, 5e5, 2.5e7])
    fit = axis_law(draw("negatives", NEGATIVES, optimum, (0.4, 0.5), sd=NOISE), "negatives")
    last = fit.budgets[-1]
    assert not last.bracketed
    assert "beyond the tested range" in last.reason
    value = last.optima["K_opt"]
    assert math.isnan(value.estimate)
    assert value.high == math.inf
    assert 1e5 < value.low <= 2.5e7
    assert all(budget.bracketed for budget in fit.budgets[:2])


def test_what_changes_nothing_is_said_to_be_flat():
    runs = draw("share", SHARES, np.full(4, 0.02))
    budget = np.repeat(np.arange(4), len(SHARES))
    loss = 8.0 - 0.5 * budget + NOISE * np.random.default_rng(5).standard_normal(len(runs))
    fit = axis_law(changed(runs, loss=loss), "share")
    assert not any(budget.bracketed for budget in fit.budgets)
    assert not fit.budgets[-1].optima["s_opt"].is_known
    for end in fit.details["axes"]["share"]["ends"]:
        assert abs(end["estimate"]) < 5 * NOISE


def test_ranking_metrics_are_fitted_as_minus_log():
    runs = draw("share", SHARES, np.full(4, 0.02), sd=1e-6)
    recall = np.exp(-runs["loss"])
    ranked = Runs("t", {**runs.columns, "loss": recall}, runs.names, "recall@10", {"recall@10": recall}, {}, {})
    fit = axis_law(ranked, "share")
    assert fit.budgets[0].optima["s_opt"].estimate == pytest.approx(0.02, rel=1e-3)
    assert fit.budgets[0].best == pytest.approx(math.exp(-8.0), rel=1e-3)
    assert fit.definitions["L"] == "-ln(recall@10)"


def test_seven_things_at_once_come_out_of_one_fit():
    runs = joint.planted(np.random.default_rng(3), sd=0.001, chosen=True)
    fit = joint_law(runs)
    truth = {"N_exponent": joint.EXPONENT, "E": joint.E, "alpha": joint.ALPHA, "beta": joint.BETA}
    truth |= {"share_exponent": joint.SHARE_POWER, "critical_batch": joint.CRITICAL, "A": joint.A, "B": joint.B}
    for name, value in truth.items():
        assert fit.parameters[name].estimate == pytest.approx(value, rel=0.05), name
    assert fit.parameters["D_exponent"].estimate == pytest.approx(1 - fit.parameters["N_exponent"].estimate)
    low, high = (end["estimate"] for end in fit.details["axes"]["share"]["ends"])
    best = joint.BEST_SHARE * 100**joint.SHARE_POWER
    ends = joint.HEIGHT * np.log(np.array([runs["share"].min(), runs["share"].max()]) / best) ** 2
    assert [low, high] == pytest.approx(ends, rel=0.1)
    json.dumps(fit.as_dict(), allow_nan=False)


def test_adjusted_runs_lie_on_their_curves():
    runs = joint.planted(np.random.default_rng(4), sd=1e-5)
    fit = joint_law(replace(runs, columns={**runs.columns, "budget": runs["flops"]}))
    for name in ("params", "share"):
        view = fit.details["axes"][name]
        for curve in view["curves"]:
            here = np.isclose(runs["flops"], curve["flops"])
            expected = np.interp(np.log(runs[name][here]), np.log(curve["x"]), curve["value"])
            adjusted = np.array(view["adjusted"], float)[here]
            np.testing.assert_allclose(adjusted, expected, atol=2e-3)


def test_how_rows_were_chosen_is_said():
    rows = planted_laws.allocation_rows()
    assert joint_law(from_rows(rows)).definitions["rows"] == "all 36 of 36 trials at 4 budgets, as designed"
    trials = [{**row, "trial": f"t{place % 18:05d}"} for place, row in enumerate(rows)]
    assert "18 of" not in joint_law(from_rows(trials)).definitions["rows"]
    some = joint_law(from_rows([*rows[:27], *({**row, "trial": rows[0]["trial"]} for row in rows[27:])]))
    assert some.definitions["rows"].endswith(
        "budgets; 1 went on to further ones (that a policy chose them by their rows is allowed for)"
    )


@pytest.mark.parametrize(
    ("x", "budgets", "message"),
    [
        (np.array([0.02]), 4, r"the runs stand at 1 share above 0, and an optimum needs 4; add runs at 3 or more"),
        (np.array([0.01, 0.02, 0.1]), 4, r"3 share above 0, and an optimum needs 4"),
        (np.array([0.01, 0.02, 0.1, 0.3]), 2, "8 rows for 7 parameters of N, D, share; let the sweep make 14 rows"),
    ],
)
def test_tables_that_cannot_hold_the_law_are_refused_with_what_is_missing(x, budgets, message):
    with pytest.raises(UserError, match=message) as refused:
        axis_law(draw("share", x, np.full(budgets, 0.02)), "share")
    assert "\n" not in str(refused.value)


def test_a_missing_column_is_named():
    with pytest.raises(UserError, match="needs the column negatives"):
        axis_law(draw("share", SHARES, np.full(4, 0.02)), "negatives")


def test_what_many_epochs_cost_is_no_miss_of_fresh_events():
    """Large models that see few events again and again lose to overfitting, which R* alone does not hold."""
    rng = np.random.default_rng(6)
    params = np.tile(np.geomspace(1e7, 3e10, 8), 10)
    flops = np.repeat(np.geomspace(1e17, 1e19, 5), 16)
    unique = np.repeat(np.tile([np.inf, 2e7], 5), 8)
    events = flops / 6 / params
    unique = np.minimum(events, unique)
    again = events / unique - 1
    worth = unique * (1 + 15 * (1 - np.exp(-again / 15)))
    loss = joint.E + joint.A / params**joint.ALPHA + joint.B / worth**joint.BETA
    loss = loss + 0.05 * np.log1p(again) * (params / 1e9) ** 0.3 + 0.003 * rng.standard_normal(len(loss))
    columns = {"params": params, "events": events, "flops": flops, "unique_events": unique, "loss": loss}
    names = tuple(map(str, range(len(loss))))
    fit = joint_law(Runs("planted", columns, names, "nll", {"nll": loss}, {}, {}))
    exponent = fit.parameters["N_exponent"]
    assert exponent.low < joint.EXPONENT < exponent.high
    assert exponent.high - exponent.low < 0.4


def test_one_size_tells_no_best_size():
    rows = [{**row, "params": 1e6} for row in planted_laws.allocation_rows()]
    for row in rows:
        row["events"] = row["unique_events"] = row["path_flops"] / 9e6
    fit = joint_law(from_rows(rows))
    assert not fit.parameters["N_exponent"].is_known
    assert {budget.reason for budget in fit.budgets} == {"all runs have one N"}


def test_small_batches_that_cost_are_named():
    runs = joint.planted(np.random.default_rng(3), sd=0.001)
    assert not joint_law(runs).warnings
    assert joint_law(runs).definitions["batch"] == "optima are those at the smallest of the rows, B = 8"
    costly = changed(runs, loss=runs["loss"] + 0.5 / runs["batch"])
    assert any("small batches cost here" in warning for warning in joint_law(costly).warnings)


def test_budgets_of_unequal_seeds_are_named():
    rows = planted_laws.allocation_rows()
    assert not from_rows(rows).warnings
    rows[0]["seed"] = 1
    assert from_rows(rows).warnings[0].startswith("budgets have 1 to 2 seeds")


def test_rows_that_score_nothing_are_left_out_and_said():
    rows = planted_laws.allocation_rows()
    for row in rows:
        row["metrics"] = {**row["metrics"], "recall@10": 0.1 + 1e-9 * row["path_flops"] ** 0.4}
    rows[0]["metrics"]["recall@10"] = 0.0
    runs = from_rows(rows, "recall@10")
    assert len(runs) == len(rows) - 1
    assert f"1 of {len(rows)} rows have recall@10 0 or beyond its range: left out" in runs.warnings
    assert not from_rows(rows, "nll").warnings
    for row in rows:
        row["metrics"]["recall@10"] = 0.0
    with pytest.raises(UserError, match="no row has a recall@10 that a law can take"):
        from_rows(rows, "recall@10")


def test_one_budget_has_its_optimum_and_a_constant_metric_is_one_line():
    rows = planted_laws.allocation_rows(planted_laws.BUDGETS[1:2], sizes=12)
    fit = joint_law(from_rows(rows))
    assert [budget.flops for budget in fit.budgets] == [planted_laws.BUDGETS[1]]
    assert fit.budgets[0].optima["N_opt"].estimate == pytest.approx(planted_laws.planted_size(1e16), rel=0.3)
    assert None not in fit.details["axes"]["params"]["adjusted"]
    assert fit.definitions["rows"] == "all 12 of 12 trials at 1 budget, as designed"
    for row in rows:
        row["metrics"]["nll"] = 3.0
    with pytest.raises(UserError, match="all 12 rows have the same nll"):
        joint_law(from_rows(rows))


def test_rows_of_two_instruments_are_refused_and_a_rate_by_rule_is_no_axis():
    rows = planted_laws.allocation_rows()
    for place, row in enumerate(rows):
        row["config"] = {**row["config"], "learning_rate": 6e-3 * (row["params"] / 5e4) ** -0.1, "copy": "pointer"}
        row["config"]["embedder_kind"] = ("mlp", "attention")[place % 2]
    runs = from_rows(rows)
    assert set(runs.settings) == {"rate", "embedder_kind"}
    fit = joint_law(runs)
    assert set(fit.details["axes"]) == {"params"}
    assert fit.definitions["varied"] == "embedder_kind"
    rows[3]["config"]["copy"] = "none"
    with pytest.raises(UserError, match="copy: none and pointer"):
        from_rows(rows)


def test_the_side_of_an_optimum_far_outside_is_told_by_the_ends_alone():
    """18 runs of a loss that falls with the share all the way: where its optimum lies is open, on which side is not."""
    rng, flops = np.random.default_rng(1), np.repeat([1e15, 1e16, 1e17], 6)
    params = np.sqrt(flops / 120)
    share = np.tile(np.geomspace(0.01, 0.4, 6), 3)
    loss = 1.7 + 400 / params**0.35 + 400 / (flops / 6 / params) ** 0.35 - 0.05 * np.log(share)
    columns = {"params": params, "events": flops / 6 / params, "flops": flops, "share": share}
    columns["loss"] = loss + NOISE * rng.standard_normal(18)
    names = tuple(f"run {place}" for place in range(18))
    runs = Runs("planted", columns, names, "nll", {"nll": columns["loss"]}, {}, {}, settings=("share",))
    fit = axis_law(runs, "share")
    assert len(fit.budgets) == 3
    for budget in fit.budgets:
        value = budget.optima["s_opt"]
        assert not value.is_known
        assert value.low >= 0.01
        assert value.high == math.inf
        assert "beyond the tested range" in budget.reason
    assert not fit.parameters["alpha"].is_known


def test_a_budget_whose_runs_have_one_rate_has_no_best_one():
    runs = draw("share", SHARES, np.full(4, 0.02), sd=NOISE)
    top = runs["flops"] == FLOPS[-1]
    loss = np.where(top, runs["loss"][top][len(SHARES) // 2], runs["loss"])
    share = np.where(top, 0.02, runs["share"])
    fit = axis_law(changed(runs, share=share, loss=loss + 1e-4 * np.arange(len(loss)) * top), "share")
    assert [budget.flops for budget in fit.budgets] == pytest.approx(FLOPS[:-1].tolist())


def test_settings_that_change_together_are_not_told_apart():
    runs = draw("share", SHARES, np.full(4, 0.02), sd=NOISE)
    first = np.where(np.arange(len(runs)) % 2, "adam", "muon")
    second = np.where(first == "adam", "cosine", "linear")
    both = replace(
        runs,
        columns={**runs.columns, "optimizer": first, "schedule": second},
        settings=("share", "optimizer", "schedule"),
    )
    steps = {name: value for name, value in joint_law(both).parameters.items() if "=" in name}
    assert len(steps) == 2
    assert not any(value.is_known for value in steps.values())


def test_shares_are_parts_of_a_whole(tmp_path):
    lines = [f"{1e6 * (k % 4 + 1)},{1e8 * (k + 1)},{10 * k},{3 - 0.01 * k}" for k in range(12)]
    (tmp_path / "percent.csv").write_text("\n".join(["N,D,s,loss", *lines]))
    columns = [("params", "N"), ("events", "D"), ("share", "s"), ("loss", "loss")]
    with pytest.raises(UserError, match="11 of 12 runs have a share above 1, first row 2"):
        from_table(tmp_path / "percent.csv", columns)
