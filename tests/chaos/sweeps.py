"""Sweeps of real tasks that last some seconds each: the unbroken one in this process, and drivers that can be hurt."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from bfm.events.protocol import Protocol
from bfm.events.shards import Shards
from bfm.files import Store
from bfm.sweep.costs import Costs, LogFacts
from bfm.sweep.driver import SweepDriver, run_serial
from bfm.sweep.lease import Lease
from bfm.sweep.ledger import Ledger, has_begun, read_state
from bfm.sweep.on_log import on_log
from bfm.sweep.spec import resolve
from bfm.sweep.state import SweepState
from bfm.training.engine import EngineFactory
from bfm.training.journal import read_account
from bfm.training.rung import run_rung
from bfm.training.task import RungTask
from tests.ray_jobs.toys import end_tree, wait_for, write_space

LIMIT_S = 300.0
LADDER = [1.5e8, 3e8]
"""About 600 steps a rung: some seconds, in which a fault finds a task in its middle."""
Decisions = list[tuple[str, int, dict[str, Any], float]]


def one_place(folder: Path, shards: Path, **changes: Any) -> Path:
    """A space that is trained one task at a time, so that its decisions are the same whatever happens on the way."""
    scaling = {"slots": 1, "tiers": [{"cpus": 1}]}
    # What faults cost counts against the cap, which must not be what ends the sweep.
    budget = {"ladder_flops": LADDER, "total_flops": 9e9, "max_trials": 2}
    return write_space(folder, shards, **{"scaling": scaling, "budget": budget, **changes})


def unbroken(space: Path, storage: Path) -> Store:
    """The sweep of a space, run to its end in this process without Ray."""
    spec = resolve(space)
    shards = Shards.open(spec.shards)
    protocol = Protocol.load(shards)
    spec, store = on_log(spec, shards, protocol), Store(storage).child(spec.name)
    costs = Costs(LogFacts.from_shards(shards, protocol, spec.evaluation_queries))
    driver = SweepDriver.start(spec, Ledger(store, Lease.acquire(store)), costs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_serial(
            driver,
            lambda task: run_rung(RungTask.from_task(dataclasses.asdict(task)), shards, EngineFactory(), store),
        )
    finally:
        torch.set_num_threads(threads)
        driver.close()
    return store


def decisions(store: Store) -> Decisions:
    """What came of a sweep, in order: places, configurations and values."""
    state = read_state(store)
    rows = [state.rungs[rung][trial] for trial, rung in state.arrivals]
    return [(row["trial"], row["rung"], row["config"], row["metrics"]["nll"]) for row in rows]


class Driver:
    """`python -m ray_jobs.sweep` as a process of its own, and all processes below it that were ever seen."""

    def __init__(self, space: Path, storage: Path, environment: dict[str, str], *more: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ray_jobs.sweep", str(space), "--storage", str(storage), *more],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.family = [psutil.Process(self.process.pid)]
        self.code: int | None = None

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *error: object) -> None:
        end_tree(self.process.pid)

    def end(self, limit_s: float = LIMIT_S) -> str:
        """What it said, once it has ended."""
        self.family += psutil.Process(self.process.pid).children(recursive=True)
        said = self.process.communicate(timeout=limit_s)[0]
        self.code = self.process.returncode
        return said


def is_in_the_middle(store: Store, rows: int = 0, tasks: int = 1) -> bool:
    """Whether so many rows have come, and so many tasks are some steps on their way."""
    if not has_begun(store):
        return False
    state = read_state(store)
    return len(state.arrivals) >= rows and len(_trained(store, state)) >= tasks


def _trained(store: Store, state: SweepState) -> list[int]:
    """FLOPs that open tasks have been allowed beyond their first step, of those that were."""
    tasks = [RungTask.from_task(state.attempts[place].task) for place in state.open_tasks.values()]
    accounts = [read_account(task, store).spent_flops for task in tasks]
    # The first account covers one step; the next one comes with a measured speed, seconds ahead.
    return [flops for flops in accounts if flops > LADDER[0] / 100]


@contextmanager
def meanwhile(when: Callable[[], bool], hurt: Callable[[], None]) -> Iterator[None]:
    """In a thread beside the block: wait until it is time, then hurt; what that raises, the block raises."""
    failure: list[BaseException] = []

    def run() -> None:
        try:
            wait_for(when, LIMIT_S, "the middle of a task")
            hurt()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join(LIMIT_S)
    if failure:
        raise failure[0]
    assert not thread.is_alive(), "the sweep ended before its fault"
