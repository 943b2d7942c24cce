"""Lease: one driver has a sweep, a dead one blocks nobody for long, a live one is not disturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from bfm.errors import CorruptError, UserError
from bfm.files import Store
from bfm.sweep.ledger.lease import RENEWALS, STALE_S, Holder, Lease, latest_epoch


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "sweep")


def test_a_second_sweep_on_the_folder_is_refused(store):
    lease = Lease.acquire(store, heartbeat_s=None)
    with pytest.raises(UserError, match=f"another sweep is running here .process {os.getpid()}"):
        Lease.acquire(store, heartbeat_s=None)
    lease.release()
    assert not lease.is_held
    assert Lease.acquire(store, heartbeat_s=None).epoch == 2


def test_a_dead_process_of_this_machine_does_not_block(store):
    code = (
        "import sys, os; from bfm.files import Store; from bfm.sweep.ledger.lease import Lease;"
        "Lease.acquire(Store(sys.argv[1])); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(store.path())], check=False)
    assert latest_epoch(store) == 1
    assert Lease.acquire(store, heartbeat_s=None).epoch == 2


def test_a_dead_process_that_nobody_reaps_does_not_block(store):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started_at_s = psutil.Process(child.pid).create_time() - psutil.boot_time()
    holder = replace(Holder.this_process(), pid=child.pid, started_at_s=started_at_s)
    assert holder.runs()
    child.kill()
    deadline_s = time.monotonic() + 5
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not holder.runs()
    child.communicate()


def test_a_process_id_that_is_used_again_is_not_the_holder(store):
    me = Holder.this_process()
    Lease.acquire(store, holder=replace(me, started_at_s=me.started_at_s - 1000), heartbeat_s=None)
    assert Lease.acquire(store, heartbeat_s=None).epoch == 2


class Elsewhere:
    """A driver on another machine, seen over time that only waiting moves: it beats until it dies."""

    def __init__(self, store, dies_at_s):
        self.now_s, self.dies_at_s, self._beaten_s = 0.0, dies_at_s, 0.0
        there = replace(Holder.this_process(), machine="another")
        self._lease = Lease.acquire(store, holder=there, heartbeat_s=None)

    def sleep(self, seconds):
        self.now_s += seconds
        if self.now_s < self.dies_at_s and self.now_s - self._beaten_s >= 15:
            self._beaten_s = self.now_s
            self._lease.renew()

    def contend(self, store):
        return Lease.acquire(store, clock=lambda: self.now_s, sleep=self.sleep, heartbeat_s=None)


def test_a_driver_submitted_again_waits_for_the_dead_one(store, caplog):
    elsewhere = Elsewhere(store, dies_at_s=40.0)
    elsewhere.sleep(30.0)
    assert elsewhere.contend(store).epoch == 2
    assert 30 + STALE_S <= elsewhere.now_s <= 30 + STALE_S + 5
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "waiting for" in caplog.text


def test_a_driver_that_lives_on_elsewhere_is_not_waited_for_long(store):
    elsewhere = Elsewhere(store, dies_at_s=1e9)
    with pytest.raises(UserError, match="another sweep is running here"):
        elsewhere.contend(store)
    assert elsewhere.now_s < 20 * RENEWALS


def test_a_driver_that_is_released_while_one_waits_is_followed_at_once(store):
    elsewhere = Elsewhere(store, dies_at_s=1e9)

    def sleep(seconds):
        elsewhere.now_s += seconds
        elsewhere._lease.release()

    Lease.acquire(store, clock=lambda: elsewhere.now_s, sleep=sleep, heartbeat_s=None)
    assert elsewhere.now_s < 5


HOURS_S = 5 * 3600.0


@pytest.fixture(params=[HOURS_S, -HOURS_S])
def set_clock(request, monkeypatch):
    """Sets this machine's clock forward or back, and with it what the system tells of its start."""

    def set_it():
        now, boot, create = time.time, psutil.boot_time, psutil.Process.create_time
        monkeypatch.setattr(time, "time", lambda: now() + request.param)
        monkeypatch.setattr(psutil, "boot_time", lambda: boot() + request.param)
        monkeypatch.setattr(psutil.Process, "create_time", lambda process: create(process) + request.param)

    return set_it


def test_a_process_of_a_machine_whose_clock_was_set_still_holds_its_lease(store, set_clock):
    lease = Lease.acquire(store, heartbeat_s=None)
    set_clock()
    with pytest.raises(UserError, match="another sweep is running here"):
        Lease.acquire(store, heartbeat_s=None)
    lease.release()
    assert Lease.acquire(store, heartbeat_s=None).epoch == 2


@pytest.mark.parametrize("lives", [True, False])
def test_another_machine_s_clock_says_nothing_of_its_driver(store, set_clock, lives):
    """Neither a clock that is wrong from the start nor one that is set between two looks."""
    elsewhere = Elsewhere(store, dies_at_s=1e9 if lives else 0.0)
    set_clock()
    if lives:
        with pytest.raises(UserError, match="another sweep is running here"):
            elsewhere.contend(store)
    else:
        assert elsewhere.contend(store).epoch == 2
        assert STALE_S <= elsewhere.now_s <= STALE_S + 5


def test_the_heartbeat_thread_beats_and_ends(store):
    lease = Lease.acquire(store, heartbeat_s=0.01)
    deadline_s = time.monotonic() + 5
    while not store.exists("lease/000001-alive.json") and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert json.loads(store.get("lease/000001-alive.json"))["at_s"] > 0
    lease.release()


def test_a_forbidden_beat_is_a_missed_one(store, monkeypatch, caplog):
    lease = Lease.acquire(store, heartbeat_s=None)
    answers = iter([UserError("403"), OSError("gone")])

    def renew(self):
        if (answer := next(answers, None)) is not None:
            raise answer
        self._stop.set()

    monkeypatch.setattr(Lease, "renew", renew)
    lease._heartbeat_s = 0.001
    lease._beat()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2


def test_a_damaged_lease_is_named(store):
    Lease.acquire(store, heartbeat_s=None)
    store.put("lease/000001.json", b"{")
    with pytest.raises(CorruptError, match=r"000001\.json"):
        Lease.acquire(store, heartbeat_s=None)
