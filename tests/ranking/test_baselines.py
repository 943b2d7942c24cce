"""The floors against plain counting, their cache, and what they are good for."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bfm.events.neighbours import COUNTINGS, count_neighbours
from bfm.events.protocol import Protocol, query_targets
from bfm.ranking import baselines
from bfm.ranking.baselines import baseline_metrics, baseline_scores, best_neighbours, popularity_scores
from bfm.ranking.metrics import summarise
from tests.helpers import make_shards


def test_popularity_is_a_distribution(toy_shards):
    scores_QV = popularity_scores(toy_shards)(slice(2, 5))(slice(0, toy_shards.num_catalogue)).double().exp()
    assert scores_QV.shape == (3, toy_shards.num_catalogue)
    np.testing.assert_allclose(scores_QV.sum(1), 1.0, rtol=1e-6)


def test_floors_are_cached_and_a_read_only_directory_is_tolerated(tmp_path, monkeypatch):
    def refuse(path, data):
        raise PermissionError(13, "Permission denied")

    shards = make_shards(tmp_path / "toy", users=40)
    protocol = Protocol.load(shards)
    with monkeypatch.context() as patch:
        patch.setattr("bfm.events.shards.write_atomic", refuse)
        first = baseline_metrics(shards, protocol, "validation")
    assert baseline_metrics(shards, protocol, "validation") == first
    assert list(shards.kept_path("x").parent.glob("baselines-*"))
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
    # They buy the same items again, too.
    assert metrics["personal"]["nll"] < metrics["popularity"]["nll"]
    assert metrics["personal"]["recall@10"] > 1.2 * metrics["popularity"]["recall@10"]
    assert {"basket.recall@10", "warm.ndcg@10", "coverage@10"} <= set(metrics["co_occurrence"])


def test_pairs_are_counted_in_the_way_that_ranks_the_validation_part_best(toy_shards):
    protocol = Protocol.load(toy_shards)
    validation = protocol.queries("validation")
    counted = count_neighbours(toy_shards, COUNTINGS)
    scored = {way.counting: baselines._neighbour_scores(way, toy_shards, validation, (10,)) for way in counted}
    worth = {counting: summarise(scores).metrics for counting, scores in scored.items()}
    best = max(COUNTINGS, key=lambda counting: worth[counting]["ndcg@10"])
    assert len({metrics["ndcg@10"] for metrics in worth.values()}) == len(COUNTINGS)
    for _ in range(2):  # chosen, and read from the cache
        assert best_neighbours(toy_shards, protocol).counting == best
    assert list(toy_shards.kept_path("x").parent.glob("neighbours-*"))
    assert counted[1].weight_P.tolist() == count_neighbours(toy_shards, COUNTINGS[1:])[0].weight_P.tolist()


def test_queries_limit_the_floors_too(toy_shards):
    scores = baseline_scores(toy_shards, Protocol.load(toy_shards), "validation", k=(5,), queries=7)
    metrics = {floor: summarise(of_floor).metrics for floor, of_floor in scores.items()}
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
