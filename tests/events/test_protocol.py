import shutil

import numpy as np
import pytest

from bfm.errors import CorruptError, UserError
from bfm.events import protocol as module
from bfm.events.protocol import PARTS, Protocol, build_protocol, query_targets
from bfm.events.repeats import training_repeats
from bfm.events.shards import Shards
from tests.helpers import history_of, make_shards


def bounds(shards, user, part):
    history = history_of(shards, user)
    return (history.train_end, history.valid_end) if part == "validation" else (history.valid_end, len(history.item))


def built(shards, **choices):
    return build_protocol(shards, repeats=training_repeats(shards), **choices)


def brute_force(shards, part):
    """{(user, position): (basket, targets)} straight from the definition."""
    found = {}
    for user in range(shards.num_users):
        history = history_of(shards, user)
        start, stop = bounds(shards, user, part)
        for following in range(max(start, 1), stop):
            time = history.time[following]
            targets = {int(history.item[e]) for e in range(following, stop) if history.time[e] == time}
            found[user, following - 1] = (bool(time == history.time[following - 1]), targets)
    return found


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["time", "leave one out", "leave one out with ties"])
def test_queries_and_targets_equal_brute_force(tmp_path, part, kind):
    options = {
        "time": {"num_parts": 3},
        "leave one out": {"split": "leave_one_out", "clock": False},
        "leave one out with ties": {"split": "leave_one_out"},
    }[kind]
    shards = make_shards(tmp_path, users=60, **options)
    queries = Protocol.load(shards).queries(part)
    expected = brute_force(shards, part)
    headline = {key: targets for key, (basket, targets) in expected.items() if not basket}
    targets = query_targets(shards, queries)
    assert len(targets) == len(queries)
    got = {}
    for index in range(len(queries)):
        key = int(queries.user[index]), int(queries.position[index])
        assert key not in got
        got[key] = set(targets[index].tolist())
        assert expected[key] == (bool(queries.basket[index]), got[key])
        assert (np.diff(targets[index]) > 0).all()
    assert set(headline) <= set(got)
    assert queries.num_headline == len(headline)
    assert len(got) - len(headline) <= len(headline) // 4


@pytest.mark.parametrize("part", PARTS)
def test_queries_are_nested_and_stratified(tmp_path, part):
    everything = Protocol.load(make_shards(tmp_path / "all", users=60)).queries(part)
    shards = make_shards(tmp_path / "sampled", users=60)
    assert not everything.basket[: everything.num_headline].any()
    assert everything.basket[everything.num_headline :].all()
    for limit in (1, 5, 17, 40, 80):
        sampled = built(shards, queries=limit, filter_seen=None, seed=shards.manifest.seed).queries(part)
        # A smaller sample is the beginning of a larger one ...
        assert np.array_equal(sampled.user[:limit], everything.user[:limit])
        assert np.array_equal(sampled.position[:limit], everything.position[:limit])
        assert sampled.num_headline == limit
        assert len(sampled) - limit <= limit // 4
        # ... and no user has two queries more than another that has one left.
        taken = np.bincount(sampled.user[:limit], minlength=60)
        available = np.bincount(everything.user[: everything.num_headline], minlength=60)
        assert (taken >= np.minimum(available, taken.max() - 1)).all()


def test_small_chunks_choose_the_same_queries(tmp_path, monkeypatch):
    shards = make_shards(tmp_path, users=60)
    usual = built(shards, queries=20, filter_seen=None, seed=9)
    monkeypatch.setattr(module, "_SPARE_CANDIDATES", 3)
    monkeypatch.setattr("bfm.events.shards._CHUNK_EVENTS", 3)
    assert built(shards, queries=20, filter_seen=None, seed=9).hash == usual.hash


def test_protocol_does_not_depend_on_the_partition(tmp_path):
    one, three = (make_shards(tmp_path / str(n), num_parts=n) for n in (1, 3))
    assert Protocol.load(one).hash == Protocol.load(three).hash


def test_hash_names_the_rule_the_sample_and_the_answers(tmp_path):
    shards = make_shards(tmp_path, users=40)
    hashes = {
        built(shards, queries=queries, filter_seen=seen, seed=seed).hash
        for queries in (20, None)
        for seen in (False, True)
        for seed in (0, 1)
    }
    assert len(hashes) == 8


def test_leave_one_out_keeps_the_validation_item_for_the_test_query(tmp_path):
    shards = make_shards(tmp_path, users=60, clock=False, split="leave_one_out")
    protocol = Protocol.load(shards)
    for part, back in (("validation", 2), ("test", 1)):
        queries = protocol.queries(part)
        targets = query_targets(shards, queries)
        eligible = [user for user in range(60) if len(history_of(shards, user).item) >= 3]
        assert sorted(queries.user.tolist()) == eligible
        for index, user in enumerate(queries.user):
            item = history_of(shards, user).item
            # Known: everything before the target; train = all but the last two events.
            assert queries.position[index] == len(item) - back - 1
            assert targets[index].tolist() == [item[-back]]
            assert history_of(shards, user).train_end == len(item) - 2


def test_altered_protocols_are_found(toy_shards, tmp_path):
    shutil.copytree(toy_shards.path, tmp_path / "copy")
    shards = Shards.open(tmp_path / "copy")
    path = tmp_path / "copy/protocol.json"
    raw = path.read_bytes()
    for altered in (raw.replace(b'"filter_seen": false', b'"filter_seen": true'), raw.replace(b"half", b"best")):
        path.write_bytes(altered)
        with pytest.raises(CorruptError, match=r"protocol\.json"):
            Protocol.load(shards)
    path.write_bytes(raw)
    table = tmp_path / "copy/protocol-test.npy"
    table.write_bytes(table.read_bytes()[:-8])
    with pytest.raises(CorruptError, match=r"protocol-test\.npy"):
        Protocol.load(shards)
    path.unlink()
    with pytest.raises(CorruptError, match="missing"):
        Protocol.load(shards)


def test_nothing_to_evaluate_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no query for validation"):
        make_shards(tmp_path, users=4, max_events=6)


def test_another_part_is_refused(toy_shards):
    with pytest.raises(UserError, match="validation, test"):
        Protocol.load(toy_shards).queries("train")
