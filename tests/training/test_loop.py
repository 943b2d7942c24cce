"""The trunk is a pure function of (configuration, seed), however it is cut, and never passes its limit."""

import dataclasses
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bfm.errors import CorruptError, DivergedError, UserError
from bfm.events.shards import Shards
from bfm.files import Store
from bfm.training import single
from bfm.training.checkpoint import resume
from bfm.training.data import TrainingData
from bfm.training.loop import COST_STEPS, Trainer, groups_per_worker
from tests.training.common import CPU, STAGE_1, STAGE_2, assert_equal_states, losses, train

END = {1: 8e7, 2: 8e7}


@pytest.fixture(scope="module", params=[STAGE_1, STAGE_2], ids=["stage1", "stage2"])
def unbroken(request, toy_shards):
    trainer, records = train(request.param, toy_shards, END[1], cooldown_flops=1e8)
    assert len(records) > 20
    return request.param, trainer, records


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_stop_and_resume_at_any_step_is_bit_for_bit(data, unbroken, toy_shards, tmp_path):
    config, whole, records = unbroken
    trunk = [record for record in records if record.phase == "trunk"]
    stop = data.draw(st.integers(0, len(trunk) - 1), label="stop after step")
    store = Store(tmp_path)
    first, before = train(config, toy_shards, 0 if stop == 0 else trunk[stop - 1].path_flops)
    first.save(store, "cut")
    start = resume(store, "cut", config, 3, first.data)
    second, after = train(config, toy_shards, END[1], start=start, cooldown_flops=1e8)
    assert losses(before + after) == losses(records)
    assert [r.path_flops for r in before + after] == [r.path_flops for r in records]
    assert second.counters == whole.counters
    assert_equal_states(second.engine.export_state(), whole.engine.export_state())


def test_limit_is_never_passed_and_fully_used(unbroken):
    _, trainer, records = unbroken
    trunk = [record for record in records if record.phase == "trunk"]
    assert trunk[-1].path_flops <= END[1]
    assert records[-1].path_flops <= 1e8
    assert records[-1].path_flops + trainer.next_step_flops() > 1e8
    assert trainer.counters.events == records[-1].events
    assert trainer.spent_flops == trainer.counters.path_flops


def test_cooldown_rate_falls_and_trunk_rate_stays(unbroken):
    config, _, records = unbroken
    warm = 500 if config.warmup_events else config.shape().params
    constant = [r.learning_rate for r in records if r.phase == "trunk" and r.events >= warm]
    assert set(constant) == {config.learning_rate}
    cooling = [r.learning_rate for r in records if r.phase == "cooldown"]
    assert np.all(np.diff(cooling) < 0)
    assert cooling[0] == pytest.approx(config.learning_rate)
    assert cooling[-1] < 0.3 * config.learning_rate


def test_tables_decay_from_the_second_epoch_on(toy_shards):
    plain = dataclasses.replace(STAGE_1, table_weight_decay=0.0)
    epoch = TrainingData.of(toy_shards).order(STAGE_1, 3).targets_per_epoch
    ((decayed, with_decay), (_, without)) = (train(config, toy_shards, END[1]) for config in (STAGE_1, plain))
    equal = [one.loss == other.loss for one, other in zip(with_decay, without, strict=True)]
    # The first step whose counter has passed an epoch decays; the next loss sees it.
    first = next(index for index, record in enumerate(with_decay) if record.events > epoch) + 2
    assert all(equal[:first])
    assert not any(equal[first:])
    assert decayed.counters.events > 1.2 * epoch


def test_the_rows_of_later_are_not_decayed(toy_shards):
    config = dataclasses.replace(STAGE_1, table_weight_decay=100.0, averaging=False)
    trainer, _ = train(config, toy_shards, END[1])
    groups = trainer.engine.optimizer.param_groups
    decaying = [group for group in groups if "decay_per_repeat" in group]
    # Groups hold flat vectors: what decays is as much as the tables of ids are.
    named = trainer.engine.model.named_parameters()
    tables = {name: values.numel() for name, values in named if name.endswith("table")}
    later = sum(size for name, size in tables.items() if "later" in name)
    assert decaying[0]["weight_decay"] > 0
    assert later == 2 * config.d_item
    assert sum(values.numel() for group in decaying for values in group["params"]) == sum(tables.values()) - later


def test_the_mean_cost_of_steps_is_that_of_the_next_ones(toy_shards):
    _, records = train(STAGE_1, toy_shards, END[1])
    fresh, _ = train(STAGE_1, toy_shards, 0)
    costs = np.diff([0, *(record.path_flops for record in records)])
    assert fresh.mean_step_flops() == (pytest.approx(costs[:COST_STEPS].mean()), None)
    assert costs.std() > 0


def test_a_cooldown_leaves_no_trace_on_the_trunk(toy_shards):
    short, _ = train(STAGE_1, toy_shards, 4e7)
    cooled, _ = train(STAGE_1, toy_shards, 4e7, cooldown_flops=5e7)
    assert cooled.counters.path_flops > short.counters.path_flops
    for name, tensor in short.engine.export_state().average.items():
        assert torch.equal(tensor, cooled.engine.export_state().average[name])


