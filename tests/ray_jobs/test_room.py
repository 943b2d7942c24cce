"""A task is chosen when there is a place for it, and the cluster is asked for no more than could be used now."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_jobs import room
from ray_jobs.room import ClusterRoom, Holding, fits, total_of
from ray_jobs.search import DriverSearcher
from ray_jobs.trial import ROW
from tests.ray_jobs.fakes import CPU_SCALING, Clock, FakeDriver, FakeTune, make_task

SMALL = {**CPU_SCALING, "cpus": 1.0}
GROUP = {**CPU_SCALING, "cpus": 1.0, "workers": 4, "engine": "deepspeed"}
QUARTER = {**CPU_SCALING, "cpus": 1.0, "gpus": 0.25}
EIGHT = {**CPU_SCALING, "cpus": 1.0, "gpus": 1.0, "workers": 8}


class Grown:
    """Resources that a test sets."""

    def __init__(self, **resources: float) -> None:
        self.resources = resources
        self.asked: list[tuple[int, bool]] = []

    def total(self):
        return self.resources

    def ask(self, running, waiting, most):
        self.asked.append((len(running), waiting is not None))


@pytest.mark.parametrize(
    ("scaling", "resources", "holds"),
    [
        (SMALL, {"CPU": 1.0}, 1),
        (SMALL, {"CPU": 3.5}, 3),
        (GROUP, {"CPU": 4.0}, 0),
        (GROUP, {"CPU": 11.0}, 2),
        (QUARTER, {"CPU": 64.0, "GPU": 2.0}, 8),
        (EIGHT, {"CPU": 64.0, "GPU": 17.0}, 2),
        (SMALL, {}, 0),
    ],
)
def test_as_many_tasks_fit_as_the_resources_hold(scaling, resources, holds) -> None:
    held: list[Holding] = []
    while len(held) < 20 and fits(make_task(0, scaling), held, resources):
        held.append(Holding(make_task(0, scaling), False))
    assert len(held) == holds


def test_an_idle_actor_is_taken_over_by_its_like_and_in_the_way_of_others() -> None:
    idle = [Holding(make_task(0, SMALL), True)]
    assert fits(make_task(1, SMALL), idle, {"CPU": 1.0})
    assert fits(make_task(1, GROUP), idle, {"CPU": 5.0}), "its coordinator is such an actor"
    assert not fits(make_task(1, {**SMALL, "cpus": 2.0}), idle, {"CPU": 2.0})


def test_nothing_is_chosen_before_there_is_a_machine() -> None:
    driver, cluster, clock = FakeDriver(8, 64), Grown(), Clock()
    searcher = DriverSearcher(driver, 64, room=cluster, clock=clock)
    assert searcher.suggest("a") is None
    assert (driver.given, driver.open) == (0, {})
    assert cluster.asked == [(0, True)]
    cluster.resources["CPU"] = 1.0
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
    cluster, clock = Grown(CPU=cpus), Clock()
    driver = FakeDriver(num_tasks, slots, scaling=[SMALL, SMALL, GROUP])
    searcher = DriverSearcher(driver, slots, room=cluster, clock=clock)
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
    driver, cluster, clock = FakeDriver(3, 2, scaling=[SMALL, SMALL, GROUP]), Grown(CPU=5.0), Clock()
    searcher = DriverSearcher(driver, 2, room=cluster, clock=clock)
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
    asked = []
    monkeypatch.setattr(room.ray.autoscaler.sdk, "request_resources", lambda bundles: asked.append(bundles))
    cluster, small = ClusterRoom(grows=True), make_task(0, SMALL)
    cluster.ask([], small, 64)
    cluster.ask([small] * 3, small, 61)
    cluster.ask([small] * 3, small, 1)
    cluster.ask([small] * 3, small, 1)
    cluster.ask([small] * 4, None, 0)
    assert asked == [[{"CPU": 1.0}] * 1, [{"CPU": 1.0}] * 6, [{"CPU": 1.0}] * 4, []]
    ClusterRoom(grows=False).ask([], small, 64)
    assert len(asked) == 4


def test_a_node_that_is_drained_is_no_room(monkeypatch) -> None:
    nodes = [
        {"NodeID": "stays", "Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}},
        {"NodeID": "goes", "Alive": True, "Resources": {"CPU": 4.0}},
        {"NodeID": "gone", "Alive": False, "Resources": {"CPU": 8.0}},
    ]
    monkeypatch.setattr(room.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(room.ray._private.state.state, "get_draining_nodes", lambda: {"goes": 0})
    assert ClusterRoom(grows=True).total() == {"CPU": 2.0, "GPU": 1.0}
