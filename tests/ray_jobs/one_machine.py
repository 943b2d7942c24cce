"""The one-machine autoscaling cluster as tests use it: begun and ended by its own script, and hurt on purpose."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.ray_jobs.toys import BIN, ROOT, Head, child_environment, free_port

MANAGE = ROOT / "cluster" / "one_machine" / "manage.py"
HEAD_IP = "127.0.0.2"


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
    gcs: str
    head: Head
    options: list[str]
    """Of its start."""

    def start(self) -> None:
        started = manage("start", *self.options)
        assert started.returncode == 0, started.stdout + started.stderr

    def stop(self) -> None:
        manage("stop", "--state", str(self.state))

    def environment(self) -> dict[str, str]:
        """Of a driver on this machine that is no job."""
        return {**self.head.environment, "RAY_ADDRESS": self.gcs, "PYTHONWARNINGS": "ignore"}

    def workers(self) -> int:
        said = manage("status", "--state", str(self.state)).stdout
        return int(said.split(", ")[1].split()[0])

    def processes(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter(["cmdline"]) if self._owns(process)]

    def _owns(self, process: psutil.Process) -> bool:
        return any(str(self.state) in word for word in process.info["cmdline"] or ())

    def listed(self, what: str) -> list[dict[str, Any]]:
        """`actors`, `nodes` or `placement_groups`, as the dashboard tells them."""
        token = self.head.environment["RAY_AUTH_TOKEN_PATH"]
        request = urllib.request.Request(
            f"{self.head.dashboard}/api/v0/{what}?limit=1000",
            headers={"Authorization": f"Bearer {Path(token).read_text()}"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["data"]["result"]["result"]

    def nodes(self) -> list[dict[str, Any]]:
        """Worker nodes that live, as Ray sees them."""
        return [node for node in self.listed("nodes") if node["state"] == "ALIVE" and not node["is_head_node"]]

    def node_process(self, node_ip: str) -> psutil.Process:
        """The `ray start` of a worker node; everything on that node is below it."""
        return psutil.Process(next(record["pid"] for record in self._recorded() if record["ip"] == node_ip))

    def node_processes(self) -> list[psutil.Process]:
        """Those of all worker nodes."""
        return [psutil.Process(record["pid"]) for record in self._recorded() if psutil.pid_exists(record["pid"])]

    def _recorded(self) -> list[dict[str, Any]]:
        return [json.loads(file.read_text()) for file in self.state.glob("nodes/*.json")]

    def drain(self, node_id: str, notice_s: int) -> None:
        """What a spot notice is forwarded as."""
        words = ["--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        said = subprocess.run(
            [str(BIN / "ray"), "drain-node", "--address", self.gcs, *words]
            + ["--deadline-remaining-seconds", str(notice_s)],
            env=self.head.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert said.returncode == 0, said.stdout + said.stderr

    def actors(self) -> list[psutil.Process]:
        """Processes of its nodes that train, or will."""
        family = [child for node in self.node_processes() for child in node.children(recursive=True)]
        return [process for process in family if title(process).startswith("ray::_Inner")]

    def kill_head(self) -> None:
        """The head's machine is gone: GCS, dashboard, autoscaler, raylet."""
        record = json.loads((self.state / "head.json").read_text())
        kill_tree(psutil.Process(record["pid"]))


def title(process: psutil.Process) -> str:
    """How it calls itself (Ray writes the class of an actor there); nothing once it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill_tree(process: psutil.Process) -> None:
    """SIGKILL to a process and all below it, at once, as when the machine's power goes."""
    family = [process, *process.children(recursive=True)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=20)


@contextmanager
def one_machine(max_workers: int = 2) -> Iterator[Cluster]:
    """A cluster of up to so many nodes of one CPU, on ports and in a folder of its own."""
    state = Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))
    dashboard, port = free_port(), 20_000 + os.getpid() % 10_000
    options = ["--state", str(state), "--port", str(port), "--dashboard-port", str(dashboard), "--idle-minutes", "0.15"]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(state / "token")}
    head = Head(f"http://127.0.0.1:{dashboard}", child_environment(**token))
    cluster = Cluster(state, f"{HEAD_IP}:{port}", head, [*options, "--max-workers", str(max_workers)])
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(state, ignore_errors=True)
