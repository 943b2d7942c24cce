"""The search-space file: what is read, and one clear line for every slip."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bfm.errors import UserError
from bfm.sweep.space.metric import METRICS, Constraint, Metric
from bfm.sweep.space.parameters import RANGES, Parameter
from bfm.sweep.space.settings import POLICIES, Scheduler
from bfm.sweep.space.spec import config_schema, from_dict, json_schema, resolve
from bfm.sweep.space.tiers import Tier
from bfm.sweep.space.words import CHOICES, KEYS, SPACE
from bfm.training.config import TrainConfig
from bfm.training.schedule import rule_learning_rate
from bfm.training.words import SETTINGS
from bfm.yaml import load_yaml
from tests.sweep.world import make_spec

SPACES = Path(__file__).parents[3] / "search_spaces"
QUICKSTART = SPACES / "quickstart.yaml"

GOOD = """
name: space
metric: {name: recall@10}
method: optuna
parameters:
  params: {distribution: log_uniform_values, min: 1e4, max: 1e6}
  learning_rate: {min: 1e-3, max: 1e-2}
  groups_per_step: {values: [1, 2, 4]}
  window: {value: 64}
budget:
  ladder_flops: [1e10, 4e10]
  total_flops: 1e12
data: {shards: somewhere}
"""


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(GOOD)
    return path


def test_numbers_may_be_written_as_people_write_them(good):
    spec = resolve(good, ["budget.total_flops=2T", "budget.max_trials=1k"])
    assert spec.budget.ladder_flops == (10_000_000_000, 40_000_000_000)
    assert spec.budget.total_flops == 2_000_000_000_000
    assert spec.budget.max_trials == 1000


def test_defaults_follow_wandb(good):
    spec = resolve(good)
    kinds = {parameter.name: parameter.distribution for parameter in spec.parameters}
    assert kinds["learning_rate"] == "uniform"
    assert kinds["groups_per_step"] == "categorical"
    assert kinds["window"] == "constant"
    assert resolve(good, ["parameters.groups_per_step={min: 1, max: 8}"]).parameters[0].distribution == "int_uniform"
    assert spec.metric.goal == "maximize"
    assert resolve(good, ["metric.name=nll"]).metric.goal == "minimize"


def test_a_value_is_judged_alone_and_stands_as_it_was_written(good):
    """What goes with what is judged on whole configurations: the rate that a rule sets is each configuration's own."""
    spec = resolve(good, ["parameters.group_windows={value: 1}", "parameters.learning_rate={value: 0}"])
    values = {parameter.name: parameter.values for parameter in spec.parameters}
    assert (values["group_windows"], values["learning_rate"]) == ((1,), (0.0,))


def test_the_resolved_form_is_a_space_again(good):
    spec = resolve(good, ["seeds=3", "probes=[1e9]", "parameters.depth={values: [null, 2]}"])
    again = from_dict(json.loads(json.dumps(spec.as_dict())))
    assert again == spec
    assert again.hash == spec.hash
    assert spec.seeds == (0, 1, 2)


def test_the_frontier_is_what_a_sweep_runs_by_unless_told(good):
    assert resolve(good).scheduler == Scheduler("frontier")
    for name in set(POLICIES) - {"random", "grid"}:
        assert resolve(good, [f"scheduler.type={name}"]).scheduler.type == name
    assert resolve(good, ["scheduler.type=random", "method=random"]).scheduler.type == "random"
    with pytest.raises(UserError, match="write method: grid"):
        resolve(good, ["scheduler.type=grid", "method=random"])


def test_further_metrics_and_constraints_are_read_and_written(good):
    spec = resolve(good, ["metric.others=[nll]", "metric.constraints=['recall@10>=0.05', nll <= 7.5]"])
    assert [(metric.name, metric.goal) for metric in spec.metrics] == [("recall@10", "maximize"), ("nll", "minimize")]
    assert [(c.metric.name, c.metric.goal, c.bound) for c in spec.metric.constraints] == [
        ("recall@10", "maximize", 0.05),
        ("nll", "minimize", 7.5),
    ]
    assert spec.as_dict()["metric"]["constraints"] == ["recall@10 >= 0.05", "nll <= 7.5"]
    again = from_dict(json.loads(json.dumps(spec.as_dict())))
    assert again == spec
    assert again.hash == spec.hash
    assert len({spec.hash, resolve(good).hash, resolve(good, ["metric.others=[nll]"]).hash}) == 3


