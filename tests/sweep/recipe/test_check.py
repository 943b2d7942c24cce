"""Checks of recipes in the ledger: they survive a resume, cost the sweep nothing, and are told."""

from __future__ import annotations

import dataclasses
import json

import pytest

from bfm.errors import CorruptError, UserError
from bfm.files import Store
from bfm.report.sections import recipe_table
from bfm.report.standing import status_text
from bfm.report.sweep_view import read_sweep
from bfm.sweep.ledger.ledger import read_state
from bfm.sweep.ledger.state import SweepState
from bfm.sweep.recipe.check import _check_measured, check_record
from bfm.sweep.recipe.recipe import make_recipe
from bfm.sweep.recipe.verdicts import calibration, checks_lines
from tests.sweep.recipe.planted_sizes import RUNGS, LogCosts, evidence, row, rows, sizes_sweep
from tests.sweep.serial import run_serial
from tests.sweep.world import execute, in_memory, make_spec, mortal_ledger, start


@pytest.fixture(scope="module")
def recipe():
    return make_recipe(evidence(sizes_sweep(rows(0))), LogCosts(), 4 * RUNGS[-1], "nll")


def run(recipe, value: float) -> dict:
    extra = {"task_flops": 4 * RUNGS[-1], "eval_flops": 5, "train_s": 1.0, "code_version": "v", "shards_hash": "s"}
    extra |= {"device": "cpu", "model": "trials/run/checkpoints/rung0-model"}
    return row(0, 0, recipe.params.estimate, value, flops=4 * RUNGS[-1], **extra)


def record(recipe, value: float) -> dict:
    return json.loads(json.dumps(check_record(recipe, run(recipe, value), "checks/x", 0), allow_nan=False))


def test_inside_means_within_the_predicted_interval(recipe):
    assert record(recipe, recipe.predicted.estimate)["inside"]
    assert record(recipe, recipe.predicted.high)["inside"]
    above = record(recipe, recipe.predicted.high * 1.01)
    assert not above["inside"]
    assert above["measured"] == recipe.predicted.high * 1.01
    assert above["predicted"] == recipe.predicted.as_dict()
    assert above["error"] == 0.01


def test_a_run_that_does_not_hold_the_metric_is_no_check_of_it(recipe):
    """Of a second metric that the first check's run could not be scored by."""
    other = dataclasses.replace(recipe, metric="coverage@10")
    with pytest.raises(UserError, match=r"has no coverage@10"):
        _check_measured(other, record(recipe, recipe.predicted.estimate), "checks/x")
    _check_measured(recipe, record(recipe, recipe.predicted.estimate), "checks/x")
    with pytest.raises(UserError, match="diverged"):
        _check_measured(recipe, {**run(recipe, 1.0), "status": "diverged"}, "checks/x")


def test_a_check_survives_resume_and_changes_no_decision(recipe, tmp_path):
    spec, store = make_spec(), Store(tmp_path / "s")
    driver = start(spec, store)
    for _ in range(3):
        task = driver.next_task()
        driver.report(task.task_id, execute(task))
    driver.close()
    checked = [record(recipe, recipe.predicted.estimate), record(recipe, recipe.predicted.high * 2)]
    ledger = mortal_ledger(store)
    for one in checked:
        ledger.append([one])
    ledger.close()
    before = driver.state
    resumed = start(spec, store)
    assert resumed.state.checks == checked
    assert (resumed.state.spent_flops, resumed.available_flops) == (before.spent_flops, driver.available_flops)
    run_serial(resumed, execute)
    unbroken = in_memory(spec)
    run_serial(unbroken, execute)
    assert read_state(store).checks == checked
    assert resumed.state.arrivals == unbroken.state.arrivals


def test_old_ledgers_have_no_checks_and_a_torn_record_is_named():
    state = SweepState.fold([{"kind": "opened", "epoch": 1}])
    assert state.checks == []
    assert calibration(state.checks) == {"inside": 0, "checks": 0}
    assert checks_lines(state.checks) == []
    with pytest.raises(CorruptError, match=r"record 1 \(check\): no 'measured'"):
        state.apply({"kind": "check", "flops": 1, "metric": "nll", "predicted": {}})


def test_status_and_report_show_all_checks(recipe, tmp_path):
    spec, store = make_spec(), Store(tmp_path / "s")
    driver = start(spec, store)
    task = driver.next_task()
    driver.report(task.task_id, execute(task))
    driver.close()
    ledger = mortal_ledger(store)
    ledger.append([record(recipe, recipe.predicted.estimate), record(recipe, recipe.predicted.high * 2)])
    view = read_sweep(store.uri)
    assert view.as_dict()["calibration"] == {"inside": 1, "checks": 2}
    assert len(view.state.checks) == 2
    text = status_text(view)
    assert "checks of recipes: 1 of 2 measured values inside their 95 % prediction interval" in text
    assert "outside the predicted" in text
    assert "1 of 2 measured values" in recipe_table(None, view.state.checks).note
    assert not recipe_table(None, [])
