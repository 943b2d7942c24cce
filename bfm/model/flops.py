"""Exact training FLOPs of a negative group, from realised counts.

Enters: a shape, the fields, the window; then per group the distinct items, target rows, candidates and windows.
Leaves: integers. Counted are the matmuls of the reference implementation that autograd needs: a product of n rows with
a weight of p entries costs 2 n p forward, 2 n p for the weight's gradient and 2 n p for its input's gradient, the last
only where the input needs one (numeric, vector and time features, the gap and the clock do not; table rows do; item
vectors do in stage 1 and not in stage 2). Attention is dense, 4 pairs w forward and twice that backward, pairs = F^2
per item over its F field tokens and L^2 per window; the pointer's scores are 2 pairs of its own width forward. The head
costs 6 rows K d with live and 4 rows K d with frozen candidates. Lookups, norms and elementwise work (the positives'
scores and the mixture too) cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from bfm.events.fields import FittedField
from bfm.model.fields import FieldLayout
from bfm.model.sizing import Shape
from bfm.model.two_part import automatic_features

FLOPS_VERSION = 2
"""Of what counts as C and of what is trained with it: rows of two versions are never compared."""


class ModelCost:
    """Costs of one model over one shard set's fields."""

    def __init__(
        self, shape: Shape, fields: Sequence[FittedField], table_width: int, window: int, has_clock: bool
    ) -> None:
        self.shape = shape
        self.window = window
        item = FieldLayout([field for field in fields if field.side == "item"])
        context = FieldLayout([field for field in fields if field.side == "context"])
        d_item = shape.d_item
        self._field_tokens = len(item.fields)
        self._item_tables = len(item.tables) * table_width * d_item
        self._item_dense = sum(item.feature_counts) * d_item
        self._context_tables = len(context.tables) * table_width * d_item
        self._context_dense = (sum(context.feature_counts) + automatic_features(has_clock)) * d_item
        self.stem_params = self._item_tables + self._item_dense + d_item**2 + self._context_tables + self._context_dense
        """Weights that map fields to the retrieval width."""
        self.table_params = (item.table_rows + context.table_rows) * table_width + 2 * d_item
        """Entries of lookup tables, the two rows of the bit `later` included."""

    def group_flops(self, stage: int, distinct_items: int, target_rows: int, candidates: int, windows: int) -> int:
        """Model FLOPs, forward and backward, of one negative group.

        Stage 1 embeds `distinct_items` and trains both parts; stage 2 reads item vectors from the frozen catalogue.
        """
        _check_stage(stage)
        shape, positions = self.shape, windows * self.window
        live = stage == 1
        flops = self._embed(distinct_items, backward=True) if live else 0
        flops += positions * (6 * self._context_tables + 4 * self._context_dense)
        flops += positions * shape.d_item * shape.width * ((6 if live else 4) + 6)
        flops += positions * 6 * self._block_params()
        flops += 3 * self._attention(windows) + 3 * self._sparse(windows, target_rows)
        flops += target_rows * 6 * shape.width * shape.d_item
        return flops + target_rows * candidates * shape.d_item * (6 if live else 4)

    def recomputed_flops(self, distinct_items: int, target_rows: int, candidates: int) -> int:
        """What the backward pass computes again of a group: the embedding of its items, the scores of its rows.

        Hardware FLOPs are `group_flops` and this, each count 0 where nothing of it is computed twice.
        """
        return self._embed(distinct_items, backward=False) + 2 * target_rows * candidates * self.shape.d_item

    def useful_attention_flops(self, stage: int, distinct_items: int, attended_pairs: int) -> int:
        """The share of `group_flops` in attention that no mask discards, forward and backward.

        `attended_pairs`: (query, key) pairs inside a user's segment, causal, the diagonal included.
        """
        _check_stage(stage)
        flops = 3 * 4 * attended_pairs * self.shape.width * self.shape.depth
        return flops + (3 * self._field_attention(distinct_items) if stage == 1 else 0)

    def catalogue_flops(self, num_items: int) -> int:
        """Forward FLOPs of embedding `num_items` items once."""
        return self._embed(num_items, backward=False)

    def eval_flops(self, rows: int, queries: int, catalogue: int) -> int:
        """Forward FLOPs of `rows` packed rows of contexts, `queries` projections and scores against the catalogue.

        Embedding the catalogue is apart (`catalogue_flops`).
        """
        shape, positions = self.shape, rows * self.window
        weights = self._context_tables + self._context_dense + 2 * shape.d_item * shape.width + self._block_params()
        flops = 2 * positions * weights + self._attention(rows) + self._sparse(rows, queries)
        # A mixture needs the sum over the catalogue before it can score an item: two passes.
        passes = 2 if shape.mixed else 1
        return flops + 2 * queries * shape.d_item * (shape.width + passes * catalogue)

    def _embed(self, items: int, backward: bool) -> int:
        """Item stem and embedder; forward only, or with backward."""
        shape, tokens = self.shape, items * self._field_tokens
        forward = items * (self._item_tables + shape.d_item**2)
        if shape.embedder_kind == "mlp":
            forward += items * shape.embedder_params
        elif shape.embedder_kind == "transformer":
            out = shape.d_item * shape.embedder_width
            forward += tokens * (shape.embedder_params - out) + items * out
        dense = items * self._item_dense
        if not backward:
            return 2 * (forward + dense) + self._field_attention(items)
        return 6 * forward + 4 * dense + 3 * self._field_attention(items)

    def _block_params(self) -> int:
        return self.shape.contextualizer_params - self.shape.edge_params

    def _sparse(self, windows: int, rows: int) -> int:
        """What gives the sparse components their gates (at the wanted rows) and probabilities; forward."""
        shape, positions = self.shape, windows * self.window
        products = 0
        if shape.pointer_width:
            # Queries and keys at every position, scores of all pairs.
            products += (2 * shape.width + self.window) * positions * shape.pointer_width + rows * shape.width
        if shape.counted_events:
            products += (positions + rows) * shape.width
        return 2 * products

    def _attention(self, windows: int) -> int:
        return 4 * windows * self.window**2 * self.shape.width * self.shape.depth

    def _field_attention(self, items: int) -> int:
        return 4 * items * self._field_tokens**2 * self.shape.embedder_width * self.shape.embedder_depth


def _check_stage(stage: int) -> None:
    if stage not in (1, 2):
        raise ValueError(f"stage {stage!r}: there are stages 1 and 2")
