"""Processes of a sweep that die or stand still while it trains, all in one Ray of this machine; and the head of a
cluster, with which everything is gone but the storage."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import psutil
import pytest
import ray

from bfm.files import Store
from bfm.sweep.space.spec import resolve
from ray_jobs import desk, pulse
from ray_jobs.cluster_session import local_ray
from ray_jobs.desk import HUNG
from ray_jobs.quarantine import Quarantine
from ray_jobs.room import ClusterRoom
from ray_jobs.sweep import run_sweep
from ray_jobs.trial import away_from
from tests.chaos.invariants import check_nothing_runs, check_sweep
from tests.chaos.sweeps import LADDER, decisions, is_in_the_middle, meanwhile, one_place, see_it_go_on
from tests.ray_jobs.toys import SINGLE, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ACTOR, WORKER, CONTROLLER = "ray::_Inner", "ray::RayTrainWorker", "ray::TrainController"
CLEANER = "ray::PlacementGroupCleaner"
PAIR = {"engine": "deepspeed", "workers": 2, "zero_stage": 1, "cpus": 0.5}


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with local_ray(2, dashboard=True):
            yield
        check_nothing_runs(ours("ray::"))


@pytest.fixture(autouse=True)
def all_is_free_again(two_cpus) -> Iterator[None]:
    yield
    wait_for(lambda: ray.available_resources().get("CPU") == 2.0, 90, "all CPUs are free again")
    wait_for(lambda: not standing_groups(), 60, "no placement group stands")
    wait_for(lambda: not ours("ray::_Board"), 30, "nobody listens to tasks that are over")


def standing_groups() -> list[dict]:
    return [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]


def ours(title: str) -> list[psutil.Process]:
    """Processes below this one whose title begins so (Ray writes the class into it), the oldest first."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return sorted(found, key=lambda process: process.create_time())


def test_an_actor_that_is_killed_changes_nothing(tmp_path, toy_shards, whole) -> None:
    store = Store(tmp_path / "tiny")

    def kill() -> None:
        ours(ACTOR)[-1].kill()
        see_it_go_on(store, "kill -9 of an actor")

    with meanwhile(lambda: is_in_the_middle(store), kill):
        run_sweep(resolve(one_place(tmp_path, toy_shards.path)), str(tmp_path))
    state = check_sweep(store)
    assert [loss["fault"] for loss in state.losses] == ["worker"]
    assert 0 < state.lost_flops <= LADDER[0], "an account is seconds ahead, and these tasks are short"
    assert decisions(store) == whole


def test_sigterm_to_an_actor_is_a_notice_and_costs_nothing(tmp_path, toy_shards, whole) -> None:
    store = Store(tmp_path / "tiny")

    def terminate() -> None:
        ours(ACTOR)[-1].terminate()
        see_it_go_on(store, "SIGTERM to an actor")

    with meanwhile(lambda: is_in_the_middle(store), terminate):
        run_sweep(resolve(one_place(tmp_path, toy_shards.path)), str(tmp_path))
    state = check_sweep(store)
    assert not state.losses
    assert any(task_id.endswith("-a1") for task_id in state.closed_tasks), "nothing was stopped"
    assert decisions(store) == whole


def test_an_actor_that_stands_still_for_a_while_goes_on(tmp_path, toy_shards, whole) -> None:
    store = Store(tmp_path / "tiny")

    def stop_and_go() -> None:
        actor = ours(ACTOR)[-1]
        actor.send_signal(signal.SIGSTOP)
        try:
            time.sleep(15)
        finally:
            actor.send_signal(signal.SIGCONT)

    with meanwhile(lambda: is_in_the_middle(store), stop_and_go):
        run_sweep(resolve(one_place(tmp_path, toy_shards.path)), str(tmp_path))
    assert not check_sweep(store).losses
    assert decisions(store) == whole


def test_an_actor_that_stands_still_for_ever_is_replaced(tmp_path, toy_shards, whole, monkeypatch) -> None:
    monkeypatch.setattr(pulse, "HUNG_S", 15.0)
    store = Store(tmp_path / "tiny")
    stopped: list[psutil.Process] = []

    def stop() -> None:
        stopped.append(ours(ACTOR)[-1])
        stopped[0].send_signal(signal.SIGSTOP)
        see_it_go_on(store, "SIGSTOP of an actor for ever, of which 15 s (300 s in real life) are patience")

    with meanwhile(lambda: is_in_the_middle(store), stop):
        run_sweep(resolve(one_place(tmp_path, toy_shards.path)), str(tmp_path))
    assert [loss["reason"] for loss in check_sweep(store).losses] == [HUNG]
    assert decisions(store) == whole
    wait_for(lambda: not stopped[0].is_running(), 10, "it is gone")


