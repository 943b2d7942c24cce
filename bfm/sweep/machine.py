"""This machine, as far as a plan depends on it: what it has, and how many tasks of a tier it holds at a time.

Enters: tiers. Leaves: counts, and what is lacking.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from bfm.sweep.tiers import Tier
from bfm.units import GIB

USUAL_CARD_GIB = 24.0
"""Of the GPUs in cluster/launcher.yaml: what a tier is held against that asks for one where there is none."""
COORDINATOR_CPUS = 1.0
"""At most so many are held beside a task's workers, where there are several, by what coordinates them."""
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
