"""ZeRO engines train the same curve as the plain engine, at any stage and with one or two workers."""

from __future__ import annotations

import dataclasses
import datetime
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bfm.errors import DivergedError, UserError
from bfm.events.shards import Shards
from bfm.files import Store
from bfm.training.checkpoint import read_meta, resume
from bfm.training.config import TrainConfig
from bfm.training.data import TrainingData
from bfm.training.engine import EngineState
from bfm.training.loop import Trainer
from bfm.training.rung import run_rung
from bfm.training.task import RungTask
from bfm.training.zero import ZeroFactory
from tests.training.common import CPU, STAGE_1, STAGE_2, assert_equal_states, losses, train

END = 6e7
RUNG = 2.5e8
DEVICE = torch.device("cpu")
# Large enough that ZeRO-3 really partitions some weights (it keeps those below 1e5 numbers whole).
WIDE = TrainConfig(params=3e5, embedder_share=0.45, window=16, groups_per_step=2, group_windows=2, d_item=64, depth=1)


@pytest.fixture(scope="module", autouse=True)
def _leave_the_group():
    """The factory makes a process group of this process alone. It stays to the end: DeepSpeed keeps its sub-groups."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("stage", [0, 2])
def test_one_worker_equals_plain_and_resumes_bit_for_bit(toy_shards, tmp_path, stage):
    factory = ZeroFactory(stage, DEVICE)
    _, plain = train(STAGE_2, toy_shards, END)
    whole, records = train(STAGE_2, toy_shards, END, factory=factory)
    np.testing.assert_allclose(losses(records), losses(plain), rtol=1e-5)
    first, before = train(STAGE_2, toy_shards, 2e7, factory=factory)
    first.save(Store(tmp_path), "cut")
    start = resume(Store(tmp_path), "cut", STAGE_2, 3, first.data)
    second, after = train(STAGE_2, toy_shards, END, factory=factory, start=start)
    assert losses(before + after) == losses(records)
    assert second.counters == whole.counters
    assert_equal_states(second.engine.export_state(), whole.engine.export_state())
    for trainer in (whole, first, second):
        trainer.close()


def test_there_are_four_stages():
    with pytest.raises(UserError, match="no ZeRO stage 4"):
        ZeroFactory(4, DEVICE)


def _on_two_workers(check, directory: Path, *arguments) -> None:
    mp.spawn(_enter, (check, str(directory), arguments), nprocs=2)


def _enter(rank: int, check, directory: str, arguments) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    # A short timeout: workers that wait for each other in vain must not outlive their test.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=90),
    )
    check(Path(directory), *arguments)
    dist.destroy_process_group()


def _gradients(config, shards, factory) -> dict[str, np.ndarray]:
    """Gradient of the first step, read back from AdamW's first moment: m = (1 - beta1) g, unclipped."""
    unclipped = dataclasses.replace(config, clip_norm=1e9)
    trainer, _ = train(unclipped, shards, 0, factory=factory, micro_groups=1)
    trainer.run_trunk(trainer.next_step_flops())
    assert trainer.counters.step == 1
    state = trainer.engine.export_state()
    trainer.close()
    return {name: tensor.numpy() / (1 - config.beta1) for name, tensor in state.moment1.items()}


def _check_same_curve(directory: Path, shards_path: str) -> None:
    shards = Shards.open(shards_path)
    for config in (STAGE_2, WIDE):
        flops = 60 * Trainer(config, 3, TrainingData.of(shards), CPU).next_step_flops()
        plain, expected = train(config, shards, flops, micro_groups=1)
        assert len(expected) >= 50
        gradients = _gradients(config, shards, CPU)
        for stage in (1, 2, 3):
            factory = ZeroFactory(stage, DEVICE)
            trainer, records = train(config, shards, flops, factory=factory, micro_groups=1)
            trainer.close()
            assert trainer.counters == plain.counters
            if factory.rank == 0:
                np.testing.assert_allclose(losses(records), losses(expected), rtol=1e-4)
                gates = [[record.gates["pointer"] for record in found] for found in (records, expected)]
                np.testing.assert_allclose(*gates, rtol=1e-3)
            for name, gradient in _gradients(config, shards, factory).items():
                scale = np.abs(gradients[name]).max()
                np.testing.assert_allclose(gradient, gradients[name], atol=1e-5 * scale + 1e-9, err_msg=name)


@pytest.mark.slow
def test_two_workers_same_gradient_loss_and_cost_at_every_stage(toy_shards, tmp_path):
    _on_two_workers(_check_same_curve, tmp_path, str(toy_shards.path))


def _check_shared_catalogue(directory: Path, shards_path: str) -> None:
    shards = Shards.open(shards_path)
    plain, expected = train(STAGE_2, shards, RUNG)
    assert sum(record.stage == 2 for record in expected) >= 50
    weights = plain.engine.export_state().weight
    for stage in (0, 1, 3):
        factory = ZeroFactory(stage, DEVICE)
        trainer, records = train(STAGE_2, shards, RUNG, factory=factory, micro_groups=2, softmax="sharded")
        assert len(trainer.objective.items.rows_SD) <= shards.num_items // 2 + 1
        # Other groups share a micro-batch, and with it the slots of its windows.
        counters, alone = (dataclasses.replace(of.counters, hardware_flops=0) for of in (trainer, plain))
        assert counters == alone
        if factory.rank == 0:
            np.testing.assert_allclose(losses(records), losses(expected), rtol=1e-4)
        for name, weight in trainer.engine.export_state().weight.items():
            np.testing.assert_allclose(weight, weights[name], atol=1e-3 * float(weights[name].abs().max()))
        trainer.close()


