"""What a worker does with a task, without Ray."""

from __future__ import annotations

import errno
import os
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from bfm.errors import PausedError
from bfm.events.verified import Verification
from bfm.files import Store
from ray_jobs.trial import pauses_where_full, train_here
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


def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_the_storages_or_somebody_elses(tmp_path, monkeypatch) -> None:
    runs = tmp_path / "runs"
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(PausedError) as paused, pauses_where_full(str(runs)):
            Store(runs).put("ledger/1", b"x")
    assert str(paused.value).startswith(
        f"paused: {runs}: No space left on device; free some of that disk, or have fewer"
    )
    with pytest.raises(PausedError), pauses_where_full(str(runs)):
        raise RuntimeError(f"a worker failed: OSError: [Errno 28] No space left on device: '{runs}/trials/t0'")
    with pytest.raises(OSError, match="No space left"), pauses_where_full(str(runs)):
        full()
    with pytest.raises(OSError, match="No space left"), pauses_where_full("s3://bucket/runs"):
        full()
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=4096))
    with pytest.raises(PausedError, match="No space left"), pauses_where_full(str(runs)):
        full()
