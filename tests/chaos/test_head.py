"""What outlives a driver, and what outlives a head: a cluster without its job, and a storage without its cluster."""

from __future__ import annotations

import os
import signal
import sys
import time

import psutil
import pytest

from bfm.files import Store
from tests.chaos.invariants import check_nothing_held, check_nothing_runs, check_sweep
from tests.chaos.sweeps import Driver, decisions, is_in_the_middle, one_place
from tests.ray_jobs.one_machine import one_machine
from tests.ray_jobs.toys import child_environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="loopback addresses beside 127.0.0.1 need Linux"),
]
ODD_PLACE = {"LC_ALL": "C", "TZ": "Australia/Lord_Howe"}
"""A container's locale, and a clock that is changed by half an hour twice a year."""


def test_a_driver_and_then_the_head_are_killed_and_the_same_command_goes_on(tmp_path, toy_shards, whole) -> None:
    """The storage is a folder whose name has spaces and letters that are not ASCII."""
    folder = tmp_path / "Läufe vom Dienstag"
    folder.mkdir()
    space, store = one_place(folder, toy_shards.path), Store(folder / "tiny")
    with one_machine() as cluster:
        environment = {**cluster.environment(), **ODD_PLACE}
        with Driver(space, folder, environment) as driver:
            driver.wait_for(lambda: is_in_the_middle(store), "a task is in its middle")
            actors = cluster.actors()
            driver.process.kill()
            assert driver.end() == -signal.SIGKILL
            check_sweep(store)
            check_nothing_held(cluster)
            check_nothing_runs(actors)
        with Driver(space, folder, environment) as driver:
            driver.wait_for(lambda: is_in_the_middle(store, rows=1), "a task is in its middle")
            family = [child for node in cluster.node_processes() for child in [node, *node.children(recursive=True)]]
            cluster.kill_head()
            assert driver.end() == 1
            assert_one_line(driver.said)
        check_sweep(store)
        cluster.stop()
        check_nothing_runs(family)
        cluster.start()
        with Driver(space, folder, environment, "--resume", "must") as driver:
            assert driver.end() == 0, driver.said
        check_nothing_held(cluster)
    state = check_sweep(store)
    assert [loss["reason"] for loss in state.losses] == ["the driver ended"] * 2
    assert decisions(store) == whole


def test_a_signal_to_a_driver_and_all_that_it_started_is_one_line_and_the_same_command_goes_on(
    tmp_path, toy_shards, whole
) -> None:
    """As `timeout`, `systemctl stop` and job schedulers send it: this machine's Ray is gone before tasks can yield."""
    space, store = one_place(tmp_path, toy_shards.path), Store(tmp_path / "tiny")
    environment = child_environment()
    with Driver(space, tmp_path, environment) as driver:
        driver.wait_for(lambda: is_in_the_middle(store), "a task is in its middle")
        family = [driver.process.pid, *(child.pid for child in psutil.Process(driver.process.pid).children(True))]
        processes = [psutil.Process(pid) for pid in family]
        os.killpg(driver.process.pid, signal.SIGTERM)
        began_s = time.monotonic()
        assert driver.end() in (1, 128 + signal.SIGTERM)
        print(f"SIGTERM to all of a sweep's processes: it ends after {time.monotonic() - began_s:.0f} s")
        assert "Traceback" not in driver.said
        assert driver.said.splitlines()[-1].startswith(("bfm: Ray's processes", "2 trials", "1 trials")), driver.said
        check_nothing_runs(processes)
    check_sweep(store)
    with Driver(space, tmp_path, environment, "--resume", "must") as driver:
        assert driver.end() == 0, driver.said
    state = check_sweep(store)
    print(f"SIGTERM to all of a sweep's processes: {state.lost_flops:.2g} FLOPs lost")
    assert decisions(store) == whole


def assert_one_line(said: str) -> None:
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("bfm: the cluster's head at "), said
