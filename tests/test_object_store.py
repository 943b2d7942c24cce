"""From log to export with everything on an S3 server: logs, shards, a sweep's ledger, checkpoints, curves, report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from bfm.doors.events_file import stored_events
from bfm.doors.tensorboard import HPARAMS_METRICS, SweepWriter, TrialWriter
from bfm.errors import UserError
from bfm.events.protocol import Protocol
from bfm.files import Store
from bfm.sweep.driver.driver import SweepDriver
from bfm.sweep.ledger.ledger import read_state
from bfm.sweep.ledger.task import Finished
from bfm.sweep.space.costs import Costs
from bfm.sweep.space.space import FeasibleSet
from bfm.sweep.space.spec import from_dict
from bfm.training.engine import EngineFactory
from bfm.training.rung import run_rung
from bfm.training.task import RungTask
from ray_jobs import prepare as ray_prepare
from tests.events.serial import prepare_serially
from tests.events.test_stages import SCHEMA, make_log
from tests.helpers import open_verified
from tests.ranking.shop import make_shop
from tests.sweep.test_real_tasks import SPACE
from tests.sweep.world import mortal_ledger


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of remote shard sets."""
    monkeypatch.setenv("BFM_CACHE", str(tmp_path / "cache"))


def put_frame(place: str, frame) -> None:
    """A log under a URI, in the format of its ending."""
    folder, _, name = place.rpartition("/")
    form = name.split(".")[1]
    write = {"parquet": lambda: frame.to_parquet(name), "csv": lambda: frame.to_csv(name, index=False)}
    write["jsonl"] = lambda: frame.to_json(name, orient="records", lines=True)
    write[form]()
    Store(folder).put(name, Path(name).read_bytes())


def test_logs_are_read_from_a_bucket_as_from_a_disk(tmp_path, s3, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frame = make_log()
    table = next(line for line in SCHEMA.splitlines() if line.startswith("items:"))
    Path("shop.yaml").write_text(SCHEMA.replace(f"{table}\n", "").replace("colour: categorical, price: numeric, ", ""))
    frame.to_parquet("log.parquet")
    expected = prepare_serially("shop.yaml", ["log.parquet"], tmp_path / "local")
    put_frame(f"{s3}/logs/deep/0.parquet", frame[:1000])
    put_frame(f"{s3}/logs/1.parquet", frame[1000:])
    put_frame(f"{s3}/logs/_temporary/0/0.parquet", frame[:10])
    Store(s3).put("logs/_SUCCESS", b"")
    for number, logs in enumerate(
        (["logs"], ["logs/**/*.parquet"], ["logs/*.parquet", "logs/*/0.parquet"], ["logs/1.parquet", "logs/deep"])
    ):
        found = prepare_serially("shop.yaml", [f"{s3}/{log}" for log in logs], tmp_path / str(number))
        assert (found.events, found.users, found.items) == (expected.events, expected.users, expected.items)
        assert found.files["items.parquet"] == expected.files["items.parquet"]
    for name in ("log.csv.gz", "log.jsonl.gz"):
        put_frame(f"{s3}/{name}", frame)
        found = prepare_serially("shop.yaml", [f"{s3}/{name}"], tmp_path / f"of-{name}")
        assert (found.events, found.users) == (expected.events, expected.users)
    with pytest.raises(UserError, match="there is no such file"):
        prepare_serially("shop.yaml", [f"{s3}/nothing"], tmp_path / "none")
    with pytest.raises(UserError, match="no such bucket"):
        prepare_serially("shop.yaml", ["s3://no-such-bucket/logs"], tmp_path / "none")


def test_a_sweep_lives_in_a_bucket(toy_shards, s3, s3_server, tmp_path, cache, bfm):
    files = [*toy_shards.manifest.files, "manifest.json"]
    for name in files:
        Store(f"{s3}/shards").put(name, (toy_shards.path / name).read_bytes())
    shards = open_verified(f"{s3}/shards")
    assert shards.hash == toy_shards.hash
    budget = {**SPACE["budget"], "max_trials": 2, "total_flops": "4e8"}
    data = {**SPACE["data"], "shards": f"{s3}/shards"}
    spec, store = from_dict({**SPACE, "budget": budget, "data": data, "probes": []}), Store(f"{s3}/runs/toy")
    costs = Costs.on(shards, Protocol.load(shards), spec.data.evaluation_queries)

    def drive(rows: int) -> SweepDriver:
        """A driver that dies after so many rows."""
        driver = SweepDriver.start(FeasibleSet(spec, costs), mortal_ledger(store))
        curves = SweepWriter(f"{store.uri}/tensorboard/_sweep", {})
        for _ in range(rows):
            task = driver.next_task()
            if isinstance(task, Finished):
                break
            s3_server.faults[:] = ["503"]
            writer = TrialWriter(f"{store.uri}/tensorboard/{task.trial}", task.config, HPARAMS_METRICS)
            row = run_rung(
                RungTask.from_task(dataclasses.asdict(task)), shards, EngineFactory(), Store(store.uri), writer.take
            )
            writer.row(row)
            writer.close()
            with s3_server.counted() as requests:
                driver.report(task.task_id, row)
            assert requests.total() == 1
            curves.update(driver.state)
        curves.close()
        return driver

    first = drive(rows=1)
    second = drive(rows=9)
    with pytest.raises(UserError, match="taken over"):
        first.next_task()
    state = read_state(store)
    assert state.finished
    assert not state.losses
    assert len(state.rungs[0]) == 2
    assert state.rungs[1]
    second.close()
    tags = {value.tag for event in stored_events(store.child("tensorboard/_sweep")) for value in event.summary.value}
    assert "spend/total" in tags
    code, out, _ = bfm("status", store.uri, "--json")
    assert (code, json.loads(out)["trials"]) == (0, 2)
    assert bfm("report", store.uri)[0] == 0
    assert b"<html" in store.get("report/index.html")


def test_a_checkpoint_is_exported_from_a_bucket(s3, tmp_path, cache, bfm):
    shop = make_shop(tmp_path / "shop")
    for path in shop.folder.rglob("*"):
        if path.is_file():
            Store(s3).put(path.relative_to(shop.folder).as_posix(), path.read_bytes())
    checkpoint = Path(shop.checkpoint).relative_to(shop.folder)
    code, _, said = bfm("export", f"{s3}/{checkpoint}", "--shards", f"{s3}/shards", "--out", tmp_path / "export")
    assert code == 0, said
    assert (tmp_path / "export" / "export.json").exists()


def test_a_shard_set_is_prepared_into_a_bucket(s3, tmp_path, cache, monkeypatch, toy_shards):
    def local(schema, logs, out, **settings):
        for name in [*toy_shards.manifest.files, "manifest.json"]:
            target = Path(out) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((toy_shards.path / name).read_bytes())
        return toy_shards.manifest

    prepare = ray_prepare.prepare_shards
    monkeypatch.setattr(ray_prepare, "prepare_shards", local)
    prepare("schema", ["log"], f"{s3}/shards")
    assert open_verified(f"{s3}/shards").hash == toy_shards.hash
    with pytest.raises(UserError, match="exists already"):
        prepare("schema", ["log"], f"{s3}/shards")


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("nowhere://bucket/sweep", "nowhere:// is not known"),
        ("s3://no-such-bucket/sweep", "no such bucket"),
    ],
)
def test_the_users_mistakes_are_one_line(bfm, s3, uri, said):
    code, _, err = bfm("status", uri)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
