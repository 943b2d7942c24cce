from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from bfm.errors import UserError
from bfm.events.windows import Windows
from bfm.model import two_part
from bfm.model.batch import ModelBatch
from bfm.model.mixture import mixture_loss, target_mass
from bfm.model.sizing import Shape
from bfm.model.two_part import LARGEST_SCALE, ItemStore, TwoPartModel
from tests.model.toys import (
    ALL_FIELDS,
    CHANNEL,
    NUM_ITEMS,
    PLAIN_FIELDS,
    anything_of,
    batch_of,
    contextualize,
    every_position,
    make_model,
    make_store,
    make_windows,
    parts,
    perturb,
)

TRANSFORMER = Shape(16, 24, 2, 2, 40, 8, "transformer", 16, 2, 2, 24)
SHAPES = [
    pytest.param(Shape(16, 24, 2, 2, 40), id="no-pointer"),
    pytest.param(Shape(16, 24, 2, 2, 40, 8), id="share-0"),
    pytest.param(Shape(16, 24, 2, 2, 40, 8, "mlp", embedder_hidden=24), id="mlp"),
    pytest.param(TRANSFORMER, id="transformer"),
]


@pytest.fixture(params=SHAPES)
def model(request) -> TwoPartModel:
    return perturb(make_model(fields=ALL_FIELDS, shape=request.param))


def answers(model: TwoPartModel, windows: Windows) -> tuple[torch.Tensor, torch.Tensor]:
    """At every position: h and log gates, [R, L, X], and the pointer's probabilities, [R, L, L] (or [R, L, 0])."""
    batch = every_position(batch_of([windows]))
    h_ND, *others = parts(contextualize(model, batch), batch)
    pointer_NL = others[1] if len(others) > 1 else h_ND.new_zeros(len(h_ND), 0)
    length = windows.item_RL.shape[1]
    return torch.cat([h_ND, others[0]], 1).unflatten(0, (-1, length)), pointer_NL.unflatten(0, (-1, length))


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
    packed_RLX, packed_RLL = answers(model, windows)
    for segment in np.unique(windows.segment_RL[0]):
        columns = np.flatnonzero(windows.segment_RL[0] == segment)
        for length, at in ((16, 0), (16, 16 - len(columns)), (40, 11)):
            alone_RLX, alone_RLL = answers(model, cut(windows, 0, columns, length, at))
            inside = slice(at, at + len(columns))
            torch.testing.assert_close(alone_RLX[0, inside], packed_RLX[0, columns], atol=2e-5, rtol=1e-4)
            if model.shape.pointer_width:
                expected = packed_RLL[0][np.ix_(columns, columns)]
                torch.testing.assert_close(alone_RLL[0, inside, inside], expected, atol=2e-5, rtol=1e-4)


def test_later_events_and_other_users_change_nothing(model):
    windows = make_windows(ALL_FIELDS, rows=2, length=16, seed=3)
    before_RLX = torch.cat(answers(model, windows), -1)
    for column in (1, 7, 15):
        where = np.zeros((2, 16), bool)
        where[0, column] = True
        after_RLX = torch.cat(answers(model, replaced(windows, where, seed=5)), -1)
        mine = np.flatnonzero(windows.segment_RL[0] == windows.segment_RL[0, column])
        changed = {int(position) for position in mine if position >= column}
        for position in range(16):
            same = torch.allclose(after_RLX[0, position], before_RLX[0, position], atol=1e-6)
            assert same == (position not in changed)
        assert torch.equal(after_RLX[1], before_RLX[1])


def test_what_stands_at_pads_changes_nothing(model):
    windows = make_windows(ALL_FIELDS, rows=3, length=16, seed=3)
    pads = windows.segment_RL < 0
    assert pads.any()
    noisy = dataclasses.replace(replaced(windows, pads, seed=6), item_RL=windows.item_RL)
    before_RLX, after_RLX = (torch.cat(answers(model, either), -1) for either in (windows, noisy))
    torch.testing.assert_close(after_RLX[torch.from_numpy(~pads)], before_RLX[torch.from_numpy(~pads)])
    assert before_RLX.isfinite().all()


