"""`fit`, `simulate` and `import` read a table as it is brought: in each file the same runs, and what was understood."""

from __future__ import annotations

import pytest

from bfm.laws.runs import from_table, parse_columns
from bfm.sweep.ledger.imports import read_runs
from bfm.sweep.simulator.table import read_curves
from tests.sweep.world import in_memory, make_spec, planted_loss
from tests.tables.brought import FIRST_ID, KINDS

RUNGS = (10**9, 4 * 10**9)
COLUMNS = "params=params,events=events,flops=flops,loss=nll,curve=config_id,rate=learning_rate"


def runs():
    rows = []
    for n, params in enumerate((400, 900, 2000, 4500)):
        for flops in RUNGS:
            config = {"params": params, "learning_rate": 0.004, "embedder_share": 0.02}
            loss = planted_loss(config, flops)
            ids = {"config_id": FIRST_ID + n, "seed": n}
            rows.append({**ids, **config, "flops": flops, "events": flops / 6 / params, "nll": loss, "loss": loss})
    return rows


@pytest.fixture(params=KINDS)
def brought(tmp_path, request):
    write, told = KINDS[request.param]
    return write(tmp_path, runs()), told


def test_fit(brought):
    place, told = brought
    found = from_table(place, parse_columns(COLUMNS), "learning_rate == 0.004 and params < 4500")
    expected = [row for row in runs() if row["params"] < 4500]
    assert found["curve"].tolist() == [str(row["config_id"]) for row in expected]
    for role, column in (("params", "params"), ("events", "events"), ("flops", "flops"), ("loss", "nll")):
        assert found[role].tolist() == [row[column] for row in expected]
    assert found.names == tuple(f"row {n + 1}" for n in range(6))
    assert "".join(found.warnings).startswith(told)
    assert bool(found.warnings) == bool(told)


def test_simulate(brought):
    place, told = brought
    lines: list[str] = []
    curves = read_curves(place, ["params", "learning_rate"], say=lines.append)
    assert [curve.config["config_id"] for curve in curves] == [str(FIRST_ID + n) for n in range(4)]
    assert [curve.params for curve in curves] == [400, 900, 2000, 4500]
    assert {curve.flops for curve in curves} == {tuple(map(float, RUNGS))}
    assert [loss for curve in curves for loss in curve.losses] == [row["loss"] for row in runs()]
    assert "".join(lines).startswith(told)


def test_import(brought):
    place, told = brought
    driver = in_memory(make_spec())
    table = read_runs(place, driver.spec, driver.arena.feasible)
    assert table.left_out == {}
    assert [run.config_id for run in table.runs] == [str(row["config_id"]) for row in runs()]
    assert [(run.params, run.seed, run.flops) for run in table.runs] == [
        (row["params"], row["seed"], row["flops"]) for row in runs()
    ]
    assert [run.metrics["nll"] for run in table.runs] == [row["nll"] for row in runs()]
    assert "".join(table.told).startswith(told)
