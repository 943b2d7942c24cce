"""Baselines against their definitions, read off the ledger decision by decision."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bfm.sweep.ledger.state import SweepState
from bfm.sweep.ledger.task import Task, Wait
from tests.sweep.curves import RUNGS, begin, curve, reached, sweep, table_spec, tasks_of

TOP = len(RUNGS) - 1
losses_lists = st.lists(
    st.lists(st.sampled_from([*np.linspace(1, 4, 13).tolist(), math.nan]), min_size=3, max_size=3),
    min_size=1,
    max_size=25,
)


def curves_of(losses):
    return [curve(f"c{place:03d}", row) for place, row in enumerate(losses)]


def replayed(driver):
    """(state before, task) of every decision."""
    state = SweepState()
    for record in driver._ledger.records:
        if record["kind"] == "task":
            yield state, Task.from_dict(record["task"])
        state.apply(record)


def loss_of(state, trial, rung):
    row = state.trials[trial].rows[rung]
    return row["metrics"]["loss"] if row["status"] == "ok" else math.nan


def trial_of(driver, config):
    return next(trial for trial in driver.state.trials.values() if trial.config["config_id"] == config)


@given(losses=losses_lists)
@settings(max_examples=30, deadline=None)
def test_full_length_runs_one_configuration_after_the_other(losses):
    expected = []
    for place, row in enumerate(losses):
        for rung in range(3):
            expected.append((f"c{place:03d}", rung))
            if math.isnan(row[rung]):
                break
    for policy in ("random", "grid"):
        assert tasks_of(sweep(table_spec(policy, 1e15), curves_of(losses))) == expected


def test_full_length_runs_keep_room_for_those_that_are_on_their_way():
    """Two workers, and a cap for two whole runs and a bit: no third one is begun and left lying."""
    driver = begin(table_spec("random", 34e9, slots=2), curves_of([[3, 2, 1]] * 5))
    while True:
        tasks = []
        while isinstance(task := driver.next_task(), Task):
            tasks.append(task)
        if not tasks:
            break
        for task in tasks:
            driver.report(task.task_id, driver.arena.execute(task))
    assert sorted(reached(driver).values(), reverse=True)[:2] == [2, 2]
    assert driver.state.spent_flops <= 34e9


def ray_continues(before, value, eta):
    """AsyncHyperBand's bracket: the cut-off is a percentile of what was recorded there before."""
    if not before:
        return True
    # Ray maximises: metric = -loss, cut-off = the (1 - 1 / eta) quantile, stop below it.
    return -value >= np.percentile([-loss for loss in before], (1 - 1 / eta) * 100)


@given(losses=losses_lists, eta=st.sampled_from([2.0, 4.0]))
@settings(max_examples=60, deadline=None)
def test_the_stopping_rule_is_rays(losses, eta):
    """Under a cap that binds nobody, each run ends where Ray's rule would have stopped it.

    Losses and percentiles have no rounding, so that ties are ties however the rule is written.
    """
    recorded = [[], [], []]
    expected = []
    for row in losses:
        end = 0
        for rung in range(3):
            end = rung
            if math.isnan(row[rung]):
                break
            goes_on = ray_continues(recorded[rung], row[rung], eta)
            recorded[rung].append(row[rung])
            if not goes_on:
                break
        expected.append(end)
    driver = sweep(table_spec("asha-stop", 1e15, eta=eta), curves_of(losses))
    assert list(reached(driver).values()) == expected


