"""Contests: the same subsets and budget for every policy, the same results for the same seeds, one line per slip."""

from __future__ import annotations

import numpy as np
import pytest

from bfm.errors import UserError
from bfm.sweep.simulator.contest import Contest, as_dict, compete, enter, render
from bfm.sweep.simulator.fleet import Fleet
from bfm.sweep.simulator.table import read_curves
from tests.helpers import published
from tests.sweep.curves import RUNGS, TABLE_POLICIES, crossing, curve

CURVES = tuple(crossing(np.geomspace(300, 30_000, 16).round().astype(int).tolist()))
SMALL = Contest(CURVES, RUNGS, 0.3, subset=0.6)


def test_the_same_seeds_give_the_same_result():
    def figures(standings):
        return [
            (entry.regret_R.tolist(), entry.spent_flops, entry.state.rungs)
            for standing in standings
            for entry in standing.entries
        ]

    first, second, other = (
        figures(compete(SMALL, ["frontier", "random"], seeds)) for seeds in ([1, 2], [1, 2], [3, 4])
    )
    assert first == second != other


@pytest.mark.parametrize("policy", TABLE_POLICIES)
def test_every_policy_keeps_to_the_same_budget(policy):
    for seed in range(3):
        entry = enter(SMALL, policy, seed)
        assert 0 < entry.spent_flops <= entry.budget_flops
        assert (entry.regret_R >= -1e-12).all()
        assert entry.budget_flops == enter(SMALL, "random", seed).budget_flops


def test_all_policies_see_the_same_subsets_and_a_grid_their_order():
    everything = Contest(CURVES, RUNGS, 10.0, subset=0.5)
    for seed in range(3):
        seen = {}
        for policy in ("frontier", "random", "grid"):
            trials = enter(everything, policy, seed).state.trials.values()
            seen[policy] = [trial.config["config_id"] for trial in trials]
        assert len(seen["random"]) == 8
        assert set(seen["random"]) == set(seen["grid"]) == set(seen["frontier"])
        assert seen["grid"] == sorted(seen["grid"])
    drawn = [frozenset(t.params for t in enter(everything, "random", seed).state.trials.values()) for seed in range(4)]
    assert len(set(drawn)) > 1


def test_the_budget_is_a_share_of_training_all():
    entry = enter(Contest(CURVES, RUNGS, 0.25), "random", 0)
    assert entry.budget_flops == 0.25 * 16 * RUNGS[-1]


def test_with_the_whole_budget_nothing_is_regretted():
    for policy in ("random", "grid", "frontier"):
        (standing,) = compete(Contest(CURVES, RUNGS, 3.0), [policy], [0])
        assert standing.entries[0].regret_R == pytest.approx([0, 0, 0])
        assert len(standing.entries[0].state.rungs[2]) == len(CURVES)


def test_figures_are_means_and_standard_errors_over_seeds():
    standings = compete(SMALL, ["random", "asha-promote"], range(4))
    result = as_dict("some table", SMALL, standings)
    regrets = np.array([entry.regret_R for entry in standings[0].entries])
    shown = result["policies"][0]
    assert [rung["mean"] for rung in shown["regret"]] == pytest.approx(regrets.mean(0).tolist())
    assert [rung["rung"] for rung in shown["regret"]] == list(RUNGS)
    assert shown["regret_sum"]["mean"] == pytest.approx(regrets.sum(1).mean())
    assert shown["regret_sum"]["se"] == pytest.approx(regrets.sum(1).std(ddof=1) / 2)
    spent = [entry.spent_flops / entry.budget_flops for entry in standings[0].entries]
    assert shown["spent_fraction"] == pytest.approx(np.mean(spent))
    assert shown["decisions"] == sum(entry.timeline.decisions for entry in standings[0].entries)
    lines = render(result).splitlines()
    assert len(lines) == 4
    assert [line.split()[0] for line in lines[2:]] == ["random", "asha-promote"]
    assert f"{shown['regret_sum']['mean']:.4f}" in lines[2]


def test_one_seed_has_no_error():
    result = as_dict("t", SMALL, compete(SMALL, ["random"], [0]))
    assert result["policies"][0]["regret_sum"]["se"] == 0


def test_progress_goes_from_nothing_up():
    told = []
    compete(SMALL, ["random", "grid"], [4, 5], lambda words, share: told.append((words, share)))
    assert told == [("random seed 4", 0), ("random seed 5", 0.25), ("grid seed 4", 0.5), ("grid seed 5", 0.75)]


@pytest.mark.parametrize("policy", TABLE_POLICIES)
def test_unreliable_fleets_change_time_not_the_cap(policy):
    fleet = Fleet(((0.0, 4), (60.0, 2)), 1e8, 5.0, 1.0, 20.0, 0.1, 0.1)
    entry = enter(Contest(CURVES, RUNGS, 0.5, fleet=fleet, max_retries=5), policy, 0)
    assert entry.timeline.lost
    assert entry.spent_flops <= entry.budget_flops
    assert entry.state.finished


