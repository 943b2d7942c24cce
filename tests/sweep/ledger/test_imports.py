"""Runs from a table: they teach, cost nothing, are promoted at full cost, and never stand twice."""

from __future__ import annotations

import json
import math

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from bfm.errors import UserError
from bfm.model.flops import FLOPS_VERSION
from bfm.sweep.ledger.state import SweepState
from bfm.sweep.ledger.task import Task
from tests.report.planted import page_of
from tests.sweep.serial import run_serial
from tests.sweep.world import execute, import_runs, in_memory, make_spec, planted_loss

POLICIES = ["frontier", "asha-promote", "asha-stop", "random", "isoflop-window"]
RUNGS = (10**9, 4 * 10**9, 16 * 10**9)


def run(params, rate, flops=RUNGS[0], **more):
    config = {"params": params, "learning_rate": rate, "embedder_share": 0.02}
    return {"params": params, "learning_rate": rate, "flops": flops, "nll": planted_loss(config, flops), **more}


@pytest.fixture
def table(tmp_path):
    def write(runs, suffix=".csv"):
        path = tmp_path / f"runs{suffix}"
        if suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in runs))
        else:
            {".csv": pyarrow.csv.write_csv, ".parquet": pyarrow.parquet.write_table}[suffix](
                pa.Table.from_pylist(runs), path
            )
        return path

    return write


def many():
    return [
        run(params, rate, flops)
        for params in (400, 900, 2000, 4500)
        for rate in (0.001, 0.004, 0.02)
        for flops in RUNGS[:2]
    ]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_rows_stand_under_x_names_and_cost_nothing(table, suffix):
    driver = in_memory(make_spec())
    runs = [{**one, "seed": 0} for one in many()]
    words = import_runs(driver, table([*runs, run(700, 0.004, 1.004e9, seed=3)], suffix))
    state = driver.state
    assert (state.spent_flops, state.num_proposals, len(state.trials)) == (0, 0, 13)
    assert list(state.trials) == [f"x{number:05d}" for number in range(13)]
    assert all(trial.source == "import" and trial.number is None for trial in state.trials.values())
    assert state.arrivals[:2] == [("x00000", 0), ("x00000", 1)]
    row = state.rungs[0]["x00012"]
    assert (row["seed"], row["path_flops"], row["task_flops"], row["checkpoint"]) == (
        3,
        1004000000,
        0,
        None,
    )
    assert SweepState.fold(driver._ledger.records) == state
    assert words == "imported 25 rows of 13 new trials from runs" + suffix


def test_what_is_of_no_use_is_counted_and_told(table):
    runs = [
        run(500, 0.004),
        run(500, 0.004, 2e9),
        run(500, 0.004, 1.02e9),
        run(50000, 0.004),
        {**run(500, 0.9), "nll": 3.0},
        {**run(600, 0.004), "nll": None},
    ]
    driver = in_memory(make_spec(budget={"events_per_param": [0, 1e6]}))
    words = import_runs(driver, table(runs, ".parquet"))
    (counts,) = driver.state.imports
    assert counts == {
        "file": "runs.parquet",
        "rows": 1,
        "trials": 1,
        "known": 0,
        "left_out": {
            "no rung within 1 % of its flops": 2,
            "params outside the space": 1,
            "learning_rate outside the space": 1,
            "nll is no finite number": 1,
        },
    }
    assert "left out: no rung within 1 % of its flops (2)" in words
    narrow = make_spec(budget={"events_per_param": [0, 100]})
    with pytest.raises(UserError, match="none of its 1 runs is of use; 1: D/N above 100"):
        import_runs(in_memory(narrow), table([run(500, 0.004)]))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_runs_of_another_protocol_are_left_out(table, suffix):
    runs = [run(700, 0.004, protocol_hash="here"), run(800, 0.004, protocol_hash="there"), run(900, 0.004)]
    runs[2]["protocol_hash"] = "" if suffix == ".csv" else None
    driver = in_memory(make_spec())
    words = import_runs(driver, table(runs, suffix), "here")
    assert [trial.config["params"] for trial in driver.state.trials.values()] == [700, 900]
    assert "scored by another protocol (1)" in words


def test_a_number_that_is_none_is_a_reason(table):
    depths = {"distribution": "int_uniform", "min": 1, "max": 6}
    spec = make_spec(parameters={**make_spec().as_dict()["parameters"], "aspect": depths})
    runs = [run(500, 0.004, aspect=value) for value in (2.0, math.nan, math.inf, None, 2.5)]
    driver = in_memory(spec)
    import_runs(driver, table(runs, ".parquet"))
    (counts,) = driver.state.imports
    assert (counts["rows"], counts["left_out"]) == (2, {"aspect outside the space": 3})


