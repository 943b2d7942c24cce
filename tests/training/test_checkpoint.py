"""A checkpoint is whole, or says what is wrong with it."""

import dataclasses
import errno
import json
import os

import pytest

from bfm.errors import CorruptError, UserError
from bfm.files import Store
from bfm.training.checkpoint import load_checkpoint
from tests.training.common import STAGE_1, assert_equal_states, train


@pytest.fixture(scope="module")
def trained(toy_shards):
    return train(STAGE_1, toy_shards, 1e7)[0]


@pytest.fixture
def saved(trained, tmp_path):
    store = Store(tmp_path / "store")
    trained.save(store, "a/trunk")
    return store


def test_round_trip_is_bit_for_bit(trained, saved):
    checkpoint = load_checkpoint(saved, "a/trunk", {"config": STAGE_1.as_dict(), "seed": 3})
    assert_equal_states(checkpoint.state, trained.engine.export_state())
    assert checkpoint.meta["counters"]["step"] == trained.counters.step


def test_none_is_the_users_mistake(saved):
    with pytest.raises(UserError, match="no checkpoint here"):
        load_checkpoint(saved, "b/trunk")


def _object(store, suffix):
    (name,) = [name for name in store.names("a/trunk") if name.endswith(suffix)]
    return name


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_truncate, _flip, _empty, os.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("suffix", [".pt", ".json"])
def test_damage_is_told(saved, damage, suffix):
    damage(saved.path(_object(saved, suffix)))
    gone = damage is os.unlink and suffix == ".json"
    with pytest.raises(UserError if gone else CorruptError, match="a/trunk"):
        load_checkpoint(saved, "a/trunk")


def test_state_of_another_checkpoint_is_told(trained, saved):
    name = _object(saved, ".pt")
    data = bytearray(saved.get(name))
    data[-1] ^= 255
    saved.put(name, bytes(data))
    with pytest.raises(CorruptError, match="sha256"):
        load_checkpoint(saved, "a/trunk")


def test_another_run_is_refused_with_every_difference(saved):
    other = dataclasses.replace(STAGE_1, learning_rate=0.5, window=32)
    with pytest.raises(UserError) as caught:
        load_checkpoint(saved, "a/trunk", {"config": other.as_dict(), "seed": 4, "shards_hash": "x"})
    for words in ("learning_rate is 0.003, not 0.5", "window is 16, not 32", "seed is 3, not 4", "shards_hash is"):
        assert words in str(caught.value)


def test_another_version_is_refused(saved):
    meta = json.loads(saved.get("a/trunk/meta.json"))
    meta["version"] = 99
    saved.put("a/trunk/meta.json", json.dumps(meta).encode())
    with pytest.raises(UserError, match="checkpoint of version 99"):
        load_checkpoint(saved, "a/trunk")


@pytest.mark.parametrize("full_at", [".pt", ".json"])
def test_a_full_disk_leaves_what_stood(toy_shards, trained, tmp_path, monkeypatch, full_at):
    store = Store(tmp_path / "full")
    train(STAGE_1, toy_shards, 5e6)[0].save(store, "old")
    before = load_checkpoint(store, "old")
    put = Store.put

    def fail(self, name, data):
        if name.endswith(full_at):
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, name, data)

    monkeypatch.setattr(Store, "put", fail)
    for name in ("new", "old"):
        with pytest.raises(OSError, match="No space left"):
            trained.save(store, name)
    monkeypatch.undo()
    with pytest.raises(UserError, match="no checkpoint here"):
        load_checkpoint(store, "new")
    assert_equal_states(load_checkpoint(store, "old").state, before.state)
    trained.save(store, "old")
    assert_equal_states(load_checkpoint(store, "old").state, trained.engine.export_state())
    assert len(store.names("old")) == 2
