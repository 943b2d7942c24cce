"""The pointer against a loop over positions, and the mixture against its formula."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bfm.events.windows import EvalWindows
from bfm.model import mixture
from bfm.model.attended import half_octave
from bfm.model.batch import ModelBatch, make_query_batch, query_places
from bfm.model.mixture import Pointer, mixture_loss, takes_pairs
from tests.model.toys import PLAIN_FIELDS, make_windows, of_positions

WIDTH, KEY_WIDTH, ROWS, LENGTH = 10, 4, 3, 24
EDGES = sorted(itertools.chain.from_iterable((2.0**k, 1.5 * 2.0**k) for k in range(48)))[:95]


def plain_half_octave(number: float) -> int:
    return sum(edge <= number for edge in EDGES)


@given(st.integers(0, 1 << 24), st.integers(0, 38))
@settings(max_examples=300, deadline=None)
def test_half_octaves_count_the_half_powers_of_two_up_to_a_number(mantissa, shift):
    number = mantissa << shift
    assert half_octave(torch.tensor([number, -number - 1])).tolist() == [plain_half_octave(number), 0]


def test_every_half_octave_begins_at_its_edge():
    edges = torch.tensor(EDGES)
    assert half_octave(edges).tolist() == list(range(1, 96))
    assert half_octave(edges.nextafter(torch.tensor(0.0))).tolist() == list(range(95))
    # As integers: beyond 2^24 they round, but never by as much as a half octave.
    assert half_octave(edges[2:].long() - 1)[:40].tolist() == [plain_half_octave(edge - 1) for edge in EDGES[2:42]]


def history(seed: int = 0, positions: torch.Tensor | None = None) -> tuple[torch.Tensor, ModelBatch]:
    """x_RLW and windows (the last ends with pads) with ascending times, ties among them, queries at some positions."""
    windows = make_windows(PLAIN_FIELDS, ROWS, LENGTH, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x_RLW = torch.randn(ROWS, LENGTH, WIDTH, generator=generator)
    gaps_RL = (10 ** (9 * torch.rand(ROWS, LENGTH, generator=generator))).long() // 10
    time_RL = 1_600_000_000_000 + gaps_RL.cumsum(1).numpy()
    if positions is None:
        positions = torch.arange(ROWS * LENGTH)
    queries = EvalWindows(dataclasses.replace(windows, time_RL=time_RL), *np.divmod(positions.numpy(), LENGTH))
    return x_RLW, make_query_batch(queries)


def point(pointer: Pointer, x_RLW: torch.Tensor, batch: ModelBatch) -> tuple[torch.Tensor, torch.Tensor]:
    gate_Q1, pointer_A = pointer(x_RLW, batch.places.take(x_RLW), batch)
    return gate_Q1, of_positions(pointer_A, batch)


@pytest.fixture
def pointer() -> Pointer:
    made = Pointer(WIDTH, KEY_WIDTH, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return made


@pytest.mark.parametrize("in_pairs", [True, False])
@torch.no_grad()
def test_probabilities_are_the_softmax_of_the_scores_of_the_users_events_so_far(pointer, in_pairs, monkeypatch):
    monkeypatch.setattr(mixture, "takes_pairs", lambda *counts: in_pairs)
    position_Q = torch.randperm(ROWS * LENGTH, generator=torch.Generator().manual_seed(2))[:40]
    x_RLW, batch = history(positions=position_Q)
    first_RL, time_RL = batch.first_RL, batch.time_RL
    gate_Q1, pointer_QL = point(pointer, x_RLW, batch)
    torch.testing.assert_close(pointer_QL.sum(1), torch.ones(40))
    for number, (row, place) in enumerate(zip(*np.divmod(position_Q.numpy(), LENGTH), strict=True)):
        x_W = x_RLW[row, place].double()
        q_P = pointer.query.weight.double() @ x_W
        q_P = q_P / q_P.square().mean().sqrt()
        scores = {}
        for past in range(place + 1):
            if first_RL[row, past] == first_RL[row, place]:
                k_P = pointer.key.weight.double() @ x_RLW[row, past].double()
                elapsed = int(time_RL[row, place] - time_RL[row, past])
                scores[past] = float(
                    q_P @ k_P / math.sqrt(KEY_WIDTH)
                    + pointer.distance_bias[plain_half_octave(place - past)]
                    + pointer.elapsed_bias[plain_half_octave(elapsed)]
                )
        total = sum(map(math.exp, scores.values()))
        expected_L = [math.exp(scores[past]) / total if past in scores else 0.0 for past in range(LENGTH)]
        np.testing.assert_allclose(pointer_QL[number], expected_L, rtol=2e-4, atol=1e-7)
        assert not pointer_QL[number][[past not in scores for past in range(LENGTH)]].any()
        gate = float(pointer.gate.weight.double() @ x_W + pointer.gate_bias)
        assert gate_Q1[number].item() == pytest.approx(gate, rel=1e-4, abs=1e-5)


def test_both_forms_have_the_same_gradient(pointer, monkeypatch):
    position_Q = torch.randperm(ROWS * LENGTH, generator=torch.Generator().manual_seed(2))[:40]
    x_RLW, batch = history(positions=position_Q)

    def gradients(in_pairs):
        monkeypatch.setattr(mixture, "takes_pairs", lambda *counts: in_pairs)
        pointer.zero_grad()
        _, pointer_A = pointer(x_RLW, batch.places.take(x_RLW), batch)
        (pointer_A * torch.linspace(-1, 1, len(pointer_A))).sum().backward()
        return [weight.grad.clone() for name, weight in pointer.named_parameters() if "gate" not in name]

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-4, atol=1e-6)


def test_the_softmax_of_pairs_is_that_of_each_query():
    _, batch = history(positions=torch.tensor([5, 0, LENGTH + 3, 30]))
    pairs = batch.places.pairs
    score_A = torch.randn(len(pairs.query_A), dtype=torch.float64, requires_grad=True)
    parts = torch.cat([part.softmax(0) for part in score_A.split(pairs.length_Q.tolist())])
    torch.testing.assert_close(pairs.softmax(score_A), parts)
    assert torch.autograd.gradcheck(pairs.softmax, score_A)


def test_windows_of_many_users_score_pairs_those_of_one_all_products():
    places = query_places(np.arange(64), np.zeros((1, 64), np.int64))
    assert not takes_pairs(places, 1, 64, 8)
    alone = query_places(np.arange(64), np.arange(64)[None])
    assert takes_pairs(alone, 1, 64, 8)


@torch.no_grad()
def test_other_users_pads_and_later_events_change_nothing(pointer):
    x_RLW, every = history()
    first_RL, time_RL = every.first_RL, every.time_RL
    for position in (0, 7, 23, 30, 2 * LENGTH + 19):
        row, place = divmod(position, LENGTH)
        other_RL = torch.ones(ROWS, LENGTH, dtype=torch.bool)
        other_RL[row] = (first_RL[row] != first_RL[row, place]) | (torch.arange(LENGTH) > place)
        noisy_RLW = torch.where(other_RL[..., None], x_RLW.flip(0, 1) + 1, x_RLW)
        noisy_RL = torch.where(other_RL, time_RL.flip(0) - 5_000, time_RL)
        _, alone = history(positions=torch.tensor([position]))
        noisy = dataclasses.replace(alone, time_RL=noisy_RL)
        torch.testing.assert_close(point(pointer, noisy_RLW, noisy), point(pointer, x_RLW, alone))


@torch.no_grad()
def test_a_new_pointer_gives_the_events_so_far_equal_weights_and_an_open_gate():
    x_RLW, batch = history()
    first_RL = batch.first_RL
    made = Pointer(WIDTH, KEY_WIDTH, torch.Generator().manual_seed(0))
    gate_Q1, pointer_QL = point(made, x_RLW, batch)
    assert not gate_Q1.any()
    own_RLL = ((first_RL[:, :, None] == first_RL[:, None, :]) & torch.ones(LENGTH, LENGTH).tril().bool()).float()
    torch.testing.assert_close(pointer_QL, (own_RLL / own_RLL.sum(-1, keepdim=True)).flatten(0, 1))


def mixture_case(components: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss_T, gates (not yet normalised) and masses, of which some are 0; float64 leaves."""
    generator = torch.Generator().manual_seed(components)
    loss_T = 20 * torch.rand(50, generator=generator, dtype=torch.float64)
    gate_TX1 = 3 * torch.randn(50, components + 1, generator=generator, dtype=torch.float64)
    mass_TX = torch.rand(50, components, generator=generator, dtype=torch.float64) / components
    mass_TX[::3] = 0.0
    return loss_T.requires_grad_(), gate_TX1.requires_grad_(), mass_TX.requires_grad_()


