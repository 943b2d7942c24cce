import errno
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from bfm import patience
from bfm.errors import CorruptError, InfeasibleError, UserError
from bfm.files import Store, canonical_json, read_json, sha256_bytes, sha256_file, write_atomic, write_json
from bfm.patience import PATIENCE_S


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
        return Store(request.getfixturevalue("s3") + "/some/where")
    return Store(tmp_path / "store" if request.param == "local" else f"file://{tmp_path}/store")


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
    store.put("ledger/deep/3", b"three")
    assert store.names("ledger") == ["ledger/1", "ledger/2"]
    assert store.folders("ledger") == ["ledger/deep"]
    assert store.walk() == ["ledger/1", "ledger/2", "ledger/deep/3"]
    with store.open("ledger/deep/3") as stream:
        assert stream.seek(-2, 2) == 3
        assert stream.read() == b"ee"
    store.delete("ledger/1")
    store.delete("ledger/1")
    assert store.names("ledger") == ["ledger/2"]
    store.delete_folder("ledger")
    store.delete_folder("ledger")
    assert store.walk("ledger") == []


def test_large_objects_are_whole(store, tmp_path):
    data = os.urandom(11 << 20)
    store.put("large", data)
    assert store.get("large") == data
    with store.open("large") as stream:
        stream.seek(1 << 20)
        assert stream.read(9 << 20) == data[1 << 20 : 10 << 20]
    (tmp_path / "file").write_bytes(data)
    store.put("of a file", tmp_path / "file")
    assert store.get("of a file") == data


def test_put_new_never_overwrites(store):
    assert store.put_new("lease", b"first")
    assert not store.put_new("lease", b"second")
    assert store.get("lease") == b"first"


@pytest.mark.parametrize("place", ["local", "object store"])
def test_of_many_writers_at_once_one_creates(place, tmp_path, request):
    store = Store(tmp_path if place == "local" else request.getfixturevalue("s3"))
    with ThreadPoolExecutor(20) as pool:
        for number in range(5):
            won = list(pool.map(lambda writer, n=number: store.put_new(f"lease/{n}", b"%d" % writer), range(20)))
            assert sum(won) == 1
            assert store.get(f"lease/{number}") == b"%d" % won.index(True)


# ---------------------------------------------------------------- storage that is away


@pytest.mark.parametrize("fault", ["503", "500", "429", "drop", "lost"])
def test_faults_of_an_object_store_cost_a_pause(s3_server, s3, fault):
    store = Store(s3, patience_s=20.0)
    for action, result in (
        (lambda: store.put("a", b"1"), None),
        (lambda: store.put_new("b", b"2"), True),
        (lambda: store.put_new("b", b"3"), False),
        (lambda: store.get("b"), b"2"),
        (lambda: store.exists("b"), True),
        (lambda: store.names(), ["a", "b"]),
        (lambda: store.delete("a"), None),
    ):
        s3_server.faults[:] = [fault, fault]
        assert action() == result
        assert not s3_server.faults


def test_storage_that_stays_away_ends_in_an_error_that_says_so(s3_server, s3):
    store = Store(s3, patience_s=0.5)
    s3_server.faults[:] = ["503"] * 100
    with pytest.raises(OSError, match=r"has not answered for .*503"):
        store.get("a")
    s3_server.faults[:] = ["503"] * 100
    with pytest.raises(OSError, match="503"):
        store.with_patience(0).get("a")
    assert len(s3_server.faults) == 99


class Outage:
    """A file system that is away for some time of a clock that only sleeping moves."""

    def __init__(self, monkeypatch, until_s, number):
        self.now_s, self.until_s, self.number = 0.0, until_s, number
        monkeypatch.setattr(patience.time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(patience.time, "sleep", self.sleep)
        self.fsync, self.link = os.fsync, os.link
        monkeypatch.setattr(os, "fsync", self.failing(os.fsync))

    def sleep(self, seconds):
        self.now_s += seconds

    def failing(self, action):
        def act(*arguments):
            if self.now_s < self.until_s:
                raise OSError(self.number, os.strerror(self.number))
            return action(*arguments)

        return act


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT])
def test_ten_minutes_without_a_mount_are_one_line_on_the_log(tmp_path, monkeypatch, caplog, number):
    outage = Outage(monkeypatch, 600.0, number)
    assert Store(tmp_path).put_new("a", b"x")
    Store(tmp_path).put("a", b"y")
    assert 600 <= outage.now_s < 620
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert os.listdir(tmp_path) == ["a"]