def test_item_vectors_do_not_depend_on_their_company(model, monkeypatch):
    monkeypatch.setattr(two_part, "EMBED_CHUNK", 50)
    everything_ID = model.embed_all()
    assert everything_ID.shape == (NUM_ITEMS, 16)
    torch.testing.assert_close(everything_ID.norm(dim=-1), torch.ones(NUM_ITEMS))
    for ids in ([5], [5, 5, 117], [119, 3, 5, 64, 1]):
        torch.testing.assert_close(model.embed_items(torch.tensor(ids)), everything_ID[ids])


def test_groups_of_a_batch_do_not_touch_each_other(model):
    first, second = make_windows(ALL_FIELDS, seed=1), make_windows(ALL_FIELDS, rows=2, seed=2)
    together = batch_of([first, second])
    both = parts(contextualize(model, together), together)
    for number, group in enumerate((first, second)):
        rows = together.queries_of(number)
        alone = batch_of([group])
        torch.testing.assert_close([part[rows] for part in both], parts(contextualize(model, alone), alone))


def test_stage_2_uses_constant_vectors_and_leaves_the_embedder_alone(model):
    batch = batch_of([make_windows(ALL_FIELDS)])
    live = contextualize(model, batch)
    catalogue_ID = model.embed_all()
    model.freeze_embedder()
    frozen = model.contextualize(batch, catalogue_ID[batch.items_U])
    torch.testing.assert_close(parts(frozen), parts(live))
    anything_of(frozen).backward()
    touched = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert not touched & set(model.embedder_parameter_names())
    assert touched == set(dict(model.named_parameters())) - set(model.embedder_parameter_names()) - {"scale_logit"}


def test_dropout_reaches_the_last_block_and_is_the_same_in_any_micro_batch():
    model = perturb(TwoPartModel(Shape(16, 24, 1, 2, 40, 8), PLAIN_FIELDS, make_store(PLAIN_FIELDS), True, 8, 0, 0.3))
    groups = [make_windows(PLAIN_FIELDS, rows=2, seed=seed, baskets=True) for seed in range(2)]
    calm = contextualize(model.eval(), batch_of(groups[:1])).h_QD
    model.train()
    together = batch_of(groups)
    both_QD = contextualize(model, together).h_QD
    for number, group in enumerate(groups):
        alone_QD = contextualize(model, batch_of([group], group_indices=[number])).h_QD
        torch.testing.assert_close(both_QD[together.queries_of(number)], alone_QD)
    assert not torch.allclose(both_QD[together.queries_of(0)], calm, atol=1e-3)
    rows = []
    model.contextualizer.blocks[-1].register_forward_pre_hook(lambda _, given: rows.append(given[3]))
    contextualize(model, together)
    assert rows[0] is not None


def test_every_weight_gets_a_gradient(model):
    # Of few items, so that targets stand in the histories.
    batch = batch_of([make_windows(ALL_FIELDS, num_items=8)])

    def objective(model: TwoPartModel, batch: ModelBatch) -> torch.Tensor:
        v_UD = model.embed_items(batch.items_U)
        queries = model.contextualize(batch, v_UD)
        loss_T = -model.scale * (queries.h_QD[batch.query_T] * v_UD[batch.target_index_T]).sum(-1)
        return mixture_loss(loss_T, queries.log_gate_TX1, target_mass(batch, queries)).mean()

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
    drawn = [name for name in first if first[name].any() and name != "scale_logit"]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_a_fresh_embedder_adds_nothing_to_the_path_of_share_0():
    base = make_model(fields=ALL_FIELDS, shape=Shape(16, 24, 2, 2, 40, 8))
    for residual in (("mlp", 0, 0, 0, 24), ("transformer", 16, 2, 2, 24)):
        nested = make_model(fields=ALL_FIELDS, shape=Shape(16, 24, 2, 2, 40, 8, *residual))
        torch.testing.assert_close(nested.embed_all(), base.embed_all())
        batch = batch_of([make_windows(ALL_FIELDS)])
        torch.testing.assert_close(parts(contextualize(nested, batch)), parts(contextualize(base, batch)))


