"""Training on one device, for benchmarks/gpu.py: speed, resume, precision. Needs pyarrow for its log.

The log is drawn here, without Ray: users who like one kind of item each, Zipf popularity, baskets.

U = users, E = events, V = items.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
import unittest.mock
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from benchmarks.gpu_scores import matmul_peak
from bfm.events.encoding import write_items
from bfm.events.fields import FittedField
from bfm.events.manifest import Manifest
from bfm.events.parts import write_part
from bfm.events.protocol import build_protocol
from bfm.events.repeats import training_repeats
from bfm.events.shards import Shards, finish
from bfm.files import Store
from bfm.training import engine as engine_module
from bfm.training.checkpoint import resume
from bfm.training.config import TrainConfig
from bfm.training.data import TrainingData
from bfm.training.engine import EngineFactory
from bfm.training.loop import Trainer
from bfm.training.records import StepRecord

KINDS = 64
MINUTE_MS = 60_000
WARM_STEPS, MEASURE_S = 4, 8.0


def write_log(folder: Path, users: int, events_per_user: int, items: int) -> None:
    """A finished shard set with its protocol."""
    rng = np.random.default_rng(0)
    events = users * events_per_user
    # An item's kind is its number modulo the kinds: four events of five are of the kind that their user likes.
    place_E = np.minimum(items - 1, np.floor(items ** rng.random(events)).astype(np.int64) - 1)
    liked_E = np.repeat(rng.integers(KINDS, size=users), events_per_user)
    own_E = np.minimum(items - 1, place_E // KINDS * KINDS + liked_E)
    raw_E = np.where(rng.random(events) < 0.8, own_E, place_E)
    step_UE = np.where(rng.random((users, events_per_user)) < 0.3, 0, rng.integers(1, 3000, (users, events_per_user)))
    time_UE = 1_700_000_000_000 + step_UE.cumsum(1) * MINUTE_MS
    train_end, valid_end = ((time_UE < np.quantile(time_UE, share)).sum(1) for share in (0.9, 0.95))
    train_E = (np.arange(events_per_user) < train_end[:, None]).ravel()
    raw_V, id_E = np.unique(raw_E, return_inverse=True)
    count_V = np.bincount(id_E, train_E, len(raw_V)).astype(np.int64)
    order_V = np.lexsort((raw_V, -count_V))
    rank_V = np.empty_like(order_V)
    rank_V[order_V] = np.arange(len(order_V))
    raw_V, count_V, item_E = raw_V[order_V], count_V[order_V], rank_V[id_E]
    offsets = np.arange(users + 1) * events_per_user
    keys = pa.array(np.arange(users)).cast(pa.string())
    write_part(
        folder,
        item=item_E,
        time=time_UE.ravel(),
        context={"channel": rng.integers(2, 5, events).astype(np.int32)},
        user_offsets=offsets,
        train_end=train_end,
        valid_end=valid_end,
        users=keys,
    )
    fields = (
        FittedField("item_id", "item", "hashed", rows=1 << 16, columns=2),
        FittedField("kind", "item", "categorical", rows=2 + KINDS),
        FittedField("channel", "context", "categorical", rows=5),
    )
    arrays = {
        "item_id": rng.integers(1, 1 << 16, (len(raw_V), 2)).astype(np.int32),
        "kind": (2 + raw_V % KINDS).astype(np.int32),
    }
    first_V = np.full(len(raw_V), np.iinfo(np.int64).max)
    np.minimum.at(first_V, item_E, time_UE.ravel())
    table = pa.table({"item": pa.array(raw_V).cast(pa.string()), "train_count": count_V, "first_time": first_V})
    write_items(folder, table, arrays, {})
    draft = Manifest(
        name="drawn",
        seed=0,
        users=users,
        events=events,
        items=len(raw_V),
        catalogue=int((count_V > 0).sum()),
        has_clock=True,
        split={"by": "time"},
        fields=fields,
        train_events=int(train_end.sum()),
        train_targets=int(np.maximum(train_end - 1, 0).sum()),
        time_range=(int(time_UE.min()), int(time_UE.max())),
        rows_read=events,
    )
    shards = Shards(folder, draft)
    build_protocol(shards, repeats=training_repeats(shards), queries=1000, filter_seen=False, seed=0)
    finish(folder, draft)


def config_of(params: float, tiny: bool, **options: object) -> TrainConfig:
    """2,048 positions in a group; a step of 32 to 128 thousand positions."""
    groups = 2 if tiny else {1e5: 16, 1e6: 32, 1e7: 64, 1e8: 64}[params]
    sizes = {"window": 16, "d_item": 16, "embedder_share": 0.1} if tiny else {"window": 512, "d_item": 64}
    values = {"params": params, "group_windows": 4, "groups_per_step": groups, "live_negatives": 64, **sizes, **options}
    return TrainConfig.from_dict(values)


def trainer_of(
    config: TrainConfig, shards: Path, device: str, micro_groups: int, **options: object
) -> tuple[Trainer, list[StepRecord]]:
    """A trainer and what its observer sees."""
    records: list[StepRecord] = []
    data, factory = TrainingData.of(Shards.open(shards)), EngineFactory(torch.device(device))
    options = {"micro_groups": micro_groups, "observer": records.append, **options}
    return Trainer(config, 0, data, factory, **options), records  # type: ignore[arg-type]


def run_steps(trainer: Trainer, steps: int) -> None:
    """So many optimizer steps of the trunk."""
    for _ in range(steps):
        trainer.run_trunk(trainer.counters.path_flops + trainer.next_step_flops())


def measure_speed(
    shards: Path, device: str, tiny: bool, params: float, negatives: int = 0
) -> Iterator[tuple[str, object]]:
    """Model FLOP/s of training over MEASURE_S seconds, data loading included; with negatives, of stage 2."""
    stage2 = {"freeze_at_flops": 1.0, "negatives": negatives} if negatives else {}
    # Positions of a micro-batch: as many as fill the device, in memory that the largest model leaves.
    micro_groups = 2 if tiny else 8 if params >= 1e8 else 16
    trainer, _ = trainer_of(config_of(params, tiny, **stage2), shards, device, micro_groups)
    run_steps(trainer, 1 if tiny else WARM_STEPS)
    begin, steps, begin_s = dataclasses.replace(trainer.counters), 0, time.perf_counter()
    while steps < 2 or (not tiny and time.perf_counter() - begin_s < MEASURE_S):
        # Several in one call, as in a run: only its last step is waited for.
        trainer.run_trunk(trainer.counters.path_flops + 10 * trainer.next_step_flops())
        steps = trainer.counters.step - begin.step
    elapsed_s = time.perf_counter() - begin_s
    done = {name: value - getattr(begin, name) for name, value in vars(trainer.counters).items() if "flops" in name}
    flops_per_s, computed_per_s = done["path_flops"] / elapsed_s, done["hardware_flops"] / elapsed_s
    yield "params", trainer.config.shape().params
    yield "events/s", (trainer.counters.events - begin.events) / elapsed_s
    yield "ms per step", 1e3 * elapsed_s / steps
    yield "model TFLOP/s", flops_per_s / 1e12
    peak_per_s = matmul_peak(device)
    yield "MFU", flops_per_s / peak_per_s
    # Of a packed window less is computed than C counts, of scores that are made twice more.
    yield "computed of peak", computed_per_s / peak_per_s
    if device == "cuda":
        yield "peak GB", torch.cuda.max_memory_allocated() / 2**30
    trainer.close()


def check_resume(shards: Path, device: str, tiny: bool) -> Iterator[tuple[str, object]]:
    """Whether steps before and after a checkpoint are those of an unbroken run, bit for bit, in both stages."""
    steps, config = (2, 2e3 if tiny else 1e6), {"dropout": 0.1, "averaging": True}
    for stage, more in ((1, {}), (2, {"freeze_at_flops": 1.0, "negatives": 64})):
        made = config_of(steps[1], tiny, **config, **more)
        whole, expected = trainer_of(made, shards, device, 2)
        run_steps(whole, 2 * steps[0])
        first, before = trainer_of(made, shards, device, 2)
        run_steps(first, steps[0])
        with tempfile.TemporaryDirectory() as folder:
            first.save(Store(folder), "cut")
            start = resume(Store(folder), "cut", made, 0, first.data)
        second, after = trainer_of(made, shards, device, 2, start=start)
        run_steps(second, steps[0])
        states = (vars(trainer.engine.export_state()) for trainer in (whole, second))
        left, right = ({key: value for key, value in state.items() if isinstance(value, dict)} for state in states)
        equal = all(torch.equal(left[part][name], right[part][name]) for part in left for name in left[part])
        curves = [record.loss for record in expected] == [record.loss for record in before + after]
        yield f"stage {stage} resumes bit for bit", bool(equal and curves)
        for trainer in (whole, first, second):
            trainer.close()


def compare_precisions(shards: Path, device: str, tiny: bool) -> Iterator[tuple[str, object]]:
    """The curves of one run in bfloat16 and in float32: how far apart, and how much each fell."""
    steps, curves = 6 if tiny else 200, {}
    for name, half in (("float32", False), ("bfloat16", True)):
        precision = torch.autocast(device, torch.bfloat16, enabled=half)
        with unittest.mock.patch.object(engine_module, "_precision", lambda _, precision=precision: precision):
            trainer, records = trainer_of(config_of(2e3 if tiny else 1e6, tiny), shards, device, 2 if tiny else 16)
            begin_s = time.perf_counter()
            run_steps(trainer, steps)
            yield f"{name}, s", time.perf_counter() - begin_s
            trainer.close()
        curves[name] = np.array([record.loss for record in records])
    apart = curves["bfloat16"] - curves["float32"]
    yield "steps", steps
    yield "first loss, difference in nats", float(apart[0])
    yield "mean loss of the last quarter, difference in nats", float(apart[-max(1, steps // 4) :].mean())
    yield "largest difference in nats", float(np.abs(apart).max())
    yield "fall of the loss in float32, nats", float(curves["float32"][0] - curves["float32"][-1])


def compare_deepspeed(shards: Path, device: str, tiny: bool) -> Iterator[tuple[str, object]]:
    """Losses of ZeRO stage 2 with one worker against the plain engine's. Raises ImportError without DeepSpeed."""
    import deepspeed  # noqa: F401

    from bfm.training.zero import ZeroFactory

    config = config_of(2e3 if tiny else 1e6, tiny)
    plain, expected = trainer_of(config, shards, device, 2)
    zero = Trainer(
        config,
        0,
        plain.data,
        ZeroFactory(2, torch.device(device)),
        micro_groups=2,
        observer=(records := list[StepRecord]()).append,
    )
    for trainer in (plain, zero):
        run_steps(trainer, 3)
    apart = max(abs(left.loss - right.loss) for left, right in zip(expected, records, strict=True))
    yield "largest difference in nats over 3 steps", apart
