"""Metrics against brute force in plain Python: ties, several targets, cold targets, filters, chunks, merging."""

from __future__ import annotations

import dataclasses
import math
import operator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from bfm.errors import DivergedError
from bfm.ragged import Ragged
from bfm.ranking import ranks
from bfm.ranking.metrics import clustered_error, merge, score_queries, summarise
from bfm.ranking.mixed_scores import MixtureScores, SparseMass
from bfm.ranking.ranks import DotScores, rank_targets


def ragged(lists):
    offsets = np.cumsum([0, *map(len, lists)])
    return Ragged(np.array([item for ids in lists for item in ids], dtype=np.int32), offsets)


def block_of(table_QV):
    return lambda rows: lambda items: table_QV[rows, items].clone()


@contextmanager
def blocks_of(num_scores, **changes):
    """A pass over the catalogue in blocks of at most so many scores."""
    way = dataclasses.replace(ranks._CPU_PASS, block_scores=num_scores, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "pass_on", lambda device: way)
        yield


def scored(table_QV, targets, seen=None, ks=(1, 3), users=None, basket=None, rows=None):
    """All queries, or those in `rows`, of one table of scores."""
    num_queries, num_items = table_QV.shape
    rows = np.arange(num_queries) if rows is None else rows
    chosen = ragged([targets[q] for q in rows])
    ranked = rank_targets(
        block_of(table_QV[rows]), chosen, num_items, max(ks), seen and ragged([seen[q] for q in rows])
    )
    users = np.arange(num_queries) if users is None else np.asarray(users)
    basket = np.zeros(num_queries, bool) if basket is None else np.asarray(basket)
    scores = score_queries(ranked, chosen, num_items, ks, query_Q=rows, user_Q=users[rows], basket_Q=basket[rows])
    return ranked, scores


def brute_force(row, targets, seen, k):
    """recall, ndcg, mrr of one query over all, warm and unseen targets; its nll and first k items."""
    num_items = len(row)
    hidden = set(seen)
    ranks, nlls = [], []
    for target in targets:
        if target >= num_items:
            ranks.append(math.inf)
            nlls.append(math.nan)
            continue
        others = [row[v] for v in range(num_items) if v != target and v not in hidden]
        better, equal = (sum(test(s, row[target]) for s in others) for test in (operator.gt, operator.eq))
        ranks.append(math.inf if target in hidden else 1 + better + 0.5 * equal)
        nlls.append(math.log(sum(math.exp(s) for s in row)) - row[target])
    order = sorted((v for v in range(num_items) if v not in hidden), key=lambda v: (-row[v], v))

    def metrics(kept):
        if not kept:
            return math.nan, math.nan, math.nan
        gains = sum(1 / math.log2(1 + rank) for rank in kept if rank <= k)
        ideal = sum(1 / math.log2(1 + i) for i in range(1, min(k, len(kept)) + 1))
        return sum(r <= k for r in kept) / len(kept), gains / ideal, 1 / min(kept) if min(kept) <= k else 0.0

    warm = [(rank, nll) for rank, nll, target in zip(ranks, nlls, targets, strict=True) if target < num_items]
    mean_nll = sum(nll for _, nll in warm) / len(warm) if warm else math.nan
    unseen = [rank for rank, target in zip(ranks, targets, strict=True) if target not in hidden]
    kinds = {"": metrics(ranks), "warm.": metrics([rank for rank, _ in warm]), "unseen.": metrics(unseen)}
    return kinds, mean_nll, set(order[:k])


@st.composite
def worlds(draw):
    num_items = draw(st.integers(1, 40))
    num_queries = draw(st.integers(1, 8))
    # Few score levels: ties everywhere, across the end of the list too.
    levels = draw(st.integers(1, 6))
    table = draw(
        st.lists(
            st.lists(st.integers(0, levels), min_size=num_items, max_size=num_items),
            min_size=num_queries,
            max_size=num_queries,
        )
    )
    ids = st.lists(st.integers(0, num_items + 3), min_size=0, max_size=6, unique=True)
    targets = [draw(ids) for _ in range(num_queries)]
    seen = draw(st.none() | st.just([draw(ids) for _ in range(num_queries)]))
    return torch.tensor(table, dtype=torch.float32) / 2, targets, seen


