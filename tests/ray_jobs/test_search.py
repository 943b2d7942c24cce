"""The searcher against a Ray Tune without Ray: every task once, slots kept warm, no hang, no lost failure."""

from __future__ import annotations

import json
import pickle
import signal
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.search import Searcher

from bfm.errors import CorruptError, PausedError, UserError
from bfm.sweep.driver.requests import Request
from bfm.sweep.ledger.state import CANCEL, ENQUEUE, STOP, STORAGE
from bfm.sweep.ledger.task import Wait
from bfm.training.task import Account
from ray_jobs.desk import HUNG, LOOK_S, YIELD_LIMIT_S, Live, SweepEvent
from ray_jobs.search import IDLE_LIMIT_S, START_LIMIT_S, DriverSearcher
from ray_jobs.signals import Interrupted, Signals
from ray_jobs.trial import FATAL, LEAVES, LOST, NODE, PAUSED, ROW, YIELDED, slot_resources
from tests.ray_jobs.fakes import CPU_SCALING, Clock, FakeDriver, FakeRunning, FakeTune, Machines, make_desk, make_task


def world(
    num_tasks: int, slots: int, *, batch: int = 10**9, seed: int = 0, **habits: Any
) -> tuple[FakeDriver, FakeTune]:
    clock = Clock()
    driver = FakeDriver(num_tasks, slots, batch)
    searcher = DriverSearcher(make_desk(driver, slots, clock=clock))
    return driver, FakeTune(searcher, clock, slots, np.random.default_rng(seed), **habits)


@given(
    num_tasks=st.integers(1, 40),
    slots=st.integers(1, 5),
    batch=st.integers(1, 50),
    seed=st.integers(0, 1000),
    errors=st.sampled_from([0.0, 0.2]),
)
@settings(max_examples=60, deadline=None)
def test_every_task_is_settled_once_and_no_actor_starts_twice(num_tasks, slots, batch, seed, errors) -> None:
    driver, tune = world(num_tasks, slots, batch=batch, seed=seed, errors=errors)
    tune.run()
    assert len(driver.rows) + len(driver.losses) == num_tasks
    assert not driver.open
    assert tune.most_live <= slots
    assert tune.starts <= slots, "an actor was started although a warm one was there"


