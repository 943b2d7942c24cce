"""A quota for trunks: which go, in what order, and that a sweep without them stays the same but for its cost."""

from __future__ import annotations

import pytest

from bfm.errors import UserError
from bfm.files import Store
from bfm.sweep.driver.quota import evictions
from bfm.sweep.ledger.ledger import read_state
from bfm.sweep.ledger.state import SweepState
from bfm.sweep.ledger.task import Task
from tests.sweep.serial import run_serial
from tests.sweep.world import execute, in_memory, make_spec, start

GIB = 1 << 30
POLICIES = ["frontier", "asha-promote", "asha-stop", "random", "isoflop-window"]


def sized(task):
    """One GiB per trunk, half a GiB per model."""
    row = execute(task)
    ok = row["status"] == "ok"
    return {
        **row,
        "checkpoint_bytes": ok * GIB,
        "model_bytes": ok * GIB // 2,
        "checkpoint": row["checkpoint"] if ok else None,
    }


def run(spec, records=()):
    driver = in_memory(spec, records)
    most = []

    def watch(task):
        most.append(sum(driver.state.kept_trunks.values()) / GIB)
        if task.from_rung is not None:
            assert (task.trial, task.from_rung) not in driver.state.evicted
            assert task.resume_from
        else:
            assert task.resume_from is None
        return sized(task)

    run_serial(driver, watch)
    return driver, max(most, default=0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("quota", [0.5, 2, 5])
def test_the_quota_holds_and_promotions_go_on_from_what_stands(policy, quota):
    spec = make_spec(scheduler={"type": policy}, storage={"checkpoints_gib": quota})
    driver, most = run(spec)
    state = driver.state
    # A trunk that a task goes on from is never taken away.
    assert most <= max(quota, 1) + 1e-9
    assert state.evicted
    assert all(record["reason"] and record["bytes"] == GIB for record in state.evicted.values())
    assert state.spent_flops <= spec.budget.total_flops
    assert state.rungs[2]
    assert SweepState.fold(driver._ledger.records) == state
    of_failed = {trial for trial, rung in state.arrivals if state.rungs[rung][trial]["status"] != "ok"}
    trunks = [name for name in driver._ledger.dropped if name.split("/")[1] not in of_failed]
    assert trunks == [record["checkpoint"] for record in state.evicted.values()]
    if quota < 1:
        # Nothing ever stands, so every promotion is trained from nothing.
        again = [task for task in tasks_of(driver) if task.rung > 0]
        assert again
        assert all(task.from_rung is None for task in again)
        nominal = sum(spec.task_flops(0.2, task.rung, task.rung - 1) for task in again)
        assert state.redone_flops == sum(task.reserved_flops for task in again) - nominal


def tasks_of(driver):
    return [Task.from_dict(record["task"]) for record in driver._ledger.records if record["kind"] == "task"]


def test_without_a_quota_all_is_kept():
    driver, _ = run(make_spec())
    assert not driver.state.evicted
    assert driver.state.redone_flops == 0


def test_rows_do_not_depend_on_what_is_kept():
    whole, tight = (
        run(make_spec(storage={"checkpoints_gib": quota}, budget={"total_flops": "1e12", "max_trials": 9}))[0].state
        for quota in (None, 0.5)
    )
    assert set(whole.arrivals) == set(tight.arrivals)
    for trial, rung in whole.arrivals:
        assert whole.trials[trial].rows[rung]["metrics"] == tight.trials[trial].rows[rung]["metrics"]
    assert whole.nominal_flops == tight.nominal_flops
    assert tight.spent_flops - tight.redone_flops == whole.spent_flops


def test_obsolete_trunks_go_first_then_failed_trials_then_the_top_then_the_least_promising():
    driver = in_memory(make_spec(scheduler={"type": "asha-promote"}))
    run_serial(driver, sized)
    state, policy = driver.state, driver.policy
    kept = state.kept_trunks
    assert evictions(make_spec(storage={"checkpoints_gib": len(kept)}), state, policy) == []
    records = evictions(make_spec(storage={"checkpoints_gib": 1e-9}), state, policy)
    assert {(record["trial"], record["rung"]) for record in records} == set(kept)
    kinds = []
    for record in records:
        kind = next(
            number
            for number, words in enumerate(("same trial stands", "ended (diverged)", "no rung above", "better nll"))
            if words in record["reason"]
        )
        kinds.append(kind)
    assert kinds == sorted(kinds)
    assert {0, 2, 3} <= set(kinds)
    one = evictions(make_spec(storage={"checkpoints_gib": len(kept) - 1}), state, policy)
    assert one == records[:1]


def test_the_frontier_policy_says_who_is_least_promising():
    driver = in_memory(make_spec(scheduler={"type": "frontier"}))
    run_serial(driver, sized)
    records = evictions(make_spec(storage={"checkpoints_gib": 1e-9}), driver.state, driver.policy)
    told = [record for record in records if "least expected improvement" in record["reason"]]
    promises = driver.policy.promises(driver.state, [record["trial"] for record in told])
    assert [promises[record["trial"]] for record in told] == sorted(promises.values())
    assert len(told) > 2


def test_a_trunk_in_use_stays():
    spec = make_spec(scheduler={"type": "asha-promote"}, scaling={"slots": 3}, storage={"checkpoints_gib": 2})
    driver = in_memory(spec)
    running, in_use = [], 0
    for _ in range(60):
        while isinstance(task := driver.next_task(), Task):
            running.append(task)
        if not running:
            break
        task = running.pop(0)
        for other in (other for other in running if other.from_rung is not None):
            assert (other.trial, other.from_rung) not in driver.state.evicted
            in_use += 1
        driver.report(task.task_id, sized(task))
    assert in_use > 10
    assert len(driver.state.evicted) > 10


def test_promoted_trials_do_not_repeat_their_probes():
    spec = make_spec(probes=["5e8", "2e9"], storage={"checkpoints_gib": 0.5})
    driver, _ = run(spec)
    seen = [(task.trial, c) for task in tasks_of(driver) for c in task.probes]
    assert len(seen) == len(set(seen))
    assert {c for _, c in seen} == {5 * 10**8, 2 * 10**9}


@pytest.mark.parametrize("policy", ["frontier", "asha-promote"])
def test_a_driver_killed_anywhere_evicts_the_same(policy):
    spec = make_spec(
        scheduler={"type": policy},
        storage={"checkpoints_gib": 2},
        budget={"total_flops": "1e12", "max_trials": 8, "ladder_flops": ["1e9", "4e9"]},
    )
    whole, _ = run(spec)
    records = whole._ledger.records
    # Appends are whole: a proposal stands only with its task.
    cuts = [cut for cut in range(3, len(records)) if records[cut - 1]["kind"] != "proposal"]
    for cut in cuts[::5]:
        again, _ = run(spec, records[:cut])
        assert set(again.state.arrivals) == set(whole.state.arrivals)
        assert set(again.state.evicted) == set(whole.state.evicted)


def test_a_folder_that_a_crash_left_is_deleted_at_resume(tmp_path):
    spec = make_spec(scheduler={"type": "random"}, storage={"checkpoints_gib": 0.5})
    store = Store(tmp_path)
    driver = start(spec, store)
    driver._ledger.drop = lambda folder: None
    task = driver.next_task()
    row = sized(task)
    store.put(f"{row['checkpoint']}/state.pt", b"weights")
    driver.report(task.task_id, row)
    assert read_state(store).evicted
    assert store.exists(f"{row['checkpoint']}/state.pt")
    start(spec, store)
    assert not store.exists(f"{row['checkpoint']}/state.pt")


def test_a_quota_may_be_set_by_an_extension_and_is_checked():
    driver, _ = run(make_spec())
    spec = make_spec(storage={"checkpoints_gib": 3})
    with pytest.raises(UserError, match="--extend"):
        in_memory(spec, driver._ledger.records)
    more = in_memory(spec, driver._ledger.records, extend=True)
    assert sum(more.state.kept_trunks.values()) <= 3 * GIB
    for quota in (0, -1):
        with pytest.raises(UserError, match="above 0") as caught:
            make_spec(storage={"checkpoints_gib": quota})
        assert caught.value.key == "storage.checkpoints_gib"
