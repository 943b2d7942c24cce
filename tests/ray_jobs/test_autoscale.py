"""The one-machine autoscaling cluster: a submitted sweep brings it from no workers up, and it goes back to none."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from tests.events.serial import contents, prepare_serially
from tests.events.test_stages import make_log
from tests.ray_jobs.one_machine import Cluster, manage, one_machine
from tests.ray_jobs.toys import wait_for, write_space


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with one_machine() as cluster:
        yield cluster


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="loopback addresses beside 127.0.0.1 need Linux")
def test_a_sweep_scales_the_cluster_from_none_and_back(cluster, tmp_path, toy_shards) -> None:
    assert cluster.workers() == 0
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(cluster.workers())
            time.sleep(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        # A whole CPU for each of two slots: one node each.
        space = write_space(tmp_path, toy_shards.path, scaling={"slots": 2, "tiers": [{"cpus": 1}]})
        job = cluster.head.submit("sweep", "-m", "ray_jobs.sweep", str(space), "--storage", str(tmp_path / "runs"))
    finally:
        done.set()
        watcher.join()
    assert job.returncode == 0, job.stdout + job.stderr
    assert cluster.head.status("sweep") == "SUCCEEDED"
    assert max(seen) == 2
    wait_for(lambda: cluster.workers() == 0, 120, "the idle nodes are gone")
    assert "head up" in manage("status", "--state", str(cluster.state)).stdout


PREPARE_ON_TWO = """
import time

import ray

from ray_jobs.prepare import prepare_shards

ray.init()


@ray.remote
def hold():
    time.sleep(3)
    return ray.get_runtime_context().get_node_id()


# A small log would be done before the second node is up.
while len(set(ray.get([hold.remote(), hold.remote()]))) < 2:
    pass
prepare_shards({}, {}, {})
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(sys.platform != "linux", reason="loopback addresses beside 127.0.0.1 need Linux")
def test_two_nodes_prepare_what_one_process_prepares(cluster, tmp_path) -> None:
    (tmp_path / "shop.yaml").write_text("name: shop\nuser: user\ntime: time\nitem: item\n")
    (tmp_path / "logs").mkdir()
    log = make_log(num=400_000)
    for part in range(8):
        log.iloc[part::8].to_parquet(tmp_path / "logs" / f"{part}.parquet")
    words = [str(tmp_path / "shop.yaml"), [str(tmp_path / "logs")], str(tmp_path / "two")]
    driver = subprocess.run(
        [sys.executable, "-c", PREPARE_ON_TWO.format(*map(repr, words))],
        env=cluster.environment(),
        capture_output=True,
        text=True,
    )
    assert driver.returncode == 0, driver.stdout + driver.stderr
    # Blocks of datasets and plain tasks.
    ours = [task for task in cluster.listed("tasks") if task["name"] == "_task" or "Map" in task["name"]]
    nodes = {task["node_id"] for task in ours}
    assert len(nodes) == 2
    prepare_serially(tmp_path / "shop.yaml", [tmp_path / "logs"], tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(sys.platform != "linux", reason="loopback addresses beside 127.0.0.1 need Linux")
def test_stop_ends_its_own_processes_and_no_others(cluster) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    try:
        assert cluster.processes()
        assert "a cluster is running" in manage("start", "--state", str(cluster.state)).stdout
        assert manage("stop", "--state", str(cluster.state)).returncode == 0
        wait_for(lambda: not cluster.processes(), 30, "all processes of the cluster are gone")
        assert "head down, 0 worker nodes" in manage("status", "--state", str(cluster.state)).stdout
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_long_state_folder_is_refused(tmp_path) -> None:
    refused = manage("start", "--state", str(tmp_path / ("long" * 20)))
    assert refused.returncode == 2
    assert "shorter" in refused.stdout
