"""Requests from outside: taken up once, answered by a record, and the sweep goes on from records alone."""

from __future__ import annotations

import itertools

import pytest

from bfm.files import Store
from bfm.sweep.driver.requests import FOLDER, Request, new_requests, put_request, request_words, wait_for_answer
from bfm.sweep.ledger.lease import HEARTBEAT_S, STALE_S, Holder, Lease, driver_of
from bfm.sweep.ledger.ledger import read_state
from bfm.sweep.ledger.state import CANCEL, ENQUEUE, STOP, SweepState
from bfm.sweep.ledger.task import Finished, Task, Wait
from bfm.sweep.policies.arena import ASKED
from bfm.sweep.space.spec import from_dict
from bfm.training.task import Account
from tests.sweep.curves import begin, crossing, table_spec
from tests.sweep.serial import run_serial
from tests.sweep.world import execute, first_tries, in_memory, make_spec, mortal_lease, rows_of, start

OWN = {"params": 1234, "learning_rate": 5e-3}
POLICIES = ["frontier", "asha-promote", "asha-stop", "random", "isoflop-window"]


def ask(driver, verb, **asked):
    ask.count += 1
    return driver.take(Request(f"{ask.count:013d}-x", verb, "ann@desk", asked))


ask.count = 0


def test_requests_are_read_in_order_until_a_record_answers_them(tmp_path):
    store = Store(tmp_path)
    made = [put_request(store, CANCEL, {"trial": f"t0000{number}"}) for number in range(3)]
    assert sorted(made, key=lambda request: request.id) == new_requests(store, ())
    assert "@" in made[0].by
    assert {request.id for request in new_requests(store, {made[1].id})} == {made[0].id, made[2].id}
    assert new_requests(Store(tmp_path / "none"), ()) == []


@pytest.mark.parametrize("damage", [b"", b"{}", b"not json\n{}"])
def test_a_damaged_request_is_refused_once(tmp_path, damage):
    store, driver = Store(tmp_path), in_memory(make_spec())
    request = put_request(store, CANCEL, {"trial": "t00000"})
    whole = store.get(f"{FOLDER}/{request.id}.json")
    for data in (damage, whole[:-3], whole.replace(b"t00000", b"t00001")):
        store.put(f"{FOLDER}/{request.id}.json", data)
        (found,) = new_requests(store, ())
        assert "damaged" in driver.take(found)["refused"]
        assert new_requests(store, driver.state.requests) == []


@pytest.mark.parametrize("asked", [{}, {"trial": ["t00000"]}, {"trial": "t00009"}])
def test_what_makes_no_sense_is_answered_with_the_reason(asked):
    driver = in_memory(make_spec())
    driver.next_task()
    assert ask(driver, CANCEL, **asked)["refused"]
    assert ask(driver, "explode")["refused"] == "nobody knows 'explode'"
    assert ask(driver, ENQUEUE, config=OWN)["refused"]
    assert not driver.state.cancelled
    assert not driver.state.queue


def test_a_stop_is_for_the_run_that_it_was_asked_of():
    driver = in_memory(make_spec())
    assert ask(driver, STOP, epoch=driver._ledger.epoch)["refused"] is None
    assert ask(driver, STOP, epoch=driver._ledger.epoch - 1)["refused"] == "the run that it was for has ended"


def test_a_cancelled_trial_is_never_trained_on():
    driver = in_memory(make_spec())
    tasks = [driver.next_task()]
    driver.report(tasks[0].task_id, execute(tasks[0]))
    record = ask(driver, CANCEL, trial=tasks[0].trial)
    assert record["refused"] is None
    assert "cancel t00000, asked for by ann@desk" in request_words(record)
    assert ask(driver, CANCEL, trial=tasks[0].trial)["refused"] == "TRIAL: t00000 is cancelled already; leave it"
    run_serial(driver, execute)
    assert set(driver.state.trials["t00000"].rows) == {tasks[0].rung}
    assert max(len(trial.rows) for trial in driver.state.trials.values()) > 1, "others go on"


def test_a_running_task_of_a_cancelled_trial_yields_and_is_given_up():
    driver = in_memory(make_spec())
    task = driver.next_task()
    ask(driver, CANCEL, trial=task.trial)
    driver.yielded(task.task_id, Account(400_000_000, "trials/t00000/checkpoints/rung0-a0-progress", 300_000_000))
    other = driver.next_task()
    assert isinstance(other, Task)
    assert other.trial != task.trial
    assert driver.state.abandoned == {(task.trial, task.rung): "it was cancelled by ann@desk"}
    assert driver.state.spent_flops == 400_000_000
    assert "trials/t00000/checkpoints/rung0-a0-progress" in driver._ledger.dropped


