"""The sampled softmax: its formula and its bias against the full softmax."""

from __future__ import annotations

import math
import unittest.mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bfm.objective import softmax as softmax_module
from bfm.objective import tiled
from bfm.objective.fused import fused_available
from bfm.objective.sampling import Proposal, drawn_inclusion, group_rng
from bfm.objective.softmax import fixed_sample_loss, log_sum
from bfm.objective.tiled import as_multiplied, log_sum_of_state, merge, softmax_state

torch.set_num_threads(1)


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


METHODS = ["reference", "one_pass", "two_pass"]


@given(st.integers(0, 5), st.integers(0, 6), st.integers(0, 1000), st.sampled_from(METHODS))
@settings(max_examples=100, deadline=None)
def test_the_log_sum_is_its_formula(num_queries, num_candidates, seed, method):
    rng = np.random.default_rng(seed)
    h_QD, candidates_KD = unit(num_queries, 3, seed=seed), unit(num_candidates, 3, seed=seed + 1)
    # About a third of the candidates are absent.
    pi_K = rng.uniform(0.01, 1, num_candidates)
    present_K = rng.random(num_candidates) > 0.3
    log_pi_K = torch.from_numpy(np.where(present_K, np.log(pi_K), np.inf))
    # The candidates stand in a larger table, in another order.
    ids_K = torch.from_numpy(rng.permutation(num_candidates + 4)[:num_candidates])
    table_RD = torch.full((num_candidates + 4, 3), torch.nan, dtype=torch.float64)
    table_RD[ids_K] = candidates_KD
    log_sum_Q = log_sum(7 * h_QD, table_RD, ids_K, log_pi_K, method=method)
    assert log_sum_Q.shape == (num_queries,)
    for query in range(num_queries):
        plain = sum(
            math.exp(7 * float(h_QD[query] @ candidates_KD[k])) / float(pi_K[k])
            for k in range(num_candidates)
            if present_K[k]
        )
        assert float(log_sum_Q[query]) == pytest.approx(math.log(plain) if plain else -math.inf, rel=1e-9, abs=1e-12)


@given(st.integers(0, 5), st.integers(0, 6), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_the_loss_on_a_fixed_sample_is_its_formula(num_rows, num_candidates, seed):
    rng = np.random.default_rng(seed)
    h_TD, table_RD = unit(num_rows, 3, seed=seed), unit(num_candidates + 2, 3, seed=seed + 1)
    ids_K, target_T = rng.permutation(len(table_RD))[:num_candidates], rng.integers(0, len(table_RD), num_rows)
    pi_K = rng.uniform(0.01, 1, num_candidates)
    arguments = (torch.from_numpy(values) for values in (ids_K, np.log(pi_K)))
    with unittest.mock.patch.object(softmax_module, "_BLOCK_SCORES", 7):
        loss_T = fixed_sample_loss(7 * h_TD, torch.from_numpy(target_T), table_RD, *arguments)
    assert loss_T.shape == (num_rows,)
    for row in range(num_rows):
        score_R = np.exp(7 * (table_RD @ h_TD[row]).numpy())
        others = sum(score_R[ids_K[k]] / pi_K[k] for k in range(num_candidates) if ids_K[k] != target_T[row])
        positive = score_R[target_T[row]]
        assert float(loss_T[row]) == pytest.approx(-math.log(positive / (positive + others)), rel=1e-9, abs=1e-12)


def test_an_infinite_score_of_the_target_is_not_a_perfect_loss():
    table_RD = torch.tensor([[torch.inf], [1.0], [2.0]])
    loss_T = fixed_sample_loss(torch.ones(2, 1), torch.tensor([0, 1]), table_RD, torch.tensor([1, 2]), torch.zeros(2))
    assert loss_T.isfinite().tolist() == [False, True]


def test_bfloat16_vectors_keep_single_precision_scores():
    q_QD, candidates_KD = 50 * unit(8, 16).float(), unit(40, 16, seed=1).bfloat16()
    low = log_sum(q_QD, candidates_KD, torch.arange(40), torch.zeros(40))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, log_sum(q_QD, candidates_KD.float(), torch.arange(40), torch.zeros(40)))


def test_with_every_item_as_candidate_the_loss_is_the_full_softmax():
    q_QD, catalogue_VD = 9 * unit(30, 4), unit(3000, 4, seed=1)
    target_Q = torch.from_numpy(np.random.default_rng(0).integers(0, 3000, 30))
    everything = (catalogue_VD, torch.arange(3000), torch.zeros(3000))
    exact_Q = torch.nn.functional.cross_entropy(q_QD @ catalogue_VD.T, target_Q, reduction="none")
    loss_Q = log_sum(q_QD, *everything) - (q_QD * catalogue_VD[target_Q]).sum(1)
    torch.testing.assert_close(loss_Q, exact_Q)
    torch.testing.assert_close(fixed_sample_loss(q_QD, target_Q, *everything), exact_Q)


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
    scale = 8.0
    popularity_V = (1e6 / (1 + np.arange(NUM_ITEMS)) ** 0.7).astype(int)
    pi_V = drawn_inclusion(popularity_V, num_negatives, 1.0)
    log_pi_V = torch.from_numpy(np.log(pi_V))
    proposal = Proposal.of(pi_V)

    def gradient(index):
        leaf = h_1D.clone().requires_grad_()
        drawn_K = torch.from_numpy(proposal.draw(group_rng(1, index)))
        ids_K = torch.cat([drawn_K, torch.tensor([target])]).unique()
        own_log_pi = float(log_pi_V[target]) if correct_positive else 0.0
        log_pi_K = torch.where(ids_K == target, own_log_pi, log_pi_V[ids_K])
        q_1D = scale * leaf
        loss = log_sum(q_1D, catalogue_VD, ids_K, log_pi_K) - (q_1D @ catalogue_VD[target] - own_log_pi)
        loss.sum().backward()
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