@given(worlds(), st.sampled_from([1, 3, 10]), st.integers(1, 100))
@settings(max_examples=50, deadline=None)
def test_metrics_equal_brute_force(world, k, block_scores):
    table_QV, targets, seen = world
    with blocks_of(block_scores):
        _, scores = scored(table_QV, targets, seen, ks=(k,))
    union = set()
    for query in range(len(table_QV)):
        kinds, nll, first = brute_force(table_QV[query].tolist(), targets[query], seen[query] if seen else [], k)
        for kind, expected in kinds.items():
            if seen or kind != "unseen.":
                found = [scores.values[f"{kind}{name}@{k}"][query] for name in ("recall", "ndcg", "mrr")]
                np.testing.assert_allclose(found, expected, rtol=1e-12)
        np.testing.assert_allclose(scores.values["nll"][query], nll, rtol=1e-5, atol=1e-5)
        union |= first
    assert set(np.flatnonzero(scores.shown[k])) == union
    assert any(name.startswith("unseen.") for name in scores.values) == (seen is not None)


@given(worlds())
@settings(max_examples=30, deadline=None)
def test_single_and_double_precision_agree(world):
    table_QV, targets, seen = world
    ranked_single, _ = scored(table_QV, targets, seen)
    ranked_double, _ = scored(table_QV.double(), targets, seen)
    np.testing.assert_array_equal(ranked_single.rank_N, ranked_double.rank_N)
    np.testing.assert_array_equal(ranked_single.top_Qk, ranked_double.top_Qk)
    np.testing.assert_allclose(ranked_single.nll_N, ranked_double.nll_N, rtol=1e-5, atol=1e-6)


def test_long_rows_take_the_grouped_path_and_agree_with_a_full_sort():
    generator = torch.Generator().manual_seed(0)
    table_QV = torch.randint(0, 400, (7, 5003), generator=generator).float() / 100
    targets = [table_QV[q].topk(12).indices[q:].tolist() for q in range(7)]
    for block_scores in (1 << 22, 10_000, 750):
        with blocks_of(block_scores):
            ranked, scores = scored(table_QV, targets, ks=(10,))
        for query in range(7):
            expected, _, first = brute_force(table_QV[query].tolist(), targets[query], [], 10)
            assert scores.values["recall@10"][query] == pytest.approx(expected[""][0])
            assert set(ranked.top_Qk[query]) == first


def test_a_constant_scorer_gains_nothing_from_ties():
    num_items = 1000
    table_QV = torch.zeros(200, num_items)
    targets = [[int(item)] for item in np.random.default_rng(0).integers(0, num_items, 200)]
    _, scores = scored(table_QV, targets, ks=(10,))
    metrics = summarise(scores).metrics
    # Chance level is 10 / V; a strict `>` would give 1.
    assert metrics["recall@10"] == pytest.approx(10 / num_items, abs=10 / num_items)
    assert metrics["coverage@10"] == 10 / num_items
    assert metrics["nll"] == pytest.approx(math.log(num_items), rel=1e-6)
    ranked, _ = scored(table_QV, targets, ks=(num_items,))
    assert set(ranked.rank_N) == {(num_items + 1) / 2}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_an_error(bad):
    table_QV = torch.zeros(3, 50)
    table_QV[1, 7] = bad
    with pytest.raises(DivergedError, match="NaN or infinite"):
        scored(table_QV, [[1], [2], [3]])


def test_a_seen_target_is_a_miss_and_keeps_its_likelihood():
    table_QV = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    ranked, scores = scored(table_QV, [[1, 3]], [[0, 1, 2]], ks=(4,), basket=[False])
    np.testing.assert_array_equal(ranked.rank_N, [np.inf, 1])
    np.testing.assert_array_equal(ranked.top_Qk, [[3, -1, -1, -1]])
    np.testing.assert_allclose(ranked.nll_N, -torch.log_softmax(table_QV, 1)[0, [1, 3]], rtol=1e-6)
    metrics = summarise(scores).metrics
    assert (metrics["recall@4"], metrics["unseen.recall@4"]) == (0.5, 1.0)
    apart = summarise(scored(table_QV, [[1, 3]], [[0, 1, 2]], ks=(4,), basket=[True])[1]).metrics
    assert "basket.recall@4" in apart
    assert not any("unseen." in name for name in apart)


