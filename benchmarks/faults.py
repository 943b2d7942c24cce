"""What a fault costs: the same sweep of real tasks, stopped or robbed of a process in the middle, and gone on with.

    python benchmarks/faults.py --shards SHARDS

Every case begins the sweep anew with two slots, waits until both tasks are well on their way, brings the fault, lets
the same command (or the same process) go on to the end, and reads the ledger: FLOPs that were charged without a row or
a checkpoint coming of them, also as seconds of one slot's work and as a share of the open tasks' reservations.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml
from common import ROOT, machine, publish

from bfm.files import Store
from bfm.sweep.ledger.ledger import has_begun, read_ledger
from bfm.sweep.ledger.state import SweepState
from bfm.sweep.ledger.task import Task
from bfm.training.journal import read_account

RUNG_FLOPS = 2e11
LIMIT_S = 900.0
SPACE: dict[str, Any] = {
    "name": "faults",
    "metric": {"name": "nll"},
    "method": "random",
    "parameters": {
        "params": {"distribution": "log_uniform_values", "min": 8e3, "max": 1.2e4},
        "embedder_share": {"value": 0.1},
        "groups_per_step": {"value": 2},
        "window": {"value": 512},
        "group_windows": {"value": 2},
        "d_item": {"value": 16},
    },
    "budget": {"ladder_flops": [RUNG_FLOPS], "total_flops": 4 * RUNG_FLOPS, "max_trials": 2},
    "scheduler": {"type": "random"},
    "scaling": {"slots": 2, "tiers": [{"engine": "plain", "workers": 1, "cpus": 1}]},
    "seeds": [0],
}


class Case(NamedTuple):
    """One fault."""

    name: str
    inject: Callable[[subprocess.Popen[bytes]], None]
    resumes: bool
    """Whether the same command is run again afterwards."""


def _signal(number: int) -> Callable[[subprocess.Popen[bytes]], None]:
    return lambda sweep: sweep.send_signal(number)


def _kill_worker(sweep: subprocess.Popen[bytes]) -> None:
    """The trial's actor that is busiest."""
    actors = [process for process in psutil.Process(sweep.pid).children(recursive=True) if _is_actor(process)]
    max(actors, key=lambda process: sum(process.cpu_times()[:2])).kill()


def _is_actor(process: psutil.Process) -> bool:
    # Tune wraps a trainable that is bound to parameters; Ray writes the class into the process's title.
    return " ".join(process.cmdline()).startswith("ray::_Inner")


CASES = (
    Case("graceful stop of the driver (SIGTERM), resumed", _signal(signal.SIGTERM), True),
    Case("kill -9 of the driver, resumed", _signal(signal.SIGKILL), True),
    Case("kill -9 of a worker", _kill_worker, False),
)


def run(case: Case, shards: str) -> str:
    """The case's line of the table."""
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        space = Path(folder) / "space.yaml"
        space.write_text(yaml.safe_dump({**SPACE, "data": {"shards": shards, "evaluation_queries": 200}}))
        store = Store(Path(folder) / "runs" / "faults")
        sweep = _begin(space, folder)
        _wait(lambda: _on_their_way(store))
        reserved_flops = _state(store).reserved_flops
        case.inject(sweep)
        fault_s = time.monotonic()
        if case.resumes:
            _end(sweep, (128 + signal.SIGTERM, -signal.SIGKILL))
            fault_s = time.monotonic()
            sweep = _begin(space, folder)
        _end(sweep, (0,))
        whole_s = time.monotonic() - fault_s
        state = _state(store)
    rows = [row for rung in state.rungs.values() for row in rung.values()]
    flops_per_s = sum(row["task_flops"] for row in rows) / sum(row["train_s"] for row in rows)
    lost = state.lost_flops
    line = (
        f"| {case.name} | {len(state.losses)} | {lost:.2g} | {lost / flops_per_s:.1f} | {lost / reserved_flops:.1%} | "
        f"{whole_s:.0f} |"
    )
    print(line, flush=True)
    return line


def _begin(space: Path, folder: str) -> subprocess.Popen[bytes]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "TUNE_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "ray_jobs.sweep", str(space), "--storage", f"{folder}/runs"],
        env={**kept, "TMPDIR": folder, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
    )


def _end(sweep: subprocess.Popen[bytes], codes: tuple[int, ...]) -> None:
    children = psutil.Process(sweep.pid).children(recursive=True)
    code = sweep.wait(LIMIT_S)
    if code not in codes:
        raise RuntimeError(f"the sweep ended with {code}")
    # What a killed driver leaves behind.
    _, alive = psutil.wait_procs(children, timeout=20)
    for process in alive:
        process.kill()


def _state(store: Store) -> SweepState:
    return SweepState.fold(read_ledger(store).records)


def _on_their_way(store: Store) -> bool:
    """Whether both tasks have trained a quarter of their rung."""
    if not has_begun(store):
        return False
    state = _state(store)
    tasks = [Task.from_dict(state.attempts[place].task) for place in state.open_tasks.values()]
    trained = [read_account(task, store).spent_flops for task in tasks]
    return len(trained) == 2 and min(trained) > RUNG_FLOPS / 4


def _wait(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > end_s:
            raise TimeoutError("the sweep has not come far enough")
        time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True)
    arguments = parser.parse_args()
    lines = [
        "# What a fault costs",
        "",
        f"Written by `python benchmarks/faults.py`: two tasks of {RUNG_FLOPS:.0e} FLOPs at the same time, the fault "
        "after a quarter of them or more. Lost: charged, and neither a row nor a checkpoint came of it. The share is "
        "of the two open reservations; each lost task would cost about half of them if it were charged whole.",
        "",
        "| fault | tasks lost | FLOPs lost | seconds of one slot | of reservations | s from there to the end |",
        "|---|---|---|---|---|---|",
        *(run(case, str(Path(arguments.shards).absolute())) for case in CASES),
    ]
    publish("faults", "\n".join([*lines, "", machine("ray", "torch"), ""]))


if __name__ == "__main__":
    main()
