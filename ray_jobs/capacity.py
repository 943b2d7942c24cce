"""Whether a sweep's slots and worker groups fit where it runs, and the Ray session that it runs in.

Enters: the tiers of a spec. Leaves: a refusal before Ray starts, or a session.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from bfm.errors import UserError
from bfm.sweep.settings import SweepSpec
from bfm.sweep.tiers import Tier
from ray_jobs.room import total_of

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


def check_fits(spec: SweepSpec, capacity: Mapping[str, float]) -> None:
    """Raises UserError where the machine's CPUs or GPUs cannot hold a task of every tier; `slots` is only the most."""
    for place, alternatives in enumerate(spec.scaling.tiers):
        # One of them is enough.
        lacks = [_lack(tier, capacity) for tier in alternatives]
        if all(lacks):
            raise UserError(
                f"a task of {alternatives[0].workers} workers {lacks[0]}",
                key=f"scaling.tiers.{place}",
                fix="lower workers, cpus or gpus, or join a larger cluster with RAY_ADDRESS",
            )


def _lack(tier: Tier, capacity: Mapping[str, float]) -> str | None:
    for name, amount in total_of(tier.scaling(tier.workers)).items():
        if amount > capacity[name] + 1e-9:
            return f"needs {amount:g} {name}s, this machine has {capacity[name]:g}"
    return None


def machine_capacity() -> dict[str, float]:
    """CPUs and GPUs of this machine."""
    import torch

    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}


def joins_a_cluster() -> bool:
    """Whether the sweep will run on a Ray that stands already. Raises UserError where its address is wrong."""
    import ray

    from ray_jobs.cluster_session import cluster_address

    return ray.is_initialized() or bool(cluster_address())


@contextmanager
def quiet_session(num_cpus: int | None = None) -> Iterator[None]:
    """A Ray with a dashboard and without a wall of log lines; `num_cpus` is for one that is started here."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from ray_jobs.cluster_session import local_ray

    for noisy in ("ray", "ray.tune", "ray.train"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    # The dashboard is not for looking at: without it a stopped worker group's resources are never freed.
    with local_ray(num_cpus, dashboard=True):
        yield
