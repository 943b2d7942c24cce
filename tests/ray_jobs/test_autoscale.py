"""The one-machine autoscaling cluster: a submitted sweep brings it from no workers up, and it goes back to none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.ray_jobs.toys import ROOT, Head, child_environment, free_port, wait_for, write_space

MANAGE = ROOT / "cluster" / "one_machine" / "manage.py"


def manage(verb: str, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(MANAGE), verb, *options],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )


@dataclass
class Cluster:
    state: Path
    head: Head

    def workers(self) -> int:
        said = manage("status", "--state", str(self.state)).stdout
        return int(said.split(", ")[1].split()[0])

    def processes(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter(["cmdline"]) if self._owns(process)]

    def _owns(self, process: psutil.Process) -> bool:
        return any(str(self.state) in word for word in process.info["cmdline"] or ())


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    state = Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))
    dashboard, gcs = free_port(), 20_000 + os.getpid() % 10_000
    ports = ["--port", str(gcs), "--dashboard-port", str(dashboard)]
    started = manage("start", "--state", str(state), *ports, "--idle-minutes", "0.15", "--max-workers", "2")
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(state / "token")}
        yield Cluster(state, Head(f"http://127.0.0.1:{dashboard}", child_environment(**token)))
    finally:
        manage("stop", "--state", str(state))
        shutil.rmtree(state, ignore_errors=True)


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
