"""What `bfm status` says of a sweep's life: decisions, imports, what is kept."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.csv

from bfm.laws.frontier import Results
from bfm.report.tables import spend_text
from bfm.sweep.driver.status import life_text, summarise
from tests.sweep.driver.test_quota import GIB, sized
from tests.sweep.serial import run_serial
from tests.sweep.world import execute, import_runs, in_memory, make_spec


def test_the_last_decisions_have_their_reasons():
    driver = in_memory(make_spec(scheduler={"type": "frontier"}))
    run_serial(driver, execute)
    status = json.loads(json.dumps(summarise(driver.state)))
    tasks = [record for record in driver._ledger.records if record["kind"] == "task"]
    assert [decision["task_id"] for decision in status["decisions"]] == [t["task"]["task_id"] for t in tasks[-5:]]
    assert [decision["reason"] for decision in status["decisions"]] == [task["reason"] for task in tasks[-5:]]
    text = life_text(driver.state)
    assert all(task["reason"] in text for task in tasks[-5:])
    assert "trunks kept" not in text


def test_evictions_redone_flops_and_models_above_the_quota_are_told():
    driver = in_memory(make_spec(scheduler={"type": "asha-promote"}, storage={"checkpoints_gib": 2}))
    run_serial(driver, sized)
    state, status = driver.state, summarise(driver.state)
    assert status["redone_flops"] == state.redone_flops > 0
    storage = status["storage"]
    assert storage["quota_bytes"] == 2 * GIB >= storage["trunk_bytes"]
    assert storage["evicted"] == len(state.evicted) == sum(storage["evictions"].values())
    assert storage["models_alone_break_quota"]
    text = life_text(driver.state)
    assert "cooled models of the rows alone take" in text
    assert f"{storage['trunks']} trunks kept, {storage['trunk_bytes'] / GIB:.3g} of 2 GiB" in text
    assert len(storage["evictions"]) <= 5
    assert "redone for want of evicted trunks" in spend_text(Results(state.all_rows()), state)


def test_imports_are_counted_apart(tmp_path):
    runs = [{"params": 500.0, "learning_rate": 0.004, "flops": c, "nll": 3.0} for c in (1e9, 2e9)]
    pyarrow.csv.write_csv(pa.Table.from_pylist(runs), tmp_path / "runs.csv")
    driver = in_memory(make_spec())
    import_runs(driver, tmp_path / "runs.csv")
    status = summarise(driver.state)
    assert (status["trials"], status["imported_trials"]) == (0, 1)
    assert "imported 1 rows of 1 new trials from runs.csv; left out: no rung within 1 %" in life_text(driver.state)
