"""What a task may have trained is known before it trains it; a task that is asked to stop loses nothing."""

import dataclasses
import itertools
import re
import shutil
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from bfm.files import Store
from bfm.training import journal
from bfm.training.checkpoint import load_checkpoint
from bfm.training.journal import FencedError, Journal, YieldError, read_account, read_live, settle, stop_task
from bfm.training.rung import run_rung
from bfm.training.task import Account, RungTask
from tests.training.common import CPU, STAGE_1, STAGE_2

FLOPS = 2.5e8


def task(attempt=0, config=STAGE_1, **changes):
    return RungTask(f"t-r0-a{attempt}", "t", 0, FLOPS, config, seed=3, micro_groups=4, attempt=attempt, **changes)


@pytest.fixture
def hasty(monkeypatch):
    """Accounts reach a few steps ahead, and `stop` is read all the time."""
    monkeypatch.setattr(journal, "NOTE_S", 0.02)
    monkeypatch.setattr(journal, "STOP_S", 0.01)


@pytest.mark.parametrize("config", [STAGE_1, STAGE_2], ids=["stage1", "stage2"])
def test_no_step_is_trained_before_an_account_covers_it(toy_shards, tmp_path, hasty, config):
    store, accounts = Store(tmp_path), []

    def look(record):
        accounts.append((record.path_flops, read_account(task(), store).spent_flops))

    row = run_rung(task(config=config), toy_shards, CPU, store, look)
    assert all(trained <= allowed for trained, allowed in accounts)
    assert len({allowed for _, allowed in accounts}) > 3, "the account is renewed on the way"
    assert read_account(task(), store).spent_flops == row["task_flops"], "at the end it is exact"


def test_an_account_says_where_its_task_is(toy_shards, tmp_path, hasty):
    store, told, shown = Store(tmp_path), [], []

    def look(record):
        told.append(record)
        shown.append(read_live(task(), store))

    run_rung(task(), toy_shards, CPU, store, look)
    assert shown[0] is None
    last = read_live(task(), store)
    assert (last["step"], last["phase"], last["path_flops"]) == (told[-1].step, "cooldown", told[-1].path_flops)
    assert last["loss"] == told[-1].loss
    assert last["host"] == socket.gethostname()
    assert read_live(task(attempt=1), store) is None


def test_a_task_that_was_given_up_trains_nothing_beyond_its_account(toy_shards, tmp_path, hasty):
    store, seen, given_up = Store(tmp_path), [], []

    def give_up(record):
        seen.append(record.path_flops)
        if record.step == 30:
            given_up.append(settle(task(), store))

    with pytest.raises(FencedError):
        run_rung(task(), toy_shards, CPU, store, give_up)
    assert seen[-1] <= given_up[0].spent_flops < FLOPS


@pytest.mark.parametrize("phase", ["trunk", "cooldown"])
def test_a_task_that_yields_goes_on_elsewhere_and_equals_the_unbroken_one(toy_shards, tmp_path, phase):
    curve, parts, after = [], [], []
    probes = (1e7, 1.5e8)
    whole = run_rung(task(probes=probes), toy_shards, CPU, Store(tmp_path / "whole"), curve.append)
    store = Store(tmp_path / "cut")
    stop = lambda: sum(record.phase == phase for record in parts) == 9  # noqa: E731
    with pytest.raises(YieldError) as end:
        run_rung(task(probes=probes), toy_shards, CPU, store, parts.append, should_yield=stop)
    assert parts[-1].phase == phase
    account = end.value.account
    assert (account.spent_flops, account.progress_flops) == (parts[-1].path_flops, parts[-1].path_flops)
    assert settle(task(), store) == account, "whoever finds it dead reads the same"
    left = tuple(flops for flops in probes if flops > account.progress_flops)
    row = run_rung(task(1, progress=account.progress, probes=left), toy_shards, CPU, store, after.append)
    assert [record.loss for record in parts + after] == [record.loss for record in curve]
    assert account.spent_flops + row["task_flops"] == whole["task_flops"]
    assert row["metrics"] == whole["metrics"]
    trunk, whole_trunk = (
        load_checkpoint(store, row["checkpoint"]),
        load_checkpoint(Store(tmp_path / "whole"), whole["checkpoint"]),
    )
    assert trunk.meta["counters"] == whole_trunk.meta["counters"], "the next rung goes on from the same trunk"
    assert trunk.meta["state_sha256"] == row["checkpoint_sha256"]
    assert [probe["metrics"] for probe in row["probes"]] == [probe["metrics"] for probe in whole["probes"]]


