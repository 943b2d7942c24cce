import json
import os
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pytest

from bfm.errors import CorruptError, UserError
from bfm.events.manifest import MANIFEST, Manifest
from bfm.events.parts import write_part
from bfm.events.shards import Shards
from tests.helpers import history_of, make_shards, open_verified, user_keys


@pytest.fixture
def copied(toy_shards, tmp_path):
    """A copy of the toy shards that a test may damage."""
    shutil.copytree(toy_shards.path, tmp_path / "copy")
    return tmp_path / "copy"


def test_shards_say_what_was_written(toy_shards):
    lengths = toy_shards.user_lengths
    assert lengths.sum() == toy_shards.manifest.events
    assert (np.diff(toy_shards.train_counts) <= 0).all()
    assert toy_shards.train_counts[-1] >= 1
    assert toy_shards.train_counts.sum() == toy_shards.manifest.train_events
    assert {f.name for f in toy_shards.item_fields} == set(toy_shards.item_arrays)
    assert all(len(values) == toy_shards.num_items for values in toy_shards.item_arrays.values())
    assert len(user_keys(toy_shards)) == toy_shards.num_users
    assert open_verified(toy_shards.path).hash == toy_shards.hash


def test_partition_does_not_change_histories(tmp_path):
    one, three = (make_shards(tmp_path / str(n), users=40, num_parts=n) for n in (1, 3))
    index = np.random.default_rng(0).integers(0, one.manifest.events, 200)
    for user in range(40):
        first, second = history_of(one, user), history_of(three, user)
        assert np.array_equal(first.item, second.item)
        assert np.array_equal(first.time, second.time)
        assert np.array_equal(first.context["channel"], second.context["channel"])
        assert (first.train_end, first.valid_end) == (second.train_end, second.valid_end)
    for name in ("channel", "quantity"):
        taken = [shards.context_at(name, index) for shards in (one, three)]
        assert np.array_equal(*taken, equal_nan=True)


def test_shards_travel_to_another_process_without_their_events(toy_shards):
    raw = pickle.dumps(toy_shards)
    assert len(raw) < 10_000
    assert np.array_equal(history_of(pickle.loads(raw), 5).item, history_of(toy_shards, 5).item)


def test_same_input_same_bytes(tmp_path):
    first, second = (make_shards(tmp_path / name, users=20, seed=3) for name in "ab")
    assert first.hash == second.hash
    assert make_shards(tmp_path / "c", users=20, seed=4).hash != first.hash


@pytest.mark.parametrize("name", ["events/item.npy", "events/context/quantity.npy", "items/price.npy", "protocol.json"])
def test_a_truncated_file_is_named(copied, name):
    with open(copied / name, "r+b") as handle:
        handle.truncate(os.path.getsize(copied / name) - 3)
    with pytest.raises(CorruptError, match=name):
        Shards.open(copied)


def test_an_altered_file_is_named(copied):
    raw = bytearray((copied / "events/time.npy").read_bytes())
    raw[-1] ^= 1
    (copied / "events/time.npy").write_bytes(raw)
    with pytest.raises(CorruptError, match=r"events/time\.npy"):
        open_verified(copied)


def test_a_missing_file_is_named(copied):
    (copied / "items.parquet").unlink()
    with pytest.raises(CorruptError, match=r"items\.parquet"):
        Shards.open(copied)


def test_an_altered_manifest_is_found(copied):
    values = json.loads((copied / MANIFEST).read_text())
    (copied / MANIFEST).write_text(json.dumps({**values, "seed": 99}))
    with pytest.raises(CorruptError, match="altered"):
        Shards.open(copied)
    (copied / MANIFEST).write_text(json.dumps({**values, "surprise": 1}))
    with pytest.raises(CorruptError, match="altered"):
        Shards.open(copied)
    (copied / MANIFEST).write_text(json.dumps([]))
    with pytest.raises(CorruptError, match="is not that of a shard set"):
        Shards.open(copied)
    (copied / MANIFEST).write_text(json.dumps({**values, "kind": "checkpoint"}))
    with pytest.raises(CorruptError, match="that of a checkpoint, not of a shard set"):
        Shards.open(copied)
    (copied / MANIFEST).write_text(json.dumps({**values, "version": 77}))
    with pytest.raises(UserError, match="shard set of version 77"):
        Shards.open(copied)


def test_no_shard_set_is_the_users_mistake(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "nowhere", tmp_path, tmp_path / "file", f"file://{tmp_path}"):
        with pytest.raises(UserError, match="no shard set here"):
            Shards.open(place)


def test_a_uri_is_cached_and_checked(toy_shards, copied, tmp_path, monkeypatch):
    monkeypatch.setenv("BFM_CACHE", str(tmp_path / "cache"))
    fetched = Shards.open(f"file://{copied}")
    assert fetched.hash == toy_shards.hash
    assert (tmp_path / "cache") in fetched.path.parents
    # The second opening needs nothing but the remote manifest.
    shutil.rmtree(copied / "events")
    assert np.array_equal(history_of(Shards.open(f"file://{copied}"), 3).item, history_of(toy_shards, 3).item)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(CorruptError, match="is missing"):
        Shards.open(f"file://{copied}")
    assert not [name for name in os.listdir(tmp_path / "cache/shards") if not name.startswith(".fetch")]


def test_manifest_survives_its_json(toy_shards):
    manifest = toy_shards.manifest
    again = Manifest.from_dict(json.loads(json.dumps(manifest.as_dict())))
    assert again == manifest
    assert again.hash == manifest.hash


def test_writer_refuses_lengths_that_do_not_fit(tmp_path):
    good = {
        "item": np.zeros(3), "time": np.zeros(3), "context": {}, "user_offsets": np.array([0, 3]),
        "train_end": np.array([1]), "valid_end": np.array([2]), "users": pa.array(["a"]),
    }  # fmt: skip
    write_part(tmp_path, **good)
    for bad in (
        {"time": np.zeros(2)},
        {"valid_end": np.array([0])},
        {"context": {"x": np.zeros(1)}},
        {"users": pa.array([], pa.string())},
    ):
        with pytest.raises(AssertionError, match=" of "):
            write_part(tmp_path, **{**good, **bad})


def test_an_empty_partition_is_harmless(tmp_path):
    shards = make_shards(tmp_path, users=3, num_parts=5)
    assert shards.num_users == 3
    assert sum(len(history_of(shards, user).item) for user in range(3)) == shards.manifest.events


def test_what_is_kept_is_checked_and_never_needed(copied):
    shards, made = Shards.open(copied), []

    def make():
        made.append(1)
        return b"value"

    assert [shards.kept("x", make) for _ in range(2)] == [b"value"] * 2
    assert len(made) == 1
    shards.kept_path("x").write_bytes(shards.kept_path("x").read_bytes()[:-1])
    assert shards.kept("x", make) == b"value"
    assert len(made) == 2
    assert open_verified(copied).hash == shards.hash


def test_a_directory_that_cannot_be_written_only_costs_the_cache(toy_shards, monkeypatch):
    def refuse(path, data):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("bfm.events.shards.write_atomic", refuse)
    assert toy_shards.kept("never", lambda: b"value") == b"value"
    assert not toy_shards.kept_path("never").exists()
