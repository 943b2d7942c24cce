"""What Optuna reads back of an exported sweep is what its ledger says, however often and whenever it was told."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from bfm.doors.optuna_storage import export_sweep, open_storage
from bfm.errors import UserError
from bfm.files import Store
from bfm.report.sweep_view import SweepView, read_sweep
from bfm.sweep.ledger.ledger import read_ledger
from tests.doors.planted import write_study, write_sweep
from tests.sweep.serial import run_serial
from tests.sweep.world import execute, in_memory, make_spec, start

KINDS = ["sweep.journal", "sweep.db"]
CHOICES = {"values": [1, 2, 4]}


def spec_of(**changes):
    parameters = make_spec().as_dict()["parameters"] | {"groups_per_step": CHOICES}
    return make_spec(parameters=parameters, **changes)


def told(view: SweepView, target: Path) -> tuple[optuna.Study, list]:
    done = export_sweep(view, open_storage(str(target)), ["nll"])
    # Read by another storage, as another process would.
    return optuna.load_study(study_name="planted/nll", storage=open_storage(str(target))), done


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> SweepView:
    folder = tmp_path_factory.mktemp("sweep") / "planted"
    run_serial(start(spec_of(), Store(folder)), execute)
    return read_sweep(str(folder))


@pytest.mark.parametrize("name", KINDS)
def test_a_finished_sweep_reads_back(finished, tmp_path, name):
    study, _ = told(finished, tmp_path / name)
    trials = finished.state.trials
    assert study.direction == optuna.study.StudyDirection.MINIMIZE
    assert [trial.user_attrs["trial"] for trial in study.trials] == list(trials)
    assert {trial.state for trial in study.trials} >= {TrialState.COMPLETE, TrialState.PRUNED}
    for found, trial in zip(study.trials, trials.values(), strict=True):
        ok = {rung: row["metrics"]["nll"] for rung, row in trial.rows.items() if row["status"] == "ok"}
        assert found.intermediate_values == ok
        assert found.params == {name: trial.config[name] for name in ("groups_per_step", "learning_rate", "params")}
        last = trial.rows[max(trial.rows)]
        assert found.user_attrs["N"] == last["params"]
        assert found.user_attrs["C"] == last["path_flops"]
        expected = TrialState.FAIL if last["status"] != "ok" else TrialState.PRUNED
        assert found.state == (TrialState.COMPLETE if 2 in ok else expected)
        assert found.value == (None if found.state == TrialState.FAIL else ok[max(ok)])
    best = min(row["metrics"]["nll"] for row in finished.state.rungs[2].values() if row["status"] == "ok")
    assert study.best_value == best
    axis = study.trials[0].distributions["params"]
    assert (axis.low, axis.high, axis.log) == (300, 10000, True)
    assert study.trials[0].distributions["groups_per_step"].choices == (1, 2, 4)
    assert study.user_attrs["ladder_flops"] == [1e9, 4e9, 16e9]


@pytest.mark.parametrize("name", KINDS)
def test_telling_it_again_adds_what_is_new(tmp_path, name):
    folder, target = tmp_path / "planted", tmp_path / name
    driver, numbers, seen = start(spec_of(), Store(folder)), {}, []

    def watched(task):
        if len(driver.state.arrivals) in (4, 12):
            study, (done,) = told(read_sweep(str(folder)), target)
            seen.append((done, [trial.state for trial in study.trials]))
            numbers.update({trial.user_attrs["trial"]: trial._trial_id for trial in study.trials})
        return execute(task)

    run_serial(driver, watched)
    driver.close()
    study, (last,) = told(read_sweep(str(folder)), target)
    assert [done.anew for done, _ in seen] == [False, False]
    assert set(seen[0][1]) <= {TrialState.RUNNING, TrialState.FAIL}
    assert (last.anew, last.changed > 0) == (False, True)
    whole, _ = told(read_sweep(str(folder)), tmp_path / f"whole-{name}")
    for one, other in zip(study.trials, whole.trials, strict=True):
        for part in ("state", "values", "params", "distributions", "user_attrs", "intermediate_values"):
            assert getattr(one, part) == getattr(other, part)
    assert all(numbers.get(trial.user_attrs["trial"], trial._trial_id) == trial._trial_id for trial in study.trials)
    _, (again,) = told(read_sweep(str(folder)), target)
    assert (again.added, again.changed, again.anew) == (0, 0, False)


def test_a_sweep_that_went_on_after_its_end_is_told_anew(finished, tmp_path):
    target = tmp_path / "sweep.journal"
    told(finished, target)
    before = len(finished.state.trials)
    wider = spec_of(budget={"total_flops": "400e9", "ladder_flops": ["1e9", "4e9", "16e9", "64e9"]})
    driver = in_memory(wider, read_ledger(finished.store).records, extend=True)
    run_serial(driver, execute)
    study, (done,) = told(SweepView(finished.store, driver.state), target)
    assert done.anew
    assert len(study.trials) == done.added >= before
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert complete
    assert all(3 in trial.intermediate_values for trial in complete)


def test_a_space_that_changed_keeps_its_old_trials(finished, tmp_path):
    parameters = {**finished.state.spec["parameters"], "groups_per_step": {"values": [2, 4, 8]}}
    parameters["params"] = {"distribution": "log_uniform_values", "min": 5000, "max": 6000}
    state = replace(finished.state, spec={**finished.state.spec, "parameters": parameters})
    study, _ = told(SweepView(finished.store, state), tmp_path / "sweep.journal")
    assert set(study.trials[0].distributions["groups_per_step"].choices) == {1, 2, 4, 8}
    sizes = [trial.params["params"] for trial in study.trials]
    assert study.trials[0].distributions["params"].low == min(sizes) < 5000
    assert all(math.isfinite(size) for size in sizes)


def test_what_was_given_up_has_failed_but_not_what_reached_the_top(finished, tmp_path):
    top = next(iter(finished.state.rungs[2]))
    below = next(name for name, trial in finished.state.trials.items() if max(trial.rows) == 0)
    state = replace(finished.state, abandoned={(below, 1): "lost too often", (top, 3): "cancelled"})
    study, _ = told(SweepView(finished.store, state), tmp_path / "sweep.journal")
    found = {trial.user_attrs["trial"]: trial for trial in study.trials}
    assert (found[below].state, found[below].user_attrs["status"]) == (TrialState.FAIL, "given up")
    assert found[below].intermediate_values
    assert found[top].state == TrialState.COMPLETE


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("sweep.txt", None, "tells no kind of storage"),
        ("no/sweep.db", None, "its folder does not exist"),
        ("sweep.db", b"this is not a database, but long enough to be taken for one" * 9, "file is not a database"),
        ("sweep.journal", b"neither is this one\n", "is no journal of Optuna"),
    ],
)
def test_what_is_no_storage_is_one_line(tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        open_storage(str(tmp_path / name))


def test_a_place_that_takes_nothing_is_no_mistake_in_a_name(tmp_path):
    (tmp_path / "sweep.db").mkdir()
    with pytest.raises(OSError, match="unable to open database file"):
        open_storage(str(tmp_path / "sweep.db"))


def test_the_verb_writes_a_study_per_metric(bfm, tmp_path):
    runs, target = write_study(str(tmp_path / "runs")), tmp_path / "all.journal"
    code, out, _ = bfm("export-optuna", runs, target, "--metric", "nll,recall@10", "--json")
    assert code == 0
    names = [f"{sweep}/{metric}" for sweep in ("allocation", "share") for metric in ("nll", "recall@10")]
    assert [study["study"] for study in json.loads(out)["studies"]] == names
    assert sorted(optuna.get_all_study_names(open_storage(str(target)))) == sorted(names)
    recall = optuna.load_study(study_name="share/recall@10", storage=open_storage(str(target)))
    assert recall.direction == optuna.study.StudyDirection.MAXIMIZE
    code, out, _ = bfm("export-optuna", f"{runs}/share", target)
    counted = "40 trials, 0 added, 0 changed"
    assert (code, out) == (0, f"share/nll: {counted}\nshare/recall@10: {counted}\n")
    code, _, err = bfm("export-optuna", f"{runs}/share", target, "--metric", "auc")
    assert (code, err.count("\n")) == (2, 1)


def test_another_sweep_of_the_same_name_is_not_written_over(finished, tmp_path):
    target = tmp_path / "sweep.journal"
    study, _ = told(finished, target)
    driver = in_memory(spec_of(seeds=[7]))
    run_serial(driver, execute)
    with pytest.raises(UserError, match=r"is that of another sweep \(.*\)"):
        told(SweepView(Store(tmp_path / "another"), driver.state), target)
    assert len(optuna.load_study(study_name=study.study_name, storage=open_storage(str(target))).trials) == len(
        study.trials
    )


def test_a_sweep_without_rows_is_no_reason_to_export_none(bfm, tmp_path):
    runs, target = write_study(str(tmp_path / "runs")), tmp_path / "all.journal"
    write_sweep(f"{runs}/share", [])
    code, out, err = bfm("export-optuna", runs, target, "--metric", "mrr@10", "--json")
    assert (code, "no metric" in err) == (2, True)
    code, out, err = bfm("export-optuna", runs, target, "--metric", "recall@10", "--json")
    assert code == 0, err
    assert "allocation/recall@10" in [study["study"] for study in json.loads(out)["studies"]]
