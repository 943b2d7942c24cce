"""The backwards that are written by hand for the CPU against autograd's on the plain composition of operations."""

import pytest
import torch
import torch.nn.functional as F

from bfm.model.blocks import GatedLinear, make_linear, make_rotation, queries_keys, rms_norm, rotate, unit


def gradients(outputs, inputs):
    weights = [torch.randn(output.shape, generator=torch.Generator().manual_seed(5)) for output in outputs]
    return torch.autograd.grad(sum((o * w).sum() for o, w in zip(outputs, weights, strict=True)), inputs)


def assert_same(ours, reference, inputs):
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(gradients(ours, inputs), gradients(reference, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rotated", [True, False])
def test_queries_and_keys_are_normalised_then_rotated(rotated):
    torch.manual_seed(0)
    qkv_BLCHP = torch.randn(3, 7, 3, 2, 6, requires_grad=True)
    rotation = make_rotation(7, 6, torch.device("cpu")) if rotated else None
    qk_BLCHP = F.rms_norm(qkv_BLCHP[:, :, :2], (6,), eps=1e-6)
    if rotation is not None:
        qk_BLCHP = rotate(qk_BLCHP, rotation)
    reference = [*qk_BLCHP.permute(2, 0, 3, 1, 4), qkv_BLCHP[:, :, 2].transpose(1, 2)]
    assert_same(queries_keys(qkv_BLCHP, rotation), reference, [qkv_BLCHP])


def test_a_gated_linear_map_is_silu_of_one_half_times_the_other():
    generator = torch.Generator().manual_seed(1)
    linear = make_linear(6, 10, generator, GatedLinear)
    x_BLW = torch.randn(2, 4, 6, generator=generator, requires_grad=True)
    gate, up = F.linear(x_BLW, linear.weight).chunk(2, -1)
    assert_same([linear(x_BLW)], [F.silu(gate) * up], [x_BLW, linear.weight])


def test_unit_vectors_and_norms_have_torchs_gradients():
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(2), requires_grad=True)
    assert_same([unit(x)], [F.normalize(x, dim=-1)], [x])
    assert_same([rms_norm(x)], [F.rms_norm(x, (8,), eps=1e-6)], [x])


def test_a_zero_vector_has_no_direction_and_a_finite_gradient():
    x = torch.zeros(1, 4, requires_grad=True)
    y = unit(x)
    assert torch.equal(y, torch.zeros(1, 4))
    assert torch.isfinite(gradients([y], [x])[0]).all()
