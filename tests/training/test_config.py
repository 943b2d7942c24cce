"""TrainConfig: strict input, a stable identity."""

import dataclasses

import pytest

from bfm.errors import UserError
from bfm.training.config import TrainConfig


def test_round_trip_keeps_identity():
    config = TrainConfig.from_dict({"params": "1e5", "groups_per_step": "4", "freeze_at_flops": "2e9", "negatives": 64})
    again = TrainConfig.from_dict(config.as_dict())
    assert again == config
    assert again.fingerprint == config.fingerprint
    assert config.params == 1e5
    assert config.groups_per_step == 4


def test_number_types_do_not_change_identity():
    assert TrainConfig(params=10_000).fingerprint == TrainConfig(params=1e4).fingerprint


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(TrainConfig)])
def test_identity_depends_on_every_field(field):
    stage_2 = {"freeze_at_flops": 1e9, "negatives": 8}
    base = TrainConfig(params=1e5, counts="neighbours", depth=1, embedder_depth=1, warmup_events=10, **stage_2)
    value = getattr(base, field)
    other = {"copy": "none", "counts": "none", "targets": "next_event"}.get(field)
    if other is not None:
        assert dataclasses.replace(base, **{field: other}).fingerprint != base.fingerprint
        return
    other = (not value) if isinstance(value, bool) else (value or 0.2) * 0.5 if isinstance(value, float) else value + 2
    assert dataclasses.replace(base, **{field: other}).fingerprint != base.fingerprint


@pytest.mark.parametrize(
    ("values", "key", "words"),
    [
        ({}, "params", "missing"),
        ({"params": 1e4, "learning_rat": 1}, "learning_rat", "did you mean `learning_rate`"),
        ({"params": "nan"}, "params", "not a number"),
        ({"params": float("nan")}, "params", "not finite"),
        ({"params": float("inf")}, "params", "not finite"),
        ({"params": -1}, "params", "out of range"),
        ({"params": True}, "params", "expected a number"),
        ({"params": 1e4, "embedder_share": 0.51}, "embedder_share", "<= 0.5"),
        ({"params": 1e4, "embedder_share": -0.1}, "embedder_share", ">= 0"),
        ({"params": 1e4, "learning_rate": -1}, "learning_rate", ">= 0"),
        ({"params": 1e4, "groups_per_step": 0}, "groups_per_step", "from 1"),
        ({"params": 1e4, "counts_share": 0.2}, "counts_share", "nothing is counted"),
        ({"params": 1e4, "groups_per_step": 1.5}, "groups_per_step", "whole number"),
        ({"params": 1e4, "copy": "paste"}, "copy", "write pointer or none"),
        ({"params": 1e4, "window": 1}, "window", "from 2"),
        ({"params": 1e4, "d_item": 33}, "d_item", "even"),
        ({"params": 1e4, "aspect": 0}, "aspect", "> 0"),
        ({"params": 1e4, "depth": 0}, "depth", "from 1"),
        ({"params": 1e4, "embedder_depth": -1}, "embedder_depth", "from 0"),
        ({"params": 1e4, "cooldown_fraction": 1.0}, "cooldown_fraction", "< 1"),
        ({"params": 1e4, "beta2": 1.0}, "beta2", "< 1"),
        ({"params": 1e4, "freeze_at_flops": 0, "negatives": 1}, "freeze_at_flops", "> 0"),
        ({"params": 1e4, "averaging": 1}, "averaging", "true or false"),
        ({"params": 1e4, "group_windows": 1}, "group_windows", "live_negatives"),
        (
            {"params": 1e4, "group_windows": 1, "live_negatives": 9, "freeze_at_flops": 1e9},
            "group_windows",
            "`negatives`",
        ),
        ({"params": 1e4, "negatives": 8}, "negatives", "stage 2"),
    ],
)
def test_bad_input_names_file_and_key(values, key, words):
    with pytest.raises(UserError) as caught:
        TrainConfig.from_dict(values, file="trial.yaml")
    assert caught.value.key == key
    assert words in str(caught.value)
    assert str(caught.value).startswith("trial.yaml: ")
