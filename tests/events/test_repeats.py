"""How much repeats, against plain loops, and the rule about seen items that follows from it."""

from __future__ import annotations

import pytest

from bfm.events.protocol import Protocol, build_protocol
from bfm.events.repeats import NOISE, rule_facts, rule_words, training_repeats
from bfm.events.shards import Shards
from tests.events.serial import prepare_serially
from tests.helpers import history_of, make_shards


def brute_force(shards) -> dict[str, int]:
    targets = seen = 0
    for user in range(shards.num_users):
        history = history_of(shards, user)
        before: set[int] = set()
        train = list(zip(history.time[: history.train_end].tolist(), history.item.tolist(), strict=False))
        for time in sorted({time for time, _ in train}):
            bought = {item for when, item in train if when == time}
            if time != train[0][0]:
                targets += len(bought)
                seen += len(bought & before)
            before |= bought
    return {"targets": targets, "seen": seen}


@pytest.mark.parametrize("options", [{"num_parts": 3}, {"split": "leave_one_out", "clock": False}])
def test_repeats_equal_brute_force_in_chunks_of_any_size(tmp_path, monkeypatch, options):
    shards = make_shards(tmp_path, users=50, **options)
    expected = brute_force(shards)
    assert 0 < expected["seen"] < expected["targets"]
    for chunk in (1, 100, 1 << 20):
        monkeypatch.setattr("bfm.events.shards._CHUNK_EVENTS", chunk)
        assert training_repeats(shards) == expected


@pytest.mark.parametrize(("seen", "noise"), [(0, True), (9, True), (10, False), (900, False)])
def test_lists_leave_out_seen_items_where_repeats_are_noise_unless_the_schema_says_otherwise(seen, noise):
    found = {"targets": int(10 / NOISE), "seen": seen}
    assert rule_facts(found, None)["filter_seen"] == noise
    for given in (True, False):
        facts = rule_facts(found, given)
        assert facts["filter_seen"] == given
        assert "the schema's choice" in rule_words(facts)


def test_a_log_without_targets_says_nothing_and_filters_nothing():
    facts = rule_facts({"targets": 0, "seen": 0}, None)
    assert not facts["filter_seen"]
    assert "0.00%" in rule_words(facts)


@pytest.mark.parametrize("order", ["time: {column: t, unit: s}", "position: t"])
@pytest.mark.parametrize("repeats", [True, False])
def test_the_default_follows_the_log_whatever_the_split(tmp_path, order, repeats):
    lines = [f"{user},{step},{(user + step) % (3 if repeats else 97)}" for user in range(40) for step in range(30)]
    (tmp_path / "log.csv").write_text("\n".join(["u,t,i", *lines]))
    schema = f"name: s\nuser: u\n{order}\nitem: i\nsplit: {{by: leave_one_out}}\n"
    (tmp_path / "s.yaml").write_text(schema)
    manifest = prepare_serially(tmp_path / "s.yaml", [tmp_path / "log.csv"], tmp_path / "shards")
    protocol = Protocol.load(Shards.open(tmp_path / "shards"))
    assert protocol.filter_seen is not repeats
    assert manifest.checks["seen_items"] == protocol.seen_rule
    assert ("stay in lists" in protocol.seen_rule) == repeats
    (tmp_path / "s.yaml").write_text(f"{schema}evaluation: {{filter_seen: {str(repeats).lower()}}}\n")
    prepare_serially(tmp_path / "s.yaml", [tmp_path / "log.csv"], tmp_path / "other")
    asked = Protocol.load(Shards.open(tmp_path / "other"))
    assert asked.filter_seen is repeats
    assert asked.hash != protocol.hash


def test_the_rule_of_the_toy_log_is_in_its_protocol(tmp_path):
    shards = make_shards(tmp_path, users=50)
    by_log = build_protocol(shards, repeats=training_repeats(shards), queries=None, filter_seen=None, seed=0)
    assert by_log.info["training_repeats"] == brute_force(shards)
    assert by_log.info["filter_seen_by"] == "log"
    assert not by_log.filter_seen
