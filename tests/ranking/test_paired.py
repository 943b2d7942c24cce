"""Paired differences against brute force, and what is said where rows cannot be paired."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from bfm.errors import CorruptError
from bfm.files import Store
from bfm.laws.frontier import gap_between, unpaired
from bfm.ranking.metrics import QueryScores, summarise
from bfm.ranking.paired import Pairing, from_npz, paired_gap, read_scores, scores_object, to_npz

BASKET_Q = np.array([False] * 9 + [True] * 3)
USER_Q = np.array([0, 0, 0, 1, 2, 2, 3, 3, 3, 0, 1, 1])


def scores(seed, rows=None, **values):
    """Twelve queries of four users, the last three inside baskets; nll is what the seed draws, unless given."""
    drawn = {"nll": np.random.default_rng(seed).normal(8, 2, 12), **values}
    rows = np.arange(12) if rows is None else np.array(rows)
    chosen = {name: value_Q[rows] for name, value_Q in drawn.items()}
    return QueryScores(rows, USER_Q[rows], BASKET_Q[rows], chosen, {})


def brute_force(left, right, metric):
    """Mean and error of the differences over common queries that count, by loops over queries and users."""
    name = metric.removeprefix("basket.")
    found = {}
    for side in (left, right):
        rows = zip(side.query_Q, side.user_Q, side.basket_Q, side.values[name], strict=True)
        found[id(side)] = {
            query: (user, value)
            for query, user, basket, value in rows
            if basket == (name != metric) and not math.isnan(value)
        }
    common = sorted(found[id(left)].keys() & found[id(right)].keys())
    gaps = [(found[id(left)][query][0], found[id(left)][query][1] - found[id(right)][query][1]) for query in common]
    mean = sum(gap for _, gap in gaps) / len(gaps)
    users = sorted({user for user, _ in gaps})
    squares = [sum(gap - mean for user, gap in gaps if user == one) ** 2 for one in users]
    return mean, math.sqrt(len(users) / (len(users) - 1) * sum(squares)) / len(gaps)


def published(store, number, of_queries):
    """A row whose scores stand in the store."""
    name, data = scores_object(f"row{number}", of_queries)
    store.put(name, data)
    evaluation = summarise(of_queries)
    return {"scores": name, "protocol_hash": "p", "metrics": evaluation.metrics, "errors": evaluation.errors}


@pytest.mark.parametrize("metric", ["nll", "basket.nll"])
def test_the_error_is_that_of_the_differences_clustered_by_user(metric):
    holes = np.random.default_rng(3).normal(8, 2, 12)
    holes[[1, 4]] = math.nan
    cases = [(scores(1), scores(2)), (scores(1, nll=holes), scores(2)), (scores(1, [0, 2, 3, 4, 6, 9, 10]), scores(2))]
    for left, right in cases:
        gap = paired_gap(left, right, metric)
        assert (gap.value, gap.error) == pytest.approx(brute_force(left, right, metric), rel=1e-12)
        assert gap.paired
        back = paired_gap(right, left, metric)
        assert (back.value, back.error) == pytest.approx((-gap.value, gap.error), rel=1e-12)


def test_nearly_the_same_model_is_told_apart_by_far_less_than_the_errors_of_its_values(tmp_path):
    store, hard_Q = Store(tmp_path), np.random.default_rng(0).normal(8, 2, 12)
    better_Q = hard_Q - 0.05 + np.random.default_rng(1).normal(0, 0.01, 12)
    first, second = (published(store, n, scores(0, nll=nll)) for n, nll in enumerate((hard_Q, better_Q)))
    gap, apart = Pairing(store)(second, first, "nll"), unpaired(second, first, "nll")
    assert gap.value == pytest.approx(apart.value, rel=1e-4)
    assert gap.error < apart.error / 50
    assert (gap.within_error, apart.within_error) == (False, True)


def test_stored_scores_are_those_of_the_queries_in_float32(tmp_path):
    store, left = Store(tmp_path), scores(1)
    name = published(store, 1, left)["scores"]
    assert scores_object("row1", left)[0] == name
    assert scores_object("row1", scores(2))[0] != name
    back = read_scores(store, name)
    for found, kept in ((back.query_Q, left.query_Q), (back.user_Q, left.user_Q), (back.basket_Q, left.basket_Q)):
        np.testing.assert_array_equal(found, kept)
    np.testing.assert_allclose(back.values["nll"], left.values["nll"], rtol=1e-7)
    assert store.names() == [name]
    with_lists = dataclasses.replace(left, shown={5: np.array([True, False, True])})
    assert from_npz(to_npz(with_lists)).shown[5].tolist() == [True, False, True]


def test_what_cannot_be_paired_is_unpaired_and_says_so(tmp_path):
    store = Store(tmp_path)
    first, second = (published(store, number, scores(number)) for number in (1, 2))
    compare = Pairing(store)
    assert compare(first, second, "nll").paired
    imported = {"metrics": {"nll": 8.0}}
    others = [{**second, "scores": None}, {**second, "scores": "gone-0.npz"}, {**second, "protocol_hash": "q"}]
    for other in others:
        assert compare(first, other, "nll") is None
        assert gap_between(first, other, "nll", compare) == unpaired(first, other, "nll")
        assert not unpaired(first, other, "nll").paired
        assert math.isfinite(unpaired(first, other, "nll").error)
    assert math.isnan(gap_between(first, imported, "nll", compare).error)
    assert not gap_between(first, imported, "nll", compare).within_error
    # Coverage is of the part as a whole; no query has one.
    assert compare(first, second, "coverage@10") is None
    one_user = scores(1, [0, 1, 2])
    assert paired_gap(one_user, one_user, "nll") is None


def test_altered_scores_are_not_believed(tmp_path):
    store = Store(tmp_path)
    first, second = (published(store, number, scores(number)) for number in (1, 2))
    store.put(second["scores"], store.get(first["scores"]))
    with pytest.raises(CorruptError, match="row2-"):
        Pairing(store)(first, second, "nll")
