"""One stage-1 trunk for a whole space: the rows are those of runs that train it themselves, and it is paid once."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from bfm.errors import CorruptError, UserError
from bfm.events.protocol import Protocol
from bfm.files import Store, parent_store
from bfm.sweep.driver.driver import SweepDriver
from bfm.sweep.ledger.changes import check_changes
from bfm.sweep.ledger.ledger import MemoryLedger
from bfm.sweep.ledger.task import Task
from bfm.sweep.plan.machine import Machine
from bfm.sweep.plan.plan import plan
from bfm.sweep.space.costs import Costs
from bfm.sweep.space.space import FeasibleSet
from bfm.sweep.space.spec import from_dict
from bfm.sweep.space.stage1 import _stands_at, with_stage1
from bfm.training.checkpoint import load_checkpoint, read_meta
from bfm.training.rung import run_rung
from bfm.training.task import RungTask
from tests.sweep.serial import run_serial
from tests.training.common import CPU, STAGE_1

SEED = 3
FIXED = {
    key: {"value": value}
    for key, value in STAGE_1.as_dict().items()
    if value is not None and key not in ("negatives", "negatives_exponent", "freeze_at_flops")
}
SPACE = {
    "name": "toy",
    "axis": "negatives",
    "metric": {"name": "nll"},
    "method": "grid",
    "parameters": {**FIXED, "negatives": {"values": [8, 24]}},
    "budget": {"ladder_flops": ["4e8", "6e8"], "total_flops": "2e9", "events_per_param": [0, 1e6]},
    "scheduler": {"type": "grid"},
    "data": {"shards": "toy", "evaluation_queries": 50},
    "seeds": [SEED],
}


@pytest.fixture(scope="module")
def trunk(toy_shards, tmp_path_factory):
    """The folder of a stage-1 trunk, as `bfm train` leaves it."""
    root = tmp_path_factory.mktemp("base")
    task = RungTask("run", "run", 0, 2.5e8, STAGE_1, SEED, micro_groups=4)
    return root / run_rung(task, toy_shards, CPU, Store(root))["checkpoint"]


def space(trunk: Path, **changes):
    values = copy.deepcopy(SPACE) | {"stage1": {"checkpoint": str(trunk)}}
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    return from_dict(values)


def costs_on(shards, spec):
    return Costs.on(shards, Protocol.load(shards), spec.data.evaluation_queries)


@pytest.fixture(scope="module")
def swept(trunk, toy_shards, tmp_path_factory):
    """A whole sweep over the shared trunk: (spec, state, store)."""
    spec = with_stage1(space(trunk), toy_shards.hash)
    store = Store(tmp_path_factory.mktemp("sweep"))
    driver = SweepDriver.start(FeasibleSet(spec, costs_on(toy_shards, spec)), MemoryLedger(()))

    def execute(task):
        row = run_rung(RungTask.from_task({**task.as_dict(), "scaling": {"micro_groups": 4}}), toy_shards, CPU, store)
        assert row["task_flops"] <= task.reserved_flops
        return row

    run_serial(driver, execute)
    return spec, driver.state, store


def test_a_row_equals_that_of_a_run_that_trains_stage_1_itself(swept, toy_shards, tmp_path):
    spec, state, store = swept
    assert {rung: len(rows) for rung, rows in state.rungs.items()} == {0: 2, 1: 2}
    for rung, rows in state.rungs.items():
        shared = next(row for row in rows.values() if row["config"]["negatives"] == 24)
        config = spec.config({"negatives": 24})
        task = RungTask("own", "own", rung, spec.budget.ladder_flops[rung], config, SEED, micro_groups=4)
        own = run_rung(replace(task, evaluation_queries=50), toy_shards, CPU, Store(tmp_path / str(rung)))
        asked = {"trial", "checkpoint", "model", "scores", "task_flops", "train_s", "eval_s", "warm_start_s", "probes"}
        assert {key: shared[key] for key in shared if key not in asked} == {
            key: own[key] for key in own if key not in asked
        }
        weights = load_checkpoint(store, shared["model"]).state.weight
        others = load_checkpoint(Store(tmp_path / str(rung)), own["model"]).state.weight
        assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_stage_1_is_in_every_path_and_in_no_spend(swept, trunk, toy_shards):
    spec, state, _ = swept
    stands_at = read_meta(*parent_store(str(trunk)))["counters"]["path_flops"]
    assert spec.stage1_flops == stands_at
    for row in state.rungs[0].values():
        assert row["config"]["freeze_at_flops"] == stands_at
        assert row["task_flops"] == row["path_flops"] - stands_at
    assert state.spent_flops == sum(row["task_flops"] for rows in state.rungs.values() for row in rows.values())
    assert spec.task_flops(0.2, 0, None) == 4 * 10**8 - stands_at
    assert replace(spec, probes=(stands_at, stands_at + 1)).probes_between(0.2, 0, None) == (stands_at + 1,)
    assert spec.task_flops(0.2, 1, 0) == replace(spec, stage1=None).task_flops(0.2, 1, 0)
    # What the sweep reserved is what was planned.
    assert plan(spec, costs_on(toy_shards, spec), Machine.here()).training_flops == sum(state.nominal_flops.values())


def test_the_resolved_space_says_where_it_stands_and_goes_on(swept, trunk, toy_shards, tmp_path):
    spec, _, _ = swept
    assert from_dict(spec.as_dict()) == spec
    assert with_stage1(spec, toy_shards.hash) == spec
    assert spec.stage1 is not None
    assert spec.stage1.sha256 == read_meta(*parent_store(str(trunk)))["state_sha256"]
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in trunk.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    again = with_stage1(space(moved), toy_shards.hash)
    assert check_changes(spec.as_dict(), again, extend=False) == ["stage1.checkpoint"]
    assert with_stage1(replace(spec, stage1=None), "") == replace(spec, stage1=None)
    given = {"freeze_at_flops": {"value": spec.stage1_flops}}
    assert with_stage1(space(trunk, parameters=given), toy_shards.hash) == spec


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parameters": {"groups_per_step": {"value": 2}}}, "groups_per_step is 4, not 2"),
        ({"parameters": {"params": {"values": [2000, 3000]}}}, "params varies, but all trials share one stage 1"),
        ({"parameters": {"freeze_at_flops": {"value": 1e8}}}, "parameters.freeze_at_flops: the shared stage 1 stands"),
        ({"seeds": [0]}, "seeds: stage 1 was trained with seed 3, not 0"),
        ({"stage1": {"sha256": "0" * 64}}, "another checkpoint stands there now"),
        ({"stage1": {"checkpoint": "/nowhere/trunk"}}, "/nowhere/trunk: there is no checkpoint here"),
    ],
)
def test_a_trunk_of_another_run_is_refused_in_one_line(trunk, toy_shards, changes, words):
    with pytest.raises(UserError) as refused:
        with_stage1(space(trunk, **changes), toy_shards.hash)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_no_stage_1_trunk_is_refused(trunk, swept, toy_shards):
    _, state, store = swept
    row = next(iter(state.rungs[0].values()))
    for place, words in (
        (trunk.parent / "rung0-model", "is a cooled-down model"),
        (store.path(row["checkpoint"]), "is in stage 2 already"),
    ):
        with pytest.raises(UserError, match=words):
            with_stage1(space(place), toy_shards.hash)
    with pytest.raises(UserError, match="shards_hash"):
        with_stage1(space(trunk), "of other shards")


def test_a_damaged_trunk_is_found_before_anything_starts(trunk, toy_shards, tmp_path):
    for file in trunk.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 100 if file.suffix == ".pt" else None])
    with pytest.raises(CorruptError):
        with_stage1(space(tmp_path), toy_shards.hash)


def test_a_rung_without_room_for_stage_2_is_infeasible(trunk, toy_shards):
    spec = with_stage1(space(trunk, budget={"ladder_flops": ["2.4e8"]}), toy_shards.hash)
    with pytest.raises(UserError, match="stage 2 begins at"):
        plan(spec, costs_on(toy_shards, spec), Machine.here())


def test_freezing_is_never_rounded_below_the_trunk():
    for flops in (10**9, 2**53 + 1, 10**19 + 123):
        stands_at = _stands_at({"counters": {"path_flops": flops}})
        assert flops <= stands_at <= math.nextafter(float(flops), math.inf)


def test_a_ledger_from_before_shared_trunks_has_tasks():
    old = asdict(Task("t-r0-a0", "t", 0, 1, {}, 0, None, None, 1, {}))
    del old["stage1"]
    assert Task.from_dict(old).stage1 is None
