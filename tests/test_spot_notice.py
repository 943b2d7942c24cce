"""The forwarder of spot notices, against metadata services and a `ray` of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "cluster" / "spot_notice.py"
TOKEN = "of this instance"


class Metadata(ThreadingHTTPServer):
    """What AWS (version 2 alone: with a token) and Google answer on a machine."""

    notice = False
    asked = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        assert self.path == "/latest/api/token"
        assert int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) > 0
        self.say(200, TOKEN)

    def do_GET(self) -> None:
        self.server.asked += 1
        if self.path == "/computeMetadata/v1/instance/preempted":
            google = self.headers["Metadata-Flavor"] == "Google"
            self.say(200 if google else 403, "TRUE" if self.server.notice else "FALSE")
        elif self.headers["X-aws-ec2-metadata-token"] != TOKEN:
            self.say(401, "")
        elif self.path == "/latest/meta-data/spot/instance-action" and self.server.notice:
            at = datetime.now(UTC) + timedelta(seconds=120)
            self.say(200, f'{{"action": "terminate", "time": "{at:%Y-%m-%dT%H:%M:%SZ}"}}')
        else:
            self.say(404, "")

    def say(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with Metadata() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def calls(tmp_path) -> Path:
    """What a `ray` that fails at first was called with; it is first on the PATH of `start`."""
    calls = tmp_path / "calls"
    fake = tmp_path / "ray"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n[ $(wc -l < {calls}) -gt 1 ]\n')
    fake.chmod(0o755)
    return calls


def start(cloud: str, calls: Path, address: str) -> subprocess.Popen:
    environment = {
        **os.environ,
        "PATH": f"{calls.parent}{os.pathsep}{os.environ['PATH']}",
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{address}/",
        "GCE_METADATA_HOST": address,
        # Asked for the machine's own addresses, it would answer for another machine, if at all.
        "http_proxy": "http://127.0.0.1:1",
    }
    return subprocess.Popen([sys.executable, str(SCRIPT), cloud], env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("cloud", "most_s"), [("aws", 120), ("gcp", 30)])
def test_a_notice_drains_this_node_until_ray_takes_it(cloud: str, most_s: int, metadata: Metadata, calls: Path) -> None:
    watcher = start(cloud, calls, metadata.address)
    try:
        deadline_s = time.monotonic() + 30
        while metadata.asked < 2:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        assert not calls.exists(), "without a notice nothing is drained"
        metadata.notice = True
        said, _ = watcher.communicate(timeout=30)
    finally:
        watcher.kill()
    assert watcher.returncode == 0
    assert "Ray did not take the drain; once more" in said
    for call in calls.read_text().splitlines():
        words = call.split()
        assert words[:3] == ["drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        assert words[-2] == "--deadline-remaining-seconds"
        assert most_s - 10 <= int(words[-1]) <= most_s
        assert "--node-id" not in words, "left out, it is the node of this machine"
    assert len(calls.read_text().splitlines()) == 2


def test_a_service_that_does_not_answer_is_told_once_and_asked_again(calls: Path) -> None:
    watcher = start("aws", calls, "127.0.0.1:1")
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            watcher.wait(timeout=6)
    finally:
        watcher.kill()
    assert watcher.stdout.read().count("gives no answer") == 1
    assert not calls.exists()


def test_ray_has_the_command() -> None:
    ray = Path(sys.executable).with_name("ray")
    said = subprocess.run([str(ray), "drain-node", "--help"], capture_output=True, text=True, timeout=120).stdout
    for word in ("--reason ", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "--deadline-remaining-seconds"):
        assert word in said
