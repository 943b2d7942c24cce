"""The feasible set: every bound rejects with its own counted reason, and a space without a point names the bound."""

from __future__ import annotations

import dataclasses
import math

import pytest

from bfm.errors import InfeasibleError
from bfm.events.protocol import Protocol
from bfm.events.statistics import group_means
from bfm.model.flops import ModelCost
from bfm.sweep.space.costs import STEP_MARGIN, Costs
from bfm.sweep.space.space import Feasible, FeasibleSet, Rejection
from bfm.sweep.space.tiers import Tier
from bfm.training.config import TrainConfig
from tests.sweep.world import PlantedCosts, make_spec

LOG = {"distribution": "log_uniform_values"}


def judge(values, **changes):
    return FeasibleSet(make_spec(**changes), PlantedCosts()).judge({"params": 1000, "learning_rate": 1e-3, **values})


def test_a_point_inside_is_feasible():
    verdict = judge({})
    assert isinstance(verdict, Feasible)
    assert verdict.config.params == 1000
    assert verdict.cost.steps(1e9, 0.2) == math.floor(1e9 / ((1 + STEP_MARGIN) * 6 * 1000 * 100))


REJECTIONS = {
    "fewer than 100 steps at rung 1e9": ({"params": 1e5}, {}),
    "a step exceeds the tolerance at rung 1e9": ({"params": 9000}, {"budget": {"tolerance": 0.001}}),
    "D/N below 500 at rung 1e9": ({"params": 1000}, {"budget": {"events_per_param": [500, 1e6]}}),
    "D/N above 100 at rung 1e9": ({"params": 1000}, {"budget": {"events_per_param": [0, 100]}}),
    "warmup longer than the trunk of rung 1e9": ({"warmup_events": 140_000}, {}),
    "more than 5 epochs at rung 4e9": ({"params": 1000}, {"budget": {"max_epochs": 5}}),
    "more negatives than items in the catalogue": ({"negatives": 1001, "freeze_at_flops": 1e8}, {}),
    "stage 2 does not begin below rung 1e9": ({"negatives": 10, "freeze_at_flops": 9e8}, {}),
    "negatives is contradictory": ({"negatives": 10}, {}),
    "2 workers do not divide groups_per_step": (
        {"groups_per_step": 3},
        {"scaling": {"tiers": [{}, {"from_rung_flops": "16e9", "engine": "deepspeed", "workers": 2}]}},
    ),
    "more than 0.001 GiB per worker": ({}, {"scaling": {"tiers": [{"memory_gib": 0.001}]}}),
}


@pytest.mark.parametrize("reason", REJECTIONS)
def test_every_bound_has_its_reason(reason):
    values, changes = REJECTIONS[reason]
    # One rung: a point that another rung takes would be feasible.
    rung = next((rung for rung in ("1e9", "4e9") if reason.endswith(f"rung {rung}")), "16e9")
    verdict = judge(values, **{**changes, "budget": {"ladder_flops": [rung], **changes.get("budget", {})}})
    assert isinstance(verdict, Rejection)
    assert verdict.reason == reason
    assert verdict.detail
    assert verdict.fix


def test_an_infeasible_space_names_the_bound_that_binds():
    spec = make_spec(parameters={"params": {**LOG, "min": 1e5, "max": 1e6}})
    with pytest.raises(InfeasibleError, match=r"no point of the space is feasible; 4096 of 4096 tries: fewer than 100"):
        _ = FeasibleSet(spec, PlantedCosts()).sample


def test_the_grid_is_whole_and_its_reasons_are_counted():
    parameters = {
        "params": {"values": [1000, 2000, 1e5]},
        "learning_rate": {"value": 1e-3},
        "groups_per_step": {"min": 1, "max": 3},
        "window": {"distribution": "q_uniform", "min": 10, "max": 30, "q": 10},
    }
    feasible = FeasibleSet(make_spec(method="grid", parameters=parameters), PlantedCosts())
    points, rejected = feasible.sample
    assert len(list(feasible.grid())) == 27
    assert len(points) == 18
    assert [refusal.reason for refusal in rejected] == ["fewer than 100 steps at rung 1e9"] * 9
    assert {point.config.window for point in points} == {10, 20, 30}


