"""Share, batch and negatives by the laws of their own sweeps, and what is taken without one."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from bfm.sweep.recipe.choices import Power, choose_batch, choose_negatives, choose_rate, choose_share
from bfm.sweep.recipe.evidence import Fitted, Swept
from bfm.sweep.recipe.recipe import make_recipe
from bfm.training.config import TrainConfig
from tests.sweep.recipe.planted_sizes import RUNGS, LogCosts, best_size, evidence, planted, row, rows, sizes_sweep
from tests.sweep.world import EVENTS_PER_GROUP

BEST_SHARE = 0.05


def share_sweep() -> Swept:
    """A valley around 5 % at three rungs."""
    made = []
    for rung in (0, 1, 2):
        size = best_size(RUNGS[rung])
        for place, share in enumerate(np.geomspace(0.01, 0.25, 7)):
            t = math.log(share / BEST_SHARE)
            value = planted(size, RUNGS[rung] / (6 * size)) + 0.05 * (math.exp(0.8 * t) + math.exp(-0.8 * t) - 2)
            made.append(row(500 + 10 * rung + place, rung, size, value, config={"embedder_share": float(share)}))
    return sizes_sweep(made, axis="embedder_share")


def batch_sweep() -> Swept:
    """Probes of curves whose events to a value grow by B / B_crit, with B_crit = 40 N^0.3."""
    made = []
    for number, size in enumerate((2e3, 8e3, 32e3)):
        critical = 40.0 * size**0.3
        for place, batch in enumerate(np.geomspace(critical / 30, critical * 8, 7)):
            trial = f"t{900 + 10 * number + place:05d}"
            for events in np.geomspace(2e4, 2e6, 30):
                value = planted(size, events / (1 + batch / critical))
                flops = float(6 * size * events)
                made.append(
                    row(0, 0, size, value, flops=flops)
                    | {"kind": "probe", "trial": trial, "batch_events": float(batch), "events": float(events)}
                    | {"steps": float(events / batch)}
                )
    rung_rows = [row(990, 0, 2e3, 4.0)]
    return sizes_sweep(rung_rows + made, axis="batch")


def negatives_sweep(gain: float) -> Swept:
    """A valley around K = 400 at two rungs, `gain` below what one stage reaches."""
    made = []
    for rung in (2, 3):
        size = best_size(RUNGS[rung])
        stage = {"freeze_at_flops": 0.3 * RUNGS[rung], "negatives_exponent": 0.5}
        for place, drawn in enumerate((25, 50, 100, 200, 400, 800)):
            t = math.log(drawn / 200)
            value = planted(size, RUNGS[rung] / (6 * size)) * gain + 0.02 * (math.exp(t) + math.exp(-t) - 2)
            made.append(row(700 + 10 * rung + place, rung, size, value, config={**stage, "negatives": drawn}))
    return sizes_sweep(made, axis="negatives")


@pytest.fixture(scope="module")
def sizes() -> Swept:
    return sizes_sweep(rows(0))


def test_the_share_is_that_of_its_law(sizes):
    fitted = Fitted.to(evidence(sizes, share_sweep()), "nll")
    found = choose_share(fitted, sizes.top_runs("nll"), 10 * RUNGS[-1])
    assert found.by_law
    assert found.value == pytest.approx(BEST_SHARE, rel=0.25)


def test_a_share_outside_of_what_was_swept_is_not_taken(sizes):
    sweep = share_sweep()
    high = [r for r in sweep.rows if r["embedder_share"] > 0.08]
    fitted = Fitted.to(evidence(dataclasses.replace(sizes, rows=(*sizes.rows, *high))), "nll")
    found = choose_share(fitted, sizes.top_runs("nll"), RUNGS[-1])
    assert min(r["embedder_share"] for r in high) <= found.value <= 0.25
    assert found.note


def test_the_batch_moves_with_the_critical_batch(sizes):
    found, rule = choose_batch(evidence(sizes, batch_sweep()), "nll")
    assert found.by_law, found.note
    assert rule.exponent == pytest.approx(0.3, abs=0.1)
    top = sizes.top_runs("nll")
    params = float(np.median([r["params"] for r in top]))
    assert rule.at(params) == pytest.approx(top[0]["batch_events"], rel=1e-6)
    assert rule.at(10 * params) > rule.at(params)


def test_negatives_are_taken_where_a_second_stage_promises_more(sizes):
    both = evidence(sizes, negatives_sweep(0.97))
    law, _ = choose_negatives(Fitted.to(both, "nll"), both.rows, 4 * RUNGS[-1])
    assert law.by_law, law.note
    assert law.value == pytest.approx(200, rel=0.1)
    better = make_recipe(evidence(sizes, negatives_sweep(0.97)), LogCosts(), 4 * RUNGS[-1], "nll")
    assert better.negatives == round(law.value)
    assert better.config["freeze_at_flops"] == pytest.approx(0.3 * 4 * RUNGS[-1])
    plain = make_recipe(evidence(sizes), LogCosts(), 4 * RUNGS[-1], "nll")
    assert better.predicted.estimate < plain.predicted.estimate
    truth = 0.97 * planted(better.params.estimate, better.events)
    assert better.predicted.low < truth < better.predicted.high
    worse = make_recipe(evidence(sizes, negatives_sweep(1.05)), LogCosts(), 4 * RUNGS[-1], "nll")
    assert (worse.negatives, worse.config["freeze_at_flops"]) == (0, None)
    assert any("promise no better value" in note for note in worse.notes)
    assert worse.rests_on["sizes"]["rows"] == "all rung rows of 2 sweeps"


@pytest.mark.parametrize("groups", [1, 8])
def test_the_rate_is_that_over_the_rule_at_the_batch_that_is_taken(groups):
    """Everywhere twice the rule's: at the batches of the rows, and at another one that the recipe takes."""
    rng, made = np.random.default_rng(0), []
    for rung, flops in enumerate(RUNGS):
        for number in range(24):
            size, batch = best_size(flops) * 10 ** rng.uniform(-0.7, 0.7), int(rng.choice([1, 2, 4, 8]))
            config = {"embedder_share": 0.1, "d_item": 8, "groups_per_step": batch}
            rule = TrainConfig(params=size, **config).learning_rate
            ratio = 10 ** rng.uniform(-0.6, 1.0)
            value = planted(size, flops / (6 * size)) + 0.1 * math.log(ratio / 2) ** 2
            config["learning_rate"] = rule * ratio
            made.append(
                row(100 * rung + number, rung, size, value, config=config, batch_events=batch * EVENTS_PER_GROUP)
            )
    swept = sizes_sweep(made, learning_rate={"distribution": "log_uniform_values", "min": 1e-5, "max": 1.0})
    batch = Power(float(groups * EVENTS_PER_GROUP), 0.0)
    choice = choose_rate(Fitted.to(evidence(swept), "nll"), swept, 4 * RUNGS[-1], batch)
    assert choice.by_law, choice.note
    assert choice.value == pytest.approx(2, rel=0.1)
