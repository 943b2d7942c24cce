from __future__ import annotations

import dataclasses
import datetime
import itertools
import math

import numpy as np
import pytest
import torch

from bfm.errors import UserError
from bfm.events.fields import FittedField
from bfm.model.fields import FieldEncoder, FieldLayout, PackedFields, clock_features, count_features, gap_features
from tests.model.toys import ALL_FIELDS, BRAND, COLORS, ID, LOOK, PRICE, TAGS, TITLE, WEIGHT, encode

ITEM_FIELDS = tuple(field for field in ALL_FIELDS if field.side == "item")


def signed_log(value: float) -> float:
    return math.copysign(math.log1p(abs(value)), value)


def expected_numeric(field: FittedField, value: float) -> list[float]:
    """Standardised value, zero flag, missing flag, then: below the first edge, ramps, at least the last edge."""
    if math.isnan(value):
        return [0.0, 0.0, 1.0] + [0.0] * (len(field.edges) + 1 if field.edges else 0)
    log = signed_log(value)
    edges = field.edges
    bins = [float(log < edges[0])] if edges else []
    bins += [min(max((log - low) / (high - low), 0), 1) for low, high in itertools.pairwise(edges)]
    bins += [float(log >= edges[-1])] if edges else []
    standard = min(max((log - field.mean) / field.std, -8), 8)
    return [standard, float(value == 0), 0.0, *bins]


def arrays_of(fields: tuple[FittedField, ...], rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return {field.name: torch.from_numpy(encode(rng, field, (rows,))) for field in fields}


def encoder_of(layout: FieldLayout) -> FieldEncoder:
    return FieldEncoder(layout, d_item=8, table_width=4, generator=torch.Generator().manual_seed(0))


def test_numbers_become_the_features_of_the_definition():
    free = FittedField("free", "item", "numeric", mean=-1.0, std=2.0)
    fields = (PRICE, WEIGHT, free)
    values = [math.nan, 0.0, -3.0, 0.2, 0.7, 1.3, 5.0, 20.0, 1e12, -1e12, 1e38]
    column = torch.tensor(values)
    layout = FieldLayout(fields)
    features_NX = layout.features(layout.pack({field.name: column for field in fields}, len(values)), None)
    assert features_NX is not None
    expected = [[part for field in fields for part in expected_numeric(field, value)] for value in values]
    np.testing.assert_allclose(features_NX.numpy(), np.array(expected), atol=1e-5)
    assert features_NX.shape[1] == sum(count_features(field) for field in fields)


def test_an_edge_itself_belongs_to_the_upper_side():
    layout = FieldLayout((dataclasses.replace(WEIGHT, edges=(math.log1p(3.0),)),))
    values = torch.tensor([2.999, 3.0, 3.001])
    features_NX = layout.features(layout.pack({"weight": values}, 3), None)
    assert features_NX is not None
    assert features_NX[:, 3].round(decimals=3).tolist() == [1, 0, 0]
    assert features_NX[:, 4].round(decimals=3).tolist() == [0, 1, 1]


def test_the_sum_of_tokens_is_the_pooled_form():
    layout = FieldLayout(ITEM_FIELDS)
    encoder = encoder_of(layout)
    packed = layout.pack(arrays_of(ITEM_FIELDS, 20), 20)
    features_NX = layout.features(packed, None)
    tokens_NFD = encoder(packed.ids_NS, features_NX, tokens=True)
    assert tokens_NFD.shape == (20, len(ITEM_FIELDS), 8)
    torch.testing.assert_close(tokens_NFD.sum(1), encoder(packed.ids_NS, features_NX), atol=1e-5, rtol=1e-5)


def test_each_table_field_is_looked_up_in_its_own_rows():
    fields = (ID, TITLE, BRAND, TAGS, COLORS)
    layout, arrays = FieldLayout(fields), arrays_of(fields, 30)
    encoder = encoder_of(layout)
    packed = layout.pack(arrays, 30)
    tokens_NFD = encoder(packed.ids_NS, None, tokens=True)
    for number, field in enumerate(layout.tables):
        table = encoder.table[layout.table_offsets[number] : layout.table_offsets[number + 1]]
        for row in range(30):
            ids = arrays[field.name][row].reshape(-1).tolist()
            if field.kind in ("text", "list"):
                ids = [value for value in ids if value]
                vector = table[ids].mean(0) if ids else torch.zeros(4)
            else:
                vector = table[ids].sum(0)
            torch.testing.assert_close(tokens_NFD[row, number], vector @ encoder.table_weight[number])


def test_an_empty_bag_is_a_zero_token_and_pads_get_no_gradient():
    layout = FieldLayout((TAGS,))
    encoder = encoder_of(layout)
    ids = torch.tensor([[0, 0, 0, 0], [3, 0, 0, 0], [3, 3, 5, 0]], dtype=torch.int32)
    tokens_NFD = encoder(layout.pack({"tags": ids}, 3).ids_NS, None, tokens=True)
    assert torch.equal(tokens_NFD[0], torch.zeros(1, 8))
    tokens_NFD.sum().backward()
    assert encoder.table.grad is not None
    assert encoder.table.grad.abs().sum(1).nonzero().flatten().tolist() == [3, 5]


def test_vectors_are_scale_free_and_missing_ones_zero():
    layout = FieldLayout((LOOK,))
    vectors = torch.tensor([[1.0, 2, 3, 4, 5], [100.0, 200, 300, 400, 500], [0, 0, 0, 0, 0]])
    features_NX = layout.features(layout.pack({"look": vectors}, 3), None)
    assert features_NX is not None
    torch.testing.assert_close(features_NX[0], features_NX[1])
    assert features_NX[0].square().mean() == pytest.approx(1, abs=1e-4)
    assert torch.equal(features_NX[2], torch.zeros(5))


def test_clock_features_follow_the_calendar():
    moments = [
        datetime.datetime(1969, 12, 31, 23, 0, tzinfo=datetime.UTC),
        datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC),
        datetime.datetime(2000, 2, 29, 12, 30, tzinfo=datetime.UTC),
        datetime.datetime(2100, 3, 1, 6, 0, tzinfo=datetime.UTC),
        datetime.datetime(2024, 12, 31, 18, 15, tzinfo=datetime.UTC),
    ]
    times = torch.tensor([round(moment.timestamp() * 1000) for moment in moments])
    features_N6 = clock_features(times)
    for row, moment in enumerate(moments):
        hour = (moment.hour + moment.minute / 60) / 24
        # 1970-01-01 was a Thursday, where the weeks of the epoch begin.
        weekday = ((moment.weekday() - 3) % 7 + hour) / 7
        phases = np.array([hour, weekday, (moment.day - 1) / 31]) * 2 * math.pi
        np.testing.assert_allclose(features_N6[row], np.concatenate([np.sin(phases), np.cos(phases)]), atol=1e-4)


