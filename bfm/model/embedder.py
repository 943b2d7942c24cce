"""One item, one vector: field tokens pooled and projected (s = 0), plus a residual of the embedder proper (s > 0).

Enters: packed item fields of U distinct items. Leaves: v_UD, float32, unit length. The path of s = 0 (mean of the field
tokens, RMSNorm, one projection d_item x d_item) is stem, not embedder, and is part of every model; embedders add to it
an MLP of the pooled tokens or a small transformer over the field tokens. What they add starts at zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bfm.model.blocks import Block, make_linear, rms_norm, unit
from bfm.model.fields import FieldEncoder, FieldLayout
from bfm.model.sizing import Shape


class ItemEmbedder(nn.Module):
    """Stem of the item side and the embedder of a shape."""

    def __init__(self, shape: Shape, layout: FieldLayout, table_width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.num_fields = len(layout.fields)
        self.fields = FieldEncoder(layout, shape.d_item, table_width, generator)
        self.project = make_linear(shape.d_item, shape.d_item, generator)
        self.residual: MlpResidual | TransformerResidual | None = None
        if shape.embedder_kind == "mlp":
            self.residual = MlpResidual(shape, generator)
        elif shape.embedder_kind == "transformer":
            self.residual = TransformerResidual(shape, generator)

    def forward(self, ids_US: Tensor | None, dense_UX: Tensor | None) -> Tensor:
        """Unit vectors v_UD, float32."""
        if isinstance(self.residual, TransformerResidual):
            tokens_UFD = self.fields(ids_US, dense_UX, tokens=True)
            v_UD = self.project(rms_norm(tokens_UFD.mean(1))) + self.residual(tokens_UFD)
        else:
            # rms_norm makes the mean of the tokens of their sum.
            pooled_UD = rms_norm(self.fields(ids_US, dense_UX) / self.num_fields)
            v_UD = self.project(pooled_UD)
            if self.residual is not None:
                v_UD = v_UD + self.residual(pooled_UD)
        return unit(v_UD)


class MlpResidual(nn.Module):
    """down(silu(up(x))) on the pooled, normalised tokens."""

    def __init__(self, shape: Shape, generator: torch.Generator) -> None:
        super().__init__()
        self.up = make_linear(shape.d_item, shape.embedder_hidden, generator)
        self.down = make_linear(shape.embedder_hidden, shape.d_item, None)

    def forward(self, pooled_UD: Tensor) -> Tensor:
        """[U, D] to [U, D]."""
        return self.down(F.silu(self.up(pooled_UD)))


class TransformerResidual(nn.Module):
    """Blocks over the field tokens (each attends to all, no positions), mean, RMSNorm, projection."""

    def __init__(self, shape: Shape, generator: torch.Generator) -> None:
        super().__init__()
        width = shape.embedder_width
        self.inputs = make_linear(shape.d_item, width, generator)
        self.blocks = nn.ModuleList(
            Block(width, shape.embedder_heads, shape.embedder_hidden, generator) for _ in range(shape.embedder_depth)
        )
        self.out = make_linear(width, shape.d_item, None)

    def forward(self, tokens_UFD: Tensor) -> Tensor:
        """[U, F, D] to [U, D]."""
        # As in the contextualizer: the sum of what blocks add is not rounded.
        x_UFW = self.inputs(rms_norm(tokens_UFD)).float()
        for block in self.blocks:
            x_UFW = block(x_UFW, None, None)
        return self.out(rms_norm(x_UFW.mean(1)))
