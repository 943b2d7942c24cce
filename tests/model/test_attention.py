"""The packed form of attention against the dense one, and the calls of the CUDA kernels as far as a CPU can tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bfm.model.contextualizer as contextualizer_module
from bfm.model import attention
from bfm.model.attended import attention_mask
from bfm.model.attention import Segments, attend
from bfm.model.batch import first_columns
from bfm.model.sizing import size_model
from tests.model.toys import ALL_FIELDS, PLAIN_FIELDS, batch_of, make_model, make_windows, perturb

torch.set_num_threads(1)


def make_segments(rows, length, seed=0):
    """Users of any length, some windows with pads at their end, as [R, L] numbers."""
    rng = np.random.default_rng(seed)
    segment_RL = np.cumsum(rng.random((rows, length)) < 0.2, axis=1)
    for row in range(0, rows, 2):
        segment_RL[row, length - rng.integers(1, length // 2) :] = -1
    return segment_RL.astype(np.int32)


def dense_mask(segment_RL, dtype):
    first_RL, length = torch.from_numpy(first_columns(segment_RL)), segment_RL.shape[1]
    last_RL = torch.arange(length).expand_as(first_RL)
    mask = attention_mask(first_RL.flatten(), last_RL.flatten(), length, dtype)
    return mask.view(-1, 1, length, length)


def make_tokens(rows, length, heads, width, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(3, rows, length, heads, width, generator=generator, dtype=torch.float64).to(dtype)
    return [part.clone().requires_grad_() for part in tokens]


def value_and_gradients(tokens, allowed, scale=0.7):
    out_BSHP = attend(*tokens, allowed, scale)
    weight_BSHP = torch.randn(out_BSHP.shape, generator=torch.Generator().manual_seed(5)).to(out_BSHP.dtype)
    return out_BSHP, *torch.autograd.grad((out_BSHP * weight_BSHP).sum(), tokens)


@pytest.mark.parametrize("seed", range(5))
def test_segments_are_the_runs_of_equal_numbers_inside_windows(seed):
    segment_RL = make_segments(4, 30, seed)
    # The first user of a window may have the number of the last one of the window before.
    segment_RL[1, 0] = segment_RL[0, -1]
    segments = Segments.of(segment_RL)
    runs, longest = [], 0
    for row in range(4):
        for column in range(30):
            if column == 0 or segment_RL[row, column] != segment_RL[row, column - 1]:
                runs.append(row * 30 + column)
    assert segments.bounds_N1.tolist() == [*runs, 120]
    assert segments.bounds_N1.dtype == torch.int32
    longest = max(np.diff([*runs, 120]))
    assert segments.longest == longest


@pytest.mark.parametrize("seed", range(5))
def test_both_forms_are_the_same(seed):
    segment_RL, tokens = make_segments(5, 40, seed), make_tokens(5, 40, 3, 6, seed=seed)
    dense = value_and_gradients(tokens, dense_mask(segment_RL, torch.float64))
    torch.testing.assert_close(value_and_gradients(tokens, Segments.of(segment_RL)), dense)


class Kernels:
    """What the CUDA kernels compute, from their own arguments: segment by segment, on the CPU."""

    def __init__(self, monkeypatch):
        self.widths, self.fixed_order = set(), []
        for name in ("flash", "efficient"):
            for direction in ("forward", "backward"):
                monkeypatch.setattr(
                    torch.ops.aten, f"_{name}_attention_{direction}", getattr(self, f"{name}_{direction}")
                )

    def run(self, tokens, bounds, longest, scale):
        self.widths.add(tokens[0].shape[-1])
        assert all(part.stride(-1) == 1 for part in tokens)
        return attention._by_segment(*tokens, Segments(bounds, longest), scale)

    def back(self, grad, tokens, bounds, longest, scale):
        self.fixed_order.append(torch.are_deterministic_algorithms_enabled())
        with torch.enable_grad():
            leaves = [part.detach().requires_grad_() for part in tokens]
            return torch.autograd.grad(self.run(leaves, bounds, longest, scale), leaves, grad)

    def flash_forward(self, q, k, v, bounds_q, bounds_k, most_q, most_k, dropout, causal, debug, *, scale):
        assert (dropout, causal, debug, most_q) == (0.0, True, False, most_k)
        assert torch.equal(bounds_q, bounds_k)
        nothing = torch.zeros(2)
        return self.run((q, k, v), bounds_q, most_q, scale), nothing, nothing, nothing, nothing

    def flash_backward(
        self, grad, q, k, v, out, lse, bounds_q, bounds_k, most_q, most_k, dropout, causal, state, unused, *, scale
    ):
        assert (dropout, causal) == (0.0, True)
        return self.back(grad, (q, k, v), bounds_q, most_q, scale)

    def efficient_forward(self, q, k, v, bias, bounds_q, bounds_k, most_q, most_k, dropout, mask, with_lse, *, scale):
        assert (bias, dropout, mask, with_lse) == (None, 0.0, 1, True)
        nothing = torch.zeros(2)
        return self.run((q[0], k[0], v[0]), bounds_q, most_q, scale)[None], nothing, nothing, nothing, most_q, most_k

    def efficient_backward(
        self, grad, q, k, v, bias, out, bounds_q, bounds_k, most_q, most_k, lse, dropout, seed, offset, mask,
        bias_needs_gradient, *, scale, num_splits_key,
    ):  # fmt: skip
        assert (bias, dropout, mask, bias_needs_gradient, num_splits_key) == (None, 0.0, 1, False, 1)
        grads = self.back(grad[0], (q[0], k[0], v[0]), bounds_q, most_q, scale)
        return *(part[None] for part in grads), None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("width", [6, 16, 20])
def test_the_kernels_are_given_what_makes_them_the_dense_form(monkeypatch, dtype, tolerance, width):
    """Heads of any even width, in float32 and in half precision; the backward pass asks for a fixed order."""
    kernels = Kernels(monkeypatch)
    segment_RL, tokens = make_segments(4, 24), make_tokens(4, 24, 2, width, dtype)
    segments = Segments.of(segment_RL)
    flat = [part.flatten(0, 1) for part in tokens]
    out_THP = attention._by_kernel(*flat, segments, 0.7)
    weight_THP = torch.randn(out_THP.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    found = (out_THP.view_as(tokens[0]), *torch.autograd.grad((out_THP * weight_THP).sum(), tokens))
    dense = value_and_gradients(tokens, dense_mask(segment_RL, dtype))
    torch.testing.assert_close(found, dense, rtol=tolerance, atol=tolerance)
    assert kernels.widths == {-(-width // 8) * 8}
    assert kernels.fixed_order == [True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_more_segments_than_a_kernel_takes_are_taken_in_turns(monkeypatch):
    Kernels(monkeypatch)
    segment_RL, tokens = make_segments(4, 24), make_tokens(4, 24, 2, 16, torch.float32)
    segments, flat = Segments.of(segment_RL), [part.flatten(0, 1) for part in tokens]
    whole_THP = attention._by_kernel(*flat, segments, 0.7)
    for most in (1, 3, len(segments.bounds_N1) - 2):
        monkeypatch.setattr(attention, "_MOST_SEGMENTS", most)
        torch.testing.assert_close(attention._by_kernel(*flat, segments, 0.7), whole_THP)


def test_cards_without_the_flash_kernel_attend_in_float32(monkeypatch):
    kernels = Kernels(monkeypatch)
    monkeypatch.setattr(kernels, "flash_forward", None)
    monkeypatch.setattr(attention, "_has_flash", lambda device: False)
    segment_RL, tokens = make_segments(4, 24), make_tokens(4, 24, 2, 16, torch.bfloat16)
    out_THP = attention._by_kernel(*(part.flatten(0, 1) for part in tokens), Segments.of(segment_RL), 0.7)
    assert out_THP.dtype == torch.bfloat16
    (grad, *_) = torch.autograd.grad(out_THP.float().sum(), tokens)
    assert grad.dtype == torch.bfloat16
    (dense, *_) = value_and_gradients(tokens, dense_mask(segment_RL, torch.bfloat16))
    torch.testing.assert_close(out_THP.view_as(dense), dense, rtol=5e-2, atol=5e-2)


def test_torch_takes_the_calls_of_the_kernels():
    """Shapes and arguments, by torch's own description of the operations."""
    for dtype in (torch.float32, torch.bfloat16):
        with torch.device("meta"):
            tokens = [torch.empty(96, 2, 20, dtype=dtype, requires_grad=True) for _ in range(3)]
            out_THP = attention._by_kernel(*tokens, Segments(torch.empty(5, dtype=torch.int32), 40), 0.5)
            assert out_THP.shape == (96, 2, 20)
            # That of the other backward pass lacks an argument (torch 2.13).
            grads = torch.autograd.grad(out_THP.sum(), tokens) if dtype == torch.bfloat16 else tokens
        assert [(part.shape, part.dtype) for part in grads] == [((96, 2, 20), dtype)] * 3
    schema = torch.ops.aten._efficient_attention_backward.default._schema
    assert [argument.name for argument in schema.arguments][:18] == [
        *("grad_out_", "query", "key", "value", "bias", "out", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q"),
        *("max_seqlen_k", "logsumexp", "dropout_p", "philox_seed", "philox_offset", "custom_mask_type"),
        *("bias_requires_grad", "scale", "num_splits_key"),
    ]


@pytest.mark.parametrize("pointer", [True, False])
def test_a_model_says_the_same_in_both_forms(monkeypatch, pointer):
    model = perturb(make_model(fields=ALL_FIELDS, shape=size_model(1e4, 0.1, d_item=16, depth=2, pointer=pointer)))
    batch = batch_of([make_windows(ALL_FIELDS, seed=seed, baskets=True) for seed in range(2)])
    assert len(model.contextualizer.blocks) > 1

    def told():
        model.zero_grad()
        queries = model.contextualize(batch, model.embed_items(batch.items_U))
        weight_QD = torch.randn(queries.h_QD.shape, generator=torch.Generator().manual_seed(0))
        (queries.h_QD * weight_QD).sum().backward()
        said = [queries.h_QD.detach(), queries.log_gate_TX1.detach()]
        said += [] if queries.pointer_A is None else [queries.pointer_A.detach()]
        return said, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    dense = told()
    monkeypatch.setattr(contextualizer_module, "packs", lambda device, length: True)
    torch.testing.assert_close(told(), dense, rtol=1e-4, atol=1e-5)


def test_long_windows_and_accelerators_are_packed():
    for device, length, packed in (("cpu", 512, False), ("cpu", 1 << 16, True), ("cuda", 16, True), ("mps", 16, False)):
        assert attention.packs(torch.device(device), length) == packed


class Largest(TorchDispatchMode):
    """The most numbers of a tensor that an operation made."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [
            part.untyped_storage().nbytes() // part.itemsize for part in tree_leaves(made) if torch.is_tensor(part)
        ]
        self.numbers = max([self.numbers, *sizes])
        return made


def test_packed_attention_makes_nothing_of_the_window_squared(monkeypatch):
    model = make_model(shape=size_model(6e3, 0.0, d_item=16, depth=2, pointer=False))
    monkeypatch.setattr(contextualizer_module, "packs", lambda device, length: True)
    found = []
    for length in (256, 1024):
        batch = batch_of([make_windows(PLAIN_FIELDS, rows=1, length=length)])
        v_UD = model.embed_items(batch.items_U).detach()
        with Largest() as largest:
            model.contextualize(batch, v_UD).h_QD.sum().backward()
        found.append(largest.numbers)
    assert found[1] <= 4.1 * found[0]
    assert found[1] < 1024**2 / 2
