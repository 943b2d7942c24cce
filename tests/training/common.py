"""Small runs that several tests share."""

from __future__ import annotations

import dataclasses

import torch

from bfm.training.config import TrainConfig
from bfm.training.data import TrainingData
from bfm.training.engine import EngineFactory, EngineState
from bfm.training.loop import Trainer
from bfm.training.records import StepRecord

STAGE_1 = TrainConfig(
    params=2000,
    embedder_share=0.1,
    learning_rate=3e-3,
    window=16,
    group_windows=2,
    groups_per_step=4,
    d_item=8,
    averaging=True,
    dropout=0.1,
    live_negatives=5,
)
STAGE_2 = dataclasses.replace(STAGE_1, freeze_at_flops=3e7, negatives=12, warmup_events=500.0)
CPU = EngineFactory(torch.device("cpu"))


def train(config, shards, until_flops, *, factory=CPU, start=None, cooldown_flops=None, **options):
    """A trainer that has run, and what its observer saw."""
    records: list[StepRecord] = []
    options = {"micro_groups": 4, **options}
    trainer = Trainer(config, 3, TrainingData.of(shards), factory, observer=records.append, start=start, **options)
    trainer.run_trunk(until_flops)
    if cooldown_flops is not None:
        trainer.run_cooldown(cooldown_flops)
    return trainer, records


def losses(records: list[StepRecord]) -> list[float]:
    return [record.loss for record in records]


def assert_equal_states(left: EngineState, right: EngineState) -> None:
    """Bit for bit."""
    assert left.steps == right.steps
    for part in ("weight", "moment1", "moment2", "average"):
        tensors, others = getattr(left, part), getattr(right, part)
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, others[name]), f"{part} of {name}"
