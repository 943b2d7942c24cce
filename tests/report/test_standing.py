"""Where a sweep stands now: who drives it, what runs and how far it is, what waits; watched until it has ended."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bfm.files import Store
from bfm.report.standing import fitting, status_text, watch
from bfm.report.sweep_view import read_sweep
from bfm.sweep.driver.driver import SweepDriver
from bfm.sweep.driver.live import Waits, live_figures, tell_waits
from bfm.sweep.driver.requests import Request, put_request
from bfm.sweep.ledger.lease import Lease
from bfm.sweep.ledger.ledger import Ledger
from bfm.sweep.ledger.state import CANCEL, ENQUEUE
from bfm.sweep.space.space import FeasibleSet
from bfm.training.journal import Journal
from bfm.training.records import StepRecord
from bfm.training.task import Account
from tests.sweep.serial import run_serial
from tests.sweep.world import PlantedCosts, execute, make_spec

RECORD = StepRecord(
    loss=4.5,
    loss_headline=4.0,
    loss_basket=5.0,
    gates={},
    step=120,
    stage=1,
    phase="trunk",
    path_flops=250_000_000,
    events=9000,
    learning_rate=1e-3,
    grad_norm=1.0,
    events_per_s=1234.0,
    flops_per_s=1e7,
    elapsed_s=25.0,
)


@pytest.fixture
def driver(tmp_path):
    store = Store(tmp_path)
    ledger = Ledger(store, Lease.acquire(store, heartbeat_s=None))
    driver = SweepDriver.start(FeasibleSet(make_spec(scaling={"slots": 3}), PlantedCosts()), ledger)
    yield driver
    driver.close()


def tell(driver, task):
    """The task's account, as its worker writes it."""
    journal = Journal(task, driver._ledger.store)
    journal.show(RECORD)
    journal.close(300_000_000)


def test_what_runs_is_told_as_far_as_its_account_goes(driver, tmp_path):
    first, second = driver.next_task(), driver.next_task()
    tell(driver, first)
    told, untold = json.loads(json.dumps(read_sweep(str(tmp_path)).as_dict()))["running"]
    assert (told["task_id"], told["step"], told["path_flops"]) == (first.task_id, 120, 250_000_000)
    assert told["left_s"] == pytest.approx(75, abs=5)
    assert untold["task_id"] == second.task_id
    assert (untold["step"], untold["loss"], untold["left_s"], untold["path_flops"]) == (None, None, None, 0)
    text = status_text(read_sweep(str(tmp_path)))
    assert "runs, driven by process " in text
    (line,) = (line for line in text.splitlines() if line.startswith(first.task_id))
    assert all(word in line for word in ("trunk", "120", "2.5e8", "25%", "4.5000", "1.23k", "1m1", "x1"))
    assert "2e9 reserved" in text
    assert "searches learning_rate 0.0001 to 0.1 (log), params 300 to 10000 (log)" in text


def test_what_waits_is_told_with_the_reason(driver, tmp_path):
    first, second = driver.next_task(), driver.next_task()
    driver.lost(first.task_id, "its node is gone")
    driver.yielded(second.task_id, Account())
    driver.take(Request("0001-a", ENQUEUE, "ann@desk", {"config": {"params": 1234}, "seed": 0}))
    open_request = put_request(Store(tmp_path), CANCEL, {"trial": "t00000"})
    waiting = {one["what"]: one["why"] for one in live_figures(Store(tmp_path), driver.state)["waiting"]}
    assert waiting["t00000 rung 0"] == "was lost (its node is gone), goes on"
    assert waiting["t00001 rung 0"] == "was asked to make room or to end, goes on"
    assert waiting["N 1,234 seed 0 (0001-a)"] == "asked for by ann@desk, comes next"
    assert "not answered yet" in waiting[f"cancel ({open_request.id})"]
    text = status_text(read_sweep(str(tmp_path)))
    assert "waiting\n  t00000 rung 0: was lost" in text
    assert "last requests\n  enqueue N 1,234, asked for by ann@desk" in text


def test_what_a_driver_has_no_room_for_is_told_until_another_one_drives(driver, tmp_path):
    store = Store(tmp_path)
    tell_waits(store, driver.epoch, [Waits("the next task, of rung 1", "for 4 CPUs", 1000.0)])
    status = live_figures(store, driver.state, clock=lambda: 1090.0)
    assert status["waiting"] == [
        {"what": "the next task, of rung 1", "why": "for 4 CPUs; waits for 1m30s", "waited_s": 90.0}
    ]
    assert "the next task, of rung 1: for 4 CPUs; waits for" in status_text(read_sweep(str(tmp_path)))
    tell_waits(store, driver.epoch - 1, [Waits("t00001", "for 4 CPUs", 1000.0)])
    assert live_figures(store, driver.state)["waiting"] == []
    tell_waits(store, driver.epoch, [Waits("t00001", "for 4 CPUs", 1000.0)])
    driver.close()
    assert live_figures(store, driver.state)["waiting"] == []


def test_a_finished_sweep_names_its_best_checkpoint(driver, tmp_path):
    run_serial(driver, lambda task: {**execute(task), "model": f"trials/{task.trial}/checkpoints/model"})
    driver.close()
    view = read_sweep(str(tmp_path))
    status = view.as_dict()
    assert status["driver"] is None
    assert status["best_checkpoint"] == f"{tmp_path}/trials/{status['winner']['trial']}/checkpoints/model"
    assert status["settings"]["params"]["min"] == 300
    text = status_text(view)
    assert text.startswith(f"finished: {view.state.finished}")
    assert f"best checkpoint {status['best_checkpoint']}" in text


def test_a_sweep_is_watched_until_it_has_ended(driver, tmp_path, capsys):
    naps = []

    def work(seconds):
        """While the watcher sleeps."""
        naps.append(seconds)
        if len(naps) == 3:
            run_serial(driver, execute)
            driver.close()

    watch(lambda: read_sweep(str(tmp_path)), every_s=2.0, as_json=True, sleep=work)
    looks = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [look["finished"] is None for look in looks] == [True, True, True, False]
    assert naps == [2.0] * 3
    watch(lambda: read_sweep(str(tmp_path)), every_s=2.0, as_json=False, sleep=pytest.fail)
    assert capsys.readouterr().out.startswith("finished: ")
    screen = Console(file=io.StringIO(), force_terminal=True, width=200, height=60)
    watch(lambda: read_sweep(str(tmp_path)), every_s=2.0, as_json=False, console=screen, sleep=pytest.fail)
    assert "finished: " in screen.file.getvalue()


@given(st.lists(st.lists(st.integers(0, 150), max_size=30), min_size=6, max_size=6), st.integers(12, 60))
def test_a_screen_holds_the_beginning_of_what_matters(lengths, height):
    """Nothing is cropped in silence: parts fit, each begins with its first lines and says how many are missing."""
    parts = ["\n".join(f"{place}{'x' * length}" for length in part) for place, part in enumerate(lengths)]
    shown = fitting(parts, 80, height)
    assert sum(max(1, -(-len(line) // 80)) for line in shown.splitlines()) < height
    for part in shown.split("\n\n") if shown else []:
        *kept, last = part.splitlines()
        whole = parts[int((kept or [last])[0][0])].splitlines() if kept or last[0].isdigit() else None
        if last.startswith("... "):
            assert whole is None or (kept == whole[: len(kept)] and int(last.split()[1]) == len(whole) - len(kept))
        else:
            assert [*kept, last] == whole
    assert not parts[0] or shown[0] in ("0", ".")
