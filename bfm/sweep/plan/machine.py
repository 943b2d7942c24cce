"""This machine, as far as plans and runs depend on it: what it has, and how many tasks of a tier it holds at a time.

Enters: tiers, and what a run would take. Leaves: counts, and what is lacking.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from bfm.errors import UserError
from bfm.sweep.space.costs import CostModel
from bfm.sweep.space.tiers import Tier
from bfm.training.config import TrainConfig
from bfm.units import GIB, format_flops, format_seconds

USUAL_CARD_GIB = 24.0
"""Of the GPUs in cluster/launcher.yaml: what a tier is held against that asks for one where there is none."""
COORDINATOR_CPUS = 1.0
"""At most so many are held beside a task's workers, where there are several, by what coordinates them."""
LONGEST_S = 10 * 365.25 * 86_400
"""A run of ten years and more at the machine's peak is a slip."""
CGROUP = Path("/sys/fs/cgroup")
_SLACK = 1e-9


@dataclass(frozen=True)
class Machine:
    """What it has."""

    cores: float
    gpus: int
    memory_gib: float
    gpu_memory_gib: float | None = None
    """Of the smallest GPU; None without one."""

    @classmethod
    def here(cls) -> Machine:
        """This one; of a container with a quota of the cores the whole ones in it, as Ray counts them."""
        cards = [torch.cuda.get_device_properties(card).total_memory / GIB for card in range(torch.cuda.device_count())]
        cores, quota = os.cpu_count() or 1, quota_cores()
        cores = cores if quota is None else max(1, min(cores, int(quota)))
        return cls(cores, len(cards), psutil.virtual_memory().total / GIB, min(cards, default=None))

    def holds(self, tier: Tier) -> int:
        """So many tasks at a time; 0: not one can start."""
        ways = [self.cores / _cpus(tier)]
        if 0 < tier.gpus < 1:
            # A share is of one GPU.
            ways.append(self.gpus * int(1 / tier.gpus + _SLACK))
        elif tier.gpus:
            ways.append(self.gpus / (tier.gpus * tier.workers))
        return int(min(ways) + _SLACK)

    def lack(self, tier: Tier) -> str:
        """What one task asks for, and what is here."""
        return (
            f"a task asks for {_cpus(tier):g} CPUs and {tier.gpus * tier.workers:g} GPUs, "
            f"this machine has {self.cores:g} and {self.gpus}"
        )

    def worker_gib(self, tier: Tier, tasks: int) -> float:
        """Memory of one worker beside those of so many tasks at most, where the tier does not name it."""
        if tier.gpus:
            return min(tier.gpus, 1.0) * (self.gpu_memory_gib or USUAL_CARD_GIB)
        return self.memory_gib / (tier.workers * max(1, min(tasks, self.holds(tier))))


def check_run(tier: Tier, needed_bytes: int, flops: float, peak_flops_per_s: float) -> None:
    """Look before a run takes anything: CPUs, GPUs, the memory that is free now, time.

    Args:
        tier: how it is to be trained.
        needed_bytes: estimate of one worker (ConfigCost.memory_bytes).
        flops: C.
        peak_flops_per_s: of one worker's matmuls.

    Raises:
        UserError: one of them does not suffice; names the option of `bfm train`.
    """
    machine = Machine.here()
    if not machine.holds(tier):
        fix = "lower --gpus or --workers, or join a cluster with RAY_ADDRESS"
        raise UserError(machine.lack(tier), key="--gpus" if tier.gpus else "--workers", fix=fix)
    here = 1 if tier.gpus else tier.workers
    needed_gib, free_gib = here * needed_bytes / GIB, free_bytes(cuda=tier.gpus > 0) / GIB
    if needed_gib > free_gib:
        what = f"needs about {needed_gib:,.3g} GiB of memory, {free_gib:.3g} GiB are free"
        raise UserError(what, key="params", fix="take a smaller model, smaller groups or fewer --micro-groups")
    least_s = flops / (peak_flops_per_s * tier.workers)
    if least_s > LONGEST_S:
        what = f"{format_flops(flops)} FLOPs take at least {format_seconds(least_s)} here"
        raise UserError(what, key="--flops", fix=f"{format_flops(peak_flops_per_s)} FLOP/s is a worker's peak")


def check_config(config: TrainConfig, costs: CostModel, tier: Tier, flops: float, peak_flops_per_s: float) -> None:
    """The same of a configuration on a log. Raises InfeasibleError, too, where it cannot be built."""
    cost = costs.of(config)
    check_run(tier, cost.memory_bytes(tier, tier.micro_groups, config.averaging), flops, peak_flops_per_s)


def free_bytes(*, cuda: bool = False, cgroup: Path = CGROUP) -> int:
    """Memory that a new process can have: of the first GPU, or of the machine, within its container's limit."""
    if cuda:
        return torch.cuda.mem_get_info(0)[0]
    free = psutil.virtual_memory().available
    limit, used = (read_kernel(cgroup / name).strip() for name in ("memory.max", "memory.current"))
    return min(free, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else free


def _cpus(tier: Tier) -> float:
    """Of one task."""
    return tier.cpus * tier.workers + (min(tier.cpus, COORDINATOR_CPUS) if tier.workers > 1 else 0.0)


def quota_cores(cgroup: Path = CGROUP) -> float | None:
    """Cores that a container may use; None without a quota."""
    limit = read_kernel(cgroup / "cpu.max").split()
    return float(limit[0]) / float(limit[1]) if limit and limit[0] != "max" else None


def read_kernel(file: Path) -> str:
    """What the kernel tells; empty where there is no such file: kernels differ."""
    try:
        return file.read_text()
    except OSError:
        return ""
