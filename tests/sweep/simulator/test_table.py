"""Tables as arenas: which row stands at a rung, what it costs, what regret is, and slips with file and column."""

from __future__ import annotations

import datetime
import math

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bfm.errors import UserError
from bfm.sweep.ledger.state import SweepState
from bfm.sweep.policies.arena import Proposal
from bfm.sweep.simulator.table import Curve, TableArena, read_curves
from tests.sweep.curves import RUNGS, begin, curve, reached, sweep, table_spec, tasks_of

COLUMNS = {
    "config_id": ["b", "a", "a", "b", "b"],
    "flops": [1e9, 4e9, 1e9, 16e9, 4e9],
    "loss": [3.5, 2.0, 3.0, 1.5, 2.5],
    "N": [200, 100, 100, 200, 200],
    "rate": [0.2, 0.1, 0.1, 0.2, 0.2],
    "kind": ["x", "y", "y", "x", "x"],
    "whole": [False, True, True, False, False],
}


@pytest.fixture
def table(tmp_path):
    def write(**changes):
        path = tmp_path / "runs.parquet"
        kept = {name: values for name, values in {**COLUMNS, **changes}.items() if values is not None}
        pa.parquet.write_table(pa.table(kept), path)
        return path

    return write


flops_lists = st.lists(st.integers(1, 100), min_size=1, max_size=8, unique=True).map(sorted)


@given(flops=flops_lists, rungs=flops_lists)
def test_a_row_at_a_rung_is_the_last_above_the_rung_below(flops, rungs):
    one = Curve({"config_id": "a"}, 1, tuple(map(float, flops)), tuple(float(c) for c in flops), True)
    for rung, c in enumerate(rungs):
        below = rungs[rung - 1] if rung else 0
        inside = [place for place, at in enumerate(flops) if below < at <= c]
        assert one.row_at(rungs, rung) == (inside[-1] if inside else None)
        assert one.best_within(c) == min((at for at in flops if at <= c), default=math.inf)


def test_a_row_that_rounding_puts_above_its_rung_is_its_row():
    one = curve("a", [1.0, 2.0], flops=(1e9 * (1 + 1e-12), 4e9))
    assert one.row_at(RUNGS, 0) == 0
    assert one.row_at(RUNGS, 1) == 1


def test_every_format_gives_the_same_curves(table):
    path = table()
    rows = pa.parquet.read_table(path)
    pa.csv.write_csv(rows, path.with_suffix(".csv"))
    rows.to_pandas().to_json(path.with_suffix(".jsonl"), orient="records", lines=True)
    first, *others = (
        read_curves(path.with_suffix(suffix), ["N", "rate", "kind"], resumable_column="whole")
        for suffix in (".parquet", ".csv", ".jsonl")
    )
    assert others == [first, first]
    a, b = first
    assert a == Curve({"config_id": "a", "rate": 0.1, "kind": "y"}, 100, (1e9, 4e9), (3.0, 2.0), True)
    assert (b.flops, b.losses, b.params, b.resumable) == ((1e9, 4e9, 16e9), (3.5, 2.5, 1.5), 200, False)


def test_size_is_a_named_column_or_the_feature_called_so(table):
    assert [c.params for c in read_curves(table(), ["rate"])] == [1, 1]
    assert [c.params for c in read_curves(table(), ["rate", "N"])] == [100, 200]
    (a, _) = read_curves(table(width=[7, 5, 5, 7, 7]), ["rate"], params_column="width")
    assert (a.params, a.config) == (5, {"config_id": "a", "rate": 0.1})


def test_where_keeps_rows(table):
    (b,) = read_curves(table(), ["N"], where="kind == 'x' and flops < 1e10")
    assert (b.config["config_id"], b.flops) == ("b", (1e9, 4e9))


def test_numbers_as_names_and_missing_losses(table):
    path = table(config_id=[2, 1, 1, 2, 2], loss=[None, 2.0, math.nan, 1.5, 2.5])
    a, b = read_curves(path, [])
    assert (a.config["config_id"], b.config["config_id"]) == ("1", "2")
    assert math.isnan(a.losses[0])
    assert math.isnan(b.losses[0])


