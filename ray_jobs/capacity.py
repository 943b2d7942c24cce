"""Whether a sweep's slots and worker groups fit where it runs, and the Ray session that it runs in.

Enters: the tiers and slots of a spec. Leaves: a refusal before Ray starts, or a session with room for the largest task.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict

from bfm.errors import UserError
from bfm.sweep.settings import SweepSpec, Tier
from ray_jobs.trial import slot_resources

# Read by Ray and Tune when they start, here and in the processes that they start.
_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def demand(spec: SweepSpec) -> dict[str, float]:
    """CPUs and GPUs that the sweep needs at once: every slot at its largest, one of them with its worker group.

    A second group waits for the first one's resources; with less than this, a group could wait for ever for slots
    that hold what it needs.
    """
    held = [slot_resources(asdict(tier)) for tier in spec.tiers]
    needed = {}
    for name in ("CPU", "GPU"):
        slot = max(resources[name] for resources in held)
        largest = max(resources[name] + _group(tier, name) for tier, resources in zip(spec.tiers, held, strict=True))
        needed[name] = (spec.slots - 1) * slot + largest
    return needed


def check_fits(spec: SweepSpec, capacity: Mapping[str, float]) -> None:
    """Raises UserError where the machine's CPUs or GPUs cannot hold the sweep."""
    needed = demand(spec)
    for name, amount in needed.items():
        if amount > capacity[name] + 1e-9:
            raise UserError(
                f"{spec.slots} slots and the largest worker group need {amount:g} {name}s, "
                f"this machine has {capacity[name]:g}",
                key="scaling",
                fix=f"lower slots, workers or {name.lower()}s, or join a larger cluster with RAY_ADDRESS",
            )


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
def ray_session(spec: SweepSpec) -> Iterator[None]:
    """Ray for the duration of the block: the one that stands, or one of its own on this machine."""
    import ray

    joins = joins_a_cluster()
    with quiet_session(os.cpu_count()):
        if joins:
            _tell_what_is_missing(spec, ray.cluster_resources())
        yield


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


def _tell_what_is_missing(spec: SweepSpec, present: Mapping[str, float]) -> None:
    missing = {name: amount for name, amount in demand(spec).items() if amount > present.get(name, 0.0)}
    if missing:
        wants = ", ".join(f"{amount:g} {name}s ({present.get(name, 0.0):g} now)" for name, amount in missing.items())
        print(f"the sweep can use {wants}: tasks wait until the cluster has grown", file=sys.stderr)


def _group(tier: Tier, name: str) -> float:
    return 0.0 if tier.workers == 1 else tier.workers * (tier.cpus if name == "CPU" else tier.gpus)
