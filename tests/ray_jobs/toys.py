"""Small sweeps over toy shards: spaces as files, executors without training, processes, and clients of a head."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from ray_jobs.trial import Executor

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SINGLE = {"cpus": 0.5}
PAIR = {"from_rung_flops": 2e8, "engine": "deepspeed", "workers": 2, "zero_stage": 1, "cpus": 0.5}


def write_space(folder: Path, shards: Path | str, **changes: Any) -> Path:
    """A space of two rungs that trains in seconds; `changes` are merged into its top-level sections."""
    space: dict[str, Any] = {
        "name": "tiny",
        "metric": {"name": "nll"},
        "method": "random",
        "parameters": {
            "params": {"distribution": "log_uniform_values", "min": 2e3, "max": 4e3},
            "embedder_share": {"value": 0.1},
            "learning_rate": {"distribution": "log_uniform_values", "min": 1e-3, "max": 1e-2},
            "groups_per_step": {"value": 2},
            "window": {"value": 4},
            "group_windows": {"value": 2},
            "d_item": {"value": 8},
        },
        "budget": {"ladder_flops": [1e8, 2e8], "total_flops": 1e9, "max_trials": 4, "events_per_param": [0, 1e9]},
        "scheduler": {"type": "frontier", "eta": 2},
        "scaling": {"slots": 2, "tiers": [SINGLE]},
        "data": {"shards": str(shards), "evaluation_queries": 50},
    }
    for key, value in changes.items():
        space[key] = {**space.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(space))
    return path


def planted_executor(fault: Callable[[dict[str, Any]], None] | None = None) -> Executor:
    """An executor that answers at once; `fault(task)` may raise or kill. Built here so that it pickles by value."""

    def execute(task: dict[str, Any], assigned_at_s: float) -> dict[str, Any]:
        import os
        import time

        if fault is not None:
            fault(task)
        start_flops = 0 if task["from_rung"] is None else task["rung_flops"] - task["reserved_flops"]
        return {
            "kind": "rung",
            "status": "ok",
            **{name: task[name] for name in ("trial", "rung", "rung_flops", "seed", "config")},
            "params": task["config"]["params"],
            "embedder_share": 0.1,
            "path_flops": task["rung_flops"],
            "task_flops": task["rung_flops"] - start_flops,
            "eval_flops": 0,
            "events": 1000,
            "steps": 100,
            "metrics": {"nll": 3.0 - 1e-3 * task["rung"], "recall@10": 0.1},
            "errors": {"nll": 0.1},
            "checkpoint": f"trials/{task['trial']}/checkpoints/rung{task['rung']}-trunk",
            "warm_start_s": time.time() - assigned_at_s,
            "pid": os.getpid(),
        }

    return execute


def wait_for(condition: Callable[[], bool], limit_s: float, what: str) -> None:
    """Poll until it holds."""
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{what}: not within {limit_s:g} s"
        time.sleep(0.25)


def end_tree(pid: int) -> None:
    """Kill a process that a test has started, and everything under it."""
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in reversed(family):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=10)


def child_environment(**more: str) -> dict[str, str]:
    """The environment of a process that a test starts: no cluster of somebody else, one thread."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "TUNE_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


@dataclass
class Head:
    """A running head: where jobs go, and what a client must have in its environment."""

    dashboard: str
    environment: dict[str, str]

    def submit(self, name: str, *arguments: str) -> subprocess.CompletedProcess:
        """The documented line; waits for the job to end."""
        return self.ray("job", "submit", "--submission-id", name, *self.options(), "--", "python", *arguments)

    def options(self) -> list[str]:
        return ["--working-dir", str(ROOT), "--runtime-env", str(ROOT / "cluster" / "runtime_env.yaml")]

    def ray(self, *words: str) -> subprocess.CompletedProcess:
        first, second, *rest = words
        return subprocess.run(
            [str(BIN / "ray"), first, second, "--address", self.dashboard, *rest],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=600,
        )

    def status(self, name: str) -> str:
        """What `ray job status` says: Succeeded, Failed, Stopped, ..."""
        said = self.ray("job", "status", name)
        words = (said.stdout + said.stderr).upper()
        return next(word for word in ("SUCCEEDED", "FAILED", "STOPPED", "RUNNING", "PENDING", "") if word in words)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
