"""Ray nodes as process groups on loopback addresses: the node provider of the one-machine autoscaling cluster.

Enters: provider.state_dir and provider.gcs_address of the autoscaling config. Leaves: one file per live node under
state_dir/nodes (pid, its start time, address, tags), which is also what `manage.py stop` ends. Every node has an
address of its own because Ray's autoscaler knows nodes by address: on a shared one it never sees them idle.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from threading import RLock
from typing import Any

import psutil
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import NODE_KIND_HEAD, STATUS_UP_TO_DATE, TAG_RAY_NODE_KIND, TAG_RAY_NODE_STATUS
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE as TAG_TYPE

HEAD = "head"
# Ray replaces 127.0.0.1 by the address of the network card; the rest of 127/8 stays what it is.
HEAD_IP = "127.0.0.2"
END_LIMIT_S = 10.0


def living_process(record: dict[str, Any]) -> psutil.Process | None:
    """The recorded process, unless it has ended or its pid now belongs to another one."""
    try:
        process = psutil.Process(record["pid"])
        same = abs(started_at_s(process) - record["created_at_s"]) < 2.0
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def started_at_s(process: psutil.Process) -> float:
    """After the start of this machine, so that a wall clock that is set changes nothing."""
    return process.create_time() - psutil.boot_time()


def end_with_children(record: dict[str, Any]) -> None:
    """End the recorded process and everything under it: politely, then not."""
    process = living_process(record)
    if process is None:
        return
    family = [process, *process.children(recursive=True)]
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=END_LIMIT_S)
    for survivor in alive:
        survivor.kill()
    psutil.wait_procs(alive, timeout=END_LIMIT_S)


def start_recorded(command: list[str], environment: dict[str, str], log: Path) -> dict[str, Any]:
    """Start a process in a session of its own; its pid and creation time."""
    with open(log, "ab") as sink:
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
        )
    return {"pid": child.pid, "created_at_s": started_at_s(psutil.Process(child.pid))}


class LoopbackNodes(NodeProvider):
    """Starts and ends `ray start` processes; all state is in the node files, so a restarted monitor finds its nodes."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._state = Path(provider_config["state_dir"])
        self._lock = RLock()
        (self._state / "nodes").mkdir(parents=True, exist_ok=True)

    def _nodes(self) -> dict[str, dict[str, Any]]:
        head_tags = {TAG_RAY_NODE_KIND: NODE_KIND_HEAD, TAG_TYPE: HEAD, TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE}
        nodes = {HEAD: {"ip": HEAD_IP, "tags": head_tags}}
        with self._lock:
            for file in sorted((self._state / "nodes").glob("*.json")):
                record = json.loads(file.read_text())
                if living_process(record) is None:
                    file.unlink(missing_ok=True)
                else:
                    nodes[file.stem] = record
        return nodes

    def _write(self, node_id: str, record: dict[str, Any]) -> None:
        partial = self._state / "nodes" / f".{node_id}"
        partial.write_text(json.dumps(record))
        os.replace(partial, self._state / "nodes" / f"{node_id}.json")

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        """Ids of the nodes that carry all these tags."""
        wanted = tag_filters.items()
        return [node_id for node_id, record in self._nodes().items() if wanted <= record["tags"].items()]

    def is_running(self, node_id: str) -> bool:
        """Whether the node's process lives."""
        return node_id in self._nodes()

    def is_terminated(self, node_id: str) -> bool:
        """Whether the node's process is gone."""
        return node_id not in self._nodes()

    def node_tags(self, node_id: str) -> dict[str, str]:
        """The node's tags; none for a node that has just ended."""
        return self._nodes().get(node_id, {"tags": {}})["tags"]

    def internal_ip(self, node_id: str) -> str:
        """The node's loopback address; empty for a node that has just ended."""
        return self._nodes().get(node_id, {"ip": ""})["ip"]

    def external_ip(self, node_id: str) -> str:
        """The same: nobody outside reaches a loopback address."""
        return self.internal_ip(node_id)

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        """Add tags to a worker node."""
        with self._lock:
            record = self._nodes().get(node_id)
            if record is not None and node_id != HEAD:
                self._write(node_id, {**record, "tags": {**record["tags"], **tags}})

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> dict[str, Any]:
        """Start `count` nodes with these resources, each on the lowest free address from 127.0.0.3 up."""
        created = {}
        for _ in range(count):
            with self._lock:
                taken = {record["ip"] for record in self._nodes().values()}
                ip = next(f"127.0.0.{last}" for last in range(3, 255) if f"127.0.0.{last}" not in taken)
                node_id = f"node-{uuid.uuid4().hex[:8]}"
                record = self._start(node_id, ip, resources, tags[TAG_TYPE])
                record |= {"ip": ip, "tags": {**tags, TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE}}
                self._write(node_id, record)
                created[node_id] = record
        return created

    def _start(self, node_id: str, ip: str, resources: dict[str, float], node_type: str) -> dict[str, Any]:
        custom = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU", "memory")}
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
            *("--address", self.provider_config["gcs_address"], "--node-ip-address", ip),
            *("--num-cpus", f"{resources.get('CPU', 0):g}", "--num-gpus", f"{resources.get('GPU', 0):g}"),
            *("--resources", json.dumps(custom), "--object-store-memory", str(self._object_store_bytes())),
            *("--dashboard-agent-listen-port", "0", "--metrics-export-port", "0"),
            # In a shared folder, nodes that start together race for the same socket names and abort.
            *("--temp-dir", str(self._state / ip.rpartition(".")[2])),
        ]
        environment = {**os.environ, "RAY_CLOUD_INSTANCE_ID": node_id, "RAY_NODE_TYPE_NAME": node_type}
        return start_recorded(command, environment, self._state / f"{node_id}.log")

    def _object_store_bytes(self) -> int:
        return int(self.provider_config.get("object_store_bytes", 200e6))

    def terminate_node(self, node_id: str) -> None:
        """End a worker node's process group and forget it."""
        record = self._nodes().get(node_id)
        if record is None or node_id == HEAD:
            return
        end_with_children(record)
        with self._lock:
            (self._state / "nodes" / f"{node_id}.json").unlink(missing_ok=True)
