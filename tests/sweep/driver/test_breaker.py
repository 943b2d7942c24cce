"""A fault that is nobody's configuration stops a sweep before it has eaten the cap."""

import pytest

from bfm.errors import PausedError
from bfm.training.task import Account
from tests.sweep.serial import run_serial
from tests.sweep.world import execute, in_memory, make_spec

FULL = "OSError: [Errno 28] No space left on device"


def nothing_trained(task):
    return Account()


def test_two_equal_losses_before_any_row_pause_the_sweep_and_cost_what_was_trained():
    driver = in_memory(make_spec(scaling={"slots": 2}), settle=lambda task: Account(1_000))
    first, second = driver.next_task(), driver.next_task()
    driver.lost(first.task_id, FULL)
    with pytest.raises(PausedError, match=r"paused: 2 of the last 2 .*No space left.*the same command goes on"):
        driver.lost(second.task_id, FULL)
    assert driver.state.spent_flops == 2_000
    assert driver.state.finished is None
    mended = in_memory(driver.spec, driver._ledger.records)
    run_serial(mended, execute)
    assert mended.state.rungs[0]
    assert first.trial in mended.state.rungs[0]


def test_a_full_disk_in_the_middle_pauses_at_the_third_loss_of_five_tasks():
    driver = in_memory(make_spec(scaling={"slots": 8}), settle=nothing_trained)
    tasks = [driver.next_task() for _ in range(8)]
    driver.report(tasks[0].task_id, execute(tasks[0]))
    driver.lost(tasks[1].task_id, FULL)
    driver.report(tasks[2].task_id, execute(tasks[2]))
    driver.lost(tasks[3].task_id, FULL)
    with pytest.raises(PausedError, match="3 of the last 5"):
        driver.lost(tasks[4].task_id, FULL)


def test_losses_of_one_configuration_of_different_kinds_or_by_preemption_do_not_pause():
    driver = in_memory(make_spec(scaling={"max_retries": 5, "slots": 8}), settle=lambda task: Account(10**6))
    for _ in range(4):
        driver.lost(driver.next_task().task_id, "ValueError: this configuration is strange")
    for kind in ("OSError: a", "RuntimeError: b", "its worker process died", "its worker process died"):
        driver.next_task()
        newest = list(driver.state.open_tasks)[-1]
        driver.lost(newest, kind)


def test_workers_that_die_before_they_train_are_a_fault_of_the_place():
    driver = in_memory(make_spec(scaling={"slots": 2}), settle=nothing_trained)
    first, second = driver.next_task(), driver.next_task()
    driver.lost(first.task_id, "its worker process died")
    with pytest.raises(PausedError):
        driver.lost(second.task_id, "its worker process died")