@given(st.floats(1e-4, 1 - 1e-4), st.floats(1e-4, 1 - 1e-4))
def test_surrogates_see_metrics_in_order_and_users_see_them_back(low, high):
    for metric in (Metric("recall@10", "maximize"), Metric("nll", "minimize")):
        seen = [metric.to_model(metric.loss(value)) for value in (low, high)]
        assert metric.from_model(seen[0]) == pytest.approx(low)
        better = low > high if metric.goal == "maximize" else low < high
        if low == high or abs(low - high) > 1e-9:
            assert (seen[0] < seen[1]) == better
    bound = Constraint(Metric("recall@10", "maximize"), low)
    kept = bound.metric.to_model(bound.metric.loss(high)) <= bound.loss_bound
    # Nearer than rounding either answer is right.
    if low == high or abs(low - high) > 1e-9:
        assert kept == bound.holds(high)


def test_a_metric_at_its_end_has_a_finite_place():
    metric = Metric("recall@10", "maximize")
    ends = [metric.to_model(metric.loss(value)) for value in (0.0, 1.0)]
    assert np.isfinite(ends).all()
    assert ends[0] > ends[1]


def test_the_order_of_keys_means_nothing(good):
    lines = GOOD.strip().splitlines()
    swapped = (
        "\n".join([*lines[2:3], *lines[:2], *lines[3:]])
        .replace("  window: {value: 64}\n", "")
        .replace("parameters:\n", "parameters:\n  window: {value: 64}\n")
    )
    good.with_name("swapped.yaml").write_text(swapped)
    assert resolve(good.with_name("swapped.yaml")).hash == resolve(good).hash


def test_every_change_changes_the_hash(good):
    changes = [
        "name=other",
        "metric.name=nll",
        "budget.total_flops=2e12",
        "seeds=[1]",
        "data.shards=x",
        "method=random",
    ]
    hashes = {resolve(good, [change]).hash for change in changes} | {resolve(good).hash}
    assert len(hashes) == len(changes) + 1


def test_the_quickstart_is_valid_and_fits_the_schema():
    spec = resolve(QUICKSTART)
    assert len(spec.budget.ladder_flops) >= 3
    top = spec.tiers_at(spec.budget.ladder_flops[-1], 1e4)[0]
    assert (top.engine, top.workers) == ("deepspeed", 2)
    jsonschema.validate(load_yaml(QUICKSTART), json_schema())


def test_the_schema_refuses_unknown_keys():
    values = load_yaml(QUICKSTART)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**values, "bugdet": {}}, json_schema())


