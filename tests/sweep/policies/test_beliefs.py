"""What the frontier policy believes of very many candidates, and of bounds where no row is."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bfm.sweep.policies import beliefs
from bfm.sweep.policies.beliefs import Beliefs
from bfm.sweep.policies.ground import View
from bfm.sweep.space.metric import Constraint, Metric
from tests.sweep.curves import curve, sweep, table_spec
from tests.sweep.world import execute, in_memory, make_spec

LADDER = (10**8, 4 * 10**8, 16 * 10**8, 64 * 10**8)
RECALL = Metric("recall@10", "maximize")


def spread(seed, count):
    """Sizes with a nuisance axis that the loss falls with; curves cross."""
    rng = np.random.default_rng(seed)
    curves = []
    for n in range(count):
        size, x = math.exp(rng.uniform(math.log(100), math.log(10_000))), float(rng.uniform(-1, 1))
        losses = [1.0 + 40.0 / size**0.5 + 300.0 / (c / (6 * size)) ** 0.5 - 0.4 * x for c in LADDER]
        curves.append(curve(f"c{n:03d}", losses, round(size), LADDER, x=x, kind="ab"[n % 2]))
    return curves


def test_a_glance_at_very_many_candidates_finds_what_a_look_at_all_does(monkeypatch):
    curves = spread(0, 160)
    agreed = []
    screen = Beliefs.screen

    def compared(self, ways):
        best = []
        for most in (math.inf, 30):
            monkeypatch.setattr(beliefs, "CLOSELY", most)
            kept = screen(self, ways)
            assert len(kept) == min(most, len(ways))
            best.append(kept.lines_M[np.argmax(self.judge(kept).improvement_M / kept.cost_M.astype(float))])
        if len(ways) > 30:
            agreed.append(best[0] == best[1])
        return kept

    monkeypatch.setattr(Beliefs, "screen", compared)
    glanced = sweep(table_spec("frontier", 0.06 * len(curves) * LADDER[-1], LADDER), curves)
    assert len(agreed) > 100
    assert np.mean(agreed) > 0.9
    assert glanced.arena.regrets(glanced.state)[-1] < 0.02


@pytest.mark.parametrize("per_rung", [0.0, 0.05, -0.05])
def test_what_breaks_a_bound_is_not_the_first_to_climb_where_no_row_is(per_rung):
    """Whether the bounded metric stays, rises or falls with C: as long as others keep to it, they go first."""
    for seed in range(3):
        curves = spread(seed, 80)

        def run(driver, task, seed=seed):
            row = driver.arena.execute(task)
            noise = 0.01 * np.random.default_rng([seed, int(task.trial[1:]), task.rung]).normal()
            recall = 0.5 - 0.3 * task.config["x"] + per_rung * task.rung + noise
            row["metrics"]["recall@10"] = float(np.clip(recall, 0.01, 0.99))
            return row

        spec = table_spec(
            "frontier",
            0.1 * len(curves) * LADDER[-1],
            LADDER,
            constraints=(Constraint(RECALL, 0.5),),
        )
        state = sweep(spec, curves, run).state
        first = {}
        for trial, rung in state.arrivals:
            first.setdefault(rung, trial)
        assert max(first) == 3, "nobody has climbed"
        for rung, trial in first.items():
            below = [row for at, row in state.trials[trial].rows.items() if at == rung - 1]
            assert all(row["metrics"]["recall@10"] >= 0.5 for row in below)


def test_a_run_that_diverged_is_no_frontier():
    """Beside a row that breaks a bound it would stand for that one's loss."""
    space = {"metric": {"name": "nll", "constraints": ["recall@10 >= 0.2"]}, "scheduler": {"type": "frontier"}}
    driver = in_memory(make_spec(**space))
    for row in ({"metrics": {"nll": 3.0, "recall@10": 0.1}}, {"status": "diverged", "metrics": {}}):
        task = driver.next_task()
        driver.report(task.task_id, {**execute(task), **row})
    model = Beliefs(driver.spec, driver.arena)._models[0]
    model.take(View(driver.spec, driver.arena, driver.state, driver.spec.budget.total_flops))
    assert model._fitted.held == frozenset()
    assert model._fitted.best[1] == math.inf