@given(worlds(), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_merging_what_workers_scored_equals_one_worker(world, num_workers):
    table_QV, targets, seen = world
    num_queries = len(table_QV)
    users, basket = np.arange(num_queries) // 2, np.arange(num_queries) % 3 == 2
    _, whole = scored(table_QV, targets, seen, users=users, basket=basket)
    parts = [
        scored(table_QV, targets, seen, users=users, basket=basket, rows=np.arange(num_queries)[rank::num_workers])[1]
        for rank in range(num_workers)
    ]
    parts = [dataclasses.replace(part, eval_flops=3) for part in parts]
    merged = merge(parts)
    assert merged.eval_flops == 3 * num_workers
    np.testing.assert_array_equal(merged.query_Q, whole.query_Q)
    first, second = summarise(merged), summarise(whole)
    assert first.metrics == pytest.approx(second.metrics, rel=1e-6)
    assert first.errors == pytest.approx(second.errors, rel=1e-6, abs=1e-7)


def test_basket_queries_stand_apart():
    table_QV = torch.eye(4)[[0, 1, 2, 3]]
    _, scores = scored(table_QV, [[0], [1], [0], [0]], ks=(1,), users=[0, 1, 0, 1], basket=[False, False, True, True])
    metrics = summarise(scores).metrics
    assert metrics["recall@1"] == 1.0
    assert metrics["basket.recall@1"] == 0.0
    assert metrics["coverage@1"] == 0.5
    assert "basket.warm.recall@1" not in metrics


def test_a_cold_target_is_a_miss_except_in_the_warm_metrics():
    _, scores = scored(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), [[0, 2], [3]], ks=(1,))
    evaluation = summarise(scores)
    assert evaluation.metrics["recall@1"] == 0.25
    assert evaluation.metrics["warm.recall@1"] == 1.0
    assert "warm.recall@1" not in evaluation.errors


def test_clustered_error_is_the_plain_one_for_single_queries_and_wider_for_repeats():
    value_Q = np.random.default_rng(1).normal(size=50)
    plain = value_Q.std(ddof=1) / math.sqrt(50)
    assert clustered_error(value_Q, np.arange(50)) == pytest.approx(plain)
    repeated = clustered_error(np.repeat(value_Q, 4), np.repeat(np.arange(50), 4))
    assert repeated == pytest.approx(plain)
    assert clustered_error(value_Q, np.zeros(50)) is None


@pytest.mark.parametrize(("num_queries", "num_items"), [(3, 100_000), (5000, 40), (300, 3000)])
def test_no_block_of_scores_is_larger_than_asked(num_queries, num_items):
    largest, covered = 0, 0

    def scores(rows):
        def block(items):
            nonlocal largest, covered
            count = (rows.stop - rows.start) * (items.stop - items.start)
            largest, covered = max(largest, count), covered + count
            return torch.zeros(rows.stop - rows.start, items.stop - items.start)

        return block

    with blocks_of(1 << 14):
        rank_targets(scores, ragged([[0]] * num_queries), num_items, 10)
    assert largest <= 1 << 14
    assert covered == num_queries * num_items


