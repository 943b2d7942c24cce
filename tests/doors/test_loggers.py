"""Rows reach MLflow (the real one) and W&B (a fake of what is called of it); no tool's trouble reaches the sweep."""

from __future__ import annotations

import logging
import math
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bfm.doors.loggers import Told, Tracker, mlflow_log, open_logs, tracking, values_of, wandb_log
from bfm.errors import UserError
from bfm.sweep.space.spec import json_schema
from tests.sweep.world import make_spec

TOLD = Told("mine", "s3://bucket/mine", ("params", "window"))


def row(trial: str = "t00001", rung: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "trial": trial, "rung": rung, "seed": 0, "status": "ok", "params": 1010, "embedder_share": 0.1,
        "events": 5000, "path_flops": 10**9 * 4**rung, "epochs": 0.5, "metrics": {"nll": 8.0 - rung, "ndcg@10": 0.1},
        "errors": {"nll": 0.02, "ndcg@10": None}, "config": {"params": 1000.0, "window": 32, "d_item": 8},
    } | more  # fmt: skip


@pytest.fixture
def wandb(monkeypatch):
    """Every run that was begun, as the calls that it got."""
    runs: list[SimpleNamespace] = []

    class Run:
        def __init__(self, **settings: Any) -> None:
            self.told = SimpleNamespace(settings=settings, logged=[], exit_code=None)
            runs.append(self.told)

        def log(self, values: dict, step: int) -> None:
            self.told.logged.append((step, values))

        def finish(self, exit_code: int) -> None:
            self.told.exit_code = exit_code

    fake = ModuleType("wandb")
    fake.init, fake.Settings, fake.runs = Run, SimpleNamespace, runs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_has_a_run_per_trial_that_goes_on(wandb):
    log = wandb_log(TOLD)
    for told in (row(), row("t00002", status="diverged", metrics={}, errors={}), row(rung=1)):
        log(told)
    first, failed, again = wandb.runs
    assert first.settings["project"] == "mine"
    assert first.settings["name"] == "t00001"
    assert first.settings["resume"] == "allow"
    assert first.settings["config"] == {"params": 1000.0, "window": 32, "seed": 0, "sweep": "s3://bucket/mine"}
    assert first.settings["id"] == again.settings["id"] != failed.settings["id"]
    assert [step for step, _ in first.logged + again.logged] == [0, 1]
    values = first.logged[0][1]
    expected = {"nll": 8, "ndcg@10": 0.1, "N": 1010, "C": 1e9, "error/nll": 0.02}
    assert {name: values[name] for name in expected} == expected
    assert (first.exit_code, failed.exit_code) == (0, 1)


def test_mlflow_has_a_run_per_trial_that_goes_on(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/runs")
    for told in (row(), row("t00002", status="diverged", metrics={}, errors={})):
        mlflow_log(TOLD)(told)
    # Another process, after a crash or a pause.
    mlflow_log(TOLD)(row(rung=1))
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("mine").experiment_id], order_by=["tags.mlflow.runName"])
    first, failed = sorted(runs, key=lambda run: run.info.run_name)
    assert (first.info.run_name, first.info.status, failed.info.status) == ("t00001", "FINISHED", "FAILED")
    assert first.data.params == {"params": "1000.0", "window": "32", "seed": "0"}
    assert first.data.metrics["ndcg_at_10"] == 0.1
    told = [(point.step, point.value) for point in client.get_metric_history(first.info.run_id, "nll")]
    assert told == [(0, 8.0), (1, 7.0)]
    assert failed.data.metrics["N"] == 1010


def test_a_wrong_address_of_mlflow_is_trouble_of_a_tool(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "foo://bar")
    log = mlflow_log(TOLD)
    with pytest.raises(Exception, match=r"foo|registry|scheme"):
        log(row())


def test_values_are_finite_numbers():
    found = values_of(row(metrics={"nll": math.nan, "mrr@10": None, "ndcg@10": 0.2}))
    assert not {"nll", "mrr@10", "error/ndcg@10"} & found.keys()
    assert found["ndcg@10"] == 0.2


def test_the_trouble_of_a_tool_is_said_once_and_counted(caplog):
    taken: list[str] = []

    def broken(told: dict) -> None:
        raise ConnectionError("no route\nto host")

    with (
        caplog.at_level(logging.WARNING),
        tracking({"mlflow": broken, "wandb": lambda r: taken.append(r["trial"])}) as tell,
    ):
        for number in range(5):
            tell(row(f"t{number}"))
    assert taken == [f"t{number}" for number in range(5)]
    first, last = (record.getMessage() for record in caplog.records)
    assert first == "mlflow does not take the row of t0 (ConnectionError: no route to host); the sweep goes on"
    assert last == "mlflow took 0 rows, refused 5 and left 0"


def test_a_tool_that_hangs_is_left_behind(caplog):
    hangs = threading.Event()
    tracker = Tracker("wandb", lambda told: hangs.wait())
    for number in range(3):
        tracker.row(row(f"t{number}"))
    with caplog.at_level(logging.WARNING):
        tracker.close(patience_s=0.2)
    hangs.set()
    assert caplog.records[-1].getMessage() == "wandb took 0 rows, refused 0 and left 3"


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert open_logs(["tensorboard"], TOLD) == {}
    with pytest.raises(UserError, match=r"loggers: wandb is not installed .*; pip install 'bfm\[wandb\]'"):
        open_logs(["tensorboard", "wandb"], TOLD)


def test_a_space_names_its_loggers():
    assert make_spec().listeners == ("tensorboard",)
    assert make_spec(loggers=["mlflow", "wandb"]).listeners == ("mlflow", "wandb")
    assert make_spec(loggers=[]).listeners == ()
    for wrong, words in ((["mlflow", "mlflow"], "loggers"), (["neptune"], r"loggers\.0")):
        with pytest.raises(UserError, match=words):
            make_spec(loggers=wrong)
    found = json_schema()["properties"]["loggers"]
    assert found["anyOf"][0]["items"]["enum"] == ["tensorboard", "mlflow", "wandb"]
    assert "TensorBoard" in found["description"]