def test_a_trial_that_ended_by_itself_cannot_be_cancelled():
    driver = in_memory(make_spec())
    task = driver.next_task()
    driver.report(task.task_id, {**execute(task), "status": "diverged", "checkpoint": None, "metrics": {}})
    assert "t00000 has ended (diverged)" in ask(driver, CANCEL, trial=task.trial)["refused"]


@pytest.mark.parametrize("policy", POLICIES)
def test_an_own_configuration_comes_next_and_is_a_trial_like_others(policy):
    driver = in_memory(make_spec(scheduler={"type": policy}))
    first = driver.next_task()
    driver.report(first.task_id, execute(first))
    record = ask(driver, ENQUEUE, config=OWN, seed=3)
    assert record["refused"] is None
    assert record["config"]["params"] == 1234
    again = in_memory(driver.spec, driver._ledger.records)
    task = again.next_task()
    trial = again.state.trials[task.trial]
    assert (trial.config["params"], trial.config["learning_rate"], trial.seed) == (1234, 5e-3, 3)
    assert trial.source == ASKED
    assert again.state.decisions[-1]["reason"] == "asked for by ann@desk"
    again.report(task.task_id, execute(task))
    run_serial(again, execute)
    state = again.state
    assert state.spent_flops <= again.spec.budget.total_flops
    assert sum(trial.source == ASKED for trial in state.trials.values()) == 1
    assert not state.queue
    assert SweepState.fold(again._ledger.records) == state


def test_what_lies_outside_the_ranges_may_be_tried_but_not_outside_the_space():
    driver = in_memory(make_spec(method="optuna", scheduler={"type": "frontier"}))
    assert ask(driver, ENQUEUE, config={"params": 20_000, "learning_rate": 1e-5}, seed=0)["refused"] is None
    refused = ask(driver, ENQUEUE, config={**OWN, "dropout": 0.5}, seed=0)["refused"]
    assert "dropout: is 0.0 all over this space, not 0.5" in refused
    assert "unknown key" in ask(driver, ENQUEUE, config={**OWN, "lr": 0.5}, seed=0)["refused"]
    assert "steps" in ask(driver, ENQUEUE, config={"params": 1e11, "learning_rate": 1e-3}, seed=0)["refused"]
    run_serial(driver, execute)
    assert driver.state.finished


def test_what_was_written_is_blamed_and_not_what_follows_from_it():
    values = make_spec(method="optuna", scheduler={"type": "frontier"}).as_dict()
    del values["parameters"]["learning_rate"]
    driver = in_memory(from_dict(values))
    refused = ask(driver, ENQUEUE, config={"params": 1234, "window": 8}, seed=0)["refused"]
    assert refused.startswith("window: is ")


def test_the_same_is_not_tried_twice():
    driver = in_memory(make_spec())
    assert ask(driver, ENQUEUE, config=OWN, seed=0)["refused"] is None
    assert "waits in the queue already" in ask(driver, ENQUEUE, config=OWN, seed=0)["refused"]
    assert ask(driver, ENQUEUE, config=OWN, seed=1)["refused"] is None
    task = driver.next_task()
    assert f"it is {task.trial} already" in ask(driver, ENQUEUE, config=OWN, seed=0)["refused"]


def test_what_has_not_begun_is_cancelled_by_its_request():
    driver = in_memory(make_spec())
    first, second = (ask(driver, ENQUEUE, config=OWN, seed=seed)["id"] for seed in (0, 1))
    assert ask(driver, CANCEL, trial=first)["refused"] is None
    assert list(driver.state.queue) == [second]
    assert driver.state.trials[driver.next_task().trial].seed == 1


def test_the_cap_is_above_requests():
    driver = in_memory(make_spec())
    run_serial(driver, execute)
    left = driver.spec.budget.total_flops - driver.state.spent_flops
    refused = ask(driver, ENQUEUE, config=OWN, seed=0)["refused"]
    if left < 10**9:
        assert "its first row costs 1e9 FLOPs" in refused
        assert driver.state.finished
    else:
        assert refused is None
        assert driver.state.finished is None
    run_serial(driver, execute)
    assert driver.state.spent_flops <= driver.spec.budget.total_flops


