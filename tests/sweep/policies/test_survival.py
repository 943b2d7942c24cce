"""Regions that diverge are learnt and left alone, whatever the losses beside them promise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bfm.sweep.policies import survival
from bfm.sweep.policies.arena import Proposal
from bfm.sweep.policies.survival import Survival
from tests.sweep.curves import begin, curve, sweep, table_spec, tasks_of

LADDER = (10**8, 4 * 10**8, 16 * 10**8, 64 * 10**8)
COUNT = 240


def cliff(seed, from_rung=0, edge=1.0):
    """The loss falls with the learning rate up to an edge (lower for large models), beyond which nothing is finite."""
    rng = np.random.default_rng(seed)
    curves = []
    for n in range(COUNT):
        size = math.exp(rng.uniform(math.log(100), math.log(10_000)))
        log_rate, x, y = rng.uniform(-3, 3), rng.uniform(-1, 1), rng.uniform(-1, 1)
        law = [1.0 + 40.0 / size**0.5 + 300.0 / (c / (6 * size)) ** 0.5 for c in LADDER]
        bowls = 0.3 * ((x - 0.3) ** 2 + (y + 0.2) ** 2)
        losses = [loss - 0.15 * log_rate + bowls + 0.01 * rng.normal() for loss in law]
        if log_rate > edge - 0.3 * math.log(size / 1000):
            losses[from_rung:] = [math.nan] * (len(losses) - from_rung)
        curves.append(curve(f"c{n:03d}", losses, round(size), LADDER, rate=math.exp(log_rate), x=x, y=y))
    return curves


def outcome(curves, fraction=0.03):
    """(trials that diverged, FLOPs that went into diverged rows over the cap, regret at the top)."""
    driver = sweep(table_spec("frontier", fraction * len(curves) * LADDER[-1], LADDER), curves)
    rows = [row for trial in driver.state.trials.values() for row in trial.rows.values() if row["status"] == "diverged"]
    wasted = sum(row["task_flops"] for row in rows) / driver.spec.budget.total_flops
    return len(rows), wasted, driver.arena.regrets(driver.state)[-1]


@pytest.mark.parametrize("from_rung", [0, 2])
def test_a_region_that_diverges_is_left_although_the_trend_points_into_it(monkeypatch, from_rung):
    """At its entry, or only two rungs up: against a policy that knows diverged rows as bad losses alone."""
    worlds = [cliff(seed, from_rung) for seed in range(4)]
    learnt = np.array([outcome(curves) for curves in worlds])
    monkeypatch.setattr(Survival, "chance_M", lambda self, ways: np.ones(len(ways)))
    blind = np.array([outcome(curves) for curves in worlds])
    assert learnt[:, 0].mean() < 0.75 * blind[:, 0].mean()
    assert learnt[:, 1].mean() < 0.75 * blind[:, 1].mean()
    assert learnt[:, 2].mean() <= blind[:, 2].mean() + 0.01


def test_while_nothing_has_diverged_there_is_nothing_to_learn(monkeypatch):
    curves = cliff(0, edge=9.0)[:60]
    spec = table_spec("frontier", 0.1 * len(curves) * LADDER[-1], LADDER)

    def never(self):
        raise AssertionError("fitted")

    monkeypatch.setattr(Survival, "_coefficients", never)
    with_it = tasks_of(sweep(spec, curves))
    monkeypatch.setattr(Survival, "chance_M", lambda self, ways: np.ones(len(ways)))
    assert tasks_of(sweep(spec, curves)) == with_it


def test_chances_are_those_of_the_region():
    """Of the whole way: what diverges two rungs up does so for whoever is on the way through."""
    curves = cliff(3, from_rung=2)
    spec = table_spec("frontier", 1e18, LADDER)
    driver = begin(spec, curves)
    for place, proposal in enumerate(driver.arena.pool(driver.state, 0)[:160]):
        name = f"t{place:05d}"
        record = {"kind": "proposal", "trial": name, "number": place, "seed": 0, "config": proposal.config}
        driver._write(record | {"params": proposal.params, "source": "table", "rejected": {}})
        for rung in range(4):
            task = driver._task(driver.state.trials[name], rung, rung - 1 if rung else None, 0)
            driver._write({"kind": "task", "task": task.as_dict(), "reason": ""})
            driver.report(task.task_id, row := driver.arena.execute(task))
            if row["status"] != "ok":
                break
    driver.next_task()
    policy = driver.policy
    for rung in range(4):
        ways = policy._candidates.to(rung)
        new = ways.take(np.array([isinstance(ways.step(place).subject, Proposal) for place in range(len(ways))]))
        chance_M = policy._beliefs._survival.chance_M(new)
        names = [new.step(place).config["config_id"] for place in range(len(new))]
        ends_M = np.array([math.isnan(driver.arena.curves[name].losses[rung]) for name in names])
        if rung < 2:
            assert not ends_M.any()
            assert chance_M.min() > 0.5
        else:
            assert chance_M[~ends_M].mean() > 0.85
            assert chance_M[ends_M].mean() < 0.15


def test_where_everything_is_hopeless_the_least_hopeless_is_left(monkeypatch):
    monkeypatch.setattr(survival, "_HOPELESS", 2.0)
    curves = cliff(1)
    driver = sweep(table_spec("frontier", 0.02 * len(curves) * LADDER[-1], LADDER), curves)
    assert any(row["status"] == "ok" for row in driver.state.rungs[3].values())
    assert any(row["status"] != "ok" for row in driver.state.rungs[0].values())


def test_very_many_tasks_are_thinned_and_weigh_as_much():
    kept, weight = survival._spaced(list(range(5 * survival._MOST)))
    assert len(kept) == survival._MOST
    assert kept[0] == 0
    assert kept[-1] == 5 * survival._MOST - 1
    assert weight == 5.0
    assert survival._spaced([1, 2]) == ([1, 2], 1.0)