SLIPS = {
    "no rungs": ({"rungs_flops": ()}, "--rungs", "needs FLOPs"),
    "zero": ({"rungs_flops": (0, 10**9)}, "--rungs", "needs FLOPs"),
    "negative": ({"rungs_flops": (-(10**9), 10**9)}, "--rungs", "needs FLOPs"),
    "unsorted": ({"rungs_flops": (4 * 10**9, 10**9)}, "--rungs", "increasing"),
    "twice": ({"rungs_flops": (10**9, 10**9)}, "--rungs", "increasing"),
    "unreached": ({"rungs_flops": (16 * 10**9, 10**20)}, "--rungs", "no configuration has a row at rung 1e.20"),
    "below all": ({"rungs_flops": (10, 10**9)}, "--rungs", "no configuration has a row at rung 10"),
    "no fraction": ({"budget_fraction": 0.0}, "--budget-fraction", "above 0"),
    "negative fraction": ({"budget_fraction": -0.1}, "--budget-fraction", "above 0"),
    "a fraction of nothing": ({"budget_fraction": 1e-15}, "--budget-fraction", "less than 1 FLOP"),
    "no number": ({"budget_fraction": float("nan")}, "--budget-fraction", "above 0"),
    "endless fraction": ({"budget_fraction": float("inf")}, "--budget-fraction", "above 0"),
    "no eta": ({"eta": 1.0}, "--eta", "above 1"),
    "eta is no number": ({"eta": float("nan")}, "--eta", "above 1"),
    "no subset": ({"subset": 0.0}, "--subset", "above 0"),
    "large subset": ({"subset": 1.1}, "--subset", "at most 1"),
    "cooldown": ({"cooldown_fraction": 1.0}, "--cooldown-fraction", "below 1"),
    "negative cooldown": ({"cooldown_fraction": -0.1}, "--cooldown-fraction", "at least 0"),
    "no curves": ({"curves": ()}, "--rungs", "no configuration"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_slips_are_one_line(slip):
    changes, key, fragment = SLIPS[slip]
    values = {"curves": CURVES, "rungs_flops": RUNGS, "budget_fraction": 0.3}
    with pytest.raises(UserError, match=fragment) as caught:
        compete(Contest(**{**values, **changes}), ["random"], [0])
    assert caught.value.key == key
    assert caught.value.fix


def test_no_policy_is_a_slip():
    with pytest.raises(UserError, match="names no policy") as caught:
        compete(SMALL, [], [0])
    assert caught.value.key == "--policy"


@pytest.mark.parametrize("policy", TABLE_POLICIES)
def test_a_subset_in_which_no_run_reaches_the_top_has_nothing_to_regret_there(policy):
    curves = (*(curve(f"s{n}", [3.0 + n, 2.0 + n]) for n in range(9)), curve("tall", [3.0, 2.0, 1.0]))
    results = [enter(Contest(curves, RUNGS, 0.5, subset=0.2), policy, seed) for seed in range(6)]
    short = [entry for entry in results if 2 not in entry.state.rungs]
    assert short
    assert all(np.isfinite(entry.regret_R).all() for entry in results)


def test_a_budget_that_pays_for_nothing_regrets_all():
    entry = enter(Contest(CURVES, RUNGS, 1e-6), "random", 0)
    assert entry.spent_flops == 0
    assert entry.state.trials == {}
    for rung in range(3):
        losses = [one.losses[rung] for one in CURVES]
        best = min(loss for one in CURVES for loss in one.losses[: rung + 1])
        assert entry.regret_R[rung] == pytest.approx(max(losses) - best)


@pytest.mark.slow
def test_published_runs_whose_curves_cross():
    path = published("curves/gemstones_curves.parquet")
    curves = read_curves(path, ["N", "width", "depth", "lr_setting"], resumable_column="resumable")
    contest = Contest(curves, (10**19, 4 * 10**19, 16 * 10**19, 64 * 10**19), 0.15, subset=0.7)
    standings = compete(contest, ["frontier", "asha-promote", "isoflop-window"], range(4))
    total = {one.policy: np.mean([entry.regret_R.sum() for entry in one.entries]) for one in standings}
    assert total["frontier"] < total["asha-promote"]
    assert total["frontier"] < total["isoflop-window"]


@pytest.mark.slow
def test_published_runs_that_cannot_be_resumed():
    path = published("curves/porian_rungs.parquet")
    where = "dataset == 'rw' and decay == 'chinchilla'"
    curves = read_curves(path, ["n", "hparams", "warmup"], resumable_column="resumable", where=where)
    assert curves
    assert not any(one.resumable for one in curves)
    rungs = tuple(round(1.25e16 * 2**k) for k in range(12))
    reached = [c for k, c in enumerate(rungs) if any(one.row_at(rungs, k) is not None for one in curves)][-3:]
    contest = Contest(curves, tuple(reached), 0.5)
    for policy in ("frontier", "asha-promote", "isoflop-window", "random"):
        entry = enter(contest, policy, 0)
        assert 0 < entry.spent_flops <= entry.budget_flops
        assert np.isfinite(entry.regret_R).all()
