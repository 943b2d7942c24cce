"""One task of a sweep: train a trial's trunk to a rung, branch off, cool down, evaluate, and tell it as one row.

In: a task, the shards, an engine factory, the sweep's store. Out: the ledger row, the trunk's checkpoint (promotion
goes on from it) and the cooled weights. The same code runs in one process and on every rank of a worker group.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from bfm.errors import CorruptError, DivergedError, InfeasibleError, UserError
from bfm.events.shards import Shards
from bfm.files import Store, parent_store
from bfm.model.two_part import TwoPartModel
from bfm.ranking.evaluate import QueryScores, evaluate, merge, summarise
from bfm.ranking.paired import scores_object
from bfm.training.checkpoint import Checkpoint, load_checkpoint, read_meta, save_checkpoint
from bfm.training.config import TrainConfig
from bfm.training.data import TrainingData
from bfm.training.engine import EngineFactory, EngineState
from bfm.training.loop import Observer, StepRecord, Trainer, resume
from bfm.training.row import Timing, build_row
from bfm.training.schedule import MIN_STEPS, TOLERANCE, check_rung, trunk_flops
from bfm.units import format_flops

PROBE_QUERIES = 1_000
"""A probe scores the first so many queries of the validation part: a nested, user-stratified subset."""
_JOURNAL_EVERY_S = 1.0

Status = Literal["ok", "diverged", "oom"]


@dataclass(frozen=True)
class RungTask:
    """What to train. `config` and `seed` say what the trunk is, `rung_flops` where the row is taken."""

    task_id: str
    trial: str
    rung: int
    rung_flops: float
    config: TrainConfig
    seed: int
    resume_from: str | None = None
    """Trunk checkpoint of a lower rung (a name in the store); None starts at `stage1`."""
    stage1: str | None = None
    """Stage-1 trunk of another run (a folder or URI) that stage 2 begins with; None starts at step 0."""
    probes: tuple[float, ...] = ()
    """C values at which the trunk's averaged weights are scored on the way."""
    micro_groups: int = 1
    """Groups per micro-batch, at most; the largest divisor of a worker's groups below it is used."""
    softmax: str = "auto"
    """How the loss is computed (bfm.objective.methods)."""
    evaluation_queries: int | None = None
    """The first so many validation queries are scored; None: all."""

    @classmethod
    def from_task(cls, task: Mapping[str, Any]) -> RungTask:
        """From a sweep's task as a dict; what belongs to the sweep alone is left out."""
        return cls(
            task_id=str(task["task_id"]),
            trial=str(task["trial"]),
            rung=int(task["rung"]),
            rung_flops=float(task["rung_flops"]),
            config=TrainConfig.from_dict(task["config"]),
            seed=int(task["seed"]),
            resume_from=task.get("resume_from"),
            stage1=task.get("stage1"),
            probes=tuple(float(c) for c in task.get("probes", ())),
            micro_groups=int(task.get("scaling", {}).get("micro_groups", 1)),
            softmax=str(task.get("scaling", {}).get("softmax", "auto")),
            evaluation_queries=task.get("evaluation_queries"),
        )

    def name(self, what: str) -> str:
        """Name of an object of this task in the store."""
        return f"trials/{self.trial}/checkpoints/rung{self.rung}-{what}"


def run_rung(
    task: RungTask,
    shards: Shards,
    factory: EngineFactory,
    store: Store,
    observer: Observer | None = None,
    *,
    save_every_s: float = math.inf,
    assigned_at_s: float | None = None,
) -> dict[str, Any]:
    """Train and evaluate one task; collective over the factory's workers, rank 0 writes.

    Args:
        task: what to train.
        shards: opened shard set.
        factory: engine and workers.
        store: the sweep's store; checkpoints go under trials/<trial>/checkpoints/.
        observer: called on rank 0 after every step.
        save_every_s: also save inside the rung, so that a killed worker group goes on from there.
        assigned_at_s: wall-clock time of the task's assignment (default: now), for `warm_start_s`.

    Returns:
        The ledger row (equal on all ranks, timings apart); its key `probes` holds the probe rows.

    Raises:
        InfeasibleError: the rung is not 100 steps, or cannot be met within 1 %.
        UserError: the checkpoint to resume from is another run's, or the workers do not divide the batch.
        CorruptError: a checkpoint or shard is damaged.
    """
    run = _RungRun(task, shards, factory, store, observer, save_every_s, assigned_at_s or time.time())
    return run.run()