SLIPS = {
    "bugdet.total_flops=1": ("bugdet", "did you mean 'budget'"),
    "budget.total_flop=1": ("budget.total_flop", "did you mean 'total_flops'"),
    "metric.name=recal@10": ("metric.name", "did you mean 'recall@10'"),
    "metric.name=recall@50": ("metric.name", "unknown metric"),
    "metric.goal=minimize": ("metric.goal", "to be maximized"),
    "metric=nll": ("metric", "'nll'"),
    "method=bayes": ("method", "write `method: optuna` (TPE), random or grid"),
    "method=optna": ("method", "'optna' is no choice; did you mean 'optuna'?"),
    "early_terminate={type: hyperband}": ("early_terminate", "write `scheduler: {type: frontier}`"),
    "num_samples=20": ("num_samples", "write `budget.max_trials`"),
    "budget.num_samples=20": ("budget.num_samples", "write `budget.max_trials`"),
    "max_concurrent=4": ("max_concurrent", "write `scaling.slots`"),
    "scaling.max_concurrent=4": ("scaling.max_concurrent", "write `scaling.slots`"),
    "parameters.lr={value: 1e-3}": ("parameters.lr", "write `learning_rate`"),
    "parameters.batch_size={value: 256}": ("parameters.batch_size", "write `groups_per_step`"),
    "parameters.params={min: 3e4, max: 4e4, log: true}": ("parameters.params.log", "log_uniform_values"),
    "metric.name=val_loss": ("metric.name", "write nll"),
    "parameters.learning_rate={values: [0, 1e-3]}": ("parameters.learning_rate", "write value: 0 for the rule"),
    "parameters.learning_rate={min: 0, max: 1e-3}": ("parameters.learning_rate", "write value: 0 for the rule"),
    "name='a/b'": ("name", "cannot name a folder"),
    "budget.total_flops=true": ("budget.total_flops", "True"),
    "budget.total_flops=1e17 events": ("budget.total_flops", "'1e17 events' is not a number"),
    "budget.total_flops=3h": ("budget.total_flops", "'3h'"),
    "budget.total_flops=.nan": ("budget.total_flops", "not finite"),
    "budget.total_flops=-1": ("budget.total_flops", "too small"),
    "budget.total_flops=1.5": ("budget.total_flops", "1.5 is not a whole number"),
    "budget.total_flops=1e10": ("budget.total_flops", "cannot pay for one trial up to the top"),
    "budget.max_trials=0": ("budget.max_trials", "at least 1"),
    "budget.tolerance=0.05": ("budget.tolerance", "0.05 is out of range"),
    "budget.tolerance=0": ("budget.tolerance", "0 is out of range"),
    "budget.ladder_flops=[]": ("budget.ladder_flops", "no rungs"),
    "budget.ladder_flops=[4e10, 1e10]": ("budget.ladder_flops", "not strictly increasing"),
    "budget.ladder_flops=[1e10, 1e10]": ("budget.ladder_flops", "strictly increasing"),
    "budget.ladder_flops=[0, 1e10]": ("budget.ladder_flops", "needs FLOPs"),
    "budget.ladder_flops=[10, 1e10]": ("budget.ladder_flops", "100 steps"),
    "budget.ladder_flops=1e10": ("budget.ladder_flops", "list"),
    "budget.ladder_flops=[1e10, many]": ("budget.ladder_flops.1", "'many' is not a number"),
    "budget.events_per_param=[5, 1]": ("budget.events_per_param", "no range"),
    "budget.max_epochs=0": ("budget.max_epochs", "above 0"),
    "scheduler.eta=1": ("scheduler.eta", "promotes everything"),
    "scheduler.eta=0.5": ("scheduler.eta", "0.5"),
    "scheduler.type=asha": ("scheduler.type", "write asha-promote or asha-stop"),
    "scheduler.type=front": ("scheduler.type", "'frontier'"),
    "metric.others=[recal@10]": ("metric.others.0", "did you mean 'recall@10'"),
    "metric.others=[nll, recall@10]": ("metric.others.1", "'recall@10' is named twice"),
    "metric.others=[nll, nll]": ("metric.others.1", "'nll' is named twice"),
    "metric.others=nll": ("metric.others", "list"),
    "metric.constraints=[nll]": ("metric.constraints.0", "'nll' is no bound"),
    "metric.constraints=[nll <= 3, recal@10 >= 0.1]": ("metric.constraints.1", "did you mean 'recall@10'"),
    "metric.constraints=[nll >= 3]": ("metric.constraints.0", "to be minimized; turn the bound round"),
    "metric.constraints=[recall@10 <= 0.1]": ("metric.constraints.0", "to be maximized; turn the bound round"),
    "metric.constraints=[recall@10 > 0.1]": ("metric.constraints.0", "no bound"),
    "metric.constraints=[recall@10 >= lots]": ("metric.constraints.0", "'lots' is not a number"),
    "scheduler.strata=2": ("scheduler.strata", "unknown"),
    "scheduler.shares=[1]": ("scheduler.shares", "1 shares for 2 rungs"),
    "scheduler.shares=[0.5, 0.6]": ("scheduler.shares", "parts of one"),
    "parameters.params.max=1e3": ("parameters.params", "min 10000 is above max 1000"),
    "parameters.params.min=0": ("parameters.params.min", "out of range"),
    "parameters.params.value=3": ("parameters.params", "value and min/max"),
    "parameters.params=3": ("parameters.params", "write {value: 3}"),
    "parameters.params={}": ("parameters.params", "has no value"),
    "parameters.params={min: 3}": ("parameters.params.max", "is missing"),
    "parameters.params={distribution: uniform, value: 3}": (
        "parameters.params.distribution",
        "does not go with uniform",
    ),
    "parameters.params={min: 3e4, max: 4e4, distribution: lognormal}": (
        "parameters.params.distribution",
        "write uniform",
    ),
    "parameters.params={min: 3e4, max: 4e4, distribution: constant}": (
        "parameters.params.distribution",
        "min/max do not go with constant",
    ),
    "parameters.params={min: 3e4, max: 4e4, step: 3}": ("parameters.params.step", "unknown key; write `q`"),
    "parameters.params={min: 3e4, max: 4e4, q: 3}": ("parameters.params.q", "write q_uniform"),
    "parameters.params={min: 3e4, max: 4e4, q: 0, distribution: q_uniform}": ("parameters.params.q", "no step"),
    "parameters.params={min: 5, max: 9, q: 10, distribution: q_uniform}": ("parameters.params.q", "no multiple of 10"),
    "parameters.params={value: 3, q: 3}": ("parameters.params.q", "ranges only"),
    "parameters.embedder_share={min: 0, max: 0.6}": ("parameters.embedder_share.max", "<= 0.5"),
    "parameters.embedder_share={value: 0.6}": ("parameters.embedder_share.value", "<= 0.5"),
    "parameters.embedder_share={min: 0, max: 0.1, distribution: log_uniform_values}": (
        "parameters.embedder_share.min",
        "logarithm of 0",
    ),
    "parameters.learning_rate.min=1": ("parameters.learning_rate", "swap them"),
    "parameters.learning_rate.min=no": ("parameters.learning_rate.min", "'no' is not a number"),
    "parameters.groups_per_step={values: []}": ("parameters.groups_per_step.values", "is empty"),
    "parameters.groups_per_step={values: [1, 2.5]}": ("parameters.groups_per_step.values.1", "whole number"),
    "parameters.groups_per_step={values: [1, 1]}": ("parameters.groups_per_step.values", "repeats a value"),
    "parameters.groups_per_step={min: 1.5, max: 3}": ("parameters.groups_per_step.min", "whole number"),
    "parameters.groups_per_step={min: 1, max: 3, distribution: uniform}": (
        "parameters.groups_per_step.distribution",
        "groups_per_step is a whole number",
    ),
    "parameters.averaging={min: 0, max: 1}": ("parameters.averaging", "true or false"),
    "parameters.averaging={value: 1}": ("parameters.averaging.value", "expected true or false"),
    "parameters.num_negatives={value: 1}": ("parameters.num_negatives", "write `live_negatives`"),
    "parameters.depth={min: null, max: 3}": ("parameters.depth", "no null end"),
    "scaling.slots=0": ("scaling.slots", "at least 1"),
    "scaling.max_retries=-1": ("scaling.max_retries", "at least 0"),
    "scaling.tiers=[]": ("scaling.tiers", "no tier"),
    "scaling.tiers=[{from_params: 1e5}]": ("scaling.tiers", "small tasks"),
    "scaling.tiers=[{worker: 2}]": ("scaling.tiers.0.worker", "did you mean 'workers'"),
    "scaling.tiers=[{workers: 2}]": ("scaling.tiers.0", "one worker"),
    "scaling.tiers=[{workers: 0}]": ("scaling.tiers.0.workers", "at least 1"),
    "scaling.tiers=[{engine: deepspeed, zero_stage: 4}]": ("scaling.tiers.0.zero_stage", "no ZeRO stage 4"),
    "scaling.tiers=[{engine: fsdp}]": ("scaling.tiers.0.engine", "known: deepspeed, plain"),
    "scaling.tiers=[{cpus: 0}]": ("scaling.tiers.0.cpus", "above 0"),
    "scaling.tiers=[{gpus: 1.5}]": ("scaling.tiers.0.gpus", "1.5 GPUs"),
    "scaling.tiers=[{engine: deepspeed, workers: 2, gpus: 0.5}]": ("scaling.tiers.0.gpus", "cannot share GPUs"),
    "scaling.tiers=[{memory_gib: 0}]": ("scaling.tiers.0.memory_gib", "above 0"),
    "scaling.tiers=[{}, {from_rung_flops: 1e11}]": ("scaling.tiers.1.from_rung_flops", "no rung reaches it"),
    "data.shards=3": ("data.shards", "string"),
    "data.evaluation_queries=0": ("data.evaluation_queries", "at least 1"),
    "data={}": ("data.shards", "is missing"),
    "seeds=[]": ("seeds", "no seed"),
    "seeds=0": ("seeds", "how many"),
    "seeds=[1, 1]": ("seeds", "repeats a seed"),
    "seeds=true": ("seeds", "True"),
    "probes=[1e12]": ("probes", "outside every trunk"),
    "probes=[0]": ("probes", "above 0"),
}


