"""Exact training FLOPs of a negative group, from realised counts.

Enters: a shape, the fields, the window; then per group the distinct items, queries, candidates and windows.
Leaves: integers. Counted are the matmuls of the reference implementation that autograd needs: a product of n rows with
a weight of p entries costs 2 n p forward, 2 n p for the weight's gradient and 2 n p for its input's gradient, the last
only where the input needs one (numeric, vector and time features, the gap and the clock do not; table rows do; item
vectors do in stage 1 and not in stage 2). The inputs, all blocks but the last, and the keys and values of the last
block and the sparse components have a row per position; the rest of the contextualizer has one per query. Attention
is dense, 4 pairs w forward and twice that backward: pairs = F^2 per item over its F field tokens, L^2 per window, and L
per query in the last block; the pointer's scores are 2 pairs of its own width, pairs = L per query. The head costs
6 Q K d with live and 4 Q K d with frozen candidates: the targets of a query share its sum over the candidates. Lookups,
norms and elementwise work (the targets' scores and the mixture too) cost nothing.

Q = queries, K = candidates, L = positions of a window, d = retrieval width, w = width of the contextualizer.
"""

from __future__ import annotations

from collections.abc import Sequence

from bfm.events.fields import FittedField
from bfm.model import mixture
from bfm.model.batch import ModelBatch
from bfm.model.fields import FieldLayout
from bfm.model.sizing import Shape
from bfm.model.two_part import automatic_features

FLOPS_VERSION = 3
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

    def group_flops(self, stage: int, distinct_items: int, queries: int, candidates: int, windows: int) -> int:
        """Model FLOPs, forward and backward, of one negative group.

        Stage 1 embeds `distinct_items` and trains both parts; stage 2 reads item vectors from the frozen catalogue.
        """
        shape, positions = self.shape, windows * self.window
        live = stage == 1
        flops = self._embed(distinct_items, backward=True) if live else 0
        flops += positions * (6 * self._context_tables + 4 * self._context_dense)
        flops += positions * shape.d_item * shape.width * ((6 if live else 4) + 6)
        flops += 3 * self._contextualize(windows, queries)
        return flops + queries * candidates * shape.d_item * (6 if live else 4)

    def layout_flops(self, batch: ModelBatch, packed: bool) -> int:
        """What the layout of a batch adds to the attention that is counted, forward and backward, or takes from it.

        Windows have as many slots as the one with most queries, and those without a query cost as much. Packed windows
        and a pointer's pairs leave out what a mask would discard.
        """
        shape, places, (rows, length) = self.shape, batch.places, batch.item_RL.shape
        queries, slots = len(places.position_Q), rows * places.slots
        block = 4 * shape.width * (slots - queries) * length
        if packed:
            dense = (shape.depth - 1) * rows * length**2 + queries * length
            block = 4 * shape.width * (shape.depth * sum(group.attended_pairs for group in batch.groups) - dense)
        in_pairs = mixture.takes_pairs(places, rows, length, shape.pointer_width)
        scored = places.num_pairs if in_pairs else slots * length
        return 3 * (block + 2 * shape.pointer_width * (scored - queries * length))

    def recomputed_flops(self, distinct_items: int, scores: int) -> int:
        """What the backward pass computes again of a group: the embedding of its items, scores of queries.

        Hardware FLOPs are `group_flops`, `layout_flops` and this, each count 0 where nothing is computed twice.
        """
        return self._embed(distinct_items, backward=False) + 2 * scores * self.shape.d_item

    def useful_attention_flops(self, stage: int, distinct_items: int, attended_pairs: int, query_pairs: int) -> int:
        """The share of `group_flops` in attention that no mask discards, forward and backward.

        `attended_pairs`: pairs of a position and an event of its user up to it; `query_pairs`: those of the queries.
        """
        pairs = (self.shape.depth - 1) * attended_pairs + query_pairs
        return 12 * pairs * self.shape.width + (3 * self._field_attention(distinct_items) if stage == 1 else 0)

    def catalogue_flops(self, num_items: int) -> int:
        """Forward FLOPs of embedding `num_items` items once."""
        return self._embed(num_items, backward=False)

    def eval_flops(self, rows: int, queries: int, catalogue: int) -> int:
        """Forward FLOPs of `rows` packed rows of contexts, `queries` projections and scores against the catalogue.

        Embedding the catalogue is apart (`catalogue_flops`).
        """
        shape, positions = self.shape, rows * self.window
        inputs = self._context_tables + self._context_dense + 2 * shape.d_item * shape.width
        # A mixture needs the sum over the catalogue before it can score an item: two passes.
        passes = 2 if shape.pointer_width or shape.counted_events else 1
        scores = 2 * passes * queries * catalogue * shape.d_item
        return 2 * positions * inputs + self._contextualize(rows, queries) + scores

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

    def _contextualize(self, windows: int, queries: int) -> int:
        """What comes after the inputs of the contextualizer; forward."""
        shape, positions, width = self.shape, windows * self.window, self.shape.width
        block = 4 * width**2 + 3 * width * shape.hidden
        keys_values = 2 * width**2
        at_positions = (shape.depth - 1) * block + keys_values + width * shape.pointer_width
        at_queries = block - keys_values + width * (shape.d_item + shape.pointer_width)
        if shape.pointer_width:
            at_queries += width
        if shape.learns_counts:
            at_positions, at_queries = at_positions + width, at_queries + width
        products = positions * at_positions + queries * at_queries + queries * self.window * shape.pointer_width
        attended = (shape.depth - 1) * windows * self.window**2 + queries * self.window
        return 2 * products + 4 * attended * width

    def _field_attention(self, items: int) -> int:
        return 4 * items * self._field_tokens**2 * self.shape.embedder_width * self.shape.embedder_depth
