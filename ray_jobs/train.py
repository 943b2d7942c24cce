"""One rung task on several workers: a Ray Train worker group in which every rank runs `bfm.training.rung` with ZeRO.

Enters: a task as a dict, where the shards are and the sweep's store. Leaves: the ledger row, through an object in the
store (so that nothing depends on Ray Train's own reports, which are a barrier over all ranks without a timeout).
Called from a driver or from inside a Tune actor. A worker that dies restarts the group, which goes on from the last
in-rung checkpoint; the recovered curve is the unbroken one, bit for bit at the same number of workers.
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

from bfm.errors import CorruptError, InfeasibleError, UserError
from bfm.events.shards import Shards
from bfm.files import Store
from bfm.training.journal import Journal, YieldError
from bfm.training.records import Observer
from bfm.training.task import Account, RungTask
from ray_jobs.preemption import Notice
from ray_jobs.pulse import Pulses
from ray_jobs.trial import away_from, open_shards, train_here

MakeObserver = Callable[[dict[str, Any]], Observer]
"""task -> what rank 0 calls after every step. Must pickle."""

_GROUP_ENV = {
    # How often the controller looks at its workers: by default a finished group is noticed after up to 2 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # Two workers and their attendants are six processes and 16 s of CPU: far over 60 s where cores are shared.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    # A metrics exporter, for a group that lives for seconds.
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
_COLLECTIVE_TIMEOUT_S = 600
"""A rank that hangs this long in a collective fails its group."""
_RUN = "ray-"
_STATE_API_ADDRESS = "RAY_API_SERVER_ADDRESS"
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

    Raises:
        UserError, InfeasibleError: as run_rung.
        CorruptError: a shard set or checkpoint is damaged.
        YieldError: it was asked to end, and its checkpoint stands.
        ray.train.TrainingFailedError: the group failed more often than allowed.
    """
    scaling = task["scaling"]
    store = Store(storage)
    answer_name = f"trials/{task['trial']}/checkpoints/rung{task['rung']}-answer-{task['task_id']}.json"
    trial_folder = f"trials/{task['trial']}"
    run_name = f"{_RUN}{uuid.uuid4().hex[:12]}"
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    use_gpu = scaling["gpus"] > 0
    resources = {"CPU": float(scaling["cpus"])} | ({"GPU": float(scaling["gpus"])} if use_gpu else {})
    trainer = TorchTrainer(
        _rank_main,
        train_loop_config={
            "task": dict(task),
            "shards": shards,
            "storage": storage,
            "answer_name": answer_name,
            "make_observer": make_observer,
            "assigned_at_s": assigned_at_s or time.time(),
            "save_every_s": save_every_s,
            "pulses": pulses,
        },
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S),
        scaling_config=ray.train.ScalingConfig(
            num_workers=int(scaling["workers"]),
            use_gpu=use_gpu,
            resources_per_worker=resources,
            label_selector=away_from(task.get("avoid", "")) or None,
        ),
        run_config=ray.train.RunConfig(
            name=run_name,
            storage_path=f"{store.uri}/{trial_folder}",
            failure_config=ray.train.FailureConfig(max_failures=max_failures, max_preemption_failures=max_failures),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        with _group_environment():
            trainer.fit()
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
    answer = json.loads(store.get(answer_name))
    if "yielded" in answer:
        raise YieldError(Account(**answer["yielded"]))
    if "error" in answer:
        raise _PLAIN_ERRORS[answer["error"]](answer["what"], file=answer["file"], key=answer["key"], fix=answer["fix"])
    return answer["row"]


def _delete_runs(store: Store, trial_folder: str) -> None:
    """What Ray Train has noted of this try, and of earlier ones whose caller was killed before it could delete them."""
    for folder in store.folders(trial_folder):
        if folder.startswith(f"{trial_folder}/{_RUN}"):
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


@contextmanager
def _group_environment() -> Iterator[None]:
    """Environment from which `fit` takes what its controller and workers get; what the user has set wins."""
    # The only node cannot be preempted and leave anybody to notice: one process less to start.
    watch_preemption = len(ray.nodes()) > 1
    values = {**_GROUP_ENV, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": str(int(watch_preemption))}
    # Ray Train's cleaner asks the cluster that it *finds* whether the controller lives. On a machine with a second
    # cluster it asks that one, hears of no such actor, and removes the placement group of a healthy run.
    values[_STATE_API_ADDRESS] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add(_STATE_API_ADDRESS)
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _rank_main(config: dict[str, Any]) -> None:
    """What every rank runs. Imports live here: the controller and the driver need neither torch nor DeepSpeed."""
    from bfm.training.zero import ZeroFactory

    task, store = config["task"], Store(config["storage"])
    # Shards that one worker alone cannot open fail it, and the group with it: the others would wait for its steps.
    open_shards(config["shards"])
    factory = ZeroFactory(int(task["scaling"]["zero_stage"]), ray.train.torch.get_device())
    observer = None
    if factory.rank == 0 and config["make_observer"] is not None:
        observer = config["make_observer"](task)
    try:
        row = train_here(
            task,
            config["shards"],
            factory,
            store,
            observer,
            notice=Notice(),
            pulses=config["pulses"],
            save_every_s=config["save_every_s"],
            assigned_at_s=config["assigned_at_s"],
        )
        answer: dict[str, Any] = {"row": row}
    except YieldError as end:
        answer = {"yielded": asdict(end.account)}
    except UserError as error:
        # The same on every rank and at every attempt, so the group ends in peace and the driver raises it.
        kind = "InfeasibleError" if isinstance(error, InfeasibleError) else "UserError"
        answer = {"error": kind, "what": error.what, "file": error.file, "key": error.key, "fix": error.fix}
    if factory.rank == 0:
        store.put(config["answer_name"], json.dumps(answer).encode())


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