def test_a_node_that_is_kept_away_from_gets_nothing(tmp_path, toy_shards, monkeypatch) -> None:
    """Tune's actors and Train's workers carry the selector: one that names another node hinders nothing."""
    here = ray.get_runtime_context().get_node_id()
    elsewhere = ray.util.placement_group([{"CPU": 0.5}], bundle_label_selector=[away_from(here)])
    assert not elsewhere.wait(3)
    ray.util.remove_placement_group(elsewhere)
    shut = Quarantine()
    shut.nodes.add("f" * len(here))
    monkeypatch.setattr(desk, "Quarantine", lambda: shut)
    space = one_place(
        tmp_path,
        toy_shards.path,
        budget={"ladder_flops": LADDER, "total_flops": 9e9, "max_trials": 1},
        scaling={"slots": 1, "tiers": [SINGLE, {**PAIR, "from_rung_flops": LADDER[1]}]},
    )
    outcome = run_sweep(resolve(space), str(tmp_path))
    assert (outcome.rows, outcome.lost) == (2, 0)


def test_a_group_that_loses_a_worker_and_then_its_controller_ends_at_the_same_loss(tmp_path, toy_shards, whole) -> None:
    """One trial, its first rung on one worker, the next on two; a group is not restarted by itself, the driver's next
    try is a group of its own."""
    store = Store(tmp_path / "tiny")
    space = one_place(
        tmp_path,
        toy_shards.path,
        budget={"ladder_flops": LADDER, "total_flops": 9e9, "max_trials": 1},
        scaling={"slots": 1, "tiers": [SINGLE, {**PAIR, "from_rung_flops": LADDER[1]}]},
    )

    def rob() -> None:
        ours(WORKER)[-1].kill()
        see_it_go_on(store, "kill -9 of one of two workers")
        ours(CONTROLLER)[-1].kill()
        see_it_go_on(store, "kill -9 of the group's controller (and of a worker before)")

    with meanwhile(lambda: is_in_the_middle(store, rows=1), rob):
        run_sweep(resolve(space), str(tmp_path))
    state = check_sweep(store)
    assert len(state.losses) == 2
    assert "t00000-r1-a2" in state.closed_tasks
    alone = next(nll for trial, rung, _, nll in whole if (trial, rung) == ("t00000", 1))
    assert state.rungs[1]["t00000"]["metrics"]["nll"] == pytest.approx(alone, rel=1e-3)


def test_only_what_a_dead_actor_has_made_is_freed() -> None:
    @ray.remote(num_cpus=0)
    class Controller:
        def make(self) -> str:
            group = ray.util.placement_group([{"CPU": 0.1}])
            ray.get(group.ready())
            return group.id.hex()

    dead, alive = Controller.remote(), Controller.remote()
    kept = ray.get([dead.make.remote(), alive.make.remote()])[1]
    own = ray.util.placement_group([{"CPU": 0.1}])
    ray.get(own.ready())
    ray.kill(dead)

    def freed() -> bool:
        ClusterRoom(grows=False).free_orphans()
        return len(standing_groups()) < 3

    wait_for(freed, 30, "the dead one's group is freed")
    assert {group["placement_group_id"] for group in standing_groups()} == {kept, own.id.hex()}
    ray.util.remove_placement_group(own)
    ray.kill(alive)
    wait_for(lambda: freed() and not standing_groups(), 30, "and the other one's after it")


def test_what_a_group_held_is_freed_when_its_cleaner_was_killed_before(tmp_path, toy_shards) -> None:
    """Ray Train's cleaner frees what a dead controller's group held. Nobody misses it while the controller lives."""
    store = Store(tmp_path / "tiny")
    space = one_place(
        tmp_path,
        toy_shards.path,
        budget={"ladder_flops": [*LADDER, 4.5e8], "total_flops": 9e9, "max_trials": 1},
        scaling={"slots": 1, "tiers": [SINGLE, {**PAIR, "from_rung_flops": LADDER[1]}]},
    )

    def rob() -> None:
        ours(CLEANER)[-1].kill()
        wait_for(lambda: is_in_the_middle(store, rows=2), 120, "the group does not miss it, and trains the next task")
        ours(CONTROLLER)[-1].kill()
        see_it_go_on(store, "kill -9 of the cleaner and of the controller")
        ours(CLEANER)[-1].kill()
        ours(ACTOR)[-1].kill()
        see_it_go_on(store, "kill -9 of the cleaner and of the actor")

    with meanwhile(lambda: is_in_the_middle(store, rows=1), rob):
        run_sweep(resolve(space), str(tmp_path))
    state = check_sweep(store)
    assert [loss["task_id"] for loss in state.losses] == ["t00000-r2-a0", "t00000-r2-a1"]
    assert len(state.arrivals) == 3
