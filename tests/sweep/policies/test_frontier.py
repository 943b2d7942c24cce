"""The frontier policy: a function of the ledger that keeps to the cap, and finds large winners that look bad early."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize

from bfm.sweep.ledger.state import SweepState
from bfm.sweep.ledger.task import Finished, Task, Wait
from bfm.sweep.policies.frontier import default_shares
from bfm.sweep.policies.ground import View
from bfm.sweep.space.metric import Constraint, Metric
from tests.sweep.cap_machine import CapMachine
from tests.sweep.curves import RUNGS, begin, crossing, curve, reached, reasons_of, sweep, table_spec, tasks_of
from tests.sweep.serial import run_serial
from tests.sweep.world import GRID, execute, first_tries, in_memory, make_spec, rows_of, spoilt, unbroken

POLICIES = ("frontier", "asha-promote", "asha-stop", "isoflop-window", "random")


def frontier_spec(**changes):
    return make_spec(**{"scheduler": {"type": "frontier"}, **changes})


@pytest.mark.parametrize("method", ["optuna", "random", "grid"])
def test_a_sweep_that_the_cap_does_not_end_is_the_same_after_a_crash_anywhere(method):
    spec = frontier_spec(
        method=method,
        budget={"max_trials": 16, "total_flops": "1e12", "ladder_flops": ["1e9", "4e9"]},
        **({"parameters": GRID} if method == "grid" else {}),
    )
    whole, batches = unbroken(spec)
    assert len(first_tries(whole._ledger.records)) > 12
    for cut in batches[:: 8 if method == "optuna" else 4]:
        driver = in_memory(spec, whole._ledger.records[:cut])
        run_serial(driver, execute)
        assert first_tries(driver._ledger.records) == first_tries(whole._ledger.records)
        assert rows_of(driver.state) == rows_of(whole.state)


def test_decisions_are_the_same_although_the_hypotheses_are_no_longer_weighed_at_every_row():
    """More rows than are weighed each time, and a policy that has seen none of them grow."""
    rng = np.random.default_rng(0)
    curves = [
        curve(f"c{n:03d}", (4 - rng.uniform(0, 1) - np.array([0, 1, 1.5])).tolist(), params=100 + 10 * n, x=n % 7)
        for n in range(120)
    ]
    spec = table_spec("frontier", 300e9)
    whole = sweep(spec, curves)
    records = whole._ledger.records
    starts = [place for place, record in enumerate(records) if record["kind"] == "row"]
    assert len(starts) > 70
    for cut in (starts[49], starts[58], starts[61], starts[70]):
        driver = begin(spec, curves, records[: cut + 1])
        driver.next_task()
        expected = next(record for record in records[cut + 1 :] if record["kind"] == "task")
        got = driver._ledger.records[-1]
        assert got["task"] == expected["task"]
        assert got["reason"] == expected["reason"]


class PolicyMachine(CapMachine):
    """Whatever the policy."""

    @initialize(
        policy=st.sampled_from([*POLICIES, "frontier"]),
        slots=st.integers(1, 4),
        total=st.integers(21, 120),
        method=st.sampled_from(["random", "grid"]),
        num_metrics=st.integers(1, 2),
    )
    def begin(self, policy, slots, total, method, num_metrics):
        others = {"others": ["recall@10"], "constraints": ["recall@10 >= 0.1"]} if num_metrics == 2 else {}
        self.open_with(
            scheduler={"type": policy},
            metric={"name": "nll", **others},
            scaling={"slots": slots},
            method=method,
            budget={"total_flops": total * 10**9},
            **({"parameters": GRID} if method == "grid" else {}),
        )


PolicyMachine.TestCase.settings = settings(max_examples=8, stateful_step_count=25, deadline=None)
TestCap = PolicyMachine.TestCase


SIZES = [100, 150, 220, 330, 500, 750, 1100, 1700, 2500, 3800, 5600, 8500, 12_000, 18_000]
LADDER = (10**8, 4 * 10**8, 16 * 10**8, 64 * 10**8)


def planted(seed, copies=3):
    """Sizes with a nuisance axis; curves cross: each rung has a larger winner than the one below."""
    rng = np.random.default_rng(seed)
    curves = []
    for one in crossing(SIZES, LADDER):
        for copy in range(copies):
            x = float(rng.uniform(-1, 1))
            losses = tuple(loss + 0.3 * x**2 for loss in one.losses)
            name = f"{one.config['config_id']}-{copy}"
            curves.append(curve(name, losses, one.params, LADDER, x=x))
    return [curves[place] for place in rng.permutation(len(curves))]


@pytest.mark.parametrize("seed", range(3))
def test_a_large_winner_that_looks_bad_early_is_found(seed):
    curves = planted(seed)
    by_loss = [sorted(curves, key=lambda one: one.losses[rung]) for rung in range(4)]
    best = by_loss[-1][0]
    # The winner at the top is nothing special at the entry rung.
    assert by_loss[0].index(best) > len(curves) / 2
    total = 0.15 * len(curves) * LADDER[-1]
    found = sweep(table_spec("frontier", total, LADDER), curves)
    promoted = sweep(table_spec("asha-promote", total, LADDER), curves)
    spread = np.quantile([one.losses[-1] for one in curves], 0.75) - best.losses[-1]
    assert found.arena.regrets(found.state)[-1] < 0.1 * spread
    assert promoted.arena.regrets(promoted.state)[-1] > 0.2 * spread
    at_top = [found.state.trials[trial].params for trial in found.state.rungs[3]]
    assert max(at_top) >= best.params / 2


def test_what_is_spent_follows_the_shares():
    curves = planted(0, copies=12)
    total = 0.1 * len(curves) * LADDER[-1]
    # A climb to the top spends at the rungs on its way, too.
    spent = {}
    for shares in ((0.4, 0.2, 0.2, 0.2), (0.05, 0.05, 0.1, 0.8)):
        driver = sweep(table_spec("frontier", total, LADDER, shares=shares), curves)
        nominal = driver.state.nominal_flops
        spent[shares] = [nominal[rung] / total for rung in range(4)]
    assert spent[0.05, 0.05, 0.1, 0.8][3] > spent[0.4, 0.2, 0.2, 0.2][3] + 0.05


def test_half_is_for_the_top_and_the_rest_grows_with_the_rung():
    assert default_shares(1) == (1.0,)
    for rungs in range(2, 7):
        shares = default_shares(rungs)
        assert sum(shares) == pytest.approx(1)
        assert shares[-1] == 0.5
        for below, above in itertools.pairwise(shares[:-1]):
            assert above == pytest.approx(1.6 * below)


@given(bad=st.sets(st.integers(0, 40), min_size=1), kind=st.sampled_from(["nan", "diverged", "oom", "missing C"]))
@settings(max_examples=6, deadline=None)
def test_what_cannot_be_compared_is_never_the_reason_for_more(bad, kind):
    driver = in_memory(frontier_spec(budget={"total_flops": "60e9"}))
    run_serial(driver, spoilt(bad, kind))
    if kind != "missing C":
        for trial in driver.state.trials.values():
            if trial.number in bad:
                assert len(trial.rows) <= 1
    assert driver.state.spent_flops <= 60e9


def test_where_rates_diverge_others_are_taken():
    """Beside the best rate a cliff: a quarter of the space diverges, little of the spend goes there."""
    curves = []
    for n in range(64):
        size, rate = 200 * 2 ** (n // 16), n % 16
        losses = [2 - rung / 3 + 0.02 * (rate - 9) ** 2 + 0.1 * math.log2(size / 200) for rung in range(3)]
        curves.append(curve(f"c{n:03d}", losses if rate < 12 else [math.nan] * 3, size, rate=float(rate)))
    driver = sweep(table_spec("frontier", 0.15 * 64 * RUNGS[-1]), curves)
    trials = driver.state.trials.values()
    diverged = sum(row["status"] == "diverged" for row in driver.state.rungs[0].values())
    assert 0 < diverged < 0.2 * len(trials)
    assert driver.arena.regrets(driver.state)[-1] < 0.05


def drive(driver, choose, check=lambda driver: None):
    """Ask until it waits; then let one of the running tasks end."""
    asked = []
    while True:
        answer = driver.next_task()
        check(driver)
        if isinstance(answer, Finished):
            return asked, answer.reason
        if isinstance(answer, Task):
            asked.append(answer)
            continue
        places = list(driver.state.open_tasks.values())
        place = places[choose(len(places))]
        task = Task.from_dict(driver.state.attempts[place].task)
        driver.report(task.task_id, driver.arena.execute(task))


@given(slots=st.integers(2, 8), seed=st.integers(0, 1000), fraction=st.floats(0.02, 0.4))
@settings(max_examples=6, deadline=None, phases=[Phase.generate])
def test_running_tasks_are_accounted_for(slots, seed, fraction):
    curves = planted(seed, copies=1)
    total = max(1.01 * LADDER[-1], fraction * len(curves) * LADDER[-1])
    rng = np.random.default_rng(seed)

    def promises_are_kept(driver):
        view = View(driver.spec, driver.arena, driver.state, driver.available_flops)
        assert sum(view.promised_flops) <= driver.available_flops

    driver = begin(table_spec("frontier", total, LADDER, slots=slots), curves)
    asked, reason = drive(driver, lambda count: int(rng.integers(count)), promises_are_kept)
    places = Counter((task.config["config_id"], task.rung) for task in asked)
    assert set(places.values()) == {1}
    assert len({task.config["config_id"] for task in asked}) == len(driver.state.trials)
    assert driver.state.spent_flops <= total
    assert reason
    # The top is reached, whatever the order in which tasks end.
    assert driver.state.rungs[3]


def test_a_task_that_runs_is_taken_to_bring_what_is_expected():
    """Two slots take two different points, not twice what looks best before the first has ended."""
    curves = planted(1, copies=4)
    driver = begin(table_spec("frontier", 0.2 * len(curves) * LADDER[-1], LADDER, slots=6), curves)
    for _ in range(12):
        task = driver.next_task()
        if isinstance(task, Wait):
            place = next(iter(driver.state.open_tasks.values()))
            task = Task.from_dict(driver.state.attempts[place].task)
            driver.report(task.task_id, driver.arena.execute(task))
    running = [Task.from_dict(driver.state.attempts[place].task) for place in driver.state.open_tasks.values()]
    assert len(running) >= 4
    assert len({task.config["config_id"] for task in running}) == len(running)
    assert len({(driver.state.trials[task.trial].params) for task in running}) >= 3


def two_metrics(run_recall):
    """A table has one metric: the second is made up as rows come."""

    def run(driver, task):
        row = driver.arena.execute(task)
        row["metrics"]["recall@10"] = run_recall(task.config, driver.state.trials[task.trial].params)
        return row

    return run


RECALL = Metric("recall@10", "maximize")


def test_a_second_metric_has_a_frontier_of_its_own():
    """Loss favours small models at the top, recall large ones: with both, both kinds are carried up."""
    curves = [
        curve(f"n{n:02d}-{x}", [3 + n / 20, 2 + n / 20, 1 + n / 20], params=100 * 2**n, x=x)
        for n in range(10)
        for x in range(4)
    ]
    run = two_metrics(lambda config, params: 0.05 + 0.08 * math.log2(params / 100))
    total = 0.25 * len(curves) * RUNGS[-1]

    def top_sizes(**changes):
        driver = sweep(table_spec("frontier", total, **changes), curves, run)
        return [driver.state.trials[trial].params for trial in driver.state.rungs[2]]

    alone, both = top_sizes(), top_sizes(others=(RECALL,))
    large = 100 * 2**7
    assert sum(size >= large for size in both) > sum(size >= large for size in alone)
    assert min(both) < large


def test_a_constraint_keeps_spend_away_from_what_breaks_it():
    curves = [
        curve(f"n{n:02d}-{x}", [3 - n / 20, 2 - n / 20, 1 - n / 20], params=100 * 2**n, x=x)
        for n in range(10)
        for x in range(4)
    ]
    # The best models have a recall below the bound.
    run = two_metrics(lambda config, params: 0.9 - 0.08 * math.log2(params / 100))
    total = 0.25 * len(curves) * RUNGS[-1]

    def top_sizes(**changes):
        driver = sweep(table_spec("frontier", total, **changes), curves, run)
        return [driver.state.trials[trial].params for trial in driver.state.rungs[2]]

    free = top_sizes()
    held = top_sizes(constraints=(Constraint(RECALL, 0.49),))
    largest = 100 * 2**5  # 0.9 - 0.4 = 0.5
    assert np.mean([size > largest for size in free]) > 0.5
    assert np.mean([size > largest for size in held]) < 0.3
    # And the best of those that keep it is among them.
    assert largest in held


@pytest.mark.parametrize("which", ["other", "constraint"])
def test_a_further_metric_that_no_row_has_decides_nothing(which):
    curves = planted(0, copies=1)
    more = {"others": (RECALL,)} if which == "other" else {"constraints": (Constraint(RECALL, 0.5),)}
    total = 0.2 * len(curves) * LADDER[-1]
    plain, silent = (tasks_of(sweep(table_spec("frontier", total, LADDER, **m), curves)) for m in ({}, more))
    assert plain == silent


def test_a_metric_to_maximise_is_maximised():
    spec = frontier_spec(metric={"name": "recall@10"}, budget={"total_flops": "80e9"})
    driver = in_memory(spec)
    reason = run_serial(driver, execute)
    top = [row["metrics"]["recall@10"] for row in driver.state.rungs[2].values()]
    assert reason
    others = [row["metrics"]["recall@10"] for row in driver.state.rungs[0].values() if row["status"] == "ok"]
    assert max(top) > np.quantile(others, 0.8)


def test_what_is_kept_for_replicas_never_keeps_a_sweep_from_its_first_row():
    spec = frontier_spec(budget={"ladder_flops": ["1e9"], "total_flops": "1e9"}, seeds=[0, 1])
    driver = in_memory(spec)
    run_serial(driver, execute)
    assert len(driver.state.trials) == 1


def test_one_configuration_is_trained_to_the_top():
    driver = sweep(table_spec("frontier", 1e12), [curve("a", [3, 2, 1])])
    assert tasks_of(driver) == [("a", 0), ("a", 1), ("a", 2)]
    assert "nothing more fits" in driver.reason or "left" in driver.reason


def test_constant_features_are_no_obstacle():
    curves = [curve(f"c{n}", [3 + n, 2 + n, 1 + n], params=1000, x=0.1, kind="k") for n in range(6)]
    driver = sweep(table_spec("frontier", 1e12), curves)
    assert driver.arena.axes.size is None
    assert driver.arena.regrets(driver.state).tolist() == [0, 0, 0]


def test_equal_losses_are_no_obstacle():
    driver = sweep(table_spec("frontier", 100e9), [curve(f"c{n}", [2.0] * 3, params=100 + n) for n in range(12)])
    assert driver.state.rungs[2]
    assert driver.reason


def test_a_sweep_in_which_everything_diverges_ends():
    driver = sweep(table_spec("frontier", 1e12), [curve(f"c{n}", [math.nan] * 3, params=n + 1) for n in range(9)])
    assert set(driver.state.rungs) == {0}
    assert "no run has given a comparable row" in driver.reason
    assert re.search(r"FLOPs are left$", driver.reason)


def test_max_trials_bounds_proposals_and_the_rest_climbs():
    driver = in_memory(frontier_spec(budget={"max_trials": 5, "total_flops": "1e12"}))
    reason = run_serial(driver, execute)
    assert len(driver.state.trials) == 5
    ok = [t for t in driver.state.trials.values() if all(row["status"] == "ok" for row in t.rows.values())]
    assert {max(trial.rows) for trial in ok} == {2}
    assert reason


def test_the_smallest_cap_pays_one_ascent():
    spec = make_spec()
    driver = in_memory(frontier_spec(budget={"total_flops": spec.ascent_flops(0.2, 2)}))
    # Whatever is drawn first must not diverge.
    run_serial(driver, lambda task: {**execute(task), "status": "ok", "metrics": {"nll": 3.0}})
    assert [len(driver.state.rungs[rung]) for rung in range(3)] == [1, 1, 1]
    assert driver.state.finished


def test_a_cap_that_pays_for_nothing_ends_at_once():
    driver = sweep(table_spec("frontier", 10), [curve("a", [3, 2, 1])])
    assert driver.state.trials == {}
    assert driver.reason == "no run has given a comparable row; 1e1 FLOPs are left"


def test_the_top_is_reached_although_tasks_are_lost():
    tries = Counter()

    def run(driver, task):
        tries[task.trial, task.rung] += 1
        if tries[task.trial, task.rung] < 3 and task.rung == 0:
            # Of two kinds: many of one kind would pause the sweep.
            raise (RuntimeError if tries[task.trial, task.rung] == 1 else ValueError)("lost")
        return driver.arena.execute(task)

    driver = sweep(table_spec("frontier", 40e9), crossing(SIZES), run)
    assert driver.state.lost_flops >= 2e9
    assert driver.state.rungs[2]


def test_runs_that_cannot_be_resumed_jump_to_where_they_are_wanted():
    curves = [
        curve(one.config["config_id"], one.losses, one.params, LADDER, resumable=False) for one in planted(2, copies=1)
    ]
    total = 0.4 * len(curves) * LADDER[-1]
    driver = sweep(table_spec("frontier", total, LADDER), curves)
    jumps = [t for t in driver.state.trials.values() if min(t.rows) > 0 or set(t.rows) != set(range(max(t.rows) + 1))]
    assert jumps
    expected = sum(curves[0].flops[rung] for _, rung in tasks_of(driver))
    assert driver.state.spent_flops == expected <= total


def test_reasons_name_rung_expectation_and_cost():
    driver = sweep(table_spec("frontier", 0.3 * 14 * LADDER[-1], LADDER), planted(0, copies=1))
    reasons = reasons_of(driver)
    assert re.fullmatch(r"size 1 of the opening: N = \d+, 10% up the pool's sizes", reasons[0])
    number = r"-?[\d.]+(e-?\d+)?"
    pattern = (
        rf"for rung \d \(\d+% of the cap spent there, share \d+%\): loss {number} expected \(sd {number}\), "
        rf"best {number}; most expected improvement per FLOP of \d+ \(N = [\d.]+k?, {number} FLOPs to get there\)"
    )
    later = [reason for reason in reasons if "opening" not in reason]
    assert len(later) > 5
    for reason in later:
        assert re.fullmatch(pattern, reason), reason


def test_sizes_are_spread_before_anything_is_known():
    driver = sweep(table_spec("frontier", 0.5 * 42 * LADDER[-1], LADDER), planted(0))
    opening = [trial.params for trial in list(driver.state.trials.values())[:4]]
    assert len(set(opening)) == 4
    assert max(opening) / min(opening) > 20


@pytest.mark.parametrize("slots", [8, 32])
@pytest.mark.parametrize("shares", [None, (0.4, 0.1, 0.1, 0.1, 0.3)])
def test_the_opening_keeps_to_its_share_wherever_models_enter(slots, shares):
    """Large models have too few steps at the lower rungs: they enter above, and count as well."""
    parameters = {"params": {"distribution": "log_uniform_values", "min": 3e3, "max": 2e6}}
    total = 1.5e12 if shares is None else 0.6e12
    budget = {"ladder_flops": ["1e9", "4e9", "16e9", "64e9", "256e9"], "total_flops": total}
    scheduler = {"type": "frontier", **({} if shares is None else {"shares": list(shares)})}
    driver = in_memory(make_spec(parameters=parameters, budget=budget, scheduler=scheduler, scaling={"slots": slots}))
    asked = []
    while isinstance(answer := driver.next_task(), Task):
        asked.append(answer)
    assert {task.rung for task in asked} >= {0, 1, 2}
    assert len(asked) > 4
    assert sum(driver.state.nominal_flops.values()) <= driver.policy.shares[0] * total
    assert len(asked) == slots or "the first rows decide" in answer.reason


def test_every_decision_could_be_paid():
    """The whole way of each step fitted under the cap when it was taken."""
    curves = planted(3, copies=2)
    spec = table_spec("frontier", 0.1 * len(curves) * LADDER[-1], LADDER)
    driver = sweep(spec, curves)
    state = SweepState()
    for record in driver._ledger.records:
        if record["kind"] == "task":
            meant, task = record["meant_for"], record["task"]
            whole = LADDER[meant] - (LADDER[task["from_rung"]] if task["from_rung"] is not None else 0)
            assert state.spent_flops + whole <= spec.budget.total_flops
        state.apply(record)
    assert reached(driver)


def two_rungs(total_flops, **changes):
    """One ascent is 11e9 FLOPs at most; no rate diverges by itself."""
    rates = {"distribution": "log_uniform_values", "min": 1e-4, "max": 5e-2}
    return frontier_spec(
        parameters={"params": {"distribution": "log_uniform_values", "min": 300, "max": 10000}, "learning_rate": rates},
        budget={"ladder_flops": ["1e9", "1e10"], "total_flops": total_flops},
        **changes,
    )


@pytest.mark.parametrize("status", ["diverged", "oom"])
def test_a_top_run_without_a_value_leaves_what_is_kept_for_the_top(status):
    driver, lost = in_memory(two_rungs(29e9)), []

    def run(task):
        row = execute(task)
        if task.rung == 1 and not lost:
            lost.append(task.trial)
            row |= {"status": status, "metrics": {}, "checkpoint": None}
        return row

    run_serial(driver, run)
    assert [row["status"] for row in driver.state.rungs[1].values()] == [status, "ok"]


@pytest.mark.parametrize("seeds", [[0], [0, 1], [0, 1, 2]])
def test_what_is_kept_for_further_seeds_leaves_a_way_to_the_top(seeds):
    spec = two_rungs(1.2e10, seeds=seeds)
    assert spec.ascent_flops(spec.cooldown_fractions[1], 1) < 1.2e10
    driver = in_memory(spec)
    run_serial(driver, execute)
    assert driver.state.rungs.get(1)
