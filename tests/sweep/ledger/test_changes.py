"""What a resumed and an extended sweep may change, and that the work so far keeps its worth."""

from __future__ import annotations

import pytest

from bfm.errors import UserError
from bfm.sweep.ledger.state import SweepState
from bfm.sweep.ledger.task import Finished
from tests.sweep.serial import run_serial
from tests.sweep.world import execute, in_memory, make_spec

RATE = {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1}
WIDER = {"params": {"distribution": "log_uniform_values", "min": 300, "max": 30000}, "learning_rate": RATE}


def finished(**changes):
    driver = in_memory(make_spec(**changes))
    run_serial(driver, execute)
    return driver


@pytest.fixture(scope="module")
def done():
    return finished()._ledger.records


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"budget": {"ladder_flops": ["1e9", "4e9", "16e9", "32e9"]}}, "budget.ladder_flops"),
        ({"seeds": [0, 1]}, "seeds"),
        ({"method": "optuna"}, "method"),
        ({"parameters": WIDER}, "parameters.params.max"),
        ({"scheduler": {"type": "frontier"}}, "scheduler.type"),
    ],
)
def test_what_extends_a_sweep_asks_for_the_flag(done, changes, key):
    with pytest.raises(UserError, match="--extend") as caught:
        in_memory(make_spec(**changes), done)
    assert caught.value.key == key
    in_memory(make_spec(**changes), done, extend=True)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"metric": {"name": "recall@10"}}, "metric.goal"),
        ({"data": {"evaluation_queries": 5}}, "data.evaluation_queries"),
        ({"budget": {"tolerance": 0.005}}, "budget.tolerance"),
        ({"budget": {"ladder_flops": ["1e9", "5e9", "16e9"]}}, "budget.ladder_flops"),
        ({"budget": {"ladder_flops": ["5e8", "1e9", "4e9", "16e9"]}}, "budget.ladder_flops"),
        ({"budget": {"ladder_flops": ["1e9", "4e9"]}}, "budget.ladder_flops"),
        ({"seeds": [1, 0]}, "seeds"),
        ({"parameters": {**WIDER, "cooldown_fraction": {"value": 0.1}}}, "parameters.cooldown_fraction"),
        ({"probes": ["5e8"]}, "probes"),
    ],
)
def test_what_would_spoil_rows_or_trunks_is_refused_even_then(done, changes, key):
    with pytest.raises(UserError) as caught:
        in_memory(make_spec(**changes), done, extend=True)
    assert caught.value.key == key
    assert caught.value.fix


LOG = {"shards_hash": "s" * 64, "protocol_hash": "p" * 64}


@pytest.mark.parametrize("key", [*LOG, "flops_version"])
def test_rows_of_another_log_or_version_are_refused_and_counted(done, key):
    rows = sum(record["kind"] == "row" for record in done)
    trained = [{**record, "row": {**record["row"], **LOG}} if record["kind"] == "row" else record for record in done]
    moved = in_memory(make_spec(data={"shards": "elsewhere"}), trained, log=LOG)
    assert moved.state.spec["data"]["shards"] == "elsewhere", "the same shards at another path are the same"
    other = [{**record, "row": {**record["row"], key: 1}} if record["kind"] == "row" else record for record in trained]
    with pytest.raises(UserError, match=f"{rows} rows of the sweep are of"):
        in_memory(make_spec(), other, log=LOG)


def test_nothing_to_extend_is_said():
    with pytest.raises(UserError, match="no sweep to extend") as caught:
        in_memory(make_spec(), extend=True)
    assert caught.value.key == "--extend"


@pytest.mark.parametrize("cut", [3, 20, None])
def test_extending_by_nothing_changes_nothing(done, cut):
    plain, extended = (in_memory(make_spec(), done[:cut], extend=extend) for extend in (False, True))
    run_serial(plain, execute)
    run_serial(extended, execute)
    assert plain._ledger.records == extended._ledger.records


MORE_RUNGS = {"budget": {"ladder_flops": ["1e9", "4e9", "16e9", "48e9"], "total_flops": "500e9"}}


