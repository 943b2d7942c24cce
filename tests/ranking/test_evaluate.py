"""Evaluation of a real (small) model on toy shards against plain loops over queries."""

from __future__ import annotations

import datetime
import math
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bfm.errors import DivergedError, UserError
from bfm.events.protocol import Protocol, query_targets
from bfm.events.shards import Shards
from bfm.events.windows import eval_windows
from bfm.model.batch import make_query_batch
from bfm.model.flops import ModelCost
from bfm.model.sizing import size_model
from bfm.model.two_part import ItemStore, TwoPartModel
from bfm.objective import softmax as softmax_module
from bfm.objective.sampling import drawn_inclusion, fixed_candidates
from bfm.ranking import evaluate as evaluate_module
from bfm.ranking import mixed_scores
from bfm.ranking import queries as queries_module
from bfm.ranking.evaluate import evaluate
from bfm.ranking.metrics import merge, summarise
from tests.helpers import history_of, make_shards

WINDOW = 16
torch.set_num_threads(1)


def build_model(shards, share=0.0, pointer=True):
    """With noise on all weights: some begin at zero, and what they multiply would go untested."""
    shape = size_model(4e3, share, d_item=16, pointer=pointer)
    store = ItemStore(shards.item_fields, shards.item_arrays)
    model = TwoPartModel(shape, shards.manifest.fields, store, shards.manifest.has_clock, table_width=8, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for values in model.parameters():
            values += 0.1 * torch.randn(values.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module", params=[True, False], ids=["pointer", "softmax"])
def world(request, toy_shards):
    return build_model(toy_shards, pointer=request.param), toy_shards, Protocol.load(toy_shards)


@torch.no_grad()
def plain_scores(model, shards, table):
    """log p [Q, V] and the softmax's scores, log gate and mass that it is made of, one query at a time; targets."""
    v_ID = model.embed_all()
    targets, rows = query_targets(shards, table), []
    for query in range(len(table)):
        batch = make_query_batch(eval_windows(shards, table[query : query + 1], WINDOW))
        said = model.contextualize(batch, v_ID[batch.items_U])
        score_V = (model.scale * said.h_QD @ v_ID[: shards.num_catalogue].T)[0].double().numpy()
        mass_V, gate = np.zeros(len(score_V)), said.log_gate_TX1[0, 0].item()
        if said.pointer_A is not None:
            items = history_of(shards, int(table.user[query])).item[: int(table.position[query]) + 1][-WINDOW:]
            for item, mass in zip(items, said.pointer_A.double().numpy(), strict=False):
                if item < len(mass_V):
                    mass_V[item] += mass * math.exp(said.log_gate_TX1[0, 1].item())
        total = math.exp(gate) + mass_V.sum()
        rows.append((score_V, gate - math.log(total), mass_V / total))
    log_p_QV = [np.log(np.exp(score_V + gate - np.logaddexp.reduce(score_V)) + mass) for score_V, gate, mass in rows]
    return np.array(log_p_QV), rows, [targets[query].tolist() for query in range(len(table))]


def plain_metrics(scores_V, targets, hidden, k=10):
    num_items = len(scores_V)
    ranks, nlls = [], []
    for target in targets:
        if target >= num_items:
            ranks.append(math.inf)
            continue
        others = [v for v in range(num_items) if v != target and v not in hidden]
        better = sum(scores_V[v] > scores_V[target] for v in others)
        ranks.append(math.inf if target in hidden else 1 + better)
        nlls.append(np.log(np.exp(scores_V).sum()) - scores_V[target])
    gains = sum(1 / math.log2(1 + rank) for rank in ranks if rank <= k)
    ideal = sum(1 / math.log2(1 + i) for i in range(1, min(k, len(ranks)) + 1))
    best = min(ranks)
    return {
        "nll": np.mean(nlls) if nlls else math.nan,
        "recall@10": np.mean([rank <= k for rank in ranks]),
        "ndcg@10": gains / ideal,
        "mrr@10": 1 / best if best <= k else 0.0,
    }


def check_against_loops(model, shards, protocol, monkeypatch):
    monkeypatch.setattr(queries_module, "_BATCH_POSITIONS", 100)
    table = protocol.queries("validation")
    scores = evaluate(model, shards, protocol, "validation", WINDOW)
    table_QV, _, targets = plain_scores(model, shards, table)
    for query in range(len(table)):
        history = history_of(shards, int(table.user[query])).item[: int(table.position[query]) + 1]
        hidden = set(history.tolist()) if protocol.filter_seen else set()
        for name, value in plain_metrics(table_QV[query], targets[query], hidden).items():
            assert scores.values[name][query] == pytest.approx(value, rel=1e-4, abs=1e-4, nan_ok=True), (query, name)
    return scores, table


def test_every_query_equals_a_plain_loop(world, monkeypatch):
    model, shards, protocol = world
    scores, table = check_against_loops(model, shards, protocol, monkeypatch)
    evaluation = summarise(scores)
    headline = ~table.basket
    assert headline.any()
    assert (~headline).any()
    expected = np.nanmean(scores.values["nll"][headline])
    assert evaluation.metrics["nll"] == pytest.approx(expected)
    assert evaluation.metrics["basket.nll"] == pytest.approx(np.nanmean(scores.values["nll"][~headline]))
    assert set(evaluation.errors) == {name for name in evaluation.metrics if "coverage" not in name}
    assert len(scores.query_Q) == len(table)


def test_seen_items_are_filtered_where_the_protocol_says_so(tmp_path, monkeypatch):
    shards = make_shards(tmp_path / "toy", users=25, clock=False, split="leave_one_out", filter_seen=True)
    protocol = Protocol.load(shards)
    assert protocol.filter_seen
    check_against_loops(build_model(shards), shards, protocol, monkeypatch)


@pytest.mark.parametrize("world_size", [2, 3])
def test_workers_together_equal_one(world, world_size):
    model, shards, protocol = world
    whole = evaluate(model, shards, protocol, "test", WINDOW, k=(5, 10))
    parts = [
        evaluate(model, shards, protocol, "test", WINDOW, k=(5, 10), rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    merged, single = summarise(merge(parts)), summarise(whole)
    assert merged.metrics == pytest.approx(single.metrics, rel=1e-5)
    assert merged.errors == pytest.approx(single.errors, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [2, 3])
def test_workers_that_are_a_group_embed_every_item_once(world, num_workers, tmp_path):
    model, shards, protocol = world
    whole = evaluate(model, shards, protocol, "test", WINDOW)
    pointer = model.contextualizer.pointer is not None
    mp.spawn(evaluate_in_group, (num_workers, str(shards.path), pointer, tmp_path), nprocs=num_workers)
    parts = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(num_workers)]
    assert summarise(merge(parts)).metrics == pytest.approx(summarise(whole).metrics, rel=1e-5)
    alone = [
        evaluate(model, shards, protocol, "test", WINDOW, rank=rank, world_size=num_workers)
        for rank in range(num_workers)
    ]
    again = merge(alone).eval_flops - merge(parts).eval_flops
    cost = ModelCost(model.shape, shards.manifest.fields, model.table_width, WINDOW, shards.manifest.has_clock)
    assert again == pytest.approx((num_workers - 1) * cost.catalogue_flops(shards.num_items), rel=1e-6)


def evaluate_in_group(rank: int, num_workers: int, path: str, pointer: bool, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", datetime.timedelta(seconds=60), rank=rank, world_size=num_workers
    )
    try:
        shards = Shards.open(path)
        model = build_model(shards, pointer=pointer)
        scores = evaluate(model, shards, Protocol.load(shards), "test", WINDOW, rank=rank, world_size=num_workers)
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(scores))
    finally:
        dist.destroy_process_group()


def test_a_worker_without_queries_adds_nothing(world):
    model, shards, protocol = world
    pi_V = np.ones(shards.num_catalogue)
    parts = [
        evaluate(model, shards, protocol, "test", WINDOW, queries=2, rank=rank, world_size=3, pi_V=pi_V)
        for rank in range(3)
    ]
    assert [len(part.query_Q) for part in parts] == [1, 1, 0]
    alone = evaluate(model, shards, protocol, "test", WINDOW, queries=2, pi_V=pi_V)
    assert summarise(merge(parts)).metrics == pytest.approx(summarise(alone).metrics, rel=1e-5)


def test_scores_of_no_query_lie_on_their_device():
    """A worker's share may be empty; what it holds is still joined with tensors of its GPU."""
    nothing = SimpleNamespace(device=torch.device("meta"), num_items=3)
    assert mixed_scores._log_totals(nothing, 0).device.type == "meta"


def test_first_queries_are_a_subset(world):
    model, shards, protocol = world
    whole = evaluate(model, shards, protocol, "validation", WINDOW)
    first = evaluate(model, shards, protocol, "validation", WINDOW, queries=11)
    np.testing.assert_allclose(first.values["nll"], whole.values["nll"][:11], rtol=1e-4)


def test_loss_sampled_on_every_item_is_the_nll(world):
    model, shards, protocol = world
    num_items = shards.num_catalogue
    evaluation = summarise(evaluate(model, shards, protocol, "validation", WINDOW, pi_V=np.ones(num_items)))
    assert evaluation.metrics["loss_sampled"] == pytest.approx(evaluation.metrics["nll"], rel=1e-5)
    assert evaluation.metrics["loss_sampled_negatives"] == num_items
    assert "basket.loss_sampled" not in evaluation.metrics


def test_loss_sampled_equals_a_plain_sum_over_its_fixed_sample(world, monkeypatch):
    model, shards, protocol = world
    monkeypatch.setattr(evaluate_module, "_BLOCK_ROWS", 7)
    monkeypatch.setattr(softmax_module, "_BLOCK_SCORES", 100)
    pi_V = drawn_inclusion(shards.train_counts, 30, 0.5)
    ids_K = fixed_candidates(pi_V, shards.manifest.seed)
    scores = evaluate(model, shards, protocol, "validation", WINDOW, pi_V=pi_V)
    assert summarise(scores).metrics["loss_sampled_negatives"] == 30
    table = protocol.queries("validation")
    _, rows, targets = plain_scores(model, shards, table)
    for query in range(len(table)):
        losses, (score_V, gate, mass_V) = [], rows[query]
        for target in [item for item in targets[query] if item < shards.num_catalogue]:
            others = [score_V[item] - np.log(pi_V[item]) for item in ids_K if item != target]
            share = np.exp(score_V[target] - np.logaddexp.reduce([score_V[target], *others]))
            losses.append(-np.log(np.exp(gate) * share + mass_V[target]))
        expected = np.mean(losses) if losses and not table.basket[query] else math.nan
        assert scores.values["loss_sampled"][query] == pytest.approx(expected, rel=1e-4, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_evaluation_flops_are_those_executed(world, share):
    _, shards, protocol = world
    model = build_model(shards, share)
    pi_V = np.full(shards.num_catalogue, 0.5)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        scores = evaluate(model, shards, protocol, "validation", WINDOW, pi_V=pi_V)
    # Free slots of the queries are executed and not counted.
    assert 0.99 < counter.get_total_flops() / scores.eval_flops < 1.03


def test_a_model_with_a_weight_that_is_no_number_is_an_error(toy_shards):
    model = build_model(toy_shards)
    with torch.no_grad():
        model.contextualizer.out.weight[0, 0] = math.nan
    with pytest.raises(DivergedError, match="NaN or infinite"):
        evaluate(model, toy_shards, Protocol.load(toy_shards), "validation", WINDOW)


def test_an_unknown_part_is_a_users_mistake(world):
    model, shards, protocol = world
    with pytest.raises(UserError, match="training"):
        evaluate(model, shards, protocol, "training", WINDOW)


def test_sampled_ranks_only_when_asked_and_under_names_of_their_own(world):
    model, shards, protocol = world
    plain = summarise(evaluate(model, shards, protocol, "test", WINDOW)).metrics
    assert not any("sampled" in name for name in plain)
    parts = [
        evaluate(model, shards, protocol, "test", WINDOW, sampled_negatives=20, rank=rank, world_size=3)
        for rank in range(3)
    ]
    metrics = summarise(merge(parts)).metrics
    assert metrics == pytest.approx(
        summarise(evaluate(model, shards, protocol, "test", WINDOW, sampled_negatives=20)).metrics, rel=1e-5
    )
    assert {name: metrics[name] for name in plain} == pytest.approx(plain, rel=1e-5)
    assert metrics["sampled20.recall@10"] > metrics["recall@10"]
