import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bfm.errors import UserError
from bfm.events import synth as module
from bfm.events.bayes import BayesFilter, World, WorldSpec
from bfm.events.manifest import Manifest
from bfm.events.protocol import build_protocol
from bfm.events.schema import load_schema
from bfm.events.shards import Shards, write_items, write_shard
from bfm.events.synth import optimum, write_synthetic

TINY = WorldSpec(items=7, seed=3, interests=3, switch=0.2, repeat=0.3, recent=2, leak=0.15)


def brute_force_joint(world, items):
    """p(items) summed over every path of interests: the generating process, written down once more."""
    spec = world.spec
    total = 0.0
    for path in itertools.product(range(spec.interests), repeat=len(items)):
        probability = 1.0
        for step, (interest, item) in enumerate(zip(path, items, strict=True)):
            drawn = world.prior_M[interest]
            if step:
                drawn = spec.switch * drawn + (1 - spec.switch) * (path[step - 1] == interest)
            inside = world.cluster_V == interest
            emission = spec.leak * world.popularity_V[item]
            if inside[item]:
                emission += (1 - spec.leak) * world.popularity_V[item] / world.popularity_V[inside].sum()
            if step:
                memory = items[max(step - spec.recent, 0) : step]
                emission = (1 - spec.repeat) * emission + spec.repeat * memory.count(item) / len(memory)
            probability *= drawn * emission
        total += probability
    return total


@pytest.mark.parametrize("history", [[], [2], [2, 2], [0, 5, 0], [6, 1, 3, 3], [4, 4, 4, 1, 0]])
def test_the_filter_is_the_exact_posterior_predictive(history):
    world = World(TINY)
    predictor = BayesFilter(world, 1)
    for item in history:
        predictor.observe(np.array([item]))
    before = brute_force_joint(world, history)
    expected = np.array([brute_force_joint(world, [*history, item]) / before for item in range(TINY.items)])
    predicted = predictor.probability(np.arange(TINY.items)[None])[0]
    np.testing.assert_allclose(predicted, expected, rtol=1e-12)
    assert expected.sum() == pytest.approx(1.0)
    assert predictor.entropy()[0] == pytest.approx(-(expected * np.log(expected)).sum(), rel=1e-12)
    for k in (1, 3, 10):
        assert predictor.top_mass(k)[0] == pytest.approx(np.sort(expected)[::-1][:k].sum(), rel=1e-12)


def test_generated_histories_follow_the_predictive():
    """Realised NLL and recall of the optimal predictor on drawn histories equal their exact expectations."""
    world = World(WorldSpec(items=300, seed=1, interests=5))
    lengths = np.random.default_rng(0).integers(10, 40, 3000)
    lengths = -np.sort(-lengths)
    items = world.draw_histories(np.random.default_rng(1), lengths)
    start = np.cumsum(lengths) - lengths
    predictor = BayesFilter(world, len(lengths))
    surprise, hits = [], []
    for step in range(10):
        following = items[start + step]
        every = predictor.probability(np.tile(np.arange(300), (len(lengths), 1)))
        own = every[np.arange(len(lengths)), following]
        surprise.append(-np.log(own) - predictor.entropy())
        hits.append(((every > own[:, None]).sum(axis=1) < 10) - predictor.top_mass(10))
        predictor.observe(following)
    for deviation in (np.array(surprise), np.array(hits)):
        assert abs(deviation.mean()) < 4 * deviation.std() / np.sqrt(deviation.size)
    frequency = np.bincount(items, minlength=300) / len(items)
    assert -(frequency * np.log(np.maximum(frequency, 1e-12))).sum() == pytest.approx(world.marginal_nll, abs=0.05)