@pytest.mark.parametrize(
    ("changes", "features", "key", "fragment"),
    [
        ({"loss": None}, [], None, "no column 'loss'"),
        ({}, ["depth"], None, "no column 'depth'"),
        ({"loss": ["low"] * 5}, [], "loss", "loss is text, not a number"),
        ({"flops": ["1e9"] * 5}, [], "flops", "flops is text"),
        ({"flops": [1e9, 4e9, 1e9, 16e9, 0.0]}, [], "flops", "not above 0"),
        ({"flops": [1e9, 4e9, 1e9, 16e9, None]}, [], "flops", "not above 0"),
        ({"flops": [1e9, 4e9, 1e9, 16e9, math.nan]}, [], "flops", "not above 0"),
        ({"flops": [1e9, 4e9, 1e9, math.inf, 4e9]}, [], "flops", "not finite"),
        ({"N": [-1] * 5}, ["N"], "N", "not above 0"),
        ({"N": [math.inf, 100, 100, 200, 200]}, ["N"], "N", "not finite"),
        ({"N": ["big"] * 5}, ["N"], "N", "not a number"),
        ({"flops": [1e9, 1e9, 1e9, 16e9, 4e9]}, [], "flops", "configuration a has two rows at one C"),
        ({"rate": [0.2, 0.1, 0.3, 0.2, 0.2]}, ["rate"], "--features", "configuration a has no single value of rate"),
        ({"kind": [None, "y", "y", None, None]}, ["kind"], "--features", "configuration b has no single value"),
        ({"kind": [None] * 5}, ["kind"], "--features", "configuration a has no single value"),
        ({"rate": [0.2, math.inf, math.inf, 0.2, 0.2]}, ["rate"], "--features", "rate has values that are not finite"),
        ({"kind": [[1]] * 5}, ["kind"], "--features", "kind is list"),
        ({"kind": [datetime.date(2026, 1, 1)] * 5}, ["kind"], "--features", "kind is date32"),
        ({"N": [0.2] * 5}, ["N"], "N", "N has values below 1"),
        ({"config_id": ["b", None, "a", "b", "b"]}, [], "config_id", "empty in some rows"),
    ],
)
def test_slips_name_file_and_column(table, changes, features, key, fragment):
    path = table(**changes)
    with pytest.raises(UserError, match=fragment) as caught:
        read_curves(path, features)
    assert caught.value.file == str(path)
    assert caught.value.key == key
    assert caught.value.fix


@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        (["no", "yes", "yes", "no", "no"], "whole is not yes or no everywhere"),
        ([None, True, True, None, None], "whole is not yes or no everywhere"),
        ([2, 1, 1, 2, 2], "whole is not yes or no everywhere"),
        ([[True]] * 5, "whole is not yes or no everywhere"),
        ([False, True, False, False, False], "configuration a is and is not one run"),
    ],
)
def test_whether_a_curve_is_one_run_is_told_plainly(table, values, fragment):
    path = table(whole=values)
    with pytest.raises(UserError, match=fragment) as caught:
        read_curves(path, [], resumable_column="whole")
    assert caught.value.file == str(path)
    assert caught.value.key == "--resumable-column"
    assert caught.value.fix


def test_a_run_goes_on_from_its_lower_rows_and_others_start_anew():
    arena = TableArena([curve("a", [3, 2, 1]), curve("b", [3, 2, 1], resumable=False)], RUNGS, 0.2)
    going_on, anew = ({"config_id": name} for name in "ab")
    assert arena.reserve_flops(going_on, 0, None) == 10**9
    assert arena.reserve_flops(going_on, 1, 0) == 4 * 10**9 - 800_000_000
    assert arena.reserve_flops(going_on, 2, 0) == 16 * 10**9 - 800_000_000
    assert arena.reserve_flops(anew, 2, 1) == 16 * 10**9
    assert TableArena([curve("a", [3, 2, 1])], RUNGS).reserve_flops(going_on, 2, 1) == 12 * 10**9


def test_costs_are_those_of_the_rows_not_of_the_rungs():
    arena = TableArena([curve("a", [3, 2], flops=(0.9e9, 3e9))], RUNGS)
    assert arena.row_flops({"config_id": "a"}, 1) == 3e9
    assert arena.reserve_flops({"config_id": "a"}, 1, 0) == 2_100_000_000


def test_what_is_spent_is_what_the_table_says():
    for resumable, cooldown, expected in ((True, 0.0, 16), (True, 0.5, 16 + 0.5 + 2), (False, 0.0, 16)):
        driver = sweep(table_spec("random", 1e12), [curve("a", [3, 2, 1], resumable=resumable)], cooldown=cooldown)
        assert driver.state.spent_flops == expected * 10**9
        # Full-length runs of what cannot be resumed are one task.
        assert tasks_of(driver) == ([("a", 0), ("a", 1), ("a", 2)] if resumable else [("a", 2)])


