"""The plan before a sweep and its status after: figures that agree with what happens."""

from __future__ import annotations

import dataclasses
import json

import pytest

from bfm.errors import InfeasibleError, UserError
from bfm.sweep.driver.status import summarise
from bfm.sweep.ledger.state import SweepState
from bfm.sweep.plan.machine import Machine
from bfm.sweep.plan.plan import check_held, plan, render
from bfm.sweep.space.space import FeasibleSet
from bfm.units import format_count
from tests.sweep.serial import run_serial
from tests.sweep.world import PlantedCosts, execute, in_memory, make_spec

HERE = Machine(cores=2, gpus=0, memory_gib=16.0)


def test_the_plan_is_what_happens():
    spec = make_spec(scheduler={"type": "frontier"})
    driver = in_memory(spec)
    run_serial(driver, execute)
    expected = plan(spec, PlantedCosts(), HERE)
    for rung in expected.rungs:
        assert rung.trials <= len(driver.state.rungs[rung.rung])
        assert rung.trials >= 0.7 * len(driver.state.rungs[rung.rung])
    assert expected.training_flops == pytest.approx(driver.state.spent_flops, rel=0.15)
    assert expected.training_flops <= spec.budget.total_flops
    assert json.loads(json.dumps(expected.as_dict()))["name"] == "planted"


def test_a_space_of_which_nothing_is_held_here_is_refused():
    """A worker of the planted world needs a little more than the 2 MiB of a group and the catalogue."""
    feasible = FeasibleSet(make_spec(scaling={"slots": 2}), PlantedCosts())
    check_held(feasible, HERE)
    check_held(feasible, Machine(cores=2, gpus=0, memory_gib=2 * 3 / 1024))
    with pytest.raises(UserError, match=r"params: the smallest model needs about 0.00\d+ GiB, a worker here"):
        check_held(feasible, Machine(cores=2, gpus=0, memory_gib=2 * 2 / 1024))
    told = make_spec(scaling={"slots": 2, "tiers": [{"memory_gib": 1}]})
    check_held(FeasibleSet(told, PlantedCosts()), Machine(cores=2, gpus=0, memory_gib=2 * 2 / 1024))


def test_speed_is_measured_at_three_sizes_within_the_seconds():
    asked = []

    def measure(config, seconds):
        asked.append((config.params, seconds))
        return 1e8 * config.params

    expected = plan(make_spec(scaling={"slots": 2}), PlantedCosts(), HERE, measure)
    assert [seconds for _, seconds in asked] == [pytest.approx(20 / 3)] * 3
    assert sorted(size for size, _ in asked) == [size for size, _ in asked]
    slowest = min(speed for _, speed in expected.flops_per_s)
    assert expected.worst_s == pytest.approx(150e9 / slowest / 2)
    assert expected.rungs[0].train_s <= expected.rungs[0].training_flops / slowest / 2
    assert expected.train_s == pytest.approx(sum(rung.train_s for rung in expected.rungs))


def test_slots_beyond_this_machine_are_told_apart_from_it():
    def planned(slots, tier):
        spec = make_spec(scaling={"slots": slots, "tiers": [tier]})
        return plan(spec, PlantedCosts(), HERE, lambda config, seconds: 1e9)

    one, few, many = (planned(slots, {"cpus": 0.5}) for slots in (1, 3, 64))
    assert few.train_s == few.slots_train_s
    assert few.worst_s == pytest.approx(one.worst_s / 3)
    assert "places" not in render(few)
    assert many.tasks_here == 4
    assert many.worst_s == pytest.approx(one.worst_s / 4)
    assert many.slots_worst_s == pytest.approx(one.worst_s / 64)
    for rung, alone in zip(many.rungs, one.rungs, strict=True):
        assert rung.train_s == pytest.approx(alone.train_s / min(4, rung.trials))
        assert rung.slots_train_s == pytest.approx(alone.train_s / min(64, rung.trials))
    assert "here, 4 at a time" in render(many)
    assert "on 64 places as fast as one here" in render(many)
    assert not many.warnings
    asked = planned(64, {"cpus": 2, "gpus": 1})
    assert asked.worst_s == pytest.approx(one.worst_s)
    assert "the speeds are those of 2 CPUs" in asked.warnings[0]
    assert asked.warnings[1].startswith("a task asks for 2 CPUs and 1 GPUs, this machine has 2 and 0")


