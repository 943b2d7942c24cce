"""`bfm fit` as a user types it: planted tables in, laws with intervals out; every bad table is one line and exit 2."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from tests.doors.planted import write_sweep

E, A, B, ALPHA, BETA = 1.7, 400.0, 400.0, 0.34, 0.28
COLUMNS = "params=N,events=D,flops=C,loss=loss"


def surface_table(noise: float = 0.003) -> dict[str, np.ndarray]:
    """Five budgets of nine sizes under a planted surface."""
    rng = np.random.default_rng(7)
    flops = np.repeat(np.logspace(18, 21, 5), 9)
    best = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * (flops / 6) ** (BETA / (ALPHA + BETA))
    params = best * np.tile(np.logspace(-0.7, 0.7, 9), 5)
    events = flops / 6 / params
    loss = E + A / params**ALPHA + B / events**BETA + noise * rng.standard_normal(len(flops))
    return {"N": params, "D": events, "C": flops, "loss": loss, "recall": np.exp(-loss / 2)}


def write(path: Path, columns: dict) -> Path:
    table = pa.table({name: list(values) for name, values in columns.items()})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in table.to_pylist()))
    else:
        pyarrow.csv.write_csv(table, path)
    return path


@pytest.fixture
def table(tmp_path) -> Path:
    return write(tmp_path / "runs.csv", surface_table())


def fitted(bfm, *words) -> dict:
    code, out, err = bfm("fit", *words, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_a_planted_surface_is_found_in_any_file(bfm, tmp_path, suffix):
    found = fitted(bfm, "surface", write(tmp_path / f"runs.{suffix}", surface_table()), "--columns", COLUMNS)
    assert set(found["parameters"]) >= {"E", "A", "B", "alpha", "beta", "a", "b"}
    for name, truth in {"E": E, "alpha": ALPHA, "beta": BETA, "a": BETA / (ALPHA + BETA)}.items():
        value = found["parameters"][name]
        assert value["low"] < value["estimate"] < value["high"]
        # Twice the interval: this is one draw, and what intervals cover is measured elsewhere.
        assert abs(value["estimate"] - truth) < value["high"] - value["low"]
    assert found["law"] == "surface"
    assert found["runs"] == 45
    assert found["interval_method"]
    assert {"C", "params", "events"} <= set(found["definitions"])


def test_a_table_of_another_dialect_is_the_same_table_and_told(bfm, table, tmp_path):
    brought = tmp_path / "parts [1]"
    (brought / ".ipynb_checkpoints").mkdir(parents=True)
    text = table.read_text().replace(",", ";").replace(".", ",")
    (brought / "runs.csv").write_text("\n" + text, encoding="utf-16")
    (brought / ".ipynb_checkpoints" / "runs.csv").write_text(text)
    found, expected = (fitted(bfm, "surface", place, "--columns", COLUMNS) for place in (brought, table))
    assert found["parameters"] == expected["parameters"]
    assert "read as: utf-16, separated by ';', decimal commas (runs.csv)" in found["warnings"]
    assert "left out as hidden: .ipynb_checkpoints (1 file)" in found["warnings"]


@pytest.mark.parametrize("curve", ["valley", "quadratic"])
def test_isoflop_has_exponents_and_an_optimum_per_budget(bfm, table, curve):
    found = fitted(bfm, "isoflop", table, "--columns", COLUMNS, "--curve", curve)
    assert found["parameters"]["N_exponent"]["estimate"] == pytest.approx(BETA / (ALPHA + BETA), abs=0.05)
    assert found["parameters"]["D_exponent"]["estimate"] == pytest.approx(ALPHA / (ALPHA + BETA), abs=0.05)
    assert [budget["bracketed"] for budget in found["budgets"]] == [True] * 5
    assert all(budget["N_opt"]["estimate"] > 0 and budget["D_opt"]["estimate"] > 0 for budget in found["budgets"])


def test_text_shows_intervals_definitions_and_doubts(bfm, table):
    code, out, err = bfm("fit", "isoflop", table, "--columns", COLUMNS, "--where", "C < 2e19")
    assert code == 0, err
    assert "N_exponent" in out
    assert "intervals (95 %)" in out
    assert "two budgets" in out, "the doubt about a law through two points"


def test_joint_says_what_the_runs_tell_before_it_gives_numbers(bfm, table):
    code, out, err = bfm("fit", "joint", table, "--columns", COLUMNS)
    assert code == 0, err
    said, rows, _, head, *_ = out.splitlines()
    assert re.match(
        r"Model size: the best N grows as C\^0\.4\d \(95 %: 0\.4\d to 0\.4\d\), .* at 5 of 5 budgets\.", said
    )
    assert rows.startswith("Rows: all 45 as they were given.")
    assert head == "joint of loss on 45 runs"


def test_a_setting_of_the_users_own_is_an_axis_or_a_choice(bfm, tmp_path):
    columns = surface_table()
    kinds, drops = (
        np.array(["adam", "sgd"])[np.arange(45) % 2],
        np.array([0.02, 0.05, 0.1, 0.2, 0.4])[np.arange(45) % 5],
    )
    columns["loss"] = columns["loss"] + 0.05 * (kinds == "sgd") + 0.02 * np.log(drops / 0.1) ** 2
    path = write(tmp_path / "runs.csv", {**columns, "optimizer": kinds, "drop": drops})
    found = fitted(bfm, "joint", path, "--columns", f"{COLUMNS},setting=optimizer,setting=drop")
    assert found["parameters"]["optimizer=sgd"]["low"] < 0.05 < found["parameters"]["optimizer=sgd"]["high"]
    assert found["budgets"][2]["drop_opt"]["low"] < 0.1 < found["budgets"][2]["drop_opt"]["high"]


def test_what_no_interval_bounds_is_not_identifiable(bfm, tmp_path):
    first, again = surface_table(), surface_table()
    again["loss"] = again["loss"] + 0.001
    columns = {name: np.concatenate([first[name][:9], again[name][:9]]) for name in first}
    code, out, err = bfm("fit", "joint", write(tmp_path / "one.csv", columns), "--columns", COLUMNS)
    assert code == 0, err
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert ["N_exponent", "not identifiable"] in lines
    assert not re.search(r"e[+-]?\d{2,3}\b", "".join(line[1] for line in lines if line[:1] == ["N_coefficient"]))


def test_a_reason_is_said_once_for_all_metrics_that_it_concerns(bfm, tmp_path):
    columns = surface_table() | {f"recall@{k}": np.full(COUNT, 1.5) for k in range(40)}
    roles = ",".join([COLUMNS, *(f"metric=recall@{k}" for k in range(40))])
    code, out, err = bfm("fit", "joint", write(tmp_path / "runs.csv", columns), "--columns", roles, "--metric", "all")
    assert code == 0, err
    assert out.count("not fitted for") == out.count("have no loss") == 1
    assert re.search(r"not fitted for recall@0, .*, recall@4 and 35 more: \S+ 45 of 45 values of it have no loss", out)


def test_metrics_stand_side_by_side(bfm, table):
    found = fitted(bfm, "isoflop", table, "--columns", f"{COLUMNS},metric=recall", "--metric", "all")
    assert set(found["metrics"]) == {"loss", "recall"}
    quantities = {difference["quantity"] for difference in found["differences"]}
    assert "N_exponent" in quantities
    # The second is an image of the first.
    assert not any(one["differs"] for one in found["differences"] if one["quantity"] == "N_exponent")


def test_agreement_of_a_loss_and_its_image_is_perfect(bfm, table):
    found = fitted(bfm, "agreement", table, "--columns", f"{COLUMNS},metric=recall")
    assert len(found["agreement"]["recall"]) == 5
    assert [budget["spearman"]["estimate"] for budget in found["agreement"]["recall"]] == pytest.approx([1.0] * 5)


def test_batch_takes_steps_or_events_to_a_target(bfm, tmp_path):
    sizes, batches = np.repeat([1e6, 4e6, 1.6e7], 7), np.tile(2.0 ** np.arange(6, 13), 3)
    critical = 200 * (sizes / 1e6) ** 0.4
    steps = 1e4 * (1 + 5 * (critical - 1.2 * 64) / batches)
    columns = {"N": sizes, "B": batches, "steps": steps, "events": steps * batches}
    path = write(tmp_path / "batch.csv", columns)
    for role in ("steps", "events"):
        words = ("--columns", f"params=N,batch=B,{role}={role}", "--reference-batch", "64")
        found = fitted(bfm, "batch", path, *words)["parameters"]
        assert found["cbs_exponent"]["estimate"] == pytest.approx(0.4, abs=1e-3)
        assert found["cbs_coefficient"]["estimate"] == pytest.approx(200 / 1e6**0.4, rel=1e-2)


def test_share_and_negatives_find_planted_optima(bfm, tmp_path):
    rng = np.random.default_rng(3)
    for law, values, (p, q), role in (
        ("share", np.geomspace(0.002, 0.5, 12), (1.0, 0.8), "share"),
        ("negatives", np.geomspace(16, 65536, 12), (0.7, 0.6), "negatives"),
    ):
        middle = float(np.sqrt(values[0] * values[-1]))
        x = np.tile(values / middle, 3)
        flops = np.repeat([1e18, 1e19, 1e20], len(values))
        loss = 3 - 0.1 * np.log10(flops / 1e18) + 0.02 * x**p / p + 0.02 * x**-q / q
        loss = loss + 0.0005 * rng.standard_normal(len(loss))
        path = write(tmp_path / f"{law}.csv", {"x": x * middle, "C": flops, "loss": loss})
        found = fitted(bfm, law, path, "--columns", f"{role}=x,flops=C,loss=loss")
        name = {"share": "s_opt", "negatives": "K_opt"}[law]
        assert len(found["budgets"]) == 3
        for budget in found["budgets"]:
            assert budget["bracketed"]
            assert math.log(budget[name]["estimate"] / middle) == pytest.approx(0, abs=0.3)


def changed(**columns) -> dict:
    return {**surface_table(), **columns}


COUNT = 45
BAD = [
    ("surface", changed(N=np.full(COUNT, 1e8), C=surface_table()["D"] * 6e8), COLUMNS, (), "N"),
    ("isoflop", changed(N=np.full(COUNT, 1e8), C=surface_table()["D"] * 6e8), COLUMNS, (), "size"),
    ("surface", changed(loss=np.zeros(COUNT)), COLUMNS, (), "at or below 0"),
    ("surface", changed(loss=-surface_table()["loss"]), COLUMNS, (), "at or below 0"),
    ("surface", changed(loss=np.full(COUNT, np.nan)), COLUMNS, (), "finite"),
    ("surface", changed(), "params=M,events=D,loss=loss", (), "'M'"),
    ("surface", changed(), "parameters=N,events=D,loss=loss", (), "unknown role"),
    ("surface", changed(), COLUMNS, ("--where", "N > 1e30"), "no row is left"),
    ("surface", changed(), COLUMNS, ("--where", "C < 2e18"), "one C"),
    ("isoflop", changed(), "params=N,loss=loss", (), "flops"),
    ("isoflop", changed(), "params=N,flops=C", (), "the column loss"),
    ("hull", changed(), "params=N,flops=C", (), "the column loss"),
    ("joint", changed(B=surface_table()["C"] / 1e9), f"{COLUMNS},budget=B", (), "within a factor of 2 of its budget"),
    ("surface", changed(), COLUMNS, ("--where", "depth > 3"), "there is no column depth"),
    ("share", changed(), COLUMNS, (), "share"),
    ("batch", changed(), COLUMNS, (), "batch"),
    ("negatives", changed(), COLUMNS, (), "negatives"),
    ("agreement", changed(), COLUMNS, (), "metric"),
    ("joint", changed(), "params=N,flops=C,loss=loss", (), "the column events"),
    ("joint", changed(lr=-surface_table()["N"]), f"{COLUMNS},rate=lr", (), "rate below 0, first row 1"),
    ("surface", changed(loss=-surface_table()["loss"]), COLUMNS, ("--where", "C > 5e20"), "first row 37"),
    ("surface", changed(), COLUMNS, ("--bootstrap", "-3"), "--bootstrap"),
    ("nonsense", changed(), COLUMNS, (), "isoflop"),
    ("isoflop", changed(), COLUMNS, ("--curve", "cubic"), "curve"),
    ("surface", changed(), COLUMNS, ("--objective", "mse"), "objective"),
    ("surface", changed(), COLUMNS, ("--delta", "0"), "delta"),
    ("surface", changed(), COLUMNS, ("--metric", "recall@99"), "recall@99"),
    ("joint", changed(), COLUMNS, ("--bootstrap", "100"), "--bootstrap: joint takes no such option"),
    ("joint", changed(steps=np.ones(COUNT)), f"{COLUMNS},setting=steps", (), "steps is the name of a role"),
    ("joint", changed(a=np.ones(COUNT)), f"{COLUMNS},setting=a,setting=a", (), "setting=a is given twice"),
    (
        "surface",
        changed(C=np.concatenate([surface_table()["C"][:-9], 1.3 * surface_table()["C"][-9:]])),
        None,
        (),
        "--columns",
    ),
]


@pytest.mark.parametrize(("law", "columns", "roles", "more", "word"), BAD)
def test_a_bad_table_is_one_line_and_exit_2(bfm, tmp_path, law, columns, roles, more, word):
    path = write(tmp_path / "runs.csv", columns)
    code, out, err = bfm("fit", law, path, *(("--columns", roles) if roles else ()), *more)
    assert code == 2, out + err
    assert out == ""
    assert err.strip().count("\n") == 0
    assert word in err


def test_a_sweep_without_rows_is_told_so(bfm, tmp_path):
    place = write_sweep(str(tmp_path / "begun"), [])
    for more in ((), ("--metric", "all"), ("--metric", "nll")):
        code, out, err = bfm("fit", "joint", place, *more)
        assert (code, out) == (2, "")
        assert "no row has a metric yet; let the sweep finish a rung" in err


def test_two_ways_of_counting_c_are_refused(bfm, tmp_path):
    columns = surface_table()
    doubled = {name: np.concatenate([values, values]) for name, values in columns.items()}
    doubled["C"][COUNT:] *= 1.3
    doubled["loss"][COUNT:] += 0.001
    path = write(tmp_path / "runs.csv", doubled)
    code, _, err = bfm("fit", "surface", path, "--columns", COLUMNS)
    assert code == 2
    assert "more than one way" in err


def test_a_setting_may_change_what_an_event_costs(bfm, tmp_path):
    columns = surface_table()
    both = {name: np.concatenate([values, values]) for name, values in columns.items()}
    both["C"][COUNT:] *= 1.3
    both["loss"][COUNT:] += 0.001
    both["window"] = np.repeat(["short", "long"], COUNT)
    found = fitted(bfm, "surface", write(tmp_path / "runs.csv", both), "--columns", f"{COLUMNS},setting=window")
    assert found["runs"] == 2 * COUNT


def test_runs_without_a_value_and_duplicates_are_said(bfm, tmp_path):
    columns = surface_table()
    columns = {name: np.concatenate([values, values[:2], values[:1]]) for name, values in columns.items()}
    columns["loss"][-1] = np.nan
    found = fitted(bfm, "surface", write(tmp_path / "runs.csv", columns), "--columns", COLUMNS)
    assert found["runs"] == COUNT
    assert any("duplicate" in warning for warning in found["warnings"])
    assert any("left out" in warning for warning in found["warnings"])
