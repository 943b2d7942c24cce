"""Ledger and lease: what is written is found again whole, damage is named, and only one writer is believed."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bfm.errors import CorruptError, UserError
from bfm.files import Store, canonical_json
from bfm.sweep.ledger import ledger as module
from bfm.sweep.ledger.lease import latest_epoch
from bfm.sweep.ledger.ledger import Ledger, read_ledger, read_state
from bfm.sweep.ledger.repeats import Repeats
from bfm.sweep.ledger.state import SweepState
from tests.sweep.world import execute, make_spec, mortal_lease, mortal_ledger, start


def records(*numbers):
    return [{"kind": "opened", "epoch": number} for number in numbers]


def epochs(store):
    return [record["epoch"] for record in read_ledger(store).records]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "sweep")


@pytest.fixture
def three(store):
    ledger = mortal_ledger(store)
    for number in (1, 2, 3):
        ledger.append(records(number))
    return store


@given(
    batches=st.lists(
        st.lists(
            st.dictionaries(st.text(), st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)),
            max_size=4,
        ),
        max_size=5,
    )
)
@settings(max_examples=25, deadline=None)
def test_records_come_back_in_order(tmp_path_factory, batches):
    store = Store(tmp_path_factory.mktemp("ledger"))
    ledger = mortal_ledger(store)
    for batch in batches:
        ledger.append(batch)
    assert read_ledger(store).records == [record for batch in batches for record in batch]


def test_what_records_repeat_is_written_once_and_read_whole(store):
    def record(kind, trial, **parts):
        return {"kind": kind, kind: {"trial": trial, **parts}}

    config = {"params": 3.0}
    batches = [
        [{"kind": "proposal", "trial": "a", "config": config}, record("task", "a", config=config, scaling={"cpus": 1})],
        [record("row", "a", config=config, shape={"width": 4}), {"kind": "proposal", "trial": "b", "config": config}],
        [record("task", "a", config={"params": 3}, scaling={"cpus": 1})],
        [record("row", "a", config={"params": 3}, shape={"width": 4}), record("row", "b", config=config)],
        [record("task", "a", config=config, scaling=None), record("row", "c"), {"kind": "check", "config": config}],
        [{"kind": "check", "config": config}],
    ]
    for batch in batches:
        mortal_ledger(store).append(batch)
    replay = read_ledger(store)
    assert canonical_json(replay.records) == canonical_json([record for batch in batches for record in batch])
    blocks = [block for pack in replay.packs for block in module._blocks(pack)]
    assert b"".join(blocks).count(b'"scaling":{"cpus":1}') == 1


def test_numbers_that_json_has_not_are_refused_before_anything_is_written(store):
    ledger = mortal_ledger(store)
    with pytest.raises(ValueError, match="JSON"):
        ledger.append([{"value": float("nan")}])
    assert read_ledger(store).records == []


def segment_names(store):
    return [name for folder in store.folders("ledger") for name in store.names(folder)]


@pytest.mark.parametrize("keep", [0, 1, 100, 300])
def test_a_truncated_last_segment_is_named(three, keep):
    path = three.path(segment_names(three)[-1])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptError, match=r"ledger/00000/00000004.jsonl: truncated"):
        read_ledger(three)


@pytest.mark.parametrize("place", [0, 20, 90, 160, 300])
def test_a_flipped_byte_is_found(three, place):
    path = three.path(segment_names(three)[-1])
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="00000004"):
        read_ledger(three)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_segments_that_a_pack_covers_may_be_damaged(three, number):
    three.path(segment_names(three)[number]).write_bytes(b"nonsense")
    assert epochs(three) == [1, 2, 3]


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("count", [3, 69, 255])
def test_a_damaged_pack_loses_no_record(store, damage, count, caplog):
    ledger = mortal_ledger(store)
    for number in range(1, count + 1):
        ledger.append(records(number))
    name = next(n for n in reversed(segment_names(store)) if int(n[-14:-6]) % 4 == 0)
    path = store.path(name)
    data = path.read_bytes()
    own_bytes = data.index(b"\n") + 1 + json.loads(data.split(b"\n")[0])["bytes"]
    path.write_bytes({"flipped": data[:-1] + b"!", "cut": data[:-5], "gone": data[:own_bytes]}[damage])
    assert epochs(store) == list(range(1, count + 1))
    assert "its pack is damaged" in caplog.text
    mortal_ledger(store).append(records(0))
    assert epochs(store) == [*range(1, count + 1), 0]


def test_a_damaged_pack_over_a_damaged_segment_is_named(three):
    path = three.path(segment_names(three)[-1])
    path.write_bytes(path.read_bytes()[:-1])
    three.path(segment_names(three)[2]).write_bytes(b"nonsense")
    with pytest.raises(CorruptError, match="00000003"):
        read_ledger(three)


def test_a_segment_rewritten_with_right_checksums_breaks_the_chain(tmp_path):
    stores = [Store(tmp_path / name) for name in ("one", "other")]
    for store in stores:
        ledger = mortal_ledger(store)
        for number in range(6):
            ledger.append(records(number + 10 * (store is stores[1])))
    # Seven segments: the last one knows the sixth, which is read with it.
    sixth = segment_names(stores[0])[5]
    stores[0].path(sixth).write_bytes(stores[1].get(sixth))
    with pytest.raises(CorruptError, match=r"00000006.*altered"):
        read_ledger(stores[0])


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_segment_is_named(three, missing):
    name = segment_names(three)[missing]
    three.path(name).unlink()
    with pytest.raises(CorruptError, match=name):
        read_ledger(three)


def test_a_copied_segment_is_refused(three):
    first, *_ = segment_names(three)
    three.path("ledger/00000/00000005.jsonl").write_bytes(three.get(first))
    with pytest.raises(CorruptError, match="is a copy of"):
        read_ledger(three)


def test_leftovers_of_a_crash_while_writing_are_not_segments(three):
    three.path("ledger/00000/.00000005.jsonl.abc").write_bytes(b"half")
    assert epochs(three) == [1, 2, 3]


def test_a_ledger_of_an_older_version_is_refused(store):
    store.put("ledger/000001-00000000.jsonl", b"{}")
    with pytest.raises(UserError, match="not of version 2"):
        read_ledger(store)


def test_a_fenced_writer_cannot_append(three):
    old = mortal_ledger(three)
    heir = mortal_ledger(three)
    with pytest.raises(UserError, match="taken over"):
        old.append(records(9))
    heir.append(records(4))
    with pytest.raises(UserError, match="taken over"):
        old.append(records(9))
    assert epochs(three) == [1, 2, 3, 4]


def test_what_a_fenced_writer_appends_before_its_successor_stands_is_read_by_it(three, monkeypatch):
    """The old driver, alive after all, appends between its successor's reading and its successor's first segment."""
    old = mortal_ledger(three)
    read = module.read_ledger

    def read_then_written(store):
        replay = read(store)
        monkeypatch.undo()
        old.append(records(9))
        return replay

    monkeypatch.setattr(module, "read_ledger", read_then_written)
    heir = mortal_ledger(three)
    assert [record["epoch"] for record in heir.replay.records] == [1, 2, 3, 9]
    with pytest.raises(UserError, match="taken over"):
        old.append(records(10))
    heir.append(records(4))
    assert epochs(three) == [1, 2, 3, 9, 4]


def test_a_driver_that_lost_its_lease_before_it_began_shuts_no_one_out(store):
    late = mortal_lease(store)
    heir = mortal_ledger(store)
    with pytest.raises(UserError, match="taken over"):
        Ledger(store, late)
    heir.append(records(1))


def test_takeovers_that_wrote_nothing_leave_no_hole(store):
    first = mortal_ledger(store)
    first.append(records(1))
    for _ in range(3):
        last = mortal_ledger(store)
    last.append(records(4))
    assert epochs(store) == [1, 4]
    assert latest_epoch(store) == 4


def test_an_append_is_one_request_and_many_are_read_in_few(s3_server, s3):
    store = Store(s3)
    ledger = mortal_ledger(store)
    with s3_server.counted() as requests:
        for number in range(510):
            ledger.append(records(number))
    assert requests == {"PUT": 510}
    with s3_server.counted() as requests:
        assert epochs(store) == list(range(510))
    assert requests.total() <= 2 + (511).bit_count()


@pytest.mark.parametrize("fault", ["503", "drop", "lost"])
def test_an_append_whose_answer_is_lost_is_no_other_sweep(s3_server, s3, fault):
    store = Store(s3, patience_s=20.0)
    ledger = mortal_ledger(store)
    for number in range(3):
        s3_server.faults[:] = [fault]
        ledger.append(records(number))
    assert epochs(store) == [0, 1, 2]


# ---------------------------------------------------------------- contests


def contest(store, round_number, pool):
    """Twenty drivers start at once: the winner's acknowledged records."""

    def start_one(number):
        try:
            lease = mortal_lease(store, f"machine-{round_number}")
        except UserError:
            return None
        ledger = Ledger(store, lease)
        ledger.append(records(round_number))
        return ledger

    return [ledger for ledger in pool.map(start_one, range(20)) if ledger is not None]


