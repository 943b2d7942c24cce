"""Validation on the way of a run: how good it is, where it was best, and whether it memorises.

In: per-query scores of the trunk or of the cooled end, always on the same first queries of the validation part.
Out: records for those who watch, and the best weights as a checkpoint that a worse validation never replaces, not even
one of a later call.

Q = headline queries that have an nll.
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bfm.errors import UserError
from bfm.files import Store
from bfm.ranking.baselines import baseline_metrics
from bfm.ranking.metrics import QueryScores, clustered_error, counted_values, summarise
from bfm.training.checkpoint import resume, save_checkpoint
from bfm.training.data import TrainingData
from bfm.training.engine import EngineState
from bfm.training.loop import Trainer
from bfm.training.records import Validation
from bfm.training.task import RungTask

WATCHED = ("nll", "recall@10", "ndcg@10")
"""Metrics of a validation; the first decides which is the best."""


class Watch:
    """The validations of one run; equal on all workers, of which rank 0 writes."""

    def __init__(self, task: RungTask, store: Store, data: TrainingData) -> None:
        """Measure the floors, and take up the best of earlier calls.

        Raises UserError where there is no query to validate on, or where the store holds the best of another run.
        """
        self.store, self.queries = store, task.validation_queries
        self.name = f"trials/{task.trial}/checkpoints/best"
        self.seen: list[Validation] = []
        self.best: Validation | None = None
        self.best_nll_Q = np.zeros(0)
        self.floors = measure_floors(data, self.queries)
        if store.exists(f"{self.name}/meta.json"):
            meta = resume(store, self.name, task.config, task.seed, data, cooled=True).meta
            self.best, self.best_nll_Q = Validation(**meta["validation"]), np.array(meta["nll_Q"])

    def see(self, trainer: Trainer, scores: QueryScores, weight: dict[str, Tensor]) -> Validation:
        """A validation of `weight` where the trainer stands; the weights are kept if it is the best."""
        scores = scores.first(self.queries)
        counted_Q, counters, found = counted_values(scores, "nll"), trainer.counters, summarise(scores)
        used_Q = ~np.isnan(counted_Q)
        nll_Q = counted_Q[used_Q]
        epochs = counters.events / trainer.order.targets_per_epoch
        validation = Validation(
            step=counters.step,
            phase=counters.phase,
            path_flops=counters.path_flops,
            epochs=epochs,
            train_loss=trainer.recent_loss,
            metrics={metric: found.metrics[metric] for metric in WATCHED},
            errors={metric: found.errors[metric] for metric in WATCHED if metric in found.errors},
            floors=self.floors,
            best_flops=counters.path_flops,
            best_epochs=epochs,
            best_nll=found.metrics["nll"],
        )
        validation = self._beside_best(validation, nll_Q, scores.user_Q[used_Q])
        self.seen.append(validation)
        if validation.is_best:
            self.best, self.best_nll_Q = validation, nll_Q
            if trainer.factory.rank == 0:
                told = {"validation": asdict(validation), "nll_Q": nll_Q.tolist()}
                save_checkpoint(self.store, self.name, EngineState(weight), {**trainer.meta(), **told})
        return validation

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: the validations of this call, the best of all calls, and the name of its checkpoint."""
        best = None if self.best is None else asdict(self.best)
        seen = [asdict(validation) for validation in self.seen]
        return {"validations": seen, "best": best, "best_model": None if best is None else self.name}

    def _beside_best(self, validation: Validation, nll_Q: NDArray[np.float64], user_Q: NDArray[np.int64]) -> Validation:
        """With what it says of the best before it: on the queries of both, where calls asked for different numbers."""
        if self.best is None:
            return validation
        both = min(len(nll_Q), len(self.best_nll_Q))
        rise_Q = nll_Q[:both] - self.best_nll_Q[:both]
        rise = float(rise_Q.mean())
        if rise < 0:
            return validation
        before, now = self.best.train_loss, validation.train_loss
        fall = None if before is None or now is None else before - now
        risen = dataclasses.replace(
            validation,
            best_flops=self.best.path_flops,
            best_epochs=self.best.epochs,
            best_nll=self.best.metrics["nll"],
            rise=rise,
            rise_error=clustered_error(rise_Q, user_Q[:both]),
            loss_fall=fall,
        )
        sure = validation.phase == "cooldown" or (bool(self.seen) and self.seen[-1].risen)
        return dataclasses.replace(risen, memorises=risen.risen and sure)


def measure_floors(data: TrainingData, queries: int) -> dict[str, dict[str, float]]:
    """The watched metrics of every floor on the first queries of the validation part; cached with the shard set.

    Raises UserError where no query of the part can have an nll.
    """
    measured: dict[str, dict[str, float]] = {}
    if len(data.protocol.queries("validation")):
        measured = baseline_metrics(data.shards, data.protocol, "validation", queries=queries)
    floors = {
        name: {metric: values[metric] for metric in WATCHED if metric in values} for name, values in measured.items()
    }
    if not any("nll" in values for values in floors.values()):
        raise UserError(
            "no headline query of the validation part has a known target",
            file=str(data.shards.path),
            fix="use a later or longer log, or `--validations 0`",
        )
    return floors
