"""Nominal costs against what the trainer counts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bfm.objective.sampling import Proposal, drawn_inclusion
from bfm.sweep.space.costs import Costs, union_mean
from bfm.sweep.space.tiers import Tier
from bfm.training.data import TrainingData
from bfm.training.engine import EngineFactory
from bfm.training.loop import Trainer
from bfm.training.task import PROBE_QUERIES
from tests.training.common import STAGE_1


@pytest.mark.parametrize(("negatives", "exponent"), [(0, 0.0), (12, 0.0), (12, 1.0)])
def test_a_step_costs_about_what_is_planned(toy_shards, negatives, exponent):
    data = TrainingData.of(toy_shards)
    config = dataclasses.replace(STAGE_1, live_negatives=negatives, live_exponent=exponent)
    planned = Costs.on(toy_shards, data.protocol, None).of(config)
    trainer = Trainer(config, 0, data, EngineFactory())
    trainer.run_trunk(20 * planned.step_flops)
    counted = trainer.counters.path_flops / trainer.counters.step
    assert counted == pytest.approx(planned.step_flops, rel=0.05)


def test_a_probe_costs_its_own_queries_however_many_a_row_has(toy_shards):
    protocol = TrainingData.of(toy_shards).protocol
    few, whole = (Costs.on(toy_shards, protocol, queries).of(STAGE_1) for queries in (5, None))
    assert few.evaluation_flops < whole.evaluation_flops
    assert few.probe_flops == whole.probe_flops
    assert len(protocol.queries("validation").position) <= PROBE_QUERIES
    assert whole.probe_flops == whole.evaluation_flops


def test_mean_of_a_union_of_popular_items_and_draws():
    rng = np.random.default_rng(0)
    counts_V = np.ceil(1000 / np.arange(1, 301))
    share_V = counts_V / counts_V.sum()
    pi_V = drawn_inclusion(counts_V.astype(np.int64), 60, 0.5)
    sizes, unions = [], []
    for _ in range(300):
        group = np.unique(rng.choice(300, 200, p=share_V))
        sizes.append(len(group))
        unions.append(len(np.union1d(group, Proposal.of(pi_V).draw(rng))))
    assert union_mean(float(np.mean(sizes)), counts_V, pi_V) == pytest.approx(np.mean(unions), rel=0.01)


def test_memory_does_not_grow_with_the_scores_of_many_negatives(toy_shards):
    costs = Costs.on(toy_shards, TrainingData.of(toy_shards).protocol, None)
    stage_2 = {"window": 64, "group_windows": 64, "freeze_at_flops": 1e9}
    few, many = (
        costs.of(dataclasses.replace(STAGE_1, **stage_2, negatives=negatives)) for negatives in (1 << 14, 1 << 21)
    )
    assert many.memory_bytes(Tier(), 1, False) == few.memory_bytes(Tier(), 1, False)
    reference = Tier(softmax="reference")
    scores = many.group_scores - few.group_scores
    assert many.memory_bytes(reference, 1, False) - few.memory_bytes(reference, 1, False) == pytest.approx(12 * scores)


def test_memory_grows_with_tables_and_with_the_ids_of_bags(toy_shards):
    costs = Costs.on(toy_shards, TrainingData.of(toy_shards).protocol, None)
    config = dataclasses.replace(STAGE_1, live_negatives=0)

    def cost(**changes):
        fields = tuple(dataclasses.replace(f, **changes.get(f.name, {})) for f in costs.fields)
        return dataclasses.replace(costs, fields=fields).of(config)

    plain, wide, long = cost(), cost(item_id={"rows": 1 << 20}), cost(tags={"columns": 64})
    more = ((1 << 20) - 1024) * config.table_width
    assert wide.table_params - plain.table_params == wide.state_params - plain.state_params == more
    assert wide.memory_bytes(Tier(), 1, False) - plain.memory_bytes(Tier(), 1, False) == 16 * more
    tags = next(field for field in costs.fields if field.name == "tags")
    items = costs.groups(config.window, config.group_windows).distinct_items_mean
    added = 2 * 4 * (64 - tags.columns) * config.table_width * items
    assert long.memory_bytes(Tier(), 1, False) - plain.memory_bytes(Tier(), 1, False) == pytest.approx(added, abs=2)


def test_a_shared_catalogue_is_divided_among_workers_beside_activations(toy_shards):
    costs = Costs.on(toy_shards, TrainingData.of(toy_shards).protocol, None)
    cost = costs.of(dataclasses.replace(STAGE_1, freeze_at_flops=1e9, negatives=64))
    cost = dataclasses.replace(cost, catalogue_bytes=1 << 20, group_bytes=1 << 30)

    def estimate(method: str) -> int:
        return cost.memory_bytes(Tier(engine="deepspeed", workers=4, softmax=method), 1, False)

    assert estimate("auto") - estimate("sharded") == 3 << 18
    # Evaluation holds all of it on every worker.
    small = dataclasses.replace(cost, group_bytes=0, group_scores=0)
    state = dataclasses.replace(small, catalogue_bytes=0).memory_bytes(Tier(), 1, False)
    assert small.memory_bytes(Tier(engine="deepspeed", workers=4, softmax="sharded"), 1, False) == state + (1 << 20)