@given(losses=losses_lists, eta=st.sampled_from([2.0, 3.0, 4.0]))
@settings(max_examples=60, deadline=None)
def test_promotion_takes_the_best_of_the_highest_rung(losses, eta):
    driver = sweep(table_spec("asha-promote", 1e15, eta=eta), curves_of(losses))
    for state, task in replayed(driver):
        due = None
        for rung in range(TOP - 1, -1, -1):
            rows = [(loss_of(state, name, rung), name) for name in state.rungs.get(rung, ())]
            rows = sorted((row for row in rows if not math.isnan(row[0])), key=lambda row: row[0])
            best = [name for _, name in rows[: int(len(rows) // eta)]]
            waiting = [name for name in best if max(state.trials[name].rows) == rung]
            if waiting:
                due = (waiting[0], rung + 1)
                break
        if due is None:
            assert task.rung == 0
            assert task.trial == f"t{len(state.trials) - 1:05d}"
        else:
            assert (task.trial, task.rung) == due
    # At the end nothing more was due: the best 1/eta of every rung went on, ties by arrival.
    for rung in range(TOP):
        rows = [
            loss for loss in (loss_of(driver.state, t, rung) for t in driver.state.rungs.get(rung, ())) if loss == loss
        ]
        went_on = [loss_of(driver.state, trial, rung) for trial in driver.state.rungs.get(rung + 1, ())]
        assert len(went_on) >= int(len(rows) // eta)
        for loss in sorted(rows)[: int(len(rows) // eta)]:
            assert loss in went_on


def test_asha_ends_when_its_rule_has_nothing_left():
    driver = sweep(table_spec("asha-promote", 1e15, eta=4), curves_of([[float(n)] * 3 for n in range(9)]))
    assert "its rule has no further step" in driver.reason
    assert sorted(reached(driver).values()) == [0] * 7 + [1, 1]


WIDE = [100, 300, 1000, 2500, 3000, 5000, 9000, 12_000, 40_000]


def target(rung):
    return math.sqrt(RUNGS[rung] / 120)


@given(sizes=st.lists(st.sampled_from(WIDE), min_size=1, max_size=15), total=st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_the_window_takes_the_nearest_to_twenty_events_per_parameter(sizes, total):
    curves = [curve(f"c{n:03d}", [3, 2, 1], params=size) for n, size in enumerate(sizes)]
    driver = sweep(table_spec("isoflop-window", total * 1e9), curves)
    for rung in range(3):
        inside = [size for size in sizes if target(rung) / 3 <= size <= 3 * target(rung)]
        near = sorted(abs(math.log(size / target(rung))) for size in inside)
        got = sorted(
            abs(math.log(trial.params / target(rung))) for trial in driver.state.trials.values() if rung in trial.rows
        )
        got_inside = [distance for distance in got if distance <= math.log(3)]
        if driver.state.spent_flops + RUNGS[-1] <= total * 1e9:
            # The cap bound nobody: the whole window.
            assert len(got_inside) == len(near)
        # Rows beside the window are on the way to a higher rung's.
        for trial in driver.state.trials.values():
            if rung in trial.rows and not target(rung) / 3 <= trial.params <= 3 * target(rung):
                assert any(target(r) / 3 <= trial.params <= 3 * target(r) for r in range(rung + 1, 3))


def test_the_window_serves_rungs_in_turn_nearest_first():
    sizes = [round(target(rung) * shift) for rung in range(3) for shift in (1.05, 1.2, 1.4)]
    curves = [curve(f"c{n}", [3, 2, 1], params=size) for n, size in enumerate(sizes)]
    driver = sweep(table_spec("isoflop-window", 1e12), curves)
    first = [(driver.state.trials[f"t{n:05d}"].params) for n in range(3)]
    # The nearest of each rung are begun before any second one.
    assert first == [round(target(rung) * 1.05) for rung in range(3)]
    reasons = [record["reason"] for record in driver._ledger.records if record["kind"] == "task"]
    assert reasons[0].startswith("the next nearest to N = 2.89k for rung 0: N = 3.03k, 0 nearer ones are there")


def test_nothing_in_the_window_ends_with_a_reason():
    driver = sweep(table_spec("isoflop-window", 1e12), [curve("huge", [3, 2, 1], params=10**9)])
    assert driver.state.trials == {}
    assert "its rule has no further step" in driver.reason


@pytest.mark.parametrize("policy", ["asha-promote", "asha-stop", "isoflop-window", "random"])
def test_with_running_tasks_a_baseline_waits_and_never_starts_a_step_twice(policy):
    losses = np.random.default_rng(0).uniform(1, 4, (12, 3)).tolist()
    curves = [curve(f"c{n:03d}", row, params=3000 + 500 * n) for n, row in enumerate(losses)]
    driver = begin(table_spec(policy, 90e9, slots=3), curves)
    started, waited = set(), False
    while True:
        answer = driver.next_task()
        if isinstance(answer, Task):
            assert (answer.trial, answer.rung) not in started
            started.add((answer.trial, answer.rung))
        elif isinstance(answer, Wait):
            waited = True
            oldest = next(iter(driver.state.open_tasks.values()))
            task = Task.from_dict(driver.state.attempts[oldest].task)
            driver.report(task.task_id, driver.arena.execute(task))
        else:
            break
    assert waited
    assert driver.state.spent_flops <= 90e9
    assert len(started) == len(driver.state.arrivals)


@pytest.mark.parametrize("policy", ["asha-promote", "asha-stop", "isoflop-window", "random", "grid"])
def test_max_trials_bounds_proposals(policy):
    curves = [curve(f"c{n}", [3, 2, 1], params=4000 + n) for n in range(9)]
    driver = sweep(table_spec(policy, 1e12, max_trials=4), curves)
    assert len(driver.state.trials) == 4
    assert driver.reason