@given(num_tasks=st.integers(1, 40), slots=st.integers(1, 4), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_dead_worker_costs_its_task_and_one_start(num_tasks, slots, seed) -> None:
    driver, tune = world(num_tasks, slots, seed=seed, deaths=0.2)
    tune.run()
    assert len(driver.rows) + len(driver.losses) == num_tasks
    assert tune.starts <= slots + len(driver.losses)
    assert all("worker process died" in reason for reason in driver.losses.values())


def test_slots_without_resources_hold_nobody_up_for_ever() -> None:
    driver, tune = world(200, 4, capacity=2, train_s=(1.0, 2.0))
    tune.run()
    assert len(driver.rows) == 200
    # Two actors at 1.5 s a task; the missing two are waited for once.
    assert tune.clock.now_s < 200 * 1.5 / 2 + START_LIMIT_S + 60


def test_short_tasks_use_all_slots() -> None:
    driver, tune = world(400, 2, train_s=(0.5, 0.5))
    tune.run()
    assert len(driver.rows) == 400
    assert tune.clock.now_s < 400 * 0.5 / 2 + 30


def test_an_idle_slot_is_given_back_after_a_while() -> None:
    clock = Clock()
    driver = FakeDriver(2, 2)
    searcher = DriverSearcher(make_desk(driver, 2, clock=clock))
    for trial in ("a", "b"):
        assert isinstance(searcher.suggest(trial), dict)
        searcher.started(trial)
    assert not searcher.may_end("a", {ROW: "{}"})
    clock.now_s = IDLE_LIMIT_S - 1
    assert not searcher.may_end("a", {})
    clock.now_s = IDLE_LIMIT_S + 1
    assert searcher.may_end("a", {})
    searcher.on_trial_complete("a", result={})
    assert searcher.suggest("c") is None
    assert searcher.may_end("b", {ROW: "{}"})
    searcher.on_trial_complete("b", result={})
    assert searcher.suggest("d") == Searcher.FINISHED


def test_a_row_arrives_with_its_probes_and_events_tell() -> None:
    seen = []
    driver = FakeDriver(1, 1)
    searcher = DriverSearcher(make_desk(driver, 1, on_event=seen.append))
    searcher.suggest("a")
    searcher.started("a")
    assert searcher.may_end("a", {ROW: '{"kind": "rung", "probes": [{"kind": "probe"}]}'})
    assert driver.rows == {"t0-r0-a0": {"kind": "rung", "probes": [{"kind": "probe"}]}}
    assert [event.kind for event in seen] == ["assigned", "row", "finished"]


def test_a_row_counts_once_however_often_tune_repeats_it() -> None:
    driver = FakeDriver(2, 2)
    searcher = DriverSearcher(make_desk(driver, 2))
    for trial in ("a", "b"):
        searcher.suggest(trial)
        searcher.started(trial)
    for _ in range(3):
        searcher.may_end("a", {ROW: "{}"})
        searcher.on_trial_result("a", {ROW: "{}"})
    searcher.on_trial_complete("a", result={ROW: "{}"})
    assert list(driver.rows) == ["t0-r0-a0"]
    assert not driver.losses


def test_what_the_driver_raises_ends_the_run_and_is_kept() -> None:
    driver, tune = world(5, 2)
    driver.report = refuse  # type: ignore[method-assign]
    tune.run()
    assert isinstance(tune.searcher.desk.failure, UserError)


def refuse(task_id: str, row: Any) -> bool:
    raise UserError("another sweep has taken over here")


def test_damaged_input_ends_the_run() -> None:
    driver, tune = world(50, 2, fatal_task="t3-r0-a0")
    tune.run()
    assert isinstance(tune.searcher.desk.failure, CorruptError)
    assert "events/item" in str(tune.searcher.desk.failure)
    assert driver.given < 10


def test_a_driver_that_waits_for_nothing_is_a_failure_not_a_hang() -> None:
    driver, tune = world(3, 1)
    driver.next_task = lambda fits: Wait("Godot")  # type: ignore[method-assign, assignment]
    tune.run()
    assert "Godot" in str(tune.searcher.desk.failure)


def test_the_searcher_pickles_without_its_driver() -> None:
    driver = FakeDriver(1, 1)
    driver.lock = lambda: None  # type: ignore[attr-defined]
    assert not vars(pickle.loads(pickle.dumps(DriverSearcher(make_desk(driver, 1)))))


def test_a_group_s_coordinator_shares_actors_with_single_workers_of_equal_size() -> None:
    single = slot_resources(CPU_SCALING)
    group = slot_resources({**CPU_SCALING, "workers": 2, "engine": "deepspeed", "zero_stage": 1})
    assert single == group == {"CPU": 0.5, "GPU": 0.0}


def test_the_actor_whose_workers_stand_by_for_a_tier_goes_before_others_of_its_size() -> None:
    pair = {**CPU_SCALING, "workers": 2, "engine": "deepspeed", "zero_stage": 1}
    driver = FakeDriver(3, 2, batch=2, scaling=[CPU_SCALING, pair])
    searcher = DriverSearcher(make_desk(driver, 2))
    for trial in ("single", "pair"):
        searcher.suggest(trial)
        searcher.started(trial)
    driver.scaling = [pair]
    assert not searcher.may_end("pair", {ROW: "{}"}), "the other one still runs, and the driver waits for it"
    assert not searcher.may_end("single", {ROW: "{}"}), "the next task is for two workers"
    assert searcher.may_end("pair", {})
    searcher.on_trial_complete("pair", result={})
    config = searcher.suggest("next")
    assert isinstance(config, dict)
    assert json.loads(config["task"])["scaling"] == pair


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "held"),
    [(1, 4.0, 0.25, {"CPU": 4.0, "GPU": 0.25}), (8, 4.0, 1.0, {"CPU": 1.0, "GPU": 0.0})],
)
def test_one_worker_s_actor_holds_its_gpu_and_a_coordinator_holds_none(workers, cpus, gpus, held) -> None:
    assert slot_resources({**CPU_SCALING, "workers": workers, "cpus": cpus, "gpus": gpus}) == held


