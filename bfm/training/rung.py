"""One task of a sweep: train a trial's trunk to a rung, branch off, cool down, evaluate, and tell it as one row.

In: a task, the shards, an engine factory, the sweep's store. Out: the ledger row, the trunk's checkpoint (promotion
goes on from it) and the cooled weights. The same code runs in one process and on every rank of a worker group.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from bfm.errors import CorruptError, DivergedError, InfeasibleError, UserError
from bfm.events.shards import Shards
from bfm.files import Store, parent_store
from bfm.ranking.evaluate import evaluate
from bfm.ranking.metrics import QueryScores, merge
from bfm.ranking.paired import scores_object
from bfm.training.checkpoint import Checkpoint, read_meta, resume, save_checkpoint
from bfm.training.data import TrainingData
from bfm.training.engine import EngineFactory, EngineState
from bfm.training.journal import Journal, YieldError
from bfm.training.loop import Trainer
from bfm.training.records import Observer, StepRecord
from bfm.training.row import measured, trained
from bfm.training.schedule import MIN_STEPS, TOLERANCE, check_rung
from bfm.training.task import PROBE_QUERIES, Account, RungTask
from bfm.training.watch import Watch
from bfm.units import format_flops

Status = Literal["ok", "diverged", "oom"]
_NOTHING_KEPT = {
    "checkpoint": None,
    "checkpoint_sha256": None,
    "checkpoint_bytes": 0,
    "model": None,
    "model_bytes": 0,
}
_BYTES_PER_NUMBER, _BYTES_OF_AVERAGES, _BYTES_OF_BEST = 36, 12, 4
"""The trunk's checkpoint, an in-rung one and the next of those, which stands before the last goes: each a weight and
two moments, where there are averages a fourth number; and the best weights that validations have seen."""


def run_rung(
    task: RungTask,
    shards: Shards,
    factory: EngineFactory,
    store: Store,
    observer: Observer | None = None,
    *,
    save_every_s: float = math.inf,
    assigned_at_s: float | None = None,
    should_yield: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train and evaluate one task; collective over the factory's workers, rank 0 writes and calls the observer.

    Checkpoints go into the store under trials/<trial>/checkpoints/, every `save_every_s` also inside the rung, so that
    a killed worker group goes on from there. `warm_start_s` counts from `assigned_at_s` (wall clock; default: now).
    `should_yield` is asked on every worker after every step; where one says yes, or the task's `stop` object asks for
    it (bfm.training.journal), the task ends after a checkpoint.

    Returns the ledger row (equal on all ranks, timings apart); its key `probes` holds the probe rows. Of a task with
    validations it also has these, and `best`, the one with the lowest nll.

    Raises InfeasibleError where the rung is not 100 steps or cannot be met within 1 %, UserError where the checkpoint
    to resume from is another run's or the workers do not divide the batch, CorruptError where one is damaged,
    YieldError where the task was asked to end, FencedError where it was given up.
    """
    assigned_at_s = assigned_at_s or time.time()
    return _RungRun(task, shards, factory, store, observer, save_every_s, assigned_at_s, should_yield).run()