@pytest.fixture
def tensor_cores(monkeypatch):
    """Products as a GPU takes them under autocast: of bfloat16 numbers, summed in float32."""

    def product(left_PX, right_XY, out_PY):
        both = (part.to(right_XY.dtype).float() for part in (left_PX, right_XY))
        return torch.mm(*both, out=out_PY)

    monkeypatch.setattr(tiled, "product_dtype", lambda q_QD, table_RD: torch.bfloat16)
    monkeypatch.setattr(tiled, "_product", product)


def sharded(q_QD, table_RD, ids_K, log_pi_K):
    """The merge of the states of three shards."""
    states = [softmax_state(q_QD, table_RD, ids_K[part::3], log_pi_K[part::3]) for part in range(3)]
    return log_sum_of_state(q_QD, merge(merge(states[0], states[1]), states[2]))


def by(method):
    return sharded if method == "sharded" else lambda *arguments: log_sum(*arguments, method=method)


BFLOAT16_METHODS = [
    "reference",
    "two_pass",
    "one_pass",
    "sharded",
    pytest.param("triton", marks=pytest.mark.skipif(bool(fused_available()), reason="the kernel cannot run here")),
]


@pytest.mark.parametrize("scale", [20.0, 60.0, 100.0])
@pytest.mark.parametrize("near", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("method", BFLOAT16_METHODS)
@pytest.mark.usefixtures("tensor_cores")
def test_in_bfloat16_every_method_has_the_loss_of_single_precision(method, scale, near):
    """From targets at random to almost certain ones: a target's own term must cancel against its score."""
    table_RD, target_Q = unit(700, 64).float(), torch.from_numpy(np.random.default_rng(1).integers(0, 700, 512))
    leaf_QD = torch.nn.functional.normalize(near * table_RD[target_Q] + unit(512, 64, seed=2).float(), dim=-1)
    leaf_QD.requires_grad_()
    log_pi_K = torch.linspace(-3, 0, 700)
    log_pi_K[target_Q] = 0.0
    with torch.autocast("cpu", torch.bfloat16):
        v_RD, q_QD = as_multiplied(table_RD), as_multiplied(scale * leaf_QD)
        log_sum_Q = by(method)(q_QD, v_RD.bfloat16(), torch.arange(700), log_pi_K)
        loss_Q = log_sum_Q - (q_QD * v_RD[target_Q]).sum(-1)
        (gradient_QD,) = torch.autograd.grad(loss_Q.sum(), leaf_QD)
    assert loss_Q.dtype == torch.float32

    def exact(h_QD, v_RD):
        h_QD = h_QD.detach().double().requires_grad_()
        logits_QK = scale * h_QD @ v_RD.double().T
        own_Q = logits_QK.gather(1, target_Q[:, None])[:, 0]
        loss_Q = torch.logsumexp(logits_QK - log_pi_K.double(), 1) - own_Q
        return loss_Q.detach(), torch.autograd.grad(loss_Q.sum(), h_QD)[0]

    same_Q, same_gradient_QD = exact(q_QD / scale, v_RD)
    assert (loss_Q - same_Q).abs().max() < 2e-4
    # In the mean candidate the weights are rounded too, and what stands for 1 / pi.
    assert (gradient_QD - same_gradient_QD).norm(dim=1).max() < 2**-7 * scale
    # Rounding itself moves single losses, by up to scale * 2e-3 here, and not their mean.
    unrounded_Q = exact(leaf_QD, table_RD)[0]
    assert abs((loss_Q - unrounded_Q).mean()) < 2e-3
    assert (loss_Q - unrounded_Q).abs().max() < 2e-3 * scale


def test_rounding_is_once_and_for_all_and_leaves_the_gradient_alone():
    x_ND = (3 * unit(50, 9)).float().requires_grad_()
    assert as_multiplied(x_ND) is x_ND
    with torch.autocast("cpu", torch.bfloat16):
        rounded_ND = as_multiplied(x_ND)
        assert torch.equal(as_multiplied(rounded_ND), rounded_ND)
    assert torch.equal(rounded_ND, x_ND.bfloat16().float())
    assert not torch.equal(rounded_ND, x_ND)
    weight_ND = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.autograd.grad((weight_ND * rounded_ND).sum(), x_ND)[0], weight_ND)


@pytest.mark.parametrize("method", ["reference", "two_pass", "one_pass"])
def test_on_the_cpu_autocast_does_not_touch_the_products(method):
    q_QD, table_RD = 60 * unit(64, 32).float(), unit(200, 32, seed=1).float()
    arguments = (q_QD, table_RD, torch.arange(200), torch.zeros(200))
    with torch.autocast("cpu", torch.bfloat16):
        log_sum_Q = log_sum(*arguments, method=method)
    assert torch.equal(log_sum_Q, log_sum(*arguments, method=method))