@pytest.mark.slow
def test_two_workers_that_share_the_catalogue_train_the_same_curve(toy_shards, tmp_path):
    _on_two_workers(_check_shared_catalogue, tmp_path, str(toy_shards.path))


def _check_resume(directory: Path, shards_path: str) -> None:
    shards, store = Shards.open(shards_path), Store(directory / "store")
    for stage in (1, 2, 3):
        factory = ZeroFactory(stage, DEVICE)
        whole, records = train(STAGE_2, shards, END, factory=factory)
        first, before = train(STAGE_2, shards, 4e7, factory=factory)
        first.save(store, f"cut{stage}")
        start = resume(store, f"cut{stage}", STAGE_2, 3, first.data)
        second, after = train(STAGE_2, shards, END, factory=factory, start=start)
        assert losses(before + after) == losses(records)
        assert second.counters == whole.counters
        assert_equal_states(second.engine.export_state(), whole.engine.export_state())
        for trainer in (whole, first, second):
            trainer.close()


@pytest.mark.slow
def test_two_workers_resume_bit_for_bit(toy_shards, tmp_path):
    _on_two_workers(_check_resume, tmp_path, str(toy_shards.path))


class _NotANumber:
    def __init__(self, objective):
        self.objective, self.batch = objective, objective.batch

    def __call__(self, model, batch):
        loss, sums_2X2 = self.objective(model, batch)
        return loss * float("nan"), sums_2X2


def _check_middle(directory: Path, shards_path: str) -> None:
    shards, store = Shards.open(shards_path), Store(directory / "store")
    for stage in (1, 2, 3):
        factory = ZeroFactory(stage, DEVICE)
        start = resume(store, "plain", STAGE_1, 3, TrainingData.of(shards))
        trainer, records = train(STAGE_1, shards, 2 * END, factory=factory, start=start)
        trainer.save(store, f"zero{stage}")
        if factory.rank == 0:
            store.put(f"losses{stage}", " ".join(map(str, losses(records))).encode())
        if stage < 3:
            trainer.close()
    # A non-finite loss of one worker ends all of them.
    if factory.rank == 1:
        trainer._built = trainer.engine, _NotANumber(trainer.objective)
    with pytest.raises(DivergedError):
        trainer.run_trunk(3 * END)
    trainer.close()


@pytest.mark.slow
def test_plain_to_zero_on_two_workers_to_plain_is_one_curve_of_every_stage(toy_shards, tmp_path):
    store = Store(tmp_path / "store")
    _, expected = train(STAGE_1, toy_shards, 3 * END)
    first, before = train(STAGE_1, toy_shards, END)
    first.save(store, "plain")
    _on_two_workers(_check_middle, tmp_path, str(toy_shards.path))
    for stage in (1, 2, 3):
        middle = [float(loss) for loss in store.get(f"losses{stage}").decode().split()]
        start = resume(store, f"zero{stage}", STAGE_1, 3, first.data)
        _, after = train(STAGE_1, toy_shards, 3 * END, start=start)
        assert len(middle) + len(after) >= 50
        np.testing.assert_allclose([*losses(before), *middle, *losses(after)], losses(expected), rtol=1e-4)


def _check_row(directory: Path, shards_path: str) -> None:
    factory = ZeroFactory(1, DEVICE)
    row = run_rung(_task("zero"), Shards.open(shards_path), factory, Store(directory / "store"))
    assert (row["workers"], row["zero_stage"], row["engine"]) == (2, 1, "zero")
    assert factory.rank == 1 or (directory / "row").write_text(repr(row))


def _task(trial: str) -> RungTask:
    return RungTask(trial, trial, 0, RUNG, STAGE_1, 3, probes=(1e8,), validations=2)


@pytest.mark.slow
def test_row_of_two_workers_is_the_row_of_one(toy_shards, tmp_path):
    _on_two_workers(_check_row, tmp_path, str(toy_shards.path))
    row = eval((tmp_path / "row").read_text(), {"nan": float("nan")})
    plain = run_rung(_task("plain"), toy_shards, CPU, Store(tmp_path / "store"))
    for key in ("path_flops", "steps", "events", "unique_events"):
        assert row[key] == plain[key]
    for ours, theirs in ((row, plain), (row["probes"][0], plain["probes"][0])):
        assert ours["metrics"].keys() == theirs["metrics"].keys()
        assert ours["metrics"]["nll"] == pytest.approx(theirs["metrics"]["nll"], rel=1e-3)
    assert [seen["step"] for seen in row["validations"]] == [seen["step"] for seen in plain["validations"]]
    best = Store(tmp_path / "store")
    found, expected = (read_meta(best, f"trials/{trial}/checkpoints/best") for trial in ("zero", "plain"))
    assert found["validation"]["path_flops"] == expected["validation"]["path_flops"]
    np.testing.assert_allclose(found["nll_Q"], expected["nll_Q"], rtol=0.05)


def test_freeze_drops_only_the_embedders_optimizer_state():
    tensors = {"embedder.a": torch.ones(1), "context.b": torch.ones(1)}
    state = EngineState(dict(tensors), dict(tensors), dict(tensors), dict(tensors), 7).without({"embedder.a"})
    assert state.weight.keys() == tensors.keys()
    assert state.moment1.keys() == state.moment2.keys() == state.average.keys() == {"context.b"}
    assert state.steps == 7
