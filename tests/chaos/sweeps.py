"""Sweeps of real tasks that last some seconds each: the unbroken one in this process, and drivers that can be hurt."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bfm.files import Store
from bfm.sweep.driver.driver import SweepDriver
from bfm.sweep.ledger.lease import Lease
from bfm.sweep.ledger.ledger import Ledger, has_begun, read_state
from bfm.sweep.ledger.state import SweepState
from bfm.sweep.space.on_log import open_space
from bfm.sweep.space.spec import resolve
from bfm.training.engine import EngineFactory
from bfm.training.journal import read_account
from bfm.training.rung import run_rung
from bfm.training.task import RungTask
from tests.ray_jobs.toys import end_tree, wait_for, write_space
from tests.sweep.serial import run_serial

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
    opened = open_space(resolve(space))
    store = Store(storage).child(opened.spec.name)
    driver = SweepDriver.start(opened.feasible, Ledger(store, Lease.acquire(store)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_serial(
            driver,
            lambda task: run_rung(RungTask.from_task(dataclasses.asdict(task)), opened.shards, EngineFactory(), store),
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
    """`python -m ray_jobs.sweep` as a process of its own."""

    def __init__(self, space: Path, storage: Path, environment: dict[str, str], *more: str) -> None:
        self.log = storage / f"driver-{time.monotonic_ns()}.log"
        with open(self.log, "wb") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ray_jobs.sweep", str(space), "--storage", str(storage), *more],
                env=environment,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *error: object) -> None:
        end_tree(self.process.pid)

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Poll until it holds; fails at once where the driver has ended before."""
        holds = False

        def look() -> bool:
            nonlocal holds
            holds = bool(condition())
            return holds or self.process.poll() is not None

        wait_for(look, LIMIT_S, what)
        assert holds, self.said

    def end(self, limit_s: float = LIMIT_S) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(limit_s)

    @property
    def said(self) -> str:
        return self.log.read_text()


def is_in_the_middle(store: Store, rows: int = 0, tasks: int = 1) -> bool:
    """Whether so many rows have come, and so many tasks are some steps on their way."""
    if not has_begun(store):
        return False
    state = read_state(store)
    return len(state.arrivals) >= rows and len(_on_their_way(store, state)) >= tasks


def _on_their_way(store: Store, state: SweepState) -> set[str]:
    """Open tasks that have been allowed more than their first step."""
    tasks = [RungTask.from_task(state.attempts[place].task) for place in state.open_tasks.values()]
    # The first account covers one step; the next one comes with a measured speed, seconds ahead.
    return {task.task_id for task in tasks if read_account(task, store).spent_flops > LADDER[0] / 100}


def see_it_go_on(store: Store, fault: str) -> None:
    """Wait until another task, or another try, trains than before the fault; print what that took."""
    before, began_s = set(read_state(store).open_tasks), time.monotonic()
    wait_for(lambda: _on_their_way(store, read_state(store)) - before, LIMIT_S, f"{fault}: a task trains again")
    seconds, state = time.monotonic() - began_s, read_state(store)
    print(f"{fault}: {seconds:.0f} s until a task trains again, {state.lost_flops:.2g} FLOPs lost")


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
