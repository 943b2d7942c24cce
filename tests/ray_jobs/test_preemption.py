"""A notice is a flag that training sees; an actor that is to go trains no further task."""

import json
import os
import signal
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import RayActorError
from ray.tune.experiment import Trial

from bfm.training.task import Account
from ray_jobs import preemption, trial, tuning
from ray_jobs.preemption import Notice
from ray_jobs.trial import LEAVES, NODE, YIELDED, RungTrial


class Node:
    """This process's node, and those that are drained."""

    draining: dict[str, int]

    def get_node_id(self):
        return "here"

    def get_draining_nodes(self):
        return self.draining


@pytest.fixture
def node(monkeypatch):
    node = Node()
    node.draining = {}
    monkeypatch.setattr(ray, "get_runtime_context", lambda: node)
    monkeypatch.setattr(ray._private.state, "state", node)
    monkeypatch.setattr(preemption, "LOOK_S", 0.01)
    return node


def test_a_drain_of_this_node_is_a_notice_and_of_another_is_none(node) -> None:
    notice = Notice()
    assert not notice()
    node.draining = {"there": 0}
    time.sleep(0.1)
    assert not notice()
    node.draining = {"there": 0, "here": 5}
    deadline_s = time.monotonic() + 5
    while not notice():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_sigterm_is_a_notice(node, monkeypatch) -> None:
    started = []
    monkeypatch.setattr(preemption.threading, "Timer", lambda *arguments: started.append(arguments) or Ended())
    before = signal.getsignal(signal.SIGTERM)
    notice = Notice()
    try:
        notice.take_sigterm()
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert started[0][1:] == (os._exit, [143]), "it ends by itself in any case"


class Ended:
    def start(self):
        pass


@pytest.mark.parametrize(
    ("task", "account"),
    [
        ({"progress": None, "rung_flops": 9, "reserved_flops": 9}, Account()),
        ({"progress": "p", "rung_flops": 9, "reserved_flops": 2}, Account(0, "p", 7)),
    ],
)
def test_an_actor_that_is_to_go_gives_a_task_back_as_it_came_and_ends(monkeypatch, task, account) -> None:
    notice, trained, ended = Notice(), [], []
    monkeypatch.setattr(trial, "notice", lambda: notice)
    monkeypatch.setattr(trial.os, "_exit", ended.append)
    notice._given.set()
    monkeypatch.setattr(trial.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    actor = RungTrial.__new__(RungTrial)
    actor._execute = lambda *task: trained.append(task)
    # Tune tells nobody of a trial whose actor refuses it, so that its task would be waited for for ever.
    assert actor.reset_config({"task": json.dumps(task), "assigned_at_s": 0, "avoid": ""})
    assert actor.step() == {YIELDED: json.dumps(asdict(account)), LEAVES: True, NODE: "here"}
    assert not trained
    assert not ended
    actor.step()
    assert ended == [143]


def test_tune_does_not_run_the_task_of_a_preempted_actor_again_by_itself(monkeypatch, tmp_path) -> None:
    """The driver alone decides that, under a reservation; Tune's own run would be one that nobody has asked for."""
    for name, value in tuning._ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(RayActorError, "preempted", True)
    tune_trial = Trial("nobody", stub=True)
    tune_trial.storage = SimpleNamespace(trial_driver_staging_path=str(tmp_path), trial_fs_path=str(tmp_path))
    tune_trial.handle_error(RayActorError())
    assert not tune_trial.should_recover()
