import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from scipy.special import entr

from bfm.errors import UserError
from bfm.events.protocol import Protocol, query_targets
from bfm.events.schema import load_schema
from bfm.events.shards import Shards
from bfm.ranking.metrics import clustered_error, score_queries
from bfm.ranking.ranks import rank_targets
from bfm.synth import log as module
from bfm.synth.log import write_synthetic
from bfm.synth.world import BayesFilter, World, WorldSpec, histories
from tests.events.serial import prepare_serially
from tests.helpers import history_of

TINY = WorldSpec(items=7, seed=3, interests=3, switch=0.2, repeat=0.3, basket=1.5, leak=0.15)
SINGLE = replace(TINY, basket=1)


def emission(world, item, interest, history):
    """p(item | aisle, interest, history of baskets): the generating process, written down once more."""
    spec = world.spec
    shelf = world.aisle_V == world.aisle_V[item]
    inside = shelf & (world.cluster_V == interest)
    leak = spec.leak if inside.any() else 1.0
    fresh = leak * world.popularity_V[item] / world.popularity_V[shelf].sum()
    if inside[item]:
        fresh += (1 - leak) * world.popularity_V[item] / world.popularity_V[inside].sum()
    before = [bought for basket in history for bought in basket if shelf[bought]]
    return (1 - spec.repeat) * fresh + spec.repeat * (before[-1] == item) if before else fresh


def brute_force_joint(world, baskets):
    """p(baskets) summed over every path of interests."""
    spec, total = world.spec, 0.0
    for path in itertools.product(range(spec.interests), repeat=len(baskets)):
        probability = 1.0
        for step, (interest, basket) in enumerate(zip(path, baskets, strict=True)):
            drawn = world.prior_M[interest]
            if step:
                drawn = spec.switch * drawn + (1 - spec.switch) * (path[step - 1] == interest)
            aisles = world.size_A[len(basket) - 1] / math.comb(spec.aisles, len(basket))
            probability *= drawn * aisles * math.prod(emission(world, i, interest, baskets[:step]) for i in basket)
        total += probability
    return total


def known_baskets(shards, queries):
    """What each query knows: its user's baskets, as items of the world."""
    raw_V, found = _raw_items(shards), []
    for user, position in zip(queries.user, queries.position, strict=True):
        known = history_of(shards, user)
        items, times = raw_V[known.item[: position + 1]], known.time[: position + 1]
        found.append(np.split(items, np.flatnonzero(np.diff(times)) + 1))
    return found


def optimal(baskets_Q, truth):
    """The optimal predictor of each query."""
    predictor = BayesFilter(World(WorldSpec(**truth["world"])), len(baskets_Q))
    for step in range(max(map(len, baskets_Q))):
        rows = [row for row, baskets in enumerate(baskets_Q) if len(baskets) > step]
        next_ones = [baskets_Q[row][step] for row in rows]
        predictor.observe(np.array(rows), np.concatenate(next_ones), np.array([len(basket) for basket in next_ones]))
    return predictor


def _raw_items(shards):
    """Int64: the item of the world that an item of the shard set is."""
    return pc.cast(shards.items_table(["key_item_id"])["key_item_id"], pa.int64()).to_numpy()


def every_basket(world):
    """Every set of items of different aisles."""
    shelves = [[None, *np.flatnonzero(world.aisle_V == aisle)] for aisle in range(world.spec.aisles)]
    for choice in itertools.product(*shelves):
        if basket := [int(item) for item in choice if item is not None]:
            yield basket


HISTORIES = [[], [[2]], [[2], [2]], [[0], [5], [0]], [[6], [1], [3], [3]], [[4], [4], [4], [1], [0]]]
# The aisles of TINY hold the items [0, 1, 6], [4, 5] and [2, 3]; some have none of an interest's.
BASKETS = [[], [[2, 1]], [[0], [0, 4, 3]], [[5, 2], [5], [0, 5], [6, 4, 3]]]


