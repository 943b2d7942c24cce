"""The sweep's entry point: refusals before Ray starts, whole sweeps on a small Ray, kills and resumes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bfm.doors import loggers
from bfm.errors import CorruptError, PausedError, UserError
from bfm.files import Store
from bfm.ranking.paired import Pairing
from bfm.report.standing import status_text
from bfm.report.sweep_view import read_sweep
from bfm.sweep.driver.requests import put_request
from bfm.sweep.ledger.lease import Lease
from bfm.sweep.ledger.ledger import has_begun, read_ledger
from bfm.sweep.ledger.state import STOP, SweepState
from bfm.sweep.plan import machine
from bfm.sweep.plan.machine import Machine
from bfm.sweep.policies.arena import ASKED
from bfm.sweep.space.spec import resolve
from bfm.sweep.space.tiers import Tier
from ray_jobs import sweep
from ray_jobs.cluster_session import cluster_address, local_ray
from ray_jobs.room import check_fits, total_of
from ray_jobs.signals import Interrupted
from ray_jobs.sweep import main, run_sweep
from tests.ray_jobs.toys import PAIR, SINGLE, child_environment, end_tree, planted_executor, wait_for, write_space
from tests.sweep.world import make_spec


def folded(path: Path) -> SweepState:
    return SweepState.fold(read_ledger(Store(path)).records)


def rows(path: Path) -> list[dict]:
    return [row for rung in folded(path).rungs.values() for row in rung.values()]


@pytest.fixture
def no_ray(monkeypatch):
    """Ray may not be started."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda *a, **k: pytest.fail("Ray was started"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budgets": {}}, "budget"),
        ({"parameters": {"params": {"min": 5, "max": 1}}}, "params"),
        ({"budget": {"total_flops": "much"}}, "budget.total_flops"),
        ({"budget": {"ladder_flops": [1e3, 2e3]}}, "100 steps"),
        ({"data": {"shards": "nowhere"}}, "nowhere"),
        ({"scaling": {"tiers": [{"cpus": 4000}]}}, "scaling.tiers.0"),
        ({"loggers": ["tensorboard", "wandb"]}, "loggers: wandb is not installed"),
        ({"loggers": ["neptune"]}, "loggers.0"),
        ({"stage1": {"checkpoint": "nowhere/trunk"}}, "nowhere/trunk: there is no checkpoint"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2_before_ray(
    tmp_path, toy_shards, no_ray, monkeypatch, capsys, changes, words
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    space = write_space(tmp_path, toy_shards.path, **changes) if "budgets" not in changes else tmp_path / "s.yaml"
    if "budgets" in changes:
        space.write_text(write_space(tmp_path, toy_shards.path).read_text() + "budgets: {}\n")
    assert main([str(space), "--storage", str(tmp_path / "runs")]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("bfm: ")
    assert words in message


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001", "127.0.0.1", "head:abc"])
def test_what_is_no_head_s_address_is_one_line(tmp_path, toy_shards, no_ray, monkeypatch, capsys, address) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert main([str(write_space(tmp_path, toy_shards.path)), "--storage", str(tmp_path)]) == 2
    assert f"{address} is not the address of a cluster's head; write HOST:PORT" in capsys.readouterr().err


def test_a_port_that_is_none_is_one_line(tmp_path, toy_shards, no_ray, monkeypatch, capsys) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert cluster_address() == "", "this machine's own"
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:99999")
    assert main([str(write_space(tmp_path, toy_shards.path)), "--storage", str(tmp_path)]) == 2
    assert "bfm: RAY_ADDRESS: no cluster answers at 127.0.0.1:99999" in capsys.readouterr().err


def test_an_address_where_nobody_answers_is_one_line(tmp_path, toy_shards, no_ray, monkeypatch, capsys) -> None:
    with socket.socket() as taken:
        # Bound, and nobody listens.
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{taken.getsockname()[1]}")
        assert main([str(write_space(tmp_path, toy_shards.path)), "--storage", str(tmp_path)]) == 2
    assert "bfm: RAY_ADDRESS: no cluster answers at 127.0.0.1:" in capsys.readouterr().err


def test_a_ray_that_does_not_start_is_one_line(monkeypatch, tmp_path) -> None:
    def crowded(**options):
        raise Exception("The current node timed out during startup.\nThis could happen because")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", crowded)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(PausedError, match=r"Ray did not start on this machine .*timed out during startup"), local_ray():
        pytest.fail("it did")
    assert list(tmp_path.iterdir()) == []


def test_runs_of_no_use_begin_no_sweep(tmp_path, toy_shards, no_ray, capsys) -> None:
    space, runs, out = write_space(tmp_path, toy_shards.path), tmp_path / "runs.csv", tmp_path / "out"
    runs.write_text("params,flops,nll\n3000,1e8,3.0\n")
    assert main([str(space), "--storage", str(out), "--import", str(runs)]) == 2
    assert "no column 'learning_rate'" in capsys.readouterr().err
    assert not out.exists()


def test_resume_must_and_never_mean_it(tmp_path, toy_shards, no_ray) -> None:
    spec = resolve(write_space(tmp_path, toy_shards.path))
    with pytest.raises(UserError, match="no sweep to resume"):
        run_sweep(spec, str(tmp_path), resume="must")
    Store(tmp_path / "tiny").put("ledger/00000/00000001.jsonl", b"something")
    with pytest.raises(UserError, match="a sweep already"):
        run_sweep(spec, str(tmp_path), resume="never")
    with pytest.raises(CorruptError, match="00000001"):
        run_sweep(spec, str(tmp_path), resume="must")
    with pytest.raises(UserError, match="leave out one"):
        run_sweep(spec, str(tmp_path), resume="never", extend=True)
    with pytest.raises(UserError, match="no sweep to extend"):
        run_sweep(spec, str(tmp_path / "elsewhere"), extend=True)
    with pytest.raises(UserError, match="auto, never, must"):
        run_sweep(spec, str(tmp_path), resume="perhaps")


@pytest.mark.parametrize("uri", ["az://box/sweeps", "s3a://box/sweeps"])
def test_groups_of_workers_need_a_storage_that_ray_train_knows(uri) -> None:
    place = SimpleNamespace(uri=uri, is_local=False)
    pair = make_spec(scaling={"tiers": [SINGLE, PAIR]}, parameters={"groups_per_step": {"value": 2}})
    with pytest.raises(UserError, match="several workers need a storage that Ray Train writes to"):
        sweep._check_groups(pair, place)
    sweep._check_groups(pair, SimpleNamespace(uri="s3://box/sweeps", is_local=False))


def test_scores_that_cannot_be_read_end_no_sweep(tmp_path) -> None:
    store = Store(tmp_path)
    store.put("a-0.npz", b"altered")
    task = {"from_rung": None, "rung": 0, "rung_flops": 1e8, "seed": 0, "config": {"params": 2e3}}
    planted = planted_executor()({**task, "trial": ""}, 0.0) | {"engine": "plain", "workers": 1, "train_s": 1.0}
    other, row = ({**planted, "trial": trial, "scores": "a-0.npz"} for trial in ("t0", "t1"))
    words = sweep._row_line(row, "nll", other, Pairing(store))
    assert "nll 3 " in words
    assert "a-0.npz: truncated or altered" in words


def test_scores_that_cannot_be_read_leave_a_finished_sweep_finished(tmp_path, caplog) -> None:
    store = Store(tmp_path)
    store.put("a-0.npz", b"altered")
    task = {"from_rung": None, "seed": 0, "config": {"params": 2e3}}
    rows = [
        planted_executor()({**task, "trial": "t0", "rung": rung, "rung_flops": flops}, 0.0)
        | {"kind": "rung", "trial": "t0", "rung": rung, "rung_flops": flops, "scores": "a-0.npz"}
        for rung, flops in enumerate((1e8, 4e8))
    ]
    driver = SimpleNamespace(spec=SimpleNamespace(listeners=("tensorboard",)), state=SimpleNamespace())
    driver.state.all_rows = lambda: rows
    with sweep._curves(store, driver, {}):
        pass
    assert "a-0.npz: truncated or altered" in caplog.text
    assert len(list((tmp_path / "tensorboard" / "_sweep").iterdir())) == 1


def test_a_stop_that_comes_while_a_driver_starts_stops_it(tmp_path, toy_shards, no_ray) -> None:
    spec = resolve(write_space(tmp_path, toy_shards.path))
    request = put_request(Store(tmp_path / "tiny"), STOP, {"epoch": 1})
    with pytest.raises(Interrupted, match="bfm stop"):
        run_sweep(spec, str(tmp_path))
    state = SweepState.fold(read_ledger(Store(tmp_path / "tiny")).records)
    assert state.requests[request.id]["refused"] is None
    assert not state.trials


def test_a_second_sweep_on_the_same_folder_is_refused(tmp_path, toy_shards, no_ray) -> None:
    spec = resolve(write_space(tmp_path, toy_shards.path))
    lease = Lease.acquire(Store(tmp_path / "tiny"), heartbeat_s=None)
    with pytest.raises(UserError, match="another sweep is running here"):
        run_sweep(spec, str(tmp_path))
    lease.release()


@pytest.mark.parametrize(
    ("tiers", "cpus", "gpus"),
    [
        ([SINGLE], 0.5, 0),
        ([SINGLE, PAIR], 1.5, 0),
        ([{"cpus": 2}, {**PAIR, "workers": 4, "cpus": 4}], 17.0, 0),
        ([{"cpus": 1, "gpus": 0.25}, {**PAIR, "gpus": 1}], 1.5, 2),
    ],
)
def test_every_tier_must_fit_by_itself_however_many_slots(tmp_path, toy_shards, tiers, cpus, gpus) -> None:
    spec = resolve(write_space(tmp_path, toy_shards.path, scaling={"slots": 64, "tiers": tiers}))
    check_fits(spec, Machine(cpus, gpus, memory_gib=16.0))
    with pytest.raises(UserError, match=f"asks for {cpus:g} CPUs"):
        check_fits(spec, Machine(cpus - 0.25, gpus, memory_gib=16.0))


def test_a_sweep_on_a_small_ray(tmp_path, toy_shards, monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with local_ray(2, dashboard=True):
        check_a_sweep_that_goes_well(tmp_path, write_space(tmp_path, toy_shards.path))
        check_other_loggers(tmp_path, write_space(tmp_path, toy_shards.path, loggers=["mlflow", "wandb"]), monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sweeps_with_losses_and_damage(tmp_path, toy_shards, monkeypatch) -> None:
    """One Ray for several short sweeps, because it takes longer to start than they take to run."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with local_ray(2, dashboard=True):
        # Successive halving begins a number of trials that is known beforehand.
        space = write_space(tmp_path, toy_shards.path, scheduler={"type": "asha-promote"})
        check_lost_tasks_are_tried_again(tmp_path, space)
        check_a_sweep_of_which_nothing_came(tmp_path, space, monkeypatch)
        check_damage_ends_the_sweep(tmp_path, space)
        check_both_slots_stay_busy(tmp_path, toy_shards.path)
        check_what_diverged_is_never_promoted(tmp_path, toy_shards.path)


def check_what_diverged_is_never_promoted(tmp_path: Path, shards: Path) -> None:
    """Every other trial diverges."""
    answer = planted_executor()

    def execute(task: dict, assigned_at_s: float) -> dict:
        row = answer(task, assigned_at_s)
        if int(task["trial"][1:]) % 2 == 0:
            row |= {"status": "diverged", "metrics": {}, "errors": {}, "checkpoint": None}
        else:
            row["metrics"]["nll"] -= 0.01 * int(task["trial"][1:])
        return row

    for policy in ("frontier", "asha-promote"):
        space = write_space(tmp_path, shards, scheduler={"type": policy}, budget={"total_flops": 4e9, "max_trials": 12})
        outcome = run_sweep(resolve(space, [f"name=nan-{policy}"]), str(tmp_path), execute=execute)
        state = folded(tmp_path / f"nan-{policy}")
        gone = {name for name, trial in state.trials.items() if any(r["status"] != "ok" for r in trial.rows.values())}
        assert outcome.succeeded
        assert len(gone) > 2
        assert all(len(state.trials[name].rows) == 1 for name in gone)
        assert set(state.rungs[1]) - gone, "nobody has reached the top"


def check_both_slots_stay_busy(tmp_path: Path, shards: Path) -> None:
    """The frontier policy on two slots: tasks of half a second, with what lies between them."""

    def fault(task: dict) -> None:
        import os
        import time
        from pathlib import Path

        began_s = time.time()
        time.sleep(0.5)
        Path(spans, task["task_id"]).write_text(f"{os.getpid()} {began_s} {time.time()}")

    spans = str(tmp_path / "spans")
    Path(spans).mkdir()
    space = write_space(tmp_path, shards, budget={"total_flops": 4e9, "max_trials": 16})
    outcome = run_sweep(resolve(space, ["name=busy"]), str(tmp_path), execute=planted_executor(fault))
    told = [tuple(map(float, path.read_text().split())) for path in Path(spans).iterdir()]
    assert outcome.rows == len(told) > 15
    # From when both workers are there to when the last task is given out.
    first: dict[float, float] = {}
    for pid, begin, _ in told:
        first[pid] = min(begin, first.get(pid, begin))
    low, high = max(first.values()), max(begin for _, begin, _ in told)
    busy_s = sum(max(0.0, min(end, high) - max(begin, low)) for _, begin, end in told)
    assert len(first) == 2
    assert busy_s / (2 * (high - low)) > 0.7


def check_a_sweep_that_goes_well(tmp_path: Path, space: Path) -> None:
    events = []
    outcome = run_sweep(
        resolve(space, ["name=well"]),
        str(tmp_path),
        progress=lambda event, driver: events.append(event.kind),
        execute=planted_executor(),
    )
    assert outcome.succeeded
    assert (outcome.trials, outcome.lost, outcome.failed) == (4, 0, 0)
    done = rows(tmp_path / "well")
    assert len(done) == outcome.rows == len({(row["trial"], row["rung"]) for row in done})
    assert len({row["pid"] for row in done}) <= 2
    # Two actors start once each; all other tasks find one that is warm.
    cold_s, *_ = sorted((row["warm_start_s"] for row in done), reverse=True)
    assert sorted(row["warm_start_s"] for row in done)[len(done) // 2] < cold_s / 2
    assert Counter(events) == {"opened": 1, "assigned": len(done), "row": len(done), "finished": 1}
    assert yaml.safe_load((tmp_path / "well" / "sweep.yaml").read_text())["name"] == "well"
    board = EventAccumulator(str(tmp_path / "well" / "tensorboard" / "_sweep")).Reload()
    assert any(tag.startswith("frontier/nll/C=") for tag in board.Tags()["scalars"])
    assert "frontier/nll/floor=personal" in board.Tags()["scalars"]
    text = status_text(read_sweep(str(tmp_path / "well")))
    assert "strongest" in text
    assert "The best of the sweep is " in text
    again = run_sweep(resolve(space, ["name=well"]), str(tmp_path), execute=planted_executor())
    assert (again.rows, again.reason) == (outcome.rows, outcome.reason)
    wait_for(lambda: ray.available_resources().get("CPU") == 2.0, 30, "all CPUs are free again")


def check_other_loggers(tmp_path: Path, space: Path, monkeypatch) -> None:
    """One tool takes every row, the other is away; TensorBoard is told nothing."""
    told: list[tuple[str, int]] = []
    tools = {"mlflow": lambda sweep: lambda row: told.append((row["trial"], row["rung"])), "wandb": lambda sweep: away}

    def away(row: dict) -> None:
        raise ConnectionError

    monkeypatch.setattr(loggers, "TOOLS", tools)
    outcome = run_sweep(resolve(space, ["name=told"]), str(tmp_path), execute=planted_executor())
    assert outcome.succeeded
    assert sorted(told) == sorted((row["trial"], row["rung"]) for row in rows(tmp_path / "told"))
    assert not (tmp_path / "told" / "tensorboard").exists()


def check_lost_tasks_are_tried_again(tmp_path: Path, space: Path) -> None:
    def fault(task: dict) -> None:
        import os

        if task["from_rung"] is None and task["task_id"].endswith("-a0"):
            if task["trial"] == "t00001":
                os._exit(1)
            if task["trial"] == "t00002":
                raise ValueError("once")
            if task["trial"] == "t00003":
                from bfm.errors import InfeasibleError

                raise InfeasibleError("99 steps")

    outcome = run_sweep(resolve(space, ["name=lossy"]), str(tmp_path), execute=planted_executor(fault))
    assert outcome.succeeded
    assert outcome.lost == 3
    reasons = {loss["trial"]: loss["reason"] for loss in folded(tmp_path / "lossy").losses}
    assert "ValueError: once" in reasons["t00002"]
    assert "worker process died" in reasons["t00001"]
    trained = {row["trial"] for row in rows(tmp_path / "lossy")}
    assert trained == {"t00000", "t00001", "t00002"}, "lost tasks are tried again, infeasible ones are not"


def check_a_sweep_of_which_nothing_came(tmp_path: Path, space: Path, monkeypatch) -> None:
    def fault(task: dict) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(sweep, "Workplace", lambda *places, **settings: planted_executor(fault))
    assert main([str(space), "--storage", str(tmp_path), "--name", "nothing", "--set", "scaling.max_retries=0"]) == 1
    assert not rows(tmp_path / "nothing")


def check_damage_ends_the_sweep(tmp_path: Path, space: Path) -> None:
    def fault(task: dict) -> None:
        from bfm.errors import CorruptError

        if task["trial"] == "t00001":
            raise CorruptError("events/item.npy: truncated")

    with pytest.raises(CorruptError, match="events/item"):
        run_sweep(resolve(space, ["name=damaged"]), str(tmp_path), execute=planted_executor(fault))
    assert run_sweep(resolve(space, ["name=damaged"]), str(tmp_path), execute=planted_executor()).succeeded


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_tasks_on_one_and_two_workers_leave_nothing_behind(tmp_path, toy_shards, monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    space = write_space(
        tmp_path, toy_shards.path, scaling={"slots": 2, "tiers": [SINGLE, PAIR]}, budget={"max_trials": 2}
    )
    with local_ray(2, dashboard=True):
        outcome = run_sweep(resolve(space), str(tmp_path))
        assert outcome.succeeded
        assert not outcome.failed
        wait_for(lambda: ray.available_resources().get("CPU") == 2.0, 60, "all CPUs are free again")
        wait_for(no_placement_groups, 60, "no placement group stands")
    done = rows(tmp_path / "tiny")
    assert {(row["rung"], row["engine"], row["workers"]) for row in done} == {(0, "plain", 1), (1, "zero", 2)}
    top = next(row for row in done if row["rung"] == 1)
    assert top["metrics"]["nll"] < 6
    board = EventAccumulator(str(tmp_path / "tiny" / "tensorboard" / top["trial"])).Reload()
    tags = {"train/loss", "opt/lr", "val/nll", "loss_by_C/trunk", "perf/events_per_s"}
    assert tags <= set(board.Tags()["scalars"])
    assert board.Scalars("train_cooldown/loss")[-1].step == top["steps"], (
        "the group's curve ends where its row was taken"
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_rungs_in_a_row_leave_everything_free(tmp_path, toy_shards, monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ladder = [round(1e8 * 1.05**rung) for rung in range(20)]
    space = write_space(
        tmp_path,
        toy_shards.path,
        scheduler={"type": "asha-stop"},
        scaling={"slots": 2, "tiers": [SINGLE, PAIR]},
        budget={"ladder_flops": ladder, "max_trials": 1},
    )
    with local_ray(2, dashboard=True):
        outcome = run_sweep(resolve(space), str(tmp_path))
        assert (outcome.rows, outcome.lost, outcome.failed) == (20, 0, 0)
        wait_for(lambda: ray.available_resources().get("CPU") == 2.0, 60, "all CPUs are free again")
        wait_for(no_placement_groups, 60, "no placement group stands")
    assert Counter(row["workers"] for row in rows(tmp_path / "tiny")) == {1: 15, 2: 5}


def no_placement_groups() -> bool:
    return all(group["state"] == "REMOVED" for group in ray.util.placement_group_table().values())


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A short temporary folder: a killed sweep sweeps nothing away, and Ray's sockets need short paths."""
    folder = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def launch(space: Path, storage: Path, scratch: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "ray_jobs.sweep", str(space), "--storage", str(storage), *more],
        env=child_environment(TMPDIR=str(scratch)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, limit_s: float = 300) -> str:
    """Output of a process; it and its children are gone afterwards."""
    try:
        return process.communicate(timeout=limit_s)[0]
    finally:
        end_tree(process.pid)


AMPLE = {"total_flops": 4e9}
"""What a kill costs counts against the cap, which must not be what ends a sweep here."""


def in_order(path: Path) -> list[tuple[str, int, dict, float]]:
    """What came of a sweep, as its ledger tells it."""
    found = [record["row"] for record in read_ledger(Store(path)).records if record["kind"] == "row"]
    return [(row["trial"], row["rung"], row["config"], row["metrics"]["nll"]) for row in found]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, toy_shards) -> list[tuple[str, int, dict, float]]:
    """A sweep of one slot that nobody stops."""
    folder = tmp_path_factory.mktemp("unbroken")
    scratch = Path(tempfile.mkdtemp(prefix="u", dir="/tmp"))
    process = launch(write_space(folder, toy_shards.path, scaling={"slots": 1}, budget=AMPLE), folder, scratch)
    said = finish(process)
    shutil.rmtree(scratch, ignore_errors=True)
    assert process.returncode == 0, said
    return in_order(folder / "tiny")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("number", "code", "slots"), [(signal.SIGTERM, 143, 1), (signal.SIGKILL, -9, 1), (signal.SIGKILL, -9, 2)]
)
def test_a_stopped_sweep_goes_on_as_if_nothing_had_been(
    tmp_path, scratch, toy_shards, unbroken, number, code, slots
) -> None:
    space = write_space(tmp_path, toy_shards.path, scaling={"slots": slots}, budget=AMPLE)
    first = launch(space, tmp_path, scratch)
    try:
        wait_for(lambda: has_rows(tmp_path / "tiny", 2), 300, "two rows")
        os.kill(first.pid, number)
    finally:
        said = finish(first)
    assert first.returncode == code
    if number == signal.SIGTERM:
        assert "stopped by SIGTERM; the same command goes on" in said
    assert "Traceback" not in said
    begun = len(rows(tmp_path / "tiny"))
    second = launch(space, tmp_path, scratch, "--resume", "must")
    said = finish(second)
    assert second.returncode == 0, said
    done = in_order(tmp_path / "tiny")
    assert len(done) > begun
    assert any(rung == 1 for _, rung, _, _ in done), "the top was reached"
    if slots == 1:
        assert done == unbroken
    state = folded(tmp_path / "tiny")
    assert len(done) == len(rows(tmp_path / "tiny")), "a row is there twice"
    assert state.spent_flops <= resolve(space).budget.total_flops
    assert not state.open_tasks


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_running_sweep_is_steered_from_its_storage(tmp_path, scratch, toy_shards, bfm) -> None:
    space = write_space(tmp_path, toy_shards.path, scaling={"slots": 1}, budget=AMPLE)
    place, own = tmp_path / "tiny", tmp_path / "own.yaml"
    own.write_text("params: 3210\nlearning_rate: 4e-3\n")
    first = launch(space, tmp_path, scratch)
    try:
        wait_for(lambda: has_rows(place, 1), 300, "a row")
        code, out, err = bfm("enqueue", place, own, "--seed", "7")
        assert code == 0, err
        assert "enqueue N " in out
        code, out, err = bfm("cancel", place, "t00000")
        assert code == 0, err
        assert "cancel t00000, asked for by" in out
        code, out, err = bfm("stop", place)
        assert code == 0, err
    finally:
        said = finish(first)
    assert first.returncode == 143
    assert "stopped by `bfm stop` of " in said
    assert "Traceback" not in said
    second = launch(space, tmp_path, scratch, "--resume", "must")
    said = finish(second)
    assert second.returncode == 0, said
    state = folded(place)
    (trial,) = (trial for trial in state.trials.values() if trial.source == ASKED)
    assert (trial.config["learning_rate"], trial.seed, bool(trial.rows)) == (4e-3, 7, True)
    assert len(state.requests) == 3
    assert all(record["refused"] is None for record in state.requests.values())
    assert not any(("t00000", rung) in state.attempts for rung in (0, 1))


def has_rows(path: Path, number: int) -> bool:
    return has_begun(Store(path)) and len(rows(path)) >= number


def test_a_plan_counts_what_a_task_holds_on_ray() -> None:
    for settings in ({"cpus": 0.5}, {"cpus": 0.5, "workers": 3}, {"cpus": 4, "workers": 2, "gpus": 1}):
        tier = Tier(engine="deepspeed", **settings)
        needs = total_of(tier.scaling(6))
        assert Machine(needs["CPU"], 2, memory_gib=16.0).holds(tier) == 1
        assert Machine(needs["CPU"] - 0.01, 2, memory_gib=16.0).holds(tier) == 0
    # A share of a GPU is of one.
    assert Machine(64, 2, memory_gib=16.0).holds(Tier(gpus=0.6)) == 2
    assert Machine(64, 2, memory_gib=16.0).holds(Tier(gpus=0.25)) == 8


def test_a_machine_is_what_a_container_may_use_of_it(monkeypatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    for told, cores in (("", 6), ("max 100000\n", 6), ("250000 100000\n", 2), ("50000 100000\n", 1)):
        monkeypatch.setattr(machine, "read_kernel", lambda file, told=told: told)
        assert Machine.here().cores == cores
