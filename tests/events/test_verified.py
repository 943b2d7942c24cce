"""A flipped byte in a shard set is found, once per machine, and nobody reads it twice."""

import shutil
import threading
import time

import pytest

from bfm.errors import CorruptError
from bfm.events import verified
from bfm.events.shards import Shards
from bfm.events.verified import Verification
from bfm.sealed import check_files


@pytest.fixture
def shards(toy_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(verified, "_memory", lambda: tmp_path / "memory")
    return Shards.open(shutil.copytree(toy_shards.path, tmp_path / "shards"))


def flip(shards):
    path = shards.path / "events" / "item.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_whole_shards_are_read_once_per_machine(shards, monkeypatch):
    assert Verification(shards).result() == shards.hash
    monkeypatch.setattr(verified, "check_files", lambda *_, **__: pytest.fail("read again"))
    assert Verification(shards).result() == shards.hash


def test_who_waits_is_told_of_what_is_read_and_of_nothing_else(shards, monkeypatch):
    """So that a large log on a slow disk is told from a disk that is dead."""
    monkeypatch.setattr(verified, "_LOOK_S", 0.005)
    waits, come, told = threading.Event(), threading.Event(), []

    def read(folder, files, *, on_bytes):
        waits.wait()
        on_bytes(1)
        come.wait()

    monkeypatch.setattr(verified, "check_files", read)
    waiting = threading.Thread(target=lambda: Verification(shards).result(lambda: told.append(1)))
    waiting.start()
    time.sleep(0.1)
    assert not told, "nothing came"
    waits.set()
    deadline_s = time.monotonic() + 10
    while not told and time.monotonic() < deadline_s:
        time.sleep(0.005)
    time.sleep(0.1)
    assert told == [1], "nothing more came"
    come.set()
    waiting.join(10)
    counted = []
    check_files(shards.path, shards.manifest.files, on_bytes=counted.append)
    assert sum(counted) == sum(entry["bytes"] for entry in shards.manifest.files.values())


@pytest.mark.parametrize("before", [False, True], ids=["never read", "read before"])
def test_a_flipped_byte_is_found_and_named(shards, before):
    if before:
        Verification(shards).result()
    flip(shards)
    with pytest.raises(CorruptError, match=r"item\.npy: was altered"):
        Verification(shards).result()
    with pytest.raises(CorruptError):
        Verification(shards).result()
