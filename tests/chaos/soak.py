"""A sweep under random faults: `python tests/chaos/soak.py --minutes 30 --every 20 --seed 0`.

Real tasks over toy shards on a one-machine cluster of two nodes; every so many seconds a fault drawn with the seed hits
whatever is there. A driver that has ended is started again, as a job that is submitted again would be. Afterwards the
sweep goes on to its end in peace, every invariant is asserted, and its frontier must be within noise of that of the
same sweep run in one process without faults. Prints one line per fault; exit 0, or the failed assertion.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402

from bfm.files import Store  # noqa: E402
from bfm.sweep.ledger.ledger import has_begun, read_state  # noqa: E402
from bfm.sweep.ledger.state import Record, SweepState  # noqa: E402
from tests.chaos.invariants import check_nothing_held, check_sweep  # noqa: E402
from tests.chaos.sweeps import LADDER, Driver, one_place, unbroken  # noqa: E402
from tests.helpers import make_shards  # noqa: E402
from tests.ray_jobs.one_machine import Cluster, kill_tree, one_machine  # noqa: E402
from tests.ray_jobs.toys import wait_for  # noqa: E402

TRIALS_PER_MINUTE = 2.0
"""What two nodes get done between faults, so that a sweep is about as long as its soak."""
NOTICE_S = 10
ENDINGS = {0, 1, -signal.SIGKILL, 128 + signal.SIGTERM}


@dataclass
class Soak:
    """The cluster, the sweep on it, and its driver, which is started again whenever it has ended."""

    cluster: Cluster
    space: Path
    rng: random.Random
    faults: Counter[str] = field(default_factory=Counter)
    drivers: list[Driver] = field(default_factory=list)
    due: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    """What follows on a fault, and when."""

    @property
    def store(self) -> Store:
        return Store(self.space.parent / "tiny")

    @property
    def driver(self) -> Driver:
        return self.drivers[-1]

    def state(self) -> SweepState:
        return read_state(self.store) if has_begun(self.store) else SweepState()

    def begin(self) -> None:
        self.drivers.append(Driver(self.space, self.space.parent, self.cluster.environment()))

    def tend(self) -> bool:
        """Do what is due, and start the driver again where it has ended; whether the sweep has finished."""
        now_s = time.monotonic()
        for entry in [entry for entry in self.due if entry[0] <= now_s]:
            self.due.remove(entry)
            entry[1]()
        code = self.driver.process.poll()
        if code is None:
            return False
        said = self.driver.said
        assert code in ENDINGS, f"the driver ended with {code}: {said}"
        assert "Traceback" not in said, said
        if code == 0:
            return True
        if code == 1:
            print(f"    the driver ended: {said.splitlines()[-1]}", flush=True)
        self.begin()
        return False

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        self.due.append((time.monotonic() + delay_s, action))

    def any(self, processes: list[psutil.Process]) -> psutil.Process | None:
        return self.rng.choice(processes) if processes else None


def kill_actor(soak: Soak) -> bool:
    actor = soak.any(soak.cluster.actors())
    if actor is not None:
        actor.kill()
    return actor is not None


def terminate_actor(soak: Soak) -> bool:
    actor = soak.any(soak.cluster.actors())
    if actor is not None:
        actor.terminate()
    return actor is not None


def stop_actor(soak: Soak) -> bool:
    actor = soak.any(soak.cluster.actors())
    if actor is not None:
        actor.suspend()
        soak.later(NOTICE_S, lambda: actor.is_running() and actor.resume())
    return actor is not None


def kill_node(soak: Soak) -> bool:
    node = soak.any(soak.cluster.node_processes())
    if node is not None:
        kill_tree(node)
    return node is not None


def drain_node(soak: Soak) -> bool:
    nodes = soak.cluster.nodes()
    if not nodes:
        return False
    node = soak.rng.choice(nodes)
    process = soak.cluster.node_process(node["node_ip"])
    soak.cluster.drain(node["node_id"], NOTICE_S)
    soak.later(NOTICE_S, lambda: process.is_running() and kill_tree(process))
    return True


def kill_driver(soak: Soak) -> bool:
    soak.driver.process.kill()
    return True


def terminate_driver(soak: Soak) -> bool:
    soak.driver.process.terminate()
    return True


def kill_head(soak: Soak) -> bool:
    soak.cluster.kill_head()
    soak.driver.end()
    soak.cluster.stop()
    soak.cluster.start()
    return True


FAULTS: dict[Callable[[Soak], bool], float] = {
    kill_actor: 4,
    terminate_actor: 3,
    stop_actor: 2,
    kill_node: 3,
    drain_node: 3,
    kill_driver: 2,
    terminate_driver: 2,
    kill_head: 1,
}
"""Fault -> weight in the draw; each says whether there was anything to hurt, and a driver there always is."""


def draw(soak: Soak) -> Callable[[Soak], bool]:
    (fault,) = soak.rng.choices(list(FAULTS), list(FAULTS.values()))
    return fault


def soak_for(soak: Soak, minutes: float, every_s: float) -> float:
    """Faults until the time is over or the sweep has finished; the seconds that it took."""
    began_s = time.monotonic()
    next_s = began_s + every_s
    while time.monotonic() - began_s < 60 * minutes and not soak.tend():
        if time.monotonic() >= next_s:
            fault = draw(soak)
            while not fault(soak):
                fault = draw(soak)
            soak.faults[fault.__name__] += 1
            state = soak.state()
            print(
                f"{time.monotonic() - began_s:6.0f} s  {fault.__name__:18s} {len(state.arrivals)} rows, "
                f"{len(state.losses)} lost, {state.lost_flops:.2g} of {state.spent_flops:.2g} FLOPs lost",
                flush=True,
            )
            next_s = time.monotonic() + every_s
        time.sleep(0.5)
    return time.monotonic() - began_s


def best(state: SweepState) -> dict[int, Record]:
    """Rung -> its best row."""
    return {
        rung: min((row for row in rows.values() if row["status"] == "ok"), key=lambda row: row["metrics"]["nll"])
        for rung, rows in state.rungs.items()
    }


def check_frontier(hurt: SweepState, whole: SweepState) -> None:
    """Equal rows where both sweeps trained the same, and frontiers within the noise of their rows."""
    for trial, rung in set(hurt.arrivals) & set(whole.arrivals):
        one, other = hurt.rungs[rung][trial], whole.rungs[rung][trial]
        if one["config"] == other["config"]:
            assert one["metrics"] == other["metrics"], f"{trial} rung {rung} is not what it is without faults"
    found, expected = best(hurt), best(whole)
    assert found.keys() == expected.keys()
    for rung in sorted(found):
        gap = found[rung]["metrics"]["nll"] - expected[rung]["metrics"]["nll"]
        error = math.hypot(found[rung]["errors"]["nll"], expected[rung]["errors"]["nll"])
        print(f"rung {rung}: {gap:+.4f} to the unbroken sweep, noise {error:.4f}", flush=True)
        assert abs(gap) <= 2 * error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=20, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    num_trials = max(2, math.ceil(options.minutes * TRIALS_PER_MINUTE))
    space = one_place(
        folder,
        make_shards(folder / "shards").path,
        # Losses of work must be bounded by the faults, not by tries or the cap.
        scaling={"slots": 2, "tiers": [{"cpus": 1}], "max_retries": 1000},
        budget={"ladder_flops": LADDER, "total_flops": 100 * num_trials * LADDER[-1], "max_trials": num_trials},
    )
    try:
        with one_machine() as cluster:
            soak = Soak(cluster, space, random.Random(options.seed))
            soak.begin()
            try:
                seconds = soak_for(soak, options.minutes, options.every)
                print(f"{sum(soak.faults.values())} faults in {seconds:.0f} s, now to the end in peace", flush=True)
                wait_for(soak.tend, 60 * (10 + options.minutes), "the sweep is finished")
            finally:
                soak.driver.__exit__()
            state = check_sweep(soak.store)
            wait_for(lambda: cluster.workers() == 0, 120, "the idle nodes are gone")
            check_nothing_held(cluster)
        check_frontier(state, check_sweep(unbroken(space, folder / "whole")))
        print(
            f"{dict(soak.faults)}, {len(soak.drivers)} drivers, {len(state.arrivals)} rows, {len(state.losses)} tasks "
            f"lost; {state.lost_flops:.3g} of {state.spent_flops:.3g} FLOPs lost; every invariant holds"
        )
        shutil.rmtree(folder)
    finally:
        print(f"ledger and logs: {folder}") if folder.exists() else None


if __name__ == "__main__":
    main()
