"""Random windows and item fields of every kind, without shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from bfm.events.fields import FittedField
from bfm.events.windows import Counted, Windows
from bfm.model.batch import ModelBatch, make_batch, query_places
from bfm.model.mixture import Queries
from bfm.model.sizing import Shape, size_model
from bfm.model.two_part import ItemStore, TwoPartModel

NUM_ITEMS = 120
ID = FittedField("item_id", "item", "hashed", rows=256, columns=2)
BRAND = FittedField("brand", "item", "categorical", rows=20)
KIND = FittedField("kind", "item", "categorical", rows=9)
TITLE = FittedField("title", "item", "text", rows=50, columns=7)
TAGS = FittedField("tags", "item", "list", rows=30, columns=4)
COLORS = FittedField("colors", "item", "list", rows=12, columns=4)
PRICE = FittedField("price", "item", "numeric", edges=(0.5, 1.0, 2.0, 3.5), mean=1.5, std=0.7)
WEIGHT = FittedField("weight", "item", "numeric", edges=(1.0,), mean=1.0, std=1.0)
LOOK = FittedField("look", "item", "vector", columns=5)
RELEASED = FittedField("released", "item", "time")
CHANNEL = FittedField("channel", "context", "categorical", rows=6)
STORE = FittedField("store", "context", "hashed", rows=64, columns=2)
COUPONS = FittedField("coupons", "context", "list", rows=15, columns=3)
QUANTITY = FittedField("quantity", "context", "numeric", edges=(), mean=0.0, std=1.0)
DEVICE = FittedField("device", "context", "vector", columns=3)
SHIPPED = FittedField("shipped", "context", "time")

ALL_FIELDS = (
    ID, BRAND, PRICE, TITLE, TAGS, KIND, COLORS, WEIGHT, LOOK, RELEASED,
    CHANNEL, STORE, COUPONS, QUANTITY, DEVICE, SHIPPED,
)  # fmt: skip
PLAIN_FIELDS = (ID, BRAND, KIND, CHANNEL)


def encode(rng: np.random.Generator, field: FittedField, shape: tuple[int, ...]) -> np.ndarray:
    """Random encoded values of a field with leading dimensions `shape`."""
    if field.kind == "categorical":
        return rng.integers(0, field.rows, shape, dtype=np.int32)
    if field.kind in ("hashed", "text", "list"):
        return rng.integers(0, field.rows, (*shape, field.columns), dtype=np.int32)
    if field.kind == "vector":
        return rng.normal(size=(*shape, field.columns)).astype(np.float32)
    if field.kind == "time":
        return rng.integers(1_500_000_000_000, 1_700_000_000_000, shape)
    values = rng.lognormal(size=shape).astype(np.float32)
    values[rng.random(shape) < 0.1] = np.nan
    values[rng.random(shape) < 0.1] = 0
    return values


def make_store(fields: tuple[FittedField, ...], num_items: int = NUM_ITEMS, seed: int = 0) -> ItemStore:
    """Random items."""
    rng = np.random.default_rng(seed)
    arrays = {field.name: encode(rng, field, (num_items,)) for field in fields if field.side == "item"}
    return ItemStore(fields, arrays)


def make_windows(
    fields: tuple[FittedField, ...],
    rows: int = 3,
    length: int = 16,
    num_items: int = NUM_ITEMS,
    seed: int = 0,
    baskets: bool = False,
) -> Windows:
    """Random packed rows of up to three users each; the last row ends with pads.

    With baskets, targets are predicted from the last third position of their user, where there is one.
    """
    rng = np.random.default_rng(seed)
    shape = rows, length
    segment_RL = np.sort(rng.integers(0, 3, shape, dtype=np.int32), 1)
    item_RL = rng.integers(0, num_items, shape, dtype=np.int32)
    target_RL = rng.integers(0, num_items, shape, dtype=np.int32)
    target_RL[:, -1] = -1
    segment_RL[-1, -4:] = item_RL[-1, -4:] = target_RL[-1, -5:] = -1
    columns = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    third_RL = columns // 3 * 3
    own_RL = np.take_along_axis(segment_RL, third_RL, 1) == segment_RL
    return Windows(
        item_RL=item_RL,
        target_RL=target_RL,
        segment_RL=segment_RL,
        query_RL=np.where(own_RL & baskets, third_RL, columns),
        weight_RL=(target_RL >= 0).astype(np.float32),
        later_RL=rng.random(shape) < 0.5,
        time_RL=rng.integers(1_600_000_000_000, 1_700_000_000_000, shape),
        gap_RL=rng.exponential(1e5, shape).astype(np.float32),
        context={field.name: encode(rng, field, shape) for field in fields if field.side == "context"},
    )


def join(groups: Sequence[Windows]) -> Windows:
    """The windows of groups, one group after the other."""
    first = groups[0]
    rows = {
        field.name: np.concatenate([getattr(group, field.name) for group in groups])
        for field in dataclasses.fields(Windows)
        if field.name not in ("context", "counted")
    }
    context = {name: np.concatenate([group.context[name] for group in groups]) for name in first.context}
    counted = None
    if first.counted is not None:
        of_groups = [group.counted for group in groups if group.counted is not None]
        counted = Counted(*(np.concatenate([getattr(of, name) for of in of_groups]) for name in vars(first.counted)))
    return Windows(**rows, context=context, counted=counted)


def batch_of(
    groups: Sequence[Windows], group_indices: Sequence[int] | None = None, drawn: Sequence[np.ndarray] | None = None
) -> ModelBatch:
    """A batch of whole groups, 0, 1, ... where no indices are given."""
    sizes = [len(group.item_RL) for group in groups]
    return make_batch(join(groups), group_indices or range(len(groups)), drawn=drawn, group_windows=sizes)


def make_model(
    params: float = 6e3,
    share: float = 0.0,
    fields: tuple[FittedField, ...] = PLAIN_FIELDS,
    *,
    shape: Shape | None = None,
    d_item: int = 16,
    has_clock: bool = True,
    seed: int = 0,
) -> TwoPartModel:
    """A small model over random items."""
    shape = shape or size_model(params, share, d_item=d_item)
    return TwoPartModel(shape, fields, make_store(fields), has_clock, table_width=8, seed=seed)


def perturb(model: TwoPartModel, seed: int = 1) -> TwoPartModel:
    """Moves every weight, so that projections which start at zero carry something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


