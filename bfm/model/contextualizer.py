"""A user's events to one vector per query: what is asked of the catalogue after a history.

Enters: item vectors v_RLD and the sum of context tokens c_RLD at every position of packed windows, and their segments.
Leaves: `Queries`. x = W_item v + W_ctx c; pre-RMSNorm blocks with RoPE and a mask that lets an event see its own user's
events up to itself; a final norm, the projection to d_item, and the sparse components (mixture.py). Nothing after the
last block looks at other positions than the queries, so it runs at these alone, over keys and values of all events;
the sparse components take their keys from what enters it.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bfm.model.attended import attention_mask
from bfm.model.attention import Segments, packs
from bfm.model.batch import ModelBatch, QueryPlaces
from bfm.model.blocks import Block, GroupDropout, look_up, make_linear, make_rotation, rms_norm, unit
from bfm.model.mixture import NeighbourAttention, Pointer, Queries, mix_counts
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
        if not shape.pointer_width:
            _start_at_the_item(self.item_inputs, self.out, generator)
        self.pointer = Pointer(shape.width, shape.pointer_width, generator) if shape.pointer_width else None
        self.neighbours = NeighbourAttention(shape.width, shape.counted_events) if shape.learns_counts else None
        self.counts_share = shape.counts_share

    def forward(
        self, v_RLD: Tensor, context_RLD: Tensor, batch: ModelBatch, drop: GroupDropout | None = None
    ) -> Queries:
        """What is said at the queries of the batch, in their order."""
        _, length, d_item = v_RLD.shape
        # A unit vector has rms d_item^-0.5: scaled, both inputs have rms 1.
        x_RLW = self.item_inputs(v_RLD * d_item**0.5) + self.context_inputs(rms_norm(context_RLD))
        # What blocks add to it is rounded to the precision of products, not the sum.
        x_RLW = x_RLW.float()
        drop_windows, drop_queries = (None, None) if drop is None else (drop.windows, drop.queries)
        if drop_windows is not None:
            x_RLW = drop_windows(x_RLW)
        rotation = make_rotation(length, self.head_dim, x_RLW.device)
        *lower, last = self.blocks
        if lower:
            allowed = _of_positions(batch, x_RLW.dtype)
            for block in lower:
                x_RLW = block(x_RLW, allowed, rotation, drop_windows)
        allowed, places = _of_queries(batch, x_RLW.dtype)
        x_QW = rms_norm(last(x_RLW, allowed, rotation, drop_queries, places))
        x_RLW = rms_norm(x_RLW)
        h_QD = unit(self.out(x_QW))
        gates, pointer_A, weight_TM = [h_QD.new_zeros(len(batch.query_T), 1)], None, None
        if self.pointer is not None:
            gate_Q1, pointer_A = self.pointer(x_RLW, x_QW, batch)
            gates.append(look_up(gate_Q1, batch.query_T))
        if self.neighbours is not None:
            gate_T1, weight_TM = self.neighbours(x_RLW, x_QW, batch)
            gates.append(gate_T1)
        log_gate_TX1 = F.log_softmax(torch.cat(gates, 1), -1)
        if self.counts_share and batch.counted_TM is not None:
            log_gate_TX1, weight_TM = mix_counts(log_gate_TX1, batch.counted_TM, self.counts_share)
        return Queries(h_QD, log_gate_TX1, pointer_A, weight_TM)


def _of_positions(batch: ModelBatch, dtype: torch.dtype) -> Tensor | Segments:
    """What every position may attend to."""
    first_RL, length = batch.first_RL, batch.first_RL.shape[1]
    if packs(first_RL.device, length):
        return batch.segments
    last_RL = torch.arange(length, device=first_RL.device).expand_as(first_RL)
    return attention_mask(first_RL.flatten(), last_RL.flatten(), length, dtype).view(-1, 1, length, length)


def _of_queries(batch: ModelBatch, dtype: torch.dtype) -> tuple[Tensor | Segments, QueryPlaces]:
    """What the queries of the last block may attend to, and the slots in which they lie for it.

    Nobody reads what comes of slots without a query: in packed segments, where every token has a slot, they ask for
    nothing, and else they attend to the first event.
    """
    places, (rows, length) = batch.places, batch.first_RL.shape
    if packs(batch.first_RL.device, length):
        return batch.segments, dataclasses.replace(places, slot_Q=places.position_Q, slots=length)
    first_RS, last_RS = (places.spread(of_Q, rows) for of_Q in (places.first_Q, places.column_Q))
    mask = attention_mask(first_RS.flatten(), last_RS.flatten(), length, dtype)
    return mask.view(rows, 1, places.slots, length), places


@torch.no_grad()
def _start_at_the_item(inputs: nn.Linear, out: nn.Linear, generator: torch.Generator) -> None:
    """Orthogonal maps, one the transpose of the other: a query begins near the vector of its own event's item.

    So what follows an item is first looked for around it, and a pair of neighbours in a history pulls the vectors of
    both, which few events of an item need. A pointer finds the items of the history by itself, and the softmax does
    better when it starts away from them.
    """
    width, d_item = inputs.weight.shape
    # Inputs of rms 1 stay so where the width is the larger of the two.
    nn.init.orthogonal_(inputs.weight, gain=max(1.0, width / d_item) ** 0.5, generator=generator)
    out.weight.copy_(inputs.weight.T * (min(1.0, d_item / width) ** 0.5))
