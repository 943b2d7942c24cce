import errno
import json
import os
import time

import pytest
import ray

from bfm.errors import PausedError, UserError
from bfm.events import prepare
from bfm.events.shards import Shards
from bfm.files import Store
from bfm.sealed import staging
from ray_jobs import prepare as ray_prepare
from ray_jobs.cluster_session import local_ray
from ray_jobs.prepare import prepare_shards
from tests.events.serial import contents, prepare_serially
from tests.events.test_stages import SCHEMA, make_log
from tests.helpers import open_verified


@pytest.fixture(scope="module", autouse=True)
def session():
    with local_ray(2):
        yield


@pytest.fixture
def shop(tmp_path):
    (tmp_path / "shop.yaml").write_text(SCHEMA.replace("items: {path: table.parquet, key: item}\n", "").replace(
        "colour: categorical, price: numeric, ", ""
    ))  # fmt: skip
    frame = make_log()
    frame.to_parquet(tmp_path / "log.parquet")
    shuffled = frame.sample(frac=1, random_state=5)
    (tmp_path / "parts").mkdir()
    for part in range(5):
        shuffled.iloc[part * 600 : (part + 1) * 600].to_parquet(tmp_path / "parts" / f"{part}.parquet")
    return tmp_path


def _data(folder):
    """All files, the manifest without what is about the raw files."""
    files = contents(folder)
    manifest = json.loads(files.pop("manifest.json"))
    del manifest["checks"]["ties_raw"], manifest["hash"]
    return files, manifest


@pytest.mark.parametrize("rows_per_shard", [1 << 18, 400])
def test_ray_writes_what_one_process_writes(shop, monkeypatch, rows_per_shard):
    """One file or five shuffled ones, one block or many, Ray or a loop: every byte is the same."""
    monkeypatch.setattr(prepare, "PARTITION_ROWS", rows_per_shard)
    schema = str(shop / "shop.yaml")
    prepare_serially(schema, [shop / "log.parquet"], shop / "serial")
    manifest = prepare_shards(schema, [str(shop / "log.parquet")], str(shop / "one"))
    prepare_shards(schema, [str(shop / "parts" / "*.parquet")], str(shop / "five"))
    assert contents(shop / "one") == contents(shop / "serial")
    assert _data(shop / "five") == _data(shop / "serial")
    assert open_verified(shop / "one").manifest == manifest


def test_progress_goes_through_all_stages_and_ray_is_quiet(shop, capfd):
    seen = []
    out = str(shop / "out")
    prepare_shards(str(shop / "shop.yaml"), [str(shop / "parts")], out, progress=lambda *step: seen.append(step))
    stages = list(dict.fromkeys(stage for stage, _ in seen))
    assert stages == ["start", "read", "sort", "measure", "fit", "write", "join", "finish"]
    for stage in stages:
        shares = [share for name, share in seen if name == stage]
        assert shares == sorted(shares)
        assert (shares[0], shares[-1]) == (0, 1)
    assert capfd.readouterr() == ("", "")


def test_relative_places_are_the_users_and_not_the_workers(shop, monkeypatch):
    monkeypatch.chdir(shop)
    relative = prepare_shards("shop.yaml", ["parts", "./log.parquet"], "out")
    assert relative.rows_read == 2 * len(make_log())
    assert (shop / "out" / "manifest.json").exists()


def test_mistakes_found_by_workers_arrive_as_one_line(shop):
    whole = "user,time,item,quantity,shop,words\n" + "1,2,3,4,north,x\n" * 50_000
    (shop / "latin.csv").write_bytes(whole.encode() + b"1,2,3,4,caf\xe9,x\n")
    with pytest.raises(UserError, match=r"latin\.csv: read\.encoding: is not utf-8 text: byte") as raised:
        prepare_shards(str(shop / "shop.yaml"), [str(shop / "latin.csv")], str(shop / "out"))
    assert len(str(raised.value).splitlines()) == 1
    assert not [path.name for path in shop.iterdir() if "out" in path.name]


@pytest.mark.parametrize("spread", [ray_prepare._blocks, ray_prepare._tasks])
def test_a_full_disk_at_a_worker_is_said_and_leaves_nothing(shop, spread):
    """The first task finds it so; of the others, none begins once that is known, and none is left at work."""

    def write(number):
        if number == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        time.sleep(0.2)
        (shop / f"begun-{number}").touch()

    def fill():
        with staging(shop / "out") as folder:
            (folder / "half").write_text("made")
            ray_prepare._over(folder, spread, write, [(number,) for number in range(40)])

    with pytest.raises(PausedError, match="no space left on the disk"):
        fill()
    begun = len(list(shop.glob("begun-*")))
    assert begun < 20
    time.sleep(0.5)
    assert len(list(shop.glob("begun-*"))) == begun
    assert not [path.name for path in shop.iterdir() if "out" in path.name]


def test_a_uri_is_filled_and_read_back(shop, monkeypatch):
    monkeypatch.setenv("BFM_CACHE", str(shop / "cache"))
    uri = f"file://{shop}/store/set"
    (shop / "store" / "set").mkdir(parents=True)
    manifest = prepare_shards(str(shop / "shop.yaml"), [f"file://{shop}/parts"], uri)
    assert Shards.open(uri).hash == manifest.hash
    with pytest.raises(UserError, match="exists already"):
        prepare_shards(str(shop / "shop.yaml"), [f"file://{shop}/parts"], uri)
    globbed = prepare_shards(str(shop / "shop.yaml"), [f"file://{shop}/parts/*.parquet"], uri, overwrite=True)
    assert globbed.hash == manifest.hash


def test_an_overwritten_uri_is_no_shard_set_until_all_of_it_is_there(shop, monkeypatch):
    uri, put = f"file://{shop}/store/set", Store.put
    prepare_shards(str(shop / "shop.yaml"), [str(shop / "parts")], uri)

    def put_some(store, name, data):
        if name.startswith("users/"):
            raise OSError(errno.EIO, "the storage is away")
        put(store, name, data)

    monkeypatch.setattr(Store, "put", put_some)
    with pytest.raises(OSError, match="away"):
        prepare_shards(str(shop / "shop.yaml"), [str(shop / "log.parquet")], uri, seed=9, overwrite=True)
    with pytest.raises(UserError, match="no shard set"):
        Shards.open(uri)


def test_a_session_is_shared_and_an_own_one_swept_away():
    with local_ray(2):
        assert ray.is_initialized()
    assert ray.is_initialized()