@pytest.mark.parametrize("policy", ["frontier", "asha-promote", "random"])
@pytest.mark.parametrize(
    "changes",
    [
        MORE_RUNGS,
        {"parameters": WIDER, "budget": {"total_flops": "220e9"}},
        {"seeds": [0, 1], "budget": {"total_flops": "220e9"}},
        {"method": "optuna", "budget": {"total_flops": "200e9"}},
    ],
)
def test_a_finished_sweep_goes_on_and_trains_nothing_again(done, policy, changes):
    before = SweepState.fold(done)
    assert before.finished
    driver = in_memory(make_spec(**{"scheduler": {"type": policy}, **changes}), done, extend=True)
    assert driver.state.finished is None
    tasks = []
    run_serial(driver, lambda task: tasks.append(task) or execute(task))
    assert tasks
    places = [(task.trial, task.rung) for task in tasks]
    assert len(set(places)) == len(places)
    assert not set(places) & set(before.arrivals)
    assert driver.state.arrivals[: len(before.arrivals)] == before.arrivals
    assert driver.state.spent_flops <= driver.spec.budget.total_flops
    for task in tasks:
        if task.trial in before.trials:
            assert task.resume_from
    assert isinstance(in_memory(driver.spec, driver._ledger.records).next_task(), Finished)


@pytest.mark.parametrize("policy", ["frontier", "asha-promote"])
def test_new_rungs_are_served_from_the_trials_at_hand(done, policy):
    before = SweepState.fold(done)
    driver = in_memory(make_spec(scheduler={"type": policy}, **MORE_RUNGS), done, extend=True)
    run_serial(driver, execute)
    assert set(driver.state.rungs[3]) & set(before.trials)


def test_decisions_of_an_extended_sweep_use_the_old_rows(done):
    """A space that shrinks to bad rates is searched where the old rows were best."""
    spec = make_spec(scheduler={"type": "frontier"}, **MORE_RUNGS)
    driver = in_memory(spec, done, extend=True)
    first = driver.next_task()
    assert first.trial not in SweepState.fold(done).rungs[0]
    reasons = [record["reason"] for record in driver._ledger.records if record["kind"] == "task"]
    assert "expected" in reasons[-1]
    fresh = in_memory(spec)
    fresh.next_task()
    assert "opening" in fresh._ledger.records[-1]["reason"]


def test_trials_outside_a_smaller_or_other_space_stay_known():
    driver = finished(scheduler={"type": "frontier"}, method="optuna")
    parameters = {
        "params": {"distribution": "log_uniform_values", "min": 2000, "max": 30000},
        "learning_rate": {"value": 0.004},
        "weight_decay": {"distribution": "log_uniform_values", "min": 1e-3, "max": 1},
        "warmup_events": {"values": [None, 100]},
    }
    spec = make_spec(
        scheduler={"type": "frontier"}, method="optuna", parameters=parameters, budget={"total_flops": "260e9"}
    )
    more = in_memory(spec, driver._ledger.records, extend=True)
    assert {axis.name for axis in more.arena.axes.numbers} == {"learning_rate", "weight_decay"}
    run_serial(more, execute)
    assert set(driver.state.trials) < set(more.state.trials)
    new = [trial for name, trial in more.state.trials.items() if name not in driver.state.trials]
    assert all(trial.params >= 2000 and trial.config["learning_rate"] == 0.004 for trial in new)
    assert more.policy._beliefs.num_rows == sum(
        row["status"] == "ok" for rows in more.state.rungs.values() for row in rows.values()
    )


def test_seeds_that_are_appended_are_trained():
    before = finished(scheduler={"type": "frontier"})
    spec = make_spec(scheduler={"type": "frontier"}, seeds=[0, 1], budget={"total_flops": "250e9"})
    driver = in_memory(spec, before._ledger.records, extend=True)
    run_serial(driver, execute)
    new = [trial for name, trial in driver.state.trials.items() if name not in before.state.trials]
    assert {trial.seed for trial in new} == {0, 1}


def test_a_grid_that_grows_gives_its_new_points():
    parameters = {"params": {"values": [500, 1000]}, "learning_rate": {"values": [0.001, 0.004]}}
    wider = {"params": {"values": [500, 700, 1000]}, "learning_rate": {"values": [0.001, 0.004]}}
    before = finished(method="grid", parameters=parameters)
    assert len(before.state.trials) == 4
    driver = in_memory(
        make_spec(method="grid", parameters=wider, budget={"total_flops": "300e9"}), before._ledger.records, extend=True
    )
    run_serial(driver, execute)
    assert [trial.params for trial in list(driver.state.trials.values())[4:]] == [700, 700]
