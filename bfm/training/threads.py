"""How many of a process's threads train: those that pay.

Threads that share a step wait for each other after every operation, and they wait by spinning. In a small step that
takes longer than the work, and beside other processes each wait lasts until the core comes back: two threads of a
small model fall to a twentieth of their speed, where one falls to its share of the cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

ALONE_BELOW_FLOPS = 1e9
"""FLOPs of a worker's step up to which one thread trains (measured: benchmarks/results/steps.md)."""


def training_threads(step_flops: float, available: int) -> int:
    """Threads that train a worker's steps of so many FLOPs; a function of the configuration, as rounding follows it."""
    return 1 if step_flops < ALONE_BELOW_FLOPS else available


@contextmanager
def using_threads(number: int) -> Iterator[None]:
    """So many threads inside, as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
