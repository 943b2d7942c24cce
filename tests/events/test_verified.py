"""A flipped byte in a shard set is found, once per machine, and nobody reads it twice."""

import shutil

import pytest

from bfm.errors import CorruptError
from bfm.events import verified
from bfm.events.shards import Shards
from bfm.events.verified import Verification


@pytest.fixture
def shards(toy_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(verified, "_memory", lambda: tmp_path / "memory")
    return Shards.open(shutil.copytree(toy_shards.path, tmp_path / "shards"))


def flip(shards):
    path = shards.path / "shard-00000" / "item.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_whole_shards_are_read_once_per_machine(shards, monkeypatch):
    assert Verification(shards).result() == shards.hash
    monkeypatch.setattr(verified, "check_files", lambda *_: pytest.fail("read again"))
    assert Verification(shards).result() == shards.hash


@pytest.mark.parametrize("before", [False, True], ids=["never read", "read before"])
def test_a_flipped_byte_is_found_and_named(shards, before):
    if before:
        Verification(shards).result()
    flip(shards)
    with pytest.raises(CorruptError, match=r"item\.npy: was altered"):
        Verification(shards).result()
    with pytest.raises(CorruptError):
        Verification(shards).result()