def split_rows(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rung row without its probes, then the probe rows: what a ledger takes."""
    return [{key: value for key, value in row.items() if key != "probes"}, *row.get("probes", [])]


class _RungRun:
    """The state of one `run_rung`."""

    def __init__(
        self,
        task: RungTask,
        shards: Shards,
        factory: EngineFactory,
        store: Store,
        observer: Observer | None,
        save_every_s: float,
        assigned_at_s: float,
    ) -> None:
        if task.probes and not task.config.averaging:
            raise UserError("probes score averaged weights", key="averaging", fix="set `averaging: true`")
        self.task, self.factory, self.store, self.observer = task, factory, store, observer
        self.data = TrainingData.of(shards)
        self.journal = _Journal(task, store) if math.isfinite(save_every_s) else None
        start = self._start()
        self.spent_before_flops = 0
        if self.journal:
            # The journal is up to a second old; the checkpoint may be newer.
            in_checkpoint = {} if start is None else start.meta.get("progress", {})
            self.spent_before_flops = max(self.journal.read_spent(), self.journal.own_spent(in_checkpoint))
        self.timing = Timing()
        self.assigned_at_s = assigned_at_s
        self.probe_rows: list[dict[str, Any]] = []
        self.trainer = Trainer(
            task.config,
            task.seed,
            self.data,
            factory,
            observer=self._observe,
            micro_groups=task.micro_groups,
            softmax=task.softmax,
            start=start,
        )
        if self.journal:
            self.trainer.on_save_due, self.trainer.save_every_s = self._save_progress, save_every_s

    def run(self) -> dict[str, Any]:
        """Train, evaluate, tell."""
        try:
            if self._ran_out_of_memory():
                return self._row("rung", "oom", None)
            self._check_feasible()
            self.timing.begin(self.assigned_at_s)
            return self._train_and_evaluate()
        except DivergedError:
            return self._row("rung", "diverged", None)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if self.factory.world_size > 1:
                # The other ranks wait in a collective: the group must die, and find this mark when it restarts.
                self.store.put(self.task.name("oom.json"), json.dumps({"task_id": self.task.task_id}).encode())
                raise
            return self._row("rung", "oom", None)
        finally:
            self.trainer.close()

    def _train_and_evaluate(self) -> dict[str, Any]:
        task, trainer = self.task, self.trainer
        trunk_end = trunk_flops(task.rung_flops, task.config.cooldown_fraction)
        if trainer.counters.phase == "trunk":
            for probe_flops in sorted(task.probes):
                if trainer.counters.path_flops < probe_flops <= trunk_end:
                    trainer.run_trunk(probe_flops)
                    self._probe()
            trainer.run_trunk(trunk_end)
            trainer.save(self.store, task.name("trunk"))
        trainer.run_cooldown(task.rung_flops)
        self._check_met()
        state = trainer.engine.export_state()
        if self.factory.rank == 0:
            save_checkpoint(self.store, task.name("model"), EngineState(state.weight), trainer.meta())
        row = self._row("rung", "ok", self._evaluate(trainer.plain_model(state), task.evaluation_queries))
        if self.journal and self.factory.rank == 0:
            self.journal.clear()
        return row

    def _probe(self) -> None:
        model = self.trainer.plain_model(self.trainer.engine.export_state(), averaged=True)
        self.probe_rows.append(self._row("probe", "ok", self._evaluate(model, PROBE_QUERIES)))

    def _evaluate(self, model: TwoPartModel, queries: int | None) -> QueryScores:
        """Validation scores of a plain model, the same on all ranks; queries are split over them."""
        self.timing.pause()
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
                candidates=self.trainer.objective.evaluation_candidates(self.data.shards.seed),
            )
        except DivergedError as error:
            # Only some ranks may hold such a query, and the others wait for this one.
            scores = error
        parts: list[QueryScores] = []
        for part in self.trainer.engine.gather(scores):
            if isinstance(part, DivergedError):
                raise part
            parts.append(part)
        self.timing.resume()
        return merge(parts)

    def _start(self) -> Checkpoint | None:
        """In-rung progress of this very task if there is any, else the lower rung's trunk, stage 1's, or nothing."""
        task = self.task
        progress = self.journal.latest() if self.journal else None
        if progress is not None:
            return resume(self.store, progress, task.config, task.seed, self.data, phase=None)
        if task.resume_from is not None:
            return resume(self.store, task.resume_from, task.config, task.seed, self.data)
        if task.stage1 is not None:
            return resume(*parent_store(task.stage1), task.config, task.seed, self.data)
        return None

    def _check_feasible(self) -> None:
        trainer, config = self.trainer, self.task.config
        begins_stage2 = self.task.stage1 is not None and trainer.counters.stage == 1
        if trainer.counters.step > 0 and not begins_stage2:
            # What was feasible at a lower rung is feasible at this one, as long as this one is not behind us.
            trunk_end = trunk_flops(self.task.rung_flops, config.cooldown_fraction)
            if trainer.counters.phase == "trunk" and trainer.counters.path_flops > trunk_end:
                raise UserError(
                    f"the checkpoint is at {format_flops(trainer.counters.path_flops)} FLOPs, past the end of the "
                    f"trunk of rung {format_flops(self.task.rung_flops)}",
                    key="resume_from",
                    fix="resume from a lower rung's checkpoint",
                )
            return
        two_stages = config.freeze_at_flops is not None
        check_rung(
            self.task.rung_flops,
            step_flops=trainer.next_step_flops(),
            cooldown_fraction=config.cooldown_fraction,
            freeze_at_flops=config.freeze_at_flops,
            catalogue_flops=trainer.catalogue_flops if two_stages else 0.0,
            stage2_step_flops=trainer.next_step_flops(stage=2) if two_stages else None,
        )

    def _check_met(self) -> None:
        counters, rung_flops = self.trainer.counters, self.task.rung_flops
        if counters.step < MIN_STEPS or counters.path_flops < (1 - TOLERANCE) * rung_flops:
            raise InfeasibleError(
                f"rung {format_flops(rung_flops)} ended at {format_flops(counters.path_flops)} FLOPs after "
                f"{counters.step} steps",
                key="groups_per_step",
                fix="use a smaller batch or model, or a higher rung",
            )

    def _row(self, kind: str, status: Status, scores: QueryScores | None) -> dict[str, Any]:
        task, succeeded = self.task, status == "ok" and kind == "rung"
        evaluation = None if scores is None else summarise(scores)
        return {
            "trial": task.trial,
            "rung": task.rung,
            "rung_flops": task.rung_flops,
            "seed": task.seed,
            "config": task.config.as_dict(),
            "kind": kind,
            "status": status,
            **build_row(self.trainer, evaluation, self.timing),
            "task_flops": self._spent_flops(),
            "checkpoint": task.name("trunk") if succeeded else None,
            "model": task.name("model") if succeeded else None,
            "scores": self._publish_scores(scores) if succeeded and scores is not None else None,
            "checkpoint_bytes": self._kept_bytes("trunk") if succeeded else 0,
            "model_bytes": self._kept_bytes("model") if succeeded else 0,
            **({"probes": self.probe_rows} if kind == "rung" else {}),
        }

    def _publish_scores(self, scores: QueryScores) -> str:
        """What pairs this row with others of the sweep; it stays when trunks are evicted."""
        name, data = scores_object(self.task.name("scores"), scores)
        if self.factory.rank == 0:
            self.store.put(name, data)
        return name

    def _kept_bytes(self, what: str) -> int:
        """Size of a checkpoint of this task. Rank 0 has written it before any rank's evaluation ended."""
        return int(read_meta(self.store, self.task.name(what))["state_bytes"])

    def _observe(self, record: StepRecord) -> None:
        if self.journal:
            self.journal.note(self._spent_flops())
        if self.observer is not None:
            self.observer(record)

    def _save_progress(self) -> None:
        assert self.journal is not None
        progress = self.journal.entry(self._spent_flops())
        self.trainer.save(self.store, self.journal.next_slot(), {"progress": progress})

    def _spent_flops(self) -> int:
        return self.spent_before_flops + self.trainer.spent_flops

    def _ran_out_of_memory(self) -> bool:
        name = self.task.name("oom.json")
        return self.store.exists(name) and json.loads(self.store.get(name))["task_id"] == self.task.task_id


class _Journal:
    """In-rung checkpoints of a task in two alternating slots, and what it has spent, lost work included."""

    def __init__(self, task: RungTask, store: Store) -> None:
        self.task, self.store = task, store
        self.slots = [task.name("progress-a"), task.name("progress-b")]
        self.spent_name = task.name("progress-spent.json")
        self._noted_s = -math.inf

    def latest(self) -> str | None:
        """The newest whole checkpoint; a slot that a crash left half-written is passed over."""
        steps = {}
        for slot in self.slots:
            try:
                meta = load_checkpoint(self.store, slot).meta
            except (UserError, CorruptError):
                continue
            # The trunk leads to every rung; a branch to its own alone (one run trained on to ever larger budgets).
            if meta["counters"]["phase"] == "trunk" or meta["progress"]["rung_flops"] == self.task.rung_flops:
                steps[slot] = meta["counters"]["step"]
        self.slots.sort(key=lambda slot: -steps.get(slot, -1))
        return self.slots[0] if steps else None

    def next_slot(self) -> str:
        """The slot that does not hold the newest checkpoint."""
        self.slots.reverse()
        return self.slots[0]

    def note(self, spent_flops: int) -> None:
        """Keep what the task has spent, at most once a second: a kill loses no more than that from the account."""
        now_s = time.monotonic()
        if now_s - self._noted_s >= _JOURNAL_EVERY_S:
            self._noted_s = now_s
            self.store.put(self.spent_name, json.dumps(self.entry(spent_flops)).encode())

    def read_spent(self) -> int:
        """What earlier attempts at this task have spent."""
        if not self.store.exists(self.spent_name):
            return 0
        return self.own_spent(json.loads(self.store.get(self.spent_name)))

    def entry(self, spent_flops: int) -> dict[str, Any]:
        """What is noted of a spend."""
        return {"task_id": self.task.task_id, "rung_flops": self.task.rung_flops, "spent_flops": spent_flops}

    def own_spent(self, entry: dict[str, Any]) -> int:
        """The noted spend, if this task noted it: that of a lost task is charged to that one."""
        return int(entry["spent_flops"]) if entry.get("task_id") == self.task.task_id else 0

    def clear(self) -> None:
        """Drop the in-rung checkpoints; the row is in hand."""
        for slot in self.slots:
            self.store.delete_folder(slot)


def load_model(store: Store, name: str, shards: Shards, *, averaged: bool = False) -> TwoPartModel:
    """The model of a checkpoint, on the CPU, for evaluation, export or prediction.

    Raises UserError where there is none or it is of another shard set, CorruptError where it is damaged.
    """
    checkpoint = load_checkpoint(store, name, expect={"shards_hash": shards.hash})
    model = TrainingData.of(shards).build_model(
        TrainConfig.from_dict(checkpoint.meta["config"]), int(checkpoint.meta["seed"])
    )
    state = checkpoint.state
    model.load_state_dict({**state.weight, **state.average} if averaged else state.weight)
    return model.eval()


def _is_out_of_memory(error: BaseException) -> bool:
    # PyTorch's CPU allocator raises a bare RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