def test_a_task_survives_the_way_through_tune() -> None:
    task = make_task(7)
    assert type(task).from_dict(task.as_dict()) == task


def stopping(num_tasks: int = 9, slots: int = 3, late: str = ""):
    """Three tasks of a sweep that has received SIGTERM, which run but for `late`, and which were asked to yield."""
    running = FakeRunning()
    driver, clock, signals = FakeDriver(num_tasks, slots), Clock(), Signals()
    searcher = DriverSearcher(make_desk(driver, slots, signals=signals, running=running, clock=clock))
    for trial in "abc":
        searcher.suggest(trial)
        if trial not in late:
            searcher.started(trial)
    signals.received = signal.SIGTERM
    return driver, searcher, clock, running.asked


def asked(verb: str, refused: str | None = None, **what: Any) -> tuple[FakeDriver, DriverSearcher, Clock, list[str]]:
    """Three running tasks, a fourth in hand, and a request that comes a moment later."""
    running, inbox = FakeRunning(), []
    driver, clock = FakeDriver(9, 4), Clock()
    desk = make_desk(
        driver, 4, running=running, clock=clock, inbox=lambda: [inbox.pop()] if inbox else [], on_event=EVENTS.append
    )
    searcher = DriverSearcher(desk)
    for trial in "abc":
        searcher.suggest(trial)
        searcher.started(trial)
    assert desk.peek(list(searcher._trials.values())).trial == "t3"
    clock.now_s += LOOK_S
    inbox.append(Request("1", verb, "ann@desk", {**what, "refused": refused}))
    desk.look_after(list(searcher._trials.values()))
    assert driver.taken == ["1"]
    assert EVENTS[-1].kind == "asked"
    return driver, searcher, clock, running.asked


EVENTS: list[SweepEvent] = []


def test_a_stop_from_elsewhere_is_a_signal() -> None:
    _, searcher, _, yielding = asked(STOP, epoch=1)
    assert searcher.suggest("d") is None
    assert yielding == ["t0-r0-a0", "t1-r0-a0", "t2-r0-a0"]
    for trial in "ab":
        assert searcher.may_end(trial, YIELD)
        searcher.on_trial_complete(trial, result={})
    with pytest.raises(Interrupted, match="`bfm stop` of ann@desk") as caught:
        searcher.may_end("c", YIELD)
    assert caught.value.number == signal.SIGTERM


def test_tasks_of_a_cancelled_trial_are_asked_to_end() -> None:
    driver, searcher, _, yielding = asked(CANCEL, trial="t1")
    assert yielding == ["t1-r0-a0"]
    searcher.may_end("b", YIELD)
    assert driver.yields == {"t1-r0-a0": Account(70, "progress", 60)}
    assert isinstance(searcher.suggest("d"), dict)


def test_what_was_in_hand_of_a_cancelled_trial_is_not_begun() -> None:
    driver, searcher, _, yielding = asked(CANCEL, trial="t3")
    assert not yielding
    assert driver.yields == {"t3-r0-a0": Account()}
    assert json.loads(searcher.suggest("d")["task"])["trial"] == "t4"


def test_a_sweep_that_was_about_to_end_takes_what_is_enqueued() -> None:
    driver, clock, inbox = FakeDriver(1, 2), Clock(), []
    desk = make_desk(driver, 2, clock=clock, inbox=lambda: [inbox.pop()] if inbox else [])
    searcher = DriverSearcher(desk)
    searcher.suggest("a")
    searcher.started("a")
    searcher.may_end("a", {ROW: "{}"})
    assert searcher.suggest("b") is None
    assert desk.finished
    clock.now_s += LOOK_S
    inbox.append(Request("1", ENQUEUE, "ann@desk", {"refused": None}))
    driver.left = 1
    desk.look_after(list(searcher._trials.values()))
    assert not desk.finished
    assert desk.peek(list(searcher._trials.values())).trial == "t1"