@pytest.mark.parametrize("override", SLIPS)
def test_a_slip_is_one_line_with_file_and_key(good, override):
    key, fragment = SLIPS[override]
    with pytest.raises(UserError) as caught:
        resolve(good, [override])
    message = str(caught.value)
    assert caught.value.key == key
    assert fragment in message
    assert str(good) in message
    assert "\n" not in message
    assert caught.value.fix


def test_a_rate_of_0_is_the_rule_at_every_trial(good):
    spec = resolve(good, ["parameters.learning_rate={value: 0}", "parameters.groups_per_step={value: 1}"])
    small, large = (spec.config({"params": params}).learning_rate for params in (1e4, 1e6))
    assert small == rule_learning_rate(1e4, spec.config({"params": 1e4}).group_windows * 64)
    assert large < small


def test_words_of_other_tools_are_none_of_this_one_and_lead_to_what_is():
    settings, schema = set(TrainConfig.__dataclass_fields__), json_schema()
    axis = schema["properties"]["parameters"]["additionalProperties"]
    keys = {key for part in (schema, axis, *schema["$defs"].values()) for key in part.get("properties", {})}
    assert not settings & set(SETTINGS)
    assert not keys & set(KEYS)
    assert not {*METRICS, *POLICIES, *RANGES} & set(CHOICES)
    for fix in SPACE.values():
        named = {part for name in re.findall(r"`([a-z_0-9.]+)(?::[^`]*)?`", fix) for part in name.split(".")}
        assert named <= settings | keys, fix


