"""`bfm export` and `bfm predict` as verbs, and what an export needs to be loaded."""

from __future__ import annotations

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from bfm.errors import PausedError, UserError
from bfm.training.export import export_checkpoint

_LOAD = """
import sys
from bfm.ranking.predictor import Predictor
predictor = Predictor.load(sys.argv[1])
from bfm.events.histories import Histories
loaded = [name for name in ("ray", "deepspeed", "bfm.training", "ray_jobs") if name in sys.modules]
print(loaded, predictor.encoding.num_items)
"""


def test_an_export_is_loaded_without_engines_and_training_code(shop, export):
    done = subprocess.run([sys.executable, "-c", _LOAD, str(export)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == f"[] {shop.shards.num_items}"


def test_the_verbs(bfm, shop, tmp_path):
    out = tmp_path / "model"
    code, said, err = bfm("export", shop.checkpoint, "--shards", shop.shards.path, "--out", out, "--json")
    assert code == 0, err
    assert json.loads(said)["items"] == shop.shards.num_items
    assert "--k 10" in (out / "README.md").read_text()
    log, file = shop.folder / "log.parquet", tmp_path / "predictions.parquet"
    code, said, err = bfm("predict", out, log, log, "--out", file, "--k", 5, "--vectors", "--json")
    assert code == 0, err
    summary = json.loads(said)
    assert (summary["users"], summary["rows"]) == (shop.shards.num_users, len(shop.frame))
    assert f"{shop.shards.num_users} users" in err
    table = pq.read_table(file)
    assert table.column_names == ["user", "items", "scores", "events", "vector"]
    assert {len(items) for items in table["items"].to_pylist()} == {5}
    code, said, err = bfm("predict", out, log, "--out", file)
    assert (code, said.strip()) == (0, str(file))
    assert pq.read_table(file).column_names == ["user", "items", "scores", "events"]


def test_mistakes_are_one_line(bfm, shop, tmp_path):
    shards = ("--shards", shop.shards.path)
    log = shop.folder / "log.parquet"
    wrong = [
        ("export", shop.checkpoint, *shards, "--out", shop.folder),
        ("export", shop.folder / "none", *shards, "--out", tmp_path / "e"),
        ("export", shop.checkpoint, "--shards", tmp_path, "--out", tmp_path / "e"),
        ("export", shop.checkpoint, *shards, "--out", tmp_path / "e", "--catalogue-dtype", "int8"),
        ("predict", tmp_path, log, "--out", tmp_path / "p"),
        ("predict", shop.folder / "export", log, "--out", tmp_path / "p", "--k", 1000),
        ("predict", shop.folder / "export", shop.folder / "table.parquet", "--out", tmp_path / "p"),
        ("predict", shop.folder / "export", log, "--out", log / "p"),
        ("export", shop.checkpoint, *shards, "--out", log / "e"),
    ]
    for arguments in wrong:
        code, out, err = bfm(*arguments)
        assert (code, out) == (2, ""), arguments
        assert err.count("\n") == 1, err
        assert err.startswith("bfm: ")
    assert list(tmp_path.iterdir()) == []


def test_an_export_appears_whole_or_not_at_all(shop, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bfm.ranking.predictor.list_files", full_disk)
    with pytest.raises(PausedError, match="no space left"):
        export_checkpoint(shop.checkpoint, str(shop.shards.path), tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_shards_without_a_schema_cannot_be_exported(toy_shards, shop, tmp_path):
    with pytest.raises(UserError, match="give the shard set that it was trained on"):
        export_checkpoint(shop.checkpoint, str(toy_shards.path), tmp_path / "export")
    assert list(tmp_path.iterdir()) == []
