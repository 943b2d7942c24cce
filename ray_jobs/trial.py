"""One (configuration, rung) task as a Ray Tune trial on an actor that is reused.

Enters: a task as JSON, and the executor that turns it into a ledger row. Leaves: the row as JSON in the Tune result.
The actor imports torch once and keeps the shards open, so a warm task starts its first step in a fraction of a second.
Checkpoints lie in the sweep's own store, never in Tune's trial folders.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.tune import PlacementGroupFactory, Trainable

from bfm.disk import full_words
from bfm.errors import CorruptError, InfeasibleError, PausedError, UserError
from bfm.files import Store
from bfm.sweep.plan.machine import COORDINATOR_CPUS
from bfm.training.journal import YieldError
from bfm.training.task import Account, RungTask
from ray_jobs.group import coordinator
from ray_jobs.preemption import Notice
from ray_jobs.pulse import Pulses, at_work

if TYPE_CHECKING:
    from bfm.doors.tensorboard import TrialWriter
    from bfm.events.shards import Shards
    from bfm.events.verified import Verification
    from bfm.training.engine import EngineFactory
    from bfm.training.records import Observer, Record

# (task, wall-clock time of its assignment in seconds) -> ledger row
Executor = Callable[[dict[str, Any], float], dict[str, Any]]
ROW, LOST, YIELDED, FATAL, PAUSED = "row", "lost", "yielded", "fatal", "paused"
OUTCOMES = {ROW, LOST, YIELDED, FATAL, PAUSED}
NODE = "node"
"""Beside the outcome: the id of the node that it comes from."""
LEAVES = "leaves"
"""Beside `yielded`: the actor ends, and is no place for another task."""
# What makes every further task fail in the same way: the sweep ends with it, and can be resumed once it is mended.
FATAL_ERRORS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (UserError, CorruptError)}
STANDBY_S = 0.1
SAVE_EVERY_S = 60.0


def slot_resources(scaling: Mapping[str, Any]) -> dict[str, float]:
    """What the trial's own actor holds while it has the task.

    One worker: the actor trains, and holds that worker's CPUs and GPUs. Several: the actor only coordinates, the
    workers are a Ray Train group with resources of its own; equal CPU requests keep the actor reusable for both.
    """
    if scaling["workers"] == 1:
        return {"CPU": float(scaling["cpus"]), "GPU": float(scaling["gpus"])}
    return {"CPU": min(float(scaling["cpus"]), COORDINATOR_CPUS), "GPU": 0.0}


def away_from(nodes: str) -> dict[str, str]:
    """Ray's label selector for every node but these ids, comma-separated."""
    return {"ray.io/node-id": f"!in({nodes})"} if nodes else {}


