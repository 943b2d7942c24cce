"""One rung task on several workers: a worker group in which every rank runs `bfm.training.rung` with ZeRO.

Enters: a task as a dict, where the shards are and the sweep's store. Leaves: the ledger row.
Called from a driver or from inside a Tune actor. A worker that dies restarts the group, which goes on from the last
in-rung checkpoint; the recovered curve is the unbroken one, bit for bit at the same number of workers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import ray.train

from bfm.errors import CorruptError, InfeasibleError, UserError
from bfm.events.shards import Shards
from bfm.files import Store
from bfm.training.journal import Journal, YieldError
from bfm.training.records import Observer
from bfm.training.task import Account, RungTask
from ray_jobs.group import RUN, Kind, Message, coordinator
from ray_jobs.pulse import Pulses
from ray_jobs.trial import away_from, notice, open_shards, train_here

MakeObserver = Callable[[dict[str, Any]], Observer]
"""task -> what rank 0 calls after every step. Must pickle."""

STAYS_S = 30.0
"""A sweep's group stands by for so long for another task of its tier."""
_PLAIN_ERRORS = {"UserError": UserError, "InfeasibleError": InfeasibleError}


def train_on_workers(
    task: Mapping[str, Any],
    shards: str,
    storage: str,
    *,
    make_observer: MakeObserver | None = None,
    assigned_at_s: float | None = None,
    save_every_s: float = 30.0,
    max_failures: int = 2,
    pulses: Pulses | None = None,
    stays_s: float = 0.0,
) -> dict[str, Any]:
    """Run a task on `task["scaling"]["workers"]` workers; returns its row (see `bfm.training.rung.run_rung`).

    Args:
        task: a sweep's task; its scaling names workers, zero_stage, cpus and gpus per worker, micro_groups, softmax.
        shards: path or URI of the shard set, readable by every worker.
        storage: path or URI of the sweep's store, shared by all nodes.
        make_observer: builds rank 0's observer from the task.
        assigned_at_s: wall-clock time of the task's assignment.
        save_every_s: seconds between in-rung checkpoints: what a kill can cost, beside the restart.
        max_failures: restarts of the group before the task is given up; preemptions and crashes are counted apart.
        pulses: where every worker tells that it moves.
        stays_s: seconds for which the workers stand by for another task like it.

    Raises:
        UserError, InfeasibleError: as run_rung.
        CorruptError: a shard set or checkpoint is damaged.
        YieldError: it was asked to end, and its checkpoint stands.
        ray.train.TrainingFailedError: the group failed more often than allowed.
    """
    scaling, store, trial_folder = task["scaling"], Store(storage), f"trials/{task['trial']}"
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    kind = Kind(
        workers=int(scaling["workers"]),
        cpus=float(scaling["cpus"]),
        gpus=float(scaling["gpus"]),
        label_selector=tuple(away_from(task.get("avoid", "")).items()),
        max_failures=max_failures,
        carry_out=_RankTask(shards, storage, make_observer, pulses, save_every_s),
    )
    order = {"task": dict(task), "assigned_at_s": assigned_at_s or time.time()}
    try:
        answer = coordinator().order(kind, order, f"{store.uri}/{trial_folder}", stays_s=stays_s)
    except ray.train.TrainingFailedError as error:
        damage = _find_damage(error)
        if damage is not None:
            raise damage from error
        row = _out_of_memory_row(task, shards, store)
        if row is None:
            raise
        return row
    finally:
        _delete_runs(store, trial_folder)
    if "yielded" in answer:
        raise YieldError(Account(**answer["yielded"]))
    if "error" in answer:
        raise _PLAIN_ERRORS[answer["error"]](answer["what"], file=answer["file"], key=answer["key"], fix=answer["fix"])
    return answer["row"]


@dataclass(frozen=True)
class _RankTask:
    """What every rank does with a task. Imports live here: controller and driver need neither torch nor DeepSpeed."""

    shards: str
    storage: str
    make_observer: MakeObserver | None
    pulses: Pulses | None
    save_every_s: float

    def __call__(self, order: Message) -> Message:
        from ray.train.torch import get_device

        from bfm.training.zero import ZeroFactory

        task = order["task"]
        # Shards that one worker alone cannot open fail it, and the group with it: the others would wait for its steps.
        open_shards(self.shards)
        factory = ZeroFactory(int(task["scaling"]["zero_stage"]), get_device())
        observer = None
        if factory.rank == 0 and self.make_observer is not None:
            observer = self.make_observer(task)
        try:
            row = train_here(
                task,
                self.shards,
                factory,
                Store(self.storage),
                observer,
                notice=notice(),
                pulses=self.pulses,
                save_every_s=self.save_every_s,
                assigned_at_s=order["assigned_at_s"],
            )
            return {"row": row}
        except YieldError as end:
            return {"yielded": asdict(end.account)}
        except UserError as error:
            # The same on every rank and at every attempt, so it is no failure of the group.
            kind = "InfeasibleError" if isinstance(error, InfeasibleError) else "UserError"
            return {"error": kind, "what": error.what, "file": error.file, "key": error.key, "fix": error.fix}


def _delete_runs(store: Store, trial_folder: str) -> None:
    """What Ray Train has noted of this try, and of earlier ones whose caller was killed before it could delete them."""
    for folder in store.folders(trial_folder):
        if folder.startswith(f"{trial_folder}/{RUN}"):
            store.delete_folder(folder)


def _out_of_memory_row(task: Mapping[str, Any], shards: str, store: Store) -> dict[str, Any] | None:
    """That of a group whose workers left the mark; None where they left none."""
    from bfm.training.engine import EngineFactory
    from bfm.training.rung import run_rung

    rung_task = RungTask.from_task(task)
    if not Journal(rung_task, store).ran_out_of_memory():
        return None
    # A try that finds the mark tells so and trains nothing.
    row = run_rung(rung_task, Shards.open(shards), EngineFactory(), store)
    return {**row, "engine": "zero", **{name: task["scaling"][name] for name in ("workers", "zero_stage")}}


def _find_damage(error: BaseException) -> CorruptError | None:
    """The CorruptError that made a worker fail, if it was one."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, CorruptError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
    return None
