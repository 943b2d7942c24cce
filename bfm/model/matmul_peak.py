"""The measured matmul peak of this machine: what "share of peak" is a share of.

In: a device. Out: FLOP/s of the fastest square matmul in what training multiplies in: float32, on CUDA bfloat16.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

_SIZES = {"cpu": (256, 512, 1024), "cuda": (4096, 8192)}
_SECONDS_PER_SIZE = 0.25


@functools.cache
def matmul_peak(device: str = "cpu") -> float:
    """FLOP/s of the best of a few sizes; measured once per process, in under a second (plus CUDA's own start)."""
    return max(_measure(size, torch.device(device)) for size in _SIZES[torch.device(device).type])


def _measure(size: int, device: torch.device) -> float:
    a = torch.full((size, size), 0.5, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    out = torch.empty_like(a)
    best_flops_per_s = 0.0
    deadline_s = time.perf_counter() + _SECONDS_PER_SIZE
    torch.mm(a, a, out=out)
    # Best of several: other processes only ever make a run slower.
    while time.perf_counter() < deadline_s:
        best_flops_per_s = max(best_flops_per_s, 2 * size**3 / timed_s(lambda: torch.mm(a, a, out=out), device))
    return best_flops_per_s


def timed_s(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that work takes, until the device is done with it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin_s = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin_s
