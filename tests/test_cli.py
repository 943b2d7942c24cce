"""The verbs as a user types them: output on stdout, talk on stderr, honest exit codes, one line for a mistake."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import yaml

from bfm.exits import exit_code
from bfm.files import Store
from bfm.training.checkpoint import read_meta
from tests.helpers import make_shards
from tests.ray_jobs.toys import write_space

CONFIG = {
    "params": 3e3,
    "embedder_share": 0.1,
    "window": 8,
    "group_windows": 2,
    "groups_per_step": 2,
    "d_item": 8,
    "learning_rate": "5e-3",
}
RUN = ("--shards", "SHARDS", "--flops", "1e8", "--out", "TMP/run")
SLIPS_OF_A_RUN = {
    ("--seed", "-1"): "--seed: -1 is out of range",
    ("--queries", "-5"): "--queries: -5 is out of range; write a whole number, 1 or more",
    ("--workers", "0"): "--workers: 0 is out of range",
    ("--micro-groups", "1.5"): "--micro-groups: '1.5' is not a whole number",
    ("--flops", "-1e10"): "--flops: -1e10 is out of range; write above 0",
    ("--flops", "1e25"): "--flops: 1e25 FLOPs take at least",
    ("--gpus", "-1"): "--gpus: -1 is out of range",
    ("--gpus", "64"): "--gpus: a task asks for 1 CPUs and 64 GPUs, this machine has",
    ("--softmax", "two_pas"): "--softmax: 'two_pas' is no choice; did you mean 'two_pass'?",
}
CHECKPOINT = "trials/run/checkpoints/rung0-model"


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def test_train_then_more_equals_training_at_once_and_eval_agrees(bfm, config, toy_shards, tmp_path):
    shards = ("--shards", toy_shards.path)
    code, out, err = bfm("train", config, *shards, "--flops", "1e8", "--out", tmp_path / "steps", "--json")
    assert code == 0, err
    first = json.loads(out)
    code, out, err = bfm("train", config, *shards, "--flops", "2e8", "--out", tmp_path / "steps", "--json")
    assert code == 0, err
    continued = json.loads(out)
    code, out, _ = bfm("train", config, *shards, "--flops", "2e8", "--out", tmp_path / "once", "--json")
    direct = json.loads(out)
    assert first["path_flops"] <= 1e8 < continued["path_flops"] == direct["path_flops"] <= 2e8
    assert continued["metrics"] == direct["metrics"]
    assert continued["task_flops"] < direct["task_flops"], "the first run was trained again"
    code, _, err = bfm("train", config, *shards, "--flops", "1e8", "--out", tmp_path / "once")
    assert code == 2
    assert err.strip().endswith("past the trunk of 1e8; give more FLOPs, or another --out")
    code, out, err = bfm("eval", tmp_path / "once" / CHECKPOINT, *shards, "--json")
    assert code == 0, err
    evaluated = json.loads(out)
    assert evaluated["metrics"]["nll"] == pytest.approx(direct["metrics"]["nll"], rel=1e-6)
    assert set(evaluated["baselines"]) == {"popularity", "co_occurrence", "personal"}
    against = evaluated["against_baselines"]["personal"]["nll"]
    assert against["paired"]
    assert against["value"] == pytest.approx(
        evaluated["metrics"]["nll"] - evaluated["baselines"]["personal"]["nll"], rel=1e-4
    )
    assert 0 < against["error"] < evaluated["errors"]["nll"]
    code, out, err = bfm("eval", tmp_path / "once" / CHECKPOINT, *shards, "--k", "20,5", "--json")
    assert code == 0, err
    longer = json.loads(out)
    for values in (longer["metrics"], *longer["baselines"].values()):
        assert {"recall@5", "recall@20", "coverage@20"} <= set(values)
        assert "recall@10" not in values
        assert values["recall@5"] <= values["recall@20"]
    assert Store(tmp_path / "once" / "tensorboard" / "run").names()
    code, out, err = bfm("train", config, *shards, "--flops", "2e8", "--out", tmp_path / "once")
    assert code == 0, err
    assert "strongest floor" in out
    assert "The model is " in out
    assert "\u00b1" in out[out.index("The model is ") :], "differences from the floors have errors"
    assert "seen items stay in lists" in out
    assert CHECKPOINT in out
    assert f"best weights: {tmp_path}/once/trials/run/checkpoints/best, nll " in out


def test_train_copies_nothing_where_lists_leave_out_seen_items(bfm, config, tmp_path):
    filtered = make_shards(tmp_path / "filtered", filter_seen=True)
    code, _, err = bfm("train", config, "--shards", filtered.path, "--flops", "1e8", "--out", tmp_path / "out")
    assert code == 0, err
    assert read_meta(Store(tmp_path / "out"), CHECKPOINT)["config"]["copy"] == "none"


def test_train_shows_validations_and_keeps_the_best(bfm, config, toy_shards, tmp_path):
    arguments = ("train", config, "--shards", toy_shards.path, "--flops", "1e8", "--queries", "60", "--json")
    code, out, err = bfm(*arguments, "--out", tmp_path / "run", "--validations", "2")
    assert code == 0, err
    row = json.loads(out)
    lines = [line for line in err.splitlines() if line.startswith("validation at C ")]
    assert len(lines) == len(row["validations"]) == 3
    assert "epochs: nll" in lines[0]
    assert "cooled" in lines[-1]
    assert "recall@10" in lines[0]
    assert all("BELOW" in line or "above" in line for line in lines)
    code, out, err = bfm("eval", tmp_path / "run" / row["best_model"], *arguments[2:4], "--queries", "60", "--json")
    assert code == 0, err
    assert json.loads(out)["metrics"]["nll"] == pytest.approx(row["best"]["best_nll"], rel=1e-6)
    code, out, err = bfm(*arguments, "--out", tmp_path / "none", "--validations", "0")
    assert code == 0, err
    assert "validations" not in json.loads(out)
    assert "validation at" not in err


def test_plan_names_what_is_infeasible(bfm, toy_shards, tmp_path):
    space = write_space(tmp_path, toy_shards.path)
    code, out, err = bfm("plan", space, "--probe-seconds", "0.3", "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert [rung["rung_flops"] for rung in plan["rungs"]] == [1e8, 2e8]
    assert plan["flops_per_s"]
    assert plan["train_s"] > 0
    assert "of training targets" in plan["seen_items"]
    code, out, err = bfm("plan", space, "--set", "budget.ladder_flops=[1e4, 2e8]", "--probe-seconds", "0")
    assert (code, out) == (2, "")
    assert "100 steps" in err


def test_describe_reads_what_stands(bfm, toy_shards):
    code, out, _ = bfm("data", "describe", toy_shards.path, "--json")
    assert code == 0
    assert json.loads(out)["users"] == toy_shards.num_users
    code, out, _ = bfm("data", "describe", toy_shards.path)
    assert f"{toy_shards.num_users} users" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("data", "describe", "NOWHERE"), "NOWHERE"),
        (("data", "prepare", "no_such_schema", "--out", "TMP/x"), "no_such_schema: is neither"),
        (("plan", "TMP/missing.yaml"), "missing.yaml"),
        (("sweep", "TMP/missing.yaml"), "missing.yaml"),
        (("status", "TMP"), "there is no sweep here"),
        (("report", "TMP"), "there is no sweep here"),
        (("schema", "nothing"), "one of log, space, train"),
        (
            ("train", "TMP/bad.yaml", "--shards", "SHARDS", "--flops", "1e8", "--out", "TMP/run"),
            "did you mean `params`",
        ),
        (("train", "CONFIG", "--shards", "SHARDS", "--flops", "a lot", "--out", "TMP/run"), "--flops: 'a lot'"),
        (("train", "CONFIG", "--shards", "SHARDS", "--flops", "1e4", "--out", "TMP/run"), "needs at least 100"),
        (
            ("train", "CONFIG", "--shards", "SHARDS", "--flops", "1e8", "--out", "TMP/run", "--validations", "-1"),
            "--validations: -1",
        ),
        *((("train", "CONFIG", *RUN, *slip), expected) for slip, expected in SLIPS_OF_A_RUN.items()),
        (("train", "TMP/huge.yaml", *RUN), "GiB of memory"),
        (("train", "CONFIG", *RUN[:-1], "TMP/file"), "/file: file exists; choose another place"),
        (("train", "CONFIG", *RUN[:-1], "TMP/file/run"), "/file/run: not a directory; choose another place"),
        (("sweep", "SPACE", "--storage", "TMP/file"), "not a directory; choose another place"),
        (("data", "prepare", "SCHEMA", "TMP/log.csv", "--out", "TMP/file/x"), "/file"),
        (("data", "prepare", "movielens", "--cpus", "0"), "--cpus: 0 is out of range; write a whole number, 1 or more"),
        (("data", "synth", "TMP/log", "--seed", "-1"), "--seed: -1 is out of range"),
        (("data", "synth", "TMP/log", "--repeat", "1.5"), "--repeat: 1.5 is out of range; write 0 or more, at most 1"),
        (("predict", "TMP", "TMP/log.csv", "--out", "TMP/p", "--k", "0"), "--k: 0 is out of range"),
        (("plan", "SPACE", "--probe-seconds", "-1"), "--probe-seconds: -1 is out of range"),
        (("recipe", "TMP", "--flops", "nan"), "--flops: 'nan' is not a number"),
        (("eval", "TMP/none", "--shards", "SHARDS", "--queries", "-5"), "--queries: -5 is out of range"),
        (("train",), "Missing argument 'config'; see `bfm train --help`"),
        (("data", "prepare", "--frobnicate"), "No such option: --frobnicate; see `bfm data prepare --help`"),
        (("swep",), "No such command 'swep'"),
        (("eval", "TMP/none", "--shards", "SHARDS"), "none"),
        (("eval", "TMP/none", "--shards", "SHARDS", "--part", "tset"), "one of validation, test"),
        (("eval", "TMP/none", "--shards", "SHARDS", "--k", "5,ten"), "--k: '5,ten' is no list of lengths"),
        (("eval", "TMP/none", "--shards", "SHARDS", "--k", "0"), "--k: '0' is no list of lengths"),
        (("eval", "TMP/none", "--shards", "SHARDS", "--k", "5,1000"), "--k: lists of 1000 items cannot be made"),
        (("data", "synth", "TMP/log", "--events", "-5"), "--events: -5 is out of range"),
        (("data", "synth", "TMP/log", "--events", "5"), "do not fit together"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(bfm, config, toy_shards, tmp_path, arguments, expected):
    (tmp_path / "bad.yaml").write_text("parms: 1e4\n")
    (tmp_path / "huge.yaml").write_text(yaml.safe_dump({**CONFIG, "params": 1e12}))
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "log.csv").write_text("user,item,time\nann,tea,2024-01-01\n")
    (tmp_path / "log.yaml").write_text("name: log\nuser: user\nitem: item\ntime: time\n")
    space = write_space(tmp_path, toy_shards.path)
    places = {"TMP": str(tmp_path), "SHARDS": str(toy_shards.path), "CONFIG": str(config)}
    places |= {"SPACE": str(space), "SCHEMA": str(tmp_path / "log.yaml")}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    code, out, err = bfm(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("bfm: ")]
    assert code == 2, err
    assert out == ""
    assert len(lines) == 1
    assert expected in lines[0]
    assert "Traceback" not in err


def test_without_a_word_there_is_help(bfm):
    for words, verb in (((), "enqueue"), (("data",), "prepare")):
        code, out, err = bfm(*words)
        assert (code, out) == (2, "")
        assert "Usage: " in err
        assert f"  {verb} " in err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            OSError(errno.EROFS, "Read-only file system", "/ro/x"),
            1,
            "OSError: [Errno 30] Read-only file system: '/ro/x'",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x"),
            1,
            "OSError: [Errno 28] No space left on device: '/x'",
        ),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "/a/b"),
            2,
            "/a/b: not a directory; choose another place",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), 2, "/a: permission denied; choose another place"),
        (PermissionError(errno.EPERM, "Operation not permitted"), 1, "PermissionError: [Errno 1] Operation not"),
        (MemoryError("Unable to allocate 7.28 TiB"), 1, "MemoryError: Unable to allocate 7.28 TiB"),
    ],
)
def test_a_place_that_cannot_be_one_is_wrong_input_and_a_full_disk_is_a_fault(error, code, line, capsys):
    def verb():
        raise error

    assert exit_code(verb) == code
    said = capsys.readouterr().err
    assert said.startswith(f"bfm: {line}")
    assert said.count("\n") == 1


def test_a_damaged_checkpoint_is_one_line_and_exit_1(bfm, config, toy_shards, tmp_path):
    bfm("train", config, "--shards", toy_shards.path, "--flops", "1e8", "--out", tmp_path / "run")
    for path in (tmp_path / "run" / CHECKPOINT).glob("state*.pt"):
        path.write_bytes(path.read_bytes()[:-100])
    code, _, err = bfm("eval", tmp_path / "run" / CHECKPOINT, "--shards", toy_shards.path)
    assert code == 1
    assert "CorruptError" in err
    assert "Traceback" not in err


def test_doctor_sees_this_machine(bfm, tmp_path):
    code, out, _ = bfm("doctor", "--storage", tmp_path, "--json")
    findings = {finding["name"]: finding for finding in json.loads(out)}
    assert findings["torch"]["ok"]
    assert findings["ray"]["ok"]
    assert code == (0 if all(finding["ok"] for finding in findings.values()) else 1)


@pytest.mark.parametrize("kind", ["log", "space"])
def test_json_schemas_are_for_editors(bfm, kind):
    code, out, _ = bfm("schema", kind)
    assert code == 0
    assert json.loads(out)["properties"]
