"""Inclusion probabilities and draws that keep them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bfm.objective.sampling as sampling
from bfm.errors import UserError
from bfm.objective.sampling import (
    Proposal,
    drawn_inclusion,
    fixed_candidates,
    group_rng,
    mix_inclusion,
)


@given(
    st.lists(st.integers(1, 10**9), min_size=1, max_size=200),
    st.floats(0.0, 2.0),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_inclusion_is_proportional_below_one_and_sums_to_k(popularity, exponent, data):
    popularity_V = np.array(popularity)
    num_negatives = data.draw(st.integers(1, len(popularity)))
    pi_V = drawn_inclusion(popularity_V, num_negatives, exponent)
    assert pi_V.max() <= 1.0
    assert pi_V.sum() == pytest.approx(num_negatives, rel=1e-9)
    free_V = pi_V < 1
    if free_V.any():
        weight_V = popularity_V.astype(float) ** exponent
        factor_V = pi_V / weight_V
        np.testing.assert_allclose(factor_V[free_V], factor_V[free_V][0], rtol=1e-9)
        # The certain items would exceed one.
        assert (factor_V[free_V][0] * weight_V[~free_V] >= 1 - 1e-9).all()
    ids_K = Proposal.of(pi_V).draw(group_rng(0, 0))
    assert len(ids_K) == num_negatives
    assert (np.diff(ids_K) > 0).all()


def test_as_many_negatives_as_items_is_every_item_and_more_is_a_users_mistake():
    popularity_V = np.array([5, 3, 1])
    np.testing.assert_array_equal(drawn_inclusion(popularity_V, 3, 0.5), 1.0)
    np.testing.assert_array_equal(Proposal.of(np.ones(3)).draw(group_rng(1, 2)), [0, 1, 2])
    for wrong in (4, 0):
        with pytest.raises(UserError, match="catalogue of 3 items"):
            drawn_inclusion(popularity_V, wrong, 0.5)
    with pytest.raises(ValueError, match="positive"):
        drawn_inclusion(np.array([1, 0]), 1, 0.5)


def shown(pi_V, num_draws):
    """Which items each draw showed, and that each was shown as often as its probability says."""
    proposal = Proposal.of(pi_V)
    shown_NV = np.zeros((num_draws, len(pi_V)))
    for index in range(num_draws):
        shown_NV[index, proposal.draw(group_rng(7, index))] = 1
    error_V = np.sqrt(pi_V * (1 - pi_V) / num_draws)
    assert (np.abs(shown_NV.mean(0) - pi_V) <= 4.5 * error_V).all()
    return shown_NV


def test_draws_have_the_stated_inclusion_and_every_pair_is_possible():
    shown_NV = shown(drawn_inclusion(np.array([100, 30, 10, 5, 3, 2, 1, 1]), 3, 0.7), 10_000)
    assert ((shown_NV.T @ shown_NV) > 0).all()


@pytest.mark.parametrize("exponent", [0.0, 0.4, 0.7])
def test_layers_keep_inclusion_and_size_and_leave_no_pair_out(monkeypatch, exponent):
    """Two items come together nearly as often as independent draws would."""
    monkeypatch.setattr(sampling, "_FEW_ITEMS", 8)
    pi_V = drawn_inclusion(np.arange(1, 161) ** 2, 30, exponent)
    assert len(Proposal.of(pi_V).layers) >= 1
    shown_NV = shown(pi_V, 6000)
    assert (shown_NV.sum(1) == 30).all()
    together_VV, product_VV = (shown_NV.T @ shown_NV) / 6000, np.outer(pi_V, pi_V)
    apart_VV = ~np.eye(160, dtype=bool)
    assert np.abs(together_VV - product_VV)[apart_VV].max() < 0.06
    assert abs((together_VV / product_VV)[apart_VV & (product_VV > 0.005)].mean() - 1) < 0.05


def test_neighbours_on_a_layers_line_come_together_too():
    pi_V = np.full(100, 0.1) * np.repeat([1.0, 0.9], 50)
    (layer,) = Proposal.of(pi_V).layers
    shown_NV = shown(pi_V, 6000)
    ratio_N = (shown_NV[:, 1:] * shown_NV[:, :-1]).mean(0) / (pi_V[1:] * pi_V[:-1])
    assert layer.cells > layer.points
    assert ratio_N.min() > 0
    assert 0.5 < ratio_N.mean() < 1.0


@given(st.lists(st.floats(1e-9, 0.2499), min_size=64, max_size=300), st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_what_a_layer_hands_on_is_worth_its_length_and_no_item_more_than_one(values, seed):
    pi_N = np.ldexp(np.frexp(values)[0], -3)
    layer = sampling._Layer.of(np.arange(len(pi_N)) + 5, pi_N)
    assert layer is not None
    item_C, worth_C = layer.draw(group_rng(seed, 0))
    assert (np.diff(item_C) > 0).all()
    assert worth_C.sum() == pytest.approx(pi_N.sum(), rel=1e-9)
    assert worth_C.max() <= 1 + 1e-12
    place_M = np.append(group_rng(seed, 1).random(50) * layer.end_N[-1], layer.end_N)
    found_M = np.minimum(np.searchsorted(layer.end_N, place_M, side="right"), len(pi_N) - 1)
    np.testing.assert_array_equal(layer._item_at(place_M), found_M)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_a_draw_looks_at_a_few_items_per_negative_whatever_the_catalogue(exponent):
    popularity_V = 10**9 // np.arange(1, 200_001)
    for num_negatives in (100, 5000):
        proposal = Proposal.of(drawn_inclusion(popularity_V, num_negatives, exponent))
        looked_at = len(proposal.item_C) + sum(layer.points for layer in proposal.layers)
        assert looked_at < 8 * num_negatives + 2000
        ids_K = proposal.draw(group_rng(1, 1))
        assert len(ids_K) == num_negatives
        assert (np.diff(ids_K) > 0).all()
        np.testing.assert_array_equal(ids_K, proposal.draw(group_rng(1, 1)))
        assert (ids_K != proposal.draw(group_rng(1, 2))).any()


def test_a_draw_is_a_pure_function_of_seed_and_group():
    pi_V = np.full(100, 0.1)
    first = Proposal.of(pi_V).draw(group_rng(3, 4))
    again = Proposal.of(pi_V)
    np.testing.assert_array_equal(first, again.draw(group_rng(3, 4)))
    assert any((again.draw(group_rng(*other)) != first).any() for other in ((3, 5), (4, 3)))


def test_a_fractional_sum_draws_its_floor_or_ceiling():
    pi_V = np.array([0.5, 0.25, 0.6, 0.0, 1.0])
    proposal = Proposal.of(pi_V)
    sizes = [len(proposal.draw(group_rng(0, index))) for index in range(2000)]
    assert set(sizes) == {2, 3}
    assert np.mean(sizes) == pytest.approx(2.35, abs=0.05)
    for wrong in (np.array([0.5, 1.1]), np.array([np.nan])):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            Proposal.of(wrong)


def test_mixture_is_the_chance_to_be_in_either_sample():
    pi_batch_V, pi_drawn_V = np.array([0.0, 0.3, 1.0, 1e-9]), np.array([0.4, 0.5, 0.2, 1e-9])
    np.testing.assert_allclose(mix_inclusion(pi_batch_V, pi_drawn_V), [0.4, 0.65, 1.0, 2e-9], rtol=1e-8)


def test_fixed_candidates_are_one_draw():
    pi_V = drawn_inclusion(np.arange(1, 51), 20, 0.5)
    fixed = fixed_candidates(pi_V, seed=3)
    assert len(fixed) == 20
    np.testing.assert_array_equal(fixed, fixed_candidates(pi_V, seed=3))
    assert fixed.tolist() != fixed_candidates(pi_V, seed=4).tolist()