def test_a_curve_without_rows_at_any_rung_is_never_proposed():
    arena = TableArena([curve("late", [1.0], flops=(1e12,)), curve("a", [2.0])], RUNGS)
    assert arena.num_points == 1
    assert arena.pool(SweepState(), 0) == [Proposal({"config_id": "a"}, 1000, "table")]


def test_what_was_begun_is_not_proposed_again():
    driver = begin(table_spec("random", 1e12), [curve(name, [3, 2, 1]) for name in "abc"])
    driver.next_task()
    left = [proposal.config["config_id"] for proposal in driver.arena.pool(driver.state, 1)]
    assert left == ["b", "c"]


def test_a_loss_that_is_no_number_is_a_divergence():
    driver = sweep(table_spec("random", 1e12), [curve("a", [3, math.nan, 1])])
    (trial,) = driver.state.trials.values()
    assert {rung: row["status"] for rung, row in trial.rows.items()} == {0: "ok", 1: "diverged"}


@pytest.mark.parametrize("policy", ["frontier", "asha-promote", "asha-stop", "isoflop-window", "random"])
def test_a_run_without_a_row_at_a_rung_steps_over_it(policy):
    """The middle rung has no row of any configuration that could go on past it."""
    sizes = [2000, 3000, 5000, 8000]
    gaps = [curve(f"g{n}", [3 + 1000 / n, 1 + n / 5000], params=n, flops=(1e9, 16e9)) for n in sizes]
    others = [curve(f"s{n}", [4.0, 3.5], params=n, flops=(1e9, 4e9)) for n in sizes]
    driver = sweep(table_spec(policy, 1e12), [*gaps, *others])
    assert {rung for name, rung in tasks_of(driver) if name.startswith("g")} <= {0, 2}
    assert any(rung == 2 for rung in reached(driver).values())


def brute_regrets(curves, rungs, driver):
    """Loss above the best within each rung's C."""
    found = []
    for rung, c in enumerate(rungs):
        best = min(loss for one in curves for at, loss in zip(one.flops, one.losses, strict=True) if at <= c)
        seen = []
        for one in curves:
            rows = [at for name, at in tasks_of(driver) if name == one.config["config_id"] and at <= rung]
            ends = [one.row_at(rungs, at) for at in rows]
            if one.resumable and ends:
                seen += one.losses[: max(ends) + 1]
            else:
                seen += [one.losses[end] for end in ends]
        worst = [one.losses[row] for one in curves if (row := one.row_at(rungs, rung)) is not None]
        found.append((min(seen) if seen else max(worst)) - best)
    return found


@given(seed=st.integers(0, 10**6), fraction=st.floats(0.02, 1.0), policy=st.sampled_from(["random", "asha-promote"]))
@settings(max_examples=40, deadline=None)
def test_regrets_are_those_of_a_plain_reading(seed, fraction, policy):
    rng = np.random.default_rng(seed)
    flops = np.geomspace(0.5e9, 16e9, 7)
    curves = [
        curve(f"c{n}", rng.uniform(1, 5, 7).tolist(), flops=flops.tolist(), resumable=bool(rng.integers(2)))
        for n in range(6)
    ]
    driver = sweep(table_spec(policy, fraction * 6 * 16e9), curves)
    assert driver.arena.regrets(driver.state) == pytest.approx(brute_regrets(curves, RUNGS, driver))


def test_regret_is_zero_where_all_was_seen_and_the_worst_where_nothing_was():
    curves = [curve("a", [3.0, 2.0, 1.0]), curve("b", [2.5, 2.2, 2.0])]
    everything = sweep(table_spec("random", 1e12), curves)
    assert everything.arena.regrets(everything.state).tolist() == [0, 0, 0]
    assert everything.arena.regrets(SweepState()).tolist() == pytest.approx([0.5, 0.2, 1.0])


def test_losses_that_are_no_numbers_are_no_part_of_regrets():
    curves = [curve("a", [math.nan, math.nan, math.nan]), curve("b", [2.5, 2.2, 2.0]), curve("c", [2.0, math.nan, 1.0])]
    driver = sweep(table_spec("random", 1e12), curves)
    assert driver.arena.regrets(driver.state) == pytest.approx([0.0, 0.0, 1.0])
    assert driver.arena.regrets(SweepState()) == pytest.approx([0.5, 0.2, 1.0])


def test_the_whole_is_what_training_all_would_cost():
    arena = TableArena([curve("a", [3, 2, 1]), curve("b", [3, 2])], RUNGS)
    assert arena.full_flops(RUNGS[-1]) == 20e9
    assert arena.full_flops(RUNGS[0]) == 2e9
