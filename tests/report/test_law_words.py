"""What laws say in plain words: planted, flat, unbracketed and single-budget ones, of losses and of ranking metrics."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from bfm.laws.fitting import fit_law, runs_of_sweep
from bfm.laws.result import BudgetOptimum, Estimate, LawFit
from bfm.report.law_details import FittedAxis
from bfm.report.law_text import law_text
from bfm.report.law_words import axis_sentence, rows_text, sentences
from tests.report import planted_laws as planted

OPEN = Estimate(math.nan, 0.0, math.inf)
SURE = Estimate(0.45, 0.44, 0.46)


def law(optima, exponent=SURE, name="params", metric="nll", fall=1.0, ends=((0.004, 0.001, 0.007), (0.3, 0.2, 0.4))):
    """A joint law with these optima at C = 1e10, 1e11, ...; curves fall towards the right by `fall` where there is
    none, and have their lowest value inside where there is."""
    symbol = {"params": "N", "share": "s"}[name]
    budgets, curves = [], []
    for place, value in enumerate(optima):
        told = value is not None and math.isfinite(value.estimate)
        flops = 10.0 ** (10 + place)
        budgets.append(BudgetOptimum(flops, told, {} if value is None else {f"{symbol}_opt": value}))
        values = [2.0, 1.0, 2.0] if told else [2.0, 2.0 - fall / 2, 2.0 - fall]
        curves.append({"flops": flops, "x": [0.02, 0.1, 0.4], "value": values})
    spread = [
        {"x": x, "estimate": e, "low": low, "high": high} for x, (e, low, high) in zip((0.02, 0.4), ends, strict=True)
    ]
    view = {"symbol": symbol, "curves": curves, "adjusted": [], "trend": [], "ends": spread}
    parameters = {f"{symbol if name == 'params' else name}_exponent": exponent}
    return LawFit(
        "joint", metric, parameters, {"rows": "all 9"}, 9, "", budgets=tuple(budgets), details={"axes": {name: view}}
    )


def grown(estimate: float) -> Estimate:
    return Estimate(estimate, 0.9 * estimate, 1.1 * estimate)


def test_an_optimum_that_moves_with_c():
    fit = law([grown(1e7), grown(6.3e7)])
    said = "the best N grows as C^0.45 (95 %: 0.44 to 0.46), 63M at C = 1e11; bracketed at 2 of 2 budgets."
    assert sentences(fit) == [("Model size", said)]
    falls = axis_sentence(FittedAxis(law([grown(1e7), grown(1e6)], Estimate(-0.5, -0.7, -0.3)), "params"))
    assert falls.startswith("the best N falls as C^-0.50 (95 %: -0.70 to -0.30), 1M at C = 1e11; budgets further apart")


def test_a_choice_is_a_step_of_the_loss():
    rows = planted.allocation_rows()
    for place, row in enumerate(rows):
        row["config"]["embedder_kind"] = ("mlp", "attention", "mlp")[place % 3]
        row["metrics"]["nll"] += 0.05 * (place % 3 == 1)
    said = dict(sentences(fit_law("joint", runs_of_sweep("joint", rows, "nll", ""))))
    found = re.match(r"the loss changes by (0\.0\d+) ± 0\.0\d+ with attention beside mlp\.", said["Embedder kind"])
    assert float(found[1]) == pytest.approx(0.05, abs=0.02)


def test_an_optimum_that_is_not_told_to_move():
    fit = law([grown(0.02), grown(0.021)], Estimate(0.0, -0.01, 0.01), "share")
    assert axis_sentence(FittedAxis(fit, "share")) == (
        "best at 2.1 % [1.89 %, 2.31 %] at C = 1e11, not told to move with C (exponent 0.00 [-0.01, 0.01]); the loss "
        "rises by 0.0040 \u00b1 0.0030 at 2 % and by 0.30 \u00b1 0.10 at 40 %; told at 2 of 2 budgets."
    )


@pytest.mark.parametrize(
    ("fit", "side"),
    [
        (law([grown(1e7), None]), "larger"),
        (law([grown(1e7), None], fall=-1.0), "smaller"),
        (law([grown(1e7), None], fall=0.0), "other"),
        (law([grown(1e7), None], metric="recall@10"), "smaller"),
        (law([grown(1e7), Estimate(3e7, 1e-4, 1e18)]), "other"),
    ],
)
def test_a_budget_that_brackets_nothing_says_what_to_add(fit, side):
    said = axis_sentence(FittedAxis(fit, "params"))
    assert "how it moves with C is not told: bracket it at more budgets, further apart" in said
    assert said.endswith(f"bracketed at 1 of 2 budgets; not bracketed at C = 1e11: add {side} N there.")


def test_no_budget_tells_an_optimum():
    assert (
        axis_sentence(FittedAxis(law([None, None]), "params"))
        == "not bracketed at C = 1e10 and 1e11: add larger N there."
    )
    beyond = law([Estimate(math.nan, 0.3, math.inf)], name="share")
    assert axis_sentence(FittedAxis(beyond, "share")) == "not bracketed at C = 1e10: add larger s there."


def test_an_axis_that_changes_nothing_is_flat_within_its_error():
    flat = law([OPEN, OPEN], name="share", ends=((0.001, -0.002, 0.004), (0.004, 0.001, 0.007)))
    said = "flat: from 2 % to 40 % the loss rises by at most 0.0040 \u00b1 0.0030; runs further out would tell."
    assert axis_sentence(FittedAxis(flat, "share")) == said
    ranked = replace(flat, metric="recall@10")
    assert "recall@10 falls by at most 0.40 \u00b1 0.30 %" in axis_sentence(FittedAxis(ranked, "share"))


def test_one_budget_tells_an_optimum_and_no_law():
    one = law([grown(1e7)], Estimate(math.nan, -math.inf, math.inf))
    said = "best at 10M [9M, 11M] at C = 1e10; how it moves with C is not told: bracket it at more budgets, further"
    assert axis_sentence(FittedAxis(one, "params")).startswith(said)


def test_sizes_that_do_not_differ_ask_nothing():
    fit = law([grown(1e7), grown(6e7)])
    for curve in fit.details["axes"]["params"]["curves"]:
        curve["x"] = [1e7, 1.1e7, 1.2e7]
    assert sentences(fit) == [("Model size", "the runs of a budget do not differ in it: add others there.")]


@pytest.mark.parametrize(
    ("worth", "text"),
    [
        (Estimate(15.0, 9.0, 25.0), "from about R* = 15 [9, 25] epochs beyond the first on they teach little."),
        (Estimate(15.0, 0.3, 700.0), "not told what they are worth: runs with more epochs would tell."),
    ],
)
def test_repeats_are_worth_something_or_not_told(worth, text):
    fit = law([grown(1e7), grown(6e7)])
    told = replace(fit, parameters={**fit.parameters, "R_star": worth, "critical_batch": grown(4096)})
    assert sentences(told)[1:] == [
        ("Batch", "a run at B = 4.1k [3.69k, 4.51k] needs twice the events of one at a small batch."),
        ("Repeated events", text),
    ]


def test_fit_prints_the_sentences_of_a_planted_sweep_first():
    fit = fit_law("joint", runs_of_sweep("joint", planted.negatives_rows(), "recall@10", ""))
    first, rows, *_ = law_text(fit).splitlines()
    assert re.match(
        r"Sampled negatives: the best K grows as C\^0\.\d\d \(95 %: 0\.4\d to 0\.5\d\), 17\dk at C = 1e18; ", first
    )
    assert re.search(r"recall@10 falls by 63\.\d+ \u00b1 0\.\d+ % at 500 and by 5\.\d+ \u00b1 0\.\d+ % at 4M", first)
    assert rows == rows_text(fit)
    assert rows.startswith("Rows: all 48 of 48 trials at 4 budgets, as designed. Noise: standard deviations at the ")


def test_laws_of_other_tables_have_no_sentences():
    fit = fit_law("isoflop", runs_of_sweep("isoflop", planted.allocation_rows(), "nll", ""))
    assert sentences(fit) == []
    assert law_text(fit).startswith("isoflop of nll on 36 runs")
