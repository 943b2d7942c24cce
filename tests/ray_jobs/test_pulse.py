"""A process that stands still is found and ended, also one that can say nothing; a busy one is left alone."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest
import ray

from bfm.sweep.ledger.lease import Holder
from ray_jobs import pulse
from ray_jobs.cluster_session import local_ray
from ray_jobs.preemption import Notice
from ray_jobs.pulse import Pulses, at_work, place_of
from tests.ray_jobs.toys import wait_for


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.delenv("RAY_ADDRESS", raising=False)
    with local_ray(2):
        yield
    patch.undo()


@ray.remote(num_cpus=0, max_retries=0)
def work(pulses: Pulses, task_id: str, seconds: float, busy: bool) -> None:
    notice = Notice()
    with at_work(pulses, task_id, notice):
        end_s = time.monotonic() + seconds
        if not busy:
            threading.Event().wait(seconds)
        while time.monotonic() < end_s:
            notice()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_what_stands_still_is_ended_and_what_moves_is_not(cluster, monkeypatch) -> None:
    monkeypatch.setattr(pulse, "HUNG_S", 2 * pulse.BEAT_S + 2)
    pulses = Pulses()
    names = ["stuck", "stopped", "group", "group"]
    stuck, stopped, waits, busy = (work.remote(pulses, name, 600, place % 2 == 1) for place, name in enumerate(names))
    found: dict[str, int] = {}

    def all_seen() -> bool:
        signs = ray.get(pulses._board.still_s.remote())
        found.update({process.task_id: process.holder.pid for process in signs})
        return len(signs) == 4

    wait_for(all_seen, 60, "four processes at work")
    assert pulses.nodes("group") == [ray.get_runtime_context().get_node_id()]
    os.kill(found["stopped"], signal.SIGSTOP)
    hung: dict[str, list] = {}
    wait_for(lambda: hung.update(pulses.hung()) or len(hung) == 2, 90, "two stand still")
    assert hung.keys() == {"stuck", "stopped"}
    for processes in hung.values():
        pulses.end(processes)
    for task in (stuck, stopped):
        with pytest.raises(ray.exceptions.WorkerCrashedError):
            ray.get(task, timeout=60)
    wait_for(lambda: not any(psutil.pid_exists(found[name]) for name in hung), 30, "both are gone")
    assert pulses.hung() == {}
    assert psutil.pid_exists(found["group"]), "one of it moves, the other one waits for it"
    for task in (waits, busy):
        ray.cancel(task, force=True)


def test_a_place_is_known_again_and_told_from_others() -> None:
    def stop():
        yield place_of(sys._getframe())
        while True:
            yield place_of(sys._getframe())

    first, second, third = itertools.islice(stop(), 3)
    assert first != second
    assert second == third
    assert place_of(None) == place_of(None)


@pytest.mark.timeout(120)
def test_a_task_that_ends_is_watched_no_more(cluster, monkeypatch) -> None:
    monkeypatch.setattr(pulse, "HUNG_S", 0.0)
    pulses = Pulses()
    ray.get(work.remote(pulses, "short", 0.1, True))
    wait_for(lambda: ray.get(pulses._board.still_s.remote()) == {}, 30, "nobody is left")
    assert pulses.hung() == {}


@pytest.mark.timeout(120)
def test_a_process_that_has_the_id_of_a_dead_one_is_left_alone(cluster) -> None:
    child = subprocess.Popen(["sleep", "600"])
    later_s = psutil.Process(child.pid).create_time() - psutil.Process().create_time()
    me = Holder.this_process()
    living = replace(me, pid=child.pid, started_at_s=me.started_at_s + later_s)
    try:
        ray.get(pulse._kill.remote(replace(living, started_at_s=living.started_at_s - 1000)))
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(1)
        ray.get(pulse._kill.remote(living))
        assert child.wait(10) == -signal.SIGKILL
        ray.get(pulse._kill.remote(living))
    finally:
        child.kill()


def test_where_nobody_listens_work_goes_on() -> None:
    with at_work(None, "task", Notice()):
        pass