@pytest.mark.parametrize("versions", [(FLOPS_VERSION, math.nan, 0.5), (str(FLOPS_VERSION), f"v{FLOPS_VERSION}", "")])
def test_runs_of_another_version_are_left_out(table, versions):
    runs = [run(500 + place, 0.004, flops_version=version) for place, version in enumerate(versions)]
    driver = in_memory(make_spec())
    import_runs(driver, table(runs, ".parquet"))
    (counts,) = driver.state.imports
    others = sum(version not in (FLOPS_VERSION, str(FLOPS_VERSION), "") for version in versions)
    assert counts["left_out"] == {"of another version of the objective and of C": others}


@pytest.mark.parametrize("policy", POLICIES)
def test_imported_trials_are_promoted_from_nothing_and_numbers_are_not_disturbed(table, policy):
    spec = make_spec(scheduler={"type": policy}, method="optuna")
    driver = in_memory(spec)
    import_runs(driver, table(many()))
    tasks = []
    run_serial(driver, lambda task: tasks.append(task) or execute(task))
    state = driver.state
    own = [trial for trial in state.trials.values() if trial.source != "import"]
    assert [trial.number for trial in own] == list(range(state.num_proposals))
    assert len({trial.trial for trial in own}) == len(own)
    assert not {(t.trial, t.rung) for t in tasks} & {(n, r) for n, r in state.arrivals[:24]}
    for task in tasks:
        first = task.trial.startswith("x") and not any(t.trial == task.trial and t.rung < task.rung for t in tasks)
        if first:
            assert (task.resume_from, task.from_rung, task.reserved_flops) == (None, None, RUNGS[task.rung])
    assert state.spent_flops == sum(execute(task)["task_flops"] for task in tasks) <= spec.budget.total_flops
    assert state.redone_flops == 0
    if policy == "asha-promote":
        assert any(task.trial.startswith("x") for task in tasks)
    if policy == "random":
        assert not any(task.trial.startswith("x") for task in tasks)


def test_they_teach_the_surrogate_and_optuna(table):
    driver = in_memory(make_spec(scheduler={"type": "frontier"}, method="optuna"))
    import_runs(driver, table(many()))
    task = driver.next_task()
    assert isinstance(task, Task)
    assert driver.policy._beliefs.num_rows == 24
    told, losses, running = driver.arena.proposer._told(driver.state, driver.state.rungs, 1)
    assert (len(told), len(losses), len(running)) == (12, 12, 1)
    assert any(proposal.source == "optuna" for proposal in driver.arena.pool(driver.state, 0))


def test_importing_twice_adds_only_what_is_new(table):
    spec = make_spec(scheduler={"type": "frontier"})
    driver = in_memory(spec)
    import_runs(driver, table(many()))
    count = len(driver._ledger.records)
    again = in_memory(spec, driver._ledger.records)
    words = import_runs(again, table(many()))
    assert again.state.trials == driver.state.trials
    assert len(again._ledger.records) == count + 1
    assert "24 known already" in words
    more = in_memory(spec, again._ledger.records)
    import_runs(more, table([*many(), run(400, 0.001, RUNGS[2]), run(401, 0.001)]))
    assert set(more.state.trials["x00000"].rows) == {0, 1, 2}
    assert list(more.state.trials)[12:] == ["x00012"]
    # Two runs of one configuration that have names of their own are two trials, without names they are one.
    named = [run(500, 0.004, config_id="a"), run(500, 0.004, config_id="b")]
    for runs, trials in ((named, 2), ([run(500, 0.004)] * 2, 1)):
        driver = in_memory(spec)
        import_runs(driver, table(runs))
        assert len(driver.state.trials) == trials


def test_rows_that_the_sweep_has_trained_itself_are_known(table):
    driver = in_memory(make_spec(scheduler={"type": "random"}))
    run_serial(driver, execute)
    rows = [row for row in driver.state.rungs[0].values() if row["status"] == "ok"]
    runs = [run(row["config"]["params"], row["config"]["learning_rate"], row["path_flops"]) for row in rows]
    again = in_memory(driver.spec, driver._ledger.records)
    import_runs(again, table(runs))
    assert again.state.finished
    assert list(again.state.trials) == list(driver.state.trials)


def test_a_finished_sweep_that_learns_something_new_decides_again(table):
    driver = in_memory(make_spec())
    run_serial(driver, execute)
    again = in_memory(driver.spec, driver._ledger.records)
    import_runs(again, table(many()))
    assert again.state.finished is None
    run_serial(again, execute)
    assert again.state.spent_flops <= again.spec.budget.total_flops


def test_a_table_without_a_column_is_one_line(table):
    path = table([{"params": 500, "flops": 1e9, "nll": 3.0}])
    with pytest.raises(UserError, match="no column 'learning_rate'") as caught:
        import_runs(in_memory(make_spec()), path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        import_runs(in_memory(make_spec()), "nowhere.csv")


def test_the_report_shows_them(table):
    driver = in_memory(make_spec(scheduler={"type": "frontier"}))
    import_runs(driver, table(many()))
    run_serial(driver, execute)
    assert "x0000" in page_of({"rows": driver.state.all_rows(), "state": driver.state, "baselines": {}})
