"""A worker group that stands by: its next task begins at once and is the same task; what it holds is nobody's loss."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bfm.files import Store
from bfm.training.journal import stop_task
from bfm.training.task import RungTask
from tests.ray_jobs.test_train import RUNG, cluster, task  # noqa: F401
from tests.ray_jobs.toys import wait_for

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

WARM_S = 2.0
TIMINGS = {"warm_start_s", "train_s", "eval_s", "trial", "checkpoint", "checkpoint_sha256", "model", "scores"}


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Observer of rank 0 that says which process it is in, and may end it."""

    store: str

    def __call__(self, task: dict[str, Any]) -> Any:
        name = task["task_id"]
        Store(self.store).put(f"pids/{name}", str(os.getpid()).encode())

        def observe(record: Any) -> None:
            if name.startswith("dies") and record.step == 20:
                os.kill(os.getpid(), signal.SIGKILL)

        return observe


def make_coordinator(cpus: float) -> Any:
    """An actor in the place of a Tune trial's."""

    @ray.remote(num_cpus=cpus)
    class Coordinator:
        def train(self, values: dict, shards: str, store: str, stays_s: float) -> dict | str:
            from ray_jobs.train import train_on_workers

            try:
                return train_on_workers(
                    values, shards, store, make_observer=Ranks(store), max_failures=0, stays_s=stays_s
                )
            except ray.train.TrainingFailedError as error:
                return f"failed: {error}"

    return Coordinator.remote()


class Place:
    """Where a test's tasks run."""

    def __init__(self, shards: Path, folder: Path) -> None:
        self.shards, self.store, self.coordinator = str(shards), Store(folder), make_coordinator(0.5)

    def begin(self, values: dict, stays_s: float = 120.0) -> Any:
        return self.coordinator.train.remote(values, self.shards, str(self.store.path("")), stays_s)

    def train(self, values: dict, stays_s: float = 120.0) -> dict | str:
        return ray.get(self.begin(values, stays_s), timeout=200)

    def pid(self, name: str) -> int:
        return int(self.store.get(f"pids/{name}"))


@pytest.fixture
def place(cluster, toy_shards, tmp_path) -> Iterator[Place]:  # noqa: F811
    place = Place(toy_shards.path, tmp_path)
    yield place
    ray.kill(place.coordinator)
    wait_for(lambda: ray.available_resources().get("CPU") == 2.0, 60, "the coordinator's death frees all it held")


def told(row: dict) -> dict:
    """What of a row does not depend on when and under which name it was made."""
    return {key: value for key, value in row.items() if key not in TIMINGS}


@pytest.mark.timeout(600)
def test_the_next_task_of_a_tier_begins_at_once_and_is_the_same(place) -> None:
    names = ["first", "second", "third", "fourth"]
    rows = {name: place.train(task(name)) for name in names}
    memory_bytes = [psutil.Process(place.pid("fourth")).memory_info().rss]
    for number in range(4):
        place.train(task(f"more{number}"))
    memory_bytes.append(psutil.Process(place.pid("fourth")).memory_info().rss)
    assert len({place.pid(name) for name in (*names, "more3")}) == 1
    assert max(rows[name]["warm_start_s"] for name in names[1:]) < WARM_S
    assert all(told(row) == told(rows["first"]) for row in rows.values()), "the first one was cold"
    assert memory_bytes[1] - memory_bytes[0] < 10e6, "four tasks leave nothing behind"
    with pytest.raises(ray.exceptions.RayTaskError, match="at least 100"):
        place.train(task("short", 5e7))
    long = task("long", 1e12)
    yielded = place.begin(long)
    stop_task(RungTask.from_task(long), place.store, at_once=False)
    with pytest.raises(ray.exceptions.RayTaskError, match="the same command goes on"):
        ray.get(yielded, timeout=120)
    assert place.train(task("after"))["warm_start_s"] < WARM_S, "neither a mistake nor a checkpoint ends the group"
    assert place.store.folders("trials/first") == ["trials/first/checkpoints"], "no notes of Ray Train are left"
    # Another tier: the two groups would not fit beside each other.
    wider = task("wider")
    wider["scaling"] = {**wider["scaling"], "cpus": 0.75}
    row = place.train(wider, stays_s=0.0)
    assert told(row) == told(rows["first"])
    assert not psutil.pid_exists(place.pid("fourth"))
    wait_for(lambda: ray.available_resources().get("CPU") == 1.5, 20, "who does not stand by gives all back")


@pytest.mark.timeout(600)
def test_a_death_leads_to_a_new_group(place) -> None:
    first = place.train(task("first"))
    os.kill(place.pid("first"), signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(place.pid("first")), 30, "an idle worker dies")
    second = place.train(task("second"))
    assert told(second) == told(first)
    assert place.pid("second") != place.pid("first")
    assert place.train(task("dies")).startswith("failed: ")
    assert place.pid("dies") == place.pid("second")
    third = place.train(task("third"))
    assert told(third) == told(first)
    assert place.pid("third") != place.pid("second")


@pytest.mark.timeout(600)
def test_who_waits_for_room_gets_what_an_idle_group_holds(place) -> None:
    from ray.util.placement_group import placement_group, remove_placement_group

    place.train(task("first"))
    assert ray.available_resources()["CPU"] == 0.5
    begun_s = time.monotonic()
    other = placement_group([{"CPU": 1.0}])
    ray.get(other.ready(), timeout=60)
    assert time.monotonic() - begun_s < 20
    remove_placement_group(other)
    place.train(task("second"), stays_s=1.0)
    wait_for(lambda: ray.available_resources().get("CPU") == 1.5, 60, "who was idle for too long gives all back")
