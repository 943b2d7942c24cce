"""The transformer block of both parts: pre-RMSNorm, QK-norm, SwiGLU, no biases, no norm parameters.

Enters and leaves: x_BLW (B sequences of L tokens of width W). The output projections of attention and SwiGLU start at
zero, so a new block is the identity. H heads, P head dimension (even), C the three of q, k and v, X hidden width,
N = B L tokens. On the CPU, where a step is bound by passes over memory, norms, rotation and SwiGLU have backwards
written by hand; accelerators take torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bfm.events.randomness import stream_key

_ROPE_BASE = 10_000.0
_EPSILON = 1e-6
_SMALLEST_NORM = 1e-12
_DROPOUT_STREAM = 0x64_726F_70

Drop = Callable[[Tensor], Tensor]
"""Dropout of a tensor whose rows are the windows of a batch."""


class _RmsNorm(torch.autograd.Function):
    """x / rms(x) with a backward of four operations; torch's own takes twice the time on the CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(_EPSILON).rsqrt_()
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        y, inverse = ctx.saved_tensors
        along = torch.linalg.vecdot(gradients[0], y).unsqueeze(-1).div_(-y.shape[-1])
        return torch.addcmul(gradients[0], y, along).mul_(inverse)


def rms_norm(x: Tensor) -> Tensor:
    """x / rms(x) over the last dimension, computed in float32, in the dtype of x."""
    single = x.float()
    # Accelerators have a fused kernel.
    y = _RmsNorm.apply(single) if x.device.type == "cpu" else F.rms_norm(single, x.shape[-1:], eps=_EPSILON)
    return y.to(x.dtype)


def look_up(table_RD: Tensor, index: Tensor) -> Tensor:
    """Rows of a table, [*index.shape, D].

    Both operations do the same; they differ in how they add up the table's gradient. On the CPU index_select's is
    about five times faster, on accelerators only embedding's has a fixed order, which equal reruns need.
    """
    if table_RD.device.type == "cpu":
        return table_RD.index_select(0, index.flatten().long()).view(*index.shape, -1)
    return F.embedding(index, table_RD)


