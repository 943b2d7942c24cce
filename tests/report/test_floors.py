"""Which floor is the strongest, what is below it, and the floors in a sweep's storage."""

from __future__ import annotations

import math

from bfm.events.protocol import Protocol
from bfm.files import Store
from bfm.ranking.baselines import baseline_metrics
from bfm.report.floors import publish_floors, read_floors, strongest, verdict

FLOORS = {
    "popularity": {"nll": 9.3, "recall@10": 0.08},
    "co_occurrence": {"recall@10": 0.12, "nll": math.nan},
    "personal": {"nll": 8.4, "recall@10": 0.1},
}


def test_the_strongest_has_the_lowest_loss_or_the_highest_share():
    assert strongest(FLOORS, "nll") == ("personal", 8.4)
    assert strongest(FLOORS, "recall@10") == ("co-occurrence", 0.12)
    assert strongest(FLOORS, "mrr@10") is None


def test_the_verdict_names_both_sides_and_equality_is_not_above():
    metrics = ["nll", "recall@10", "mrr@10"]
    below = verdict("It", {"nll": 9.0, "recall@10": 0.12, "mrr@10": 1.0}, FLOORS, metrics)
    assert below == "It is BELOW the strongest floor in nll (9, personal 8.4), recall@10 (0.12, co-occurrence 0.12)."
    mixed = verdict("It", {"nll": 8.0, "recall@10": 0.1}, FLOORS, metrics)
    assert mixed.startswith("It is BELOW the strongest floor in recall@10 (0.1, ")
    assert mixed.endswith(" and above it in nll (8, personal 8.4).")
    assert verdict("It", {"nll": 8.0}, FLOORS, metrics) == "It is above every floor in nll (8, personal 8.4)."
    assert verdict("It", {"nll": math.nan}, FLOORS, metrics) == ""
    assert verdict("It", {"nll": 8.0}, {}, metrics) == ""


def test_a_sweep_keeps_the_floors_of_its_queries(tmp_path, toy_shards):
    store = Store(tmp_path)
    assert read_floors(store) == {}
    floors = publish_floors(store, toy_shards, 11)
    assert set(floors) == {"popularity", "co_occurrence", "personal"}
    assert floors == read_floors(store)
    assert floors == baseline_metrics(toy_shards, Protocol.load(toy_shards), "validation", queries=11)