@pytest.fixture(scope="module")
def toy_costs(toy_shards):
    return Costs.on(toy_shards, Protocol.load(toy_shards), None)


def test_a_drawn_value_that_no_configuration_takes_is_a_rejection(toy_costs):
    feasible = FeasibleSet(make_spec(parameters={"d_item": {"min": 32, "max": 64}}), toy_costs)
    verdict = feasible.judge({"params": 3e4, "learning_rate": 1e-3, "d_item": 33})
    assert isinstance(verdict, Rejection)
    assert verdict.reason == "d_item is contradictory"
    assert verdict.key == "parameters.d_item"


def test_nominal_costs_are_the_models_at_the_expected_group(toy_shards, toy_costs):
    config = TrainConfig(params=3e4, window=16, group_windows=4, groups_per_step=3, d_item=16)
    cost = toy_costs.of(config)
    stats = group_means(toy_shards, 16, 4, "next_basket")
    model = ModelCost(config.shape(), toy_shards.manifest.fields, 16, 16, toy_shards.manifest.has_clock)
    group = model.group_flops(
        1, round(stats.distinct_items_mean), round(stats.queries_mean), round(stats.distinct_targets_mean), 4
    )
    assert cost.step_flops == 3 * group
    assert cost.params == config.shape().params
    assert cost.state_params == cost.params + model.stem_params + model.table_params
    assert cost.step_events == 3 * stats.targets_mean
    assert cost.epochs(cost.step_flops) == pytest.approx(cost.step_events / toy_shards.manifest.train_targets)
    assert cost.evaluation_flops > model.catalogue_flops(toy_shards.num_items)


def test_stage_2_costs_follow_the_freeze(toy_costs):
    config = TrainConfig(params=3e4, window=16, d_item=16, freeze_at_flops=1e9, negatives=20)
    cost = toy_costs.of(config)
    assert cost.stage2_step_flops is not None
    assert cost.catalogue_flops > 0
    at_freeze = 1e9 / cost.step_flops * cost.step_events
    assert cost.events(1e9) == pytest.approx(at_freeze)
    later = (4e9 - 1e9 - cost.catalogue_flops) / cost.stage2_step_flops * cost.step_events
    assert cost.events(4e9) == pytest.approx(at_freeze + later)


def test_the_candidates_of_stage_2_are_the_targets_and_what_is_drawn(toy_shards, toy_costs):
    config = TrainConfig(params=3e4, window=16, d_item=16, freeze_at_flops=1e9, negatives=20)
    means = group_means(toy_shards, 16, config.group_windows, "next_basket")
    more = toy_costs.of(dataclasses.replace(config, negatives=50)).stage2_step_flops
    per_candidate = 4 * round(means.queries_mean) * config.d_item * config.groups_per_step
    assert more - toy_costs.of(config).stage2_step_flops == 30 * per_candidate
    model = ModelCost(config.shape(), toy_shards.manifest.fields, 16, 16, toy_shards.manifest.has_clock)
    counts = round(means.distinct_items_mean), round(means.queries_mean)
    candidates = round(20 + means.distinct_targets_mean)
    assert toy_costs.of(config).stage2_step_flops == model.group_flops(2, *counts, candidates, config.group_windows)


def test_memory_falls_with_zero_stage_workers_and_micro_groups(toy_costs):
    cost = toy_costs.of(TrainConfig(params=1e6, window=16, d_item=16, groups_per_step=4))
    plain = cost.memory_bytes(Tier(), 4, False)
    sharded = [cost.memory_bytes(Tier(engine="deepspeed", workers=4, zero_stage=stage), 4, False) for stage in range(4)]
    assert plain == sharded[0] > sharded[1] > sharded[2] > sharded[3]
    assert cost.memory_bytes(Tier(), 1, False) < plain < cost.memory_bytes(Tier(), 4, True)
    assert plain > 16 * cost.state_params
