"""Who attends to whom in packed windows: an event to its own user's events up to itself.

Enters: queries, keys and values of tokens. Leaves: what each query takes from the values. There are two forms of the
same thing. Dense: an additive mask of all pairs of a row (attended.py), faster on a CPU for short windows. Packed: the
users stand one after the other (`Segments`), so each is a causal sequence of its own and no pair of tokens is ever
written down; on CUDA that is a flash kernel, in float32 the memory-efficient one, each with a backward pass of fixed
order, as equal reruns need it.

B sequences (R windows) of L tokens, S of them with queries, H heads, P head dimension, T tokens of all sequences,
N segments.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bfm.ragged import begins

# Head dimensions that the kernels take are multiples of this.
_HEAD_MULTIPLE = 8
_CAUSAL = 1
_MOST_SEGMENTS = 65_535
"""The kernels put them on an axis of the grid."""
PACKED_LENGTH = 2048
"""Events of a window from which a CPU, too, is faster segment by segment, with users of ten events as with a single one
(measured, one thread)."""


@dataclass(frozen=True)
class Segments:
    """The users of packed windows, one after the other; the pads of a window count as one."""

    bounds_N1: Tensor
    """int32: flat index r * L + l of the first token of each, and R * L."""
    longest: int
    """Most tokens of a segment: known without asking the device."""

    @classmethod
    def of(cls, segment_RL: np.ndarray) -> Segments:
        """From numbers that are equal for neighbours of one user in a window."""
        bounds_N1 = np.append(np.flatnonzero(begins(segment_RL)), segment_RL.size).astype(np.int32)
        return cls(torch.from_numpy(bounds_N1), int(np.diff(bounds_N1).max()))


def packs(device: torch.device, length: int) -> bool:
    """Whether the packed form is the faster one for windows of a length."""
    return device.type == "cuda" or length >= PACKED_LENGTH


def attend(q_BSHP: Tensor, k_BLHP: Tensor, v_BLHP: Tensor, allowed: Tensor | Segments | None, scale: float) -> Tensor:
    """softmax(scale <q, k>) v over the allowed keys of each query, [B, S, H, P].

    `allowed` is added to the logits and broadcasts to [B, H, S, L], or says that every token has a query (S = L) and
    segments are causal; None: all of the sequence's.
    """
    if isinstance(allowed, Segments):
        q_THP, k_THP, v_THP = (part.flatten(0, 1) for part in (q_BSHP, k_BLHP, v_BLHP))
        of_segments = _by_kernel if q_THP.is_cuda else _by_segment
        return of_segments(q_THP, k_THP, v_THP, allowed, scale).unflatten(0, q_BSHP.shape[:2])
    q_BHSP, k_BHLP, v_BHLP = (part.transpose(1, 2) for part in (q_BSHP, k_BLHP, v_BLHP))
    return F.scaled_dot_product_attention(q_BHSP, k_BHLP, v_BHLP, attn_mask=allowed, scale=scale).transpose(1, 2)


def _by_segment(q_THP: Tensor, k_THP: Tensor, v_THP: Tensor, segments: Segments, scale: float) -> Tensor:
    """One segment after the other, on any device: what the kernel computes."""
    outs = []
    for begin, end in itertools.pairwise(segments.bounds_N1.tolist()):
        q_1HTP, k_1HTP, v_1HTP = (part[None, begin:end].transpose(1, 2) for part in (q_THP, k_THP, v_THP))
        out_1HTP = F.scaled_dot_product_attention(q_1HTP, k_1HTP, v_1HTP, is_causal=True, scale=scale)
        outs.append(out_1HTP[0].transpose(0, 1))
    return torch.cat(outs)


def _by_kernel(q_THP: Tensor, k_THP: Tensor, v_THP: Tensor, segments: Segments, scale: float) -> Tensor:
    """All segments at once, as far as a kernel takes so many."""
    count, width = len(segments.bounds_N1) - 1, q_THP.shape[-1]
    if count > _MOST_SEGMENTS:
        outs, firsts = [], range(0, count, _MOST_SEGMENTS)
        for first, (begin, end) in zip(
            firsts, itertools.pairwise(segments.bounds_N1[[*firsts, count]].tolist()), strict=True
        ):
            own = Segments(segments.bounds_N1[first : first + _MOST_SEGMENTS + 1] - begin, segments.longest)
            outs.append(_by_kernel(q_THP[begin:end], k_THP[begin:end], v_THP[begin:end], own, scale))
        return torch.cat(outs)
    tokens = (q_THP, k_THP, v_THP)
    if missing := -width % _HEAD_MULTIPLE:
        # Zeros change no product of queries and keys.
        tokens = (F.pad(q_THP, (0, missing)), F.pad(k_THP, (0, missing)), F.pad(v_THP, (0, missing)))
    sizes, is_half = (segments.bounds_N1, segments.longest, scale), q_THP.dtype in (torch.bfloat16, torch.float16)
    if is_half and _has_flash(q_THP.device):
        return _Flash.apply(*tokens, *sizes)[..., :width]
    return _Efficient.apply(*(part.float() for part in tokens), *sizes)[..., :width].to(q_THP.dtype)


@functools.cache
def _has_flash(device: torch.device) -> bool:
    """Whether a card has the flash kernel: Ampere and later."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


