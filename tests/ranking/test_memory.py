"""A model interpolated with a memory: the distribution by plain arithmetic, its share, and where it is used."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from bfm.errors import CorruptError, UserError
from bfm.events.protocol import Protocol, QueryTable, query_targets
from bfm.ranking.evaluate import encode
from bfm.ranking.memory import SHARES, Memory, choose_share, parse_share
from bfm.ranking.metrics import summarise
from bfm.ranking.neighbours import SHARP, NeighbourScores, count_neighbours
from bfm.ranking.predictor import Predictor
from bfm.ranking.ranks import DotScores, rank_targets
from bfm.training.export import export_checkpoint
from bfm.training.single import evaluate_checkpoint, memory_of
from tests.ranking.shop import CONFIG


@pytest.fixture(scope="module")
def encoded(shop):
    return encode(shop.model(), shop.shards, Protocol.load(shop.shards), "validation", CONFIG.window)


@pytest.fixture(scope="module")
def neighbours(shop):
    return count_neighbours(shop.shards, [SHARP])[0]


def plain_distribution(encoded, neighbours, shards, share):
    """p [Q, V] in float64, with nothing in blocks."""
    every = slice(0, len(encoded.table)), slice(0, shards.num_catalogue)
    p_QV = torch.softmax(encoded.scorer(*every).double(), 1).numpy()
    weight_QV = NeighbourScores(neighbours, shards, encoded.table)(*every).astype(np.float64)
    known_Q = weight_QV.sum(1) > 0
    memory_QV = weight_QV[known_Q] / weight_QV[known_Q].sum(1, keepdims=True)
    p_QV[known_Q] = (1 - share) * p_QV[known_Q] + share * memory_QV
    return p_QV


@pytest.mark.parametrize("share", [0.05, 0.4, 0.99])
def test_the_distribution_is_the_weighted_mean(shop, encoded, neighbours, share):
    block = Memory(neighbours, share).beside(encoded.scorer, shop.shards, encoded.table)
    expected_QV = plain_distribution(encoded, neighbours, shop.shards, share)
    num_items, queries = shop.shards.num_catalogue, len(encoded.table)
    p_QV = block(slice(0, queries), slice(0, num_items)).exp().numpy()
    np.testing.assert_allclose(p_QV, expected_QV, rtol=1e-4)
    np.testing.assert_allclose(p_QV.sum(1), 1.0, rtol=1e-5)
    pieces = [block(slice(3, queries), slice(low, min(low + 7, num_items))) for low in range(0, num_items, 7)]
    np.testing.assert_allclose(torch.cat(pieces, 1).exp().numpy(), p_QV[3:], rtol=1e-5)


def test_several_threads_rank_as_one_does(shop, encoded, neighbours):
    """More queries than one chunk of rows takes."""
    table = encoded.table
    many = QueryTable(np.tile(table.user, 5), np.tile(table.position, 5), np.tile(table.basket, 5), table.filter_seen)
    scorer = DotScores((encoded.answers.h_QD * encoded.answers.scale).repeat(5, 1), encoded.catalogue_VD)
    targets = query_targets(shop.shards, many)
    assert len(many) > 1000
    ranked = []
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 4):
            torch.set_num_threads(num_threads)
            block = Memory(neighbours, 0.4).beside(scorer, shop.shards, many)
            ranked.append(rank_targets(block, targets, shop.shards.num_catalogue, 10))
    finally:
        torch.set_num_threads(threads)
    one, four = ranked
    np.testing.assert_array_equal(one.rank_N, four.rank_N)
    np.testing.assert_array_equal(one.top_Qk, four.top_Qk)
    np.testing.assert_allclose(one.rank_N[: len(one.rank_N) // 5], one.rank_N[-len(one.rank_N) // 5 :])


def test_a_query_without_neighbours_keeps_the_models_distribution(shop, encoded, neighbours):
    lists = neighbours.lists
    nobody = dataclasses.replace(lists, ids=lists.ids[:0], offsets=np.zeros_like(lists.offsets))
    empty = dataclasses.replace(neighbours, lists=nobody, weight=neighbours.weight[:0])
    with_memory = summarise(encoded.ranked(Memory(empty, 0.5).beside(encoded.scorer, shop.shards, encoded.table)))
    alone = summarise(encoded.ranked(encoded.scorer))
    assert with_memory.metrics == pytest.approx(alone.metrics, rel=1e-5)


def test_no_share_is_the_model_and_an_evaluation_has_the_nll_of_the_mixture(shop, encoded, neighbours):
    alone = summarise(encoded.ranked(Memory(neighbours, 0.0).beside(encoded.scorer, shop.shards, encoded.table)))
    assert alone.metrics == summarise(encoded.ranked(encoded.scorer)).metrics
    scores = encoded.ranked(Memory(neighbours, 0.3).beside(encoded.scorer, shop.shards, encoded.table))
    p_QV = plain_distribution(encoded, neighbours, shop.shards, 0.3)
    targets = query_targets(shop.shards, encoded.table)
    headline = [query for query in range(len(targets)) if not encoded.table.basket[query]]
    expected = []
    for query in headline:
        warm = [item for item in targets[query].tolist() if item < p_QV.shape[1]]
        expected += [-np.log(p_QV[query, warm]).mean()] if warm else []
    assert summarise(scores).metrics["nll"] == pytest.approx(np.mean(expected), rel=1e-4)


def test_the_share_is_the_best_on_the_queries_it_is_given(shop, encoded, neighbours):
    worth = {}
    for share in SHARES:
        block = Memory(neighbours, share).beside(encoded.scorer, shop.shards, encoded.table)
        worth[share] = summarise(encoded.ranked(block)).metrics["ndcg@10"]
    assert len(set(worth.values())) > 2
    assert worth[choose_share(encoded, shop.shards, neighbours)] == max(worth.values())
    model, protocol = shop.model(), Protocol.load(shop.shards)
    assert memory_of(model, shop.shards, protocol, CONFIG.window, None).share in SHARES
    assert memory_of(model, shop.shards, protocol, CONFIG.window, 0.123).share == 0.123


@pytest.mark.parametrize("text", ["1", "-0.1", "nan", "much", ""])
def test_a_wrong_share_is_refused(text):
    with pytest.raises(UserError, match=r"--memory.*use auto or a number from 0 to under 1"):
        parse_share(text)


def test_an_export_with_a_memory_ranks_as_evaluation_does(shop, tmp_path):
    made = export_checkpoint(shop.checkpoint, str(shop.shards.path), tmp_path / "export", memory="0.4")
    assert made["memory"]["share"] == 0.4
    table = Protocol.load(shop.shards).queries("validation")
    table = table[np.flatnonzero(~table.basket)]
    top = Predictor.load(tmp_path / "export").top(shop.shards, table, 10)
    targets = query_targets(shop.shards, table)
    recall = [np.isin(targets[query], top.item_Qk[query]).mean() for query in range(len(table))]
    found = evaluate_checkpoint(shop.checkpoint, str(shop.shards.path), "validation", None, memory="0.4")
    assert np.mean(recall) == pytest.approx(found["memory"]["metrics"]["recall@10"], rel=1e-6)
    assert np.mean(recall) != pytest.approx(found["metrics"]["recall@10"], rel=1e-3)
    assert (np.exp(top.score_Qk).sum(1) <= 1 + 1e-5).all()
    assert (np.diff(top.score_Qk) <= 0).all()
    assert Predictor.load(tmp_path / "export").top(shop.shards, table[:0], 3).item_Qk.shape == (0, 3)
    (tmp_path / "export" / "memory.safetensors").write_bytes(b"damaged")
    with pytest.raises(CorruptError, match=r"memory\.safetensors"):
        Predictor.load(tmp_path / "export")


def test_a_share_of_nothing_is_left_out_of_an_export(shop, tmp_path):
    made = export_checkpoint(shop.checkpoint, str(shop.shards.path), tmp_path / "export", memory="0")
    assert made["memory"] is None
    assert not (tmp_path / "export" / "memory.safetensors").exists()
    assert Predictor.load(tmp_path / "export").memory is None


def test_the_verbs(bfm, shop, tmp_path):
    shards = ("--shards", shop.shards.path)
    code, out, err = bfm("eval", shop.checkpoint, *shards, "--memory", "auto", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert set(found["memory"]["metrics"]) == set(found["metrics"])
    assert found["memory"]["share"] in SHARES
    code, out, err = bfm("eval", shop.checkpoint, *shards, "--memory", "0.25")
    assert code == 0, err
    assert "with memory, 25%" in out
    code, out, err = bfm("export", shop.checkpoint, *shards, "--out", tmp_path / "model", "--memory", "0.25")
    assert code == 0, err
    assert "with a memory of 25%" in out
    assert "memory.safetensors" in (tmp_path / "model" / "README.md").read_text()
    log, file = shop.folder / "log.parquet", tmp_path / "predictions.parquet"
    code, _, err = bfm("predict", tmp_path / "model", log, "--out", file)
    assert code == 0, err
    assert {len(items) for items in pq.read_table(file)["items"].to_pylist()} == {10}
    for verb in (("eval",), ("export", "--out", tmp_path / "none")):
        code, out, err = bfm(verb[0], shop.checkpoint, *shards, *verb[1:], "--memory", "1")
        assert (code, out) == (2, "")
        assert err.startswith("bfm: --memory: ")
        assert err.count("\n") == 1
