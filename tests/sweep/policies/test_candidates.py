"""What is kept of candidates from one decision to the next is what a fresh look finds."""

from __future__ import annotations

import random

import numpy as np

from bfm.sweep.ledger.task import Task
from bfm.sweep.policies.candidates import Candidates
from bfm.sweep.policies.ground import View
from bfm.units import GIB
from tests.sweep.world import execute, in_memory, make_spec


def ways(candidates, num_rungs):
    found = []
    for rung in range(num_rungs):
        here = candidates.to(rung)
        subjects = here.table["subject"][here.lines_M]
        found += [
            (rung, getattr(who, "trial", None), who.config, cost)
            for who, cost in zip(subjects, here.cost_M, strict=True)
        ]
    return found


def test_kept_candidates_are_those_of_a_fresh_look():
    """Four slots; tasks are lost for good, diverge and run out of memory, and trunks are evicted."""
    dice = random.Random(3)
    scaling, storage = {"slots": 4, "max_retries": 0}, {"checkpoints_gib": 6}
    spec = make_spec(scheduler={"type": "frontier"}, scaling=scaling, storage=storage)
    driver = in_memory(spec)
    kept, num_rungs, running, most = driver.policy._candidates, len(spec.budget.ladder_flops), [], 0
    while True:
        task = driver.next_task()
        pool = driver.arena.pool(driver.state, driver.state.num_proposals)
        view = View(spec, driver.arena, driver.state, 1 << 60)
        kept.take(view, pool)
        fresh = Candidates(driver.arena, lambda subject: (np.zeros(kept._table["numbers"].shape[1]), 0, 0), num_rungs)
        fresh.take(view, pool, view.paused)
        assert ways(kept, num_rungs) == ways(fresh, num_rungs)
        most = max(most, len(view.paused))
        if isinstance(task, Task):
            running.append(task)
            continue
        if not running:
            break
        ended, fate = running.pop(dice.randrange(len(running))), dice.random()
        if fate < 0.1:
            driver.lost(ended.task_id, "chance", retry=fate < 0.05)
        else:
            row = {**execute(ended), "checkpoint_bytes": GIB, "model_bytes": GIB}
            driver.report(ended.task_id, {**row, "status": "oom", "checkpoint": None} if fate > 0.97 else row)
    assert most > 5
    assert driver.state.abandoned
    assert driver.state.memory_limits
    assert driver.state.evicted
