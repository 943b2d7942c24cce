"""What outlives a driver, and what outlives a head: a cluster without its job, and a storage without its cluster."""

from __future__ import annotations

import signal
import sys

import pytest

from bfm.files import Store
from tests.chaos.invariants import check_nothing_held, check_nothing_runs, check_sweep
from tests.chaos.sweeps import Driver, decisions, is_in_the_middle, one_place
from tests.ray_jobs.one_machine import one_machine

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


def assert_one_line(said: str) -> None:
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("bfm: the cluster's head at "), said