def contextualize(model: TwoPartModel, batch: ModelBatch) -> Queries:
    """Stage-1 queries of a batch."""
    return model.contextualize(batch, model.embed_items(batch.items_U))


def every_position(batch: ModelBatch) -> ModelBatch:
    """The batch with a query at every position, pads included."""
    positions = torch.arange(batch.item_RL.numel())
    places = query_places(positions.numpy(), batch.first_RL.numpy())
    groups = (dataclasses.replace(batch.groups[0], queries=len(positions)),)
    return dataclasses.replace(batch, places=places, query_T=positions, groups=groups)


def parts(queries: Queries, batch: ModelBatch | None = None) -> list[torch.Tensor]:
    """The tensors of queries: h, log gates and, where there is one, the pointer; with a batch that [Q, L]."""
    pointer = queries.pointer_A
    if pointer is not None and batch is not None:
        pointer = of_positions(pointer, batch)
    return [part for part in (queries.h_QD, queries.log_gate_TX1, pointer) if part is not None]


def of_positions(value_A: torch.Tensor, batch: ModelBatch) -> torch.Tensor:
    """What belongs to pairs of a query and an event of its window, [Q, L]; 0 elsewhere."""
    pairs, length = batch.places.pairs, batch.item_RL.shape[1]
    dense_QL = value_A.new_zeros(len(pairs.length_Q), length)
    dense_QL[pairs.query_A, pairs.position_A % length] = value_A
    return dense_QL


def anything_of(queries: Queries) -> torch.Tensor:
    """A scalar in which every part counts."""
    return sum((part[..., ::2].sum() for part in parts(queries)), torch.zeros(()))
