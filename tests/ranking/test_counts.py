"""A model that mixes in counted neighbours: evaluated by plain loops, and exported."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from bfm.errors import CorruptError
from bfm.events.protocol import Protocol, query_targets
from bfm.events.windows import eval_windows
from bfm.files import Store
from bfm.model.batch import make_query_batch
from bfm.model.flops import FLOPS_VERSION
from bfm.ranking.predictor import Predictor
from bfm.ranking.queries import answer
from bfm.ranking.ranks import rank_targets
from bfm.training.checkpoint import save_checkpoint
from bfm.training.data import TrainingData
from bfm.training.engine import EngineState
from bfm.training.export import export_checkpoint
from bfm.training.single import evaluate_checkpoint
from tests.helpers import history_of
from tests.ranking.shop import CONFIG


def build(shards, copy):
    config = dataclasses.replace(CONFIG, params=4000, counts="neighbours", copy=copy)
    model = TrainingData.of(shards).build_model(config, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for values in model.parameters():
            values += 0.2 * torch.randn(values.shape, generator=generator)
    return config, model.eval()


@torch.no_grad()
def plain_distribution(model, shards, table, window):
    """p [Q, V] in float64, one query at a time."""
    v_ID, num_items, rows = model.embed_all(), shards.num_catalogue, []
    for query in range(len(table)):
        batch = make_query_batch(eval_windows(shards, table[query : query + 1], window, model.neighbours))
        said = model.contextualize(batch, v_ID[batch.items_U])
        gates = said.log_gate_TX1[0].double().exp().tolist()
        p_V = gates[0] * torch.softmax(model.scale * said.h_QD[0] @ v_ID[:num_items].T, 0).double().numpy()
        history = history_of(shards, int(table.user[query])).item[: int(table.position[query]) + 1][-window:]
        if said.pointer_A is not None:
            for item, weight in zip(history, said.pointer_A.tolist(), strict=False):
                if item < num_items:
                    p_V[item] += gates[1] * weight
        lists, weight_P = model.neighbours.lists, model.neighbours.weight_P.astype(float)
        for item, weight in zip(history[::-1], said.counted_TM[0].tolist(), strict=False):
            if item < num_items and len(lists[item]):
                low, high = lists.offsets[item : item + 2]
                p_V[lists[item]] += gates[-1] * weight * weight_P[low:high] / weight_P[low:high].sum()
        rows.append(p_V / p_V.sum())
    return np.array(rows)


@pytest.mark.parametrize("copy", ["pointer", "none"])
def test_the_distribution_is_the_mixture(shop, copy):
    config, model = build(shop.shards, copy)
    shards, table = shop.shards, Protocol.load(shop.shards).queries("validation")
    num_items, v_ID = shards.num_catalogue, model.embed_all()
    answers = answer(model, v_ID, shards, table, config.window, num_items)
    scores, queries = answers.scores(), len(table)
    expected_QV = plain_distribution(model, shards, table, config.window)
    p_QV = scores(slice(0, queries))(slice(0, num_items)).exp().numpy()
    np.testing.assert_allclose(p_QV, expected_QV, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(p_QV.sum(1), 1.0, rtol=1e-5)
    pieces = [scores(slice(3, queries))(slice(low, min(low + 7, num_items))) for low in range(0, num_items, 7)]
    np.testing.assert_allclose(torch.cat(pieces, 1).exp().numpy(), p_QV[3:], rtol=1e-4)
    softmax_QV = -torch.log_softmax(answers.h_QD * answers.scale @ v_ID[:num_items].T, 1)
    loss_Q = answers.mixed_loss(softmax_QV[:, 5], torch.arange(queries), torch.full((queries,), 5))
    np.testing.assert_allclose(torch.exp(-loss_Q).numpy(), p_QV[:, 5], rtol=1e-4)


def test_several_threads_rank_as_one_does(shop):
    """More queries than one chunk of rows takes."""
    config, model = build(shop.shards, "pointer")
    shards, table = shop.shards, Protocol.load(shop.shards).queries("validation")
    table = table[np.tile(np.arange(len(table)), 5)]
    v_ID, targets = model.embed_all(), query_targets(shards, table)
    assert len(table) > 1000
    ranked, threads = [], torch.get_num_threads()
    try:
        for num_threads in (1, 4):
            torch.set_num_threads(num_threads)
            scores = answer(model, v_ID, shards, table, config.window, shards.num_catalogue).scores()
            ranked.append(rank_targets(scores, targets, shards.num_catalogue, 10))
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(ranked[0].top_Qk, ranked[1].top_Qk)
    np.testing.assert_array_equal(ranked[0].rank_N, ranked[1].rank_N)


def test_an_export_lists_what_evaluation_ranks(shop, tmp_path):
    config, model = build(shop.shards, "pointer")
    meta = {
        "config": config.as_dict(),
        "seed": 0,
        "counters": {"stage": 1, "phase": "cooldown", "path_flops": 0, "events": 0},
        "shards_hash": shop.shards.hash,
        "flops_version": FLOPS_VERSION,
    }
    weights = {name: values.detach() for name, values in model.named_parameters()}
    save_checkpoint(Store(tmp_path), "counts", EngineState(weights), meta)
    checkpoint, shards = str(tmp_path / "counts"), str(shop.shards.path)
    export_checkpoint(checkpoint, shards, tmp_path / "export")
    assert "neighbours.npz" in (tmp_path / "export" / "README.md").read_text()
    table = Protocol.load(shop.shards).queries("validation")
    table = table[np.flatnonzero(~table.basket)]
    top = Predictor.load(tmp_path / "export").top(shop.shards, table, 10)
    p_QV = plain_distribution(model, shop.shards, table, config.window)
    np.testing.assert_allclose(np.exp(top.score_Qk), -np.sort(-p_QV, axis=1)[:, :10], rtol=1e-3)
    targets = query_targets(shop.shards, table)
    recall = [np.isin(targets[query], top.item_Qk[query]).mean() for query in range(len(table))]
    found = evaluate_checkpoint(checkpoint, shards, "validation", None)
    assert np.mean(recall) == pytest.approx(found["metrics"]["recall@10"], rel=1e-6)
    (tmp_path / "export" / "neighbours.npz").write_bytes(b"damaged")
    with pytest.raises(CorruptError, match=r"neighbours\.npz"):
        Predictor.load(tmp_path / "export")
