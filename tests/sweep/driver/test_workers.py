"""How many workers a task takes: what pays, and what there is room for."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bfm.sweep.driver.workers import GAIN, GROW_LEFT_S, worthwhile
from bfm.sweep.ledger.task import Task, Wait
from tests.sweep.world import execute, in_memory, make_spec

COUNTS = [1, 2, 4, 8]


def row(workers: int, flops_per_s: float, params: int = 1000, start_s: float = 0.0) -> dict:
    seconds = {"train_s": 20.0, "warm_start_s": start_s}
    flops = {"task_flops": flops_per_s * 20, "path_flops": flops_per_s * 30}
    return {"status": "ok", "workers": workers, "params": params, **flops, **seconds}


@pytest.mark.parametrize(
    ("speeds", "kept"),
    [
        ({}, [8, 4, 2, 1]),
        ({1: 10}, [8, 4, 2, 1]),
        ({1: 10, 2: 15}, [8, 4, 2, 1]),
        ({1: 10, 2: 14.9}, [1]),
        ({1: 10, 2: 20, 4: 29}, [2, 1]),
        ({1: 10, 2: 20, 4: 30}, [8, 4, 2, 1]),
        ({2: 10, 8: 24}, [4, 2, 1]),
        ({4: 1}, [8, 4, 2, 1]),
    ],
)
def test_more_workers_are_taken_until_they_bring_too_little(speeds, kept) -> None:
    assert worthwhile(COUNTS, [row(*speed) for speed in speeds.items()], 1000, 1e6) == kept


@given(st.dictionaries(st.sampled_from(COUNTS), st.floats(1, 1e3)))
def test_what_pays_is_the_first_so_many_counts(speeds) -> None:
    kept = worthwhile(COUNTS, [row(*speed) for speed in speeds.items()], 1000, 1e6)
    assert kept[::-1] == COUNTS[: len(kept)]
    assert len(kept) >= 1
    measured = sorted(count for count in kept if count in speeds)
    for less, more in itertools.pairwise(measured):
        assert speeds[more] >= speeds[less] * (1 + GAIN * (more / less - 1))


def test_only_rows_of_like_sizes_count() -> None:
    slow = [row(1, 10), row(2, 1)]
    assert worthwhile([1, 2], slow, 1000, 1e6) == [1]
    assert worthwhile([1, 2], slow, 10_000, 1e6) == [2, 1]
    assert worthwhile([1, 2], slow, None, 1e6) == [1]


@pytest.mark.parametrize("trained", [0.0, 1.0])
def test_a_try_that_had_next_to_nothing_left_says_nothing_of_speed(trained) -> None:
    resumed = {**row(2, 19), "task_flops": trained}
    assert worthwhile([1, 2], [row(1, 10), resumed], 1000, 1e6) == [2, 1]


def test_a_group_s_start_pays_for_long_tasks_only() -> None:
    rows = [row(1, 10), row(2, 19, start_s=30.0)]
    assert worthwhile([1, 2], rows, 1000, 1000) == [1]
    assert worthwhile([1, 2], rows, 1000, 10_000) == [2, 1]


ELASTIC = {"slots": 4, "tiers": [{"engine": "deepspeed", "workers": [1, 2, 4]}]}
SPACE = {"parameters": {"groups_per_step": {"value": 4}}}


def elastic(scaling=ELASTIC, **changes):
    return in_memory(make_spec(scheduler={"type": "random"}, scaling=scaling, **{**SPACE, **changes}))


def room_for(cpus: int):
    return lambda task, copies: task.scaling["workers"] * copies <= cpus


@pytest.mark.parametrize(("cpus", "workers"), [(16, 4), (15, 2), (8, 2), (7, 1), (1, 1)])
def test_a_task_takes_what_all_free_slots_could_take(cpus, workers) -> None:
    task = elastic().next_task(room_for(cpus))
    assert isinstance(task, Task)
    assert task.scaling["workers"] == workers
    assert task.scaling["engine"] == "deepspeed"


def test_without_a_place_for_the_fewest_nothing_is_reserved() -> None:
    driver = elastic()
    answer = driver.next_task(room_for(0))
    assert isinstance(answer, Wait)
    assert answer.task is not None
    assert answer.task.scaling["workers"] == 1
    assert (driver.state.open_tasks, driver.state.num_proposals) == ({}, 0)


def test_a_task_that_comes_back_takes_what_there_is_now() -> None:
    driver = elastic()
    first = driver.next_task(room_for(4))
    assert first.scaling["workers"] == 1
    assert list(driver.growable({first.task_id: GROW_LEFT_S - 1})) == []
    ((grown, ways),) = driver.growable({first.task_id: GROW_LEFT_S})
    assert (grown.task_id, [way.scaling["workers"] for way in ways]) == (first.task_id, [4, 2])
    driver.lost(first.task_id, "its node is gone")
    again = driver.next_task(room_for(2))
    assert (again.trial, again.scaling["workers"]) == (first.trial, 2)
    driver.lost(again.task_id, "its node is gone")
    assert driver.next_task(room_for(1)).scaling["workers"] == 1


def test_what_is_owed_shares_what_there_is() -> None:
    driver = elastic()
    for _ in range(2):
        driver.next_task(room_for(4))
    resumed = in_memory(driver.spec, driver._ledger.records)
    assert len(resumed.state.owed()) == 2
    assert resumed.next_task(room_for(4)).scaling["workers"] == 2


def test_counts_that_do_not_divide_the_groups_are_left_out() -> None:
    driver = elastic(parameters={"groups_per_step": {"value": 6}})
    assert driver.next_task(room_for(99)).scaling["workers"] == 2


def test_memory_that_ran_out_is_that_of_its_number_of_workers() -> None:
    driver = elastic({**ELASTIC, "slots": 1})
    task = driver.next_task(room_for(1))
    out = {**execute(task), "status": "oom", "metrics": {}, "checkpoint": None}
    driver.report(task.task_id, out)
    assert list(driver.state.memory_limits) == [driver.spec.scaling.tiers[0][0].kind]
    ((kind, limit),) = driver.state.memory_limits.items()
    for _ in range(5):
        task = driver.next_task(lambda task, copies: True)
        assert isinstance(task, Task)
        assert driver._memory(task)[0] != kind or driver._memory(task)[1] < limit
        driver.report(task.task_id, execute(task))
