"""The virtual clock, by hand: start-up, preemption, failures, stragglers, workers that come and go."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bfm.errors import UserError
from bfm.sweep.simulator.fleet import Fleet, parse_schedule, run_fleet
from tests.sweep.curves import begin, curve, table_spec

HOUR = 3600.0
RATE = 1e9
"""FLOPs per second: a task of 1e9 takes a second."""


def run(seconds, fleet, total=1e15, seed=0, **changes):
    """One rung, and a configuration for each number of seconds that its task takes."""
    curves = [
        curve(f"c{place:03d}", [2.0 + place], flops=(s * RATE,), resumable=False) for place, s in enumerate(seconds)
    ]
    spec = table_spec("random", total, rungs=(10**15,), slots=fleet.most, **changes)
    driver = begin(spec, curves)
    return driver, run_fleet(driver, driver.arena.execute, fleet, np.random.default_rng(seed))


def ends(timeline):
    """When the rows came, and whose they are."""
    return [(at_s, row["config"]["config_id"]) for at_s, _, row in timeline.rows]


def test_three_tasks_on_two_workers():
    driver, timeline = run([3, 5, 4], Fleet(((0.0, 2),), RATE))
    assert ends(timeline) == [(3, "c000"), (5, "c001"), (7, "c002")]
    assert [spent for _, spent, _ in timeline.rows] == [3e9, 8e9, 12e9]
    assert (timeline.elapsed_s, timeline.busy_s, timeline.decisions, timeline.lost) == (7, 12, 3, 0)
    assert len(timeline.decision_s) >= 3
    assert driver.state.finished


def test_workers_and_tasks_start_up():
    _, timeline = run([3, 5, 4], Fleet(((0.0, 2),), RATE, startup_s=10, task_startup_s=1))
    assert ends(timeline) == [(14, "c000"), (16, "c001"), (19, "c002")]
    assert (timeline.elapsed_s, timeline.busy_s) == (19, 15)


def test_workers_come_later():
    _, timeline = run([4, 4, 4, 4], Fleet(((0.0, 1), (5.0, 3)), RATE, startup_s=2))
    # The first is up at 2; its second task starts at 6; two more are up at 7.
    assert ends(timeline) == [(6, "c000"), (10, "c001"), (11, "c002"), (11, "c003")]


def test_workers_go_when_their_task_has_ended():
    _, timeline = run([4, 6, 5, 5], Fleet(((0.0, 2), (1.0, 1)), RATE))
    # At 4 the first worker goes, its colleague is the one that is left.
    assert ends(timeline) == [(4, "c000"), (6, "c001"), (11, "c002"), (16, "c003")]


def test_a_pause_without_workers():
    _, timeline = run([2, 2], Fleet(((0.0, 1), (1.0, 0), (100.0, 1)), RATE))
    assert ends(timeline) == [(2, "c000"), (102, "c001")]


def test_time_ends_with_the_last_task_not_with_the_next_worker():
    _, timeline = run([2], Fleet(((0.0, 1), (1.0, 0), (100.0, 1)), RATE))
    assert timeline.elapsed_s == 2


@pytest.mark.parametrize("text", ["1,0@1s", "8,0@2h,64@3h,0@1d"])
def test_a_schedule_that_ends_without_workers_is_a_users_error(text):
    with pytest.raises(UserError, match="ends without workers") as caught:
        parse_schedule(text)
    assert caught.value.key == "--workers"
    assert caught.value.fix


def test_stragglers_take_four_times_as_long():
    _, timeline = run([3, 5], Fleet(((0.0, 2),), RATE, task_startup_s=1, straggler_share=1.0))
    assert ends(timeline) == [(13, "c000"), (21, "c001")]


def test_a_preempted_task_is_charged_tried_again_and_given_up():
    # A worker lives for a thousandth of a second on average: nothing ever ends.
    driver, timeline = run([3, 5], Fleet(((0.0, 1),), RATE, startup_s=10, preempted_per_hour=3.6e6), max_retries=1)
    assert timeline.rows == []
    assert timeline.lost == 4
    assert driver.state.spent_flops == driver.state.lost_flops == 2 * 3e9 + 2 * 5e9
    assert set(driver.state.abandoned) == {("t00000", 0), ("t00001", 0)}
    # Every worker but the first had to come back first; it hardly worked.
    assert 40 <= timeline.elapsed_s < 51
    assert timeline.busy_s < 0.1


def test_preemption_loses_some_tasks_and_the_sweep_goes_on():
    fleet = Fleet(((0.0, 4),), RATE, startup_s=60, preempted_per_hour=1.0)
    seconds = [1200] * 60
    driver, timeline = run(seconds, fleet, max_retries=50)
    assert len(timeline.rows) == 60
    # Rate 1/h over 20 minutes: each try is lost with probability 1 - exp(-1/3) = 0.28.
    share = timeline.lost / (timeline.lost + 60)
    assert 0.15 < share < 0.45
    assert driver.state.lost_flops == timeline.lost * 1200 * RATE
    assert timeline.busy_s < 1200 * (60 + timeline.lost)


def test_failures_come_at_the_end_and_as_often_as_stated():
    driver, timeline = run([10] * 200, Fleet(((0.0, 1),), RATE, failure_share=0.25), max_retries=50)
    assert len(timeline.rows) == 200
    assert timeline.lost / (200 + timeline.lost) == pytest.approx(0.25, abs=0.1)
    assert timeline.elapsed_s == timeline.busy_s == 10 * (200 + timeline.lost)
    assert {loss["reason"] for loss in driver.state.losses} == {"failed"}


def test_losses_count_against_the_cap():
    driver, timeline = run([10] * 50, Fleet(((0.0, 3),), RATE, failure_share=0.3), total=200e9)
    assert timeline.lost
    assert driver.state.spent_flops <= 200e9
    assert driver.state.spent_flops == (len(timeline.rows) + timeline.lost) * 10e9


@given(
    count=st.integers(1, 8).map(lambda pairs: 8 * pairs), workers=st.sampled_from([1, 2, 4]), seconds=st.integers(1, 99)
)
@settings(max_examples=20, deadline=None)
def test_twice_the_workers_halve_the_time_of_equal_independent_tasks(count, workers, seconds):
    one, two = (run([seconds] * count, Fleet(((0.0, n),), RATE))[1] for n in (workers, 2 * workers))
    assert two.elapsed_s == pytest.approx(one.elapsed_s / 2)
    assert two.busy_s == pytest.approx(one.busy_s)


@given(
    seconds=st.lists(st.integers(1, 50), min_size=1, max_size=15),
    changes=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5)), max_size=4),
    fleet=st.builds(
        lambda startup, share: {"startup_s": startup, "straggler_share": share}, st.integers(0, 20), st.floats(0, 1)
    ),
)
@settings(max_examples=50, deadline=None)
def test_no_more_tasks_run_than_there_were_workers(seconds, changes, fleet):
    schedule, now = [(0.0, 2)], 0.0
    for wait, workers in changes:
        now += wait
        schedule.append((now, workers))
    schedule.append((now + 1, 1))
    _, timeline = run(seconds, Fleet(tuple(schedule), RATE, **fleet))
    assert len(timeline.rows) == len(seconds)
    starts = []
    for at_s, _, row in timeline.rows:
        whole = row["task_flops"] / RATE
        slow = 4 if fleet["straggler_share"] == 1 else 1
        if fleet["straggler_share"] in (0, 1):
            starts.append((at_s - slow * whole, at_s))
    for begun, _ in starts:
        assert sum(b <= begun < e for b, e in starts) <= [n for at_s, n in schedule if at_s <= begun][-1]
        assert begun >= fleet["startup_s"]
    assert timeline.elapsed_s == max(at_s for at_s, _, _ in timeline.rows)


def test_the_same_luck_gives_the_same_timeline():
    fleet = Fleet(((0.0, 3),), RATE, preempted_per_hour=2.0, failure_share=0.1, straggler_share=0.2)
    first, second, other = (run([600] * 20, fleet, seed=seed, max_retries=9)[1] for seed in (1, 1, 2))
    assert ends(first) == ends(second) != ends(other)


def test_schedules_are_written_as_people_write_them():
    assert parse_schedule("64") == ((0.0, 64),)
    assert parse_schedule("8, 64@2h,16@1d") == ((0.0, 8), (2 * HOUR, 64), (24 * HOUR, 16))
    assert parse_schedule("1@0s,0@90s,2@2m") == ((0.0, 1), (90.0, 0), (120.0, 2))
    assert parse_schedule("1k") == ((0.0, 1000),)


@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.integers(0, 1000)), max_size=5),
    st.integers(1, 1000),
    st.tuples(st.integers(1, 10**6), st.integers(1, 1000)),
)
def test_what_is_written_is_read(later, first, last):
    changes, now = [(0, first)], 0
    for wait, workers in [*later, last]:
        now += wait
        changes.append((now, workers))
    text = ",".join(f"{workers}@{seconds}s" for seconds, workers in changes)
    assert parse_schedule(text) == tuple(changes)
    fleet = Fleet(parse_schedule(text))
    assert fleet.most == max(workers for _, workers in changes)
    for at_s, workers in changes:
        assert fleet.workers_at(at_s) == workers
        assert fleet.workers_at(at_s + 0.5) == workers


@pytest.mark.parametrize(
    "text",
    ["", "0", "-1", "many", "8,", "8,9", "8,9@", "8,9@5", "8,9@h", "8,9@0s", "8@5s", "8,9@2h,7@1h", "8,-1@2h", "x@1h"],
)
def test_bad_schedules_are_users_errors(text):
    with pytest.raises(UserError) as caught:
        parse_schedule(text)
    assert caught.value.key == "--workers"
    assert caught.value.fix


@pytest.mark.parametrize(
    ("name", "value"),
    [("flops_per_s", math.inf), ("startup_s", math.nan), ("task_startup_s", -1.0), ("preempted_per_hour", math.inf)],
)
def test_figures_that_no_machine_has_are_users_errors(name, value):
    with pytest.raises(UserError) as caught:
        Fleet(**{name: value}).check()
    assert caught.value.key == "--throughput" if name == "flops_per_s" else f"--{name.replace('_', '-')}"
    assert caught.value.fix
