"""A task on a real Ray Train worker group: rows come back, kills are recovered, mistakes stay one-liners."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile

import pytest

from bfm.errors import InfeasibleError
from bfm.files import Store
from bfm.training.rung import run_rung
from bfm.training.task import RungTask
from tests.training.common import CPU, STAGE_1

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

RUNG = 2.5e8


@pytest.fixture(scope="module")
def cluster():
    # Short: the path of Ray's sockets must stay below 107 characters.
    directory = tempfile.mkdtemp(prefix="r", dir="/tmp")
    environment = {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    ray.init(
        address="local",
        num_cpus=2,
        _temp_dir=directory,
        # Without it, Ray Train cannot ask who is alive and leaks or drops placement groups.
        include_dashboard=True,
        log_to_driver=False,
        runtime_env={"env_vars": environment},
    )
    yield
    ray.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


def task(name: str, rung_flops: float = RUNG) -> dict:
    scaling = {"engine": "zero", "workers": 2, "zero_stage": 2, "cpus": 0.5, "gpus": 0, "micro_groups": 2}
    return {
        "task_id": name,
        "trial": name,
        "rung": 0,
        "rung_flops": rung_flops,
        "config": STAGE_1.as_dict(),
        "seed": 3,
        "scaling": scaling,
    }


class KillOnce:
    """Observer of rank 0 that writes the curve down and kills its worker once, in the middle."""

    def __init__(self, task: dict, store: str, kill_at: int | None) -> None:
        self.store, self.name, self.kill_at = Store(store), task["task_id"], kill_at
        self.lines = []
        self.attempt = len(self.store.names(f"curves/{self.name}"))

    def __call__(self, record) -> None:
        self.lines.append(f"{record.step} {record.loss!r}")
        self.store.put(f"curves/{self.name}/{self.attempt}", "\n".join(self.lines).encode())
        if record.step == self.kill_at and self.attempt == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class MakeKillOnce:
    def __init__(self, store: str, kill_at: int | None) -> None:
        self.store, self.kill_at = store, kill_at

    def __call__(self, task: dict) -> KillOnce:
        return KillOnce(task, self.store, self.kill_at)


def curve(store: Store, name: str, attempt: int) -> dict[int, str]:
    lines = store.get(f"curves/{name}/{attempt}").decode().splitlines()
    return {int(line.split()[0]): line for line in lines}


@pytest.mark.timeout(600)
def test_killed_worker_is_recovered_on_the_same_curve(cluster, toy_shards, tmp_path, monkeypatch):
    from ray_jobs.train import train_on_workers

    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    store, shards = Store(tmp_path), str(toy_shards.path)
    rows = {}
    for name, kill_at in (("whole", None), ("cut", 60)):
        make = MakeKillOnce(str(tmp_path), kill_at)
        rows[name] = train_on_workers(
            task(name), shards, str(tmp_path), make_observer=make, save_every_s=0.0, max_failures=1
        )
    assert "RAY_API_SERVER_ADDRESS" not in os.environ, "the group's environment must not outlive it"
    whole, first, second = curve(store, "whole", 0), curve(store, "cut", 0), curve(store, "cut", 1)
    assert max(first) == 60
    assert 1 < min(second) <= 61
    assert {**first, **second} == whole
    for key in ("status", "path_flops", "metrics", "errors", "events", "steps", "workers", "zero_stage"):
        assert rows["cut"][key] == rows["whole"][key]
    assert rows["cut"]["task_flops"] >= rows["whole"]["task_flops"] == rows["whole"]["path_flops"]
    plain = run_rung(RungTask.from_task(task("plain")), toy_shards, CPU, store)
    assert plain["path_flops"] == rows["whole"]["path_flops"]
    assert plain["metrics"]["nll"] == pytest.approx(rows["whole"]["metrics"]["nll"], rel=1e-3)


@pytest.mark.timeout(300)
def test_a_mistake_comes_back_as_itself_from_inside_an_actor(cluster, toy_shards, tmp_path):
    """Nested as in a sweep: the caller is an actor that holds half a CPU."""

    @ray.remote(num_cpus=0.5)
    class Trial:
        def run(self, values, shards, storage):
            from ray_jobs.train import train_on_workers

            try:
                return train_on_workers(values, shards, storage)
            except InfeasibleError as error:
                return str(error)

    trial = Trial.remote()
    answer = ray.get(trial.run.remote(task("short", 5e7), str(toy_shards.path), str(tmp_path)))
    assert "at least 100" in answer
    ray.kill(trial)
