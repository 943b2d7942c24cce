"""Steering a sweep as a user types it: what is wrong is refused by the verb, the rest stands beside the ledger."""

from __future__ import annotations

import itertools
import json
from functools import partial

import pytest

from bfm.files import Store
from bfm.sweep.driver import requests
from bfm.sweep.driver.driver import SweepDriver
from bfm.sweep.driver.requests import new_requests
from bfm.sweep.ledger.lease import Lease
from bfm.sweep.ledger.ledger import Ledger
from bfm.sweep.space.on_log import open_space
from bfm.sweep.space.spec import resolve
from tests.ray_jobs.toys import planted_executor, write_space

OWN = "params: 3210\nlearning_rate: 4e-3\n"


@pytest.fixture
def opened(tmp_path, toy_shards):
    return open_space(resolve(write_space(tmp_path, toy_shards.path)))


@pytest.fixture
def place(tmp_path, opened):
    """A sweep of two rows that nobody drives."""
    driver = drive(opened, tmp_path / "tiny")
    for _ in range(2):
        task = driver.next_task()
        driver.report(task.task_id, planted_executor()(task.as_dict(), 0.0))
    driver.close()
    return tmp_path / "tiny"


def drive(opened, place):
    store = Store(place)
    return SweepDriver.start(opened.feasible, Ledger(store, Lease.acquire(store, heartbeat_s=None)))


def take(driver, store):
    return [driver.take(request) for request in new_requests(store, driver.state.requests)]


def test_what_nobody_drives_is_told_the_next_time(bfm, opened, place, tmp_path):
    (tmp_path / "own.yaml").write_text(OWN)
    code, out, err = bfm("enqueue", place, tmp_path / "own.yaml", "--json")
    assert code == 0, err
    assert json.loads(out)["answer"] is None
    code, out, err = bfm("cancel", place, "t00000")
    assert code == 0, err
    assert "the next `bfm sweep` there takes it up" in out
    driver = drive(opened, place)
    assert [record["refused"] for record in take(driver, Store(place))] == [None, None]
    task = driver.next_task()
    assert (task.config["params"], task.config["learning_rate"], task.seed) == (3210, 4e-3, 0)
    assert driver.state.cancelled.keys() == {"t00000"}
    driver.close()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("stop", "PLACE"), "nobody runs this sweep; there is nothing to stop"),
        (("stop", "NOWHERE"), "there is no sweep here"),
        (("cancel", "PLACE", "t00077"), "TRIAL: there is no trial 't00077'; trials are t00000 to t0000"),
        (("enqueue", "PLACE", "TMP/missing.yaml"), "missing.yaml: cannot be read"),
        (("enqueue", "PLACE", "TMP/lr.yaml"), "lr.yaml: lr: unknown key; write `learning_rate`"),
        (("enqueue", "PLACE", "TMP/none.yaml"), "none.yaml: params: missing"),
        (("enqueue", "PLACE", "TMP/other.yaml"), "other.yaml: dropout: is 0.0 all over this space, not 0.5"),
        (("enqueue", "PLACE", "TMP/huge.yaml"), "huge.yaml: "),
        (("enqueue", "PLACE", "TMP/own.yaml", "--shards", "TMP"), "there is no shard set here"),
        (("enqueue", "PLACE", "TMP/own.yaml", "--seed", "-1"), "--seed: -1 is out of range"),
    ],
)
def test_what_makes_no_sense_is_refused_by_the_verb(bfm, place, tmp_path, words, expected):
    for name, text in {
        "own": OWN,
        "lr": OWN + "lr: 1\n",
        "none": "window: 4\n",
        "other": OWN + "dropout: 0.5\n",
        "huge": "params: 1e11\nlearning_rate: 1e-3\n",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    places = {"PLACE": str(place), "NOWHERE": str(tmp_path / "nowhere"), "TMP": str(tmp_path)}
    for name, there in places.items():
        words = [word.replace(name, there) for word in words]
    code, out, err = bfm(*words)
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1
    assert expected in err
    assert new_requests(Store(place), ()) == []


def test_what_the_sweep_refuses_in_time_is_said(bfm, opened, place, tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text(OWN)
    driver, store = drive(opened, place), Store(place)
    waiting = partial(requests.wait_for_answer, sleep=lambda _: take(driver, store))
    monkeypatch.setattr(requests, "wait_for_answer", waiting)
    code, out, err = bfm("stop", place)
    assert code == 0, err
    assert "stop, asked for by " in out
    monkeypatch.setattr(driver._ledger.lease, "epoch", 1)
    code, out, err = bfm("stop", place)
    assert (code, out) == (2, "")
    assert "the sweep refused it: the run that it was for has ended" in err
    driver.close()


def test_a_sweep_that_does_not_answer_is_not_waited_for_forever(bfm, opened, place, monkeypatch):
    driver = drive(opened, place)
    clock = itertools.count(0.0, 10.0).__next__
    waiting = partial(requests.wait_for_answer, clock=clock, sleep=lambda _: None)
    monkeypatch.setattr(requests, "wait_for_answer", waiting)
    code, out, err = bfm("cancel", place, "t00001")
    assert code == 0, err
    assert "not answered yet; `bfm status` will tell" in out
    driver.close()
