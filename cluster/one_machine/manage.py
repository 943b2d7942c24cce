"""Start, show and stop the one-machine autoscaling cluster: `python cluster/one_machine/manage.py start|status|stop`.

Enters: autoscaler.yaml beside this file and a state folder. Leaves: a head without CPUs, whose autoscaler starts and
ends worker nodes; a token of its own; and on stdout the environment that a client needs. `stop` ends the processes
recorded in the state folder and no others (`ray stop` would end every Ray process on the machine).
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from loopback_nodes import HEAD_IP, end_with_children, living_process, start_recorded  # noqa: E402

START_LIMIT_S = 120.0
# Unix socket paths end at 107 characters, and Ray needs about 70 of them below the state folder.
STATE_LIMIT_CHARACTERS = 35


def main(arguments: list[str] | None = None) -> int:
    """Exit 0, 1 if the head does not come up, 2 if the request is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["start", "status", "stop"])
    parser.add_argument("--state", default=f"{tempfile.gettempdir()}/bfm-cluster-{os.getuid()}", help="state folder")
    parser.add_argument("--port", type=int, default=6390, help="port of the head (GCS)")
    parser.add_argument("--dashboard-port", type=int, default=8265, help="port that `ray job submit` talks to")
    parser.add_argument("--max-workers", type=int, help="worker nodes at most (default: autoscaler.yaml)")
    parser.add_argument("--worker-cpus", type=float, help="CPUs of a worker node (default: autoscaler.yaml)")
    parser.add_argument("--idle-minutes", type=float, help="an idle node ends after this (default: autoscaler.yaml)")
    options = parser.parse_args(arguments)
    state = Path(options.state).absolute()
    if options.verb == "status":
        return status(state)
    if options.verb == "stop":
        return stop(state)
    return start(state, options)


def start(state: Path, options: argparse.Namespace) -> int:
    """Start the head and wait until its dashboard takes jobs."""
    if len(str(state)) > STATE_LIMIT_CHARACTERS:
        print(f"--state: {state} is longer than {STATE_LIMIT_CHARACTERS} characters; Ray's sockets need a shorter one")
        return 2
    if any(living_process(record) for record in recorded(state)):
        print(f"a cluster is running in {state}; stop it first")
        return 2
    for port in (options.port, options.dashboard_port):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                print(f"port {port} is taken; choose another with --port and --dashboard-port")
                return 2
    shutil.rmtree(state, ignore_errors=True)
    (state / "nodes").mkdir(parents=True)
    token = state / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    (state / "autoscaler.yaml").write_text(yaml.safe_dump(autoscaling_config(state, options)))
    head = start_recorded(head_command(state, options), head_environment(token), state / "head.log")
    (state / "head.json").write_text(json.dumps(head))
    deadline_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline_s and living_process(head):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", options.dashboard_port)) == 0:
                print(f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token}")
                print(f"export RAY_ADDRESS=http://127.0.0.1:{options.dashboard_port}")
                return 0
        time.sleep(0.2)
    print(f"the head did not come up; see {state / 'head.log'}")
    stop(state)
    return 1


def autoscaling_config(state: Path, options: argparse.Namespace) -> dict[str, Any]:
    """autoscaler.yaml with this run's folder, address and overrides."""
    config = yaml.safe_load((HERE / "autoscaler.yaml").read_text())
    config["provider"] |= {"state_dir": str(state), "gcs_address": f"{HEAD_IP}:{options.port}"}
    worker = config["available_node_types"]["worker"]
    if options.max_workers is not None:
        config["max_workers"] = worker["max_workers"] = options.max_workers
    if options.worker_cpus is not None:
        worker["resources"]["CPU"] = options.worker_cpus
    if options.idle_minutes is not None:
        config["idle_timeout_minutes"] = options.idle_minutes
    return config


def head_command(state: Path, options: argparse.Namespace) -> list[str]:
    """`ray start --head` on loopback, without CPUs."""
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address", HEAD_IP, "--port", str(options.port), "--num-cpus", "0", "--num-gpus", "0"),
        *("--autoscaling-config", str(state / "autoscaler.yaml"), "--temp-dir", str(state / "ray")),
        *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(options.dashboard_port)),
        *("--dashboard-agent-listen-port", "0", "--metrics-export-port", "0"),
        *("--ray-client-server-port", str(options.port + 1)),
        *("--object-store-memory", "200000000"),
    ]


def head_environment(token: Path) -> dict[str, str]:
    """Token authentication, the provider's module on the path, and an autoscaler that looks every second."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    return environment | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_enable_autoscaler_v2": "0",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        # Jobs say `python`: they get the one that runs the cluster.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
    }


def recorded(state: Path) -> list[dict[str, Any]]:
    """Process records of the head (first) and the worker nodes."""
    return [json.loads(file.read_text()) for file in [*state.glob("head.json"), *sorted(state.glob("nodes/*.json"))]]


def status(state: Path) -> int:
    """Print one line: head up or down, worker nodes alive."""
    head_up = any(living_process(json.loads(file.read_text())) for file in state.glob("head.json"))
    workers = [file for file in state.glob("nodes/*.json") if living_process(json.loads(file.read_text()))]
    print(f"head {'up' if head_up else 'down'}, {len(workers)} worker nodes")
    return 0 if head_up else 1


def stop(state: Path) -> int:
    """End the head first (so that it starts no new node), then every node that it has recorded."""
    for record in recorded(state):
        end_with_children(record)
    for record in recorded(state):
        end_with_children(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
