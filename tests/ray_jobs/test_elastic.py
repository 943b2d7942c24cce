"""A task takes more workers while it runs, and its row is that of a run of one."""

from __future__ import annotations

import numpy as np
import pytest
import ray
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bfm.files import Store
from bfm.sweep.driver import driver
from bfm.sweep.ledger.ledger import read_ledger
from bfm.sweep.space.spec import resolve
from bfm.training.engine import EngineFactory
from bfm.training.records import StepRecord
from bfm.training.rung import run_rung
from bfm.training.task import RungTask
from ray_jobs import desk
from ray_jobs.cluster_session import local_ray
from ray_jobs.sweep import run_sweep
from tests.ray_jobs.toys import SINGLE, wait_for, write_space

ELASTIC = {"from_rung_flops": 2e8, "engine": "deepspeed", "workers": [1, 2], "zero_stage": 2, "cpus": 0.5}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_idle_room_goes_to_the_task_that_runs_alone(tmp_path, toy_shards, monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(driver, "GROW_LEFT_S", 5.0)
    monkeypatch.setattr(desk, "LOOK_S", 1.0)
    space = write_space(
        tmp_path,
        toy_shards.path,
        # Two begin, one goes on: its rung is for one slot of two, and then the other one's room is idle.
        scheduler={"type": "asha-promote"},
        scaling={"slots": 2, "tiers": [SINGLE, ELASTIC]},
        budget={"ladder_flops": [1e8, 1.6e9], "total_flops": 1e10, "max_trials": 2},
    )
    events = []
    with local_ray(2, dashboard=True):
        outcome = run_sweep(resolve(space), str(tmp_path), progress=lambda event, _: events.append(event.kind))
        wait_for(lambda: ray.available_resources().get("CPU") == 2.0, 60, "all CPUs are free again")
    assert (outcome.rows, outcome.failed, outcome.lost) == (3, 0, 0)
    assert events.count("growing") == events.count("yielded") == 1
    records = list(read_ledger(Store(tmp_path / "tiny")).records)
    tasks = [record["task"] for record in records if record["kind"] == "task" and record["task"]["rung"] == 1]
    assert [task["scaling"]["workers"] for task in tasks] == [1, 2]
    (top,) = (record["row"] for record in records if record["kind"] == "row" and record["row"]["rung"] == 1)
    assert (top["workers"], top["zero_stage"]) == (2, 2)
    (charged,) = (record["charged_flops"] for record in records if record["kind"] == "yielded")
    assert charged + top["task_flops"] <= tasks[0]["reserved_flops"]
    assert outcome.spent_flops == charged + sum(r["row"]["task_flops"] for r in records if r["kind"] == "row")

    board = EventAccumulator(
        str(tmp_path / "tiny" / "tensorboard" / top["trial"]), size_guidance={"scalars": 0}
    ).Reload()
    seen = {point.step: point.value for point in board.Scalars("train/loss")}
    (resized_flops,) = (record["progress_flops"] for record in records if record["kind"] == "yielded")
    step_flops = top["path_flops"] / top["steps"]
    resized = round(resized_flops / step_flops)
    # A trunk is the same whatever its rung, so the unbroken one need not be trained to the end.
    short = {"trial": "short", "task_id": "short", "rung_flops": 2 * (resized_flops + 100 * step_flops)}
    torch.set_num_threads(1)
    expected: dict[int, float] = {}
    task = RungTask.from_task({**tasks[0], **short})
    run_rung(task, toy_shards, EngineFactory(), Store(tmp_path / "tiny"), observer(expected))
    # Later on rounding grows: two runs of one worker that sum in another order end 2 % apart in nll.
    near = [step for step in expected if resized - 40 <= step <= resized + 80 and step in seen]
    # A point is written where C has grown by 2 %.
    assert len(near) >= 5
    assert min(near) <= resized <= max(near)
    np.testing.assert_allclose([seen[step] for step in near], [expected[step] for step in near], rtol=1e-4)


def observer(losses: dict[int, float]):
    def observe(record) -> None:
        if isinstance(record, StepRecord) and record.phase == "trunk":
            losses[record.step] = float(record.loss)

    return observe
