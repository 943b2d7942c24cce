"""The frontier against a brute-force reading of its definition."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bfm.errors import UserError
from bfm.laws.frontier import (
    Gap,
    Results,
    frontier,
    goal_of,
    measured,
    metric_names,
)


def row(trial: str, flops: float, nll: float | None = None, recall: float | None = None, **more: object) -> dict:
    metrics = {"nll": nll} | ({} if recall is None else {"recall@10": recall})
    return {
        "trial": trial, "rung_flops": flops, "kind": "rung", "status": "ok", "params": 1000, "protocol_hash": "p",
        "metrics": metrics, "errors": {"nll": 0.1}, **more,
    }  # fmt: skip


RESULTS = st.lists(st.tuples(st.sampled_from([1e9, 4e9, 1.6e10]), st.floats(0, 10)), min_size=1, max_size=12)


@given(RESULTS)
def test_value_is_the_best_with_at_most_c_and_never_gets_worse(results):
    rows = [row(f"t{place}", flops, value, 1 - value) for place, (flops, value) in enumerate(results)]
    down, up = frontier(rows, "nll"), frontier(rows, "recall@10")
    assert [point.flops for point in down] == sorted({flops for flops, _ in results})
    for low, high in zip(down, up, strict=True):
        assert low.value == min(value for flops, value in results if flops <= low.flops)
        assert high.value == max(1 - value for flops, value in results if flops <= high.flops)
    assert [p.value for p in down] == sorted((p.value for p in down), reverse=True)


def test_point_names_its_holder_error_and_rivals():
    rows = [row("a", 1e9, 5.0), row("b", 1e9, 5.2), row("c", 1e9, 5.4), row("d", 4e9, 6.0)]
    first, second = frontier(rows, "nll")
    assert (first.row["trial"], first.error, first.rows, first.carried) == ("a", 0.1, 3, False)
    # 2 * hypot(0.1, 0.1) = 0.283: b is within error of a, c is not.
    assert [(row["trial"], gap.paired) for row, gap in first.rivals] == [("b", False)]
    assert (second.row["trial"], second.value, second.carried) == ("a", 5.0, True)
    assert (first.change, second.change) == (None, None)


def test_differences_are_told_by_what_is_handed_down_and_only_where_they_may_matter():
    rows = [row("a", 1e9, 5.0), row("b", 1e9, 5.02), row("c", 1e9, 5.06), row("far", 1e9, 6.0), row("d", 4e9, 4.9)]
    asked = []

    def compare(one, other, metric):
        asked.append((one["trial"], other["trial"]))
        return Gap(one["metrics"][metric] - other["metrics"][metric], 0.02, paired=True)

    first, second = frontier(rows, "nll", compare)
    # Unpaired (0.14) all of them would be within error.
    assert [row["trial"] for row, _ in first.rivals] == ["b"]
    assert second.change == Gap(pytest.approx(-0.1), 0.02, paired=True)
    # A difference of 1.0 is beyond two errors of both values together, 0.4, whatever the queries have in common.
    assert asked == [("b", "a"), ("c", "a"), ("d", "a")]


def test_a_row_without_errors_is_within_error_of_nothing():
    rows = [row("a", 1e9, 5.0), row("b", 1e9, 5.0, errors={}), row("c", 4e9, 4.0, errors={})]
    first, second = frontier(rows, "nll")
    assert first.rivals == second.rivals == ()
    assert second.change.value == -1.0
    assert math.isnan(second.change.error)
    assert {flops: best["trial"] for flops, best in Results(rows).bests("nll").items()} == {1e9: "a", 4e9: "c"}


def test_equal_values_go_to_the_smaller_model():
    rows = [row("big", 1e9, 5.0, params=2000), row("small", 1e9, 5.0, params=1000)]
    assert frontier(rows, "nll")[0].row["trial"] == "small"


def test_only_finished_rung_rows_with_a_finite_value_count():
    rows = [
        row("probe", 1e9, 1.0, kind="probe"),
        row("diverged", 1e9, 2.0, status="diverged"),
        row("nan", 1e9, math.nan),
        row("none", 1e9, None),
        row("good", 1e9, 3.0),
    ]
    assert [point.value for point in frontier(rows, "nll")] == [3.0]
    assert frontier(rows, "recall@10") == []
    assert frontier([], "nll") == []


def test_rows_of_two_protocols_are_refused():
    with pytest.raises(UserError, match="2 evaluation protocols"):
        measured([row("a", 1e9, 5.0), row("b", 1e9, 5.0, protocol_hash="q")], "nll")


def test_frontier_as_a_function_of_c():
    points = frontier([row("a", 1e9, 5.0), row("b", 4e9, 4.0)], "nll")
    assert [(point.flops, point.value) for point in points] == [(1e9, 5.0), (4e9, 4.0)]


def test_goals_and_order_of_metrics():
    names = ("mrr@10", "coverage@10", "recall@5", "recall@10", "nll", "warm.recall@10", "basket.nll", "loss_sampled")
    rows = [row("a", 1e9) | {"metrics": dict.fromkeys(names, 1.0)}]
    assert metric_names(rows) == ["nll", "recall@5", "recall@10", "mrr@10", "coverage@10"]
    assert metric_names(rows, headline=False)[-2:] == ["warm.recall@10", "basket.nll"]
    assert [goal_of(name) for name in ("nll", "basket.nll", "loss_sampled")] == ["minimize"] * 3
    assert goal_of("warm.recall@10") == "maximize"


def test_a_trial_is_no_rival_of_itself_nor_named_twice():
    """The best of the lower rung is carried to the upper one, where it and another trial have rows, too."""
    rows = [row("t0", 1e9, 1.0), row("t1", 1e9, 1.01), row("t0", 4e9, 1.05), row("t1", 4e9, 1.02), row("t2", 4e9, 1.1)]
    upper = frontier(rows, "nll")[-1]
    assert upper.carried
    assert [other["trial"] for other, _ in upper.rivals] == ["t1", "t2"]