def test_micro_batches_change_neither_loss_nor_cost(toy_shards):
    runs = [train(STAGE_1, toy_shards, 4e7, micro_groups=groups) for groups in (1, 2, 4)]
    assert [trainer.micro_batches for trainer, _ in runs] == [4, 2, 1]
    for trainer, records in runs[1:]:
        # Windows of a micro-batch have as many slots as the one with most queries.
        counters, alone = (dataclasses.replace(of.counters, hardware_flops=0) for of in (trainer, runs[0][0]))
        assert counters == alone
        np.testing.assert_allclose(losses(records), losses(runs[0][1]), rtol=1e-5)


@pytest.mark.parametrize("method", ["reference", "two_pass", "one_pass"])
def test_a_forced_softmax_changes_neither_loss_nor_cost(toy_shards, method):
    auto, expected = train(STAGE_2, toy_shards, 6e7)
    trainer, records = train(STAGE_2, toy_shards, 6e7, softmax=method)
    assert trainer.counters.stage == 2
    np.testing.assert_allclose(losses(records), losses(expected), rtol=1e-5)
    twice = trainer.counters.hardware_flops - auto.counters.hardware_flops
    assert (twice > 0) == (method == "two_pass")
    assert dataclasses.replace(trainer.counters, hardware_flops=0) == dataclasses.replace(
        auto.counters, hardware_flops=0
    )


@pytest.mark.parametrize(
    ("config", "method", "fragment"),
    [
        (STAGE_1, "one_pass", "softmax: .*set `freeze_at_flops`"),
        (STAGE_2, "sharded", "one worker"),
        (STAGE_2, "triton", "kernel cannot run"),
        (STAGE_2, "onepass", "did you mean `one_pass`"),
    ],
)
def test_an_impossible_softmax_is_refused_before_training(toy_shards, monkeypatch, config, method, fragment):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=fragment):
        train(config, toy_shards, 0, softmax=method)


def test_micro_groups_fall_back_to_a_divisor(toy_shards):
    trainer, _ = train(STAGE_1, toy_shards, 0, micro_groups=3)
    assert trainer.micro_groups == 2


def test_workers_must_divide_the_groups_of_a_step():
    assert groups_per_worker(dataclasses.replace(STAGE_1, groups_per_step=6), 3) == 2
    with pytest.raises(UserError, match="use one of 1, 2, 3, 6 workers"):
        groups_per_worker(dataclasses.replace(STAGE_1, groups_per_step=6), 4)


def test_freeze_keeps_the_embedder_and_counts_the_catalogue(toy_shards):
    trainer, records = train(STAGE_2, toy_shards, 8e7)
    switch = next(index for index, record in enumerate(records) if record.stage == 2)
    before, _ = train(STAGE_2, toy_shards, records[switch - 1].path_flops)
    frozen = set(before.engine.model.embedder_parameter_names())
    old, new = before.engine.export_state(), trainer.engine.export_state()
    left_flops = STAGE_2.freeze_at_flops - records[switch - 1].path_flops
    assert 0 <= left_flops < before.next_step_flops()
    for name, weight in old.weight.items():
        assert torch.equal(weight, new.weight[name]) == (name in frozen)
    assert not frozen & (new.moment1.keys() | new.moment2.keys() | new.average.keys())
    catalogue_flops = trainer.cost.catalogue_flops(toy_shards.num_items)
    stage2_flops = records[switch].path_flops - records[switch - 1].path_flops
    _, estimate_flops = before.planner.mean_flops(1, before.counters.cursor, before.objective, 1)
    assert stage2_flops - catalogue_flops == pytest.approx(estimate_flops, rel=0.05)


def test_what_a_step_of_stage_2_costs_is_known_before_the_first(toy_shards):
    told = []
    dear = dataclasses.replace(STAGE_2, negatives=30)
    trainer = Trainer(
        dear, 3, TrainingData.of(toy_shards), CPU,
        after_freeze=lambda: told.append((trainer.counters.stage, trainer.counters.step, trainer.next_step_flops())),
    )  # fmt: skip
    trainer.run_trunk(6e7)
    ((stage, step, next_flops),) = told
    _, records = train(dear, toy_shards, 6e7)
    first = next(place for place, record in enumerate(records) if record.stage == 2)
    assert (stage, step) == (2, first)
    spent_flops = records[first].path_flops - records[first - 1].path_flops
    assert next_flops == spent_flops - trainer.catalogue_flops


