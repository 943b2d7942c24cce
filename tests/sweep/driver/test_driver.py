"""The driver: the cap holds whatever happens, and a driver killed at any point is resumed as if it had lived."""

from __future__ import annotations

import json

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from bfm.errors import CorruptError, InfeasibleError, UserError
from bfm.files import Store
from bfm.sweep.ledger.ledger import read_ledger, read_state
from bfm.sweep.ledger.state import SweepState
from bfm.sweep.ledger.task import Finished, Task, Wait
from bfm.sweep.space.spec import from_dict
from bfm.training.task import Account
from tests.sweep.cap_machine import CapMachine
from tests.sweep.serial import run_serial
from tests.sweep.world import GRID, execute, first_tries, in_memory, make_spec, rows_of, start, unbroken


class DriverMachine(CapMachine):
    """Sweeps under a quota that are extended, and that change their policy, on the way."""

    @initialize(
        slots=st.integers(1, 4),
        seeds=st.integers(1, 2),
        total=st.integers(21, 120),
        method=st.sampled_from(["random", "grid"]),
        policy=st.sampled_from(["asha-promote", "asha-stop", "random", "isoflop-window"]),
        quota=st.sampled_from([None, 0.5, 2]),
    )
    def begin(self, slots, seeds, total, method, policy, quota):
        self.changes = {
            "scaling": {"slots": slots},
            "seeds": seeds,
            "method": method,
            "scheduler": {"type": policy},
            "storage": {"checkpoints_gib": quota},
            "budget": {"total_flops": total * 10**9},
            **({"parameters": GRID} if method == "grid" else {}),
        }
        self.open_with(**self.changes)

    @rule(
        more=st.integers(60, 90),
        policy=st.sampled_from(["asha-promote", "asha-stop", "random"]),
        seeds=st.integers(2, 3),
    )
    def extend(self, more, policy, seeds):
        self.closed += self.open()
        budget = {"ladder_flops": ["1e9", "4e9", "16e9", "32e9"]}
        budget["total_flops"] = self.spec.budget.total_flops + more * 10**9
        self.changes |= {"scheduler": {"type": policy}, "seeds": max(seeds, len(self.spec.seeds)), "budget": budget}
        self.spec = make_spec(**self.changes)
        self.driver = in_memory(self.spec, self.driver._ledger.records, extend=True, settle=self.settle)


DriverMachine.TestCase.settings = settings(max_examples=6, stateful_step_count=25, deadline=None)
TestCap = DriverMachine.TestCase


@pytest.mark.parametrize("method", ["optuna", "random"])
def test_a_sweep_that_the_cap_does_not_end_is_the_same_after_a_crash_anywhere(method):
    spec = make_spec(method=method, budget={"max_trials": 14, "total_flops": "1e12", "ladder_flops": ["1e9", "4e9"]})
    whole, batches = unbroken(spec)
    for cut in batches[:: 3 if method == "optuna" else 1]:
        driver = in_memory(spec, whole._ledger.records[:cut])
        run_serial(driver, execute)
        assert first_tries(driver._ledger.records) == first_tries(whole._ledger.records)
        assert rows_of(driver.state) == rows_of(whole.state)
        assert driver.state.spent_flops - driver.state.lost_flops == whole.state.spent_flops


def test_decisions_after_a_crash_are_the_unbroken_ones_until_the_cap_binds():
    spec = make_spec()
    whole, batches = unbroken(spec)
    expected = first_tries(whole._ledger.records)
    # What was left under the cap at each decision of the unbroken run.
    left, state = [], SweepState()
    for record in whole._ledger.records:
        if record["kind"] == "task":
            left.append(spec.budget.total_flops - state.spent_flops - record["task"]["reserved_flops"])
        state.apply(record)
    for cut in batches[::2]:
        driver = in_memory(spec, whole._ledger.records[:cut])
        run_serial(driver, execute)
        needed = driver.state.lost_flops + spec.ascent_flops(0.2, 2)
        free = sum(flops >= needed for flops in left)
        assert first_tries(driver._ledger.records)[:free] == expected[:free]
        assert driver.state.spent_flops <= spec.budget.total_flops
        assert driver.state.rungs[2]
        for place, row in rows_of(driver.state).items():
            assert rows_of(whole.state).get(place, row) == row


