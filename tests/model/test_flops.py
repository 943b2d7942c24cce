"""Formula against torch's own counter, forward and backward, with unfused attention forced."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bfm.model import mixture, two_part
from bfm.model.batch import ModelBatch
from bfm.model.flops import ModelCost
from bfm.model.sizing import Shape, size_model
from bfm.model.two_part import TwoPartModel
from tests.model.toys import ALL_FIELDS, PLAIN_FIELDS, anything_of, batch_of, contextualize, make_model, make_windows

TABLE_WIDTH = 8
ATTENTION_HEAVY = Shape(d_item=8, width=8, depth=3, heads=2, hidden=8)
EMBEDDER_HEAVY = Shape(16, 16, 1, 1, 32, 0, "transformer", 32, 2, 2, 80)


def counted(call) -> int:
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        call()
    return counter.get_total_flops()


def head(model: TwoPartModel, h_QD: torch.Tensor, candidates_KD: torch.Tensor) -> torch.Tensor:
    return (model.scale * (h_QD @ candidates_KD.T)).logsumexp(-1).mean()


@pytest.fixture(autouse=True)
def _products_of_all_positions(monkeypatch):
    """The counter does not see those of pairs alone, which are no matrix product."""
    monkeypatch.setattr(mixture, "takes_pairs", lambda *counts: False)


def train_step(model: TwoPartModel, batch: ModelBatch, frozen_KD: torch.Tensor | None) -> None:
    """Forward and backward with a dense head per group: in-batch candidates, or `frozen_KD` drawn negatives."""
    if frozen_KD is None:
        v_UD = model.embed_items(batch.items_U)
    else:
        v_UD = torch.randn(len(batch.items_U), model.shape.d_item)
    queries = model.contextualize(batch, v_UD)
    loss = anything_of(queries)
    for group in range(len(batch.groups)):
        candidates = v_UD[batch.candidates_of(group)]
        h_QD = queries.h_QD[batch.queries_of(group)]
        loss = loss + head(model, h_QD, candidates if frozen_KD is None else frozen_KD)
    loss.backward()


@pytest.mark.parametrize("baskets", [True, False])
@pytest.mark.parametrize("pointer", [True, False])
@pytest.mark.parametrize(
    ("shape", "fields", "length", "stage", "negatives", "has_clock"),
    [
        pytest.param(ATTENTION_HEAVY, PLAIN_FIELDS, 128, 1, 0, True, id="attention-heavy"),
        pytest.param(EMBEDDER_HEAVY, PLAIN_FIELDS, 16, 1, 0, True, id="embedder-heavy-transformer"),
        pytest.param(size_model(6e3, 0.3, d_item=16), PLAIN_FIELDS, 16, 1, 0, False, id="mlp-no-clock"),
        pytest.param(size_model(4e3, 0.0, d_item=16), PLAIN_FIELDS, 16, 2, 5000, True, id="negatives-heavy-stage-2"),
        pytest.param(EMBEDDER_HEAVY, ALL_FIELDS, 32, 2, 64, True, id="stage-2-all-kinds"),
        pytest.param(size_model(2e4, 0.0, d_item=16), PLAIN_FIELDS, 32, 1, 0, True, id="share-0"),
        pytest.param(size_model(2e4, 0.1, d_item=16), ALL_FIELDS, 32, 1, 0, True, id="mlp-all-kinds"),
        pytest.param(EMBEDDER_HEAVY, ALL_FIELDS, 32, 1, 0, False, id="transformer-all-kinds"),
        pytest.param(size_model(3e3, 0.0, d_item=16), ALL_FIELDS[:1], 16, 1, 0, True, id="ids-only"),
    ],
)
def test_group_flops_equal_the_counter(shape, fields, length, stage, negatives, has_clock, pointer, baskets):
    shape = replace(shape, pointer_width=shape.d_item // 2 if pointer else 0)
    model = make_model(fields=fields, shape=shape, has_clock=has_clock)
    batch = batch_of([make_windows(fields, rows, length, seed=rows, baskets=baskets) for rows in (2, 3)])
    if stage == 2:
        model.freeze_embedder()
    frozen_KD = torch.randn(negatives, shape.d_item) if stage == 2 else None
    cost = ModelCost(shape, fields, TABLE_WIDTH, length, has_clock)
    formula = sum(
        cost.group_flops(stage, group.items, group.queries, negatives or group.candidates, group.windows)
        for group in batch.groups
    )
    assert all(group.queries < group.targets for group in batch.groups) or not baskets
    assert formula + cost.layout_flops(batch, packed=False) == counted(lambda: train_step(model, batch, frozen_KD))


def test_packed_windows_and_pairs_leave_out_what_a_mask_discards(monkeypatch):
    monkeypatch.setattr(mixture, "takes_pairs", lambda *counts: True)
    shape = size_model(1e4, 0.1, d_item=16, depth=2)
    groups = [make_windows(PLAIN_FIELDS, rows, 16, seed=rows, baskets=True) for rows in (2, 3)]
    batch, filled_RL = batch_of(groups), torch.cat([torch.from_numpy(group.segment_RL >= 0) for group in groups])
    cost, (rows, length) = ModelCost(shape, PLAIN_FIELDS, TABLE_WIDTH, 16, True), batch.item_RL.shape
    queries, positions = len(batch.places.position_Q), torch.arange(length)
    attended = int(((positions - batch.first_RL + 1) * filled_RL).sum())
    pointed = int((batch.places.column_Q - batch.places.first_Q + 1).sum())
    dense = 12 * shape.width * (rows * length**2 + queries * length) + 6 * shape.pointer_width * queries * length
    executed = 12 * shape.width * 2 * attended + 6 * shape.pointer_width * pointed
    assert cost.layout_flops(batch, packed=True) == executed - dense


def test_items_embedded_in_chunks_cost_their_forward_pass_twice(monkeypatch):
    model = make_model(2e4, 0.3, ALL_FIELDS)
    batch = batch_of([make_windows(ALL_FIELDS, rows=4)])
    cost = ModelCost(model.shape, ALL_FIELDS, TABLE_WIDTH, 16, True)
    (group,) = batch.groups
    formula = cost.group_flops(1, group.items, group.queries, group.candidates, group.windows)
    formula += cost.layout_flops(batch, packed=False)
    expected = {name: torch.empty(0) for name, _ in model.named_parameters()}
    for chunk in (1 << 14, 7):
        monkeypatch.setattr(two_part, "EMBED_CHUNK", chunk)
        model.zero_grad()
        again = cost.recomputed_flops(group.items, 0) if chunk == 7 else 0
        assert counted(lambda: train_step(model, batch, None)) == formula + again
        for name, parameter in model.named_parameters():
            if chunk == 7 and parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
            expected[name] = parameter.grad


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_catalogue_flops_equal_the_counter(share, monkeypatch):
    monkeypatch.setattr(two_part, "EMBED_CHUNK", 50)
    model = make_model(2e4, share, ALL_FIELDS)
    cost = ModelCost(model.shape, ALL_FIELDS, TABLE_WIDTH, 16, True)
    assert cost.catalogue_flops(model.item_store.num_items) == counted(lambda: model.embed_all())


@pytest.mark.parametrize("pointer", [True, False])
def test_eval_flops_equal_the_counter(pointer):
    model = make_model(fields=ALL_FIELDS, shape=size_model(2e4, 0.1, d_item=16, pointer=pointer))
    batch = batch_of([make_windows(ALL_FIELDS, rows=4)])
    catalogue_ID = model.embed_all()

    @torch.no_grad()
    def evaluate() -> None:
        h_QD = model.contextualize(batch, catalogue_ID[batch.items_U]).h_QD
        # A mixture's second pass over the catalogue knows the sum of the first.
        for _ in range(2 if pointer else 1):
            head(model, h_QD, catalogue_ID)

    cost = ModelCost(model.shape, ALL_FIELDS, TABLE_WIDTH, 16, True)
    formula = cost.eval_flops(4, len(batch.places.position_Q), len(catalogue_ID))
    assert formula + cost.layout_flops(batch, packed=False) // 3 == counted(evaluate)


def test_stem_and_table_params_are_what_the_model_has():
    for share in (0.0, 0.1, 0.5):
        model = make_model(2e4, share, ALL_FIELDS)
        cost = ModelCost(model.shape, ALL_FIELDS, TABLE_WIDTH, 16, True)
        tables = {name for name in model.parameter_kinds() if name.endswith("table")}
        sizes = {name: weight.numel() for name, weight in model.named_parameters()}
        assert cost.table_params == sum(size for name, size in sizes.items() if name in tables)
        # What remains besides N, tables, the biases of the pointer and the scale is the stem.
        biases = sum(size for name, size in sizes.items() if name.endswith("_bias"))
        assert sum(sizes.values()) == model.shape.params + cost.stem_params + cost.table_params + biases + 1


def test_useful_attention_counts_causal_pairs_inside_users():
    windows = make_windows(PLAIN_FIELDS, rows=3, length=16, baskets=True)
    batch = batch_of([windows])
    attended = [
        sum(windows.segment_RL[row, query] == windows.segment_RL[row, key] >= 0 for key in range(query + 1))
        for row in range(3)
        for query in range(16)
    ]
    (group,) = batch.groups
    assert group.attended_pairs == sum(attended)
    assert group.query_pairs == sum(attended[position] for position in batch.places.position_Q)
    cost = ModelCost(ATTENTION_HEAVY, PLAIN_FIELDS, TABLE_WIDTH, 16, True)
    assert cost.useful_attention_flops(1, 40, 100, 7) == 12 * (2 * 100 + 7) * 8


def test_contextualize_alone_spends_nothing_on_frozen_items():
    model = make_model(2e4, 0.3)
    model.freeze_embedder()
    anything_of(contextualize(model, batch_of([make_windows(PLAIN_FIELDS)]))).backward()
    assert all(weight.grad is None for weight in model.embedder.parameters())
