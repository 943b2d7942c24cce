"""Which floor is the strongest, what is below it, and the floors in a sweep's storage."""

from __future__ import annotations

import math

from bfm.events.protocol import Protocol
from bfm.files import Store
from bfm.laws.frontier import Gap, unpaired
from bfm.ranking.baselines import baseline_metrics, baseline_scores
from bfm.ranking.paired import Pairing, paired_gap, scores_object
from bfm.report.floors import (
    against_strongest,
    publish_floors,
    read_floor_scores,
    read_floors,
    strongest,
    verdict,
)

FLOORS = {
    "popularity": {"nll": 9.3, "recall@10": 0.08},
    "co_occurrence": {"recall@10": 0.12, "nll": math.nan},
    "personal": {"nll": 8.4, "recall@10": 0.1},
}


def said(values, floors=FLOORS, compare=unpaired):
    row = {"metrics": values}
    return verdict("It", {"nll": row, "recall@10": row, "mrr@10": row}, floors, compare)


def test_the_strongest_has_the_lowest_loss_or_the_highest_share():
    assert strongest(FLOORS, "nll") == ("personal", 8.4)
    assert strongest(FLOORS, "recall@10") == ("co-occurrence", 0.12)
    assert strongest(FLOORS, "mrr@10") is None


def test_the_verdict_names_both_sides_and_equality_is_not_above():
    below = said({"nll": 9.0, "recall@10": 0.12, "mrr@10": 1.0})
    assert below == "It is BELOW the strongest floor in nll (9, personal 8.4), recall@10 (0.12, co-occurrence 0.12)."
    mixed = said({"nll": 8.0, "recall@10": 0.1})
    assert mixed.startswith("It is BELOW the strongest floor in recall@10 (0.1, ")
    assert mixed.endswith(" and above it in nll (8, personal 8.4).")
    assert said({"nll": 8.0}) == "It is above every floor in nll (8, personal 8.4)."
    assert said({"nll": math.nan}) == ""
    assert said({"nll": 8.0}, floors={}) == ""


def test_the_verdict_tells_paired_differences_and_who_is_within_error():
    def compare(row, floor, metric):
        return Gap(row["metrics"][metric] - floor["metrics"][metric], 0.01, paired=True)

    values = {"nll": 8.385, "recall@10": 0.15}
    assert said(values, compare=compare) == (
        "It is within error of the strongest floor in nll (8.385, personal 8.4: -0.015 \u00b1 0.010) and above it in "
        "recall@10 (0.15, co-occurrence 0.12: +0.030 \u00b1 0.010)."
    )
    assert said({**values, "nll": 8.5}, compare=compare).startswith("It is BELOW the strongest floor in nll (8.5, ")
    found = against_strongest({"metrics": values}, "nll", FLOORS, compare)
    assert (found.floor, found.side) == (("personal", 8.4), "within error of")


def test_a_sweep_keeps_the_floors_of_its_queries(tmp_path, toy_shards):
    store = Store(tmp_path)
    assert read_floors(store) == {}
    protocol = Protocol.load(toy_shards)
    scores = baseline_scores(toy_shards, protocol, "validation", queries=11)
    floors = publish_floors(store, scores)
    assert set(floors) == {"popularity", "co_occurrence", "personal"}
    assert floors == read_floors(store)
    assert floors == baseline_metrics(toy_shards, protocol, "validation", queries=11)
    # A model that scores as a floor does is within error of it, whichever way its row tells its scores.
    name, data = scores_object("model", scores["popularity"])
    store.put(name, data)
    row = {"scores": name, "protocol_hash": "p", "metrics": floors["popularity"]}
    compare = Pairing(store, read_floor_scores(store))
    assert against_strongest(row, "nll", {"popularity": floors["popularity"]}, compare).gap == Gap(0.0, 0.0, True)
    found = against_strongest(row, "nll", floors, compare)
    assert found.gap == paired_gap(scores["popularity"], scores[found.floor.name], "nll")
    assert 0 < found.gap.error < 1
