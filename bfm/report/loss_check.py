"""`bfm doctor --loss`: every implementation of the sampled softmax on this machine, on the same inputs.

Enters: sizes and a device. Leaves: a row per implementation with its time, its memory and its distance from float64,
or why it cannot run here.

T = target rows, K = candidates, V = catalogue items, D = retrieval width.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from bfm.objective.fused import fused_available
from bfm.objective.sharded import DealtItems
from bfm.objective.softmax import choose_method, sampled_softmax
from bfm.report.tables import ruled

# The dense table last: what a process has once held it may keep, and would lend to those after it.
METHODS = ("one_pass", "two_pass", "triton", "sharded", "reference")
SAMPLE_S = 0.002
MB = 1e6


@dataclass(frozen=True)
class LossRow:
    """What one implementation did, forward and backward; numbers are None where it cannot run."""

    method: str
    available: bool
    chosen: bool
    note: str = ""
    elapsed_s: float | None = None
    extra_mb: float | None = None
    loss_error: float | None = None
    gradient_error: float | None = None

    def as_dict(self) -> dict[str, object]:
        """JSON-able form."""
        return asdict(self)


@dataclass(frozen=True)
class Problem:
    """Arguments of sampled_softmax."""

    h_TD: Tensor
    positive_TD: Tensor
    table_VD: Tensor
    ids_K: Tensor
    log_pi_K: Tensor
    hit_T: Tensor
    scale: Tensor
    target_T: Tensor
    """Item ids of the positives."""


def check_losses(
    device: str = "cpu",
    num_rows: int = 256,
    num_candidates: int = 65_536,
    width: int = 64,
    repeats: int = 3,
    dtype: torch.dtype = torch.float32,
) -> list[LossRow]:
    """One row per implementation: the least of `repeats` times, errors relative to dense float64 in norm.

    Takes a few seconds and num_rows * num_candidates * 24 bytes on the device. Memory is beyond the inputs: the
    allocator's peak on CUDA, on CPU the resident memory of the process sampled every few milliseconds. The table is
    constant and of `dtype`, so the two-pass form does work here that only a trained table needs.
    """
    problem = _problem(device, num_rows, num_candidates, width, dtype)
    exact = _gradient(_double(problem), "reference")
    chosen = choose_method(num_rows, num_candidates, problem.table_VD, live=False)
    rows = []
    for method in METHODS:
        reason = _why_not(method, device)
        if reason:
            rows.append(LossRow(method, False, False, reason))
            continue
        with _peak_mb(device) as extra_mb:
            loss_T, grad_TD = _gradient(problem, method)
        elapsed_s = min(_seconds(partial(_gradient, problem, method), device) for _ in range(repeats))
        rows.append(
            LossRow(
                method,
                True,
                method == chosen,
                "",
                elapsed_s,
                extra_mb[0],
                _distance(loss_T, exact[0]),
                _distance(grad_TD, exact[1]),
            )
        )
    return rows


def losses_text(rows: Sequence[LossRow]) -> str:
    """A line per implementation, for a terminal."""
    lines = []
    for row in rows:
        if row.elapsed_s is None:
            lines.append([row.method, "-", "-", "-", "-", f"not here: {row.note}"])
            continue
        errors = [f"{error:.1e}" for error in (row.loss_error, row.gradient_error) if error is not None]
        chosen = "chosen at these sizes" if row.chosen else ""
        lines.append([row.method, f"{row.elapsed_s:.3f}", f"{row.extra_mb:.0f}", *errors, chosen])
    return ruled(["method", "s", "extra MB", "loss error", "gradient error", ""], lines)


def _why_not(method: str, device: str) -> str:
    if method == "sharded":
        return "" if dist.is_gloo_available() and device == "cpu" else "it is compared on the CPU, with gloo"
    if method != "triton":
        return ""
    return fused_available() or ("" if device == "cuda" else "it needs a CUDA device")


def _problem(device: str, num_rows: int, num_candidates: int, width: int, dtype: torch.dtype) -> Problem:
    """Unit vectors, candidates scattered over a catalogue a quarter larger, a third of the rows with a hit."""
    generator = torch.Generator().manual_seed(0)
    num_items = num_candidates * 5 // 4
    table_VD = torch.nn.functional.normalize(torch.randn(num_items, width, generator=generator), dim=-1).to(dtype)
    ids_K = torch.randperm(num_items, generator=generator)[:num_candidates].sort().values
    h_TD = torch.nn.functional.normalize(torch.randn(num_rows, width, generator=generator), dim=-1)
    column_T = torch.randint(0, num_candidates, (num_rows,), generator=generator)
    hit_T = torch.where(torch.arange(num_rows) % 3 == 0, column_T, -1)
    log_pi_K = -3 * torch.rand(num_candidates, generator=generator)
    target_T = ids_K[column_T]
    tensors = (h_TD.to(dtype), table_VD[target_T], table_VD, ids_K, log_pi_K, hit_T, torch.tensor(20.0), target_T)
    return Problem(*(tensor.to(device) for tensor in tensors))


def _double(problem: Problem) -> Problem:
    names = ("h_TD", "positive_TD", "table_VD", "log_pi_K", "scale")
    return replace(problem, **{name: getattr(problem, name).double() for name in names})


def _gradient(problem: Problem, method: str) -> tuple[Tensor, Tensor]:
    """loss_T and the gradient of its mean in h."""
    h_TD = problem.h_TD.clone().requires_grad_()
    if method == "sharded":
        with _lone_group():
            items = DealtItems(problem.table_VD, len(problem.table_VD))
            rest = (problem.ids_K, problem.log_pi_K, problem.hit_T, problem.scale)
            loss_T = items.loss(h_TD, problem.target_T, *rest)
    else:
        loss_T = sampled_softmax(
            h_TD,
            problem.positive_TD,
            problem.table_VD,
            problem.ids_K,
            problem.log_pi_K,
            problem.hit_T,
            problem.scale,
            method=method,
        )
    (grad_TD,) = torch.autograd.grad(loss_T.mean(), h_TD)
    return loss_T.detach(), grad_TD


@contextmanager
def _lone_group() -> Iterator[None]:
    """A process group of this process alone: what sharding costs before anything is divided."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _distance(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def _seconds(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def _peak_mb(device: str) -> Iterator[list[float]]:
    """A list that holds, after the block, the most memory in MB that the block held beyond what was held before."""
    peak_mb: list[float] = []
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak_mb
        torch.cuda.synchronize()
        peak_mb.append((torch.cuda.max_memory_allocated() - before) / MB)
        return
    process, stop, samples = psutil.Process(), threading.Event(), []
    before = process.memory_info().rss

    def sample() -> None:
        while not stop.wait(SAMPLE_S):
            samples.append(process.memory_info().rss)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak_mb
    finally:
        stop.set()
        sampler.join()
    peak_mb.append((max([before, *samples]) - before) / MB)