@pytest.mark.parametrize("place", ["local", "object store"])
@pytest.mark.parametrize("rounds", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_of_twenty_drivers_that_start_at_once_one_wins(place, rounds, tmp_path, request):
    store = Store(tmp_path if place == "local" else request.getfixturevalue("s3"))
    last = None
    with ThreadPoolExecutor(20) as pool:
        for number in range(1, rounds + 1):
            won = contest(store, number, pool)
            assert len(won) == 1
            if last is not None:
                with pytest.raises(UserError, match="taken over"):
                    last.append(records(-1))
            (last,) = won
    assert epochs(store) == list(range(1, rounds + 1))


@pytest.mark.parametrize("place", ["local", "object store"])
def test_two_drivers_never_both_append_with_acknowledgement(place, tmp_path, request):
    """Drivers that take the sweep from each other while both write: every acknowledged record is read, in order."""
    store = Store(tmp_path if place == "local" else request.getfixturevalue("s3"))
    acknowledged = []

    def drive(number, lease):
        kept = []
        try:
            ledger = Ledger(store, lease)
            for count in range(60):
                ledger.append(records([number, count]))
                kept.append([number, count])
        except UserError:
            pass
        acknowledged.append(kept)

    threads = []
    for number in range(1, 6):
        threads.append(threading.Thread(target=drive, args=(number, mortal_lease(store))))
        threads[-1].start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    found = epochs(store)
    assert all([record for record in found if record[0] == kept[0][0]] == kept for kept in acknowledged if kept)
    assert len(found) == sum(map(len, acknowledged))
    assert [number for number, _ in found] == sorted(number for number, _ in found)


def test_a_full_disk_loses_nothing(store, monkeypatch):
    driver = start(make_spec(), store)
    task = driver.next_task()
    before = canonical_json(driver.state.spec)
    monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        driver.report(task.task_id, execute(task))
    assert task.task_id in driver.state.open_tasks
    monkeypatch.undo()
    driver.report(task.task_id, execute(task))
    assert canonical_json(SweepState.fold(read_ledger(store).records).spec) == before
    assert not SweepState.fold(read_ledger(store).records).open_tasks


def test_replaying_many_rows_takes_little_more_than_parsing_them(store, monkeypatch):
    driver = start(make_spec(budget={"total_flops": "1e18"}), store)
    task = driver.next_task()
    row = {**execute(task), "trial": "t99999", "shape": dict.fromkeys("abcdefgh", 64), "errors": {"nll": 0.01}}
    proposal = {
        "trial": "t99999",
        "number": 88888,
        "config": task.config,
        "seed": 0,
        "params": 1000,
        "source": "random",
    }
    task_record = {**task.as_dict(), "task_id": "t99999-r0-a0", "trial": "t99999"}
    template = b"\n".join(
        canonical_json(record)
        for record in (
            {"kind": "proposal", "rejected": {}, **proposal},
            {"kind": "task", "task": task_record, "reason": "because"},
            {"kind": "row", "task_id": "t99999-r0-a0", "row": row, "probes": []},
        )
    )
    # The lines are made by replacement: encoding 90,000 records takes longer than what is measured.
    monkeypatch.setattr(
        "bfm.sweep.ledger.ledger.canonical_json",
        lambda value: value if isinstance(value, bytes) else canonical_json(value),
    )
    monkeypatch.setattr("bfm.sweep.ledger.ledger.Repeats.shorten", lambda self, records: (records, Repeats()))
    for batch in range(60):
        numbers = range(1 + batch * 500, 501 + batch * 500)
        lines = [template.replace(b"t99999", b"t%05d" % n).replace(b"88888", b"%d" % n) for n in numbers]
        driver._ledger.append(_Lines(b"\n".join(lines), 1500))
    begin_s = time.process_time()
    state = read_state(store)
    elapsed_s = time.process_time() - begin_s
    begin_s = time.process_time()
    for name in segment_names(store):
        own = store.get(name).partition(b"\n")
        for line in own[2][: json.loads(own[0])["bytes"]].splitlines():
            json.loads(line)
    parse_s = time.process_time() - begin_s
    store.delete_folder("ledger")
    assert len(state.rungs[0]) == 30_000
    assert elapsed_s < 3 * parse_s, (elapsed_s, parse_s)


class _Lines(list):
    """Records that are encoded already."""

    def __init__(self, text: bytes, count: int) -> None:
        super().__init__([text])
        self._count = count

    def __len__(self) -> int:
        return self._count
