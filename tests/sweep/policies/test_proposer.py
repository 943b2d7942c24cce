"""Proposals: feasible, reproducible from the ledger, and better than chance."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from bfm.errors import InfeasibleError
from bfm.sweep.ledger.state import SweepState
from bfm.sweep.ledger.task import Task
from bfm.sweep.policies.arena import OPTUNA
from bfm.sweep.policies.proposer import Proposer
from bfm.sweep.space.space import FeasibleSet
from tests.sweep.serial import run_serial
from tests.sweep.world import PlantedCosts, execute, in_memory, make_spec

LOG = {"distribution": "log_uniform_values"}
FOUR_AXES = {
    "params": {**LOG, "min": 300, "max": 30000},
    "learning_rate": {**LOG, "min": 1e-4, "max": 1e-1},
    "embedder_share": {**LOG, "min": 1e-3, "max": 0.5},
    "weight_decay": {**LOG, "min": 1e-3, "max": 1},
}


def proposer(spec):
    return Proposer(FeasibleSet(spec, PlantedCosts()))


def first(spec, state, number):
    """The first point of a pool."""
    return proposer(spec).pool(state, number)[0]


def first_of_optuna(spec, state, number):
    return next(proposal for proposal in proposer(spec).pool(state, number) if proposal.source == OPTUNA)


def hilly(task):
    """The planted world with a fourth axis that matters."""
    row = execute(task)
    row["metrics"]["nll"] += 0.05 * math.log(task.config["weight_decay"] / 0.03) ** 2
    return row


def test_optuna_beats_random_proposals_at_equal_flops(monkeypatch):
    """20 seeds in pairs: of a fair coin, 15 wins or more come in 2 % of all cases."""
    monkeypatch.setattr(Proposer, "optuna_draws", 4)

    def best(method, seed):
        budget = {"ladder_flops": ["1e9"], "total_flops": "40e9"}
        driver = in_memory(make_spec(method=method, seeds=[seed], parameters=FOUR_AXES, budget=budget))
        run_serial(driver, hilly)
        values = [row["metrics"]["nll"] for row in driver.state.rungs[0].values() if row["status"] == "ok"]
        return min(values), driver.state.spent_flops

    optuna, random = ([best(method, seed) for seed in range(20)] for method in ("optuna", "random"))
    gains = np.array([r[0] - o[0] for o, r in zip(optuna, random, strict=True)])
    assert np.mean([o[1] for o in optuna]) <= 1.01 * np.mean([r[1] for r in random])
    assert (gains > 0).sum() >= 15
    assert gains.mean() > 2 * gains.std(ddof=1) / math.sqrt(len(gains))


def test_a_rebuilt_study_proposes_the_same():
    driver = in_memory(make_spec(method="optuna", parameters=FOUR_AXES))
    run_serial(driver, hilly)
    state, checked = SweepState(), 0
    for record in driver._ledger.records:
        if record["kind"] == "proposal" and record["number"] % 3 == 0:
            pool = proposer(driver.spec).pool(state, record["number"])
            (again,) = [proposal for proposal in pool if proposal.config == record["config"]]
            assert (again.source, again.rejected) == (record["source"], record["rejected"])
            checked += record["source"] == OPTUNA
        state.apply(record)
    assert checked > 3


def test_optuna_learns_from_one_rung_only():
    """The values of other rungs may be anything: the proposal does not change."""
    driver = in_memory(make_spec(method="optuna"))
    run_serial(driver, execute)
    state = driver.state
    assert len(state.rungs[1]) >= 10
    before = first_of_optuna(driver.spec, state, 999)
    for row in state.rungs[0].values():
        row["metrics"]["nll"] = -1.0
    assert first_of_optuna(driver.spec, state, 999) == before
    for row in state.rungs[1].values():
        row["metrics"]["nll"] = abs(math.log(row["params"] / 9000))
    assert first_of_optuna(driver.spec, state, 999) != before


def test_proposals_of_one_moment_keep_away_from_each_other(monkeypatch):
    """16 slots, after 40 rows: what runs is told to Optuna; beside it, what would be proposed if it were not."""

    def spread(configs):
        points = np.log10([[config[name] for name in FOUR_AXES] for config in configs])
        return float(np.mean([np.linalg.norm(one - other) for one in points for other in points]))

    monkeypatch.setattr(Proposer, "optuna_draws", 4)
    gains = []
    for seed in range(12):
        budget = {"ladder_flops": ["1e9"], "total_flops": "100e9"}
        spec = make_spec(method="optuna", seeds=[seed], parameters=FOUR_AXES, budget=budget, scaling={"slots": 16})
        driver = in_memory(spec)
        for _ in range(40):
            task = driver.next_task()
            driver.report(task.task_id, hilly(task))
        blind = [first_of_optuna(spec, driver.state, 40 + number).config for number in range(16)]
        told = []
        while isinstance(task := driver.next_task(), Task):
            told.append(task.config)
        assert len(told) == 16
        gains.append(math.log(spread(told) / spread(blind)))
    assert np.mean(gains) > 2 * np.std(gains, ddof=1) / math.sqrt(len(gains))
    assert sum(gain > 0 for gain in gains) >= 8


def test_optuna_keeps_away_from_what_diverged():
    def run(task):
        return {**execute(task), "metrics": {"nll": 3.0 if task.config["learning_rate"] < 1e-3 else math.nan}}

    driver = in_memory(make_spec(method="optuna", budget={"ladder_flops": ["1e9"], "total_flops": "80e9"}))
    run_serial(driver, run)
    rates = [trial.config["learning_rate"] for trial in driver.state.trials.values() if trial.source == "optuna"]
    assert np.mean(np.array(rates) < 1e-3) > 0.7


@pytest.mark.parametrize("method", ["optuna", "random"])
def test_every_proposal_is_feasible_and_the_others_are_counted(method):
    parameters = {"params": {**LOG, "min": 1000, "max": 1e5}, "learning_rate": {**LOG, "min": 1e-4, "max": 1e-2}}
    driver = in_memory(make_spec(method=method, parameters=parameters))
    run_serial(driver, execute)
    feasible = FeasibleSet(driver.spec, PlantedCosts())
    for trial in driver.state.trials.values():
        values = {name: trial.config[name] for name in parameters}
        assert feasible.judge(values).config.as_dict() == trial.config
    assert driver.state.rejected["fewer than 100 steps at rung 1e9"] > 0


def test_a_space_that_runs_dry_ends_the_sweep():
    parameters = {"params": {"values": [500, 1000, 2000]}, "learning_rate": {"values": [1e-3, 2e-3]}}
    for method in ("random", "optuna", "grid"):
        driver = in_memory(make_spec(method=method, parameters=parameters, budget={"total_flops": "1e12"}))
        reason = run_serial(driver, execute)
        assert len(driver.state.trials) == 6
        assert "no further step" in reason


def test_a_finite_space_is_tried_to_its_last_point():
    """Also where random draws bring the same points again and again."""
    parameters = {
        "params": {"values": [500 + 100 * place for place in range(16)]},
        "learning_rate": {"values": [1e-3 + 1e-4 * place for place in range(8)]},
    }
    driver = in_memory(
        make_spec(
            method="random",
            scheduler={"type": "frontier"},
            parameters=parameters,
            budget={"ladder_flops": ["1e9"], "total_flops": "1e12"},
        )
    )
    run_serial(driver, execute)
    assert len(driver.state.trials) == 128


def test_another_constant_makes_other_points():
    """A sweep that goes on with another value of what does not vary has all of its points before it."""
    for method in ("grid", "random"):
        parameters = {"params": {"values": [500, 1000, 3000]}, "learning_rate": {"value": 0.004}}
        before = in_memory(make_spec(method=method, parameters=parameters, budget={"total_flops": "500e9"}))
        run_serial(before, execute)
        changed = {**parameters, "learning_rate": {"value": 0.01}}
        spec = make_spec(method=method, parameters=changed, budget={"total_flops": "500e9"})
        driver = in_memory(spec, before._ledger.records, extend=True)
        run_serial(driver, execute)
        assert len(driver.state.trials) == 2 * len(before.state.trials) == 6


def test_a_grid_is_walked_in_order():
    parameters = {"params": {"values": [500, 1000, 1e6]}, "learning_rate": {"values": [1e-3, 2e-3]}}
    driver = in_memory(make_spec(method="grid", parameters=parameters, budget={"total_flops": "1e12"}))
    run_serial(driver, execute)
    points = [(t.config["learning_rate"], t.config["params"]) for t in driver.state.trials.values()]
    assert points == [(rate, size) for rate in (1e-3, 2e-3) for size in (500, 1000)]
    assert driver.state.rejected == {"fewer than 100 steps at rung 1e9": 2}


def test_no_feasible_point_names_the_bound():
    spec = make_spec(parameters={"params": {**LOG, "min": 1e5, "max": 1e6}})
    with pytest.raises(InfeasibleError, match="fewer than 100 steps"):
        in_memory(spec)
    grid = make_spec(method="grid", parameters={"params": {"values": [1e5, 1e6]}, "learning_rate": {"value": 1e-3}})
    with pytest.raises(InfeasibleError, match="fewer than 100 steps"):
        in_memory(grid)


def test_every_kind_of_axis_reaches_optuna_and_comes_back():
    parameters = {
        "params": {**LOG, "min": 300, "max": 3000},
        "learning_rate": {"values": [0.004, 0.001, 0.002]},
        "groups_per_step": {"min": 1, "max": 3},
        "window": {"distribution": "q_uniform", "min": 10, "max": 100, "q": 10},
        "depth": {"values": [None, 1, 2]},
        "averaging": {"values": [False, True]},
        "embedder_share": {"min": 0, "max": 0.5},
    }
    driver = in_memory(make_spec(method="optuna", parameters=parameters))
    run_serial(driver, execute)
    trials = [trial for trial in driver.state.trials.values() if trial.source == "optuna"]
    assert len(trials) > 10
    for trial in trials:
        config = trial.config
        assert config["learning_rate"] in (0.001, 0.002, 0.004)
        assert config["window"] % 10 == 0
        assert config["depth"] in (None, 1, 2)
        assert isinstance(config["averaging"], bool)
        assert isinstance(config["groups_per_step"], int)


def test_every_proposal_has_draws_of_its_own():
    driver = in_memory(make_spec())
    run_serial(driver, execute)
    assert not driver.state.rejected


def test_other_seeds_propose_other_points():
    spec = make_spec()
    one, two = (first(replace(spec, seeds=(seed,)), SweepState(), 0) for seed in (0, 1))
    assert one.config != two.config


@pytest.mark.parametrize("method", ["optuna", "random"])
def test_a_pool_is_feasible_untried_and_the_same_again(method):
    driver = in_memory(make_spec(method=method))
    run_serial(driver, execute)
    state, number = driver.state, len(driver.state.trials)
    pool = proposer(driver.spec).pool(state, number)
    assert pool == proposer(driver.spec).pool(state, number)
    assert 80 <= len(pool) <= 112
    points = {(p.config["params"], p.config["learning_rate"]) for p in pool}
    assert len(points) == len(pool)
    assert points.isdisjoint((t.config["params"], t.config["learning_rate"]) for t in state.trials.values())
    assert all(300 <= params <= 10000 and 1e-4 <= rate <= 1e-1 for params, rate in points)
    sources = {proposal.source for proposal in pool}
    assert sources == ({"optuna", "random"} if method == "optuna" else {"random"})
    assert pool != proposer(driver.spec).pool(state, number + 16)


def test_the_pool_of_a_grid_is_what_was_not_tried():
    parameters = {"params": {"values": [500, 1000, 3000]}, "learning_rate": {"values": [0.001, 0.004]}}
    spec = make_spec(method="grid", parameters=parameters, budget={"max_trials": 4})
    driver = in_memory(spec)
    whole = {(p.config["params"], p.config["learning_rate"]) for p in proposer(spec).pool(SweepState(), 0)}
    assert len(whole) == 6
    run_serial(driver, execute)
    tried = {(t.config["params"], t.config["learning_rate"]) for t in driver.state.trials.values()}
    left = {(p.config["params"], p.config["learning_rate"]) for p in proposer(spec).pool(driver.state, 4)}
    assert len(tried) == 4
    assert left == whole - tried


def test_a_pool_is_the_same_whenever_it_is_first_asked_for():
    """Rows that arrive between two proposals do not enter, so a driver that resumes between them sees what it saw."""
    spec = make_spec(method="optuna", scheduler={"type": "frontier"}, budget={"total_flops": "400e9"})
    driver = in_memory(spec)
    run_serial(driver, execute)
    state, first, drawn, compared = SweepState(), {}, 0, 0
    for record in driver._ledger.records:
        state.apply(record)
        if record["kind"] in ("proposal", "row") and state.num_proposals > 10:
            pool = [(proposal.source, proposal.config) for proposal in proposer(spec).pool(state, state.num_proposals)]
            drawn += any(source == "optuna" for source, _ in pool)
            compared += state.num_proposals in first
            assert first.setdefault(state.num_proposals, pool) == pool
    assert drawn > 10
    assert compared > 10
