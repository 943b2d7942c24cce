"""One run without a sweep: train a configuration to a budget, score a checkpoint, measure this machine's speed.

In: configurations, shards, a store. Out: the same rows that a sweep's ledger holds.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bfm.errors import UserError
from bfm.events.protocol import PARTS, Protocol
from bfm.events.shards import Shards
from bfm.files import Store
from bfm.objective.methods import check_method
from bfm.ranking.baselines import baseline_scores
from bfm.ranking.evaluate import evaluate
from bfm.ranking.metrics import QueryScores, check_k, summarise
from bfm.ranking.paired import paired_gap, read_scores
from bfm.training.checkpoint import load_model, read_meta
from bfm.training.config import TrainConfig
from bfm.training.data import TrainingData
from bfm.training.engine import EngineFactory
from bfm.training.loop import Trainer
from bfm.training.records import Observer
from bfm.training.rung import run_rung
from bfm.training.task import RungTask
from bfm.training.watch import measure_floors
from bfm.units import format_flops

TRIAL = "run"
SAVE_EVERY_S = 60.0
RunGroup = Callable[[Mapping[str, Any], str, str], dict[str, Any]]
"""(task, shards, storage) -> row: several workers, handed down by the caller who knows Ray."""


def train_single(
    config: TrainConfig,
    seed: int,
    shards: str,
    storage: str,
    *,
    flops: float,
    queries: int | None,
    scaling: Mapping[str, Any],
    validations: int = 0,
    observer: Observer | None = None,
    run_group: RunGroup | None = None,
) -> dict[str, Any]:
    """Train one configuration to `flops` (C), evaluate it, and return its row.

    A trunk that an earlier call left in `storage` is gone on from; so is a run that was killed in the middle.
    `validations` are evenly spaced along the trunk, with one more at the end; the best weights are kept.
    Raises UserError where the storage holds another configuration or is already past `flops`, where
    `scaling["softmax"]` is impossible, or where there is nothing to validate on.
    """
    store, softmax = Store(storage), str(scaling.get("softmax", "auto"))
    # A worker's device is its own matter; the rest is told before workers are started.
    freezes = config.freeze_at_flops is not None
    check_method(softmax, freezes=freezes, workers=int(scaling.get("workers", 1)), cuda=True, key="--softmax")
    task = RungTask(
        f"{TRIAL}-{flops:g}",
        TRIAL,
        0,
        flops,
        config,
        seed,
        micro_groups=int(scaling["micro_groups"]),
        softmax=softmax,
        evaluation_queries=queries,
        validations=validations,
    )
    if store.exists(f"{task.name('trunk')}/meta.json"):
        path_flops = read_meta(store, task.name("trunk"))["counters"]["path_flops"]
        if path_flops > task.trunk_flops:
            what = f"was trained to {format_flops(path_flops)} FLOPs and more, past the trunk of {format_flops(flops)}"
            raise UserError(what, file=storage, key="--flops", fix="give more FLOPs, or another --out")
        task = dataclasses.replace(task, resume_from=task.name("trunk"))
    if run_group is not None:
        if validations:
            # Before workers are started: none of them has to count, and a log without queries is refused.
            measure_floors(TrainingData.of(Shards.open(shards)), task.validation_queries)
        values = {**dataclasses.asdict(task), "config": config.as_dict(), "scaling": dict(scaling)}
        return run_group(values, shards, storage)
    return run_rung(task, Shards.open(shards), EngineFactory(), store, observer, save_every_s=SAVE_EVERY_S)


def evaluate_checkpoint(
    checkpoint: str,
    shards: str,
    part: str,
    queries: int | None,
    sampled_negatives: int | None = None,
    k: Sequence[int] = (10,),
) -> dict[str, Any]:
    """Metrics of a checkpoint on a part of the protocol, the floors on the same queries, and what was measured.

    `sampled_negatives` adds metrics against so many drawn items, named sampledN.*, which the floors do not have.
    `k`: lengths of lists. Raises UserError for a part that the protocol does not have, a checkpoint of other shards, or
    lists longer than the catalogue.
    """
    if part not in PARTS:
        raise UserError(f"no part {part!r}", key="--part", fix=f"one of {', '.join(PARTS)}")
    opened = Shards.open(shards)
    protocol = Protocol.load(opened)
    check_k(max(k), opened.num_catalogue)
    model, meta = load_model(checkpoint, opened)
    window = meta["config"]["window"]
    scores = evaluate(model, opened, protocol, part, window, k, queries, sampled_negatives=sampled_negatives)
    return _beside_floors(opened, part, queries, k, scores)


def row_evaluation(row: Mapping[str, Any], storage: str, shards: str, queries: int | None) -> dict[str, Any]:
    """The validation metrics of a row that `train_single` left in a storage, in the form of `evaluate_checkpoint`."""
    scores = read_scores(Store(storage), row["scores"])
    found = _beside_floors(Shards.open(shards), "validation", queries, (10,), scores)
    return {**found, "metrics": dict(row["metrics"]), "errors": dict(row["errors"])}


def _beside_floors(
    shards: Shards, part: str, queries: int | None, k: Sequence[int], scores: QueryScores
) -> dict[str, Any]:
    """Metrics with the floors on the same queries, the differences from them, and what was measured."""
    protocol, evaluation = Protocol.load(shards), summarise(scores)
    floors = baseline_scores(shards, protocol, part, k, queries)
    return {
        "part": part,
        "metrics": evaluation.metrics,
        "errors": evaluation.errors,
        "queries": len(protocol.queries(part)[:queries]),
        "catalogue": shards.num_catalogue,
        "filter_seen": protocol.filter_seen,
        "seen_rule": protocol.seen_rule,
        "protocol_hash": protocol.hash,
        "baselines": {floor: summarise(of_floor).metrics for floor, of_floor in floors.items()},
        "against_baselines": {
            floor: {
                metric: dataclasses.asdict(gap)
                for metric in evaluation.metrics
                if (gap := paired_gap(scores, of_floor, metric)) is not None
            }
            for floor, of_floor in floors.items()
        },
    }


MEASURE_S = 10.0
"""Enough to tell a machine's speed to some percent."""


def measure_speed(config: TrainConfig, shards: Shards, measure_s: float) -> float:
    """Training FLOP/s of one plain worker on this machine for a configuration, over about `measure_s` seconds."""
    trainer = Trainer(config, 0, TrainingData.of(shards), EngineFactory())
    try:
        # The first step pays for caches and allocations.
        trainer.run_trunk(trainer.next_step_flops())
        begin_s, begin_flops = time.monotonic(), trainer.counters.path_flops
        while True:
            # Far enough for a step, and at a freeze for stage 2 to begin.
            ahead_flops = max(trainer.next_step_flops(), trainer.catalogue_flops + 1)
            trainer.run_trunk(trainer.counters.path_flops + ahead_flops)
            elapsed_s = time.monotonic() - begin_s
            if elapsed_s > measure_s:
                return (trainer.counters.path_flops - begin_flops) / elapsed_s
    finally:
        trainer.close()