def test_slips_of_the_whole_file(tmp_path):
    path = tmp_path / "space.yaml"
    for text, fragment in (
        ("", "is empty"),
        ("name: x\nname: y\n", "duplicate key 'name'"),
        ("- a\n", "not a mapping"),
        ("name: [", "space.yaml:"),
        (GOOD.replace("  params:", "  parms:"), "did you mean 'params'"),
        (GOOD.replace("  params: {distribution: log_uniform_values, min: 1e4, max: 1e6}\n", ""), "parameters.params"),
        (GOOD.replace("method: optuna", "method: grid"), "finitely many values"),
        (GOOD + "probes: [1e9]\n", None),
        (
            GOOD.replace("budget:", "probes: [1e9]\nbudget:").replace(
                "  window:", "  averaging: {value: false}\n  window:"
            ),
            "averaged weights",
        ),
    ):
        path.write_text(text)
        if fragment is None:
            assert resolve(path).config({"params": 1e5, "learning_rate": 1e-3, "groups_per_step": 1}).averaging
            continue
        with pytest.raises(UserError, match=fragment):
            resolve(path)
    with pytest.raises(UserError, match="cannot be read"):
        resolve(tmp_path / "none.yaml")


def test_overrides_that_lead_nowhere(good):
    for override, fragment in (
        ("total_flops", "not KEY=VALUE"),
        ("name.x=3", "leads through a value"),
        ("budget.ladder_flops.7=3", "no place in a list of 2"),
        ("budget=[", "--set"),
    ):
        with pytest.raises(UserError, match=fragment):
            resolve(good, [override])
    assert resolve(good, ["budget.ladder_flops.1=8e10"]).budget.ladder_flops[1] == 80_000_000_000


def test_a_softmax_that_a_tier_cannot_compute_is_refused():
    frozen = {"freeze_at_flops": {"value": 1e8}, "negatives": {"value": 64}}
    pair = {"engine": "deepspeed", "workers": 2}
    for tier, parameters, fragment in (
        ({"softmax": "shard"}, frozen, r"scaling.tiers.0.softmax"),
        ({"softmax": "one_pass"}, {}, "scaling.tiers.0.softmax: .*set `freeze_at_flops`"),
        ({"softmax": "sharded"}, frozen, "one worker"),
        ({"softmax": "triton", **pair}, frozen, "CUDA"),
    ):
        with pytest.raises(UserError, match=fragment):
            make_spec(scaling={"tiers": [tier]}, parameters=parameters)
    spec = make_spec(scaling={"tiers": [{"softmax": "sharded", **pair}]}, parameters=frozen)
    assert spec.tiers_at(1e9, 100)[0].scaling(2)["softmax"] == "sharded"