@pytest.mark.parametrize("verb", [STOP, CANCEL])
def test_what_is_refused_changes_nothing(verb) -> None:
    driver, searcher, _, yielding = asked(verb, refused="no such trial", trial="t1")
    assert not yielding
    assert "refused, no such trial" in EVENTS[-1].reason
    assert json.loads(searcher.suggest("d")["task"])["trial"] == "t3"
    assert not driver.yields


YIELD = {YIELDED: json.dumps(asdict(Account(70, "progress", 60)))}


def test_an_actor_that_leaves_is_nobodys_place() -> None:
    """Its trial is not handed to the next task: it lasts until the actor has ended, which is no loss."""
    driver = FakeDriver(3, 2)
    searcher = DriverSearcher(make_desk(driver, 2))
    searcher.suggest("a")
    searcher.started("a")
    assert not searcher.may_end("a", {**YIELD, LEAVES: True})
    assert isinstance(searcher.suggest("b"), dict), "a place elsewhere does not wait for it"
    assert not searcher.may_end("a", {})
    assert searcher.suggest("c") is None, "both slots are held"
    searcher.on_trial_complete("a", error=True)
    assert isinstance(searcher.suggest("c"), dict)
    assert not driver.losses


def test_a_stopped_sweep_asks_its_tasks_once_and_ends_when_all_have_answered() -> None:
    driver, searcher, _, asked = stopping()
    for _ in range(3):
        assert searcher.suggest("d") is None
    assert sorted(asked) == ["t0-r0-a0", "t1-r0-a0", "t2-r0-a0"]
    assert searcher.may_end("a", YIELD)
    assert searcher.may_end("b", {ROW: "{}"}), "a row that was nearly there counts"
    searcher.on_trial_complete("c", error=True)
    with pytest.raises(Interrupted) as end:
        searcher.suggest("d")
    assert end.value.number == signal.SIGTERM
    assert driver.yields == {"t0-r0-a0": Account(70, "progress", 60)}
    assert (list(driver.rows), list(driver.losses)) == (["t1-r0-a0"], ["t2-r0-a0"])
    assert driver.given == 3, "nothing new was begun"


def test_a_task_that_starts_after_the_stop_is_asked_too() -> None:
    _, searcher, _, asked = stopping(late="c")
    assert searcher.suggest("d") is None
    assert sorted(asked) == ["t0-r0-a0", "t1-r0-a0"]
    searcher.started("c")
    assert searcher.suggest("d") is None
    assert asked[2:] == ["t2-r0-a0"]


def test_a_task_that_does_not_answer_is_not_waited_for_for_ever() -> None:
    driver, searcher, clock, _ = stopping()
    assert searcher.suggest("d") is None
    clock.now_s += YIELD_LIMIT_S + 1
    with pytest.raises(Interrupted):
        searcher.suggest("d")
    assert len(driver.open) == 3, "the next driver settles them"


def test_a_paused_sweep_lets_its_tasks_yield_and_then_tells_why() -> None:
    driver, searcher, _, _ = stopping()
    searcher.desk._signals.received = None

    def pause(task_id: str, reason: str, **how) -> bool:
        raise PausedError("paused: the disk is full")

    driver.lost = pause  # type: ignore[method-assign]
    searcher.may_end("a", {LOST: "OSError: full", "retry": True})
    assert searcher.desk.failure is None
    for trial in "bc":
        assert searcher.may_end(trial, YIELD)
    searcher.suggest("d")
    assert isinstance(searcher.desk.failure, PausedError)
    assert len(driver.yields) == 2


def test_a_full_disk_pauses_at_its_first_loss_and_is_nobodys_strike() -> None:
    driver, searcher, _, _ = stopping()
    searcher.desk._signals.received = None
    searcher.may_end("a", {PAUSED: "paused: /runs/x is full", NODE: "node0"})
    for trial in "bc":
        assert searcher.may_end(trial, YIELD)
    searcher.suggest("d")
    assert str(searcher.desk.failure) == "paused: /runs/x is full"
    assert (driver.losses, driver.faults) == ({"t0-r0-a0": "paused: /runs/x is full"}, [STORAGE])