def test_a_task_yields_when_its_store_says_so(toy_shards, tmp_path, hasty):
    store = Store(tmp_path)

    def ask(record):
        if record.step == 10:
            stop_task(task(), store, at_once=False)
        time.sleep(0.005)

    with pytest.raises(YieldError) as end:
        run_rung(task(), toy_shards, CPU, store, ask)
    assert 0 < end.value.account.progress_flops < FLOPS


def test_progress_that_is_damaged_is_given_back_untrained(toy_shards, tmp_path):
    store, seen = Store(tmp_path), []
    with pytest.raises(YieldError) as end:
        run_rung(task(), toy_shards, CPU, store, seen.append, should_yield=lambda: len(seen) == 5)
    (state,) = (tmp_path / end.value.account.progress).glob("state-*.pt")
    state.write_bytes(state.read_bytes()[:-9])
    again = []
    with pytest.raises(YieldError) as given_back:
        run_rung(task(1, progress=end.value.account.progress), toy_shards, CPU, store, again.append)
    assert given_back.value.account == Account()
    assert not again


def test_a_checkpoint_that_the_driver_goes_on_from_stays(tmp_path, hasty):
    """The task is given up between the account that names its first checkpoint and the look at `stop`."""
    accounts = []

    class GivenUp(Store):
        def put(self, name, data):
            super().put(name, data)
            if name.endswith("account.json") and not accounts:
                accounts.append(settle(task(), Store(tmp_path)))

    found = Journal(task(), GivenUp(tmp_path))
    Store(tmp_path).put(f"{found.checkpoint}/meta.json", b"{}")
    with pytest.raises(FencedError):
        found.saved(50)
    assert accounts == [Account(0, found.checkpoint, 50)]
    assert Store(tmp_path).names(found.checkpoint)


class Slow(Store):
    """Accounts stand only when they are let through."""

    def __init__(self, path):
        super().__init__(path)
        self.open = threading.Event()
        self.full = False

    def put(self, name, data):
        self.open.wait()
        if self.full:
            raise OSError(28, "No space left on device")
        super().put(name, data)


def test_training_waits_for_a_storage_that_is_away(tmp_path):
    store = Slow(tmp_path)
    found = Journal(task(), store)
    begin_s = time.monotonic()
    threading.Timer(0.2, store.open.set).start()
    found.allow(100, 0.0)
    assert time.monotonic() - begin_s > 0.15
    assert read_account(task(), store).spent_flops == 100
    found.close(60)
    assert read_account(task(), store).spent_flops == 60


def test_a_full_disk_is_told_before_a_step_is_trained(toy_shards, tmp_path):
    store, seen = Slow(tmp_path), []
    store.open.set()
    store.full = True
    with pytest.raises(OSError, match="No space left"):
        run_rung(task(), toy_shards, CPU, store, seen.append)
    assert not seen


def test_accounts_of_another_task_are_not_taken_for_this_one(tmp_path):
    store = Store(tmp_path)
    Journal(task(), store).close(70)
    assert read_account(task(), store) == Account(70)
    assert read_account(dataclasses.replace(task(), task_id="another"), store) == Account()


def test_a_disk_without_room_for_checkpoints_is_told_before_training(toy_shards, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"1,000 bytes are free, the task's checkpoints need"):
        run_rung(task(), toy_shards, CPU, Store(tmp_path), seen.append)
    assert not seen


def test_room_is_asked_for_the_most_that_stands_at_a_time(toy_shards, tmp_path, monkeypatch):
    """Trunk, the last checkpoint inside the rung and the next one, of three numbers a weight or four; and the best."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    needed = {}
    for averaging, validations in itertools.product((False, True), (0, 2)):
        own = task(config=dataclasses.replace(STAGE_1, averaging=averaging), validations=validations)
        with pytest.raises(OSError, match="bytes are free") as told:
            run_rung(own, toy_shards, CPU, Store(tmp_path))
        needed[averaging, validations] = int(re.search(r"need ([\d,]+)", str(told.value))[1].replace(",", ""))
    weights = needed[False, 0] / 36
    assert needed == {(a, v): (36 + 12 * a + 4 * (v > 0)) * weights for a, v in needed}


def test_a_task_that_was_given_up_writes_nothing_more(tmp_path, hasty, monkeypatch):
    store, written = Store(tmp_path), []
    found = Journal(task(), store)
    found.allow(100)
    settle(task(), store)
    put = Store.put
    monkeypatch.setattr(Store, "put", lambda self, name, data: written.append(name) or put(self, name, data))
    with pytest.raises(FencedError):
        found.allow(200)
    time.sleep(0.2)
    assert len(written) <= 1