@pytest.mark.parametrize("catalogue", [1, 3])
def test_speed_is_measured_through_a_freeze(toy_shards, monkeypatch, catalogue):
    """Also where embedding the catalogue takes as long as steps do."""
    made = []

    class Recorded(Trainer):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.catalogue_flops = catalogue * 10 * self.next_step_flops()
            made.append(self)

    monkeypatch.setattr(single, "Trainer", Recorded)
    clock = iter(range(1000))
    monkeypatch.setattr(single, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    speed = single.measure_speed(dataclasses.replace(STAGE_2, groups_per_step=1), toy_shards, 60.0)
    assert made[0].counters.stage == 2
    assert speed > 0


def test_what_runs_share_goes_with_their_shards(toy_shards):
    shards = Shards.open(str(toy_shards.path))
    data = TrainingData.of(shards)
    assert TrainingData.of(shards) is data
    gone = weakref.ref(data)
    del shards, data
    gc.collect()
    assert gone() is None


def test_altered_frozen_embedder_is_refused(toy_shards, tmp_path):
    trainer, _ = train(STAGE_2, toy_shards, 8e7)
    trainer.save(Store(tmp_path), "stage2")
    checkpoint = resume(Store(tmp_path), "stage2", STAGE_2, 3, trainer.data)
    name = trainer.engine.model.embedder_parameter_names()[0]
    checkpoint.state.weight[name] += 1e-6
    with pytest.raises(CorruptError, match="frozen embedder"):
        _ = Trainer(STAGE_2, 3, trainer.data, CPU, start=checkpoint).engine


def test_one_stage_1_trunk_serves_every_stage_2_configuration(toy_shards, tmp_path):
    """In a study of K the trials share a checkpoint; from there each goes on as if it had trained alone."""
    shared, _ = train(STAGE_2, toy_shards, STAGE_2.freeze_at_flops)
    assert shared.counters.stage == 1
    shared.save(Store(tmp_path), "shared")
    other = dataclasses.replace(STAGE_2, negatives=30)
    alone, records = train(other, toy_shards, 6e7)
    start = resume(Store(tmp_path), "shared", other, 3, shared.data)
    branched, after = train(other, toy_shards, 6e7, start=start)
    assert losses(after) == losses(records)[-len(after) :]
    assert_equal_states(alone.engine.export_state(), branched.engine.export_state())
    with pytest.raises(UserError, match="freeze_at_flops is"):
        resume(Store(tmp_path), "shared", dataclasses.replace(STAGE_2, freeze_at_flops=1e7), 3, shared.data)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_non_finite_values_end_the_run(toy_shards, bad):
    trainer, _ = train(STAGE_1, toy_shards, 2e7)
    objective = trainer.objective

    def broken(model, batch):
        loss, sums_2X2 = objective(model, batch)
        if bad == "loss":
            return loss * float("nan"), sums_2X2
        # Finite forward, infinite backward: the square root's slope at 0.
        return loss + (model.scale_logit * 0).sum().abs().sqrt(), sums_2X2

    trainer._built = trainer.engine, broken
    broken.batch = objective.batch
    with pytest.raises(DivergedError, match=bad):
        trainer.run_trunk(8e7)
    # It is read beside the next step, which is paid for; the run ends where it diverged.
    paid_flops = trainer.spent_flops - trainer.counters.path_flops
    assert 0 < paid_flops < 2 * trainer.counters.path_flops / trainer.counters.step


def test_where_a_run_diverges_does_not_depend_on_checkpoints(toy_shards, tmp_path):
    def diverged(saves):
        trainer, _ = train(STAGE_1, toy_shards, 0)
        engine, objective = trainer._built

        def broken(model, batch):
            loss, sums_2X2 = objective(model, batch)
            return loss * (float("nan") if engine.steps == 4 else 1.0), sums_2X2

        broken.batch = objective.batch
        trainer._built = engine, broken
        trainer.after_step = lambda: trainer.save(Store(tmp_path), "now") if saves else None
        with pytest.raises(DivergedError, match="at step 5"):
            trainer.run_trunk(8e7)
        return trainer.counters

    assert diverged(saves=True) == diverged(saves=False)


def test_a_record_tells_headline_from_basket_targets_and_the_gates(unbroken, toy_shards):
    config, _, records = unbroken
    losses = [(record.loss_headline, record.loss, record.loss_basket) for record in records]
    # The loss is a mean over groups, the others are over all of their rows: alike in the mean of the steps.
    headline, loss, basket = np.mean(losses, 0)
    assert min(headline, basket) - 0.2 < loss < max(headline, basket) + 0.2
    for record in records:
        assert sum(record.gates.values()) == pytest.approx(1.0, abs=1e-5)
    assert list(records[0].gates) == ["softmax", "pointer"]
    _, cut = train(config, toy_shards, records[9].path_flops, micro_groups=1)
    for record, other in zip(records, cut, strict=False):
        assert other.loss_headline == pytest.approx(record.loss_headline, rel=1e-4)
        assert other.gates["pointer"] == pytest.approx(record.gates["pointer"], rel=1e-4)


def test_seed_decides_weights_and_order(toy_shards):
    data = TrainingData.of(toy_shards)
    models = [data.build_model(STAGE_1, seed).state_dict() for seed in (0, 0, 1)]
    same = [all(torch.equal(models[0][name], other[name]) for name in models[0]) for other in models[1:]]
    assert same == [True, False]
