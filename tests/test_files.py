import errno
import os
import pickle

import pytest

from bfm.errors import CorruptError, InfeasibleError, UserError
from bfm.files import Store, canonical_json, read_json, sha256_bytes, sha256_file, write_atomic, write_json


def test_a_full_disk_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "kept.json"
    write_json(path, {"old": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["kept.json"]


def test_files_are_as_readable_as_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    write_atomic(tmp_path / "published", b"x")
    assert (tmp_path / "published").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_torn_json_names_its_file(tmp_path):
    (tmp_path / "torn.json").write_bytes(b'{"a": ')
    with pytest.raises(CorruptError, match=r"torn\.json"):
        read_json(tmp_path / "torn.json")


def test_canonical_json_is_one_byte_string():
    assert canonical_json({"b": 1, "a": [1.5]}) == canonical_json({"a": [1.5], "b": 1}) == b'{"a":[1.5],"b":1}'
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json(float("nan"))


def test_digests_agree(tmp_path):
    (tmp_path / "x").write_bytes(b"events")
    assert sha256_file(tmp_path / "x") == sha256_bytes(b"events")


@pytest.fixture(params=["local", "uri", "object store"])
def store(request, tmp_path):
    if request.param == "object store":
        return Store(f"memory://{tmp_path.name}")
    return Store(tmp_path / "store" if request.param == "local" else f"file://{tmp_path}/store")


def test_an_unknown_scheme_is_the_users_mistake():
    with pytest.raises(UserError, match="nowhere"):
        Store("nowhere://bucket")


def test_store_publishes_lists_and_deletes(store):
    assert store.names("ledger") == []
    store.put("ledger/2", b"two")
    store.put("ledger/1", b"one")
    assert store.names("ledger") == ["ledger/1", "ledger/2"]
    assert store.get("ledger/1") == b"one"
    assert store.child("ledger").get("2") == b"two"
    assert not store.exists("ledger/3")
    with pytest.raises(FileNotFoundError):
        store.get("ledger/3")
    store.delete_folder("ledger")
    assert store.names("ledger") == []


def test_put_new_never_overwrites(store):
    assert store.put_new("lease", b"first")
    assert not store.put_new("lease", b"second")
    assert store.get("lease") == b"first"


@pytest.mark.parametrize("kind", [UserError, InfeasibleError])
def test_user_errors_are_one_line_and_travel_between_processes(kind):
    error = kind("unknown key", file="space.yaml", key="budget.x", fix="did you mean 'y'?")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error) == "space.yaml: budget.x: unknown key; did you mean 'y'?"
