"""The policy: the top rung is always served, the cap keeps its shape, and nothing that diverged goes on."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bfm.sweep.driver import run_serial
from bfm.sweep.policies.allotment import allot
from bfm.sweep.policies.strata import StrataPolicy
from bfm.sweep.space import FeasibleSet
from bfm.sweep.state import SweepState
from tests.sweep.world import PlantedCosts, execute, in_memory, make_spec, planted_loss


@given(
    costs=st.lists(st.integers(1, 1000), min_size=1, max_size=5).map(sorted),
    surplus=st.floats(1, 300),
    most=st.integers(1, 100),
    eta=st.floats(1.1, 8),
    data=st.data(),
)
def test_allotments_keep_under_the_cap_and_serve_every_rung(costs, surplus, most, eta, data):
    total = math.ceil(sum(costs) * surplus)
    weights = data.draw(st.none() | st.lists(st.floats(0.1, 1), min_size=len(costs), max_size=len(costs)))
    shares = None if weights is None else [weight / sum(weights) for weight in weights]
    counts = allot(costs, total, most, eta, shares)
    assert sum(n * c for n, c in zip(counts, costs, strict=True)) <= total
    assert min(counts) >= 1
    assert list(counts) == sorted(counts, reverse=True)
    assert counts[0] <= most


def test_allotments_follow_eta_then_the_cap():
    assert allot([1, 1, 1], 13, 100, 3.0) == (9, 3, 1)
    # Few trials and a large cap: more of them go on.
    assert allot([1, 3, 9], 52, 4, 3.0) == (4, 4, 4)


def test_shares_of_the_spend_are_kept():
    assert allot([1, 4, 16], 1600, 1000, 3.0, [0.5, 0.25, 0.25]) == (800, 100, 25)


def finish(spec, run=execute):
    driver = in_memory(spec)
    driver.reason = run_serial(driver, run)
    return driver


@pytest.mark.parametrize("method", ["random", "optuna"])
def test_the_cap_is_used_and_every_rung_has_its_places(method):
    driver = finish(make_spec(method=method))
    for rung, places in enumerate(driver.policy.places):
        assert len(driver.state.rungs[rung]) >= places
    total = driver.spec.budget.total_flops
    assert 0.97 * total < driver.state.spent_flops <= total
    assert "the cap is reached" in driver.reason


def test_the_top_rung_is_served_under_the_smallest_cap():
    spec = make_spec()
    least = spec.ascent_flops(0.2, 2)
    driver = finish(make_spec(budget={"total_flops": least}))
    assert [len(driver.state.rungs[rung]) for rung in range(3)] == [1, 1, 1]


def test_the_top_rung_is_served_although_much_work_is_lost():
    """Entry tasks are lost twice before they give a row, so the cap no longer pays for all that was planned."""
    tries = Counter()

    def run(task):
        tries[task.trial, task.rung] += 1
        if tries[task.trial, task.rung] < 3 and task.rung == 0:
            raise RuntimeError("lost")
        return execute(task)

    driver = finish(make_spec(budget={"total_flops": "32e9"}, scheduler={"strata": 1}), run)
    assert driver.policy.places == (9, 3, 1)
    assert driver.state.lost_flops > 0.25 * driver.spec.budget.total_flops
    assert len(driver.state.rungs[2]) == 1


def test_max_trials_bounds_proposals_and_the_rest_climbs():
    driver = finish(make_spec(budget={"max_trials": 4, "total_flops": "1e12"}))
    assert [len(driver.state.rungs[rung]) for rung in range(3)] == [4, 4, 4]
    assert "every configuration went as far as it can" in driver.reason


@given(bad=st.sets(st.integers(0, 60)), kind=st.sampled_from(["nan", "diverged", "oom", "missing C"]))
@settings(max_examples=20, deadline=None)
def test_what_cannot_be_compared_is_never_promoted(bad, kind):
    def run(task):
        row = execute(task)
        if int(task.trial[1:]) in bad:
            match kind:
                case "nan":
                    row["metrics"]["nll"] = math.nan
                case "missing C":
                    row["path_flops"] //= 2
                    row["task_flops"] //= 2
                case status:
                    row |= {"status": status, "metrics": {}}
        return row

    driver = finish(make_spec(), run)
    for trial in driver.state.trials.values():
        if trial.number in bad:
            assert set(trial.rows) <= {0}
    # And the sweep went on to the top with the others; those at least as large as one that ran out of memory stay.
    if kind != "oom":
        assert set(driver.state.rungs) == {0, 1, 2}


def test_a_sweep_in_which_everything_diverges_ends():
    driver = finish(make_spec(), lambda task: {**execute(task), "status": "diverged", "metrics": {}})
    assert set(driver.state.rungs) == {0}
    assert driver.reason


def test_large_models_go_on_although_they_look_worse():
    """At the entry rung the small stratum leads by far; the best of the large one is promoted all the same."""

    def run(task):
        row = execute(task)
        row["metrics"]["nll"] = math.log(task.config["params"])
        return row

    driver = finish(make_spec(scheduler={"eta": 3, "strata": 2}), run)
    (edge,) = FeasibleSet(driver.spec, PlantedCosts()).size_edges(2)
    sizes = [driver.state.trials[trial].params for trial in driver.state.rungs[1]]
    assert sum(size > edge for size in sizes) >= len(sizes) // 3


def test_a_place_that_is_left_goes_to_the_large():
    """Two strata of two, three places: one each by quota, and the third to the large ones, worse as they look."""
    parameters = {"params": {"values": [400, 500, 5000, 6000]}, "learning_rate": {"value": 1e-3}}
    budget = {"ladder_flops": ["1e9", "4e9"], "total_flops": "14e9"}
    spec = make_spec(method="grid", parameters=parameters, budget=budget, scheduler={"strata": 2})
    driver = finish(spec, lambda task: {**execute(task), "metrics": {"nll": task.config["params"]}})
    assert driver.policy.places == (4, 3)
    assert [driver.state.trials[trial].params for trial in driver.state.rungs[1]] == [400, 5000, 6000]


def test_metrics_to_maximise_are_maximised():
    """recall is 1 / nll here, so both directions must decide alike."""
    by_nll, by_recall = (finish(make_spec(metric={"name": name})) for name in ("nll", "recall@10"))
    assert by_nll.state.rungs.keys() == by_recall.state.rungs.keys()
    for rung in by_nll.state.rungs:
        assert list(by_nll.state.rungs[rung]) == list(by_recall.state.rungs[rung])


def test_equal_values_are_decided_by_number():
    driver = finish(make_spec(scheduler={"strata": 1}), lambda task: {**execute(task), "metrics": {"nll": 1.0}})
    promoted = sorted(int(trial[1:]) for trial in driver.state.rungs[1])
    assert promoted == list(range(len(promoted)))


def test_seeds_of_a_configuration_go_together():
    driver = finish(make_spec(seeds=3))
    state = driver.state
    for rung in range(3):
        members = Counter(state.trials[trial].number // 3 for trial in state.rungs[rung])
        assert set(members.values()) == {3}
    trials = list(state.trials.values())
    for first in range(0, len(trials), 3):
        block = trials[first : first + 3]
        assert [trial.seed for trial in block] == [0, 1, 2]
        assert len({json.dumps(trial.config) for trial in block}) == 1


def test_one_diverged_seed_keeps_the_configuration_back():
    def run(task):
        row = execute(task)
        return {**row, "status": "diverged", "metrics": {}} if task.seed == 1 and task.trial < "t00020" else row

    driver = finish(make_spec(seeds=2), run)
    assert all(trial >= "t00020" for trial in driver.state.rungs[1])


def test_decisions_say_why_in_numbers():
    driver = in_memory(make_spec())
    for _ in range(8):
        task = driver.next_task()
        driver.report(task.task_id, execute(task))
    policy = StrataPolicy(driver.spec, FeasibleSet(driver.spec, PlantedCosts()))
    decision = policy.decide(driver.state, driver.available_flops, True)
    reasons = [record["reason"] for record in driver._ledger.records if record["kind"] == "task"]
    assert reasons[0] == f"configuration 1 of {policy.places[0]} at the entry rung"
    assert any("is the best of" in reason and "N = " in reason for reason in [*reasons, decision.reason])


def test_decisions_are_pure():
    driver = finish(make_spec())
    records = driver._ledger.records
    for cut in range(0, len(records), 7):
        state = SweepState.fold(records[:cut])
        if state.open_tasks:
            continue
        decisions = {str(driver.policy.decide(state, 10**11, True)) for _ in range(2)}
        assert len(decisions) == 1


def test_a_leader_is_the_best_of_its_stratum():
    """Against a plain reading of the rows at every promotion of the first rung, before the rungs settle."""
    driver = finish(make_spec(scheduler={"strata": 1}))
    state = SweepState()
    for record in driver._ledger.records:
        if record["kind"] == "task" and record["task"]["rung"] == 1:
            waiting = [t for t in state.rungs[0] if t not in state.members(1) and state.rungs[0][t]["status"] == "ok"]
            best = min(waiting, key=lambda t: planted_loss(state.trials[t].config, 1e9))
            assert record["task"]["trial"] == best
        state.apply(record)


def test_promotion_is_one_rung_at_a_time():
    driver = finish(make_spec())
    for trial in driver.state.trials.values():
        assert sorted(trial.rows) == list(range(len(trial.rows)))
