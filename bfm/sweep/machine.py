"""This machine, as far as a plan depends on it: what it has, and how many tasks of a tier it holds at a time.

Enters: tiers. Leaves: counts, and what is lacking.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil
import torch

from bfm.sweep.tiers import Tier
from bfm.units import GIB

USUAL_CARD_GIB = 24.0
"""Of the GPUs in cluster/launcher.yaml: what a tier is held against that asks for one where there is none."""


@dataclass(frozen=True)
class Machine:
    """What it has."""

    cores: int
    gpus: int
    memory_gib: float
    gpu_memory_gib: float | None = None
    """Of the smallest GPU; None without one."""

    @classmethod
    def here(cls) -> Machine:
        """This one."""
        cards = [torch.cuda.get_device_properties(card).total_memory / GIB for card in range(torch.cuda.device_count())]
        return cls(os.cpu_count() or 1, len(cards), psutil.virtual_memory().total / GIB, min(cards, default=None))

    def holds(self, tier: Tier) -> int:
        """So many tasks at a time; 0: not one can start."""
        ways = [self.cores / (tier.cpus * tier.workers)]
        ways += [self.gpus / (tier.gpus * tier.workers)] if tier.gpus else []
        return int(min(ways) + 1e-9)

    def lack(self, tier: Tier) -> str:
        """What one task asks for, and what is here."""
        return (
            f"a task asks for {tier.cpus * tier.workers:g} CPUs and {tier.gpus * tier.workers:g} GPUs, "
            f"this machine has {self.cores} and {self.gpus}"
        )

    def worker_gib(self, tier: Tier) -> float:
        """Memory of one worker, as far as it can be known where the tier does not name it."""
        if tier.gpus:
            return min(tier.gpus, 1.0) * (self.gpu_memory_gib or USUAL_CARD_GIB)
        return self.memory_gib / tier.workers
