"""The transformer block of both parts: pre-RMSNorm, QK-norm, SwiGLU, no biases, no norm parameters.

Enters and leaves: x_BLW (B sequences of L tokens of width W), or, where only some tokens are asked for, these. The
output projections of attention and SwiGLU start at zero, so a new block is the identity.
H heads, P head dimension (even), X hidden width, Q queries (tokens asked for), S slots of a sequence's queries, N all
tokens or the queries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bfm.model.attention import Segments, attend
from bfm.model.batch import Group, QueryPlaces
from bfm.randomness import stream_key

_ROPE_BASE = 10_000.0
_EPSILON, _LEAST_SQUARE = 1e-6, 1e-24
_DROPOUT_STREAM = 0x64_726F_70

Drop = Callable[[Tensor], Tensor]
"""Dropout of a tensor whose rows are the windows of a batch, or its queries."""


def rms_norm(x: Tensor) -> Tensor:
    """x / rms(x) over the last dimension, computed in float32, in the dtype of x."""
    return _Normed.apply(x.float(), x.shape[-1], _EPSILON).to(x.dtype)


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, float32; 0 stays 0."""
    return _Normed.apply(x.float(), 1, _LEAST_SQUARE)


class _Normed(torch.autograd.Function):
    """x (|x|^2 / n + epsilon)^-1/2 over the last dimension: half as many passes over memory as torch's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int, epsilon: float) -> Tensor:
        ratio = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(n).add_(epsilon).rsqrt_()
        y = x * ratio
        ctx.save_for_backward(y, ratio)
        ctx.n = n
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, ratio = ctx.saved_tensors
        along = (grads[0] * y).sum(-1, keepdim=True).mul_(ratio).div_(ctx.n)
        return (grads[0] * ratio).addcmul_(y, along, value=-1), None, None


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table [R, D], or elements of one [R]: [*index.shape, D], or index.shape.

    Both operations do the same; they differ in how they add up the table's gradient. On the CPU index_select's is about
    five times faster (a step of a small model takes two thirds more with embedding), on accelerators only embedding's
    has a fixed order, which equal reruns need.
    """
    if table.device.type == "cpu":
        return table.index_select(0, index.flatten()).view(*index.shape, *table.shape[1:])
    return F.embedding(index, table.view(len(table), math.prod(table.shape[1:]))).view(*index.shape, *table.shape[1:])


def add_rows(total_RD: Tensor, index_N: Tensor, rows_ND: Tensor) -> None:
    """Add rows to those of a total that the index names, in a fixed order: the gradient of a look-up."""
    if total_RD.device.type == "cpu":
        total_RD.index_add_(0, index_N, rows_ND)
    else:
        total_RD.index_put_((index_N,), rows_ND, accumulate=True)


