"""Near-ties at the top are trained with all seeds, and the winner is the best mean."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bfm.sweep.ledger.winner import winner
from bfm.sweep.policies.beliefs import Beliefs
from bfm.sweep.policies.replicas import REPLICA, kept_flops
from tests.sweep.serial import run_serial
from tests.sweep.world import execute, in_memory, make_spec

GRID = {"params": {"values": [1000, 1100, 3000]}, "learning_rate": {"values": [0.003, 0.0031]}}


def spec(seeds, **changes):
    return make_spec(
        scheduler={"type": "frontier"},
        method="grid",
        parameters=GRID,
        seeds=seeds,
        budget={"total_flops": "600e9"},
        **changes,
    )


def noisy(task):
    """All configurations are alike but for a noise of the seed that is larger than what tells them apart."""
    row = execute(task)
    if row["status"] == "ok":
        size = task.config["params"]
        lucky = 0.02 if (task.seed, size) == (0, 3000) else 0.0
        row["metrics"]["nll"] = (
            3.0 + 30.0 / task.rung_flops**0.2 + 1e-6 * size + 0.001 * (hash((size, task.seed)) % 7) - lucky
        )
    return row


def test_one_seed_has_no_replicas():
    driver = in_memory(spec([0]))
    run_serial(driver, noisy)
    assert kept_flops(driver.spec, driver.state) == 0
    assert all(trial.source != REPLICA for trial in driver.state.trials.values())
    assert winner(driver.state, driver.spec)["seeds"] == 1


def test_near_ties_are_trained_with_all_seeds_and_the_mean_decides(monkeypatch):
    driver = in_memory(spec([0, 1, 2]))
    monkeypatch.setattr(Beliefs, "noise", property(lambda self: 0.05))
    run_serial(driver, noisy)
    replicas = [trial for trial in driver.state.trials.values() if trial.source == REPLICA]
    assert replicas
    assert {trial.seed for trial in replicas} <= {1, 2}
    assert all(set(trial.rows) == {2} for trial in replicas)
    best = winner(driver.state, driver.spec)
    assert best["seeds"] == 3
    rows = driver.state.rungs[2]
    same = [row["metrics"]["nll"] for name, row in rows.items() if driver.state.trials[name].config == best["config"]]
    assert best["value"] == pytest.approx(sum(same) / 3)
    assert driver.state.spent_flops <= driver.spec.budget.total_flops


def test_a_clear_leader_needs_no_replica_and_the_rest_is_spent(monkeypatch):
    driver = in_memory(spec([0, 1]))
    monkeypatch.setattr(Beliefs, "noise", property(lambda self: 1e-12))
    run_serial(driver, execute)
    assert all(trial.source != REPLICA for trial in driver.state.trials.values())


@pytest.mark.parametrize(("single", "named"), [(4.5, 3000), (5.006, 1000)])
def test_one_seed_far_ahead_of_all_seeds_of_the_others_is_the_winner(single, named):
    driver = in_memory(spec([0, 1]))
    losses = {(1000, 0): 5.00, (1000, 1): 5.01, (1100, 0): 5.005, (1100, 1): 5.02, (3000, 0): single}

    def measured(task):
        row = execute(task)
        if row["status"] == "ok":
            row["metrics"]["nll"] = losses.get((task.config["params"], task.seed), 9.0)
        return row

    run_serial(driver, measured)
    for params, seed in [(1000, 1), (1100, 1)]:
        trial = next(one for one in driver.state.trials.values() if one.config["params"] == params)
        top = driver.state.rungs[2]
        first = next(row for name, row in top.items() if driver.state.trials[name].key == trial.key)
        again = replace(trial, trial=f"{trial.trial}-{seed}", seed=seed)
        driver.state.trials[again.trial] = again
        top[again.trial] = {**first, "trial": again.trial, "metrics": {"nll": losses[params, seed]}}
    best = winner(driver.state, driver.spec)
    assert best["config"]["params"] == named
    assert best["seeds"] == (1 if named == 3000 else 2)