def make_rotation(length: int, head_dim: int, device: torch.device) -> Tensor:
    """Rotary positions 0..length-1 as unit complex numbers, [L, 1, 1, P / 2]."""
    rate = _ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * rate
    rotation = torch.polar(torch.ones_like(angle), angle)
    return rotation.view(length, 1, 1, head_dim // 2).to(device, torch.complex64)


def rotate(x_BLCHP: Tensor, rotation: Tensor) -> Tensor:
    """Turns each pair of neighbouring channels by its position's angle; float32 inside, as complex numbers."""
    pairs = torch.view_as_complex(x_BLCHP.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x_BLCHP.dtype)


class _QueriesKeys(torch.autograd.Function):
    """q, k, v of attention from one product: q and k normalised, then rotated. Each pass writes where it reads.

    The backward needs no unrotated q and k: a rotation changes neither the length of a vector nor what it leaves out.
    """

    @staticmethod
    def forward(ctx: Any, qkv_BLCHP: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        qk_BLCHP = qkv_BLCHP[:, :, :2]
        mean_square = torch.linalg.vector_norm(qk_BLCHP, dim=-1, keepdim=True).square_().div_(qk_BLCHP.shape[-1])
        inverse = mean_square.add_(_EPSILON).rsqrt_()
        y_BLCHP = qk_BLCHP * inverse
        if rotation is not None:
            torch.view_as_complex(y_BLCHP.unflatten(-1, (-1, 2))).mul_(rotation)
        ctx.save_for_backward(y_BLCHP, inverse)
        ctx.rotation = rotation
        q_BHLP, k_BHLP = y_BLCHP.permute(2, 0, 3, 1, 4)
        return q_BHLP, k_BHLP, qkv_BLCHP[:, :, 2].transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        y_BLCHP, inverse = ctx.saved_tensors
        grad_BLCHP = torch.stack([gradient.transpose(1, 2) for gradient in gradients], 2)
        qk_BLCHP = grad_BLCHP[:, :, :2]
        along = torch.linalg.vecdot(qk_BLCHP, y_BLCHP).unsqueeze(-1).div_(-y_BLCHP.shape[-1])
        qk_BLCHP.addcmul_(y_BLCHP, along).mul_(inverse)
        if ctx.rotation is not None:
            torch.view_as_complex(qk_BLCHP.unflatten(-1, (-1, 2))).mul_(ctx.rotation.conj())
        return grad_BLCHP, None


class _GatedProduct(torch.autograd.Function):
    """silu(x G^T) * (x U^T) for a weight that holds G above U, from two contiguous products.

    The weight's gradient is x^T g: for many outputs twice as fast on the CPU as torch's own g^T x.
    """

    @staticmethod
    def forward(ctx: Any, x_BLW: Tensor, weight: Tensor) -> Tensor:
        x_NW = x_BLW.flatten(0, -2)
        gate_NX, up_NX = (x_NW @ part.T for part in weight.chunk(2))
        active_NX = F.silu(gate_NX)
        ctx.save_for_backward(x_BLW, weight, gate_NX, up_NX, active_NX)
        return (active_NX * up_NX).unflatten(0, x_BLW.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x_BLW, weight, gate_NX, up_NX, active_NX = ctx.saved_tensors
        grad_NX = gradients[0].flatten(0, -2)
        grad_up_NX = grad_NX * active_NX
        grad_gate_NX = grad_NX * up_NX
        torch.ops.aten.silu_backward.grad_input(grad_gate_NX, gate_NX, grad_input=grad_gate_NX)
        gate_weight, up_weight = weight.chunk(2)
        grad_NW = torch.addmm(grad_gate_NX @ gate_weight, grad_up_NX, up_weight)
        x_WN = x_BLW.flatten(0, -2).T
        grad_weight = torch.cat([(x_WN @ grad_gate_NX).T, (x_WN @ grad_up_NX).T])
        return grad_NW.view_as(x_BLW), grad_weight


class GatedLinear(nn.Linear):
    """silu(gate) * up, where gate and up are the halves of one linear map's outputs."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., W] to [..., hidden]."""
        if _is_plain(input) and _is_plain(self.weight):
            return _GatedProduct.apply(input, self.weight)
        gate, up = super().forward(input).chunk(2, -1)
        return F.silu(gate) * up


class _Unit(torch.autograd.Function):
    """x / |x| with a backward of three operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(_SMALLEST_NORM)
        y = x / norm
        ctx.save_for_backward(y, norm)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        y, norm = ctx.saved_tensors
        along = torch.linalg.vecdot(gradients[0], y).unsqueeze(-1).neg_()
        return torch.addcmul(gradients[0], y, along).div_(norm)


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, float32."""
    single = x.float()
    return _Unit.apply(single) if x.device.type == "cpu" else F.normalize(single, dim=-1)


def queries_keys(qkv_BLCHP: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each [B, H, L, P]; q and k of rms 1, rotated where there is a rotation."""
    if _is_plain(qkv_BLCHP):
        return _QueriesKeys.apply(qkv_BLCHP, rotation)
    qk_BLCHP = rms_norm(qkv_BLCHP[:, :, :2])
    if rotation is not None:
        qk_BLCHP = rotate(qk_BLCHP, rotation)
    q_BHLP, k_BHLP = qk_BLCHP.permute(2, 0, 3, 1, 4)
    return q_BHLP, k_BHLP, qkv_BLCHP[:, :, 2].transpose(1, 2)


def _is_plain(x: Tensor) -> bool:
    """Whether x is computed with on the CPU as it is: float32, and no autocast."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


class GroupDropout:
    """Dropout whose masks are a function of (seed, group): the same for any micro-batch and number of workers."""

    def __init__(
        self, rate: float, seed: int, group_indices: Sequence[int], windows: Sequence[int], device: torch.device
    ) -> None:
        """`windows` are the rows of each group."""
        self.rate, self.windows = rate, tuple(windows)
        self.generators = [
            torch.Generator(device).manual_seed(int(stream_key(_DROPOUT_STREAM, seed, group)) >> 1)
            for group in group_indices
        ]

    def __call__(self, x_RLW: Tensor) -> Tensor:
        """Channels of x are zeroed with probability `rate`, the rest scaled by 1 / (1 - rate)."""
        keep_RLW = torch.empty_like(x_RLW, memory_format=torch.contiguous_format)
        for part, generator in zip(keep_RLW.split(self.windows), self.generators, strict=True):
            part.bernoulli_(1.0 - self.rate, generator=generator)
        return x_RLW * keep_RLW.div_(1.0 - self.rate)


class Block(nn.Module):
    """Attention and SwiGLU, each added to the residual stream."""

    def __init__(self, width: int, heads: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.heads = heads
        head_dim = width // heads
        # Normalised q and k bound a logit by scale * head_dim; narrow heads need more room than 1 / sqrt(head_dim)
        # gives to single out one of many events.
        self.logit_scale = max(8 / head_dim, head_dim**-0.5)
        self.qkv = make_linear(width, 3 * width, generator)
        self.attention_out = make_linear(width, width, None)
        self.gate_up = make_linear(width, 2 * hidden, generator, GatedLinear)
        self.down = make_linear(hidden, width, None)

    def forward(self, x_BLW: Tensor, mask: Tensor | None, rotation: Tensor | None, drop: Drop | None = None) -> Tensor:
        """`mask` is added to the logits and broadcasts to [B, H, L, L]; rotation None: tokens have no positions.

        `drop` is applied to what is added to the residual stream.
        """
        added_BLW = self._attend(rms_norm(x_BLW), mask, rotation)
        x_BLW = x_BLW + (added_BLW if drop is None else drop(added_BLW))
        added_BLW = self.down(self.gate_up(rms_norm(x_BLW)))
        return x_BLW + (added_BLW if drop is None else drop(added_BLW))

    def _attend(self, x_BLW: Tensor, mask: Tensor | None, rotation: Tensor | None) -> Tensor:
        batch, length, width = x_BLW.shape
        qkv_BLCHP = self.qkv(x_BLW).view(batch, length, 3, self.heads, -1)
        q_BHLP, k_BHLP, v_BHLP = queries_keys(qkv_BLCHP, rotation)
        out_BHLP = F.scaled_dot_product_attention(q_BHLP, k_BHLP, v_BHLP, attn_mask=mask, scale=self.logit_scale)
        return self.attention_out(out_BHLP.transpose(1, 2).reshape(batch, length, width))


def make_linear(
    inputs: int, outputs: int, generator: torch.Generator | None, kind: type[nn.Linear] = nn.Linear
) -> nn.Linear:
    """A linear map without bias: normal of deviation inputs^-0.5, or zero where no generator is given."""
    linear = kind(inputs, outputs, bias=False, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        if generator is None:
            linear.weight.zero_()
        else:
            linear.weight.normal_(0, inputs**-0.5, generator=generator)
    return linear