@dataclass
class _RungRun:
    """The state of one `run_rung`."""

    task: RungTask
    shards: Shards
    factory: EngineFactory
    store: Store
    observer: Observer | None
    save_every_s: float
    assigned_at_s: float
    should_yield: Callable[[], bool]
    warm_start_s: float = 0.0
    """From assignment to the first optimizer step."""
    begun_s: float = field(default_factory=time.monotonic)
    """When the first step began."""
    eval_s: float = 0.0
    """Of `begun_s` to now; the rest is training, checkpoints included."""
    watch: Watch | None = None
    trunk: str | None = None
    """Name of the checkpoint at the trunk's end, once it stands; an earlier attempt may have written it."""
    probe_rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        task = self.task
        if task.probes and not task.config.averaging:
            raise UserError("probes score averaged weights", key="averaging", fix="set `averaging: true`")
        self.data = TrainingData.of(self.shards)
        self.journal = Journal(task, self.store)
        self.trainer = Trainer(
            task.config,
            task.seed,
            self.data,
            self.factory,
            observer=self._observe if self.observer is not None and self.factory.rank == 0 else None,
            after_step=self._after_step,
            after_freeze=lambda: self._allow_next_step(self.trainer.flops_per_s),
            micro_groups=task.micro_groups,
            softmax=task.softmax,
            start=self._start(),
        )
        self.saved_s = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Train, evaluate, tell."""
        try:
            if self.journal.ran_out_of_memory():
                return self._row("rung", "oom", None)
            self._check_feasible()
            if self.task.validations:
                self.watch = Watch(self.task, self.store, self.data)
            self._check_room()
            self._allow_next_step()
            self.warm_start_s, self.begun_s = time.time() - self.assigned_at_s, time.monotonic()
            return self._train_and_evaluate()
        except DivergedError:
            return self._row("rung", "diverged", None)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if self.factory.world_size > 1:
                # The other ranks wait in a collective: the group must die, and find this mark when it restarts.
                self.journal.note_out_of_memory()
                raise
            return self._row("rung", "oom", None)
        finally:
            self.trainer.close()
            if self.factory.rank == 0:
                self.journal.close(self._spent_flops())

    def _train_and_evaluate(self) -> dict[str, Any]:
        task, trainer = self.task, self.trainer
        if trainer.counters.phase == "trunk":
            stops = [(c, self._probe) for c in task.probes] + [(c, self._validate) for c in task.validation_flops]
            for stop_flops, score in sorted(stops, key=lambda stop: stop[0]):
                if trainer.counters.path_flops < stop_flops <= task.trunk_flops:
                    trainer.run_trunk(stop_flops)
                    score()
            trainer.run_trunk(task.trunk_flops)
            self.trunk = task.name("trunk")
            trainer.save(self.store, self.trunk)
        trainer.run_cooldown(task.rung_flops)
        self._check_met()
        state = trainer.engine.export_state()
        if self.factory.rank == 0:
            save_checkpoint(self.store, task.name("model"), EngineState(state.weight), trainer.meta())
        scores = self._score(state.weight, task.evaluation_queries)
        self._watch(scores, state.weight)
        row = self._row("rung", "ok", scores)
        if self.factory.rank == 0:
            self.journal.clear()
        return row

    def _probe(self) -> None:
        weight = self.trainer.engine.export_state().averaged_weight
        self.probe_rows.append(self._row("probe", "ok", self._score(weight, PROBE_QUERIES)))

    def _validate(self) -> None:
        weight = self.trainer.engine.export_state().averaged_weight
        self._watch(self._score(weight, self.task.validation_queries), weight)

    def _watch(self, scores: QueryScores, weight: dict[str, Tensor]) -> None:
        """Tell the watch, if there is one, and the observer what was scored."""
        if self.watch is not None:
            validation = self.watch.see(self.trainer, scores, weight)
            if self.observer is not None and self.factory.rank == 0:
                self.observer(validation)

    def _observe(self, record: StepRecord) -> None:
        self.journal.show(record)
        if self.observer is not None:
            self.observer(record)

    def _score(self, weight: dict[str, Tensor], queries: int | None) -> QueryScores:
        """Scores of the first validation queries under these weights; queries are split over ranks."""
        model = self.trainer.plain_model(weight)
        begin_s = time.monotonic()
        scores: QueryScores | DivergedError
        try:
            scores = evaluate(
                model,
                self.data.shards,
                self.data.protocol,
                "validation",
                self.task.config.window,
                queries=queries,
                rank=self.factory.rank,
                world_size=self.factory.world_size,
                pi_V=self.trainer.objective.pi_V,
            )
        except DivergedError as error:
            # Only some ranks may hold such a query, and the others wait for this one.
            scores = error
        parts: list[QueryScores] = []
        for part in self.factory.gather(scores):
            if isinstance(part, DivergedError):
                raise part
            parts.append(part)
        self.eval_s += time.monotonic() - begin_s
        return merge(parts)

    def _start(self) -> Checkpoint | None:
        """In-rung progress of this task if there is any, else the lower rung's trunk, stage 1's, or nothing."""
        task = self.task
        own = self._progress(self.journal.checkpoint)
        if own is not None:
            return own
        if task.progress is not None:
            earlier = self._progress(task.progress)
            if earlier is None:
                # No more was reserved than what that checkpoint had left to do, so the driver must decide anew.
                raise YieldError(Account())
            return earlier
        if task.resume_from is not None:
            return resume(self.store, task.resume_from, task.config, task.seed, self.data)
        if task.stage1 is not None:
            return resume(*parent_store(task.stage1), task.config, task.seed, self.data)
        return None

    def _progress(self, name: str) -> Checkpoint | None:
        """An in-rung checkpoint of this rung's way; None where there is none or it is damaged."""
        try:
            meta = read_meta(self.store, name)
        except (UserError, CorruptError):
            return None
        # The trunk leads to every rung; a branch to its own alone (one run trained on to ever larger budgets).
        if meta["counters"]["phase"] != "trunk" and meta["rung_flops"] != self.task.rung_flops:
            return None
        # That of a larger budget may be past this trunk's end, where a smaller one's checkpoint is not.
        if meta["counters"]["phase"] == "trunk" and meta["counters"]["path_flops"] > self.task.trunk_flops:
            return None
        try:
            found = resume(self.store, name, self.task.config, self.task.seed, self.data, cooled=True)
        except CorruptError:
            return None
        self.probe_rows, self.trunk = found.meta["probes"], found.meta["trunk"]
        return found

    def _check_feasible(self) -> None:
        trainer, config = self.trainer, self.task.config
        begins_stage2 = self.task.stage1 is not None and trainer.counters.stage == 1
        if trainer.counters.step > 0 and not begins_stage2:
            # What was feasible at a lower rung is feasible at this one, as long as this one is not behind us.
            if trainer.counters.phase == "trunk" and trainer.counters.path_flops > self.task.trunk_flops:
                raise UserError(
                    f"the checkpoint is at {format_flops(trainer.counters.path_flops)} FLOPs, past the end of the "
                    f"trunk of rung {format_flops(self.task.rung_flops)}",
                    key="resume_from",
                    fix="resume from a lower rung's checkpoint",
                )
            return
        step_flops, stage2_step_flops = trainer.mean_step_flops()
        check_rung(
            self.task.rung_flops,
            step_flops=step_flops,
            cooldown_fraction=config.cooldown_fraction,
            freeze_at_flops=config.freeze_at_flops,
            catalogue_flops=0.0 if stage2_step_flops is None else trainer.catalogue_flops,
            stage2_step_flops=stage2_step_flops,
        )

    def _check_met(self) -> None:
        counters, rung_flops = self.trainer.counters, self.task.rung_flops
        # A step that is dearer than the mean may end a run by itself, though no more than itself before C.
        allowed = max(TOLERANCE * rung_flops, min(self.trainer.next_step_flops(), 2 * TOLERANCE * rung_flops))
        if counters.step < MIN_STEPS or counters.path_flops < rung_flops - allowed:
            raise InfeasibleError(
                f"rung {format_flops(rung_flops)} ended at {format_flops(counters.path_flops)} FLOPs after "
                f"{counters.step} steps",
                key="groups_per_step",
                fix="use a smaller batch or model, or a higher rung",
            )

    def _row(self, kind: str, status: Status, scores: QueryScores | None) -> dict[str, Any]:
        task, succeeded = self.task, status == "ok" and kind == "rung"
        return {
            "trial": task.trial,
            "rung": task.rung,
            "rung_flops": task.rung_flops,
            "seed": task.seed,
            "config": task.config.as_dict(),
            "kind": kind,
            "status": status,
            **trained(self.trainer),
            **measured(scores),
            "train_s": time.monotonic() - self.begun_s - self.eval_s,
            "eval_s": self.eval_s,
            "warm_start_s": self.warm_start_s,
            "task_flops": self._spent_flops(),
            **(self._kept() if succeeded else _NOTHING_KEPT),
            "scores": self._publish_scores(scores) if succeeded and scores is not None else None,
            **({"probes": self.probe_rows} if kind == "rung" else {}),
            **(self.watch.as_dict() if kind == "rung" and self.watch is not None else {}),
        }

    def _publish_scores(self, scores: QueryScores) -> str:
        """What pairs this row with others of the sweep; it stays when trunks are evicted."""
        name, data = scores_object(self.task.name("scores"), scores)
        if self.factory.rank == 0:
            self.store.put(name, data)
        return name

    def _kept(self) -> dict[str, Any]:
        """What a row says of its trunk and its cooled weights. Rank 0 wrote both before any rank's evaluation ended."""
        assert self.trunk is not None, "a rung's row comes after its trunk"
        model = self.task.name("model")
        trunk = read_meta(self.store, self.trunk)
        return {
            "checkpoint": self.trunk,
            "checkpoint_sha256": trunk["state_sha256"],
            "checkpoint_bytes": int(trunk["state_bytes"]),
            "model": model,
            "model_bytes": int(read_meta(self.store, model)["state_bytes"]),
        }

    def _after_step(self) -> None:
        """On every rank; rank 0's clock decides for all of them when to save."""
        save_due, stop_due = False, self.should_yield()
        if self.factory.rank == 0:
            save_due = time.monotonic() - self.saved_s >= self.save_every_s
            stop_due = stop_due or self.journal.stop_asked.is_set()
        saves, stops = self.factory.all_reduce_sum([int(save_due), int(stop_due)])
        if saves or stops:
            self._save_progress()
        if stops:
            path_flops = self.trainer.counters.path_flops
            raise YieldError(Account(self._spent_flops(), self.journal.checkpoint, path_flops))
        self._allow_next_step(self.trainer.flops_per_s)

    def _save_progress(self) -> None:
        extra = {"rung_flops": self.task.rung_flops, "probes": self.probe_rows, "trunk": self.trunk}
        self.trainer.save(self.store, self.journal.checkpoint, extra)
        if self.factory.rank == 0:
            self.journal.saved(self.trainer.counters.path_flops)
        self.saved_s = time.monotonic()

    def _check_room(self) -> None:
        """Raise OSError where the disk has no room for the task's checkpoints, before anything is trained."""
        if self.factory.rank or not self.store.is_local:
            return
        cost = self.trainer.cost
        numbers = self.task.config.shape().params + cost.stem_params + cost.table_params
        bytes_per_number = _BYTES_PER_NUMBER + _BYTES_OF_AVERAGES * self.task.config.averaging
        needed_bytes = (bytes_per_number + _BYTES_OF_BEST * (self.task.validations > 0)) * numbers
        folder = self.store.path("")
        folder.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(folder).free
        if free_bytes < needed_bytes:
            what = f"{free_bytes:,} bytes are free, the task's checkpoints need {needed_bytes:,}"
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {what}", str(folder))

    def _allow_next_step(self, flops_per_s: float = 0.0) -> None:
        """Nothing is trained before rank 0's account covers it; the others wait for rank 0 in the step."""
        freezes = self.trainer.counters.stage == 1 and self.task.config.freeze_at_flops is not None
        next_flops = self.trainer.next_step_flops() + (self.trainer.catalogue_flops if freezes else 0)
        if self.factory.rank == 0:
            self.journal.allow(self._spent_flops() + next_flops, flops_per_s)

    def _spent_flops(self) -> int:
        return self.journal.found.spent_flops + self.trainer.spent_flops


def _is_out_of_memory(error: BaseException) -> bool:
    # PyTorch's CPU allocator raises a bare RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