def test_gap_features_grow_with_the_gap_and_stay_bounded():
    gaps = torch.tensor([0.0, 1.0, 60.0, 3600.0, 86400.0, 30 * 86400.0, 10 * 365 * 86400.0])
    features_N9 = gap_features(gaps)
    assert torch.equal(features_N9[0], torch.zeros(9))
    assert (features_N9.diff(dim=0)[:, 0] > 0).all()
    assert (features_N9.diff(dim=0) >= 0).all()
    assert features_N9.max() < 3
    torch.testing.assert_close(gap_features(-gaps)[:, 0], -features_N9[:, 0])


def test_context_times_are_relative_to_the_event_and_item_times_are_not():
    shipped = FittedField("shipped", "context", "time")
    layout = FieldLayout((shipped,))
    event_N = torch.tensor([1_700_000_000_000, 1_700_000_500_000])
    packed = layout.pack({"shipped": event_N - 90_000}, 2)
    features_NX = layout.features(packed, event_N)
    assert features_NX is not None
    assert features_NX.shape == (2, count_features(shipped))
    torch.testing.assert_close(features_NX[0, :9], features_NX[1, :9])
    released = FittedField("released", "item", "time")
    item_layout = FieldLayout((released,))
    year_2010 = torch.tensor([1_262_304_000_000])
    item_NX = item_layout.features(item_layout.pack({"released": year_2010}, 1), None)
    assert item_NX is not None
    assert item_NX.shape == (1, count_features(released))
    assert item_NX[0, 0] == pytest.approx(1.0, abs=1e-3)


def test_packing_keeps_leading_dimensions_flat_and_takes_rows():
    fields = (ID, PRICE, LOOK, BRAND)
    layout = FieldLayout(fields)
    rng = np.random.default_rng(0)
    arrays = {field.name: torch.from_numpy(encode(rng, field, (2, 3))) for field in fields}
    packed = layout.pack(arrays, 6)
    assert packed.ids_NS is not None
    assert packed.raw_NX is not None
    assert packed.time_NF is None
    assert (packed.ids_NS.shape, packed.raw_NX.shape) == ((6, 3), (6, 6))
    taken = packed.take(torch.tensor([4, 1]))
    assert taken.ids_NS is not None
    assert torch.equal(taken.ids_NS, packed.ids_NS[[4, 1]])
    assert isinstance(taken, PackedFields)


def test_an_unknown_kind_names_its_field():
    with pytest.raises(UserError, match="colour"):
        FieldLayout((dataclasses.replace(BRAND, name="colour", kind="hue"),))