def test_crashes_in_the_middle_of_files(tmp_path):
    """Real ledgers, leases and takeovers: every driver dies after two tasks, with a third one open."""
    spec = make_spec()
    whole, _ = unbroken(spec)
    drivers, state = 0, None
    while state is None or state.finished is None:
        driver = start(spec, Store(tmp_path))
        drivers += 1
        for _ in range(2):
            task = driver.next_task()
            if isinstance(task, Finished):
                break
            driver.report(task.task_id, execute(task))
        driver.next_task()
        state = read_state(Store(tmp_path))
        assert drivers < 100
    assert state.spent_flops <= spec.budget.total_flops
    assert state.lost_flops > 0
    for place, row in rows_of(state).items():
        assert rows_of(whole.state).get(place, row) == row


def test_open_tasks_are_charged_and_come_first():
    driver = in_memory(make_spec(scaling={"slots": 3}))
    tasks = [driver.next_task() for _ in range(3)]
    assert isinstance(driver.next_task(), Wait)
    again = in_memory(driver.spec, driver._ledger.records)
    assert again.state.spent_flops == 3 * 10**9 == again.state.lost_flops
    retried = [again.next_task() for _ in range(3)]
    assert [(task.trial, task.rung) for task in retried] == [(task.trial, task.rung) for task in tasks]
    assert {task.task_id for task in retried}.isdisjoint(task.task_id for task in tasks)
    assert len(again.state.trials) == 3


def test_a_task_whose_worker_dies_again_and_again_is_given_up():
    driver = in_memory(make_spec(scaling={"max_retries": 2}))
    first = driver.next_task()
    for expected in range(3):
        assert first.task_id == f"t00000-r0-a{expected}"
        driver.lost(first.task_id, "out of luck")
        first = driver.next_task()
    assert first.trial == "t00001"
    assert driver.state.abandoned == {("t00000", 0): "it was lost 3 times and got no further"}


def test_a_lost_task_is_charged_what_it_may_have_trained_and_reserves_the_rest():
    account = Account(700_000_000, "trials/t00000/checkpoints/rung0-a0-progress", 600_000_000)
    driver = in_memory(make_spec(), settle=lambda task: account)
    task = driver.next_task()
    assert task.reserved_flops == 10**9
    driver.lost(task.task_id, "its worker process died")
    assert (driver.state.spent_flops, driver.state.lost_flops) == (700_000_000, 100_000_000)
    again = driver.next_task()
    assert (again.task_id, again.progress) == ("t00000-r0-a1", account.progress)
    assert again.reserved_flops == 400_000_000
    driver.report(again.task_id, execute(again))
    kept = {driver.state.rungs[0]["t00000"]["checkpoint"]}
    made = {f"trials/t00000/checkpoints/rung0-a{at}-{what}" for at in (0, 1) for what in ("progress", "trunk", "model")}
    assert set(driver._ledger.dropped) == made - kept, "the row is there: what no account named goes, too"


def test_what_the_last_driver_had_no_time_to_drop_is_dropped():
    account = Account(700_000_000, "trials/t00000/checkpoints/rung0-a0-progress", 600_000_000)
    spec = make_spec()
    driver = in_memory(spec, settle=lambda task: account)
    driver.lost(driver.next_task().task_id, "killed")
    again = driver.next_task()
    driver.report(again.task_id, execute(again))
    resumed = in_memory(spec, records=driver._ledger.records)
    assert account.progress in resumed._ledger.dropped


def test_what_a_task_left_that_brought_no_checkpoints_is_dropped():
    """A run that diverged, or was given up, may have left one on its way there."""
    driver = in_memory(make_spec(scaling={"max_retries": 0}))
    task = driver.next_task()
    driver.report(task.task_id, {**execute(task), "status": "diverged", "checkpoint": None, "model": None})
    assert "trials/t00000/checkpoints/rung0-a0-progress" in driver._ledger.dropped
    driver.lost(driver.next_task().task_id, "killed")
    assert driver.next_task().trial == "t00002"
    assert "trials/t00001/checkpoints/rung0-a0-trunk" in driver._ledger.dropped
    before = len(driver._ledger.dropped)
    driver.report("t00002-r0-a0", execute(driver._open_task("t00002-r0-a0")))
    assert len(driver._ledger.dropped) == before, "one that went well has tidied up behind itself"


