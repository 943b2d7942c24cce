"""A sealed folder is whole and as it was written, or says which file is not."""

import pytest

from bfm.errors import CorruptError, PausedError, UserError
from bfm.files import Store
from bfm.sealed import Sealed, check_files, check_free, list_files, publish, staging

BOX = Sealed("box", "box.json", version=3, fix="make another one")
FACTS = {"name": "première", "count": 17, "share": 0.25, "files": {"a": [1, 2]}}


@pytest.fixture(params=["local", "object store"])
def store(request, tmp_path):
    return Store(request.getfixturevalue("s3") if request.param == "object store" else tmp_path)


@pytest.mark.parametrize("folder", ["", "some/where"])
def test_what_is_written_is_read_and_any_altered_byte_is_refused(store, folder):
    BOX.write(store, FACTS, folder)
    assert BOX.read(store, folder) == FACTS
    assert BOX.hash(FACTS) != BOX.hash({**FACTS, "count": 18})
    name = f"{folder}/box.json".lstrip("/")
    data = store.get(name)
    for place in range(len(data) - 1):
        store.put(name, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises((CorruptError, UserError), match=r"box\.json"):
            BOX.read(store, folder)
    for length in range(0, len(data) - 1, 20):
        store.put(name, data[:length])
        with pytest.raises(CorruptError, match=r"box\.json"):
            BOX.read(store, folder)


def test_none_another_version_and_another_kind_are_told_apart(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(UserError, match="no box here; make another one"):
        BOX.read(store)
    Sealed("box", "box.json", version=2, fix="").write(store, FACTS)
    with pytest.raises(UserError, match="box of version 2, this code reads 3; make another one"):
        BOX.read(store)
    Sealed("crate", "box.json", version=3, fix="").write(store, FACTS)
    with pytest.raises(CorruptError, match="that of a crate, not of a box"):
        BOX.read(store)


def test_files_are_checked_by_size_and_by_content(tmp_path):
    for name in ("a", "b/c", ".cache/d", ".e"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    files = list_files(tmp_path)
    assert list(files) == ["a", "b/c"]
    check_files(tmp_path, files)
    (tmp_path / "b/c").write_text("b/d")
    check_files(tmp_path, files, whole=False)
    with pytest.raises(CorruptError, match="b/c: was altered"):
        check_files(tmp_path, files)
    (tmp_path / "b/c").write_text("b")
    with pytest.raises(CorruptError, match="b/c: is truncated"):
        check_files(tmp_path, files, whole=False)
    (tmp_path / "b/c").unlink()
    with pytest.raises(CorruptError, match="b/c: is missing"):
        check_files(tmp_path, files, whole=False)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    for text in ("first", "second"):
        with staging(out) as scratch:
            (scratch / "made").mkdir()
            (scratch / "made" / "file").write_text(text)
            publish(scratch / "made", out)
        assert (out / "file").read_text() == text
    with pytest.raises(PausedError, match="no space left"), staging(out):
        raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="exists already"):
        check_free(out)
    with pytest.raises(UserError, match="is not a box"):
        check_free(out, BOX)
    BOX.write(Store(out), FACTS)
    check_free(out, BOX)