@pytest.mark.parametrize("scale", [1.0, 20.0, 400.0])
@pytest.mark.parametrize("offset", [0.0, -500.0])
def test_nll_of_any_range_of_scores_equals_double_precision(scale, offset):
    generator = torch.Generator().manual_seed(0)
    table_QV = scale * torch.nn.functional.normalize(torch.randn(20, 700, generator=generator), dim=1) + offset
    targets, seen = [[q, 2 * q + 100] for q in range(20)], [table_QV[q].topk(3).indices.tolist() for q in range(20)]
    with blocks_of(1 << 10):
        ranked, _ = scored(table_QV, targets, seen)
    exact_QV = -torch.log_softmax(table_QV.double(), dim=1)
    expected = [exact_QV[query, item].item() for query, ids in enumerate(targets) for item in ids]
    # Scores around 500 are known to about 1e-4 only.
    np.testing.assert_allclose(ranked.nll_N, expected, rtol=1e-5, atol=2e-4 if offset else 1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_seen_item_with_a_score_that_is_not_finite_is_an_error_too(bad):
    table_QV = torch.zeros(3, 50)
    table_QV[1, 7] = bad
    with pytest.raises(DivergedError, match="NaN or infinite"):
        scored(table_QV, [[1], [2], [3]], [[], [7], []])


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_inner_products_that_are_not_finite_are_an_error(bad):
    queries_QD, items_VD = torch.ones(3, 4), torch.ones(50, 4)
    items_VD[7, 1] = bad
    queries_QD[1] *= 1e30 if bad == 1e30 else 1.0
    assert not DotScores(queries_QD, items_VD).finite
    with pytest.raises(DivergedError, match="NaN or infinite"):
        rank_targets(DotScores(queries_QD, items_VD), ragged([[1], [2], [3]]), 50, 10)


def test_the_number_of_threads_changes_no_bit():
    generator = torch.Generator().manual_seed(0)
    queries_QD, items_VD = torch.randn(600, 16, generator=generator), torch.randn(1500, 16, generator=generator)
    targets = ragged([[q, q + 1000] for q in range(600)])
    seen = ragged([[q + 5, q + 50, q + 1000] for q in range(600)])
    found = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        try:
            with blocks_of(1 << 16):
                found.append(rank_targets(DotScores(queries_QD, items_VD), targets, 1500, 10, seen))
            assert torch.get_num_threads() == num_threads
        finally:
            torch.set_num_threads(1)
    for other in found[1:]:
        for name in ("rank_N", "nll_N", "top_Qk"):
            np.testing.assert_array_equal(getattr(other, name), getattr(found[0], name))


@pytest.fixture
def as_on_a_gpu():
    """The pass that a GPU makes, with blocks of at most 100 rows."""
    with blocks_of(1 << 14, rows=100, waits=False):
        yield


def ranked_world():
    """Scores with ties, filtered and cold targets."""
    generator = torch.Generator().manual_seed(0)
    queries_QD, items_VD = (torch.randint(-2, 3, (n, 6), generator=generator).float() for n in (250, 1500))
    targets = ragged([[q, q + 700, q + 1300] for q in range(250)])
    seen = ragged([[q + 5, q + 50, q + 700][: q % 4] for q in range(250)])
    return rank_targets(DotScores(queries_QD, items_VD), targets, 1500, 10, seen)


@pytest.mark.parametrize("block_scores", [1 << 8, 1 << 12, 1 << 15, 1 << 22])
@pytest.mark.parametrize("waits", [True, False])
def test_neither_the_size_of_blocks_nor_the_kind_of_pass_changes_a_rank(block_scores, waits):
    expected = ranked_world()
    with blocks_of(block_scores, rows=100, waits=waits):
        found = ranked_world()
    for name in ("rank_N", "top_Qk", "top_score_Qk", "filtered_N"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_allclose(found.nll_N, expected.nll_N, rtol=1e-5)


class Waits(TorchDispatchMode):
    """Counts what a host would have to wait for: numbers it reads, and shapes that depend on values."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func.overloadpacket) in ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select")
        masks = func.overloadpacket is torch.ops.aten.index and any(
            i is not None and i.dtype is torch.bool for i in args[1]
        )
        self.count += masks
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_on_a_gpu_the_host_waits_for_no_block(mixed):
    generator = torch.Generator().manual_seed(0)
    queries_QD, counts = torch.randn(90, 6, generator=generator), []
    query_P, item_P = torch.arange(90).repeat(2), torch.arange(180)
    for num_items in (400, 8000):
        scores = DotScores(queries_QD, torch.randn(num_items, 6, generator=generator))
        with Waits() as waits:
            if mixed:
                mass = SparseMass.of(query_P, item_P, torch.full((180,), 0.1), num_items)
                scores = MixtureScores(scores, torch.full((90,), 0.8).log(), [mass])
            rank_targets(scores, ragged([[q] for q in range(90)]), num_items, 10, ragged([[q + 5] for q in range(90)]))
        counts.append(waits.count)
    assert counts[0] == counts[1] < 20


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_on_a_gpu_scores_that_are_not_finite_are_an_error_too(bad):
    table_QV = torch.zeros(3, 50)
    for row, seen in ((1, [[], [7], []]), (2, None)):
        broken_QV = table_QV.clone()
        broken_QV[row, 7] = bad
        with pytest.raises(DivergedError, match="NaN or infinite"):
            scored(broken_QV, [[1], [2], [3]], seen)


def test_an_error_in_a_thread_reaches_the_caller():
    def scores(rows):
        raise DivergedError(f"rows {rows.start}")

    torch.set_num_threads(2)
    try:
        with pytest.raises(DivergedError, match="rows"):
            rank_targets(scores, ragged([[0]] * 2000), 100, 10)
    finally:
        torch.set_num_threads(1)