def test_a_short_outage_is_not_even_mentioned(tmp_path, monkeypatch, caplog):
    Outage(monkeypatch, 5.0, errno.EIO)
    Store(tmp_path).put("a", b"y")
    assert not caplog.records


def test_a_mount_that_stays_away_is_an_error_after_eleven_minutes(tmp_path, monkeypatch):
    outage = Outage(monkeypatch, 1e9, errno.ENOTCONN)
    with pytest.raises(OSError, match="has not answered for") as caught:
        Store(tmp_path).put("a", b"y")
    assert caught.value.errno == errno.ENOTCONN
    assert 600 < outage.now_s <= PATIENCE_S


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_what_waiting_does_not_mend_is_said_at_once(tmp_path, monkeypatch, number):
    outage = Outage(monkeypatch, 1e9, number)
    with pytest.raises(OSError, match=os.strerror(number)):
        Store(tmp_path).put("a", b"y")
    assert outage.now_s == 0


def test_a_link_whose_answer_was_lost_is_the_writers_own(tmp_path, monkeypatch):
    link = os.link

    def lossy(*arguments):
        link(*arguments)
        monkeypatch.setattr(os, "link", link)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", lossy)
    assert Store(tmp_path).put_new("a", b"mine")
    assert not Store(tmp_path).put_new("a", b"mine")


def test_a_disk_without_hard_links_creates_by_exclusive_rename(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "not permitted")))
    store = Store(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda writer: store.put_new("a", b"%d" % writer), range(8))) == 1
    assert os.listdir(tmp_path) == ["a"]
    monkeypatch.setattr("bfm.disk.ctypes.CDLL", lambda *_, **__: None)
    with pytest.raises(UserError, match="neither link files nor rename"):
        store.put_new("b", b"x")


# ---------------------------------------------------------------- the user's mistakes


def test_an_unknown_scheme_is_the_users_mistake():
    with pytest.raises(UserError, match="nowhere"):
        Store("nowhere://bucket")


def test_a_bucket_that_does_not_exist_is_named(s3):
    store = Store("s3://no-such-bucket/sweep")
    for action in (
        lambda: store.names(),
        lambda: store.get("a"),
        lambda: store.put("a", b"x"),
        lambda: store.put_new("a", b"x"),
    ):
        with pytest.raises(UserError, match=r"s3://no-such-bucket.*no such bucket"):
            action()


def test_missing_credentials_are_said_within_seconds(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    begin_s = time.monotonic()
    with pytest.raises(UserError, match="AWS_ACCESS_KEY_ID"):
        Store(s3).names()
    assert time.monotonic() - begin_s < 15


def test_local_paths_need_no_object_store_library():
    code = "import sys; sys.modules['obstore'] = None\nfrom bfm.files import Store\n"
    code += "import tempfile; Store(tempfile.mkdtemp()).put('a', b'x')\n"
    code += "try: Store('s3://b')\nexcept ValueError as error: print(error)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "obstore is not installed" in said.stdout


@pytest.mark.parametrize("kind", [UserError, InfeasibleError])
def test_user_errors_are_one_line_and_travel_between_processes(kind):
    error = kind("unknown key", file="space.yaml", key="budget.x", fix="did you mean 'y'?")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error) == "space.yaml: budget.x: unknown key; did you mean 'y'?"


def test_whether_a_place_can_be_written_is_known_before(tmp_path):
    store = Store(tmp_path / "new")
    store.check_writable()
    assert store.names() == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NotADirectoryError, match="file/run"):
        Store(tmp_path / "file" / "run").check_writable()
