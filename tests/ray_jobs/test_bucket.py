"""Ray's workers and a bucket: logs there, shards there, a sweep with a group of workers there, and no file anywhere."""

from __future__ import annotations

import pytest
import ray
import yaml

from bfm.files import Store
from bfm.sweep.ledger.ledger import read_state
from bfm.sweep.space.spec import resolve
from ray_jobs.cluster_session import local_ray
from ray_jobs.prepare import prepare_shards
from ray_jobs.sweep import run_sweep
from tests.events.test_stages import make_log
from tests.ray_jobs.toys import PAIR, SINGLE, wait_for, write_space

SCHEMA = "name: shop\nuser: user\ntime: time\nitem: item\n"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_from_a_log_in_a_bucket_to_a_sweep_of_a_group_in_it(tmp_path, s3, s3_server, monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("BFM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "shop.yaml").write_text(SCHEMA)
    make_log().to_parquet(tmp_path / "log.parquet")
    Store(f"{s3}/logs").put("log.parquet", (tmp_path / "log.parquet").read_bytes())
    space = write_space(
        tmp_path, f"{s3}/shards", scaling={"slots": 2, "tiers": [SINGLE, PAIR]}, budget={"max_trials": 2}
    )
    with local_ray(2, dashboard=True):
        manifest = prepare_shards(str(tmp_path / "shop.yaml"), [f"{s3}/logs"], f"{s3}/shards")
        outcome = run_sweep(resolve(space), f"{s3}/runs")
        wait_for(lambda: ray.available_resources().get("CPU") == 2.0, 60, "all CPUs are free again")
    assert outcome.succeeded
    assert not outcome.lost
    store = Store(f"{s3}/runs/tiny")
    rows = [row for trial in read_state(store).trials.values() for row in trial.rows.values()]
    assert {(row["rung"], row["workers"]) for row in rows} == {(0, 1), (1, 2)}
    assert {row["shards_hash"] for row in rows} == {manifest.hash}
    assert all(store.exists(f"{row['checkpoint']}/meta.json") for row in rows)
    assert yaml.safe_load(store.get("sweep.yaml"))["name"] == "tiny"
    assert not any((tmp_path / name).exists() for name in ("runs", "shards", "tiny"))
