"""A task is chosen when there is a place for it, and the cluster is asked for no more than could be used now."""

from __future__ import annotations

import json
import socket
from dataclasses import asdict

import numpy as np
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from bfm.training.task import Account
from ray_jobs import desk, room
from ray_jobs.room import ClusterRoom, Holding, Resources, fits, total_of
from ray_jobs.search import DriverSearcher
from ray_jobs.trial import FATAL, NODE, ROW, YIELDED
from tests.ray_jobs.fakes import CPU_SCALING, Clock, FakeDriver, FakeRunning, FakeTune, Machines, make_desk, make_task
from tests.ray_jobs.toys import free_port

SMALL = {**CPU_SCALING, "cpus": 1.0}
GROUP = {**CPU_SCALING, "cpus": 1.0, "workers": 4, "engine": "deepspeed"}
QUARTER = {**CPU_SCALING, "cpus": 1.0, "gpus": 0.25}
EIGHT = {**CPU_SCALING, "cpus": 1.0, "gpus": 1.0, "workers": 8}


@pytest.mark.parametrize(
    ("scaling", "nodes", "holds"),
    [
        (SMALL, [{"CPU": 1.0}], 1),
        (SMALL, [{"CPU": 3.5}], 3),
        (SMALL, [{"CPU": 0.75}] * 4, 0),
        (GROUP, [{"CPU": 4.0}], 0),
        (GROUP, [{"CPU": 11.0}], 2),
        (GROUP, [{"CPU": 2.0}] * 5, 2),
        (QUARTER, [{"CPU": 64.0, "GPU": 2.0}], 8),
        (QUARTER, [{"CPU": 64.0}, {"CPU": 2.0, "GPU": 1.0}], 2),
        (EIGHT, [{"CPU": 64.0, "GPU": 17.0}], 2),
        (EIGHT, [{"CPU": 16.0, "GPU": 8.0}] * 2, 2),
        (SMALL, [], 0),
    ],
)
def test_as_many_tasks_fit_as_the_nodes_hold(scaling, nodes, holds) -> None:
    held: list[Holding] = []
    while len(held) < 20 and fits([make_task(0, scaling)], held, nodes):
        held.append(Holding(make_task(0, scaling), False))
    assert len(held) == holds
    assert fits([make_task(0, scaling)] * holds, [], nodes)
    assert not fits([make_task(0, scaling)] * (holds + 1), [], nodes)


def test_small_tasks_leave_gpus_and_whole_nodes_to_those_that_need_them() -> None:
    nodes = [{"CPU": 8.0, "GPU": 8.0}, {"CPU": 8.0}]
    held = [Holding(make_task(0, SMALL), False)] * 8
    assert fits([make_task(1, {**EIGHT, "cpus": 0.5, "workers": 8})], held, nodes)


def test_an_idle_actor_is_taken_over_by_its_like_and_in_the_way_of_others() -> None:
    idle = [Holding(make_task(0, SMALL), True)]
    assert fits([make_task(1, SMALL)], idle, [{"CPU": 1.0}])
    assert fits([make_task(1, GROUP)], idle, [{"CPU": 5.0}]), "its coordinator is such an actor"
    assert not fits([make_task(1, SMALL)] * 2, idle, [{"CPU": 1.0}])
    assert not fits([make_task(1, {**SMALL, "cpus": 2.0})], idle, [{"CPU": 2.0}])


def test_nothing_is_chosen_before_there_is_a_machine() -> None:
    driver, cluster, clock = FakeDriver(8, 64), Machines(), Clock()
    searcher = DriverSearcher(make_desk(driver, 64, room=cluster, clock=clock))
    assert searcher.suggest("a") is None
    assert (driver.given, driver.open) == (0, {})
    assert cluster.asked[-1] == [1]
    cluster.machines.append({"CPU": 1.0})
    clock.now_s += 10
    given = [searcher.suggest(name) for name in ("b", "c", "d")]
    assert [isinstance(answer, dict) for answer in given] == [True, True, False], "half a CPU each"


