"""The sampled softmax: its formula, its gradient, its bias against the full softmax."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bfm.objective.sampling import draw_systematic, drawn_inclusion, group_rng
from bfm.objective.softmax import full_softmax_nll, sampled_softmax

torch.set_num_threads(1)


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


@given(st.integers(0, 5), st.integers(0, 6), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_the_loss_is_its_formula(num_rows, num_candidates, seed):
    rng = np.random.default_rng(seed)
    h_TD, positive_TD, candidates_KD = (
        unit(n, 3, seed=seed + i) for i, n in enumerate([num_rows, num_rows, num_candidates])
    )
    log_pi_K = torch.from_numpy(np.log(rng.uniform(0.01, 1, num_candidates)))
    hit_T = torch.from_numpy(rng.integers(-1, num_candidates, num_rows))
    scale = torch.tensor(7.0, dtype=torch.float64)
    loss_T = sampled_softmax(h_TD, positive_TD, candidates_KD, log_pi_K, hit_T, scale)
    assert loss_T.shape == (num_rows,)
    for row in range(num_rows):
        positive = math.exp(7 * float(h_TD[row] @ positive_TD[row]))
        negatives = sum(
            math.exp(7 * float(h_TD[row] @ candidates_KD[j])) / math.exp(float(log_pi_K[j]))
            for j in range(num_candidates)
            if j != int(hit_T[row])
        )
        assert float(loss_T[row]) == pytest.approx(-math.log(positive / (positive + negatives)), rel=1e-9, abs=1e-12)


def test_gradients_are_those_of_the_loss():
    h_TD, positive_TD, candidates_KD = (unit(n, 3, seed=n).requires_grad_() for n in (4, 4, 5))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    log_pi_K = torch.log(torch.linspace(0.1, 1, 5, dtype=torch.float64))
    hit_T = torch.tensor([-1, 2, 4, 0])
    assert torch.autograd.gradcheck(
        lambda h, p, c, s: sampled_softmax(h, p, c, log_pi_K, hit_T, s), (h_TD, positive_TD, candidates_KD, scale)
    )


def test_a_row_whose_only_candidate_is_its_target_has_zero_loss_and_gradient():
    h_TD = unit(2, 3).requires_grad_()
    candidates_KD = unit(1, 3, seed=1)
    loss_T = sampled_softmax(
        h_TD, candidates_KD.expand(2, -1), candidates_KD, torch.zeros(1), torch.tensor([0, 0]), torch.tensor(5.0)
    )
    loss_T.sum().backward()
    assert torch.equal(loss_T.detach(), torch.zeros(2, dtype=torch.float64))
    assert torch.equal(h_TD.grad, torch.zeros(2, 3, dtype=torch.float64))


def test_bfloat16_vectors_keep_single_precision_scores():
    h_TD, candidates_KD = unit(8, 16).bfloat16(), unit(40, 16, seed=1).bfloat16()
    arguments = (torch.zeros(40), torch.arange(8), torch.tensor(50.0))
    low = sampled_softmax(h_TD, candidates_KD[:8], candidates_KD, *arguments)
    high = sampled_softmax(h_TD.float(), candidates_KD[:8].float(), candidates_KD.float(), *arguments)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, high, atol=0.2, rtol=0.02)


@pytest.mark.parametrize("block_bytes", [8, 4096, 1 << 24])
def test_with_every_item_as_candidate_the_loss_is_the_full_softmax(block_bytes):
    h_TD, catalogue_VD = unit(30, 4), unit(3000, 4, seed=1)
    target_T = torch.from_numpy(np.random.default_rng(0).integers(0, 3000, 30))
    sampled_T = sampled_softmax(
        h_TD, catalogue_VD[target_T], catalogue_VD, torch.zeros(3000), target_T, torch.tensor(9.0)
    )
    exact_T = torch.nn.functional.cross_entropy(9 * h_TD @ catalogue_VD.T, target_T, reduction="none")
    torch.testing.assert_close(sampled_T, exact_T)
    torch.testing.assert_close(full_softmax_nll(h_TD, catalogue_VD, target_T, 9.0, block_bytes), exact_T)


NUM_ITEMS, NUM_DRAWS = 400, 600


def gradient_bias(num_negatives: int, correct_positive: bool) -> float:
    """|mean sampled gradient - full gradient| / |full gradient| in h, where the target is likely (P > .5).

    Item vectors are random, popularity is a power law, draws have exact inclusion probabilities.
    """
    catalogue_VD = unit(NUM_ITEMS, 32)
    target = 300
    h_1D = torch.nn.functional.normalize(catalogue_VD[[target]] + 0.2 * unit(1, 32, seed=9), dim=-1)
    scale = torch.tensor(8.0, dtype=torch.float64)
    popularity_V = (1e6 / (1 + np.arange(NUM_ITEMS)) ** 0.7).astype(int)
    pi_V = drawn_inclusion(popularity_V, num_negatives, 1.0)
    log_pi_V = torch.from_numpy(np.log(pi_V))

    def gradient(ids_K):
        leaf = h_1D.clone().requires_grad_()
        ids_K = torch.from_numpy(ids_K)
        place = (ids_K == target).nonzero()
        hit_T = place[0] if len(place) else torch.tensor([-1])
        log_pi_K = log_pi_V[ids_K]
        if correct_positive:
            # Lowering every negative by the positive's own correction is raising the positive by it.
            log_pi_K = log_pi_K - log_pi_V[target]
        sampled_softmax(leaf, catalogue_VD[[target]], catalogue_VD[ids_K], log_pi_K, hit_T, scale).sum().backward()
        return leaf.grad[0]

    leaf = h_1D.clone().requires_grad_()
    logits = scale * leaf @ catalogue_VD.T
    assert float(logits.softmax(1)[0, target].detach()) > 0.5
    torch.nn.functional.cross_entropy(logits, torch.tensor([target])).backward()
    mean = torch.stack([gradient(draw_systematic(pi_V, group_rng(1, index))) for index in range(NUM_DRAWS)]).mean(0)
    return float((mean - leaf.grad[0]).norm() / leaf.grad[0].norm())


def test_the_bias_of_the_gradient_vanishes_like_one_over_k():
    # K * bias is about 1.2 here; what is left of the mean of the draws' noise is far below the bound.
    for num_negatives in (20, 40, 80, 160):
        assert gradient_bias(num_negatives, False) * num_negatives < 3
    assert gradient_bias(NUM_ITEMS, False) < 1e-12


def test_correcting_the_positive_too_is_biased_however_many_negatives():
    assert gradient_bias(40, True) * 40 > 30
    assert gradient_bias(160, True) * 160 > 30
