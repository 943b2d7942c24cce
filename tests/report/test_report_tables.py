"""runs.parquet and the terminal's tables."""

from __future__ import annotations

import io
import math

import pyarrow.parquet as pq

from bfm.laws.frontier import Gap, Results, frontier
from bfm.report.console import row_words
from bfm.report.digits import gap_text, value_text
from bfm.report.runs_file import runs_parquet, runs_table
from bfm.report.tables import (
    evaluation_text,
    failures_text,
    frontier_text,
    spend_text,
    trials_in_order,
    trials_text,
)
from bfm.sweep.ledger.state import SweepState
from bfm.units import ruled
from tests.report.planted import compare


def test_parquet_holds_every_row_flat(sweep):
    rows = sweep["rows"]
    table = pq.read_table(io.BytesIO(runs_parquet(rows)))
    assert table.num_rows == len(rows)
    assert table["metrics.nll"].to_pylist() == [row["metrics"].get("nll") for row in rows]
    assert table["config.params"].to_pylist() == [row["config"]["params"] for row in rows]
    assert table["errors.recall@10"].null_count == 2
    assert str(table.schema.field("steps").type) == "int64"
    assert str(table.schema.field("rung_flops").type) == "double"


def test_columns_of_mixed_kinds_lists_and_no_rows():
    rows = [
        {"trial": "a", "config": {"depth": None, "x": 1, "tag": "u", "on": True}, "shape": {"sizes": [1, 2]}},
        {"trial": "b", "config": {"depth": 2, "x": 0.5, "tag": 3, "on": None}},
    ]
    columns = runs_table(rows).to_pydict()
    assert columns["config.depth"] == [None, 2]
    assert columns["config.x"] == [1.0, 0.5]
    assert columns["config.tag"] == ["u", "3"]
    assert columns["config.on"] == [True, None]
    assert columns["shape.sizes"] == ["[1, 2]", None]
    assert pq.read_table(io.BytesIO(runs_parquet([]))).num_rows == 0


def test_digits_follow_the_error():
    assert value_text(7.64123, 0.0213) == "7.641 \u00b1 0.021"
    assert value_text(0.20198, 0.0021) == "0.2020 \u00b1 0.0021"
    assert value_text(123.456, 4.0) == "123.5 \u00b1 4.0"
    assert value_text(7.64123) == "7.641"
    assert value_text(math.nan, 0.1) == "-"


def test_frontier_table_has_a_line_per_rung_and_baseline(sweep):
    lines = frontier_text(Results(sweep["rows"]), sweep["baselines"], compare).splitlines()
    rungs = [line for line in lines if line.startswith("C ")]
    assert [line.split()[:2] for line in rungs] == [["C", "1e11"], ["C", "4e11"], ["C", "1.6e12"]]
    start = next(place for place, line in enumerate(lines) if line.startswith("popularity"))
    assert lines[start + 1].startswith("co-occurrence")
    best = min(row["metrics"]["nll"] for row in sweep["rows"] if row["rung"] == 2)
    assert f"{best:.3f}" in rungs[2]
    assert lines[start + 2].split() == ["strongest", "popularity", *["co-occurrence"] * 4]
    assert lines[-1].startswith(
        "The best of the sweep is BELOW the strongest floor in coverage@10 (0.1491, co-occurrence"
    )
    assert ") and above it in nll (" in lines[-1]
    assert max(len(line) for line in lines[:-1]) <= 115
    assert frontier_text(Results([]), sweep["baselines"]) == "no results yet"
    assert "floor" not in frontier_text(Results(sweep["rows"]), {})


def test_the_frontier_tells_what_a_rung_brings_and_who_is_within_error_of_it(sweep):
    rows = sweep["rows"]
    low, high = (frontier(rows, "nll", compare)[place] for place in (1, 2))
    text = frontier_text(Results(rows), {}, compare)
    change = f"{high.value - low.value:+.4f}\u00b1{0.1 * math.hypot(0.021, 0.021):.4f}"
    line = next(line for line in text.splitlines()[::-1] if line.startswith("  change"))
    assert line.split()[1] == change
    assert high.change.value < -4 * high.change.error
    assert "within error: trials less than two standard errors of the difference" in text
    assert "unpaired" not in text
    wide = frontier_text(Results(rows), {})
    assert wide.count(" more~") > text.count(" more")
    assert wide.endswith("~ unpaired, far too wide: a row holds no scores of its queries")
    lone = frontier_text(Results(rows[:1]), {}, compare)
    assert "change" not in lone
    assert "within" not in lone


