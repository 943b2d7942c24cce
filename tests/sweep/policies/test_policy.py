"""Any policy: the allotment of a cap to rungs, what ends a sweep, and that nothing that diverged goes on."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bfm.sweep.ledger.state import SweepState
from bfm.sweep.policies.allotment import allot
from tests.sweep.serial import run_serial
from tests.sweep.world import execute, in_memory, make_spec, spoilt


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
def test_the_cap_is_used_and_every_rung_has_rows(method):
    driver = finish(make_spec(method=method))
    assert set(driver.state.rungs) == {0, 1, 2}
    total = driver.spec.budget.total_flops
    assert 0.97 * total < driver.state.spent_flops <= total
    assert "no further step that the cap allows" in driver.reason


def test_the_top_rung_is_served_under_the_smallest_cap():
    spec = make_spec()
    least = spec.ascent_flops(0.2, 2)
    driver = finish(make_spec(scheduler={"type": "random"}, budget={"total_flops": least}))
    assert [len(driver.state.rungs[rung]) for rung in range(3)] == [1, 1, 1]


def test_max_trials_bounds_proposals_and_the_rest_climbs():
    driver = finish(make_spec(scheduler={"type": "random"}, budget={"max_trials": 4, "total_flops": "1e12"}))
    assert [len(driver.state.rungs[rung]) for rung in range(3)] == [4, 4, 4]
    assert "no further step" in driver.reason


@given(bad=st.sets(st.integers(0, 60)), kind=st.sampled_from(["nan", "diverged", "oom", "missing C"]))
@settings(max_examples=20, deadline=None)
def test_what_cannot_be_compared_is_never_promoted(bad, kind):
    driver = finish(make_spec(), spoilt(bad, kind))
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


def test_metrics_to_maximise_are_maximised():
    """recall is 1 / nll here, so both directions must decide alike."""
    by_nll, by_recall = (finish(make_spec(metric={"name": name})) for name in ("nll", "recall@10"))
    assert by_nll.state.rungs.keys() == by_recall.state.rungs.keys()
    for rung in by_nll.state.rungs:
        assert list(by_nll.state.rungs[rung]) == list(by_recall.state.rungs[rung])


def test_equal_values_are_decided_by_number():
    driver = finish(make_spec(), lambda task: {**execute(task), "status": "ok", "metrics": {"nll": 1.0}})
    promoted = sorted(int(trial[1:]) for trial in driver.state.rungs[1])
    assert promoted == list(range(len(promoted)))


def test_decisions_are_pure():
    driver = finish(make_spec())
    records = driver._ledger.records
    for cut in range(0, len(records), 7):
        state = SweepState.fold(records[:cut])
        if state.open_tasks:
            continue
        decisions = {str(driver.policy.decide(state, 10**11)) for _ in range(2)}
        assert len(decisions) == 1


def test_promotion_is_one_rung_at_a_time():
    driver = finish(make_spec())
    for trial in driver.state.trials.values():
        assert sorted(trial.rows) == list(range(len(trial.rows)))
