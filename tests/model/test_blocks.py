from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bfm.model.attended import attention_mask
from bfm.model.batch import query_places
from bfm.model.blocks import Block, look_up, make_linear, make_rotation, rms_norm, rotate, unit


def test_rms_norm_keeps_the_dtype():
    assert rms_norm(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_zero_vector_has_no_direction_and_a_finite_gradient():
    for normalise in (unit, rms_norm):
        x = torch.zeros(1, 4, requires_grad=True)
        y = normalise(x)
        assert torch.equal(y, torch.zeros(1, 4))
        y.sum().backward()
        assert torch.isfinite(x.grad).all()


def test_rotated_products_depend_on_distance_only():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 6, generator=generator)
    rotation = make_rotation(50, 6, torch.device("cpu"))

    def logit(query_position: int, key_position: int) -> float:
        both = torch.stack([query, key])[None, :, None, :]
        places = rotation[[query_position, key_position]]
        turned = rotate(both, places).reshape(2, 6)
        return float(turned[0] @ turned[1])

    assert logit(0, 0) == pytest.approx(float(query @ key), abs=1e-5)
    assert logit(7, 3) == pytest.approx(logit(44, 40), abs=1e-4)
    assert logit(7, 3) != pytest.approx(logit(3, 7), abs=1e-2)


def test_a_fresh_block_is_the_identity():
    block = Block(16, 2, 40, torch.Generator().manual_seed(0))
    x_BLW = torch.randn(3, 5, 16)
    assert torch.equal(block(x_BLW, None, make_rotation(5, 8, x_BLW.device)), x_BLW)


def test_queries_alone_are_what_the_block_says_at_their_positions():
    generator = torch.Generator().manual_seed(0)
    block = Block(16, 2, 40, generator)
    with torch.no_grad():
        for weight in block.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    x_BLW = torch.randn(3, 7, 16, generator=generator)
    rotation, mask_LL = make_rotation(7, 8, x_BLW.device), torch.full((7, 7), -torch.inf).triu(1)
    places = query_places(np.array([6, 0, 18, 15]), np.zeros((3, 7), np.int64))
    mask_BSL = places.spread(mask_LL[places.position_Q % 7], 3)
    alone_QW = block(x_BLW, mask_BSL[:, None], rotation, queries=places)
    torch.testing.assert_close(alone_QW, places.take(block(x_BLW, mask_LL, rotation)))


def test_nothing_is_looked_up_in_an_empty_table_on_any_device():
    for shape in ((0, 3), (0,)):
        table, index = torch.empty(shape, device="meta"), torch.empty((2, 0), dtype=torch.long, device="meta")
        assert look_up(table, index).shape == (2, 0, *shape[1:])


def test_look_up_is_indexing_with_a_summed_gradient():
    table = torch.randn(6, 3, requires_grad=True)
    index = torch.tensor([[1, 1, 5], [0, 1, 5]], dtype=torch.int32)
    rows = look_up(table, index)
    assert torch.equal(rows, table[index.long()])
    rows.sum().backward()
    assert table.grad is not None
    assert table.grad[:, 0].tolist() == [1, 3, 0, 0, 0, 2]


def test_the_mask_admits_the_users_own_past_and_leaves_no_row_empty():
    first_N, last_N = torch.tensor([0, 0, 2, 3, 1]), torch.tensor([0, 1, 2, 3, 3])
    mask_NL = attention_mask(first_N, last_N, 4, torch.float32)
    assert (mask_NL == 0).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 1, 1, 1]]
    assert set(mask_NL.unique().tolist()) == {0.0, -math.inf}


def test_linear_maps_are_drawn_from_their_generator():
    drawn = make_linear(64, 200, torch.Generator().manual_seed(1)).weight
    assert torch.equal(drawn, make_linear(64, 200, torch.Generator().manual_seed(1)).weight)
    assert drawn.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert not make_linear(4, 4, None).weight.any()


@pytest.mark.parametrize("normed", [rms_norm, unit])
def test_norms_have_the_gradient_of_their_formula(normed):
    x_NW = torch.randn(9, 6, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 9)[:, None]
    size, epsilon = (6, 1e-6) if normed is rms_norm else (1, 0.0)
    grad_NW = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    got_NW, exact_NW = x_NW.clone().requires_grad_(), x_NW.double().requires_grad_()
    expected_NW = exact_NW / (exact_NW.square().sum(1, keepdim=True) / size + epsilon).sqrt()
    torch.testing.assert_close(normed(got_NW), expected_NW.float())
    normed(got_NW).backward(grad_NW)
    expected_NW.backward(grad_NW.double())
    torch.testing.assert_close(got_NW.grad.double(), exact_NW.grad, rtol=5e-5, atol=1e-9)
