"""Sweeps of a study by their axes, and their rows as those of one sweep."""

from __future__ import annotations

import pytest

from bfm.errors import UserError
from bfm.files import Store
from bfm.sweep.ledger.lease import Lease
from bfm.sweep.ledger.ledger import Ledger, read_state
from bfm.sweep.ledger.state import SweepState
from bfm.sweep.ledger.study import StoredSweep, by_axis, is_study, joined, read_sweeps, study_folders
from bfm.sweep.recipe.evidence import read_evidence
from tests.sweep.serial import run_serial
from tests.sweep.world import execute, make_spec, start


def begin(folder, axis=None, runs=True):
    """A sweep there, with a few rows where it runs."""
    sizes = {"params": {"values": [500, 1000, 2000]}, "learning_rate": {"value": 0.004}}
    driver = start(make_spec(axis=axis, parameters=sizes, scheduler={"type": "grid"}), Store(folder))
    if runs:
        run_serial(driver, execute)
    driver.close()


def test_sweeps_of_one_axis_are_one_with_trials_named_by_their_folders(tmp_path):
    for folder, axis, runs in (("a/sizes", "allocation", True), ("b/sizes", "allocation", True), ("all", None, True)):
        begin(tmp_path / folder, axis, runs)
    begin(tmp_path / "later", "allocation", runs=False)
    (tmp_path / "study.yaml").write_text("sweeps: [a/sizes, all, b/sizes, later]\n")
    found = read_evidence(f"{tmp_path}/")
    assert [sweep.axis for sweep in found.sweeps] == ["allocation", None]
    assert found.waiting == ("later",)
    sizes, alone = found.sweeps
    own = set(read_state(Store(tmp_path / "all")).trials)
    assert {row["trial"] for row in alone.rows} == {f"all/{trial}" for trial in own}
    assert {row["trial"] for row in sizes.rows} == {f"{place}/sizes/{trial}" for place in "ab" for trial in own}
    assert sizes.folder == f"{tmp_path}/a/sizes"


def test_a_sweep_without_an_axis_stands_alone_whatever_its_folder_is_called():
    specs = [({"axis": "batch"}, "b1"), ({}, "batch"), ({"axis": "batch"}, "b2"), ({}, "other")]
    sweeps = [StoredSweep(Store("x"), SweepState(spec=spec), folder) for spec, folder in specs]
    assert [[sweep.folder for sweep in group] for group in by_axis(sweeps)] == [["b1", "b2"], ["batch"], ["other"]]


def test_a_ledger_that_was_only_opened_is_no_sweep_yet(tmp_path):
    store = Store(tmp_path / "opened")
    Ledger(store, Lease.acquire(store)).close()
    (tmp_path / "study.yaml").write_text("sweeps: [opened]")
    (sweep,) = read_sweeps(str(tmp_path))
    assert (sweep.has_begun, sweep.axis, sweep.rows) == (False, None, [])
    with pytest.raises(UserError, match="there is no sweep here"):
        read_sweeps(store.uri)


def test_one_sweep_keeps_its_names():
    state = SweepState(rungs={0: {"t00000": {"trial": "t00000"}}})
    first, second = (StoredSweep(Store(folder), state, folder) for folder in "ab")
    assert joined([first]) == state.all_rows()
    assert [row["trial"] for row in joined([first, second])] == ["a/t00000", "b/t00000"]


@pytest.mark.parametrize("text", ["sweeps: none", "sweeps: []", "sweeps: [1]", "{}"])
def test_a_list_without_folders_is_one_line(tmp_path, text):
    assert not is_study(str(tmp_path))
    (tmp_path / "study.yaml").write_text(text)
    assert is_study(str(tmp_path))
    with pytest.raises(UserError, match="is no list of folders") as caught:
        study_folders(Store(f"{tmp_path}/"))
    assert (caught.value.key, caught.value.file) == ("sweeps", f"{tmp_path}/study.yaml")
