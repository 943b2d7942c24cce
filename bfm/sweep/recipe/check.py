"""A recipe held against the run that it foretold: train it, compare, and write the answer into the sweep's ledger.

Enters: a recipe, the sweep whose sizes it rests on, the shards. Leaves: one `check` record; the run's checkpoints
under checks/ of the sweep, from where a killed check goes on. The FLOPs of a check are not the sweep's: they are not
under its cap, and no decision of its policy sees them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from bfm.errors import UserError
from bfm.events.protocol import Protocol
from bfm.events.shards import Shards
from bfm.files import Store
from bfm.laws.frontier import metric_error, metric_value
from bfm.sweep.ledger.lease import Lease
from bfm.sweep.ledger.ledger import Ledger, read_state
from bfm.sweep.ledger.state import Record, SweepState
from bfm.sweep.recipe.evidence import Swept
from bfm.sweep.recipe.recipe import Recipe
from bfm.training.config import TrainConfig
from bfm.training.records import Observer
from bfm.training.single import train_single

FOLDER = "checks"


def check_recipe(
    recipe: Recipe, sizes: Swept, shards: str, *, seed: int = 0, observer: Observer | None = None
) -> Record:
    """Train the recipe to its C with one plain worker, score the sweep's queries, and append the `check` record.

    A run that was killed goes on from its last checkpoint; one that stands in the ledger is not trained again, and its
    first answer stays. Raises UserError where another process writes the ledger,
    where the shards' protocol is not that of the sweep's rows, or where training diverged, ran out of memory,
    or has no value of the metric: nothing is recorded then.
    """
    hash_here = Protocol.load(Shards.open(shards)).hash
    if recipe.protocol_hash not in (None, hash_here):
        raise UserError(
            f"its protocol {hash_here[:12]} is not that of the sweep's rows ({str(recipe.protocol_hash)[:12]})",
            file=shards,
            key="--shards",
            fix="name the shard set that the sweep was run on",
        )
    store = Store(sizes.folder)
    lease = Lease.acquire(store)
    try:
        ledger = Ledger(store, lease)
        folder = run_folder(recipe, seed)
        known = [check for check in SweepState.fold(ledger.replay.records).checks if check["folder"] == folder]
        if (answer := _answer(known, folder, recipe.metric)) is not None:
            return answer
        trained = {**known[0], "task_flops": 0, "eval_flops": 0} if known else None
        row = trained or _train(recipe, sizes, shards, store.child(folder).uri, seed, observer)
        _check_measured(recipe, row, store.child(folder).uri)
        record = check_record(recipe, row, folder, seed)
        ledger.append([record])
        return record
    finally:
        lease.release()


def standing_check(recipe: Recipe, sizes: Swept, seed: int) -> Record | None:
    """The answer that the ledger holds of the same run and metric already."""
    return _answer(read_state(Store(sizes.folder)).checks, run_folder(recipe, seed), recipe.metric)


def _answer(checks: Iterable[Record], folder: str, metric: str) -> Record | None:
    return next((one for one in checks if (one["folder"], one["metric"]) == (folder, metric)), None)


def run_folder(recipe: Recipe, seed: int) -> str:
    """Where in the sweep's storage the run of a check stands: equal exactly for equal runs."""
    fingerprint = TrainConfig.from_dict(recipe.config).fingerprint
    return f"{FOLDER}/{recipe.flops:g}-{fingerprint[:12]}-seed{seed}"


def check_record(recipe: Recipe, row: Mapping[str, Any], folder: str, seed: int) -> Record:
    """What the ledger keeps: prediction, measurement, and whether the one held the other."""
    measured, error = metric_value(row, recipe.metric), metric_error(row, recipe.metric)
    predicted = recipe.predicted
    return {
        "kind": "check",
        "flops": recipe.flops,
        "metric": recipe.metric,
        "part": "validation",
        "seed": seed,
        "predicted": predicted.as_dict(),
        "predicted_by": recipe.predicted_by,
        "measured": measured,
        "error": error if math.isfinite(error) else None,
        "inside": predicted.low <= measured <= predicted.high,
        "flops_beyond": recipe.flops_beyond,
        "params": row["params"],
        "events": row["events"],
        "epochs": recipe.epochs,
        "config": dict(recipe.config),
        "metrics": _finite(row["metrics"]),
        "errors": _finite(row["errors"]),
        "path_flops": row["path_flops"],
        "task_flops": row["task_flops"],
        "eval_flops": row["eval_flops"],
        "train_s": row["train_s"],
        "code_version": row["code_version"],
        "protocol_hash": row["protocol_hash"],
        "shards_hash": row["shards_hash"],
        "device": row["device"],
        "folder": folder,
        "model": row["model"],
    }


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _train(
    recipe: Recipe, sizes: Swept, shards: str, storage: str, seed: int, observer: Observer | None
) -> Mapping[str, Any]:
    tier = sizes.spec.tiers_at(recipe.flops, recipe.params.estimate)[0]
    return train_single(
        TrainConfig.from_dict(recipe.config),
        seed,
        shards,
        storage,
        flops=recipe.flops,
        queries=sizes.spec.data.evaluation_queries,
        scaling={"micro_groups": tier.micro_groups},
        observer=observer,
    )


def _check_measured(recipe: Recipe, row: Mapping[str, Any], storage: str) -> None:
    if row.get("status", "ok") != "ok":
        raise UserError(
            f"the run of the recipe {row['status']} at {row['path_flops']:.3g} FLOPs",
            file=storage,
            fix="check a smaller C, or train it on a larger machine with `bfm train`",
        )
    if not math.isfinite(metric_value(row, recipe.metric)):
        raise UserError(f"the run of the recipe has no {recipe.metric}", file=storage, fix="check another --metric")
