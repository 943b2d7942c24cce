"""Hours and money of a plan: the plan's FLOPs over a speed; a speed or a price that cannot be is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bfm.errors import UserError
from bfm.sweep.plan.machine import Machine
from bfm.sweep.plan.plan import plan
from bfm.sweep.plan.price import DENSE_BF16_FLOPS, USUAL_SHARE, bill, bill_text, price_of
from tests.sweep.world import PlantedCosts, make_spec


def test_a_bill_is_the_plans_flops_over_a_workers_speed():
    made = plan(make_spec(scheduler={"type": "frontier"}), PlantedCosts(), Machine(cores=2, gpus=0, memory_gib=8))
    price = price_of(None, 1e9, 3.6)
    assert price is not None
    priced = bill(made, price)
    flops = made.training_flops + made.evaluation_flops
    assert priced.worker_hours == pytest.approx(flops / 1e9 / 3600)
    assert priced.money == pytest.approx(flops / 1e9 / 1000)
    assert sum(rung.worker_hours for rung in priced.rungs) == pytest.approx(priced.worker_hours)
    assert priced.most_worker_hours >= priced.worker_hours
    assert priced.grid_worker_hours > priced.worker_hours, "promotion is what a grid does not have"
    assert priced.hours <= priced.worker_hours
    assert "a grid" in bill_text(priced)


def test_a_task_of_several_workers_ends_as_many_times_sooner():
    price = price_of(None, 1e9, None)
    assert price is not None
    machine = Machine(cores=8, gpus=0, memory_gib=8)
    hours = {}
    for workers in (1, 4):
        tiers = {"tiers": [{"engine": "deepspeed", "workers": workers}], "slots": 2}
        spec = make_spec(scheduler={"type": "frontier"}, scaling=tiers, parameters={"groups_per_step": {"value": 4}})
        hours[workers] = bill(plan(spec, PlantedCosts(), machine), price)
    assert hours[1].worker_hours == hours[4].worker_hours
    assert hours[1].hours == pytest.approx(4 * hours[4].hours)


def test_a_grid_that_reaches_no_top_has_a_price():
    price = price_of(None, 1e9, 3.6)
    assert price is not None
    made = plan(make_spec(scheduler={"type": "frontier"}), PlantedCosts(), Machine(cores=2, gpus=0, memory_gib=8))
    short = replace(made, rungs=(*made.rungs[:-1], replace(made.rungs[-1], trials=0)))
    assert bill(short, price).grid_money > 0


def test_a_named_card_has_a_share_of_its_peak_and_says_so():
    price = price_of("H100", None, None)
    assert price is not None
    assert price.flops_per_s == USUAL_SHARE * DENSE_BF16_FLOPS["h100"]
    assert "an assumption" in price.words
    assert price_of(None, None, None) is None


@pytest.mark.parametrize(
    ("gpu", "throughput", "per_hour", "key"),
    [
        ("h1000", None, None, "--gpu"),
        ("h100", 1e12, None, "--throughput"),
        (None, None, 2.0, "--price-per-hour"),
    ],
)
def test_a_price_that_cannot_be_is_refused(gpu, throughput, per_hour, key):
    with pytest.raises(UserError) as refused:
        price_of(gpu, throughput, per_hour)
    assert refused.value.key == key