def test_what_no_named_memory_holds_and_what_repeats_the_log_is_warned_of():
    class Costs(PlantedCosts):
        def of(self, config):
            return dataclasses.replace(super().of(config), group_bytes=config.params * 10**7, epoch_events=10**4)

    def warned(here, tier, slots=1, **budget):
        spec = make_spec(scaling={"tiers": [tier], "slots": slots}, budget=budget)
        made = plan(spec, Costs(), here)
        return (
            made,
            [line for line in made.warnings if "memory" in line],
            [line for line in made.warnings if "epochs" in line],
        )

    made, memory, epochs = warned(HERE, {"gpus": 1})
    assert "(of the usual card: 24 GiB)" in memory[0]
    top = made.rungs[-1]
    assert f"{top.unheld:.0%} of the points at rung {top.rung}" in memory[0]
    assert 0 < top.unheld < 1
    assert f"up to {top.epochs[1]:.2g} epochs" in epochs[0]
    larger = Machine(cores=2, gpus=1, memory_gib=16.0, gpu_memory_gib=made.rungs[-1].memory_gib + 1)
    assert not warned(larger, {"gpus": 1})[1]
    assert any("no tier asks for a GPU" in line for line in warned(larger, {})[0].warnings)
    assert not any("no tier asks for a GPU" in line for line in warned(larger, {"gpus": 1})[0].warnings)
    # A share of a GPU has its share of the memory.
    assert warned(larger, {"gpus": 0.5})[1]
    assert not warned(HERE, {"gpus": 1, "memory_gib": 24})[1]
    assert not warned(HERE, {"gpus": 1}, max_epochs=100)[2]
    # Tasks at a time share the memory of a machine.
    enough = Machine(cores=8, gpus=0, memory_gib=made.rungs[-1].memory_gib + 1)
    assert not warned(enough, {"cpus": 8})[1]
    assert not warned(enough, {"cpus": 1})[1]
    assert warned(enough, {"cpus": 1}, slots=8)[1]


def test_models_that_cannot_be_measured_here_are_not_and_it_is_said():
    sizes = []

    def measure(config, seconds):
        assert config.groups_per_step == 1
        sizes.append(config.params)
        return 1e6

    made = plan(make_spec(), PlantedCosts(), HERE, measure, 0.3)
    group_s = [
        PlantedCosts().of(make_spec().config({"params": size, "learning_rate": 1e-3})).step_flops / 1e6
        for size in sizes
    ]
    assert max(group_s[1:], default=0.0) <= 0.1
    assert made.flops_per_s[-1][0] < made.rungs[-1].params[1]
    assert f"models above N = {format_count(made.flops_per_s[-1][0])} are taken" in made.warnings[0]


def test_what_is_infeasible_stands_with_its_share_and_fix():
    parameters = {"params": {"distribution": "log_uniform_values", "min": 1000, "max": 1e5}}
    expected = plan(make_spec(parameters=parameters, budget={"ladder_flops": ["1e9"]}), PlantedCosts(), HERE)
    (share, refusal), (warmup_share, warmup) = expected.refusals
    assert refusal.reason == "fewer than 100 steps at rung 1e9"
    assert warmup.reason == "warmup longer than the trunk of rung 1e9"
    # log(1e5 / 15,152) / log(100) of the draws are too large for 100 steps.
    assert share == pytest.approx(0.41, abs=0.06)
    assert share + warmup_share + expected.feasible_share == pytest.approx(1)
    told = expected.as_dict()["refusals"][0]
    assert told == {"reason": refusal.reason, "share": share, "example": refusal.detail, "fix": refusal.fix}
    text = render(expected)
    assert "fewer than 100 steps" in text
    assert refusal.fix in text
    assert len({len(line) for line in text.splitlines()[:2]}) == 1


