"""The sampled softmax: its formula, its gradient, its bias against the full softmax."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bfm.objective.sampling import Proposal, drawn_inclusion, group_rng
from bfm.objective.softmax import sampled_softmax

torch.set_num_threads(1)


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


@given(
    st.integers(0, 5), st.integers(0, 6), st.integers(0, 1000), st.sampled_from(["reference", "one_pass", "two_pass"])
)
@settings(max_examples=100, deadline=None)
def test_the_loss_is_its_formula(num_rows, num_candidates, seed, method):
    rng = np.random.default_rng(seed)
    h_TD, positive_TD, candidates_KD = (
        unit(n, 3, seed=seed + i) for i, n in enumerate([num_rows, num_rows, num_candidates])
    )
    log_pi_K = torch.from_numpy(np.log(rng.uniform(0.01, 1, num_candidates)))
    hit_T = torch.from_numpy(rng.integers(-1, num_candidates, num_rows))
    scale = torch.tensor(7.0, dtype=torch.float64)
    # The candidates stand in a larger table, in another order.
    ids_K = torch.from_numpy(rng.permutation(num_candidates + 4)[:num_candidates])
    table_RD = torch.full((num_candidates + 4, 3), torch.nan, dtype=torch.float64)
    table_RD[ids_K] = candidates_KD
    loss_T = sampled_softmax(h_TD, positive_TD, table_RD, ids_K, log_pi_K, hit_T, scale, method=method)
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
        lambda h, p, c, s: sampled_softmax(h, p, c, torch.arange(5), log_pi_K, hit_T, s),
        (h_TD, positive_TD, candidates_KD, scale),
    )


def test_a_row_whose_only_candidate_is_its_target_has_zero_loss_and_gradient():
    h_TD = unit(2, 3).requires_grad_()
    candidates_KD = unit(1, 3, seed=1)
    loss_T = sampled_softmax(
        h_TD,
        candidates_KD.expand(2, -1),
        candidates_KD,
        torch.tensor([0]),
        torch.zeros(1),
        torch.tensor([0, 0]),
        torch.tensor(5.0),
    )
    loss_T.sum().backward()
    assert torch.equal(loss_T.detach(), torch.zeros(2, dtype=torch.float64))
    assert torch.equal(h_TD.grad, torch.zeros(2, 3, dtype=torch.float64))


def test_bfloat16_vectors_keep_single_precision_scores():
    h_TD, candidates_KD = unit(8, 16).bfloat16(), unit(40, 16, seed=1).bfloat16()
    arguments = (torch.arange(40), torch.zeros(40), torch.arange(8), torch.tensor(50.0))
    low = sampled_softmax(h_TD, candidates_KD[:8], candidates_KD, *arguments)
    high = sampled_softmax(h_TD.float(), candidates_KD[:8].float(), candidates_KD.float(), *arguments)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, high, atol=0.2, rtol=0.02)


def test_with_every_item_as_candidate_the_loss_is_the_full_softmax():
    h_TD, catalogue_VD = unit(30, 4), unit(3000, 4, seed=1)
    target_T = torch.from_numpy(np.random.default_rng(0).integers(0, 3000, 30))
    sampled_T = sampled_softmax(
        h_TD, catalogue_VD[target_T], catalogue_VD, torch.arange(3000), torch.zeros(3000), target_T, torch.tensor(9.0)
    )
    exact_T = torch.nn.functional.cross_entropy(9 * h_TD @ catalogue_VD.T, target_T, reduction="none")
    torch.testing.assert_close(sampled_T, exact_T)


# K times the bias is about 1.3 in this world, for every K.
NUM_ITEMS, BOUND = 400, 3.0


def gradient_errors(num_negatives: int, num_draws: int, correct_positive: bool = False) -> tuple[float, float, float]:
    """Of sampled gradients in h: the bias, the noise left in the bias, and the typical error of one draw.

    All relative to the full softmax's gradient, in norm. Item vectors are random, popularity is a power law, draws
    have exact inclusion probabilities, and the target is likely (P > .5): a rare one hides a wrong correction of it.
    """
    catalogue_VD = unit(NUM_ITEMS, 32)
    target = 300
    h_1D = torch.nn.functional.normalize(catalogue_VD[[target]] + 0.2 * unit(1, 32, seed=9), dim=-1)
    scale = torch.tensor(8.0, dtype=torch.float64)
    popularity_V = (1e6 / (1 + np.arange(NUM_ITEMS)) ** 0.7).astype(int)
    pi_V = drawn_inclusion(popularity_V, num_negatives, 1.0)
    log_pi_V = torch.from_numpy(np.log(pi_V))
    proposal = Proposal.of(pi_V)

    def gradient(index):
        leaf = h_1D.clone().requires_grad_()
        ids_K = torch.from_numpy(proposal.draw(group_rng(1, index)))
        place = (ids_K == target).nonzero()
        hit_T = place[0] if len(place) else torch.tensor([-1])
        log_pi_K = log_pi_V[ids_K]
        if correct_positive:
            # Lowering every negative by the positive's own correction is raising the positive by it.
            log_pi_K = log_pi_K - log_pi_V[target]
        loss_T = sampled_softmax(leaf, catalogue_VD[[target]], catalogue_VD, ids_K, log_pi_K, hit_T, scale)
        loss_T.sum().backward()
        return leaf.grad[0]

    leaf = h_1D.clone().requires_grad_()
    logits = scale * leaf @ catalogue_VD.T
    assert float(logits.softmax(1)[0, target].detach()) > 0.5
    torch.nn.functional.cross_entropy(logits, torch.tensor([target])).backward()
    error_ND = torch.stack([gradient(index) for index in range(num_draws)]) - leaf.grad
    single = float(error_ND.square().sum(1).mean().sqrt() / leaf.grad.norm())
    return float(error_ND.mean(0).norm() / leaf.grad.norm()), single / num_draws**0.5, single


def times_k(num_negatives: int, correct_positive: bool = False) -> float:
    """K times the bias, from so many draws that noise cannot decide it."""
    bias, noise, _ = gradient_errors(num_negatives, 50 * num_negatives, correct_positive)
    assert noise < 0.6 * bias
    return bias * num_negatives


@pytest.mark.parametrize(
    "num_negatives", [10, 20, 40, pytest.param(80, marks=pytest.mark.slow), pytest.param(160, marks=pytest.mark.slow)]
)
def test_the_bias_of_the_gradient_vanishes_like_one_over_k(num_negatives):
    assert times_k(num_negatives) < BOUND


def test_correcting_the_positive_too_fails_the_same_check():
    assert times_k(10, correct_positive=True) > 3 * BOUND
    assert times_k(20, correct_positive=True) > 6 * BOUND


def test_the_error_of_one_draw_falls_like_the_root_of_k():
    counts = np.array([10, 20, 40, 80])
    single = [gradient_errors(int(count), 200)[2] for count in counts]
    slope = np.polyfit(np.log(counts), np.log(single), 1)[0]
    assert -0.75 < slope < -0.4


def test_every_item_drawn_is_exact():
    assert gradient_errors(NUM_ITEMS, 1)[2] < 1e-12