@given(
    num_tasks=st.integers(1, 30),
    slots=st.integers(1, 6),
    cpus=st.floats(5, 12),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_large_and_small_tasks_share_a_cluster_and_all_are_done(num_tasks, slots, cpus, seed) -> None:
    cluster, clock = Machines({"CPU": cpus}), Clock()
    driver = FakeDriver(num_tasks, slots, scaling=[SMALL, SMALL, GROUP])
    searcher = DriverSearcher(make_desk(driver, slots, room=cluster, clock=clock))
    tune = FakeTune(searcher, clock, slots, np.random.default_rng(seed))
    most = 0.0
    assign = driver.next_task

    def watched(fits):
        nonlocal most
        answer = assign(fits)
        most = max(most, sum(total_of(task.scaling)["CPU"] for task in driver.open.values()))
        return answer

    driver.next_task = watched  # type: ignore[method-assign]
    tune.run()
    assert len(driver.rows) == num_tasks
    assert most <= cpus + 1e-9


def test_idle_actors_make_room_for_what_waits() -> None:
    driver, cluster, clock = FakeDriver(3, 2, scaling=[SMALL, SMALL, GROUP]), Machines({"CPU": 5.0}), Clock()
    searcher = DriverSearcher(make_desk(driver, 2, room=cluster, clock=clock))
    for name in ("a", "b"):
        searcher.suggest(name)
        searcher.started(name)
    assert searcher.may_end("a", {ROW: "{}"}), "the group lacks what this one holds"
    searcher.on_trial_complete("a", result={})
    assert searcher.suggest("c") is None
    clock.now_s += 10
    searcher.may_end("b", {ROW: "{}"})
    searcher.on_trial_complete("b", result={})
    clock.now_s += 10
    assert isinstance(searcher.suggest("d"), dict)


def test_the_autoscaler_is_asked_for_what_could_be_used_now(monkeypatch) -> None:
    asked, nodes, clock = [], [], Clock()
    monkeypatch.setattr(room.ray.autoscaler.sdk, "request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(room.ray, "nodes", lambda: nodes)
    cluster, small = ClusterRoom(grows=True, clock=clock), make_task(0, SMALL)
    cluster.ask([], [small])
    for _ in range(2):
        cluster.ask([small] * 3, [small] * 3)
    cluster.ask([small] * 3)
    assert asked == [[{"CPU": 1.0}] * 1, [{"CPU": 1.0}] * 6, []]
    ClusterRoom(grows=False).ask([], [small])
    assert len(asked) == 3


def test_a_request_is_made_again_and_an_old_one_is_taken_back(monkeypatch) -> None:
    """A cluster keeps one request: another sweep's takes its place, and one of a dead driver would stand for ever."""
    asked, clock = [], Clock()
    monkeypatch.setattr(room.ray.autoscaler.sdk, "request_resources", lambda bundles: asked.append(len(bundles)))
    monkeypatch.setattr(room.ray, "nodes", list)
    cluster, small = ClusterRoom(grows=True, clock=clock), make_task(0, SMALL)
    cluster.ask([], [])
    assert asked == [0], "what an earlier driver has asked for"
    for _ in range(5):
        cluster.ask([], [small])
        clock.now_s += 10.0
    assert asked == [0, 1, 1]
    for _ in range(9):
        cluster.ask([])
        clock.now_s += 10.0
    assert asked == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("others", "shut"), [([{"CPU": 8.0}], False), ([{"CPU": 8.0}, {"CPU": 8.0, "GPU": 1.0}], True)]
)
def test_the_only_node_that_holds_a_task_is_not_shut(others, shut) -> None:
    """The sweep ends with what is wrong, and does not wait for ever."""
    gpu = {**SMALL, "gpus": 1.0}
    driver, machines = FakeDriver(2, 1, scaling=[gpu]), Machines({"CPU": 8.0, "GPU": 1.0}, *others)
    own = make_desk(driver, 1, room=machines)
    searcher = DriverSearcher(own)
    searcher.suggest("a")
    searcher.started("a")
    searcher.may_end("a", {FATAL: "CorruptError", "message": "a damaged shard", NODE: "node0"})
    assert (own.quarantine.nodes == {"node0"}) == shut
    assert (own.failure is None) == shut


def test_a_request_that_brings_no_node_is_made_smaller(monkeypatch) -> None:
    asked, nodes, clock = [], ["head"], Clock()
    monkeypatch.setattr(room.ray.autoscaler.sdk, "request_resources", lambda bundles: asked.append(len(bundles)))
    monkeypatch.setattr(room.ray, "nodes", lambda: nodes)
    cluster, small = ClusterRoom(grows=True, clock=clock), make_task(0, SMALL)
    for _ in range(6):
        cluster.ask([small] * 4, [small] * 4)
        clock.now_s += room.ASK_LESS_S
    assert list(dict.fromkeys(asked)) == [8, 6, 5], "what the cluster cannot hold brings nothing at all"
    nodes.append("new")
    cluster.ask([small] * 5, [small] * 4)
    assert asked[-1] == 9


def test_no_more_is_wished_for_than_slots_and_tasks_could_use() -> None:
    driver, cluster, clock = FakeDriver(64, 8), Machines({"CPU": 1.5}), Clock()
    searcher = DriverSearcher(make_desk(driver, 8, room=cluster, clock=clock))
    for trial in "abcd":
        searcher.suggest(trial)
    assert cluster.asked[-1] == [1] * 6, "three run, half a CPU each, and three like them could"


def growing(spent: int, elapsed_s: float, *nodes: Resources):
    """Two slots, one task that runs alone on one CPU, the other slot's next task not there yet."""
    driver, cluster, clock, running = FakeDriver(1, 2, scaling=[SMALL]), Machines({"CPU": 1.0}), Clock(), FakeRunning()
    driver.counts = (1, 2, 4)
    searcher = DriverSearcher(make_desk(driver, 2, room=cluster, running=running, clock=clock))
    assert isinstance(searcher.suggest("a"), dict)
    searcher.started("a")
    running.spent["t0-r0-a0"] = spent
    clock.now_s += elapsed_s
    cluster.machines += nodes
    searcher.suggest("b")
    return searcher, cluster, running, clock


@pytest.mark.parametrize(
    ("spent", "elapsed_s", "nodes", "asked", "wished"),
    [
        (100, 60.0, [{"CPU": 2.0}], ["t0-r0-a0"], []),
        (100, 60.0, [{"CPU": 4.0}], ["t0-r0-a0"], []),
        (100, 60.0, [{"CPU": 1.0}], [], [4]),
        (100, 60.0, [], [], [4]),
        (900, 60.0, [{"CPU": 8.0}], [], []),
        (0, 60.0, [{"CPU": 8.0}], [], []),
    ],
    ids=["two more", "four", "a coordinator holds a CPU, too", "no room: asked for", "nearly done", "not known yet"],
)
def test_idle_room_goes_to_a_running_task_with_much_left(spent, elapsed_s, nodes, asked, wished) -> None:
    _, cluster, running, _ = growing(spent, elapsed_s, *nodes)
    assert running.asked == asked
    assert cluster.asked[-1] == wished


def test_a_task_that_is_to_grow_is_asked_once() -> None:
    searcher, _, running, clock = growing(100, 60.0, {"CPU": 2.0})
    clock.now_s += 60
    searcher.suggest("b")
    assert running.asked == ["t0-r0-a0"], "its checkpoint is not there yet"
    assert searcher.may_end("a", {YIELDED: json.dumps(asdict(Account(110, "progress", 110)))})
    assert searcher.desk._growing is None


def waiting_beside(spent: dict[int, int], scaling: list[dict], cpus: float):
    """Tasks that run for a minute, and one that has waited for room since."""
    driver, cluster, clock, running = FakeDriver(3, 3, scaling=scaling), Machines({"CPU": cpus}), Clock(), FakeRunning()
    searcher = DriverSearcher(make_desk(driver, 3, room=cluster, running=running, clock=clock))
    for trial in ("a", "b"):
        if isinstance(searcher.suggest(trial), dict):
            searcher.started(trial)
    searcher.suggest("c")
    assert searcher.desk.waiting is not None
    running.spent = {f"t{number}-r0-a0": flops for number, flops in spent.items()}
    clock.now_s += desk.ROOM_S + desk.LOOK_S
    return driver, searcher, running, searcher.suggest("c")


def test_small_tasks_yield_their_room_to_a_large_one_that_has_waited() -> None:
    driver, searcher, running, answer = waiting_beside({0: 100, 1: 200}, [SMALL, SMALL, GROUP], 5.0)
    assert json.loads(answer["task"])["scaling"]["workers"] == 4
    assert running.asked == ["t0-r0-a0", "t1-r0-a0"]
    assert "t2-r0-a0" in driver.open, "its cost is reserved before anything is asked to go"
    assert searcher.may_end("a", {YIELDED: json.dumps(asdict(Account(110, "progress", 110)))})


def test_only_as_many_yield_as_are_needed_and_the_one_with_most_left_first() -> None:
    _, _, running, answer = waiting_beside({0: 200, 1: 100}, [SMALL, SMALL, GROUP], 6.0)
    assert isinstance(answer, dict)
    assert running.asked == ["t1-r0-a0"]


@pytest.mark.parametrize(
    ("spent", "scaling", "cpus"),
    [({0: 900, 1: 900}, [SMALL, SMALL, GROUP], 5.0), ({0: 100}, [GROUP, SMALL, SMALL], 5.0)],
    ids=["nearly done", "none is smaller"],
)
def test_a_task_that_is_nearly_done_or_no_smaller_keeps_its_room(spent, scaling, cpus) -> None:
    _, searcher, running, answer = waiting_beside(spent, scaling, cpus)
    assert (answer, running.asked) == (None, [])
    assert searcher.desk.waiting is not None


def test_what_has_no_room_is_told_to_those_who_watch_from_elsewhere(monkeypatch) -> None:
    told, clock, cluster = [], Clock(), Machines({"CPU": 0.0})
    monkeypatch.setattr(desk.time, "time", lambda: 1e9 + clock.now_s)
    searcher = DriverSearcher(
        make_desk(FakeDriver(1, 1, scaling=[SMALL]), 1, room=cluster, clock=clock, tell_waits=told.append)
    )
    for _ in range(3):
        assert searcher.suggest("a") is None
        clock.now_s += desk.LOOK_S
    ((waits,),) = told
    assert (waits.what, waits.since_s) == ("the next task, of rung 0", 1e9)
    assert waits.why == "for 1 CPUs beside what runs; nodes: 1, with no CPUs"
    cluster.machines.append({"CPU": 1.0})
    assert isinstance(searcher.suggest("a"), dict)
    for _ in range(2):
        searcher.suggest("b")
        clock.now_s += desk.LOOK_S
    assert told.pop() == []
    clock.now_s += desk.STARTS_S
    searcher.suggest("b")
    (waits,) = told.pop()
    assert (waits.what, waits.since_s) == ("t0-r0-a0", 1e9 + 3 * desk.LOOK_S)
    assert waits.why == "for a process with 1 CPUs to start; nodes: 2, with 1 CPUs, others may hold them"
    searcher.started("a")
    clock.now_s += desk.LOOK_S
    searcher.suggest("b")
    assert told.pop() == []


def test_a_node_that_is_drained_is_no_room(monkeypatch) -> None:
    nodes = [
        {"NodeID": "stays", "Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}},
        {"NodeID": "goes", "Alive": True, "Resources": {"CPU": 4.0}},
        {"NodeID": "gone", "Alive": False, "Resources": {"CPU": 8.0}},
    ]
    monkeypatch.setattr(room.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(room.ray._private.state.state, "get_draining_nodes", lambda: {"goes": 0})
    assert ClusterRoom(grows=True).nodes() == {"stays": {"GPU": 1.0, "CPU": 2.0}}


def test_a_node_that_does_not_answer_is_gone_before_ray_says_so(monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        places = {"well": (True, port), "killed": (True, free_port()), "dead": (False, port)}
        told = [
            {"NodeID": name, "Alive": alive, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": at}
            for name, (alive, at) in places.items()
        ]
        monkeypatch.setattr(ray, "nodes", lambda: told)
        found = ClusterRoom(grows=False)
        assert found.gone([*places, "unknown"]) == {"killed", "dead", "unknown"}
        assert found.gone(["well"]) == set()
