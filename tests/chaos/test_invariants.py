"""The invariants notice what they are there for; and a long planted sweep with losses everywhere keeps to them."""

from __future__ import annotations

import copy
import time

import numpy as np
import pytest

from bfm.sweep.ledger.task import Finished, Task
from bfm.training.task import Account
from tests.chaos.invariants import check_records
from tests.sweep.world import execute, in_memory, make_spec, rows_of, unbroken

NUM_TRIALS = 600


@pytest.fixture(scope="module")
def records():
    """Of a small sweep in which one task was lost and one yielded."""
    driver = in_memory(make_spec(budget={"max_trials": 20}))
    driver.lost(driver.next_task().task_id, "killed")
    driver.yielded(driver.next_task().task_id, Account(10, "progress", 10))
    while isinstance(task := driver.next_task(), Task):
        driver.report(task.task_id, execute(task))
    return driver._ledger.records


def first(records, kind):
    return next(place for place, record in enumerate(records) if record["kind"] == kind)


def twice(records):
    """The row of a task comes again, under a reservation of its own."""
    row = records[first(records, "row")]
    task = next(r for r in records if r["kind"] == "task" and r["task"]["task_id"] == row["task_id"])
    again = {**task, "task": {**task["task"], "task_id": "again"}}
    records[-1:] = [again, {**row, "task_id": "again"}]


def forgotten(records):
    """A finished sweep still owes a task."""
    place = max(place for place, record in enumerate(records) if record["kind"] == "row")
    del records[place]


def overcharged(records):
    records[first(records, "lost")]["charged_flops"] += 1


def above_its_reservation(records):
    row = records[first(records, "row")]["row"]
    row["task_flops"] = row["rung_flops"] * 2


def above_the_cap(records):
    spec = records[first(records, "spec")]["spec"]
    spec["budget"]["total_flops"] = 1.1 * sum(spec["budget"]["ladder_flops"])


def test_a_sweep_with_losses_keeps_them(records) -> None:
    assert check_records(records).finished


@pytest.mark.parametrize("break_", [twice, forgotten, overcharged, above_its_reservation, above_the_cap])
def test_what_is_broken_is_found(records, break_) -> None:
    broken = copy.deepcopy(records)
    break_(broken)
    with pytest.raises(AssertionError):
        check_records(broken)


def test_of_600_trials_with_losses_everywhere_the_rows_are_those_of_an_unbroken_sweep() -> None:
    """One task of twenty dies somewhere on its way, with or without a checkpoint, and the driver now and then, too."""
    spec = make_spec(
        scaling={"max_retries": 1000},
        budget={"max_trials": NUM_TRIALS, "total_flops": "1e16"},
    )
    began_s, rng = time.monotonic(), np.random.default_rng(0)
    whole, _ = unbroken(spec)

    def settle(task: Task) -> Account:
        spent_flops = int(rng.random() * task.reserved_flops)
        saved_flops = task.begins_flops + int(rng.random() * spent_flops)
        return rng.choice([Account(spent_flops), Account(spent_flops, f"{task.task_id}-progress", saved_flops)])

    driver = in_memory(spec, settle=settle)
    while not isinstance(task := driver.next_task(), Finished):
        fate = rng.random()
        if fate < 0.05:
            driver.lost(task.task_id, "killed")
        elif fate < 0.06:
            driver = in_memory(spec, driver._ledger.records, settle=settle)
        else:
            driver.report(task.task_id, execute(task))
    state = check_records(driver._ledger.records)
    assert len(state.losses) > 20
    assert len(state.trials) == NUM_TRIALS
    assert {place: row["metrics"] for place, row in rows_of(state).items()} == {
        place: row["metrics"] for place, row in rows_of(whole.state).items()
    }
    assert time.monotonic() - began_s < 60
