"""Ledger and lease: what is written is found again whole, damage is named, and only one writer is believed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bfm.errors import CorruptError, UserError
from bfm.files import Store, canonical_json
from bfm.sweep.lease import STALE_S, Holder, Lease, latest_epoch
from bfm.sweep.ledger import Ledger, read_ledger, read_state
from bfm.sweep.state import SweepState
from tests.sweep.world import execute, make_spec, mortal_ledger, start


def records(*numbers):
    return [{"kind": "opened", "epoch": number} for number in numbers]


def epochs(store):
    return [record["epoch"] for record in read_ledger(store).records]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "sweep")


@pytest.fixture
def three(store):
    ledger = mortal_ledger(store, 0)
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
    ledger = mortal_ledger(store, 0)
    for batch in batches:
        ledger.append(batch)
    assert read_ledger(store).records == [record for batch in batches for record in batch]


def test_numbers_that_json_has_not_are_refused_before_anything_is_written(store):
    ledger = mortal_ledger(store, 0)
    with pytest.raises(ValueError, match="JSON"):
        ledger.append([{"value": float("nan")}])
    assert read_ledger(store).segments == 0


@pytest.mark.parametrize("keep", ["0", "1", "half", "-1"])
def test_a_truncated_segment_is_named(three, keep):
    name = three.names("ledger")[1]
    path = three.path(name)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 if keep == "half" else int(keep)])
    with pytest.raises(CorruptError, match="000001-00000001"):
        read_ledger(three)


@pytest.mark.parametrize("place", [0, 20, 90, 160, -3])
def test_a_flipped_byte_is_found(three, place):
    path = three.path(three.names("ledger")[2])
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="000001-00000002"):
        read_ledger(three)


def test_a_segment_rewritten_with_a_right_checksum_breaks_the_chain(three):
    from bfm.sweep import ledger as module

    name = three.names("ledger")[1]
    first = three.get(three.names("ledger")[0])
    link = module._Link(three.names("ledger")[0], module.sha256_bytes(first))
    three.path(name).write_bytes(module._encode(name, records(99), link))
    with pytest.raises(CorruptError, match=r"000001-00000001.*altered"):
        read_ledger(three)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_segment_is_named(three, missing):
    name = three.names("ledger")[missing]
    three.path(name).unlink()
    with pytest.raises(CorruptError, match=name.removeprefix("ledger/")):
        read_ledger(three)


def test_a_copied_segment_is_refused(three):
    first, *_ = three.names("ledger")
    three.path("ledger/000001-00000009.jsonl").write_bytes(three.get(first))
    with pytest.raises(CorruptError, match="is a copy of"):
        read_ledger(three)


def test_leftovers_of_a_crash_while_writing_are_not_segments(three):
    three.path("ledger/.000001-00000003.jsonl.abc").write_bytes(b"half")
    assert epochs(three) == [1, 2, 3]


def test_a_fenced_writer_cannot_append(three):
    old = Ledger(three, Lease(three, 1, time.time, None))
    mortal_ledger(three, 7200)
    with pytest.raises(UserError, match="taken over"):
        old.append(records(9))


def test_what_a_fenced_writer_appended_after_takeover_is_ignored(store):
    """The zombie has passed the check of its lease when its successor reads the ledger, and writes then."""
    zombie = mortal_ledger(store, 0)
    zombie.append(records(1))
    heir = mortal_ledger(store, 7200)
    zombie.lease.__class__ = type("Deaf", (Lease,), {"is_held": property(lambda self: True)})
    zombie.append(records(66))
    zombie.append(records(67))
    heir.append(records(2))
    zombie.append(records(68))
    assert epochs(store) == [1, 2]
    assert len(read_ledger(store).fenced) == 3
    third = mortal_ledger(store, 14400)
    third.append(records(3))
    assert epochs(store) == [1, 2, 3]


def test_takeovers_that_wrote_nothing_leave_no_hole(store):
    first = mortal_ledger(store, 0)
    first.append(records(1))
    for hour in (1, 2, 3):
        last = mortal_ledger(store, 7200.0 * hour)
    last.append(records(4))
    assert epochs(store) == [1, 4]
    assert latest_epoch(store) == 4


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


def test_a_second_sweep_on_the_folder_is_refused(store):
    lease = Lease.acquire(store, heartbeat_s=None)
    with pytest.raises(UserError, match=f"another sweep is running here .process {os.getpid()}"):
        Lease.acquire(store, heartbeat_s=None)
    lease.release()
    assert not lease.is_held
    assert Lease.acquire(store, heartbeat_s=None).epoch == 2


def test_a_dead_process_of_this_machine_does_not_block(store):
    code = (
        "import sys, os; from bfm.files import Store; from bfm.sweep.lease import Lease;"
        "Lease.acquire(Store(sys.argv[1])); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(store.prefix)], check=False)
    assert latest_epoch(store) == 1
    assert Lease.acquire(store, heartbeat_s=None).epoch == 2


def test_a_process_id_that_is_used_again_is_not_the_holder(store):
    me = Holder.this_process()
    Lease.acquire(store, holder=replace(me, started_at_s=me.started_at_s - 1000), heartbeat_s=None)
    assert Lease.acquire(store, heartbeat_s=None).epoch == 2


def test_a_holder_elsewhere_is_judged_by_its_heartbeat(store):
    there = replace(Holder.this_process(), machine="another")
    lease = Lease.acquire(store, holder=there, clock=lambda: 1000.0, heartbeat_s=None)
    with pytest.raises(UserError, match="running here"):
        Lease.acquire(store, clock=lambda: 1000.0 + STALE_S - 1, heartbeat_s=None)
    lease._clock = lambda: 1100.0
    lease.renew()
    with pytest.raises(UserError, match="running here"):
        Lease.acquire(store, clock=lambda: 1000.0 + STALE_S + 1, heartbeat_s=None)
    assert Lease.acquire(store, clock=lambda: 1100.0 + STALE_S, heartbeat_s=None).epoch == 2


def test_the_heartbeat_thread_beats_and_ends(store):
    lease = Lease.acquire(store, heartbeat_s=0.01)
    deadline_s = time.monotonic() + 5
    while not store.exists("lease/000001-alive.json") and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert json.loads(store.get("lease/000001-alive.json"))["at_s"] > 0
    lease.release()


def test_a_damaged_lease_is_named(store):
    Lease.acquire(store, heartbeat_s=None)
    store.put("lease/000001.json", b"{")
    with pytest.raises(CorruptError, match=r"000001\.json"):
        Lease.acquire(store, heartbeat_s=None)


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
        "bfm.sweep.ledger.canonical_json", lambda value: value if isinstance(value, bytes) else canonical_json(value)
    )
    for batch in range(60):
        numbers = range(1 + batch * 500, 501 + batch * 500)
        lines = [template.replace(b"t99999", b"t%05d" % n).replace(b"88888", b"%d" % n) for n in numbers]
        driver._ledger.append(_Lines(b"\n".join(lines), 1500))
    begin_s = time.process_time()
    state = read_state(store)
    elapsed_s = time.process_time() - begin_s
    begin_s = time.process_time()
    for name in store.names("ledger"):
        for line in store.get(name).splitlines():
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