@functools.cache
def make_rotation(length: int, head_dim: int, device: torch.device) -> Tensor:
    """Rotary positions 0..length-1 as unit complex numbers, [L, 1, P / 2]."""
    rate = _ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * rate
    rotation = torch.polar(torch.ones_like(angle), angle)
    return rotation.view(length, 1, head_dim // 2).to(device, torch.complex64)


def rotate(x_LHP: Tensor, rotation: Tensor) -> Tensor:
    """Turns each pair of neighbouring channels by its position's angle; float32 inside, as complex numbers."""
    pairs = torch.view_as_complex(x_LHP.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x_LHP.dtype)


class GroupDropout:
    """Dropout whose masks are a function of (seed, group): the same for any micro-batch and number of workers."""

    def __init__(self, rate: float, seed: int, groups: Sequence[Group], device: torch.device) -> None:
        self.rate, self.groups = rate, groups
        self.generators = [
            torch.Generator(device).manual_seed(int(stream_key(_DROPOUT_STREAM, seed, group.index)) >> 1)
            for group in groups
        ]

    def windows(self, x_RLW: Tensor) -> Tensor:
        """Channels of x are zeroed with probability `rate`, the rest scaled by 1 / (1 - rate)."""
        return self._drop(x_RLW, [group.windows for group in self.groups])

    def queries(self, x_QW: Tensor) -> Tensor:
        """The same for a tensor whose rows are queries."""
        return self._drop(x_QW, [group.queries for group in self.groups])

    def _drop(self, x_NW: Tensor, rows: list[int]) -> Tensor:
        keep_NW = torch.empty_like(x_NW, memory_format=torch.contiguous_format)
        for part, generator in zip(keep_NW.split(rows), self.generators, strict=True):
            part.bernoulli_(1.0 - self.rate, generator=generator)
        # In half precision a scaled mask would be off by as much for all.
        return (x_NW * keep_NW).div_(1.0 - self.rate)


class Block(nn.Module):
    """Attention and SwiGLU, each added to the residual stream."""

    def __init__(self, width: int, heads: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.heads = heads
        head_dim = width // heads
        # Normalised q and k bound a logit by scale * head_dim; narrow heads need more room than 1 / sqrt(head_dim)
        # gives to single out one of many events.
        self.logit_scale = max(8 / head_dim, head_dim**-0.5)
        self.query = make_linear(width, width, generator)
        self.key_value = make_linear(width, 2 * width, generator)
        self.attention_out = make_linear(width, width, None)
        self.gate_up = make_linear(width, 2 * hidden, generator)
        self.down = make_linear(hidden, width, None)

    def forward(
        self,
        x_BLW: Tensor,
        allowed: Tensor | Segments | None,
        rotation: Tensor | None,
        drop: Drop | None = None,
        queries: QueryPlaces | None = None,
    ) -> Tensor:
        """What comes of every token, [B, L, W], or of the queries alone, [Q, W].

        `allowed` is that of `attend`; rotation None: tokens have no positions. `drop` is applied to what is added to
        the residual stream.
        """
        normed_BLW = rms_norm(x_BLW)
        x_NW, normed_NW = (x_BLW, normed_BLW) if queries is None else map(queries.take, (x_BLW, normed_BLW))
        added_NW = self.attention_out(self._attend(normed_NW, normed_BLW, allowed, rotation, queries))
        x_NW = x_NW + (added_NW if drop is None else drop(added_NW))
        gate_NX, up_NX = self.gate_up(rms_norm(x_NW)).chunk(2, -1)
        added_NW = self.down(F.silu(gate_NX) * up_NX)
        return x_NW + (added_NW if drop is None else drop(added_NW))

    def _attend(
        self,
        x_NW: Tensor,
        x_BLW: Tensor,
        allowed: Tensor | Segments | None,
        rotation: Tensor | None,
        queries: QueryPlaces | None,
    ) -> Tensor:
        q_NHP = rms_norm(self.query(x_NW).unflatten(-1, (self.heads, -1)))
        k_BLHP, v_BLHP = self.key_value(x_BLW).unflatten(-1, (2, self.heads, -1)).unbind(2)
        k_BLHP = rms_norm(k_BLHP)
        if rotation is not None:
            at_queries = rotation if queries is None else rotation.index_select(0, queries.column_Q)
            q_NHP, k_BLHP = rotate(q_NHP, at_queries), rotate(k_BLHP, rotation)
        q_BSHP = q_NHP if queries is None else queries.spread(q_NHP, len(x_BLW))
        out_BSW = attend(q_BSHP, k_BLHP, v_BLHP, allowed, self.logit_scale).flatten(2)
        return out_BSW if queries is None else queries.gather(out_BSW)


def make_linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """A linear map without bias: normal of deviation inputs^-0.5, or zero where no generator is given."""
    linear = nn.Linear(inputs, outputs, bias=False, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        if generator is None:
            linear.weight.zero_()
        else:
            linear.weight.normal_(0, inputs**-0.5, generator=generator)
    return linear