def test_a_task_that_gets_further_every_time_is_never_given_up():
    saved = iter(range(100, 10_000, 100))

    def settle(task):
        flops = next(saved) * 10**6
        return Account(task.reserved_flops // 2, f"{task.task_id}-progress", flops)

    driver = in_memory(make_spec(scaling={"max_retries": 1}), settle=settle)
    for tries in range(8):
        task = driver.next_task()
        assert (task.trial, task.attempt) == ("t00000", tries)
        driver.lost(task.task_id, "its node is gone")


def test_what_a_retry_does_not_reach_stays_what_it_was():
    """A retry that dies before its first checkpoint goes on from that of the try before it."""
    first = Account(500_000_000, "a0-progress", 500_000_000)
    accounts = {"t00000-r0-a0": first, "t00000-r0-a1": Account(1_000_000)}
    driver = in_memory(make_spec(), settle=lambda task: accounts[task.task_id])
    for _ in range(2):
        driver.lost(driver.next_task().task_id, "killed")
    assert driver.next_task().progress == "a0-progress"
    assert driver.state.lost_flops == 1_000_000


def test_a_yielded_task_is_owed_the_rest_and_has_no_strike():
    driver = in_memory(make_spec(scaling={"max_retries": 0}))
    for tries in range(4):
        task = driver.next_task()
        assert (task.trial, task.attempt) == ("t00000", tries)
        flops = (tries + 1) * 200_000_000
        assert driver.yielded(task.task_id, Account(200_000_000, f"a{tries}-progress", flops))
    assert driver._ledger.dropped == [f"a{tries}-progress" for tries in range(3)], "only the last one is gone on from"
    assert driver.state.spent_flops == 800_000_000
    assert driver.state.lost_flops == 0
    assert driver.next_task().reserved_flops == 200_000_000
    # One whose checkpoint was damaged comes back as it went: it begins again.
    driver.yielded("t00000-r0-a4", Account())
    assert driver.next_task().reserved_flops == 10**9


def test_a_resumed_driver_charges_open_tasks_by_their_accounts():
    driver = in_memory(make_spec(scaling={"slots": 3}))
    for _ in range(3):
        driver.next_task()
    account = Account(10_000_000, "progress", 9_000_000)
    again = in_memory(driver.spec, driver._ledger.records, settle=lambda task: account)
    assert (again.state.spent_flops, again.state.lost_flops) == (30_000_000, 3_000_000)
    assert {again.next_task().reserved_flops for _ in range(3)} == {991_000_000}


def test_deaths_of_the_driver_are_not_held_against_a_task():
    driver = in_memory(make_spec(scaling={"max_retries": 0}, budget={"total_flops": "1e12"}))
    for _ in range(5):
        assert driver.next_task().trial == "t00000"
        driver = in_memory(driver.spec, driver._ledger.records)


def test_run_serial_tries_a_failing_task_again_and_raises_what_is_the_users():
    failures = iter([True, False])

    def flaky(task):
        if task.trial == "t00003" and task.rung == 0 and next(failures):
            raise RuntimeError("a worker died")
        return execute(task)

    driver = in_memory(make_spec())
    run_serial(driver, flaky)
    assert [loss["reason"] for loss in driver.state.losses] == ["RuntimeError: a worker died"]
    assert 0 in driver.state.trials["t00003"].rows

    def infeasible(task):
        if task.trial == "t00002":
            raise InfeasibleError("99 steps")
        return execute(task)

    driver = in_memory(make_spec())
    run_serial(driver, infeasible)
    assert driver.state.abandoned == {("t00002", 0): "99 steps"}
    assert len(driver.state.losses) == 1

    def broken(task):
        raise CorruptError("events/item was altered")

    with pytest.raises(CorruptError, match="altered"):
        run_serial(in_memory(make_spec()), broken)


def test_promotions_go_on_from_the_trunk_and_carry_their_probes():
    spec = make_spec(probes=["5e8", "2e9"], data={"evaluation_queries": 77})
    driver = in_memory(spec)
    tasks = []
    run_serial(driver, lambda task: tasks.append(task) or execute(task))
    for task in tasks:
        assert task.config["averaging"]
        assert task.evaluation_queries == 77
        if task.rung == 0:
            assert (task.resume_from, task.from_rung, task.probes) == (None, None, (5 * 10**8,))
        else:
            assert task.resume_from == f"trials/{task.trial}/checkpoints/r{task.rung - 1}"
            assert task.from_rung == task.rung - 1
            assert task.probes == ((2 * 10**9,) if task.rung == 1 else ())
        assert Task.from_dict(json.loads(json.dumps(task.as_dict()))) == task


def test_probe_rows_stand_beside_their_row_and_are_not_spend():
    driver = in_memory(make_spec(probes=["5e8"]))
    task = driver.next_task()
    row = execute(task)
    probe = {**row, "kind": "probe", "path_flops": 5 * 10**8, "task_flops": 5 * 10**8, "metrics": {"nll": 9.0}}
    driver.report(task.task_id, {**row, "probes": [probe]})
    assert driver.state.spent_flops == row["task_flops"]
    assert driver.state.eval_flops == 2 * row["eval_flops"]
    assert [found["metrics"] for found in driver.state.probes] == [{"nll": 9.0}]
    assert rows_of(driver.state) == {(task.trial, 0): row}


def test_rows_that_are_not_the_tasks_are_refused():
    driver = in_memory(make_spec())
    task = driver.next_task()
    row = execute(task)
    for wrong, fragment in (
        ({**row, "rung": 1}, "rung 1"),
        ({**row, "trial": "t00009"}, "t00009"),
        ({**row, "status": "fine"}, "fine"),
        ({**row, "checkpoint": None}, "no checkpoint"),
        ({key: value for key, value in row.items() if key != "task_flops"}, "lacks task_flops"),
    ):
        with pytest.raises(ValueError, match=fragment):
            driver.report(task.task_id, wrong)
    with pytest.raises(ValueError, match="there is no task x"):
        driver.report("x", row)
    with pytest.raises(UserError, match="no row has 'nll'"):
        driver.report(task.task_id, {**row, "metrics": {"recall@10": 0.1}})
    assert driver.report(task.task_id, row)


def test_numbers_that_json_has_not_become_null():
    driver = in_memory(make_spec())
    task = driver.next_task()
    driver.report(task.task_id, {**execute(task), "metrics": {"nll": float("nan"), "x": [float("inf"), 1]}})
    row = driver.state.rungs[0][task.trial]
    assert row["metrics"] == {"nll": None, "x": [None, 1]}
    assert row["status"] == "diverged"


def test_a_changed_sweep_is_refused_on_the_same_ledger():
    driver = in_memory(make_spec())
    for changes, key in (
        ({"metric": {"name": "recall@10"}}, "metric.goal"),
        ({"budget": {"ladder_flops": ["1e9", "4e9"]}}, "budget.ladder_flops"),
        ({"seeds": [5]}, "seeds"),
        ({"parameters": {"params": {"value": 1000}}}, "parameters."),
    ):
        with pytest.raises(UserError, match="the sweep in this folder has") as caught:
            in_memory(make_spec(**changes), driver._ledger.records)
        assert caught.value.key.startswith(key)


def test_a_finished_sweep_stays_finished_until_its_budget_grows():
    driver = in_memory(make_spec())
    reason = run_serial(driver, execute)
    again = in_memory(driver.spec, driver._ledger.records)
    assert again.next_task() == Finished(reason)
    more = in_memory(make_spec(budget={"total_flops": "200e9"}), again._ledger.records)
    rows = rows_of(more.state)
    run_serial(more, execute)
    assert 190e9 < more.state.spent_flops <= 200e9
    assert rows.items() <= rows_of(more.state).items()


def test_the_resolved_spec_stands_in_the_ledger(tmp_path):
    spec = make_spec()
    driver = start(spec, Store(tmp_path))
    driver.close()
    (record,) = [record for record in read_ledger(Store(tmp_path)).records if record["kind"] == "spec"]
    assert from_dict(record["spec"]) == spec
    assert record["hash"] == spec.hash


def test_records_that_no_writer_can_have_meant_are_named():
    driver = in_memory(make_spec())
    task = driver.next_task()
    records = driver._ledger.records
    for bad, fragment in (
        ({"kind": "hello"}, "unknown kind 'hello'"),
        ({"kind": "row", "task_id": "x", "row": {}, "probes": []}, "row"),
        ({"kind": "task", "task": task.as_dict()}, "reserved twice"),
        ({**next(r for r in records if r["kind"] == "proposal"), "number": 7}, "proposal 7"),
    ):
        with pytest.raises(CorruptError, match=fragment):
            SweepState.fold([*records, bad])


def test_a_promotion_in_flight_counts_at_its_rung():
    driver = in_memory(make_spec(scaling={"slots": 8}))
    started = {}
    while len(started) < 30:
        answer = driver.next_task()
        if isinstance(answer, Task):
            assert (answer.trial, answer.rung) not in started
            started[answer.trial, answer.rung] = answer
        else:
            oldest = next(iter(driver.state.open_tasks))
            task = next(task for task in started.values() if task.task_id == oldest)
            driver.report(oldest, execute(task))
    for rung in range(3):
        there = {*driver.state.rungs.get(rung, ()), *driver.state.pending(rung)}
        assert there == {trial for trial, at in started if at == rung}