def test_tables_larger_than_a_model_are_named_and_are_in_the_memory():
    class Costs(PlantedCosts):
        def of(self, config):
            cost = super().of(config)
            return dataclasses.replace(cost, table_params=tables, state_params=cost.state_params + tables)

    without = plan(make_spec(), PlantedCosts(), HERE)
    tables = 1 << 28
    expected = plan(make_spec(), Costs(), HERE)
    assert expected.table_params == tables
    assert expected.rungs[0].memory_gib - without.rungs[0].memory_gib == pytest.approx(16 * tables / (1 << 30), rel=0.3)
    assert "lookup tables hold 268M numbers" in render(expected)
    assert "4 GiB" in render(expected)
    assert "lookup tables" not in render(without)
    tables = 100
    assert "lookup tables" not in render(plan(make_spec(), Costs(), HERE))


def test_a_space_without_a_point_has_no_plan():
    parameters = {"params": {"value": 1e9}}
    with pytest.raises(InfeasibleError, match=r"4096 of 4096"):
        plan(make_spec(parameters=parameters), PlantedCosts(), HERE)


def test_status_adds_up():
    driver = in_memory(make_spec(scaling={"slots": 2}))
    tasks = [driver.next_task(), driver.next_task()]
    driver.report(tasks[0].task_id, execute(tasks[0]))
    driver.lost(tasks[1].task_id, "killed")
    third = driver.next_task()
    status = json.loads(json.dumps(summarise(driver.state)))
    assert list(driver.state.open_tasks) == [third.task_id]
    assert status["lost_tasks"] == {"killed": 1}
    assert status["lost_flops"] == tasks[1].reserved_flops
    assert status["spent_flops"] + status["reserved_flops"] + status["left_flops"] == status["total_flops"]
    assert status["rungs"][0]["rows"] == 1
    assert status["rungs"][0]["pending"] == 1
    assert status["finished"] is None


def test_status_knows_the_best_of_every_rung_and_metric():
    driver = in_memory(make_spec())
    run_serial(driver, execute)
    status = summarise(SweepState.fold(driver._ledger.records))
    for rung, figures in enumerate(status["rungs"]):
        rows = driver.state.rungs[rung]
        best = min((row["metrics"]["nll"], trial) for trial, row in rows.items() if row["status"] == "ok")
        assert (figures["best"]["nll"]["value"], figures["best"]["nll"]["trial"]) == best
        assert figures["best"]["recall@10"]["trial"] == best[1]
        assert figures["rows"] == len(rows)
        assert figures["diverged"] + figures["oom"] + figures["off_budget"] < len(rows)


def test_an_empty_ledger_has_no_status():
    with pytest.raises(ValueError, match="holds no sweep"):
        summarise(SweepState())


def test_a_grid_is_planned_point_by_point_and_its_probes_are_priced():
    parameters = {"params": {"values": [1000, 2000, 4000]}, "learning_rate": {"value": 3e-3}}
    changes = {"parameters": parameters, "scheduler": {"type": "grid"}}
    # D/N at 1e9 is 167, 42 and 10, and four times as large at every rung above.
    budget = {"events_per_param": [50, 700]}
    spec = make_spec(**changes, budget=budget, probes=["2e8", "2e9", "1e10"])
    driver = in_memory(spec)
    run_serial(driver, execute)
    expected = plan(spec, PlantedCosts(), HERE)
    assert [rung.trials for rung in expected.rungs] == [len(driver.state.rungs[rung]) for rung in range(3)]
    assert expected.training_flops == sum(driver.state.nominal_flops.values())
    bare = plan(make_spec(**changes, budget=budget), PlantedCosts(), HERE)
    tasks = [attempt["task"] for attempt in driver._ledger.records if attempt["kind"] == "task"]
    probes = sum(len(task["probes"]) for task in tasks)
    assert probes > 0
    assert (
        expected.evaluation_flops - bare.evaluation_flops
        == probes * PlantedCosts().of(spec.config({"params": 1000})).probe_flops
    )


def test_a_grid_that_the_cap_cuts_is_planned_as_far_as_it_goes():
    parameters = {"params": {"values": [1000, 1001, 1002, 1003]}, "learning_rate": {"value": 3e-3}}
    spec = make_spec(parameters=parameters, scheduler={"type": "grid"}, budget={"total_flops": "45e9"})
    assert [rung.trials for rung in plan(spec, PlantedCosts(), HERE).rungs] == [2, 2, 2]