def test_a_log_is_exact_in_size_deterministic_and_prepared_by_its_schema(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_EVENTS", 700)
    monkeypatch.setattr(module, "_FILE_EVENTS", 2000)
    progress = []
    sizes = {"events": 5000, "users": 120, "items": 80}
    truth = write_synthetic(tmp_path / "a", **sizes, seed=5, progress=progress.append)
    again = write_synthetic(tmp_path / "b", **sizes, seed=5)
    assert truth == again
    assert truth == json.loads((tmp_path / "a/truth.json").read_text())
    files = sorted((tmp_path / "a/events").iterdir())
    assert len(files) == 3
    assert all(file.read_bytes() == (tmp_path / "b/events" / file.name).read_bytes() for file in files)
    log = pq.read_table(tmp_path / "a/events")
    assert log.num_rows == 5000 == progress[-1]
    user = log["user_id"].to_numpy()
    time = log["timestamp"].cast("int64").to_numpy()
    assert len(np.unique(user)) == 120
    same_user = user[1:] == user[:-1]
    assert (np.diff(time)[same_user] > 0).all(), "no ties: one target per query"
    table = pq.read_table(tmp_path / "a/items.parquet")
    assert np.array_equal(table["item_id"].to_numpy(), np.arange(80))
    schema = load_schema(str(tmp_path / "a/schema.yaml"))
    assert set(schema.item_fields) == set(table.column_names) - {"item_id"}
    assert set(schema.context_fields) <= set(log.column_names)


def prepared(log, directory):
    """The synthetic log as a shard set, every event but the users' last in training or validation."""
    table = pq.read_table(log / "events")
    raw = table["item_id"].to_numpy()
    known, item = np.unique(raw, return_inverse=True)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(table["user_id"].to_numpy()))])
    lengths = np.diff(offsets)
    write_shard(
        directory, 0, item=item, time=table["timestamp"].cast("int64").to_numpy(), context={}, user_offsets=offsets,
        train_end=lengths // 2, valid_end=lengths, users=[str(user) for user in range(len(lengths))],
    )  # fmt: skip
    write_items(directory, pa.table({"item_id": [str(key) for key in known]}), {})
    sizes = {"users": len(lengths), "events": len(item), "items": len(known), "catalogue": len(known), "shards": 1}
    training = {"train_events": int((lengths // 2).sum()), "train_targets": 0, "time_range": (0, 1)}
    shape = {"has_clock": True, "split": {}, "fields": ()}
    return Shards(directory, Manifest(name="synthetic", seed=0, **sizes, **training, **shape))


def test_optimum_at_a_protocol_s_queries(tmp_path):
    truth = write_synthetic(tmp_path / "log", events=3000, users=60, items=40, interests=4)
    shards = prepared(tmp_path / "log", tmp_path / "shards")
    queries = build_protocol(shards, queries=200, seed=0).queries("validation")
    nll, recall = optimum(shards, queries, truth, k=5)
    world = World(WorldSpec(**truth["world"]))
    keys = shards.items_table(["item_id"])["item_id"].to_pylist()
    for index in range(0, len(queries), 13):
        history = shards.history(queries.user[index]).item[: queries.position[index] + 1]
        alone = BayesFilter(world, 1)
        for item in history:
            alone.observe(np.array([int(keys[item])]))
        assert nll[index] == pytest.approx(alone.entropy()[0], rel=1e-12)
        assert recall[index] == pytest.approx(alone.top_mass(5)[0], rel=1e-12)


def test_truth_is_better_than_no_history_and_covers_the_evaluated_range(tmp_path):
    truth = write_synthetic(tmp_path / "log", events=40_000, users=800, items=500, seed=0)
    assert truth["bayes_nll"] < truth["marginal_nll"] - 1
    assert 0.3 < truth["bayes_recall@10"] < 1
    assert 0 < truth["bayes_nll_error"] < 0.05
    assert truth["evaluated_events"] == pytest.approx(0.2 * 40_000, rel=0.05)


def test_item_features_carry_the_interests(tmp_path):
    write_synthetic(tmp_path / "log", events=2000, users=50, items=400, seed=0)
    world = World(WorldSpec(items=400, seed=0))
    table = pq.read_table(tmp_path / "log/items.parquet").to_pydict()
    agree = [category == f"c{cluster}" for category, cluster in zip(table["category"], world.cluster_V, strict=True)]
    assert 0.85 < np.mean(agree) < 0.97
    assert all(int(brand[1:]) // 8 == cluster for brand, cluster in zip(table["brand"], world.cluster_V, strict=True))


@pytest.mark.parametrize(
    "sizes",
    [
        {"events": 5, "users": 6, "items": 3},
        {"events": 5, "users": 0, "items": 3},
        {"events": 5, "users": 5, "items": 0},
        {"events": 50, "users": 5, "items": 10, "interests": 11},
    ],
)
def test_sizes_that_do_not_fit_are_refused(tmp_path, sizes):
    with pytest.raises(UserError, match=r"fit together|interests"):
        write_synthetic(tmp_path / "log", **sizes)
    assert not (tmp_path / "log").exists()


def test_an_existing_log_is_not_overwritten(tmp_path):
    write_synthetic(tmp_path / "log", events=100, users=10, items=20)
    with pytest.raises(UserError, match="already holds"):
        write_synthetic(tmp_path / "log", events=100, users=10, items=20)


def test_the_smallest_log_has_a_truth_without_figures(tmp_path):
    truth = write_synthetic(tmp_path / "log", events=3, users=3, items=1, interests=1)
    assert truth["evaluated_events"] == 0
    assert truth["bayes_nll"] is truth["bayes_nll_user_mean"] is None
