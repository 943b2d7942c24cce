"""The spaces that come with the project: each resolves, and its laptop form is the same question at a smaller scale."""

from __future__ import annotations

from pathlib import Path

import pytest

from bfm.sweep.space.measured import AXES
from bfm.sweep.space.spec import from_dict, resolve
from bfm.training.config import TrainConfig
from bfm.yaml import load_yaml

SPACES = Path(__file__).parents[1] / "search_spaces"
NO_SPACE = "train"  # what `bfm train` reads; test_spec holds it to its schema
NAMES = sorted(path.stem for path in SPACES.glob("*.yaml") if path.stem != NO_SPACE)
AXIS_OF = {
    "allocation": "allocation",
    "embedder_share": "embedder_share",
    "critical_batch": "batch",
    "negatives": "negatives",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_space_is_named_as_its_file_and_resolves(name):
    spec = resolve(SPACES / f"{name}.yaml")
    assert spec.name == name
    assert from_dict(spec.as_dict()) == spec
    small = name == "quickstart" or name.endswith("_small")
    assert (spec.budget.ladder_flops[-1] <= 1e12) == small


@pytest.mark.parametrize("path", sorted((SPACES / "real").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_space_of_the_real_study_is_named_as_its_file_and_measures_its_axis(path):
    spec = resolve(path)
    assert spec.name == path.stem
    assert spec.axis == AXIS_OF.get(path.stem)
    assert {metric.name for metric in spec.metrics} == {"nll", "recall@10", "ndcg@10", "mrr@10"}


@pytest.mark.parametrize(("name", "axis"), AXIS_OF.items())
def test_the_space_of_an_axis_has_a_laptop_form(name, axis):
    whole, small = (resolve(SPACES / f"{name}{suffix}.yaml") for suffix in ("", "_small"))
    assert whole.axis == small.axis == axis
    assert len(whole.budget.ladder_flops) >= 3
    assert len(small.budget.ladder_flops) >= 3
    # The rate by the rule: one that is fitted to each point would hide what the axis does.
    for spec in (whole, small):
        assert "learning_rate" not in {parameter.name for parameter in spec.parameters}
        assert {metric.name for metric in spec.metrics} == {"nll", "recall@10", "ndcg@10", "mrr@10"}


def test_the_whole_study_varies_all_axes_at_once():
    for name in ("full_study", "full_study_small"):
        assert set(AXES.values()) <= {parameter.name for parameter in resolve(SPACES / f"{name}.yaml").free_parameters}


@pytest.mark.parametrize(
    ("space", "name"),
    [("negatives", "negatives"), ("negatives_small", "negatives_small"), ("real/negatives", "real_negatives")],
)
def test_stage_1_of_a_study_of_negatives_is_the_configuration_of_its_space(space, name):
    spec = resolve(SPACES / f"{space}.yaml")
    fixed = {parameter.name: parameter.values[0] for parameter in spec.parameters if parameter.name != "negatives"}
    assert TrainConfig.from_dict(load_yaml(SPACES / "stage1" / f"{name}.yaml")) == TrainConfig.from_dict(fixed)
    assert spec.stage1 is not None
