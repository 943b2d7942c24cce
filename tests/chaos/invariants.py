"""What must hold of a sweep whatever was done to it, read from nothing but its ledger, its store and the machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import psutil

from bfm.files import Store
from bfm.sweep.ledger.ledger import read_ledger
from bfm.sweep.ledger.state import NODE, Record, SweepState
from bfm.sweep.space.spec import from_dict
from bfm.training.checkpoint import load_checkpoint
from tests.ray_jobs.one_machine import Cluster
from tests.ray_jobs.toys import wait_for

ENDS = ("row", "lost", "yielded")
Place = tuple[str, int]


def check_sweep(store: Store) -> SweepState:
    """Assert every invariant of a sweep that has finished or stands still; its state."""
    state = check_records(read_ledger(store).records)
    _check_trunks(store, state)
    return state


def check_records(records: list[Record]) -> SweepState:
    """Those that need no store."""
    state = SweepState.fold(records)
    _check_replay(records, state)
    _check_tasks(records, state)
    _check_spend(records, state)
    return state


def _check_replay(records: list[Record], state: SweepState) -> None:
    """The state is that of the records, whoever reads them and in how many goes; rows stand in their order."""
    half = SweepState.fold(records[: len(records) // 2])
    for record in records[len(records) // 2 :]:
        half.apply(record)
    assert half == state
    told = [(record["row"]["trial"], record["row"]["rung"]) for record in records if record["kind"] == "row"]
    assert state.arrivals == told
    assert [rows for rung in sorted(state.rungs) for rows in state.rungs[rung]] == [
        trial for rung in sorted(state.rungs) for trial, at in told if at == rung
    ]
    twice = [place for place, count in Counter(told).items() if count > 1]
    assert not twice, f"rows that are there twice: {twice}"


def _check_tasks(records: list[Record], state: SweepState) -> None:
    """Every reserved task ended once, or is open; every (trial, rung) that was begun has a row, was given up, or is
    still to be done."""
    begun = {record["task"]["task_id"]: record["task"] for record in records if record["kind"] == "task"}
    ended = Counter(record["task_id"] for record in records if record["kind"] in ENDS)
    assert all(count == 1 for count in ended.values()), f"tasks that ended twice: {ended}"
    assert ended.keys() | state.open_tasks.keys() == begun.keys()
    assert not ended.keys() & state.open_tasks.keys()
    places = {(task["trial"], task["rung"]) for task in begun.values()}
    assert places == {*state.arrivals, *state.abandoned, *state.attempts}
    if state.finished is not None:
        assert not state.attempts, "a finished sweep owes nothing"


def _check_spend(records: list[Record], state: SweepState) -> None:
    """The cap holds at every record, and what is spent is what rows and losses say, each within its reservation."""
    assert state.spec is not None
    cap_flops = from_dict(state.spec).budget.total_flops
    so_far, reserved = SweepState(), dict[str, int]()
    rows_flops = charged_flops = 0
    for record in records:
        so_far.apply(record)
        assert so_far.spent_flops + so_far.reserved_flops <= cap_flops
        if record["kind"] == "task":
            reserved[record["task"]["task_id"]] = record["task"]["reserved_flops"]
        elif record["kind"] == "row":
            rows_flops += record["row"]["task_flops"]
            assert record["row"]["task_flops"] <= reserved[record["task_id"]], record["task_id"]
        elif record["kind"] in ENDS:
            charged_flops += record["charged_flops"]
            assert 0 <= record["charged_flops"] <= reserved[record["task_id"]], record["task_id"]
    assert state.spent_flops == rows_flops + charged_flops
    assert state.lost_flops <= charged_flops
    assert state.spent_flops == sum(state.trained_flops.values()) + state.lost_flops + state.redone_flops


def _check_trunks(store: Store, state: SweepState) -> None:
    """Trunks that rows name stand with the sum that they name, and can be loaded; evicted ones are gone. Of a finished
    sweep no in-rung checkpoint and no folder of a worker group is left."""
    for trial, rung in state.arrivals:
        row = state.rungs[rung][trial]
        if row["status"] != "ok":
            continue
        if (trial, rung) in state.evicted:
            assert not store.names(row["checkpoint"])
        else:
            assert load_checkpoint(store, row["checkpoint"]).meta["state_sha256"] == row["checkpoint_sha256"]
        assert load_checkpoint(store, row["model"]).meta["counters"]["path_flops"] == row["path_flops"]
    if state.finished is not None:
        left = [name for trial in state.trials for name in _litter(store, trial)]
        assert not left, f"left behind: {left}"


def _litter(store: Store, trial: str) -> list[str]:
    checkpoints = f"trials/{trial}/checkpoints"
    progress = [name for name in store.folders(checkpoints) if name.endswith("-progress")]
    return progress + [name for name in store.folders(f"trials/{trial}") if name != checkpoints]


def lost_work(state: SweepState) -> list[Record]:
    """Losses that cost something. A node that is taken away as idle may take a task along that has not begun: it is
    given out again, and no FLOP is lost."""
    return [loss for loss in state.losses if loss["charged_flops"] or loss["fault"] != NODE]


def check_nothing_runs(processes: Iterable[psutil.Process], within_s: float = 30) -> None:
    """Processes that a test has started, or seen started by them, are gone."""
    for process in processes:
        wait_for(lambda process=process: not _runs(process), within_s, f"process {process.pid} is gone")


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check_nothing_held(cluster: Cluster, within_s: float = 60) -> None:
    """No actor lives on a cluster and no placement group holds anything there."""
    wait_for(lambda: not held(cluster), within_s, "no actor and no placement group is left")


def held(cluster: Cluster) -> list[dict[str, Any]]:
    actors = [actor for actor in cluster.listed("actors") if actor["state"] != "DEAD" and _is_ours(actor)]
    return actors + [group for group in cluster.listed("placement_groups") if group["state"] != "REMOVED"]


def _is_ours(actor: dict[str, Any]) -> bool:
    # The dashboard's own attendants live as long as the cluster.
    return not actor["class_name"].startswith(("JobSupervisor", "_StatsActor"))
