"""Steps that are planned ahead are those that are planned when they are asked for."""

import dataclasses

import pytest
import torch

from bfm.training.step_plan import StepPlan
from tests.training.common import STAGE_1, train

STEP = STAGE_1.groups_per_step


@pytest.fixture
def planned(toy_shards):
    """A planner that is three steps ahead, and the objective of its run."""
    trainer, _ = train(STAGE_1, toy_shards, 0)
    planner = dataclasses.replace(trainer.planner, steps_ahead=3)
    yield planner, trainer.objective
    planner.close()


def assert_equal(left: StepPlan, right: StepPlan):
    assert left.work == right.work
    for one, other in zip(left.batches, right.batches, strict=True):
        assert one.groups == other.groups
        for name in ("items_U", "item_RL", "target_index_T", "candidates_C", "share_T", "copy_N", "time_RL"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_steps_are_the_same_however_they_are_asked_for(planned):
    planner, objective = planned
    # In order, from where nothing was begun, again, and one of those that have been begun.
    for step in (0, 1, 2, 9, 10, 0, 0, 3):
        assert_equal(planner.plan(1, STEP * step, objective), planner.own_plan(1, STEP * step, objective))
        assert list(planner._ahead) == [(1, STEP * after) for after in range(step + 1, step + 4)]


def test_what_goes_wrong_ahead_is_raised_once_and_where_it_is_asked_for(planned, monkeypatch):
    planner, objective = planned
    own_plan = planner.own_plan

    def broken(stage, cursor, objective):
        if cursor == 2 * STEP:
            raise OSError("the disk is gone")
        return own_plan(stage, cursor, objective)

    monkeypatch.setattr(planner, "own_plan", broken)
    for step in (0, 1):
        planner.plan(1, STEP * step, objective)
    with pytest.raises(OSError, match="disk"):
        planner.plan(1, STEP * 2, objective)
    monkeypatch.setattr(planner, "own_plan", own_plan)
    assert_equal(planner.plan(1, STEP * 2, objective), own_plan(1, STEP * 2, objective))
