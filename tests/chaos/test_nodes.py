"""Machines that come and go under a sweep, on the one-machine cluster: its nodes are process trees that can be killed,
drained, and watched as they are added and taken away. And a job of it that is stopped."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import pytest

from bfm.files import Store
from bfm.sweep.ledger.ledger import has_begun, read_ledger, read_state
from tests.chaos.invariants import check_nothing_held, check_nothing_runs, check_sweep, lost_work
from tests.chaos.sweeps import LADDER, Driver, decisions, is_in_the_middle, one_place, see_it_go_on
from tests.ray_jobs.one_machine import Cluster, kill_tree, one_machine
from tests.ray_jobs.toys import wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform != "linux", reason="loopback addresses beside 127.0.0.1 need Linux"),
]
USED_WITHIN_S = 30.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with one_machine() as cluster:
        yield cluster
        # Whatever was done to it, its nodes go when nobody needs them, and the head stays.
        wait_for(lambda: cluster.workers() == 0, 120, "the idle nodes are gone")
        check_nothing_held(cluster)


def has(store: Store, kind: str) -> bool:
    return any(record["kind"] == kind for record in read_ledger(store).records)


def test_a_node_that_is_killed_in_the_middle_of_a_task_changes_nothing(cluster, tmp_path, toy_shards, whole) -> None:
    store = Store(tmp_path / "tiny")
    with Driver(one_place(tmp_path, toy_shards.path), tmp_path, cluster.environment()) as driver:
        driver.wait_for(lambda: is_in_the_middle(store), "a task is in its middle")
        node = cluster.node_process(cluster.nodes()[0]["node_ip"])
        family = [node, *node.children(recursive=True)]
        kill_tree(node)
        see_it_go_on(store, "kill -9 of a node")
        assert driver.end() == 0, driver.said
    assert "Traceback" not in driver.said
    state = check_sweep(store)
    assert [(loss["reason"], loss["fault"]) for loss in state.losses] == [
        ("its worker process died (killed, out of memory, or its node is gone)", "node")
    ]
    assert decisions(store) == whole
    check_nothing_runs(family)


def test_a_drained_node_gives_its_task_back_and_loses_nothing(cluster, tmp_path, toy_shards, whole) -> None:
    store = Store(tmp_path / "tiny")
    with Driver(one_place(tmp_path, toy_shards.path), tmp_path, cluster.environment()) as driver:
        driver.wait_for(lambda: is_in_the_middle(store), "a task is in its middle")
        node = cluster.nodes()[0]
        cluster.drain(node["node_id"], notice_s=20)
        wait_for(lambda: has(store, "yielded"), 20, "the task is given back before the machine goes")
        kill_tree(cluster.node_process(node["node_ip"]))
        see_it_go_on(store, "a node drained with 20 s of notice")
        assert driver.end() == 0, driver.said
    state = check_sweep(store)
    assert not lost_work(state)
    assert state.lost_flops == 0
    assert decisions(store) == whole


def test_a_job_that_is_stopped_gives_its_task_back_and_the_same_command_goes_on(
    cluster, tmp_path, toy_shards, whole
) -> None:
    space, store = one_place(tmp_path, toy_shards.path), Store(tmp_path / "tiny")
    sweep = ["-m", "ray_jobs.sweep", str(space), "--storage", str(tmp_path)]
    words = ["--submission-id", "stopped", "--no-wait", *cluster.head.options(), "--", "python", *sweep]
    submitted = cluster.head.ray("job", "submit", *words)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    wait_for(lambda: is_in_the_middle(store), 300, "a task is in its middle")
    cluster.head.ray("job", "stop", "stopped")
    assert cluster.head.status("stopped") == "STOPPED"
    check_nothing_held(cluster)
    assert not lost_work(check_sweep(store))
    assert has(store, "yielded")
    job = cluster.head.submit("again", *sweep)
    assert job.returncode == 0, job.stdout + job.stderr
    state = check_sweep(store)
    assert state.lost_flops == 0
    assert decisions(store) == whole


def test_a_node_that_comes_in_the_middle_is_used_within_30_s(cluster, tmp_path, toy_shards) -> None:
    """A second place is asked for when the first one trains; its node is counted from when Ray knows of it."""
    wait_for(lambda: cluster.workers() == 0, 60, "the cluster begins without nodes")
    store = Store(tmp_path / "tiny")
    space = one_place(
        tmp_path,
        toy_shards.path,
        scaling={"slots": 2, "tiers": [{"cpus": 1}]},
        budget={"ladder_flops": [2 * LADDER[1]], "total_flops": 9e9, "max_trials": 2},
    )
    with Driver(space, tmp_path, cluster.environment()) as driver:
        driver.wait_for(lambda: has_begun(store) and read_state(store).open_tasks, "the first task is given out")
        first = {node["node_id"] for node in cluster.nodes()}
        driver.wait_for(lambda: {node["node_id"] for node in cluster.nodes()} - first, "a node is added")
        added_s = time.monotonic()
        driver.wait_for(lambda: is_in_the_middle(store, tasks=2), "both nodes train")
        used_s = time.monotonic() - added_s
        assert driver.end() == 0, driver.said
    assert not lost_work(check_sweep(store))
    print(f"a node is added: trains after {used_s:.0f} s")
    assert used_s < USED_WITHIN_S
