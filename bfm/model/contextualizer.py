"""A user's events to one vector per position: the history's query for the next item.

Enters: item vectors v_RLD and the sum of context tokens c_RLD at every position of packed windows, and their segments.
Leaves: `Queries` at the wanted positions. x = W_item v + W_ctx c; pre-RMSNorm blocks with RoPE and a mask that lets an
event see its own user's events up to itself; a final norm, the projection to d_item, and the sparse components
(mixture.py). Attention is dense over the row: L x L pairs, masked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bfm.model.blocks import Block, Drop, make_linear, make_rotation, rms_norm, unit
from bfm.model.mixture import NeighbourAttention, Pointer, Queries
from bfm.model.sizing import Shape


class Contextualizer(nn.Module):
    """The second part of the model."""

    def __init__(self, shape: Shape, generator: torch.Generator) -> None:
        super().__init__()
        self.head_dim = shape.width // shape.heads
        self.item_inputs = make_linear(shape.d_item, shape.width, generator)
        self.context_inputs = make_linear(shape.d_item, shape.width, generator)
        self.blocks = nn.ModuleList(
            Block(shape.width, shape.heads, shape.hidden, generator) for _ in range(shape.depth)
        )
        self.out = make_linear(shape.width, shape.d_item, generator)
        self.pointer = Pointer(shape.width, shape.pointer_width, generator) if shape.pointer_width else None
        self.neighbours = NeighbourAttention(shape.width, shape.counted_events) if shape.counted_events else None

    def forward(
        self,
        v_RLD: Tensor,
        context_RLD: Tensor,
        segment_RL: Tensor,
        time_RL: Tensor,
        position_T: Tensor,
        counted_TM: Tensor | None = None,
        drop: Drop | None = None,
    ) -> Queries:
        """The queries at the flat positions r * L + l; counted_TM are their last items that have neighbours, or -1."""
        _, length, d_item = v_RLD.shape
        dtype = self.out.weight.dtype
        # A unit vector has rms d_item^-0.5: scaled, both inputs have rms 1.
        x_RLW = self.item_inputs((v_RLD * d_item**0.5).to(dtype)) + self.context_inputs(rms_norm(context_RLD))
        if drop is not None:
            x_RLW = drop(x_RLW)
        mask = attention_mask(segment_RL, x_RLW.dtype)
        rotation = make_rotation(length, self.head_dim, x_RLW.device)
        for block in self.blocks:
            x_RLW = block(x_RLW, mask, rotation, drop)
        x_RLW = rms_norm(x_RLW)
        h_TD = unit(self.out(x_RLW.flatten(0, 1).index_select(0, position_T)))
        gates, pointer_TL, weight_TM = [h_TD.new_zeros(len(h_TD), 1)], None, None
        if self.pointer is not None:
            gate_T1, pointer_TL = self.pointer(x_RLW, segment_RL, time_RL, position_T)
            gates.append(gate_T1)
        if self.neighbours is not None:
            assert counted_TM is not None, "windows without what their model was to count"
            gate_T1, weight_TM = self.neighbours(x_RLW, position_T, counted_TM)
            gates.append(gate_T1)
        return Queries(h_TD, F.log_softmax(torch.cat(gates, 1), -1), pointer_TL, weight_TM)


def attention_mask(segment_RL: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, 1, L, L], additive: 0 where the key is an event of the same user up to the query, else -inf.

    Pads form a segment of their own, so no row of the softmax is empty.
    """
    length = segment_RL.shape[1]
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=segment_RL.device).tril()
    allowed_RLL = (segment_RL[:, :, None] == segment_RL[:, None, :]) & causal_LL
    mask_RLL = torch.zeros(allowed_RLL.shape, dtype=dtype, device=segment_RL.device)
    return mask_RLL.masked_fill_(~allowed_RLL, float("-inf")).unsqueeze(1)