@pytest.mark.parametrize(
    ("spec", "history"),
    [
        *((spec, history) for spec in (SINGLE, replace(SINGLE, repeat=0)) for history in HISTORIES),
        *((spec, history) for spec in (TINY, replace(TINY, leak=0)) for history in BASKETS),
    ],
)
def test_the_filter_is_the_best_distribution_exactly(spec, history):
    """For every basket T that may come, E[1{i in T} / |T|]: what minimises the mean NLL over distinct targets."""
    world = World(spec)
    predictor = BayesFilter(world, 1)
    for basket in history:
        predictor.observe(np.zeros(1, int), np.array(basket), np.array([len(basket)]))
    before = brute_force_joint(world, history)
    expected, total = np.zeros(spec.items), 0.0
    for basket in every_basket(world):
        probability = brute_force_joint(world, [*history, basket]) / before
        expected[basket] += probability / len(basket)
        total += probability
    assert total == pytest.approx(1.0)
    np.testing.assert_allclose(predictor.probability()[0], expected, rtol=1e-12)
    surprise = expected[expected > 0] * np.log(expected[expected > 0])
    for k in (1, 3, 10):
        found = module.expected(predictor, np.arange(1), k)[:, 0]
        assert found.tolist() == pytest.approx([-surprise.sum(), np.sort(expected)[::-1][:k].sum()], rel=1e-12)


def test_without_baskets_and_repeats_the_next_item_is_an_interest_s():
    """The settings zero: one item at a time, p(i) = sum over z of b_z p(i | z), popularity inside a cluster."""
    world = World(replace(SINGLE, repeat=0))
    assert world.spec.aisles == 1
    assert world.size_A.tolist() == [1.0]
    inside_MV = world.cluster_V == np.arange(3)[:, None]
    share_MV = inside_MV * world.popularity_V / (inside_MV * world.popularity_V).sum(axis=1, keepdims=True)
    expected = world.prior_M @ (0.85 * share_MV + 0.15 * world.popularity_V)
    np.testing.assert_allclose(BayesFilter(world, 1).probability()[0], expected, rtol=1e-12)


