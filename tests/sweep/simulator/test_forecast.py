"""What a space would bring and cost: one law, the driver of real sweeps, and workers that are paid while they idle."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import yaml

from bfm.sweep.simulator.fleet import Fleet, parse_schedule
from bfm.sweep.simulator.forecast import as_dict, forecast, render
from bfm.sweep.simulator.law import law_named
from bfm.sweep.space.settings import Budget
from bfm.sweep.space.spec import from_dict

RATE = 1e11
SPACE = {
    "name": "small",
    "metric": {"name": "nll"},
    "method": "random",
    "parameters": {
        "params": {"distribution": "log_uniform_values", "min": 1e5, "max": 3e6},
        "embedder_share": {"distribution": "log_uniform_values", "min": 0.005, "max": 0.2},
        "learning_rate": {"value": 1e-3},
        "groups_per_step": {"value": 8},
        "window": {"value": 64},
        "group_windows": {"value": 2},
    },
    "budget": {"ladder_flops": ["1e14", "4e14"], "total_flops": "4e15", "max_trials": 40},
    "scheduler": {"type": "asha-promote"},
    "scaling": {"slots": 4, "tiers": [{"engine": "deepspeed", "workers": [1, 2, 4], "gpus": 1}]},
    "data": {"shards": "nowhere"},
}
SPEC = from_dict(SPACE)


def run(fleet, spec=SPEC):
    (made,) = forecast(spec, law_named("paper"), fleet, ["asha-promote"], [0])
    return made, as_dict(spec, "paper", fleet, 2.0, [made])


def test_what_is_paid_is_what_is_there():
    fleet = Fleet(parse_schedule("12,2@30m"), RATE, startup_s=60)
    made, result = run(fleet)
    line = made.timeline
    assert 0 < line.busy_s < line.provisioned_s == 12 * 1800 + 2 * (line.elapsed_s - 1800)
    (policy,) = result["policies"]
    assert policy["cost"] == 2.0 * policy["worker_hours"] == pytest.approx(2.0 * line.provisioned_s / 3600)
    assert policy["busy_hours"] == pytest.approx(line.busy_s / 3600)
    assert f"{policy['worker_hours']:,.0f} worker-hours ({policy['busy_hours']:,.0f} busy)" in render(result)


def test_tasks_take_as_many_workers_as_their_tier_allows_and_the_slots_share():
    made, _ = run(Fleet(parse_schedule("16"), RATE))
    assert {row["workers"] for _, row in made.timeline.rows} == {4}
    assert made.timeline.busy_s == pytest.approx(made.spent_flops / RATE)
    half, _ = run(Fleet(parse_schedule("16"), RATE, efficiency=0.5))
    # More workers bring nothing, and cost as many times as much until that is known.
    assert half.timeline.busy_s > 1.2 * made.timeline.busy_s


def test_no_more_tasks_run_than_the_space_has_slots():
    one, _ = run(Fleet(parse_schedule("16"), RATE), replace(SPEC, scaling=replace(SPEC.scaling, slots=1)))
    ends = [0.0, *(at_s for at_s, _ in one.timeline.rows)]
    assert ends == sorted(ends)
    took_s = [row["train_s"] for _, row in one.timeline.rows]
    assert [after - before for before, after in itertools.pairwise(ends)] == pytest.approx(took_s)


def test_only_a_number_that_somebody_said_is_a_grid():
    fleet = Fleet(parse_schedule("16"), RATE)
    made, result = run(fleet)
    assert result["grid"]["configurations"] == 40
    assert f"({made.spent_flops / result['grid']['flops']:.1%} of the grid)" in render(result)
    unsaid = as_dict(
        replace(SPEC, budget=replace(SPEC.budget, max_trials=Budget.max_trials)), "paper", fleet, 2.0, [made]
    )
    assert unsaid["grid"] is None
    assert "grid" not in render(unsaid)


def test_a_grid_has_its_own_points():
    axes = {"params": {"values": [2e5, 1e6, 1e9]}, "embedder_share": {"values": [0.02, 0.1]}}
    budget = {"ladder_flops": ["1e14", "4e14"], "total_flops": "1e16"}
    changes = {"method": "grid", "scheduler": {"type": "grid"}, "budget": budget}
    grid = from_dict({**SPACE, **changes, "parameters": {**SPACE["parameters"], **axes}})
    fleet = Fleet(parse_schedule("16"), RATE)
    (made,) = forecast(grid, law_named("paper"), fleet, ["grid"], [0])
    counted = as_dict(grid, "paper", fleet, 2.0, [made])["grid"]
    assert counted["configurations"] == made.trials == 4
    assert counted["flops"] == made.spent_flops
    assert counted["cost"] == pytest.approx(2.0 * made.spent_flops / RATE / 3600)


def test_as_a_user_types_it(bfm, tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(SPACE))
    words = ("simulate", path, "--law", "paper", "--throughput", "1e11", "--price-per-hour", "2")
    code, out, err = bfm(*words, "--workers", "8,2@1h", "--preempted-per-hour", "0.5", "--json")
    assert code == 0, err
    (policy,) = json.loads(out)["policies"]
    # A notice is the default: nothing is lost.
    assert policy["lost_tasks"] == 0 < policy["yielded_tasks"]
    assert policy["cost"] == pytest.approx(2 * policy["worker_hours"])
    code, _, err = bfm(*words, "--efficiency", "1.5")
    assert code == 2
    assert "--efficiency" in err


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("space.yaml", "--law", "paper", "--rungs", "1e9,4e9"), "--rungs"),
        (("--curves", "runs.csv", "--rungs", "1e9", "--price-per-hour", "2"), "--price-per-hour"),
        (("--curves", "runs.csv", "--rungs", "1e9", "--set", "data.shards=x"), "--set"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(bfm, words, option):
    code, _, err = bfm("simulate", *words)
    assert (code, err.count("\n")) == (2, 1)
    assert option in err


def test_further_metrics_are_left_out_and_named():
    more = from_dict({**SPACE, "metric": {"name": "nll", "others": ["recall@10", "ndcg@10"]}})
    fleet = Fleet(parse_schedule("4"), RATE)
    made, result = run(fleet, more)
    assert made.spent_flops == run(fleet)[0].spent_flops
    assert result["left_out"] == ["recall@10", "ndcg@10"]
    assert "a law tells nll alone, so without recall@10, ndcg@10" in render(result)