def test_the_bit_later_is_seen_at_its_own_position(model):
    windows = make_windows(ALL_FIELDS)
    flipped = dataclasses.replace(windows, later_RL=~windows.later_RL)
    before_RLX, after_RLX = (answers(model, either)[0] for either in (windows, flipped))
    assert not torch.allclose(before_RLX[:, 0], after_RLX[:, 0], atol=1e-4)


def test_half_precision_is_near_single(model):
    batch = batch_of([make_windows(ALL_FIELDS)])
    v_UD, single = model.embed_items(batch.items_U), contextualize(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        half_UD = model.embed_items(batch.items_U)
        half = model.contextualize(batch, half_UD)
    assert {part.dtype for part in (half_UD, *parts(half), model.scale)} == {torch.float32}
    assert (half_UD * v_UD).sum(-1).min() > 0.99
    assert (half.h_QD * single.h_QD).sum(-1).min() > 0.99
    torch.testing.assert_close(parts(half)[1:], parts(single)[1:], atol=0.03, rtol=0.05)
    (anything_of(half) * model.scale).backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())


def test_the_gate_moves_mass_from_the_softmax_to_the_pointer():
    model = make_model()
    for bias in (0.0, 3.0):
        with torch.no_grad():
            model.contextualizer.pointer.gate_bias.fill_(bias)
            gate_TX1 = contextualize(model, batch_of([make_windows(PLAIN_FIELDS)])).log_gate_TX1.exp()
        share = 1 / (1 + math.exp(-bias))
        torch.testing.assert_close(gate_TX1, torch.tensor([1 - share, share]).expand_as(gate_TX1))


def test_the_scale_starts_at_its_value_and_is_bounded():
    model = make_model()
    assert model.scale.item() == pytest.approx(20.0)
    assert model.scale.shape == ()
    with torch.no_grad():
        model.scale_logit.fill_(5)
    assert 99 < model.scale.item() < LARGEST_SCALE
    # Near the bound the way back stays open.
    model.scale.backward()
    assert model.scale_logit.grad.item() > 0
    with torch.no_grad():
        model.scale_logit.fill_(50)
    assert model.scale.item() == pytest.approx(LARGEST_SCALE)


def test_checkpoints_hold_weights_only():
    model = make_model(fields=ALL_FIELDS)
    assert set(model.state_dict()) == set(dict(model.named_parameters()))
    assert not list(model.buffers())


def test_tables_are_named_apart_from_the_frozen_side():
    model = make_model(fields=ALL_FIELDS)
    kinds, parameters = model.parameter_kinds(), dict(model.named_parameters())
    assert [name for name in kinds if kinds[name] == "tables"] == ["embedder.fields.table", "context.fields.table"]
    assert kinds["context.later_table"] == "free"
    assert all(
        (parameters[name].dim() < 2) == (kinds[name] == "free") for name in kinds.keys() - {"context.later_table"}
    )
    assert "context.fields.table" not in model.embedder_parameter_names()
    assert "embedder.fields.table" in model.embedder_parameter_names()


def test_items_need_a_field_and_equal_lengths():
    with pytest.raises(UserError, match="no item field"):
        ItemStore((CHANNEL,), {})
    arrays = {field.name: np.zeros((4 if field.kind == "time" else 3, field.columns)) for field in ALL_FIELDS}
    with pytest.raises(ValueError, match="differ in length"):
        ItemStore(ALL_FIELDS, arrays)


@pytest.mark.parametrize("width", [16, 24])
def test_without_a_pointer_a_query_begins_at_the_item_of_its_event(width):
    batch = every_position(batch_of([make_windows(PLAIN_FIELDS)]))

    def begins_there(pointer_width: int) -> bool:
        model = make_model(shape=Shape(16, width, 2, 2, 40, pointer_width))
        model.contextualizer.context_inputs.weight.detach().zero_()
        own_ND = model.embed_items(batch.items_U)[batch.item_RL.flatten()[batch.places.position_Q]]
        return torch.allclose(contextualize(model, batch).h_QD, own_ND, atol=1e-5)

    assert begins_there(pointer_width=0)
    assert not begins_there(pointer_width=8)