@pytest.mark.parametrize("basket", [1, 4])
def test_generated_histories_follow_the_predictive(basket):
    """Realised NLL, recall and items of the next baskets equal their exact expectations."""
    world = World(WorldSpec(items=300, seed=1, interests=5, basket=basket))
    lengths = np.random.default_rng(0).integers(10, 40, 700)
    rng = np.random.default_rng(1)
    size_B, baskets_U = world.draw_sizes(rng, lengths)
    assert np.add.reduceat(size_B, np.cumsum(baskets_U) - baskets_U).tolist() == lengths.tolist()
    users, deviations, every_item = [], [], []
    for step, (predictor, user_N, basket_N, item_E) in enumerate(histories(world, rng, size_B, baskets_U)):
        every_item.append(item_E)
        if step == 0:
            continue
        every, row_E = predictor.probability(user_N), np.repeat(np.arange(len(user_N)), size_B[basket_N])
        realised = np.zeros_like(every)
        realised[row_E, item_E] = 1 / size_B[basket_N][row_E]
        np.testing.assert_allclose(realised.sum(axis=1), 1.0, err_msg="the items of a basket are distinct")
        hit = (every >= -np.partition(-every, 9, axis=1)[:, 9:10]) * realised
        nll, recall = module.expected(predictor, user_N, 10)
        found = [-(realised * np.log(every)).sum(axis=1) - nll, hit.sum(axis=1) - recall]
        deviations.append(np.vstack([*found, (realised - every)[:, world.order_V[:: 300 // 20]].T]))
        users.append(user_N)
    for deviation in np.hstack(deviations):
        assert abs(deviation.mean()) < 4 * clustered_error(deviation, np.concatenate(users))
    frequency = np.bincount(np.concatenate(every_item), minlength=300) / lengths.sum()
    expected = BayesFilter(world, 1).probability()[0]
    assert entr(frequency).sum() == pytest.approx(entr(expected).sum(), abs=0.05)


def test_repeats_and_basket_sizes_come_out_as_asked():
    """Among so many equally popular items that hardly any comes twice by chance."""
    spec = WorldSpec(items=40_000, seed=2, interests=1, repeat=0.4, basket=3, zipf=0)
    world = World(spec)
    events = 40 * spec.aisles
    rng = np.random.default_rng(0)
    size_B, baskets_U = world.draw_sizes(rng, np.full(60, events))
    known = repeated = 0
    last = np.full((60, spec.aisles), -1)
    for _, user_N, basket_N, item_E in histories(world, rng, size_B, baskets_U):
        user_E, aisle_E = np.repeat(user_N, size_B[basket_N]), world.aisle_V[item_E]
        known += (last[user_E, aisle_E] >= 0).sum()
        repeated += (last[user_E, aisle_E] == item_E).sum()
        last[user_E, aisle_E] = item_E
    assert repeated / known == pytest.approx(spec.repeat, abs=4 * math.sqrt(0.24 / known))
    # The first baskets, which no end of a history can have cut.
    sizes = [of_user[:30] for of_user in np.split(size_B, np.cumsum(baskets_U)[:-1])]
    shares = np.bincount(np.concatenate(sizes), minlength=spec.aisles + 1)[1:] / (60 * 30)
    np.testing.assert_allclose(shares, world.size_A, atol=4 * math.sqrt(0.25 / (60 * 30)))
    np.testing.assert_allclose(world.size_A[1:] / world.size_A[:-1], 2 / 3)
    assert (world.size_A @ np.arange(1, spec.aisles + 1)) == pytest.approx(3, rel=0.1)


def test_a_log_by_default_is_like_a_real_one(tmp_path):
    """Grocery baskets: 41 % of events are repeats, and 89 % of neighbours share a timestamp."""
    write_synthetic(tmp_path / "log", events=100_000, users=1000, items=10_000)
    log = pq.read_table(tmp_path / "log/events")
    user, item, time = (log[name].cast("int64").to_numpy() for name in ("user_id", "item_id", "timestamp"))
    assert len(np.unique(user * 10_000 + item)) / len(user) == pytest.approx(1 - 0.41, abs=0.1)
    neighbours = user[1:] == user[:-1]
    assert (np.diff(time)[neighbours] == 0).mean() == pytest.approx(0.89, abs=0.02)


@pytest.mark.parametrize("basket", [1, 3])
def test_a_log_is_exact_in_size_deterministic_and_prepared_by_its_schema(tmp_path, monkeypatch, basket):
    monkeypatch.setattr(module, "_CHUNK_EVENTS", 700)
    progress = []
    sizes = {"events": 5000, "users": 120, "items": 80, "basket": basket}
    truth = write_synthetic(tmp_path / "a", **sizes, seed=5, progress=progress.append)
    again = write_synthetic(tmp_path / "b", **sizes, seed=5)
    assert truth == again
    assert truth == json.loads((tmp_path / "a/truth.json").read_text())
    files = sorted((tmp_path / "a/events").iterdir())
    assert len(files) == len(progress) > 5
    assert all(file.read_bytes() == (tmp_path / "b/events" / file.name).read_bytes() for file in files)
    log = pq.read_table(tmp_path / "a/events")
    assert log.num_rows == 5000 == progress[-1]
    user = log["user_id"].to_numpy()
    time = log["timestamp"].cast("int64").to_numpy()
    assert len(np.unique(user)) == 120
    same_user = user[1:] == user[:-1]
    assert (np.diff(time)[same_user] >= 0).all()
    assert (np.diff(time)[same_user] > 0).all() == (basket == 1)
    table = pq.read_table(tmp_path / "a/items.parquet")
    assert np.array_equal(table["item_id"].to_numpy(), np.arange(80))
    schema = load_schema(str(tmp_path / "a/schema.yaml"))
    assert set(schema.item_fields) == set(table.column_names) - {"item_id"}
    assert set(schema.context_fields) <= set(log.column_names)


def prepared(log):
    """Shards of a written log and the headline queries of its validation part."""
    prepare_serially(log / "schema.yaml", [log / "events"], log / "shards")
    shards = Shards.open(log / "shards")
    queries = Protocol.load(shards).queries("validation")
    return shards, queries[: queries.num_headline]


def protocol_metrics(shards, queries, predictor):
    """A predictor, ranked and scored by the code that scores models.

    Over the catalogue it sums to less than 1 where items of the world are not in it; scaled to 1 there, it is still
    best for the NLL of warm targets if they are one by one (`basket` 1), else nearly so.
    """
    raw_V, targets = _raw_items(shards), query_targets(shards, queries)
    ranked = rank_targets(
        lambda rows: lambda items: torch.from_numpy(np.log(predictor.probability(rows)[:, raw_V[items]])),
        targets,
        shards.num_catalogue,
        10,
    )
    places = {"query_Q": np.arange(len(queries)), "user_Q": queries.user, "basket_Q": queries.basket}
    return score_queries(ranked, targets, shards.num_catalogue, (10,), **places).values


def test_scored_like_a_model_the_optimum_is_reached_and_beats_every_wrong_world(tmp_path):
    truth = write_synthetic(tmp_path / "log", events=100_000, users=1000, items=200, interests=4)
    shards, queries = prepared(tmp_path / "log")
    assert shards.num_catalogue == 200
    baskets_Q = known_baskets(shards, queries)
    predictor = optimal(baskets_Q, truth)
    best = protocol_metrics(shards, queries, predictor)
    expected = module.expected(predictor, np.arange(len(queries)))
    for name, expected_Q in zip(("nll", "recall@10"), expected, strict=True):
        deviation_Q = best[name] - expected_Q
        assert abs(deviation_Q.mean()) < 4 * clustered_error(deviation_Q, queries.user), name
    wrong = [{"repeat": 0.1}, {"repeat": 0.6}, {"leak": 0.3}, {"switch": 0.5}]
    for change in wrong:
        other = protocol_metrics(shards, queries, optimal(baskets_Q, {"world": truth["world"] | change}))
        excess_Q = other["nll"] - best["nll"]
        assert excess_Q.mean() > 4 * clustered_error(excess_Q, queries.user), change


@pytest.mark.parametrize(("basket", "recall"), [(1, 0.3), (10, 0.15)])
def test_truth_is_better_than_no_history_and_covers_the_evaluated_range(tmp_path, basket, recall):
    truth = write_synthetic(tmp_path / "log", events=40_000, users=800, items=500, basket=basket)
    assert truth["bayes_nll"] < truth["marginal_nll"] - 1
    assert recall < truth["bayes_recall@10"] < 1
    assert 0 < truth["bayes_nll_error"] < 0.05
    log = pq.read_table(tmp_path / "log/events")
    user, time = (log[name].cast("int64").to_numpy() for name in ("user_id", "timestamp"))
    late = (time >= module._START_MS + 0.8 * module._SPAN_MS) & (np.diff(time, prepend=0) != 0)
    assert truth["evaluated_queries"] == (late[1:] & (user[1:] == user[:-1])).sum()


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
        {"events": 50, "users": 5, "items": 20, "repeat": 1.1},
        {"events": 50, "users": 5, "items": 20, "basket": 0.5},
    ],
)
def test_sizes_that_do_not_fit_are_refused(tmp_path, sizes):
    with pytest.raises(UserError, match=r"fit together|interests|probability|mean size"):
        write_synthetic(tmp_path / "log", **sizes)
    assert not (tmp_path / "log").exists()


def test_an_existing_log_is_not_overwritten(tmp_path):
    write_synthetic(tmp_path / "log", events=100, users=10, items=20)
    with pytest.raises(UserError, match="already holds"):
        write_synthetic(tmp_path / "log", events=100, users=10, items=20)


def test_the_smallest_log_has_a_truth_without_figures(tmp_path):
    truth = write_synthetic(tmp_path / "log", events=3, users=3, items=1)
    assert truth["evaluated_queries"] == 0
    assert truth["bayes_nll"] is truth["bayes_nll_error"] is None
