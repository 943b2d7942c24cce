"""Counted neighbours as a component that is trained with the network: its loss, its resume, and that nothing leaks."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch

from bfm.events.neighbours import Neighbours
from bfm.events.shards import Shards
from bfm.events.windows import eval_windows
from bfm.files import Store
from bfm.objective.frozen import freeze_items
from bfm.objective.objective import Objective
from bfm.ranking.evaluate import evaluate
from bfm.ranking.metrics import summarise
from bfm.ranking.queries import answer
from bfm.training.checkpoint import load_checkpoint
from bfm.training.config import TrainConfig
from bfm.training.data import TrainingData
from tests.events.serial import prepare_serially
from tests.model.toys import batch_of, of_positions
from tests.training.common import STAGE_1, STAGE_2, assert_equal_states, losses, train

COUNTS = dataclasses.replace(STAGE_1, counts="neighbours")
RANDOM = """\
name: random
user: user
position: position
item: item
split: {by: leave_one_out}
"""


def noisy(model):
    """With noise on all weights: some begin at zero, and what they multiply would go untested."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for values in model.parameters():
            values += 0.2 * torch.randn(values.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("copy", ["pointer", "none"])
def test_the_loss_is_that_of_the_mixture(toy_shards, copy):
    """All items are drawn, so that the softmax is that of the catalogue."""
    config, data = dataclasses.replace(COUNTS, copy=copy), TrainingData.of(toy_shards)
    model, num_items = noisy(data.build_model(config, 0)), toy_shards.num_catalogue
    windows = data.order(config, 0).groups([2])
    batch = batch_of([windows])
    v_ID, scale = model.embed_all(), model.scale.item()
    with torch.no_grad():
        queries = model.contextualize(batch, v_ID[batch.items_U])
    pointer_QL = of_positions(queries.pointer_A, batch) if copy == "pointer" else None
    expected = []
    for row, (r, at) in enumerate(np.argwhere(windows.target_RL >= 0)):
        column, query = windows.query_RL[r, at], batch.query_T[row]
        target, gates = int(windows.target_RL[r, at]), queries.log_gate_TX1[row].exp().tolist()
        softmax = torch.softmax(scale * queries.h_QD[query] @ v_ID[:num_items].T, 0)
        p = gates[0] * softmax[target].item()
        own = [k for k in range(column + 1) if windows.segment_RL[r, k] == windows.segment_RL[r, column]]
        if copy == "pointer":
            p += gates[1] * sum(pointer_QL[query, k].item() for k in own if windows.item_RL[r, k] == target)
        share_M, item_M = windows.counted.share_RLM[r, at], windows.counted.item_RLM[r, at]
        assert [windows.item_RL[r, column - age] for age in np.flatnonzero(item_M >= 0)] == list(item_M[item_M >= 0])
        if not (item_M >= 0).any():
            assert gates[-1] == 0.0
        else:
            assert queries.counted_TM[row].sum().item() == pytest.approx(1.0, rel=1e-5)
            assert (queries.counted_TM[row].numpy()[item_M < 0] == 0).all()
            p += gates[-1] * float((queries.counted_TM[row].numpy() * share_M).sum())
        expected.append(-math.log(p))
    ones = np.ones(num_items, np.int64)
    items = freeze_items(model, torch.float32, "auto", 0, 1)
    objective = Objective(torch.zeros(num_items), ones, num_items, 0.0, 0, items=items)
    loss, _ = objective(model, objective.batch(windows, [0]))
    assert loss.item() == pytest.approx(np.average(expected, weights=batch.weight_T), rel=1e-5)


def test_every_weight_of_the_component_learns(toy_shards):
    trainer, _ = train(COUNTS, toy_shards, 2e7)
    fresh = TrainingData.of(toy_shards).build_model(COUNTS, 3).state_dict()
    learned = [name for name in fresh if ".neighbours." in name]
    assert len(learned) == 4
    weights = trainer.engine.export_state().weight
    for name in learned:
        assert not torch.equal(weights[name], fresh[name]), name
    shape, without = COUNTS.shape(), dataclasses.replace(COUNTS, counts="none").shape()
    assert shape.edge == without.edge + 2


def test_micro_batches_change_nothing(toy_shards):
    four, one = (train(COUNTS, toy_shards, 2e7, micro_groups=micro)[1] for micro in (4, 1))
    assert losses(four) == pytest.approx(losses(one), rel=1e-5)


def test_a_run_goes_on_where_it_was_and_enters_stage_2(toy_shards, tmp_path):
    config = dataclasses.replace(STAGE_2, counts="neighbours")
    whole, _ = train(config, toy_shards, 5e7)
    part, _ = train(config, toy_shards, 4e7)
    part.save(Store(tmp_path), "half")
    again, _ = train(config, toy_shards, 5e7, start=load_checkpoint(Store(tmp_path), "half"))
    assert again.counters.stage == 2
    assert_equal_states(whole.engine.export_state(), again.engine.export_state())


def test_a_given_share_is_mixed_into_a_network_that_was_trained_alone(toy_shards):
    share, without = 0.3, dataclasses.replace(COUNTS, copy="none", counts="none")
    config, data = dataclasses.replace(COUNTS, copy="none", counts_share=share), TrainingData.of(toy_shards)
    (mixed, mixed_steps), (alone, alone_steps) = (train(each, toy_shards, 2e7) for each in (config, without))
    assert losses(mixed_steps) == losses(alone_steps)
    assert mixed.engine.export_state().weight.keys() == alone.engine.export_state().weight.keys()

    table, num_items = data.protocol.queries("validation"), toy_shards.num_catalogue

    def probabilities(trainer):
        model = trainer.plain_model(trainer.engine.export_state().weight)
        v_ID, every = model.embed_all(), slice(0, len(table))
        answers = answer(model, v_ID, toy_shards, table, config.window, num_items)
        return answers.scores()(every)(slice(0, num_items)).softmax(1)

    neighbours = data.neighbours(config)
    windows = eval_windows(toy_shards, table, config.window, neighbours)
    last_QM = windows.windows.counted.item_RLM[windows.row, windows.column]
    assert (last_QM >= 0).any()
    for item_M, found_V, alone_V in zip(last_QM, probabilities(mixed), probabilities(alone), strict=True):
        ages, expected_V = np.flatnonzero(item_M >= 0), alone_V
        if len(ages):
            counted_V = 0.8**ages @ neighbours.shares(item_M[ages, None], np.arange(num_items)) / (0.8**ages).sum()
            expected_V = (1 - share) * alone_V + share * counted_V
        np.testing.assert_allclose(found_V, expected_V, rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------- leaks


@pytest.fixture(scope="module")
def random_shards(tmp_path_factory):
    """Independent uniform draws: nothing in a history says anything of the next item, and most pairs are seen once."""
    folder, rng = tmp_path_factory.mktemp("random"), np.random.default_rng(0)
    user, position = np.divmod(np.arange(150 * 60), 60)
    frame = pd.DataFrame({"user": user, "position": position, "item": rng.integers(0, 300, len(user))})
    frame.to_parquet(folder / "log.parquet")
    (folder / "random.yaml").write_text(RANDOM)
    prepare_serially(folder / "random.yaml", [folder / "log.parquet"], folder / "shards")
    return Shards.open(folder / "shards")


def learned(shards, counts):
    """Validation nll after some epochs, and the mean gate of the neighbours."""
    config = TrainConfig(
        params=2000, learning_rate=1e-2, window=30, group_windows=8, d_item=8, copy="none", counts=counts
    )
    trainer, _ = train(config, shards, 1.2e9)
    model = trainer.plain_model(trainer.engine.export_state().weight)
    data = TrainingData.of(shards)
    nll = summarise(evaluate(model, shards, data.protocol, "validation", config.window)).metrics["nll"]
    batch = batch_of([data.order(config, 0).groups([0])])
    with torch.no_grad():
        gates = model.contextualize(batch, model.embed_items(batch.items_U)).log_gate_TX1.exp()
    return nll, gates[:, -1].mean().item()


def test_counting_leaves_the_targets_own_event_out(random_shards, monkeypatch):
    alone, _ = learned(random_shards, "none")
    nll, gate = learned(random_shards, "neighbours")

    def leaking(table, target_T, last_TM, around_TJ, counted_T):
        return table.known(last_TM), table.shares(last_TM, target_T[:, None])

    monkeypatch.setattr(Neighbours, "left_out", leaking)
    leaking_nll, leaking_gate = learned(random_shards, "neighbours")
    assert gate < 0.1
    assert nll < alone + 0.02
    assert leaking_gate > 0.5
    assert leaking_nll > alone + 0.1
