"""The floors against plain counting, their cache, and what they are good for."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from bfm.events.derived import derived_path
from bfm.events.protocol import Protocol, query_targets
from bfm.ranking import baselines
from bfm.ranking.baselines import (
    BACKWARD,
    CONTEXT_EVENTS,
    DAMPING,
    DECAY,
    REACH,
    baseline_metrics,
    co_occurrence_scores,
    count_neighbours,
    popularity_scores,
)
from tests.helpers import make_shards


def plain_weights(shards):
    """{u: {v: c_uv / (n_u n_v)^DAMPING}} by loops."""
    counts = {}
    for user in range(shards.num_users):
        history = shards.history(user)
        items = history.item[: history.train_end].tolist()
        for first in range(len(items)):
            for second in range(first + 1, min(first + REACH + 1, len(items))):
                counts.setdefault(items[first], Counter())[items[second]] += 1.0
                counts.setdefault(items[second], Counter())[items[first]] += BACKWARD
    n_V = shards.train_counts
    return {
        u: {v: count / (float(n_V[u]) * n_V[v]) ** DAMPING for v, count in row.items()} for u, row in counts.items()
    }


@pytest.mark.parametrize(("num_shards", "pass_pairs", "chunk_events"), [(1, 1 << 23, 1 << 20), (3, 500, 100)])
def test_neighbours_equal_plain_counting(tmp_path, monkeypatch, num_shards, pass_pairs, chunk_events):
    monkeypatch.setattr(baselines, "_PASS_PAIRS", pass_pairs)
    monkeypatch.setattr(baselines, "_CHUNK_EVENTS", chunk_events)
    shards = make_shards(tmp_path / "toy", users=30, num_shards=num_shards)
    neighbours, expected = count_neighbours(shards), plain_weights(shards)
    assert len(neighbours.lists) == shards.num_catalogue
    for item in range(shards.num_catalogue):
        low, high = neighbours.lists.offsets[item : item + 2]
        found = dict(zip(neighbours.lists[item].tolist(), neighbours.weight[low:high].tolist(), strict=True))
        assert found == pytest.approx(expected.get(item, {}), rel=1e-6)


def test_only_the_strongest_neighbours_are_kept(toy_shards, monkeypatch):
    monkeypatch.setattr(baselines, "NEIGHBOURS", 3)
    neighbours, expected = count_neighbours(toy_shards), plain_weights(toy_shards)
    for item, row in expected.items():
        low, high = neighbours.lists.offsets[item : item + 2]
        strongest = sorted(row.values(), reverse=True)[:3]
        assert neighbours.weight[low:high].tolist() == pytest.approx(strongest, rel=1e-6)


def test_scores_are_summed_weights_of_the_last_events_and_ties_go_by_popularity(toy_shards):
    table = Protocol.load(toy_shards).queries("test")
    weights = plain_weights(toy_shards)
    num_items = toy_shards.num_catalogue
    block = co_occurrence_scores(toy_shards, table)
    scores_QV = block(slice(0, len(table)), slice(0, num_items)).numpy()
    pieces = [
        block(slice(0, len(table)), slice(low, min(low + 17, num_items))).numpy() for low in range(0, num_items, 17)
    ]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), scores_QV)
    for query in range(len(table)):
        history = toy_shards.history(int(table.user[query])).item[: int(table.position[query]) + 1]
        expected_V = np.zeros(num_items)
        for age, item in enumerate(history[::-1][:CONTEXT_EVENTS].tolist()):
            for neighbour, weight in weights.get(item, {}).items():
                expected_V[neighbour] += DECAY**age * weight
        np.testing.assert_allclose(scores_QV[query], expected_V, rtol=1e-4, atol=1e-6)
        # Ids fall with popularity.
        assert (np.diff(scores_QV[query][expected_V == 0]) < 0).all()


def test_popularity_is_a_distribution(toy_shards):
    scores_QV = popularity_scores(toy_shards)(slice(2, 5), slice(0, toy_shards.num_catalogue)).double().exp()
    assert scores_QV.shape == (3, toy_shards.num_catalogue)
    np.testing.assert_allclose(scores_QV.sum(1), 1.0, rtol=1e-6)


def test_floors_are_cached_and_a_read_only_directory_is_tolerated(tmp_path, monkeypatch):
    shards = make_shards(tmp_path / "toy", users=40)
    protocol = Protocol.load(shards)
    with monkeypatch.context() as patch:
        patch.setattr(baselines, "save_derived", lambda *_: False)
        first = baseline_metrics(shards, protocol, "validation")
    assert baseline_metrics(shards, protocol, "validation") == first
    assert list(derived_path(shards, "x").parent.glob("baselines-*"))
    with monkeypatch.context() as patch:
        patch.setattr(baselines, "_measure", lambda *_, **__: pytest.fail("the cache was not read"))
        assert baseline_metrics(shards, protocol, "validation") == first


def test_floors_beat_chance_and_have_the_names_of_an_evaluation(toy_shards):
    metrics = baseline_metrics(toy_shards, Protocol.load(toy_shards), "validation")
    chance = 10 / toy_shards.num_catalogue
    assert metrics["popularity"]["recall@10"] > chance
    # Users of the toy log keep to one category, which popularity cannot see.
    assert metrics["co_occurrence"]["recall@10"] > 1.2 * metrics["popularity"]["recall@10"]
    assert metrics["popularity"]["nll"] < math.log(toy_shards.num_catalogue)
    assert "nll" not in metrics["co_occurrence"]
    assert {"basket.recall@10", "warm.ndcg@10", "coverage@10"} <= set(metrics["co_occurrence"])


def test_queries_limit_the_floors_too(toy_shards):
    metrics = baseline_metrics(toy_shards, Protocol.load(toy_shards), "validation", k=(5,), queries=7)
    assert set(metrics["popularity"]) >= {"recall@5", "nll"}
    assert metrics["popularity"]["recall@5"] * 7 == pytest.approx(sum_of_first_recalls(toy_shards, 7, 5))


def sum_of_first_recalls(shards, num_queries, k):
    """Recall of the k most popular items, summed over the first queries, by loops; ties as half ranks."""
    table = Protocol.load(shards).queries("validation")[:num_queries]
    targets, n_V = query_targets(shards, table), shards.train_counts
    total = 0.0
    for query in range(num_queries):
        found = 0
        for target in targets[query].tolist():
            if target < len(n_V):
                rank = 1 + (n_V > n_V[target]).sum() + 0.5 * ((n_V == n_V[target]).sum() - 1)
                found += rank <= k
        total += found / len(targets[query])
    return total


def test_one_row_of_scores_serves_all_queries_alike(toy_shards):
    table = Protocol.load(toy_shards).queries("test")
    scorer = popularity_scores(toy_shards)
    short = baselines._measure(scorer, toy_shards, table, (10,), alike=True)
    assert short == pytest.approx(baselines._measure(scorer, toy_shards, table, (10,), alike=False), rel=1e-6)
