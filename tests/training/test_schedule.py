"""Learning-rate factors and the feasibility of rungs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bfm.errors import InfeasibleError
from bfm.training.config import TrainConfig
from bfm.training.schedule import (
    check_rung,
    lr_factor_cooldown,
    lr_factor_trunk,
    repeats,
    rule_learning_rate,
    trunk_flops,
)


def test_warmup_is_linear_then_constant():
    assert [lr_factor_trunk(events, 1000) for events in (1, 500, 1000, 10**12)] == [0.001, 0.5, 1.0, 1.0]
    assert lr_factor_trunk(1, 0) == 1.0


def test_events_repeat_after_the_first_epoch():
    assert [repeats(events, 200) for events in (0, 199, 200, 300, 1000)] == [0.0, 0.0, 0.0, 0.5, 4.0]


def test_cooldown_falls_linearly_to_zero():
    factors = [lr_factor_cooldown(path, 800, 1000) for path in (800, 850, 900, 1000, 1100)]
    assert factors == [1.0, 0.75, 0.5, 0.0, 0.0]


@given(st.integers(1, 10**18), st.floats(0, 0.99))
def test_trunk_ends_inside_its_rung(rung_flops, fraction):
    assert 0 < trunk_flops(rung_flops, fraction) <= rung_flops


def test_steps_of_a_feasible_rung():
    assert check_rung(1e9, step_flops=1e6, cooldown_fraction=0.2) == 1000
    two = check_rung(
        1e9,
        step_flops=2e6,
        cooldown_fraction=0.2,
        freeze_at_flops=2e8,
        catalogue_flops=1e8,
        stage2_step_flops=1e6,
    )
    assert two == 100 + 700


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step_flops": 1.1e7}, "at least 100"),
        ({"freeze_at_flops": 7.5e8, "stage2_step_flops": 1e6, "catalogue_flops": 1e8}, "stage 2 begins"),
        ({"freeze_at_flops": 9e8, "stage2_step_flops": 1e6}, "stage 2 begins"),
        ({"freeze_at_flops": 1e8, "stage2_step_flops": 2e7}, "at least 100"),
    ],
)
def test_infeasible_rungs_name_the_bound(changes, words):
    with pytest.raises(InfeasibleError, match=words):
        check_rung(1e9, **{"step_flops": 1e6, "cooldown_fraction": 0.2, **changes})


def test_the_rule_gives_the_rate_that_is_left_open():
    config = TrainConfig(params=2e5, groups_per_step=2, group_windows=8, window=64)
    assert config.learning_rate == rule_learning_rate(2e5, 1024)
    assert TrainConfig.from_dict(config.as_dict()) == config
    assert TrainConfig(params=2e5, learning_rate=1e-3).learning_rate == 1e-3
    assert rule_learning_rate(1e4, 1024) > rule_learning_rate(1e6, 1024)
    assert rule_learning_rate(1e4, 1024) < rule_learning_rate(1e4, 8192)