def test_what_running_tasks_leave_no_room_for_waits_and_is_then_refused():
    spec = make_spec(budget={"ladder_flops": ["1e9"], "total_flops": "2e9"}, scaling={"slots": 3})
    driver = in_memory(spec)
    tasks = [driver.next_task(), driver.next_task()]
    request = ask(driver, ENQUEUE, config=OWN, seed=0)
    assert request["refused"] is None
    assert isinstance(driver.next_task(), Wait)
    for task in tasks:
        driver.report(task.task_id, execute(task))
    assert isinstance(driver.next_task(), Finished)
    assert "the cap has no room for it" in driver.state.requests[request["id"]]["refused"]
    assert not driver.state.queue


def test_a_finished_sweep_takes_up_what_is_asked_of_it():
    driver = in_memory(make_spec(budget={"max_trials": 3, "total_flops": "1e12"}))
    run_serial(driver, execute)
    assert driver.state.finished
    assert ask(driver, ENQUEUE, config=OWN, seed=0)["refused"] is None
    assert driver.state.finished is None
    run_serial(driver, execute)
    assert driver.state.finished
    assert any(trial.source == ASKED for trial in driver.state.trials.values())


def test_a_sweep_with_requests_is_the_same_after_a_crash_anywhere():
    spec = make_spec(budget={"max_trials": 8, "total_flops": "1e12", "ladder_flops": ["1e9", "4e9"]})

    def steered(driver):
        """After the third row one configuration is asked for, after the fifth the first trial is cancelled."""
        while not isinstance(task := driver.next_task(), Finished):
            driver.report(task.task_id, execute(task))
            rows, taken = len(driver.state.arrivals), driver.state.requests
            if rows >= 3 and "a" not in taken:
                driver.take(Request("a", ENQUEUE, "ann", {"config": OWN, "seed": 0}))
            if rows >= 5 and "b" not in taken:
                driver.take(Request("b", CANCEL, "ann", {"trial": "t00000"}))
        return driver

    whole, batches = in_memory(spec), []
    append = whole._ledger.append
    whole._ledger.append = lambda records: (append(records), batches.append(len(whole._ledger.records)))
    records = steered(whole)._ledger.records
    assert whole.state.cancelled == {"t00000": "ann"}
    for cut in batches:
        if records[cut - 1]["kind"] == "row":
            # The request that follows at once may be the next one's to take.
            continue
        driver = steered(in_memory(spec, records[:cut]))
        assert first_tries(driver._ledger.records) == first_tries(records)
        assert rows_of(driver.state) == rows_of(whole.state)


def test_requests_stay_answered_in_files(tmp_path):
    store = Store(tmp_path)
    driver = start(make_spec(), store)
    request = put_request(store, ENQUEUE, {"config": OWN, "seed": 0})
    for _ in range(2):
        for found in new_requests(store, driver.state.requests):
            driver.take(found)
        driver = start(make_spec(), store)
    state = read_state(store)
    assert list(state.requests) == [request.id]
    assert len(state.queue) == 1


def test_an_answer_is_waited_for_as_long_as_is_said(tmp_path):
    request = put_request(Store(tmp_path), CANCEL, {"trial": "t00000"})
    driver, naps = in_memory(make_spec()), []
    clock = itertools.count(0.0, 5.0).__next__
    assert wait_for_answer(request, lambda: driver.state, limit_s=20, clock=clock, sleep=naps.append) is None
    assert 1 < len(naps) < 6
    record = driver.take(request)
    assert wait_for_answer(request, lambda: driver.state) == record


def test_who_drives_a_sweep_is_told_from_its_lease(tmp_path):
    store = Store(tmp_path)
    assert driver_of(store) is None
    lease = Lease.acquire(store, heartbeat_s=None)
    assert driver_of(store)["epoch"] == 1
    lease.release()
    assert driver_of(store) is None
    mortal_lease(store)
    assert driver_of(store)["epoch"] == 2
    assert driver_of(store, clock=lambda: 1e12) is None
    here = Holder.this_process()
    gone = Holder(here.host, here.machine, here.pid, here.started_at_s + 1e6)
    Lease.acquire(store, holder=gone, heartbeat_s=None, clock=itertools.count(0.0, STALE_S).__next__)
    assert driver_of(store) is None
    assert HEARTBEAT_S < STALE_S


def test_own_configurations_of_a_table_are_refused():
    driver = begin(table_spec("random", 10**12), crossing([1000, 2000]))
    assert "known curves cannot be added to" in ask(driver, ENQUEUE, config=OWN, seed=0)["refused"]
