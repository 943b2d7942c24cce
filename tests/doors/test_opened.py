"""`bfm.open_sweep`: the tables that a notebook sees are those of the ledger."""

from __future__ import annotations

import subprocess
import sys

import pytest

import bfm
from bfm.errors import UserError
from bfm.laws.frontier import frontier
from bfm.laws.result import LawFit
from bfm.sweep.ledger.study import read_alone
from tests.doors.planted import write_study, write_sweep
from tests.report.planted_laws import BUDGETS, allocation_rows


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> str:
    return write_study(str(tmp_path_factory.mktemp("runs") / "study"))


def test_rows_are_those_of_the_ledger(study):
    opened = bfm.open_sweep(f"{study}/allocation")
    rows, stored = opened.rows(), read_alone(f"{study}/allocation").rows
    assert rows["trial"].tolist() == [row["trial"] for row in stored]
    assert rows["metrics.nll"].tolist() == [row["metrics"]["nll"] for row in stored]
    assert rows["config.params"].tolist() == [row["config"]["params"] for row in stored]
    assert opened.table().num_rows == len(stored)


def test_a_notebook_shows_it_in_a_line(study):
    shown = repr(bfm.open_sweep(study))
    assert shown.startswith("OpenedSweep(allocation, share: ")
    assert shown.endswith(f"rows at 4 C, {study})")


def test_the_frontier_is_that_of_the_report(study):
    found = bfm.open_sweep(f"{study}/allocation").frontier("ndcg@10")
    points = frontier(read_alone(f"{study}/allocation").rows, "ndcg@10")
    assert found["flops"].tolist() == list(BUDGETS) == [point.flops for point in points]
    assert found["value"].tolist() == [point.value for point in points]
    assert found["trial"].tolist() == [point.row["trial"] for point in points]
    assert "sweep" not in found


def test_the_law_finds_what_was_planted(study):
    (law,) = bfm.open_sweep(f"{study}/allocation").laws("nll").values()
    assert isinstance(law, LawFit)
    exponent = law.parameters["N_exponent"]
    assert exponent.estimate == pytest.approx(0.28 / 0.62, abs=0.02)
    assert exponent.high - exponent.low < 0.04


def test_a_study_is_its_sweeps_together(study):
    opened = bfm.open_sweep(study)
    rows, found = opened.rows(), opened.frontier()
    assert {name.split("/")[0] for name in rows["trial"]} == {"allocation", "share"}
    assert len(set(rows["trial"])) == len(rows)
    assert found["sweep"].tolist() == ["allocation"] * 4 + ["share"] * 4
    assert set(found["trial"]) <= set(rows["trial"])
    assert list(opened.laws()) == ["allocation", "embedder_share"]


def test_what_cannot_be_told_says_why(tmp_path):
    opened = bfm.open_sweep(write_sweep(str(tmp_path / "short"), allocation_rows()[:3]))
    assert isinstance(opened.laws()["short"], UserError)
    with pytest.raises(UserError, match="no row has 'auc'; one of: nll, recall@10, ndcg@10"):
        opened.frontier("auc")
    with pytest.raises(UserError, match="there is no sweep here"):
        bfm.open_sweep(str(tmp_path / "elsewhere"))


def test_it_opens_an_object_store(s3):
    write_sweep(f"{s3}/small", allocation_rows()[:4])
    assert len(bfm.open_sweep(f"{s3}/small").rows()) == 4


def test_the_package_alone_stays_light():
    code = (
        "import bfm, sys; print(len({'torch', 'numpy', 'pandas', 'pyarrow', 'scipy', 'bfm.doors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
