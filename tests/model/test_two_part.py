from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from bfm.errors import UserError
from bfm.events.windows import Windows
from bfm.model.batch import ModelBatch, make_batch
from bfm.model.sizing import Shape
from bfm.model.two_part import LARGEST_SCALE, ItemStore, TwoPartModel
from tests.model.toys import ALL_FIELDS, CHANNEL, NUM_ITEMS, contextualize, make_model, make_windows, perturb

SHAPES = [
    pytest.param(Shape(16, 24, 2, 2, 40), id="share-0"),
    pytest.param(Shape(16, 24, 2, 2, 40, "mlp", embedder_hidden=24), id="mlp"),
    pytest.param(Shape(16, 24, 2, 2, 40, "transformer", 16, 2, 2, 24), id="transformer"),
]
TRANSFORMER = Shape(16, 24, 2, 2, 40, "transformer", 16, 2, 2, 24)


@pytest.fixture(params=SHAPES)
def model(request) -> TwoPartModel:
    return perturb(make_model(fields=ALL_FIELDS, shape=request.param))


def every_position(batch: ModelBatch) -> ModelBatch:
    """The batch with all positions, pads included, as target rows."""
    return dataclasses.replace(batch, target_position_T=torch.arange(batch.item_RL.numel()))


def queries(model: TwoPartModel, windows: Windows) -> torch.Tensor:
    """h of every position, [R, L, D]."""
    h_ND = contextualize(model, every_position(make_batch([windows])))
    return h_ND.view(*windows.item_RL.shape, -1)


