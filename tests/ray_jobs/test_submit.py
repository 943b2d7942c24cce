"""`ray job submit` of a whole sweep to a head that the test starts, with the token that Ray's dashboard asks for."""

from __future__ import annotations

import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bfm.files import Store
from bfm.sweep.ledger.ledger import read_ledger
from bfm.sweep.ledger.state import SweepState
from tests.ray_jobs.toys import BIN, Head, child_environment, end_tree, free_port, wait_for, write_space

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="h", dir="/tmp"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    environment = child_environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    environment["PATH"] = f"{BIN}:{environment['PATH']}"
    gcs, dashboard, client = free_port(), free_port(), free_port()
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--num-cpus", "2"),
        *("--port", str(gcs), "--dashboard-port", str(dashboard), "--ray-client-server-port", str(client)),
        *("--dashboard-agent-listen-port", "0", "--metrics-export-port", "0", "--temp-dir", str(folder / "ray")),
    ]
    with open(folder / "head.log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: is_open(dashboard) or process.poll() is not None, 180, "the dashboard is up")
        assert process.poll() is None, (folder / "head.log").read_text()
        yield Head(f"http://127.0.0.1:{dashboard}", environment)
    finally:
        end_tree(process.pid)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_submitted_sweep_succeeds(head, tmp_path, toy_shards) -> None:
    space = write_space(tmp_path, toy_shards.path, budget={"max_trials": 2})
    job = head.submit("good", "-m", "ray_jobs.sweep", str(space), "--storage", str(tmp_path / "runs"))
    assert job.returncode == 0, job.stdout + job.stderr
    assert head.status("good") == "SUCCEEDED"
    state = SweepState.fold(read_ledger(Store(tmp_path / "runs" / "tiny")).records)
    assert state.finished
    assert {row["status"] for row in state.rungs[0].values()} == {"ok"}
    said = job.stdout + job.stderr
    assert "2 trials" in said
    assert "Traceback" not in said
    assert len(said.splitlines()) < 60, "a wall of log lines"


def test_a_sweep_of_which_nothing_comes_fails(head, tmp_path, toy_shards) -> None:
    # Every step multiplies the weights by 1 - 10.
    diverging = {"learning_rate": {"value": 10}, "weight_decay": {"value": 1}}
    space = write_space(tmp_path, toy_shards.path, budget={"max_trials": 2}, name="doomed", parameters=diverging)
    job = head.submit("bad", "-m", "ray_jobs.sweep", str(space), "--storage", str(tmp_path / "runs"))
    assert job.returncode != 0
    assert head.status("bad") == "FAILED", job.stdout + job.stderr
    state = SweepState.fold(read_ledger(Store(tmp_path / "runs" / "doomed")).records)
    assert {row["status"] for rung in state.rungs.values() for row in rung.values()} == {"diverged"}


def test_wrong_input_fails_the_job_with_its_one_line(head, tmp_path) -> None:
    space = write_space(tmp_path, tmp_path / "no-shards")
    job = head.submit("wrong", "-m", "ray_jobs.sweep", str(space), "--storage", str(tmp_path / "runs"))
    assert head.status("wrong") == "FAILED"
    assert "no-shards" in job.stdout + job.stderr
    assert "Traceback" not in job.stdout + job.stderr


def test_without_the_token_nobody_submits(head, tmp_path) -> None:
    stranger = Head(head.dashboard, {**head.environment, "RAY_AUTH_MODE": "disabled"})
    began_s = time.monotonic()
    job = stranger.submit("stranger", "-c", "print(1)")
    assert job.returncode != 0
    assert "401" in job.stdout + job.stderr or "auth" in (job.stdout + job.stderr).lower()
    assert time.monotonic() - began_s < 120
