"""`bfm doctor --loss`: every implementation of the sampled softmax on this machine, on the same inputs.

Enters: sizes and a device. Leaves: a row per implementation with its time, its memory and its distance from float64,
or why it cannot run here.

Q = queries, K = candidates, V = catalogue items, D = retrieval width.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from bfm.model.matmul_peak import timed_s
from bfm.objective.frozen import DealtItems
from bfm.objective.fused import fused_available
from bfm.objective.softmax import choose_method, log_sum
from bfm.units import ruled

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
    log_sum_error: float | None = None
    gradient_error: float | None = None

    def as_dict(self) -> dict[str, object]:
        """JSON-able form."""
        return asdict(self)


@dataclass(frozen=True)
class Problem:
    """Arguments of log_sum."""

    q_QD: Tensor
    table_VD: Tensor
    ids_K: Tensor
    log_pi_K: Tensor


def check_losses(
    device: str = "cpu",
    num_queries: int = 256,
    num_candidates: int = 65_536,
    width: int = 64,
    repeats: int = 3,
    dtype: torch.dtype = torch.float32,
) -> list[LossRow]:
    """One row per implementation: the least of `repeats` times, errors relative to dense float64 in norm.

    Takes a few seconds and num_queries * num_candidates * 24 bytes on the device. Memory is beyond the inputs: the
    allocator's peak on CUDA, on CPU the resident memory of the process sampled every few milliseconds. The table is
    constant and of `dtype`, so the two-pass form does work here that only a trained table needs.
    """
    problem = _problem(device, num_queries, num_candidates, width, dtype)
    exact = _gradient(_double(problem), "reference")
    chosen = choose_method(num_queries, num_candidates, problem.table_VD, live=False)
    rows = []
    for method in METHODS:
        reason = _why_not(method, device)
        if reason:
            rows.append(LossRow(method, False, False, reason))
            continue
        with _peak_mb(device) as extra_mb:
            log_sum_Q, grad_QD = _gradient(problem, method)
        elapsed_s = min(timed_s(partial(_gradient, problem, method), torch.device(device)) for _ in range(repeats))
        rows.append(
            LossRow(
                method,
                True,
                method == chosen,
                "",
                elapsed_s,
                extra_mb[0],
                _distance(log_sum_Q, exact[0]),
                _distance(grad_QD, exact[1]),
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
        errors = [f"{error:.1e}" for error in (row.log_sum_error, row.gradient_error) if error is not None]
        chosen = "chosen at these sizes" if row.chosen else ""
        lines.append([row.method, f"{row.elapsed_s:.3f}", f"{row.extra_mb:.0f}", *errors, chosen])
    return ruled(["method", "s", "extra MB", "log sum error", "gradient error", ""], lines)


def _why_not(method: str, device: str) -> str:
    if method == "sharded":
        return "" if dist.is_gloo_available() and device == "cpu" else "it is compared on the CPU, with gloo"
    if method != "triton":
        return ""
    return fused_available() or ("" if device == "cuda" else "it needs a CUDA device")


def _problem(device: str, num_queries: int, num_candidates: int, width: int, dtype: torch.dtype) -> Problem:
    """Queries in all directions, candidates scattered over a catalogue of unit vectors a quarter larger."""
    generator = torch.Generator().manual_seed(0)
    num_items = num_candidates * 5 // 4
    table_VD = torch.nn.functional.normalize(torch.randn(num_items, width, generator=generator), dim=-1).to(dtype)
    ids_K = torch.randperm(num_items, generator=generator)[:num_candidates].sort().values
    h_QD = torch.nn.functional.normalize(torch.randn(num_queries, width, generator=generator), dim=-1)
    log_pi_K = -3 * torch.rand(num_candidates, generator=generator)
    return Problem(*(tensor.to(device) for tensor in (20.0 * h_QD, table_VD, ids_K, log_pi_K)))


def _double(problem: Problem) -> Problem:
    return replace(problem, **{name: getattr(problem, name).double() for name in ("q_QD", "table_VD", "log_pi_K")})


def _gradient(problem: Problem, method: str) -> tuple[Tensor, Tensor]:
    """log_sum_Q and the gradient of its mean in q."""
    q_QD = problem.q_QD.clone().requires_grad_()
    candidates = (problem.ids_K, problem.log_pi_K)
    if method == "sharded":
        with _lone_group():
            log_sum_Q = DealtItems(problem.table_VD).log_sum(q_QD, *candidates)
    else:
        log_sum_Q = log_sum(q_QD, problem.table_VD, *candidates, method=method)
    (grad_QD,) = torch.autograd.grad(log_sum_Q.mean(), q_QD)
    return log_sum_Q.detach(), grad_QD


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