def test_the_last_matching_tier_wins():
    tiers = [{}, {"from_params": 5000, "gpus": 0.25}, {"from_rung_flops": "4e9", "engine": "deepspeed", "workers": 2}]
    spec = make_spec(scaling={"tiers": tiers})
    assert spec.tiers_at(1e9, 100)[0].gpus == 0
    assert spec.tiers_at(1e9, 6000)[0].gpus == 0.25
    assert spec.tiers_at(4e9, 6000)[0].workers == 2


@given(st.integers(1, 64), st.integers(1, 4), st.integers(1, 64))
def test_micro_groups_divide_a_workers_groups(groups, workers, micro):
    scaling = Tier(workers=workers, engine="deepspeed", micro_groups=micro).scaling(groups * workers)
    assert groups % scaling["micro_groups"] == 0
    assert 1 <= scaling["micro_groups"] <= micro


@given(
    st.sampled_from(["uniform", "log_uniform_values", "q_uniform", "q_log_uniform_values", "int_uniform"]), st.data()
)
def test_draws_stay_inside(distribution, data):
    low = data.draw(st.integers(1, 50))
    high = data.draw(st.integers(low + 10, 200))
    quantum = data.draw(st.sampled_from([1.0, 2.0, 2.5])) if distribution.startswith("q_") else None
    parameter = Parameter("params", distribution, (), float(low), float(high), quantum)
    for seed in range(5):
        value = parameter.draw(np.random.default_rng(seed))
        assert low <= value <= high
        if quantum:
            assert value / quantum == round(value / quantum)
        if parameter.is_whole:
            assert isinstance(value, int)


def test_a_task_pays_for_trunk_and_cooldown():
    spec = make_spec()
    assert spec.task_flops(0.2, 0, None) == 10**9
    # From the trunk of 1e9, which ends at most a step (2 %) before 0.8e9, to the row of 4e9.
    assert spec.task_flops(0.2, 1, 0) == 4 * 10**9 - (800_000_000 - 20_000_000)
    assert spec.ascent_flops(0.2, 1) == spec.task_flops(0.2, 0, None) + spec.task_flops(0.2, 1, 0)
    assert spec.task_flops(0.2, 2, None) == 16 * 10**9


def test_probes_are_on_the_trunk_that_a_task_trains():
    spec = replace(make_spec(), probes=(10**8, 8 * 10**8, 9 * 10**8, 10**10))
    assert spec.probes_between(0.2, 0, None) == (10**8, 8 * 10**8)
    assert spec.probes_between(0.2, 1, 0) == (9 * 10**8,)
    assert spec.probes_between(0.2, 2, 1) == (10**10,)


def test_the_json_schema_of_a_configuration_knows_every_key_and_refuses_what_is_refused():
    schema = config_schema()
    jsonschema.validate(load_yaml(SPACES / "train.yaml"), schema)
    for path in (SPACES / "stage1").glob("*.yaml"):
        jsonschema.validate(load_yaml(path), schema)
    assert "negative groups per optimizer step" in schema["properties"]["groups_per_step"]["description"]
    wrong = ({"parms": 1e3}, {}, {"params": 0}, {"params": 1e3, "copy": "maybe"}, {"params": 1e3, "window": 1.5})
    for values in wrong:
        with pytest.raises(UserError):
            TrainConfig.from_dict(values)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(values, schema)


@pytest.mark.parametrize(
    ("low", "high", "q", "multiples"),
    [(0.0, 0.3, 0.1, 4), (0.05, 0.35, 0.05, 7), (0.85, 0.9, 0.1, 1), (0.1, 0.25, 0.1, 2)],
)
def test_a_range_of_steps_has_both_its_ends(low, high, q, multiples):
    steps = {"distribution": "q_uniform", "min": low, "max": high, "q": q}
    (made,) = [one for one in make_spec(parameters={"dropout": steps}).parameters if one.name == "dropout"]
    grid = made.grid()
    assert len(grid) == multiples
    assert all(low <= value <= high for value in grid)
    assert made.quantise(high) == grid[-1]


def test_a_bound_keeps_its_digits():
    for bound in ("3.14159265", "0.05", "3"):
        (kept,) = make_spec(metric={"name": "nll", "constraints": [f"nll <= {bound}"]}).metric.constraints
        assert kept.text == f"nll <= {bound}"