def test_a_trial_stands_beside_the_best_of_its_rung(sweep):
    rows = sweep["rows"]
    lines = trials_text(Results(rows), compare, limit=4).splitlines()
    assert lines[0].endswith("nll to the best there")
    assert lines[2].split()[-1] == "best"
    ordered = trials_in_order(Results(rows))
    for line, row in zip(lines[3:6], ordered[1:4], strict=True):
        gap = compare(row, ordered[0], "nll")
        assert f"{gap.value:+.4f} \u00b1 {gap.error:.4f}" in line
        assert line.endswith("within error") == (gap.value <= 2 * gap.error)
    assert trials_text(Results(rows), limit=4).endswith("unpaired, far too wide: a row holds no scores of its queries")
    assert gap_text(Gap(0.0123, math.nan, paired=False)) == "+0.0123"


def test_a_finished_row_stands_beside_the_best_of_the_others_at_its_rung(sweep):
    rows = [row for row in sweep["rows"] if row["rung"] == 2]
    best = min(rows, key=lambda row: row["metrics"]["nll"])
    other = next(row for row in rows if row is not best)
    gap = compare(other, best, "nll")
    words = row_words(other, "nll", best, compare)
    assert f"nll {other['metrics']['nll']:.4g} \u00b1 0.021 ({gap_text(gap)} to {best['trial']})" in words
    assert " to " not in row_words(best, "nll")


def test_trials_come_by_rung_then_loss_with_failures_last(sweep):
    ordered = trials_in_order(Results(sweep["rows"]))
    assert len(ordered) == 24
    assert [row["rung"] for row in ordered[:4]] == [2] * 4
    losses = [row["metrics"]["nll"] for row in ordered[:4]]
    assert losses == sorted(losses)
    assert {row["trial"] for row in ordered[-2:]} == {"t005", "t017"}
    assert "... and 19 more" in trials_text(Results(sweep["rows"]), limit=5)


def test_spend_and_failures(sweep):
    text = spend_text(Results(sweep["rows"]), sweep["state"])
    assert "22       2" in text.splitlines()[2]
    assert text.splitlines()[-1] == "spent 1.09e13 FLOPs of 2.4e13 (45%), 2e11 of them lost"
    reasons = failures_text(sweep["rows"], sweep["state"])
    assert "t005 rung 0: diverged" in reasons
    assert "worker killed (signal 9)" in reasons
    assert "refused 7: fewer than 100 steps" in reasons
    assert failures_text([], SweepState()) == ""


def test_an_evaluation_stands_beside_its_floors():
    evaluation = {
        "part": "test", "queries": 9876, "catalogue": 61220, "seen_rule": "stay", "protocol_hash": "9f" * 32,
        "metrics": {"recall@10": 0.25, "nll": 7.1, "basket.nll": 6.0, "warm.recall@10": 0.26},
        "errors": {"recall@10": 0.002, "nll": 0.02},
        "baselines": {"popularity": {"nll": 8.9, "recall@10": 0.06}, "co_occurrence": {"recall@10": 0.12}},
        "against_baselines": {"co_occurrence": {"recall@10": {"value": 0.13, "error": 0.0015, "paired": True}}},
    }  # fmt: skip
    lines = evaluation_text(evaluation).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["nll", "recall@10", "warm.recall@10", "basket.nll"]
    assert lines[3].split()[1:] == ["0.2500", "\u00b1", "0.0020", "0.06", "0.12", "co-occurrence"]
    assert (
        lines[6]
        == "The model is above every floor in nll (7.1, popularity 8.9), recall@10 (0.25, co-occurrence 0.12: +0.1300 "
        "\u00b1 0.0015)."
    )
    assert lines[7:] == ["test: 9,876 queries against 61,220 items; protocol 9f9f9f9f9f9f", "seen items stay"]
    evaluation["metrics"]["recall@10"], evaluation["against_baselines"] = 0.11, {}
    below = evaluation_text(evaluation).splitlines()[6]
    assert below.startswith(
        "The model is BELOW the strongest floor in recall@10 (0.11, co-occurrence 0.12) and above it"
    )


def test_columns_align():
    assert ruled(["a", "bb"], [["xyz", "1"], ["x", "222"]]).splitlines() == [
        "a     bb",
        "--------",
        "xyz    1",
        "x    222",
    ]
