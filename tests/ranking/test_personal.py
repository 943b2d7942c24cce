"""The personal floor against plain loops: its distribution, its choice, and logs where it says nothing."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from bfm.events.protocol import Protocol, query_targets
from bfm.ranking import baselines, personal
from bfm.ranking.metrics import summarise
from bfm.ranking.personal import DECAYS, SHARES, Personal, best_personal
from tests.helpers import history_of, make_shards


def plain(shards, user, position, way):
    """p over the catalogue, from the definition."""
    p = (shards.train_counts + 1.0) / (shards.train_counts + 1.0).sum()
    history = history_of(shards, user).item[: position + 1].tolist()
    weights = {}
    for age, item in enumerate(reversed(history)):
        if item < shards.num_catalogue:
            weights[item] = weights.get(item, 0.0) + way.decay**age
    if not weights:
        return p
    own = np.zeros(len(p))
    own[list(weights)] = list(weights.values())
    return (1 - way.share) * p + way.share * own / own.sum()


@pytest.mark.parametrize("way", [Personal(0.9, 0.3), Personal(1.0, 0.5)])
def test_every_query_has_the_distribution_of_the_definition(toy_shards, way):
    table = Protocol.load(toy_shards).queries("test")
    scores, num_items = way.scores(toy_shards, table), toy_shards.num_catalogue
    for rows in (slice(0, 7), slice(7, len(table))):
        pieces = [scores(rows)(items) for items in (slice(0, 11), slice(11, num_items))]
        p_RV = np.concatenate(pieces, axis=1).astype(float)
        expected = [
            plain(toy_shards, *query, way) for query in zip(table.user[rows], table.position[rows], strict=True)
        ]
        np.testing.assert_allclose(np.exp(p_RV), expected, rtol=2e-5)
        np.testing.assert_allclose(np.exp(p_RV).sum(1), 1.0, rtol=1e-5)


def test_a_history_of_nothing_that_the_catalogue_knows_is_popularity(tmp_path):
    shards = make_shards(tmp_path, users=60)
    # Only the most popular item is known now.
    shards.manifest = dataclasses.replace(shards.manifest, catalogue=1)
    table = Protocol.load(shards).queries("validation")
    without = [history_of(shards, u).item[: p + 1].min() > 0 for u, p in zip(table.user, table.position, strict=True)]
    assert 0 < sum(without) < len(table)
    scores = Personal(0.9, 0.7).scores(shards, table)(slice(0, len(table)))(slice(0, 1))
    np.testing.assert_allclose(scores, 0.0, atol=1e-6)


def test_old_events_of_a_long_history_cannot_make_a_row_vanish(toy_shards):
    events = personal._Events(np.zeros(2, np.int64), np.array([1, 2]), np.array([0, 90_000]))
    shares = personal._shares(events, 0.9, 3)
    assert (shares.item_P.tolist(), shares.mass_P.tolist()) == ([1], [1.0])


def test_decay_and_share_are_those_of_the_best_nll(tmp_path, monkeypatch):
    shards = make_shards(tmp_path, users=60)
    protocol = Protocol.load(shards)
    table = protocol.queries("validation")
    table = table[: table.num_headline]
    targets = query_targets(shards, table)

    def nll(way):
        found = []
        for row in range(len(table)):
            p_V = plain(shards, table.user[row], table.position[row], way)
            losses = [-math.log(p_V[item]) for item in targets[row] if item < len(p_V)]
            found += [np.mean(losses)] if losses else []
        return np.mean(found)

    losses = {Personal(decay, share): nll(Personal(decay, share)) for decay in DECAYS for share in SHARES}
    monkeypatch.setattr(personal, "_CHUNK_EVENTS", 200)
    best = best_personal(shards, protocol)
    assert best == min(losses, key=losses.__getitem__)
    measured = baselines._measure(best.scores(shards, table), shards, table, (10,))
    assert summarise(measured).metrics["nll"] == pytest.approx(losses[best], rel=1e-5)
    assert list(shards.kept_path("x").parent.glob("personal-*"))
    monkeypatch.setattr(personal, "_losses", lambda *_: pytest.fail("the cache was not read"))
    assert best_personal(shards, protocol) == best