def replaced(windows: Windows, where: np.ndarray, seed: int) -> Windows:
    """Other events at the positions `where`; targets and segments stay."""
    other = make_windows(ALL_FIELDS, *windows.item_RL.shape, seed=seed)

    def mixed(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        return np.where(where.reshape(where.shape + (1,) * (old.ndim - 2)), new, old)

    names = ("item_RL", "later_RL", "time_RL", "gap_RL")
    arrays = {name: mixed(getattr(windows, name), getattr(other, name)) for name in names}
    context = {name: mixed(old, other.context[name]) for name, old in windows.context.items()}
    return dataclasses.replace(windows, **arrays, context=context)


def cut(windows: Windows, row: int, columns: np.ndarray, length: int, at: int) -> Windows:
    """Some positions of a row alone in a row of `length`, from column `at` on; pads around them."""
    item_RL = np.full((1, length), -1, np.int32)
    fresh = make_windows(ALL_FIELDS, 1, length, seed=99)
    fresh = dataclasses.replace(fresh, item_RL=item_RL, target_RL=item_RL.copy(), segment_RL=item_RL.copy())
    inside = slice(at, at + len(columns))
    for name in ("item_RL", "target_RL", "segment_RL", "later_RL", "time_RL", "gap_RL"):
        getattr(fresh, name)[0, inside] = getattr(windows, name)[row, columns]
    for name, values in fresh.context.items():
        values[0, inside] = windows.context[name][row, columns]
    return fresh


def test_a_user_does_not_depend_on_what_else_is_packed_in_the_row(model):
    windows = make_windows(ALL_FIELDS, rows=2, length=16, seed=3)
    packed_RLD = queries(model, windows)
    for segment in np.unique(windows.segment_RL[0]):
        columns = np.flatnonzero(windows.segment_RL[0] == segment)
        for length, at in ((16, 0), (16, 16 - len(columns)), (40, 11)):
            alone_RLD = queries(model, cut(windows, 0, columns, length, at))
            torch.testing.assert_close(
                alone_RLD[0, at : at + len(columns)], packed_RLD[0, columns], atol=2e-5, rtol=1e-4
            )


def test_later_events_and_other_users_change_nothing(model):
    windows = make_windows(ALL_FIELDS, rows=2, length=16, seed=3)
    before_RLD = queries(model, windows)
    for column in (1, 7, 15):
        where = np.zeros((2, 16), bool)
        where[0, column] = True
        after_RLD = queries(model, replaced(windows, where, seed=5))
        mine = np.flatnonzero(windows.segment_RL[0] == windows.segment_RL[0, column])
        changed = {int(position) for position in mine if position >= column}
        for position in range(16):
            same = torch.allclose(after_RLD[0, position], before_RLD[0, position], atol=1e-6)
            assert same == (position not in changed)
        assert torch.equal(after_RLD[1], before_RLD[1])


def test_what_stands_at_pads_changes_nothing(model):
    windows = make_windows(ALL_FIELDS, rows=3, length=16, seed=3)
    pads = windows.segment_RL < 0
    assert pads.any()
    noisy = dataclasses.replace(replaced(windows, pads, seed=6), item_RL=windows.item_RL)
    before_RLD, after_RLD = queries(model, windows), queries(model, noisy)
    torch.testing.assert_close(after_RLD[torch.from_numpy(~pads)], before_RLD[torch.from_numpy(~pads)])
    assert before_RLD.isfinite().all()


def test_item_vectors_do_not_depend_on_their_company(model):
    everything_ID = model.embed_all(chunk=50)
    assert everything_ID.shape == (NUM_ITEMS, 16)
    torch.testing.assert_close(everything_ID.norm(dim=-1), torch.ones(NUM_ITEMS))
    for ids in ([5], [5, 5, 117], [119, 3, 5, 64, 1]):
        torch.testing.assert_close(model.embed_items(torch.tensor(ids)), everything_ID[ids])


def test_groups_of_a_batch_do_not_touch_each_other(model):
    first, second = make_windows(ALL_FIELDS, seed=1), make_windows(ALL_FIELDS, rows=2, seed=2)
    together = make_batch([first, second])
    h_TD = contextualize(model, together)
    for number, group in enumerate((first, second)):
        rows = slice(*together.row_offset[number : number + 2])
        torch.testing.assert_close(h_TD[rows], contextualize(model, make_batch([group])))


def test_stage_2_uses_constant_vectors_and_leaves_the_embedder_alone(model):
    batch = make_batch([make_windows(ALL_FIELDS)])
    live_TD = contextualize(model, batch)
    catalogue_ID = model.embed_all()
    model.freeze_embedder()
    frozen_TD = model.contextualize(batch, catalogue_ID[batch.items_U])
    torch.testing.assert_close(frozen_TD, live_TD)
    frozen_TD[:, 0].sum().backward()
    touched = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert not touched & set(model.embedder_parameter_names())
    assert touched == set(dict(model.named_parameters())) - set(model.embedder_parameter_names()) - {"log_scale"}


def test_every_weight_gets_a_gradient(model):
    batch = make_batch([make_windows(ALL_FIELDS)])

    def objective(model: TwoPartModel, batch: ModelBatch) -> torch.Tensor:
        v_UD = model.embed_items(batch.items_U)
        h_TD = model.contextualize(batch, v_UD)
        return -(model.scale * (h_TD * v_UD[batch.target_index_T]).sum(-1)).mean()

    model(batch, objective).backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


def test_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    first = make_model(fields=ALL_FIELDS, shape=TRANSFORMER, seed=4).state_dict()
    state = torch.get_rng_state()
    again = make_model(fields=ALL_FIELDS, shape=TRANSFORMER, seed=4).state_dict()
    other = make_model(fields=ALL_FIELDS, shape=TRANSFORMER, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if first[name].any() and name != "log_scale"]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_a_fresh_embedder_adds_nothing_to_the_path_of_share_0():
    base = make_model(fields=ALL_FIELDS, shape=Shape(16, 24, 2, 2, 40))
    for residual in (("mlp", 0, 0, 0, 24), ("transformer", 16, 2, 2, 24)):
        nested = make_model(fields=ALL_FIELDS, shape=Shape(16, 24, 2, 2, 40, *residual))
        torch.testing.assert_close(nested.embed_all(), base.embed_all())
        batch = make_batch([make_windows(ALL_FIELDS)])
        torch.testing.assert_close(contextualize(nested, batch), contextualize(base, batch))


def test_the_bit_later_is_seen_at_its_own_position(model):
    windows = make_windows(ALL_FIELDS)
    flipped = dataclasses.replace(windows, later_RL=~windows.later_RL)
    assert not torch.allclose(queries(model, windows)[:, 0], queries(model, flipped)[:, 0], atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_near_single(model, autocast):
    batch = make_batch([make_windows(ALL_FIELDS)])
    v_UD, h_TD = model.embed_items(batch.items_U), contextualize(model, batch)
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            half_UD = model.embed_items(batch.items_U)
            half_TD = model.contextualize(batch, half_UD)
    else:
        model.bfloat16()
        half_UD = model.embed_items(batch.items_U)
        half_TD = model.contextualize(batch, half_UD)
    assert half_UD.dtype == half_TD.dtype == model.scale.dtype == torch.float32
    assert (half_UD * v_UD).sum(-1).min() > 0.99
    assert (half_TD * h_TD).sum(-1).min() > 0.99
    (half_TD[:, 0].sum() * model.scale).backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())


def test_the_scale_starts_at_its_value_and_is_bounded():
    model = make_model()
    assert model.scale.item() == pytest.approx(20.0)
    assert model.scale.shape == ()
    with torch.no_grad():
        model.log_scale.fill_(50)
    assert model.scale.item() == pytest.approx(LARGEST_SCALE)


def test_checkpoints_hold_weights_only():
    model = make_model(fields=ALL_FIELDS)
    assert set(model.state_dict()) == set(dict(model.named_parameters()))
    assert not list(model.buffers())


def test_tables_are_named_apart_from_the_frozen_side():
    model = make_model(fields=ALL_FIELDS)
    assert model.table_parameter_names() == ("embedder.fields.table", "context.later_table", "context.fields.table")
    assert "context.fields.table" not in model.embedder_parameter_names()
    assert "embedder.fields.table" in model.embedder_parameter_names()


def test_items_need_a_field_and_equal_lengths():
    with pytest.raises(UserError, match="no item field"):
        ItemStore((CHANNEL,), {})
    arrays = {field.name: np.zeros((4 if field.kind == "time" else 3, field.columns)) for field in ALL_FIELDS}
    with pytest.raises(ValueError, match="differ in length"):
        ItemStore(ALL_FIELDS, arrays)