class RungTrial(Trainable):
    """Runs its task in the first step; further steps stand by until the searcher has the actor's next task."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:
        """The placement group of the trial's actor; trials with equal groups share actors."""
        scaling = json.loads(config["task"])["scaling"]
        held = {name: amount for name, amount in slot_resources(scaling).items() if amount > 0}
        return PlacementGroupFactory([held], bundle_label_selector=[away_from(config["avoid"])])

    def setup(self, config: dict[str, Any], execute: Executor | None = None) -> None:
        """Pay for the imports, once per actor."""
        import torch  # noqa: F401

        assert execute is not None, "bind the executor with tune.with_parameters"
        self._execute = execute
        notice().take_sigterm()
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next task. Never False, also on an actor that is to go: Tune would drop the trial and not tell."""
        self._task = {**json.loads(new_config["task"]), "avoid": new_config["avoid"]}
        self._assigned_at_s = float(new_config["assigned_at_s"])
        self._delivered = False
        return True

    def step(self) -> dict[str, Any]:
        """{"row": JSON}, {"yielded": JSON}, {"lost": reason}, {"fatal": kind} or {"paused": reason} once, with this
        node's id; afterwards standby: empty."""
        if self._delivered:
            time.sleep(STANDBY_S)
            if notice().given:
                self.cleanup()
                os._exit(128 + signal.SIGTERM)
            return {}
        self._delivered = True
        return {**self._outcome(), NODE: ray.get_runtime_context().get_node_id()}

    def _outcome(self) -> dict[str, Any]:
        if notice().given:
            return {YIELDED: json.dumps(asdict(_untouched(self._task))), LEAVES: True}
        try:
            return {ROW: json.dumps(self._execute(self._task, self._assigned_at_s))}
        except YieldError as end:
            return {YIELDED: json.dumps(asdict(end.account)), LEAVES: notice().given}
        except PausedError as end:
            return {PAUSED: str(end)}
        except Exception as error:
            # The actor is sound and stays; the sweep's driver decides what becomes of the task.
            traceback.print_exc()
            return _failure(error)

    def cleanup(self) -> None:
        """Tune has no more tasks for the actor: give back what its worker group holds."""
        coordinator().close()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing to keep: the trunk checkpoint lies in the sweep's store. Tune calls this at the end of a trial."""
        return {"task_id": self._task["task_id"]}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing to load, for the same reason."""


class NoWriter:
    """In TensorBoard's place where it is not told anything."""

    def take(self, record: Record) -> None:
        """Nothing."""

    def row(self, row: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Workplace:
    """The executor of a real sweep: where its tasks find their data and leave checkpoints and curves."""

    shards: str
    """Path or URI of the shard set, readable by every worker."""
    storage: str
    """Path or URI of the sweep's own store, shared by all nodes."""
    metrics: tuple[str, ...]
    """Names of the metrics that TensorBoard's HParams show."""
    pulses: Pulses | None = None
    """Where tasks tell that they move."""
    swept: tuple[str, ...] | None = None
    """Settings that HParams show; None: all."""
    curves: bool = True
    """Whether TensorBoard is told anything."""

    def __call__(self, task: dict[str, Any], assigned_at_s: float) -> dict[str, Any]:
        """Train and evaluate the task; its row.

        Raises UserError where this node does not see the sweep's storage, PausedError where that is full.
        """
        check_mounted(self.storage)
        with pauses_where_full(self.storage):
            return self._train(task, assigned_at_s)

    def _train(self, task: dict[str, Any], assigned_at_s: float) -> dict[str, Any]:
        if task["scaling"]["workers"] == 1:
            return self._train_alone(task, assigned_at_s)
        from ray_jobs.train import STAYS_S, train_on_workers

        row = train_on_workers(
            task,
            self.shards,
            self.storage,
            make_observer=self.observer,
            assigned_at_s=assigned_at_s,
            # A group that restarted by itself would train parts again that nobody has reserved under the cap. So it
            # ends, and the driver's next try, with a reservation of its own, goes on from the in-rung checkpoint.
            max_failures=0,
            pulses=self.pulses,
            stays_s=STAYS_S,
        )
        with closing(self.writer(task)) as writer:
            writer.row(row)
        return row

    def observer(self, task: dict[str, Any]) -> Observer:
        """What rank 0 of a worker group calls after every step and validation."""
        from bfm.training.records import StepRecord

        writer, before_flops, step_flops = self.writer(task), 0.0, 0.0

        def observe(record: Record) -> None:
            nonlocal before_flops, step_flops
            writer.take(record)
            if isinstance(record, StepRecord):
                step_flops, before_flops = record.path_flops - before_flops, record.path_flops
            # The group's process is killed when it has to go, so the file is closed after each of the last steps.
            if record.phase == "cooldown" and record.path_flops + 2 * step_flops > task["rung_flops"]:
                writer.close()

        return observe

    def writer(self, task: dict[str, Any]) -> TrialWriter | NoWriter:
        """The trial's TensorBoard folder, taken up again."""
        if not self.curves:
            return NoWriter()
        from bfm.doors.tensorboard import TrialWriter

        config = task["config"]
        shown = config if self.swept is None else {name: config.get(name) for name in self.swept}
        return TrialWriter(f"{self.storage}/tensorboard/{task['trial']}", shown, self.metrics)

    def _train_alone(self, task: dict[str, Any], assigned_at_s: float) -> dict[str, Any]:
        with closing(self.writer(task)) as writer:
            row = train_here(
                task,
                self.shards,
                _factory(task["scaling"]),
                Store(self.storage),
                writer.take,
                notice=notice(),
                pulses=self.pulses,
                save_every_s=SAVE_EVERY_S,
                assigned_at_s=assigned_at_s,
            )
            writer.row(row)
        return row


@contextmanager
def pauses_where_full(storage: str) -> Iterator[None]:
    """Raises PausedError, with a line that says what to free, for what fails because the sweep's disk is full."""
    try:
        yield
    except Exception as error:
        words = None if isinstance(error, PausedError) else full_words(error, storage)
        if words is None:
            raise
        fewer = "or have fewer trunks kept (--extend --set storage.checkpoints_gib=N)"
        raise PausedError(f"paused: {words}, {fewer}, and the same command goes on") from error


def train_here(
    task: Mapping[str, Any],
    shards: str,
    factory: EngineFactory,
    store: Store,
    observer: Observer | None,
    *,
    notice: Notice,
    pulses: Pulses | None,
    save_every_s: float,
    assigned_at_s: float,
) -> dict[str, Any]:
    """Train and evaluate a task in this process, which is one of the factory's workers; its row, once the shards are
    known to be sound. See bfm.training.rung.run_rung."""
    import torch

    from bfm.training.rung import run_rung

    torch.set_num_threads(max(1, int(task["scaling"]["cpus"])))
    with at_work(pulses, task["task_id"], notice):
        opened, verification = open_shards(shards)
        row = run_rung(
            RungTask.from_task(task),
            opened,
            factory,
            store,
            observer,
            save_every_s=save_every_s,
            assigned_at_s=assigned_at_s,
            should_yield=notice,
        )
        # A step is as good a sign of life as any: to wait for the sums of a large log is not to stand still.
        return {**row, "verified_shards": verification.result(moves=notice)}


def check_mounted(storage: str) -> None:
    """Raises UserError where a sweep's folder is not there: writing would fill this node's own disk."""
    store = Store(storage)
    if store.is_local and not store.exists("sweep.yaml"):
        raise UserError("this node does not see the sweep", file=storage, fix="mount the storage on every node")


@functools.cache
def notice() -> Notice:
    """That of this process."""
    return Notice()


@functools.lru_cache(maxsize=1)
def open_shards(path: str) -> tuple[Shards, Verification]:
    """A shard set, and the comparison of its sums, which has begun; the last one stays open."""
    from bfm.events.shards import Shards
    from bfm.events.verified import Verification

    shards = Shards.open(path)
    return shards, Verification(shards)


def _factory(scaling: dict[str, Any]) -> EngineFactory:
    import torch

    device = torch.device("cuda" if scaling["gpus"] > 0 else "cpu")
    if scaling["engine"] == "plain":
        from bfm.training.engine import EngineFactory

        return EngineFactory(device)
    from bfm.training.zero import ZeroFactory

    return ZeroFactory(int(scaling["zero_stage"]), device)


def _untouched(task: Mapping[str, Any]) -> Account:
    """The account of a task that comes back as it went."""
    progress = task.get("progress")
    return Account(0, progress, 0 if progress is None else task["rung_flops"] - task["reserved_flops"])


def _failure(error: Exception) -> dict[str, Any]:
    if isinstance(error, InfeasibleError):
        # That task's matter alone, and the same at every try.
        return {LOST: str(error), "retry": False}
    for name, kind in FATAL_ERRORS.items():
        if isinstance(error, kind):
            return {FATAL: name, "message": str(error)}
    return {LOST: f"{type(error).__name__}: {error}", "retry": True}
