"""Running out of memory teaches which points are infeasible."""

from __future__ import annotations

import pytest

from bfm.sweep.ledger.state import SweepState
from bfm.sweep.space.space import FeasibleSet
from bfm.training.config import TrainConfig
from tests.sweep.serial import run_serial
from tests.sweep.world import PlantedCosts, execute, in_memory, make_spec

TIERS = {"tiers": [{"workers": 1}, {"from_rung_flops": "4e9", "micro_groups": 2}]}
POLICIES = ["frontier", "asha-promote", "asha-stop", "random", "isoflop-window"]


def too_small(limit, rungs):
    """Models above a limit run out of memory at some rungs."""

    def run(task):
        row = execute(task)
        if task.config["params"] > limit and task.rung in rungs:
            row |= {"status": "oom", "checkpoint": None, "metrics": {}, "task_flops": 0}
        return row

    return run


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rungs", [(0, 1, 2), (1, 2), (2,)])
def test_nothing_estimated_larger_is_tried_again_at_that_tier(policy, rungs):
    driver = in_memory(make_spec(scheduler={"type": policy}, scaling=TIERS))
    order = []

    def run(task):
        kind, needed_bytes = driver._memory(task)
        assert needed_bytes < driver.state.memory_limits.get(kind, float("inf"))
        row = too_small(2000, rungs)(task)
        order.append(row["status"])
        return row

    run_serial(driver, run)
    state = driver.state
    assert "ok" in order
    if "oom" in order:
        assert state.memory_limits
    for trial in state.trials.values():
        assert "oom" not in [row["status"] for row in trial.rows.values()][:-1]
    assert SweepState.fold(driver._ledger.records) == state


def test_the_limit_is_the_smallest_that_ran_out():
    driver = in_memory(make_spec(scheduler={"type": "random"}, scaling=TIERS))
    run_serial(driver, too_small(1000, (0, 1, 2)))
    ran_out = [trial for trial in driver.state.trials.values() if trial.rows[max(trial.rows)]["status"] == "oom"]
    sizes = [trial.params for trial in ran_out]
    assert sizes == sorted(sizes, reverse=True)
    (limit,) = driver.state.memory_limits.values()
    assert limit == min(driver.arena.feasible.places(trial.config, 0, {})[0].needed_bytes for trial in ran_out)


def test_another_tier_has_another_memory():
    driver = in_memory(make_spec(scheduler={"type": "random"}))
    run_serial(driver, too_small(1000, (0, 1, 2)))
    config = next(trial.config for trial in driver.state.trials.values() if trial.rows[0]["status"] == "oom")
    assert not driver.arena.places(config, 0, driver.state.memory_limits)
    wider = make_spec(scheduler={"type": "random"}, scaling={"tiers": [{"engine": "deepspeed", "workers": 1}]})
    again = in_memory(wider, driver._ledger.records)
    assert again.arena.places(config, 0, again.state.memory_limits)


def test_a_space_in_which_all_runs_out_ends():
    spec = make_spec(
        method="grid",
        parameters={"params": {"values": [500, 1000]}, "learning_rate": {"values": [0.001, 0.004]}},
        seeds=2,
    )
    driver = in_memory(spec)
    run_serial(driver, too_small(0, (0, 1, 2)))
    assert [trial.params for trial in driver.state.trials.values()] == [500]
    for method in ("random", "optuna"):
        driver = in_memory(make_spec(method=method, scheduler={"type": "frontier"}))
        run_serial(driver, too_small(0, (0,)))
        assert driver.state.finished


def test_optuna_does_not_take_it_for_a_bad_loss():
    driver = in_memory(
        make_spec(
            method="optuna", scheduler={"type": "random"}, budget={"ladder_flops": ["1e9"], "total_flops": "30e9"}
        )
    )
    run_serial(driver, too_small(5000, (0,)))
    told, losses, running = driver.arena.proposer._told(driver.state, driver.state.rungs, 0)
    ok = [row for row in driver.state.rungs[0].values() if row["status"] != "oom"]
    assert len(ok) < len(driver.state.rungs[0])
    assert len(told) + len(running) == len(losses) == len(ok)


@pytest.mark.parametrize(("groups", "workers"), [(2, 2), (6, 2), (3, 1), (8, 4)])
def test_a_trial_that_a_new_tier_cannot_share_out_goes_on_with_as_many_workers_as_can(groups, workers):
    spec = make_spec(scaling={"tiers": [{"engine": "deepspeed", "workers": 4}]})
    config = TrainConfig(params=1000, groups_per_step=groups).as_dict()
    (place,) = FeasibleSet(spec, PlantedCosts()).places(config, 0, {})
    assert place.scaling["workers"] == workers


def test_a_note_ahead_of_the_work_is_charged_no_more_than_was_reserved():
    driver = in_memory(make_spec(scaling=TIERS))
    task = driver.next_task()
    row = execute(task) | {"status": "oom", "checkpoint": None, "metrics": {}, "task_flops": 5 * task.reserved_flops}
    assert driver.report(task.task_id, row)
    assert driver.state.spent_flops == task.reserved_flops