def looked_after(*tasks: int):
    """Running tasks with somebody who looks after them."""
    driver, clock, running = FakeDriver(9, 3), Clock(), FakeRunning()
    events: list[SweepEvent] = []
    cluster = Machines({"CPU": 2.0}, {"CPU": 2.0})
    searcher = DriverSearcher(make_desk(driver, 3, room=cluster, running=running, clock=clock, on_event=events.append))
    for trial in [f"trial{number}" for number in tasks]:
        searcher.suggest(trial)
        searcher.started(trial)
    return driver, searcher, clock, running, events


def test_a_task_that_stands_still_is_lost_at_once_and_its_slot_is_free() -> None:
    driver, searcher, clock, running, _ = looked_after(0, 1, 2)
    running.hung.append("t1-r0-a0")
    clock.now_s += LOOK_S
    given = searcher.suggest("next")
    assert driver.losses == {"t1-r0-a0": HUNG}
    assert isinstance(given, dict), "whatever becomes of the actor that hangs"
    assert searcher.may_end("trial1", {ROW: "{}"}), "what it still brings comes too late"
    searcher.on_trial_complete("trial1", error=True)
    assert (driver.rows, list(driver.losses)) == ({}, ["t1-r0-a0"])


def test_an_actor_that_hangs_holds_its_resources_until_it_ends() -> None:
    _, searcher, clock, running, _ = looked_after(0, 1, 2)
    searcher.desk._room.machines = [{"CPU": 1.5}]
    running.hung.append("t1-r0-a0")
    clock.now_s += LOOK_S
    assert searcher.suggest("next") is None
    searcher.on_trial_complete("trial1", error=True)
    clock.now_s += LOOK_S
    assert isinstance(searcher.suggest("next"), dict)


def test_a_node_alone_with_its_fault_is_left_out_and_the_sweep_goes_on() -> None:
    driver, searcher, clock, _, events = looked_after(0, 1)
    no_mount = {FATAL: "UserError", "message": "this node does not see the sweep"}
    searcher.may_end("trial0", {**no_mount, NODE: "node0"})
    assert searcher.desk.failure is None
    assert list(driver.losses) == ["t0-r0-a0"]
    assert [event.kind for event in events][-2:] == ["lost", "quarantined"]
    clock.now_s += LOOK_S
    assert searcher.suggest("next")["avoid"] == "node0"
    searcher.may_end("trial1", {**no_mount, NODE: "node1"})
    assert isinstance(searcher.desk.failure, UserError), "the second node says the same"


def test_a_worker_that_dies_is_held_against_the_node_it_was_on() -> None:
    _, searcher, _, running, events = looked_after(0, 1, 2)
    running.where = {f"t{number}-r0-a0": ["node0"] for number in (0, 2, 3, 4)}
    searcher.on_trial_complete("trial0", error=True)
    searcher.may_end("trial1", {ROW: "{}", NODE: "node1"})
    searcher.on_trial_complete("trial2", error=True)
    assert [event.kind for event in events][-1] == "quarantined"
    assert searcher.desk.quarantine.nodes == {"node0"}


def test_a_worker_whose_node_is_gone_is_held_against_nobody() -> None:
    """Also one that has told of no step yet: idle nodes may be taken away as a sweep begins."""
    driver, searcher, _, running, _ = looked_after(0, 1, 2)
    running.where = {"t0-r0-a0": ["node0"], "t1-r0-a0": ["node1"]}
    del searcher.desk._room.machines[1]
    for number in range(3):
        searcher.on_trial_complete(f"trial{number}", error=True)
    assert list(driver.losses) == ["t0-r0-a0", "t1-r0-a0", "t2-r0-a0"]
    assert driver.faults == ["worker", "node", "node"]
    assert not searcher.desk.quarantine.nodes
    # A task that goes with one node after the other may be what kills them.
    for _ in range(2):
        driver.open["t1-r0-a0"] = make_task(1)
        searcher._trials["again"] = Live(make_task(1), frozenset({"node0", "node9"}))
        searcher.on_trial_complete("again", error=True)
    assert driver.faults[3:] == ["worker", "worker"]
