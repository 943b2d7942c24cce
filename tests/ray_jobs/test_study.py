"""A study: several sweeps one after the other, listed; wrong input is found before the first of them starts."""

from __future__ import annotations

import pytest
import yaml

from bfm.errors import UserError
from bfm.files import Store
from bfm.sweep.ledger.ledger import read_state
from ray_jobs import study
from ray_jobs.cluster_session import local_ray
from ray_jobs.study import study_verb
from tests.ray_jobs.toys import write_space


@pytest.fixture
def spaces(tmp_path, toy_shards):
    """Two spaces that differ in their names."""
    paths = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        paths.append(write_space(tmp_path / name, toy_shards.path))
        paths[-1].write_text(paths[-1].read_text().replace("name: tiny", f"name: {name}"))
    return paths


@pytest.fixture
def swept(monkeypatch):
    """What was swept, and the exit codes to answer with."""
    calls, codes = [], {}

    def sweep_verb(space, storage, *, overrides):
        calls.append((space.parent.name, storage, list(overrides)))
        return codes.get(space.parent.name, 0)

    monkeypatch.setattr(study, "sweep_verb", sweep_verb)
    return calls, codes


def test_a_study_runs_its_spaces_in_order_and_lists_them(spaces, swept, tmp_path):
    calls, _ = swept
    overrides = ["budget.max_trials=2"]
    assert study_verb(spaces, str(tmp_path), "all", overrides) == 0
    assert calls == [(name, f"{tmp_path}/all", overrides) for name in ("first", "second")]
    assert yaml.safe_load((tmp_path / "all" / "study.yaml").read_text()) == {"sweeps": ["first", "second"]}


def test_a_study_grows_by_further_spaces(spaces, swept, tmp_path):
    for some in (spaces[1:], spaces[:1], spaces):
        assert study_verb(some, str(tmp_path), "all") == 0
    assert yaml.safe_load((tmp_path / "all" / "study.yaml").read_text()) == {"sweeps": ["second", "first"]}


@pytest.mark.parametrize(("codes", "code", "swept_too"), [((1, 0), 1, True), ((0, 1), 1, True), ((130, 0), 130, False)])
def test_the_worst_exit_code_counts_and_a_signal_ends_the_study(spaces, swept, tmp_path, codes, code, swept_too):
    calls, answers = swept
    answers.update(zip(("first", "second"), codes, strict=True))
    assert study_verb(spaces, str(tmp_path), "all") == code
    assert (len(calls) == 2) == swept_too


def test_wrong_input_is_found_before_the_first_sweep(spaces, swept, tmp_path):
    calls, _ = swept
    with pytest.raises(UserError, match="'first' is there twice"):
        study_verb([spaces[0], spaces[0]], str(tmp_path), "all")
    with pytest.raises(UserError, match=r"^--name: 'a/b' cannot name a folder"):
        study_verb(spaces, str(tmp_path), "a/b")
    spaces[1].write_text(spaces[1].read_text().replace("min: 2000.0", "min: 1.0e+9").replace("4000.0", "2.0e+9"))
    with pytest.raises(UserError, match=f"^{spaces[1]}: .*no point of the space is feasible"):
        study_verb(spaces, str(tmp_path), "all")
    assert calls == []
    assert not (tmp_path / "all").exists()


def test_a_damaged_list_is_told(spaces, swept, tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "study.yaml").write_text("sweeps: 3\n")
    with pytest.raises(UserError, match=r"study.yaml: sweeps"):
        study_verb(spaces, str(tmp_path), "all")


def test_the_verb(bfm, spaces, swept, tmp_path):
    calls, _ = swept
    code, _, err = bfm("study", *spaces, "--storage", tmp_path, "--name", "all", "--set", "seeds=[1]")
    assert code == 0, err
    assert calls[0] == ("first", f"{tmp_path}/all", ["seeds=[1]"])
    code, _, err = bfm("study", spaces[0], tmp_path / "none.yaml", "--storage", tmp_path, "--name", "all")
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert len(calls) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_study_on_a_small_ray(spaces, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with local_ray(2, dashboard=True):
        assert study_verb(spaces, str(tmp_path), "all") == 0
        spent = [read_state(Store(tmp_path / "all" / name)).spent_flops for name in ("first", "second")]
        assert min(spent) > 0
        assert study_verb(spaces, str(tmp_path), "all") == 0
    assert [read_state(Store(tmp_path / "all" / name)).spent_flops for name in ("first", "second")] == spent


def test_as_a_job_wrong_input_is_one_line_and_exit_2(capsys, tmp_path):
    assert study.main(["nowhere.yaml", "--storage", str(tmp_path), "--name", "mine"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("bfm: nowhere.yaml")
    assert err.count("\n") == 1
