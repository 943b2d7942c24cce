"""The virtual clock, by hand: start-up, preemption, failures, stragglers, workers that come and go."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bfm.errors import PausedError, UserError
from bfm.sweep.simulator.fleet import Cluster, Fleet, parse_schedule
from bfm.sweep.simulator.run import simulate
from bfm.sweep.simulator.table import TableArena
from bfm.sweep.space.space import Place
from bfm.sweep.space.tiers import Tier
from tests.sweep.curves import curve, table_spec

HOUR = 3600.0
RATE = 1e9
"""FLOPs per second: a task of 1e9 takes a second."""


def run(seconds, fleet, total=1e15, seed=0, **changes):
    """One rung, and a configuration for each number of seconds that its task takes."""
    curves = [
        curve(f"c{place:03d}", [2.0 + place], flops=(s * RATE,), resumable=False) for place, s in enumerate(seconds)
    ]
    spec = table_spec("random", total, rungs=(10**15,), slots=fleet.most, **changes)
    return over(spec, TableArena(curves, spec.budget.ladder_flops), fleet, seed)


def over(spec, arena, fleet, seed):
    """The state and the timeline."""
    return simulate(spec, arena, arena.execute, fleet, np.random.default_rng(seed))


class Groups(TableArena):
    """A table whose tasks may have several workers."""

    counts = (1, 2, 4)

    def places(self, config, rung, limits):
        return [Place(Tier(), {"workers": workers}, 0) for workers in self.counts]


def run_groups(seconds, fleet, counts=(1, 2, 4), total=1e15, seed=0, **changes):
    """The same with groups of workers; the seconds are those of one worker."""
    curves = [
        curve(f"c{place:03d}", [2.0 + place], flops=(s * RATE,), resumable=False) for place, s in enumerate(seconds)
    ]
    spec = table_spec("random", total, rungs=(10**15,), **{"slots": fleet.most, **changes})
    arena = Groups(curves, spec.budget.ladder_flops)
    arena.counts = counts
    return over(spec, arena, fleet, seed)


def ends(timeline):
    """When the rows came, and whose they are."""
    return [(at_s, row["config"]["config_id"]) for at_s, row in timeline.rows]


def test_three_tasks_on_two_workers():
    state, timeline = run([3, 5, 4], Fleet(((0.0, 2),), RATE))
    assert ends(timeline) == [(3, "c000"), (5, "c001"), (7, "c002")]
    assert [row["task_flops"] for _, row in timeline.rows] == [3e9, 5e9, 4e9]
    assert (timeline.elapsed_s, timeline.busy_s, timeline.decisions, timeline.lost) == (7, 12, 3, 0)
    assert timeline.provisioned_s == 14
    assert len(timeline.decision_s) >= 3
    assert state.finished


def test_workers_and_tasks_start_up():
    _, timeline = run([3, 5, 4], Fleet(((0.0, 2),), RATE, startup_s=10, task_startup_s=1))
    assert ends(timeline) == [(14, "c000"), (16, "c001"), (19, "c002")]
    assert (timeline.elapsed_s, timeline.busy_s, timeline.provisioned_s) == (19, 15, 38)
    assert {(row["warm_start_s"], row["train_s"]) for _, row in timeline.rows} == {(1, 3), (1, 5), (1, 4)}


def test_workers_come_later():
    _, timeline = run([4, 4, 4, 4], Fleet(((0.0, 1), (5.0, 3)), RATE, startup_s=2))
    # The first is up at 2; its second task starts at 6; two more are up at 7.
    assert ends(timeline) == [(6, "c000"), (10, "c001"), (11, "c002"), (11, "c003")]
    # Paid from when they are asked for.
    assert timeline.provisioned_s == 11 + 2 * 6


def test_the_task_of_a_worker_that_goes_yields_and_goes_on_first():
    state, timeline = run([4, 6, 5, 5], Fleet(((0.0, 2), (1.0, 1)), RATE))
    # One second of the first is done; its worker went, and the other one was busy.
    assert ends(timeline) == [(6, "c001"), (9, "c000"), (14, "c002"), (19, "c003")]
    assert (timeline.yielded, timeline.lost, state.lost_flops) == (1, 0, 0)
    assert (timeline.busy_s, timeline.provisioned_s) == (20, 20)


def test_idle_workers_go_first():
    _, timeline = run([9], Fleet(((0.0, 3), (1.0, 1)), RATE))
    assert ends(timeline) == [(9, "c000")]
    assert (timeline.yielded, timeline.busy_s, timeline.provisioned_s) == (0, 9, 9 + 2)


def test_a_pause_without_workers():
    _, timeline = run([2, 2], Fleet(((0.0, 1), (1.0, 0), (100.0, 1)), RATE))
    assert ends(timeline) == [(101, "c000"), (103, "c001")]
    assert timeline.provisioned_s == 4


def test_time_ends_with_the_last_task_not_with_the_next_worker():
    _, timeline = run([2], Fleet(((0.0, 1), (2.5, 0), (100.0, 1)), RATE))
    assert (timeline.elapsed_s, timeline.provisioned_s) == (2, 2)


@pytest.mark.parametrize("text", ["1,0@1s", "8,0@2h,64@3h,0@1d"])
def test_a_schedule_that_ends_without_workers_is_a_users_error(text):
    with pytest.raises(UserError, match="ends without workers") as caught:
        parse_schedule(text)
    assert caught.value.key == "--workers"
    assert caught.value.fix


def test_stragglers_take_four_times_as_long():
    _, timeline = run([3, 5], Fleet(((0.0, 2),), RATE, task_startup_s=1, straggler_share=1 - 1e-9))
    assert ends(timeline) == [(13, "c000"), (21, "c001")]


def test_a_preempted_task_is_charged_tried_again_and_given_up():
    # A worker lives for a thousandth of a second on average: nothing ever ends.
    state, timeline = run([3, 5], Fleet(((0.0, 1),), RATE, startup_s=10, preempted_per_hour=3.6e6), max_retries=1)
    assert timeline.rows == []
    assert timeline.lost == 4
    assert 0 < state.spent_flops == state.lost_flops < 0.1 * RATE
    assert set(state.abandoned) == {("t00000", 0), ("t00001", 0)}
    # Every worker but the first had to come back first; it hardly worked.
    assert 40 <= timeline.elapsed_s < 51
    assert timeline.busy_s < 0.1


def test_preemption_loses_what_came_after_the_last_checkpoint():
    fleet = Fleet(((0.0, 4),), RATE, startup_s=60, preempted_per_hour=1.0, checkpoint_s=100)
    state, timeline = run([1200] * 60, fleet, max_retries=50)
    assert len(timeline.rows) == 60
    # Rate 1/h over 60 tasks of 20 minutes.
    assert 8 <= timeline.lost <= 40
    assert timeline.yielded == 0
    lost_s = state.lost_flops / RATE
    assert 0.2 * 100 * timeline.lost < lost_s <= 100 * timeline.lost
    assert timeline.busy_s == pytest.approx(60 * 1200 + lost_s, abs=1e-3)
    assert state.spent_flops == 60 * 1200 * RATE + state.lost_flops


def test_a_notice_saves_all_and_the_worker_is_paid_until_it_is_gone():
    fleet = Fleet(((0.0, 4),), RATE, startup_s=60, preempted_per_hour=1.0, notice_s=120)
    state, timeline = run([1200] * 60, fleet)
    assert (timeline.lost, state.lost_flops) == (0, 0)
    assert 8 <= timeline.yielded <= 40
    assert timeline.busy_s == pytest.approx(60 * 1200)
    assert state.spent_flops == 60 * 1200 * RATE
    unpaid = 4 * timeline.elapsed_s
    assert unpaid + 100 * timeline.yielded < timeline.provisioned_s <= unpaid + 120 * (timeline.yielded + 4)


def test_a_task_that_yields_while_it_starts_keeps_what_it_had():
    # At 10 and at 12 the only worker goes; the second try had not begun to train.
    fleet = Fleet(((0.0, 1), (10.0, 0), (11.0, 1), (12.0, 0), (13.0, 1)), RATE, task_startup_s=4)
    state, timeline = run([20], fleet)
    assert ends(timeline) == [(13 + 4 + 14, "c000")]
    assert (timeline.yielded, state.lost_flops) == (2, 0)


def test_failures_come_at_the_end_and_as_often_as_stated():
    state, timeline = run([10] * 200, Fleet(((0.0, 1),), RATE, failure_share=0.25), max_retries=50)
    assert len(timeline.rows) == 200
    assert timeline.lost / (200 + timeline.lost) == pytest.approx(0.25, abs=0.1)
    assert timeline.elapsed_s == timeline.busy_s == timeline.provisioned_s == 10 * (200 + timeline.lost)
    assert {loss["reason"] for loss in state.losses} == {"failed"}


def test_losses_count_against_the_cap():
    state, timeline = run([10] * 50, Fleet(((0.0, 3),), RATE, failure_share=0.3), total=200e9)
    assert timeline.lost
    assert state.spent_flops <= 200e9
    assert state.spent_flops == (len(timeline.rows) + timeline.lost) * 10e9


@given(
    count=st.integers(1, 8).map(lambda pairs: 8 * pairs), workers=st.sampled_from([1, 2, 4]), seconds=st.integers(1, 99)
)
@settings(max_examples=20, deadline=None)
def test_twice_the_workers_halve_the_time_of_equal_independent_tasks(count, workers, seconds):
    one, two = (run([seconds] * count, Fleet(((0.0, n),), RATE))[1] for n in (workers, 2 * workers))
    assert two.elapsed_s == pytest.approx(one.elapsed_s / 2)
    assert two.busy_s == pytest.approx(one.busy_s)


class Watched(Cluster):
    """Counts at every step."""

    def start(self, task):
        assert self.fits(task, 1)
        super().start(task)
        one = self._running[task.task_id]
        assert len(one.workers) == task.scaling["workers"]
        assert all(worker.is_up for worker in one.workers)

    def advance(self):
        ended = super().advance()
        held = [worker for one in self._running.values() for worker in one.workers]
        assert len(held) == len(set(held)) <= self.fleet.workers_at(self.now_s) == len(self._workers)
        assert {id(worker) for worker in held} <= {id(worker) for worker in self._workers}
        return ended


FLEETS = st.builds(
    lambda startup, share, failures, rate, notice, efficiency: {
        "startup_s": startup,
        "straggler_share": share,
        "failure_share": failures,
        "preempted_per_hour": rate,
        "notice_s": notice,
        "efficiency": efficiency,
        # Where tasks are lost while they start a sweep pauses.
        "task_startup_s": startup / 4 if notice else 0.0,
        "checkpoint_s": 5.0,
    },
    st.integers(0, 20),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0.0, 10.0, 60.0]),
    st.sampled_from([0.0, 7.0]),
    st.floats(0.5, 1.0),
)


@given(
    seconds=st.lists(st.integers(1, 300), min_size=1, max_size=15),
    changes=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5)), max_size=4),
    counts=st.sampled_from([(1,), (1, 2, 4), (2, 3)]),
    total=st.integers(100, 5000),
    fleet=FLEETS,
)
@settings(max_examples=60, deadline=None)
def test_whatever_comes_and_goes(seconds, changes, counts, total, fleet):
    """Never more workers than there are, never more paid work than paid time, never above the cap, and it ends."""
    schedule, now = [(0.0, 2)], 0.0
    for wait, workers in changes:
        now += wait
        schedule.append((now, workers))
    schedule.append((now + 1, counts[0]))
    fleet = Fleet(tuple(schedule), RATE, **fleet)

    def once():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bfm.sweep.simulator.run.Cluster", Watched)
            return run_groups(seconds, fleet, counts, total * RATE, max_retries=200)

    (state, timeline), (_, again) = once(), once()
    assert state.finished
    assert not state.attempts
    assert state.spent_flops <= total * RATE
    assert timeline.busy_s <= timeline.provisioned_s * (1 + 1e-9)
    assert timeline.elapsed_s >= max((at_s for at_s, _ in timeline.rows), default=0)
    if sum(seconds) <= total and not state.losses:
        assert len(timeline.rows) == len(seconds)
    assert ends(timeline) == ends(again)
    assert (timeline.busy_s, timeline.provisioned_s) == (again.busy_s, again.provisioned_s)


def test_a_task_takes_the_workers_that_all_free_slots_could_take():
    _, timeline = run_groups([80, 80], Fleet(((0.0, 4),), RATE, efficiency=0.8), slots=2)
    # Two workers each: 1.6 times as fast.
    assert [row["workers"] for _, row in timeline.rows] == [2, 2]
    assert ends(timeline) == [(50, "c000"), (50, "c001")]
    assert timeline.busy_s == timeline.provisioned_s == 200


def test_a_task_alone_grows_into_what_comes():
    _, timeline = run_groups([400], Fleet(((0.0, 1), (100.0, 4)), RATE), slots=1)
    # 300 of 400 s of one worker were left.
    assert ends(timeline) == [(175, "c000")]
    assert timeline.yielded == 1
    assert timeline.rows[0][1]["workers"] == 4


def test_little_work_left_is_not_worth_a_new_group():
    _, timeline = run_groups([200], Fleet(((0.0, 1), (100.0, 4)), RATE), slots=1)
    assert ends(timeline) == [(200, "c000")]
    assert timeline.yielded == 0


@pytest.mark.parametrize(("efficiency", "expected"), [(1.0, {4}), (0.6, {1})])
def test_what_groups_brought_decides_how_many_workers_later_tasks_take(efficiency, expected):
    _, timeline = run_groups([100] * 12, Fleet(((0.0, 1), (250.0, 4)), RATE, efficiency=efficiency), slots=1)
    assert {row["workers"] for _, row in timeline.rows[-5:]} == expected


def test_a_task_that_no_schedule_will_hold_is_a_users_error():
    with pytest.raises(UserError, match="needs 4 workers") as caught:
        run_groups([40, 40], Fleet(((0.0, 4), (7.0, 2)), RATE, preempted_per_hour=100), counts=(4,))
    assert caught.value.key == "--workers"
    assert caught.value.fix == "end the schedule with at least 4"


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
    [
        ("flops_per_s", math.inf),
        ("startup_s", math.nan),
        ("task_startup_s", -1.0),
        ("preempted_per_hour", math.inf),
        ("notice_s", -1.0),
        ("efficiency", 0.4),
        ("efficiency", 1.1),
    ],
)
def test_figures_that_no_machine_has_are_users_errors(name, value):
    with pytest.raises(UserError) as caught:
        Fleet(**{name: value})
    assert caught.value.key == ("--throughput" if name == "flops_per_s" else f"--{name.replace('_', '-')}")
    assert caught.value.fix


def test_a_sweep_pauses_where_a_real_one_would():
    fleet = Fleet(((0.0, 2),), RATE, task_startup_s=60, preempted_per_hour=3600)
    with pytest.raises(PausedError, match="preempted"):
        run([3, 5, 4, 9], fleet)
