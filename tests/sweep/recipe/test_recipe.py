"""Recipes under a planted law: the size, the prediction, and what is said where the runs cannot tell."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from bfm.errors import InfeasibleError, UserError
from bfm.sweep.recipe.evidence import seed_noise
from bfm.sweep.recipe.recipe import make_recipe
from bfm.training.config import TrainConfig
from bfm.training.schedule import rule_learning_rate
from tests.sweep.recipe.planted_sizes import (
    NOISE,
    RUNGS,
    SHARE,
    LogCosts,
    best_size,
    evidence,
    planted,
    row,
    rows,
    sizes_sweep,
)

FAR = 40 * RUNGS[-1]


@pytest.fixture(scope="module")
def recipe():
    return make_recipe(evidence(sizes_sweep(rows(0))), LogCosts(), FAR, "nll")


def test_the_size_is_near_the_true_optimum_and_the_interval_holds_the_truth(recipe):
    truth = best_size(FAR)
    size = recipe.params.estimate
    assert recipe.params.low < truth < recipe.params.high
    assert planted(size, FAR / (6 * size)) < 1.005 * planted(truth, FAR / (6 * truth))
    value = planted(size, recipe.events)
    assert recipe.predicted.low < value < recipe.predicted.high
    assert recipe.predicted.high - recipe.predicted.low < 0.2 * value, "an interval that says nothing"
    assert recipe.predicted_by == "the joint model of 35 rows"


def test_the_configuration_can_be_trained(recipe):
    config = TrainConfig.from_dict(recipe.config)
    assert config.shape().as_dict() == recipe.shape
    assert recipe.steps >= 100
    assert recipe.events * recipe.params.estimate * 6 == pytest.approx(FAR, rel=0.01)
    positions = config.groups_per_step * config.group_windows * config.window
    assert recipe.learning_rate == pytest.approx(rule_learning_rate(config.params, positions))
    assert (recipe.negatives, recipe.embedder_share) == (0, SHARE)


def test_the_form_is_plain_json_and_names_its_runs(recipe):
    value = json.loads(json.dumps(recipe.as_dict(), allow_nan=False))
    assert value["flops"] == FAR
    assert set(value["predicted"]) == {"estimate", "low", "high"}
    assert value["flops_beyond"] == pytest.approx(40)
    assert len(value["rests_on"]["sizes"]["runs"]) == 35
    assert value["rests_on"]["sizes"]["rows"] == "all rung rows"
    assert {"embedder_share", "batch", "negatives", "learning_rate"} < set(value["rests_on"])
    assert value["seed_noise"] is None
    assert value["evaluation_noise"] == 0.01
    notes = " | ".join(value["notes"])
    assert "no sweep of the batch" in notes
    assert "K = 0, stage 1 only" in notes
    assert "the embedder share was not varied over 4 values" in notes
    assert "the rate was not searched" in notes
    assert "no replicate seeds" in notes
    assert any("40 times the highest rung" in warning for warning in value["warnings"])


def test_a_maximised_metric_is_foretold_in_its_own_units():
    found = make_recipe(evidence(sizes_sweep(rows(1))), LogCosts(), 4 * RUNGS[-1], "recall@10")
    value = float(np.exp(-planted(found.params.estimate, found.events) / 2))
    assert found.predicted.low < value < found.predicted.high < 1


def test_a_joint_sweep_tells_its_settings_from_all_of_its_rows():
    rng = np.random.default_rng(2)
    made = []
    for number, plain in enumerate(rows(2, sizes=30)):
        share = float(np.exp(rng.uniform(np.log(0.01), np.log(0.4))))
        value = plain["metrics"]["nll"] + 0.03 * np.log(share / 0.06) ** 2
        made.append(row(number, plain["rung"], plain["params"], value, config={"embedder_share": share}))
    found = make_recipe(evidence(sizes_sweep(made, axis=None)), LogCosts(), FAR, "nll")
    assert found.embedder_share == pytest.approx(0.06, rel=0.25)
    assert found.choices[0].by_law
    assert found.predicted.low < planted(found.params.estimate, found.events) < found.predicted.high
    assert found.predicted.high - found.predicted.low < 0.2


def test_a_searched_rate_is_the_rule_times_its_optimum():
    rng = np.random.default_rng(3)
    made = []
    for r in rows(3, sizes=10):
        off = float(rng.uniform(-1.5, 1.5))
        r["config"]["learning_rate"] *= 2.5 * np.exp(off)
        r["metrics"]["nll"] += 0.05 * off**2
        made.append(r)
    sweep = sizes_sweep(made, learning_rate={"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1})
    found = make_recipe(evidence(sweep), LogCosts(), FAR, "nll")
    positions = found.config["groups_per_step"] * found.config["group_windows"] * found.config["window"]
    rule = rule_learning_rate(found.config["params"], positions)
    assert found.learning_rate == pytest.approx(2.5 * rule, rel=0.25)


def test_replicates_tell_the_seed_noise():
    rng = np.random.default_rng(0)
    made = [row(n, 0, 3e3, 4.0 + rng.normal(0, 0.05), seed=n) for n in range(60)]
    spread = float(np.std([r["metrics"]["nll"] for r in made], ddof=1))
    assert seed_noise(made, "nll") == pytest.approx(spread)
    assert math.isnan(seed_noise(made[:1], "nll"))


def test_many_epochs_are_warned_of():
    found = make_recipe(evidence(sizes_sweep(rows(0))), LogCosts(epoch_events=100_000), FAR, "nll")
    assert found.epochs > 4
    assert any("epochs over this log" in warning for warning in found.warnings)
    assert found.fresh is None
    assert any("what a repeated event is worth" in note for note in found.notes)


def test_what_is_foretold_no_better_than_the_best_row_is_said():
    lucky = rows(0)
    lucky.append(row(999, len(RUNGS) - 1, lucky[-1]["config"]["params"], 1.0))
    found = make_recipe(evidence(sizes_sweep(lucky)), LogCosts(), FAR, "nll")
    assert any("no better than the best row, 1:" in warning for warning in found.warnings)
    usual = make_recipe(evidence(sizes_sweep(rows(0))), LogCosts(), FAR, "nll")
    assert not any("best row" in warning for warning in usual.warnings)


def test_too_few_rows_are_refused_with_how_many_are_needed():
    few = [r for r in rows(0, rungs=2) if r["trial"].endswith(("0", "3"))]
    with pytest.raises(UserError, match=r"4 rows for 5 parameters of N, D; let the sweep make 10 rows"):
        make_recipe(evidence(sizes_sweep(few)), LogCosts(), FAR, "nll")


def test_one_size_gives_a_wide_prediction_and_says_that_no_best_size_is_told():
    made = [row(n, n % 5, 5e3, planted(5e3, c / 3e4) + 1e-3 * n, flops=c) for n, c in enumerate([*RUNGS, *RUNGS])]
    found = make_recipe(evidence(sizes_sweep(made)), LogCosts(), 4 * RUNGS[-1], "nll")
    size = found.params.estimate
    assert found.predicted.low < planted(size, 4 * RUNGS[-1] / (6 * size)) < found.predicted.high
    assert not found.params.is_known or found.params.high / found.params.low > 3
    assert any("the runs do not tell alpha" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("flops", "metric", "words"),
    [(1e8, "nll", "below the lowest rung"), (FAR, "mrr@10", "no rung row has mrr@10")],
)
def test_what_cannot_be_told_is_one_line(flops, metric, words):
    with pytest.raises(UserError, match=words):
        make_recipe(evidence(sizes_sweep(rows(0))), LogCosts(), flops, metric)


def test_no_feasible_size_names_the_bound():
    sweep = sizes_sweep(rows(0), group_windows={"value": 4}, freeze_at_flops={"value": None})
    narrow = dataclasses.replace(
        sweep.spec, budget=dataclasses.replace(sweep.spec.budget, events_per_param=(1e5, 1.1e5), max_epochs=1e-3)
    )
    with pytest.raises(InfeasibleError, match="no model size can be trained"):
        make_recipe(evidence(dataclasses.replace(sweep, spec=narrow)), LogCosts(epoch_events=1000), FAR, "nll")


@pytest.mark.slow
def test_intervals_hold_the_next_run_about_as_often_as_they_say():
    held = 0
    for seed in range(20):
        found = make_recipe(evidence(sizes_sweep(rows(seed))), LogCosts(), FAR, "nll")
        noise = np.random.default_rng(1000 + seed).normal(0, NOISE)
        run = planted(found.params.estimate, found.events) * np.exp(noise)
        held += found.predicted.low <= run <= found.predicted.high
    assert held >= 17, f"{held} of 20"
