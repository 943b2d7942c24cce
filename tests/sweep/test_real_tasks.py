"""A whole small sweep of real models over toy shards, without Ray: the rooms fit together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bfm.events.protocol import Protocol
from bfm.files import Store
from bfm.laws.frontier import Gap, unpaired
from bfm.report.digits import gap_text
from bfm.report.standing import status_text
from bfm.report.sweep_report import publish_report
from bfm.report.sweep_view import read_sweep
from bfm.sweep.driver.driver import SweepDriver
from bfm.sweep.ledger.lease import Lease
from bfm.sweep.ledger.ledger import Ledger, read_state
from bfm.sweep.space.costs import Costs
from bfm.sweep.space.space import FeasibleSet
from bfm.sweep.space.spec import from_dict
from bfm.training.engine import EngineFactory
from bfm.training.rung import run_rung
from bfm.training.task import RungTask
from tests.sweep.serial import run_serial

SPACE = {
    "name": "toy",
    "metric": {"name": "nll"},
    "method": "random",
    "parameters": {
        "params": {"distribution": "log_uniform_values", "min": 1500, "max": 3000},
        "window": {"value": 16},
        "group_windows": {"value": 2},
        "d_item": {"value": 8},
        "table_width": {"value": 4},
        "embedder_share": {"values": [0, 0.05]},
    },
    "budget": {
        "ladder_flops": ["1.2e8", "2.4e8"],
        "total_flops": "7e8",
        "max_trials": 3,
        "events_per_param": [0, 1e6],
    },
    "scheduler": {"eta": 2},
    "probes": ["5e7"],
    "data": {"shards": "toy", "evaluation_queries": 50},
}


def test_a_sweep_of_real_models(toy_shards, tmp_path):
    spec, store = from_dict(SPACE), Store(tmp_path / "toy")
    costs = Costs.on(toy_shards, Protocol.load(toy_shards), spec.data.evaluation_queries)
    driver = SweepDriver.start(FeasibleSet(spec, costs), Ledger(store, Lease.acquire(store)))

    def execute(task):
        row = run_rung(RungTask.from_task(dataclasses.asdict(task)), toy_shards, EngineFactory(), store)
        assert row["task_flops"] <= task.reserved_flops
        nominal = costs.of(spec.config(task.config))
        assert row["params"] == nominal.params
        if task.rung == 0:
            assert row["steps"] == pytest.approx(nominal.step_flops and row["path_flops"] / nominal.step_flops, rel=0.1)
            assert row["events"] == pytest.approx(nominal.events(row["path_flops"]), rel=0.1)
        return row

    run_serial(driver, execute)
    driver.close()
    state = read_state(store)
    assert len(state.rungs[0]) == 3
    assert len(state.rungs[1]) >= 1
    assert len(state.probes) == len(state.rungs[0])
    assert not state.losses
    assert 0.5 * spec.budget.total_flops < state.spent_flops <= spec.budget.total_flops
    for trial in state.rungs[1]:
        assert state.rungs[1][trial]["path_flops"] > state.rungs[0][trial]["path_flops"]
        assert state.rungs[1][trial]["task_flops"] < state.rungs[1][trial]["path_flops"]
    _tells_paired_differences(tmp_path / "toy", state)


def _tells_paired_differences(folder, state):
    view = read_sweep(str(folder))
    low, high = view.frontier_dicts()["nll"]
    rows = [state.rungs[rung][point["trial"]] for rung, point in enumerate((low, high))]
    change = high["change"]
    assert change["paired"]
    assert change["value"] == pytest.approx(rows[1]["metrics"]["nll"] - rows[0]["metrics"]["nll"], rel=1e-4)
    assert 0 < change["error"] < unpaired(rows[1], rows[0], "nll").error
    text = status_text(view)
    assert gap_text(Gap(change["value"], change["error"], paired=True)).replace(" ", "") in text
    assert "~" not in text
    page = Path(publish_report(view)[0]).read_text()
    assert "against the rung below" in page
    assert "~</small>" not in page
    for path in folder.glob("trials/*/checkpoints/*-scores-*.npz"):
        path.unlink()
    assert "~ unpaired" in status_text(read_sweep(str(folder)))