@pytest.mark.parametrize("components", [1, 3])
def test_the_mixture_and_its_gradient_are_the_formulas(components):
    leaves = loss_T, gate_TX1, mass_TX = mixture_case(components)
    got_T = mixture_loss(loss_T, gate_TX1.log_softmax(1), mass_TX)
    weight_TX1 = gate_TX1.softmax(1)
    exact_T = -(weight_TX1[:, 0] * torch.exp(-loss_T) + (weight_TX1[:, 1:] * mass_TX).sum(1)).log()
    torch.testing.assert_close(got_T, exact_T, rtol=1e-12, atol=1e-12)
    got, exact = torch.autograd.grad(got_T.sum(), leaves), torch.autograd.grad(exact_T.sum(), leaves)
    # At 0 the logarithm of the mass has no derivative: a row of which no component knows the target teaches it nothing.
    some_TX = mass_TX > 0
    torch.testing.assert_close(got[:2], exact[:2])
    torch.testing.assert_close(got[2], torch.where(some_TX, exact[2], 0.0))


@pytest.mark.parametrize("gate", [-1e4, -50.0, 0.0, 50.0, 1e4])
@pytest.mark.parametrize("mass", [0.0, 1e-38, 0.5, 1.0])
@pytest.mark.parametrize("loss", [0.0, 10.0, 1e4])
def test_extreme_gates_and_masses_leave_values_and_gradients_finite(gate, mass, loss):
    leaves = torch.tensor([loss]), torch.tensor([[0.0, gate]]), torch.tensor([[mass]])
    loss_T, gate_TX1, mass_TX = (leaf.requires_grad_() for leaf in leaves)
    mixed_T = mixture_loss(loss_T, gate_TX1.log_softmax(1), mass_TX)
    assert mixed_T.isfinite().all()
    assert all(part.isfinite().all() for part in torch.autograd.grad(mixed_T.sum(), leaves))


def test_without_sparse_components_the_loss_is_the_softmaxs():
    loss_T = torch.rand(5)
    assert mixture_loss(loss_T, torch.zeros(5, 1), torch.zeros(5, 0)) is loss_T
