"""TPE's draws are those of Optuna's own sampler, asked one by one with the same seeds."""

from __future__ import annotations

import math
import warnings

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from bfm.sweep.policies.tpe import coordinates, draws

AXES = {
    "aspect": FloatDistribution(16, 96, log=True),
    "kind": CategoricalDistribution(["a", None, 3]),
    "level": IntDistribution(0, 5),
    "other": CategoricalDistribution([True, False]),
    "params": FloatDistribution(1e5, 1e9, log=True),
    "share": FloatDistribution(-1.0, 2.0),
}


def asked(told, losses, running, goal, seed):
    """What a study proposes that knows these points."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction=goal)
    for point, loss in zip(told, losses, strict=True):
        study.add_trial(create_trial(value=loss, params=point, distributions=AXES))
    for point in running:
        study.add_trial(create_trial(state=TrialState.RUNNING, params=point, distributions=AXES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=10, multivariate=True, constant_liar=True
        )
    return study.ask(AXES).params


@pytest.mark.parametrize(("rows", "running", "goal"), [(10, 0, "minimize"), (40, 7, "minimize"), (260, 20, "maximize")])
def test_draws_are_those_of_optunas_sampler(rows, running, goal):
    rng = np.random.default_rng(rows)
    random = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=rows))
    told, others = ([random.ask(AXES).params for _ in range(count)] for count in (rows, running))
    # Ties and divergences among them.
    worst = math.inf if goal == "minimize" else -math.inf
    losses = [worst if rng.random() < 0.1 else float(rng.integers(6)) for _ in told]
    seeds = rng.integers(1 << 31, size=8).tolist()
    known_MX = np.array([coordinates(AXES, point) for point in told])
    running_MX = np.array([coordinates(AXES, point) for point in others]).reshape(-1, len(AXES))
    sign = 1.0 if goal == "minimize" else -1.0
    drawn = draws(AXES, known_MX, sign * np.array(losses), running_MX, seeds)
    for point, seed in zip(drawn, seeds, strict=True):
        expected = asked(told, losses, others, goal, seed)
        assert {name: point[name] for name in ("kind", "level", "other")} == {
            name: expected[name] for name in ("kind", "level", "other")
        }
        for name in ("aspect", "params", "share"):
            assert point[name] == pytest.approx(expected[name], rel=1e-6)
