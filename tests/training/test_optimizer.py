"""Parameter groups and the running average of weights."""

import numpy as np
import pytest
import torch
from torch import nn

from bfm.training.config import TrainConfig
from bfm.training.optimizer import (
    AVERAGE,
    LARGEST_DECAY,
    LEAST_MOMENT,
    MOMENTS,
    average_weight,
    build_optimizer,
    parameter_groups,
    set_rates,
)
from tests.training.common import STAGE_1, train


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(7, 3, generator=generator))
        self.matrix = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.scalar = nn.Parameter(torch.ones(1))

    def parameter_kinds(self):
        return {"table": "tables", "matrix": "dense", "scalar": "free"}


@pytest.mark.parametrize(("repeats", "decay"), [(0.0, 0.0), (2.5, 0.5)])
def test_matrices_decay_and_tables_as_events_repeat_at_their_own_rate(repeats, decay):
    model = Tiny()
    config = TrainConfig(params=1e3, weight_decay=0.3, table_weight_decay=0.2, table_learning_rate_ratio=4.0)
    optimizer = build_optimizer(parameter_groups(model, config), config)
    set_rates(optimizer, 0.01, repeats)
    found = {tuple(group["params"][0].shape): (group["weight_decay"], group["lr"]) for group in optimizer.param_groups}
    assert found == {(3, 4): (0.3, 0.01), (7, 3): (decay, 0.04), (1,): (0.0, 0.01)}


def test_no_step_takes_more_than_its_share_of_a_table():
    """However often events repeat; unbounded, a step would take more than all of it."""
    optimizer = build_optimizer(
        parameter_groups(Tiny(), TrainConfig(params=1e3, table_weight_decay=1.0)),
        TrainConfig(params=1e3, table_weight_decay=1.0),
    )
    for learning_rate in (8e-3, 8e-5, 0.0):
        set_rates(optimizer, learning_rate, 1e4)
        lost = {
            tuple(group["params"][0].shape): group["weight_decay"] * group["lr"] for group in optimizer.param_groups
        }
        assert lost[7, 3] == pytest.approx(min(LARGEST_DECAY, 1e4 * learning_rate))


def test_frozen_parameters_are_left_out():
    model = Tiny()
    model.table.requires_grad_(False)
    optimizer = build_optimizer(parameter_groups(model, TrainConfig(params=1e3)), TrainConfig(params=1e3))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_average_is_the_polynomial_average():
    """avg_T = sum_t w_t * weight_t with weights from the product form of the recursion."""
    model = Tiny()
    optimizer = build_optimizer(parameter_groups(model, TrainConfig(params=1e3)), TrainConfig(params=1e3))
    optimizer.start_state(model.parameters(), averaging=True)
    seen = []
    for step in range(1, 21):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, float(step % 3 - 1 + number))
        optimizer.average_weight = average_weight(step)
        optimizer.step()
        seen.append(model.matrix.detach().double().numpy().copy())
    kept = [1 - average_weight(step) for step in range(1, 21)]
    shares = np.array([average_weight(step) * np.prod(kept[step:]) for step in range(1, 21)])
    assert shares.sum() == pytest.approx(1.0)
    expected = np.tensordot(shares, np.array(seen), axes=1)
    np.testing.assert_allclose(optimizer.state[model.matrix][AVERAGE].numpy(), expected, rtol=1e-5)
    before = optimizer.state[model.matrix][AVERAGE].clone()
    optimizer.average_weight = 0.0
    optimizer.step()
    assert torch.equal(optimizer.state[model.matrix][AVERAGE], before)


def test_moments_of_rows_that_no_step_touches_do_not_stay_denormal(toy_shards):
    """At 1e-38 and below a CPU is twenty times as slow; left alone they end at 5e-45 and never reach 0."""
    trainer, _ = train(STAGE_1, toy_shards, 0)
    engine, steps = trainer.engine, 1000
    for vector in engine.optimizer.state:
        vector.grad.normal_(0.0, 1e-2)
    for _ in range(steps):
        engine.step(1e-3, 0.0, 0.0)
    kept = torch.cat([state[key] for state in engine.optimizer.state.values() for key in MOMENTS]).abs()
    assert kept[kept > 0].min() > LEAST_MOMENT * 1e-4
    assert (torch.cat([state["exp_avg"] for state in engine.optimizer.state.values()]) == 0).all()
