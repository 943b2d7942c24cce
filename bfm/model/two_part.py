"""The two-part model: an embedder (item fields to unit vectors) and a contextualizer (a user's events to unit queries).

Enters: a `ModelBatch`. Leaves: item vectors v_UD per distinct item, queries h_QD, and a learned scale;
the score of an item is scale * <h, v>. Stage 1 trains both parts; in stage 2 the embedder is frozen and item vectors
are rows of a constant catalogue matrix, with the same `contextualize`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bfm.errors import UserError
from bfm.events.fields import FittedField
from bfm.events.neighbours import Neighbours
from bfm.model.batch import ModelBatch
from bfm.model.blocks import GroupDropout, look_up
from bfm.model.contextualizer import Contextualizer
from bfm.model.embedder import ItemEmbedder
from bfm.model.fields import (
    CLOCK_FEATURES,
    GAP_FEATURES,
    TOKEN_STD,
    FieldEncoder,
    FieldLayout,
    PackedFields,
    clock_features,
    gap_features,
)
from bfm.model.mixture import Queries
from bfm.model.sizing import Shape

LARGEST_SCALE = 100.0
EMBED_CHUNK = 1 << 14
"""Items that are embedded at once."""


class ItemStore:
    """Encoded fields of all items as plain tensors: no parameters, no buffers, not in any checkpoint."""

    def __init__(self, fields: Sequence[FittedField], arrays: Mapping[str, np.ndarray]) -> None:
        self.layout = FieldLayout([field for field in fields if field.side == "item"])
        if not self.layout.fields:
            raise UserError("the log has no item field", key="item_fields", fix="keep the item id as a field")
        lengths = {len(arrays[field.name]) for field in self.layout.fields}
        if len(lengths) != 1:
            raise ValueError(f"item fields differ in length: {sorted(lengths)}")
        self.num_items = lengths.pop()
        tensors = {field.name: torch.from_numpy(np.array(arrays[field.name])) for field in self.layout.fields}
        self._packed = {torch.device("cpu"): self.layout.pack(tensors, self.num_items)}

    def packed(self, device: torch.device) -> PackedFields:
        """The packed fields on `device`, copied there once."""
        if device not in self._packed:
            self._packed[device] = self._packed[torch.device("cpu")].to(device)
        return self._packed[device]


class ContextEncoder(nn.Module):
    """Sum of the context tokens c_RLD: declared fields, the gap, the clock and the bit `later`."""

    def __init__(
        self, fields: Sequence[FittedField], has_clock: bool, d_item: int, table_width: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.layout = FieldLayout([field for field in fields if field.side == "context"])
        self.has_clock = has_clock
        self.fields = FieldEncoder(self.layout, d_item, table_width, generator, automatic_features(has_clock))
        self.later_table = nn.Parameter(torch.randn(2, d_item, generator=generator) * TOKEN_STD)

    def forward(self, context: dict[str, Tensor], gap_RL: Tensor, time_RL: Tensor, later_RL: Tensor) -> Tensor:
        """c_RLD in the dtype of the weights."""
        rows = gap_RL.numel()
        packed = self.layout.pack(context, rows)
        time_N = time_RL.reshape(rows)
        dense = [self.layout.features(packed, time_N), gap_features(gap_RL.reshape(rows))]
        if self.has_clock:
            dense.append(clock_features(time_N))
        dense_NX = torch.cat([part for part in dense if part is not None], -1)
        c_RLD = self.fields(packed.ids_NS, dense_NX).view(*gap_RL.shape, -1)
        return c_RLD + look_up(self.later_table, later_RL.long())


class TwoPartModel(nn.Module):
    """Embedder and contextualizer of a `Shape` over the fields of one shard set. Weights are a function of the seed.

    `neighbours` is the table that a shape with counted events mixes in: like the items' fields, no part of the weights.
    """

    def __init__(
        self,
        shape: Shape,
        fields: Sequence[FittedField],
        item_store: ItemStore,
        has_clock: bool,
        table_width: int,
        seed: int,
        dropout: float = 0.0,
        initial_scale: float = 20.0,
        neighbours: Neighbours | None = None,
    ) -> None:
        super().__init__()
        assert (neighbours is not None) == (shape.counted_events > 0), "a table, exactly for a shape that reads one"
        self.shape, self.table_width, self.seed, self.dropout = shape, table_width, seed, dropout
        self.item_store, self.neighbours = item_store, neighbours
        # One generator per part: the context side and the contextualizer start alike whatever the embedder draws.
        generators = [torch.Generator().manual_seed(_mix(seed, part)) for part in range(3)]
        self.embedder = ItemEmbedder(shape, item_store.layout, table_width, generators[0])
        self.context = ContextEncoder(fields, has_clock, shape.d_item, table_width, generators[1])
        self.contextualizer = Contextualizer(shape, generators[2])
        share = initial_scale / LARGEST_SCALE
        self.scale_logit = nn.Parameter(torch.tensor([math.log(share / (1 - share))]))

    @property
    def scale(self) -> Tensor:
        """What multiplies cosines: a float32 scalar between 0 and 100, with a gradient everywhere."""
        return LARGEST_SCALE * torch.sigmoid(self.scale_logit.float()).squeeze(0)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.scale_logit.device

    def forward(self, batch: ModelBatch, objective: Callable[[TwoPartModel, ModelBatch], Any]) -> Any:
        """What the objective says. Engines wrap this call, so that every weight is used inside one forward."""
        return objective(self, batch)

    def embed_items(self, ids_U: Tensor) -> Tensor:
        """Unit vectors v_UD (float32) of item ids (int64).

        More than EMBED_CHUNK items are embedded in chunks that the backward pass computes again, so that the memory of
        live candidates is their vectors and one chunk's activations.
        """
        if not embeds_twice(len(ids_U)) or not torch.is_grad_enabled():
            return self._embed_chunk(ids_U)
        return torch.cat(
            [
                checkpoint(self._embed_chunk, part, use_reentrant=False, preserve_rng_state=False)
                for part in ids_U.split(EMBED_CHUNK)
            ]
        )

    def _embed_chunk(self, ids_U: Tensor, store: ItemStore | None = None) -> Tensor:
        store = store or self.item_store
        packed = store.packed(ids_U.device).take(ids_U)
        return self.embedder(packed.ids_NS, store.layout.features(packed, None))

    @torch.no_grad()
    def embed_all(self, *, first: int = 0, step: int = 1, store: ItemStore | None = None) -> Tensor:
        """The catalogue and the cold items, or every step-th of them from `first` on: [I, d_item], float32.

        `store`: other items with the same fields.
        """
        store = store or self.item_store
        ids = torch.arange(first, store.num_items, step, device=self.device)
        return torch.cat([self._embed_chunk(part, store) for part in ids.split(EMBED_CHUNK)])

    def contextualize(self, batch: ModelBatch, v_UD: Tensor) -> Queries:
        """What is said at the queries of the batch.

        v_UD: vectors of batch.items_U, from `embed_items` (stage 1) or rows of the frozen catalogue (stage 2).
        """
        v_RLD = look_up(v_UD, batch.item_RL)
        context_RLD = self.context(batch.context, batch.gap_RL, batch.time_RL, batch.later_RL)
        drop = None
        if self.training and self.dropout > 0.0:
            drop = GroupDropout(self.dropout, self.seed, batch.groups, self.device)
        return self.contextualizer(v_RLD, context_RLD, batch, drop)

    def embedder_parameter_names(self) -> tuple[str, ...]:
        """Names of what stage 2 freezes: item tables, item stem and embedder; never the context side."""
        return tuple(name for name, _ in self.named_parameters() if name.startswith("embedder."))

    def parameter_kinds(self) -> dict[str, str]:
        """What each parameter is to an optimizer, by name.

        `dense`: matrices, which decay; `tables`: vocabulary and hash tables, which do so as events repeat, at a rate of
        their own; `free`: what never decays: biases, gains and the rows of the bit `later`, that half of all events
        support each.
        """

        def kind(name: str, parameter: nn.Parameter) -> str:
            if name == "context.later_table" or parameter.dim() < 2:
                return "free"
            return "tables" if name.endswith(".table") else "dense"

        return {name: kind(name, parameter) for name, parameter in self.named_parameters()}

    def add_to_table_gradients(self) -> None:
        """From here on what comes is added to the gradients that the trained tables have."""
        for encoder in (self.embedder.fields, self.context.fields):
            encoder.adds_in_place = encoder.table is not None and encoder.table.grad is not None

    def freeze_embedder(self) -> None:
        """Stage 2: no gradients for the embedder from here on."""
        self.embedder.requires_grad_(False)


def embeds_twice(num_items: int) -> bool:
    """Whether so many items are embedded again in the backward pass rather than have their activations kept."""
    return num_items > EMBED_CHUNK


def automatic_features(has_clock: bool) -> int:
    """Dense context inputs of every log: the gap, and the clock where there is one."""
    return GAP_FEATURES + (CLOCK_FEATURES if has_clock else 0)


def _mix(seed: int, part: int) -> int:
    return int(np.random.SeedSequence([seed, part]).generate_state(1, np.uint64)[0] >> np.uint64(1))
