"""What a worker does with a task, without Ray."""

from __future__ import annotations

import time
from contextlib import contextmanager

import torch

from bfm.events.verified import Verification
from bfm.files import Store
from ray_jobs.trial import train_here
from tests.training.common import CPU, STAGE_1


def test_who_waits_for_the_sums_of_a_large_log_is_watched_and_does_not_stand_still(
    toy_shards, tmp_path, monkeypatch
) -> None:
    watched: list[str] = []
    looks: list[int] = []

    class Watching:
        @contextmanager
        def beating(self, task_id, notice):
            watched.append(task_id)
            yield
            watched.remove(task_id)

    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)

    def result(self, moves):
        steps = len(looks)
        moves()
        return f"watched: {watched}, moves: {len(looks) - steps}"

    monkeypatch.setattr(Verification, "result", result)
    task = {"task_id": "a", "trial": "a", "rung": 0, "rung_flops": 2.5e8, "config": STAGE_1.as_dict(), "seed": 3}
    row = train_here(
        {**task, "scaling": {"cpus": 1.0, "micro_groups": 4}},
        str(toy_shards.path),
        CPU,
        Store(tmp_path),
        lambda record: watched.index("a"),
        notice=lambda: bool(looks.append(1)),
        pulses=Watching(),
        save_every_s=60.0,
        assigned_at_s=time.time(),
    )
    assert (row["status"], row["verified_shards"]) == ("ok", "watched: ['a'], moves: 1")
