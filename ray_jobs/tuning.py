"""Runs a driver's tasks on Ray Tune until the driver has finished.

Enters: a Desk, which knows the driver, and an executor. Leaves: nothing but what the driver was told; Tune's own folder
is temporary. Assumes a `quiet_session`, or another Ray that is up and has a dashboard.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray import tune
from ray.tune import Callback, Stopper

from ray_jobs.cluster_session import local_ray
from ray_jobs.desk import Desk
from ray_jobs.search import DriverSearcher
from ray_jobs.trial import Executor, RungTrial

# Read by Ray and Tune when they start, here and in the processes that they start.
_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # Else Tune trains the task of a drained node's actor once more by itself, and no driver knows of it.
    "RAY_TRAIN_COUNT_PREEMPTION_AS_FAILURE": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@contextmanager
def quiet_session(num_cpus: int | None = None) -> Iterator[None]:
    """A Ray with a dashboard and without a wall of log lines; `num_cpus` is for one that is started here."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for noisy in ("ray", "ray.tune", "ray.train"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    # The dashboard is not for looking at: without it a stopped worker group's resources are never freed.
    with local_ray(num_cpus, dashboard=True):
        yield


def run_tasks(desk: Desk, execute: Executor) -> None:
    """Give out tasks until the driver says Finished. Raises what the driver or a fatal task raised.

    After a signal running tasks are asked for their checkpoints; then Interrupted is raised.
    """
    # Without it Tune asks for one trial at a time, and a new actor's start holds up all others.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(desk.slots)
    searcher = DriverSearcher(desk)
    folder = tempfile.mkdtemp(prefix="bfm-tune-")
    try:
        tune.Tuner(
            tune.with_parameters(RungTrial, execute=execute),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=-1,
                reuse_actors=True,
                trial_name_creator=_short_name,
                trial_dirname_creator=_short_name,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=folder,
                stop=EndWhenReady(searcher),
                callbacks=[SlotWatch(searcher)],
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
    finally:
        desk.leave()
        shutil.rmtree(folder, ignore_errors=True)
    if desk.failure is not None:
        raise desk.failure


class EndWhenReady(Stopper):
    """Ends a trial when its searcher says so, and the whole run when its driver has failed."""

    def __init__(self, searcher: DriverSearcher) -> None:
        self.searcher = searcher

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether this trial ends here."""
        return self.searcher.may_end(trial_id, result)

    def stop_all(self) -> bool:
        """Whether the run ends here."""
        return self.searcher.desk.failure is not None


class SlotWatch(Callback):
    """Tells the searcher which actors are up."""

    def __init__(self, searcher: DriverSearcher) -> None:
        self.searcher = searcher

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial has its actor, fresh or reused."""
        self.searcher.started(trial.trial_id)


def _short_name(trial: Any) -> str:
    # Tune would spell the whole configuration in the name of the trial's folder.
    return trial.trial_id
