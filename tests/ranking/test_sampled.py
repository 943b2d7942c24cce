"""Ranks among sampled negatives: the draw, the tie rule, and that nothing wears the name of a full-catalogue metric."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bfm.errors import UserError
from bfm.ragged import Ragged
from bfm.ranking.ranks import DotScores
from bfm.ranking.sampled import _draw, sampled_metrics


def ragged(lists):
    return Ragged(np.array([v for ids in lists for v in ids], np.int32), np.cumsum([0, *map(len, lists)]))


def unit(rows, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=1)


def test_draws_are_distinct_allowed_uniform_and_the_querys_own():
    rng = np.random.default_rng(0)
    num_items, num_queries = 30, 1500
    targets = ragged([[q % 5, 33] for q in range(num_queries)])
    seen = ragged([sorted(rng.choice(np.arange(5, 35), 6, replace=False).tolist()) for _ in range(num_queries)])
    rows = np.arange(num_queries)
    drawn = _draw(targets, seen, rows, num_items, 10, seed=3)
    for query in range(num_queries):
        assert len(set(drawn[query])) == 10
        assert not set(drawn[query]) & (set(targets[query].tolist()) | set(seen[query].tolist()))
    free = _draw(targets, None, rows, num_items, 10, seed=3)
    counts = np.bincount(free.ravel(), minlength=num_items)
    # Items 5.. are allowed for all queries: 10 of 29 each.
    np.testing.assert_allclose(counts[5:] / num_queries, 10 / 29, atol=0.06)
    part = slice(1, None, 7)
    some = ragged([targets[q].tolist() for q in rows[part]])
    np.testing.assert_array_equal(_draw(some, None, rows[part], num_items, 10, seed=3), free[part])
    assert (_draw(targets, None, rows, num_items, 10, seed=4) != free).any()


def test_metrics_equal_plain_counting_and_carry_the_label():
    h_QD, v_VD = unit(40, seed=1), unit(200, seed=2)
    v_VD[50:100] = v_VD[:50]  # exact ties
    targets = ragged([[[q], [q + 40, 300]][q % 2] for q in range(40)])
    rows = np.arange(40) + 5
    metrics = sampled_metrics(DotScores(h_QD, v_VD), 200, targets, None, rows, (1, 5), 20, seed=0)
    assert {name.split(".")[0] for name in metrics} == {"sampled20"}
    negatives = _draw(targets, None, rows, 200, 20, seed=0)
    for query in range(40):
        ranks = []
        for target in targets[query].tolist():
            if target >= 200:
                ranks.append(np.inf)
                continue
            scores = (h_QD[query] * v_VD).sum(-1)
            others = scores[negatives[query]]
            ranks.append(1 + (others > scores[target]).sum().item() + 0.5 * (others == scores[target]).sum().item())
        assert metrics["sampled20.recall@5"][query] == np.mean(np.array(ranks) <= 5)
        assert metrics["sampled20.mrr@5"][query] == (1 / min(ranks) if min(ranks) <= 5 else 0)


def test_a_constant_model_gains_nothing():
    v_VD = unit(1).repeat(500, 1)
    targets = ragged([[q] for q in range(50)])
    scores = DotScores(v_VD[:50], v_VD)
    metrics = sampled_metrics(scores, 500, targets, None, np.arange(50), (10, 51), 100, seed=0)
    assert metrics["sampled100.recall@10"].mean() == 0
    # All tie: the target stands in the middle of 101.
    assert metrics["sampled100.mrr@51"].tolist() == [1 / 51] * 50


def test_too_many_negatives_are_a_users_mistake():
    scores, targets = DotScores(unit(1), unit(20)), ragged([[1]])
    with pytest.raises(UserError, match="only 19 items"):
        sampled_metrics(scores, 20, targets, None, np.arange(1), (10,), 20, seed=0)
    with pytest.raises(UserError, match="0 sampled negatives"):
        sampled_metrics(scores, 20, targets, None, np.arange(1), (10,), 0, seed=0)
