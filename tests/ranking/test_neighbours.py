"""Counted neighbours and their scores against plain loops."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from bfm.events import neighbours as module
from bfm.events.neighbours import BROAD, LAST_EVENTS, REACH, SHARP, count_neighbours
from bfm.events.protocol import Protocol
from bfm.ranking.baselines import co_occurrence_scores
from tests.helpers import history_of, make_shards


def plain_weights(shards, counting):
    """{u: {v: c_uv / n_v^damping}} by loops."""
    counts = {}
    for user in range(shards.num_users):
        history = history_of(shards, user)
        items = history.item[: history.train_end].tolist()
        for first in range(len(items)):
            for second in range(first + 1, min(first + REACH + 1, len(items))):
                near = counting.lag_decay ** (second - first - 1)
                counts.setdefault(items[first], Counter())[items[second]] += near
                counts.setdefault(items[second], Counter())[items[first]] += near * counting.backward
    n_V = shards.train_counts
    return {u: {v: count / float(n_V[v]) ** counting.damping for v, count in row.items()} for u, row in counts.items()}


@pytest.mark.parametrize("counting", [BROAD, SHARP])
@pytest.mark.parametrize(("num_parts", "pass_pairs", "chunk_events"), [(1, 1 << 23, 1 << 20), (3, 500, 100)])
def test_neighbours_equal_plain_counting(tmp_path, monkeypatch, counting, num_parts, pass_pairs, chunk_events):
    monkeypatch.setattr(module, "_PASS_PAIRS", pass_pairs)
    monkeypatch.setattr("bfm.events.shards._CHUNK_EVENTS", chunk_events)
    shards = make_shards(tmp_path / "toy", users=30, num_parts=num_parts)
    neighbours, expected = count_neighbours(shards, [counting])[0], plain_weights(shards, counting)
    assert len(neighbours.lists) == shards.num_catalogue
    for item in range(shards.num_catalogue):
        low, high = neighbours.lists.offsets[item : item + 2]
        found = dict(zip(neighbours.lists[item].tolist(), neighbours.weight_P[low:high].tolist(), strict=True))
        assert found == pytest.approx(expected.get(item, {}), rel=1e-6)


def test_only_the_strongest_neighbours_are_kept(toy_shards, monkeypatch):
    monkeypatch.setattr(module, "NEIGHBOURS", 3)
    neighbours, expected = count_neighbours(toy_shards, [BROAD])[0], plain_weights(toy_shards, BROAD)
    for item, row in expected.items():
        low, high = neighbours.lists.offsets[item : item + 2]
        strongest = sorted(row.values(), reverse=True)[:3]
        assert sorted(neighbours.weight_P[low:high], reverse=True) == pytest.approx(strongest, rel=1e-6)
        assert (np.diff(neighbours.lists[item]) > 0).all()


@pytest.mark.parametrize("counting", [BROAD, SHARP])
def test_scores_are_summed_weights_of_the_last_events_and_ties_go_by_popularity(toy_shards, counting):
    table = Protocol.load(toy_shards).queries("test")
    weights, neighbours = plain_weights(toy_shards, counting), count_neighbours(toy_shards, [counting])[0]
    num_items, every, n_V = toy_shards.num_catalogue, slice(0, len(table)), toy_shards.train_counts.astype(float)
    block = co_occurrence_scores(neighbours, toy_shards, table)(every)
    scores_QV = block(slice(0, num_items)).numpy()
    pieces = [block(slice(low, min(low + 17, num_items))).numpy() for low in range(0, num_items, 17)]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), scores_QV)
    for query in range(len(table)):
        history = history_of(toy_shards, int(table.user[query])).item[: int(table.position[query]) + 1]
        expected_V = np.zeros(num_items)
        for age, item in enumerate(history[::-1][:LAST_EVENTS].tolist()):
            for neighbour, weight in weights.get(item, {}).items():
                expected_V[neighbour] += counting.age_decay**age * weight / n_V[item] ** counting.damping
        np.testing.assert_allclose(scores_QV[query], expected_V, rtol=1e-4, atol=1e-6)
        # Ids fall with popularity.
        assert (np.diff(scores_QV[query][expected_V == 0]) < 0).all()