class _Flash(torch.autograd.Function):
    """FlashAttention over causal segments, in half precision."""

    @staticmethod
    def forward(
        ctx: Any, q_THP: Tensor, k_THP: Tensor, v_THP: Tensor, bounds_N1: Tensor, longest: int, scale: float
    ) -> Tensor:
        tokens, sizes = (q_THP, k_THP, v_THP), (bounds_N1, bounds_N1, longest, longest)
        kernel = torch.ops.aten._flash_attention_forward
        out_THP, lse_HT, *random, _ = kernel(*tokens, *sizes, 0.0, True, False, scale=scale)
        ctx.save_for_backward(*tokens, out_THP, lse_HT, bounds_N1, *random)
        ctx.longest, ctx.scale = longest, scale
        return out_THP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *known, bounds_N1, state, unused = ctx.saved_tensors
        sizes = (bounds_N1, bounds_N1, ctx.longest, ctx.longest)
        kernel = torch.ops.aten._flash_attention_backward
        with _in_fixed_order():
            back = kernel(grads[0], *known, *sizes, 0.0, True, state, unused, scale=ctx.scale)
        return *back, None, None, None


class _Efficient(torch.autograd.Function):
    """The memory-efficient kernel over causal segments: slower, and it takes float32."""

    @staticmethod
    def forward(
        ctx: Any, q_THP: Tensor, k_THP: Tensor, v_THP: Tensor, bounds_N1: Tensor, longest: int, scale: float
    ) -> Tensor:
        tokens, sizes = (q_THP[None], k_THP[None], v_THP[None]), (bounds_N1, bounds_N1, longest, longest)
        kernel, trains = torch.ops.aten._efficient_attention_forward, any(ctx.needs_input_grad)
        out_1THP, lse, *random, _, _ = kernel(*tokens, None, *sizes, 0.0, _CAUSAL, trains, scale=scale)
        ctx.save_for_backward(*tokens, out_1THP, bounds_N1, lse, *random)
        ctx.longest, ctx.scale = longest, scale
        return out_1THP[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tokens, out_1THP, bounds_N1, lse, seed, offset = ctx.saved_tensors
        sizes = (bounds_N1, bounds_N1, ctx.longest, ctx.longest)
        kernel = torch.ops.aten._efficient_attention_backward
        with _in_fixed_order():
            *back, _ = kernel(
                grads[0].contiguous()[None],
                *tokens,
                None,
                out_1THP,
                *sizes,
                lse,
                0.0,
                seed,
                offset,
                _CAUSAL,
                False,
                scale=ctx.scale,
                num_splits_key=1,
            )
        return *(part[0] for part in back), None, None, None


@contextmanager
def _in_fixed_order() -> Iterator[None]:
    """Kernels that add up in the order of their arrival have another form, which this asks for."""
    fills: Any = torch.utils.deterministic
    before, only_warns, filled = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        fills.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    # Gradients are written whole: to fill their memory first is one more pass over each.
    fills.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)
        fills.fill_uninitialized_memory = filled
