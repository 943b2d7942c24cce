"""The sampled softmax on one CUDA device: useful TFLOP/s against the matmul peak, peak memory, error against float64.

    python benchmarks/softmax_gpu.py [--queries 8192] [--candidates 2097152] [--width 256]
    TRITON_INTERPRET=1 python benchmarks/softmax_gpu.py --tiny    (checks the script on the CPU, measures nothing)

bfloat16 vectors, forward and backward of the mean loss in h, the gathering of candidates included; useful work is
4 x queries x K x d. Every mode runs in a fresh process that also measures the card's matmul peak; minimum of 5 runs
after a warm-up (fewer where they take longer than 20 s together). The targets are candidates with pi = 1. The public
losses get the gathered candidates as a linear layer and -log pi as its bias, which is bfloat16 there; SDPA has no room
for a bias at all and gets pi = 1 throughout. Each is compared with its own loss in float64.
Writes benchmarks/results/softmax_gpu.md and .json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from bfm.objective.fused import Tile, fused_softmax_state, num_splits, why_not_fused  # noqa: E402
from bfm.objective.softmax import log_sum  # noqa: E402
from bfm.objective.tiled import State, log_sum_of_state, merge  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "softmax_gpu.md"
SCALE = 20.0
RUNS, RUNS_S, MODE_S = 5, 20.0, 240
SUBSET = 256
TILES = (Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 128, 8, 2), Tile(64, 64, 4, 3), Tile(128, 32, 8, 4))
CHUNK_ROWS = (64, 128, 256, 512, 1024, 2048)
# flex_attention, compiled once per process.
COMPILED: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True)
class Problem:
    """Q queries, the target of each among the K candidates and certain to be there; R table rows of width D."""

    h_QD: Tensor
    table_RD: Tensor
    ids_K: Tensor
    log_pi_K: Tensor
    column_Q: Tensor
    """Of the target among the candidates."""

    @property
    def target_QD(self) -> Tensor:
        return self.table_RD[self.ids_K[self.column_Q]]

    @property
    def useful_flops(self) -> float:
        return 4.0 * len(self.h_QD) * len(self.ids_K) * self.h_QD.shape[1]


@dataclass(frozen=True)
class Outcome:
    """Loss per query where the mode gives it, gradient of the mean loss in h, what was chosen."""

    loss_Q: Tensor | None
    grad_QD: Tensor
    note: str = ""


def make_problem(queries: int, candidates: int, width: int, device: str) -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def unit(num: int) -> Tensor:
        vectors = torch.randn(num, width, generator=generator, device=device)
        return F.normalize(vectors, dim=-1).bfloat16()

    table_RD = unit(candidates + candidates // 4)
    ids_K = torch.randperm(len(table_RD), generator=generator, device=device)[:candidates].sort().values
    log_pi_K = -3 * torch.rand(candidates, generator=generator, device=device)
    column_Q = torch.randint(0, candidates, (queries,), generator=generator, device=device)
    log_pi_K[column_Q] = 0.0
    return Problem(unit(queries), table_RD, ids_K, log_pi_K, column_Q)


def differentiated(problem: Problem, log_sum_of: Callable[[Tensor], Tensor], note: str = "") -> Outcome:
    """Loss and gradient by a log sum that is differentiable in q."""
    leaf_QD = problem.h_QD.float().requires_grad_()
    q_QD = SCALE * leaf_QD
    loss_Q = log_sum_of(q_QD) - (q_QD * problem.target_QD.float()).sum(-1)
    loss_Q.mean().backward()
    return Outcome(loss_Q.detach(), leaf_QD.grad, note)


def fused(problem: Problem, tile: Tile | None = None) -> Outcome:
    arguments = (problem.table_RD, problem.ids_K, problem.log_pi_K, tile)
    return differentiated(
        problem, lambda q_QD: log_sum_of_state(q_QD, fused_softmax_state(q_QD, *arguments)), str(tile or "")
    )


def one_pass(problem: Problem) -> Outcome:
    arguments = (problem.table_RD, problem.ids_K, problem.log_pi_K)
    return differentiated(problem, lambda q_QD: log_sum(q_QD, *arguments, method="one_pass"))


def attention_splits(problem: Problem) -> int:
    """Candidates are dealt to this many heads, since one head of few query tiles would not fill the device."""
    if problem.h_QD.device.type == "cpu":
        return 2
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    splits = num_splits(-(-len(problem.h_QD) // 128), 64, processors)
    return next(heads for heads in range(splits, 0, -1) if len(problem.ids_K) % heads == 0)


def merge_heads(lse_HQ: Tensor, mean_HQD: Tensor) -> State:
    """The state of each query over all heads: a head's output is its mean candidate, its sum is 1 at max = lse."""
    states = [
        (lse_Q.float(), torch.ones_like(lse_Q).float(), mean_QD.float())
        for lse_Q, mean_QD in zip(lse_HQ, mean_HQD, strict=True)
    ]
    state = states[0]
    for other in states[1:]:
        state = merge(state, other)
    return state


def flex(problem: Problem) -> Outcome:
    """Candidates as keys and values of flex_attention; log pi is a score modification."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    heads, width = attention_splits(problem), problem.h_QD.shape[1]
    log_pi_HK = problem.log_pi_K.view(heads, -1)

    def correct(score: Tensor, b: Tensor, head: Tensor, query: Tensor, column: Tensor) -> Tensor:
        return score - log_pi_HK[head, column]

    def log_sum_of(q_QD: Tensor) -> Tensor:
        c_1HKD = problem.table_RD[problem.ids_K].view(1, heads, -1, width)
        q_1HQD = q_QD.detach().bfloat16().expand(1, heads, -1, -1)
        out_1HQD, extra = COMPILED["flex"](
            q_1HQD, c_1HKD, c_1HKD, score_mod=correct, scale=1.0, return_aux=AuxRequest(lse=True)
        )
        return log_sum_of_state(q_QD, merge_heads(extra.lse[0], out_1HQD[0]))

    if "flex" not in COMPILED:
        COMPILED["flex"] = torch.compile(flex_attention) if problem.h_QD.device.type == "cuda" else flex_attention
    return differentiated(problem, log_sum_of, f"{heads} heads")


def attention(problem: Problem, backend: str) -> Outcome:
    """Candidates as keys and values of SDPA, pi = 1: out - c_target is the gradient in q, lse - s_target the loss."""
    heads, width = attention_splits(problem), problem.h_QD.shape[1]
    c_1HKD = problem.table_RD[problem.ids_K].view(1, heads, -1, width)
    q_1HQD = (SCALE * problem.h_QD.float()).bfloat16().expand(1, heads, -1, -1).contiguous()
    if backend == "flash":
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q_1HQD, c_1HKD, c_1HKD, scale=1.0)
    else:
        arguments = (q_1HQD, c_1HKD, c_1HKD, None, True)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*arguments, scale=1.0)
    max_Q, sum_Q, weighted_QD = merge_heads(lse.reshape(heads, -1), out[0])
    target_QD = problem.target_QD.float()
    loss_Q = max_Q + sum_Q.log() - (SCALE * problem.h_QD.float() * target_QD).sum(-1)
    grad_QD = SCALE / len(loss_Q) * (weighted_QD / sum_Q[:, None] - target_QD)
    return Outcome(loss_Q, grad_QD, f"{heads} heads")


def linear_layer(problem: Problem, loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], note: str = "") -> Outcome:
    """The mean loss of a public fused linear cross entropy (queries, weight, target column, bias)."""
    leaf_QD = problem.h_QD.float().requires_grad_()
    weight_KD = problem.table_RD[problem.ids_K]
    loss((SCALE * leaf_QD).bfloat16(), weight_KD, problem.column_Q, -problem.log_pi_K.bfloat16()).backward()
    return Outcome(None, leaf_QD.grad, note)


def torch_chunked(problem: Problem, rows: int | None) -> Outcome:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)

    def loss(q_QD: Tensor, weight_KD: Tensor, target_Q: Tensor, bias_K: Tensor) -> Tensor:
        return F.linear_cross_entropy(q_QD, weight_KD, target_Q, linear_bias=bias_K, options=options)

    return linear_layer(problem, loss, f"{rows} rows" if rows else "")


def liger(problem: Problem) -> Outcome:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return linear_layer(problem, liger_fused_linear_cross_entropy)


def cce(problem: Problem) -> Outcome:
    from cut_cross_entropy import linear_cross_entropy

    return linear_layer(problem, linear_cross_entropy)


# Name: variants of which the fastest counts, and the loss it computes.
MODES: dict[str, tuple[list[Callable[[Problem], Outcome]], str]] = {
    "triton": ([fused], "sampled"),
    "triton, best of the tiles": ([lambda p, tile=tile: fused(p, tile) for tile in TILES], "sampled"),
    "one_pass": ([one_pass], "sampled"),
    "flex_attention": ([flex], "sampled"),
    "SDPA flash": ([lambda p: attention(p, "flash")], "uniform"),
    "SDPA cuDNN": ([lambda p: attention(p, "cudnn")], "uniform"),
    "F.linear_cross_entropy, auto": ([lambda p: torch_chunked(p, None)], "linear"),
    "F.linear_cross_entropy, best rows": (
        [lambda p, rows=rows: torch_chunked(p, rows) for rows in CHUNK_ROWS],
        "linear",
    ),
    "liger-kernel": ([liger], "linear"),
    "cut-cross-entropy": ([cce], "linear"),
}


def exact(problem: Problem, kind: str) -> tuple[Tensor, Tensor]:
    """Loss and gradient (of the sum) in h of the first SUBSET queries in float64, candidate block by block."""
    q_QD, target_QD = SCALE * problem.h_QD[:SUBSET].double(), problem.target_QD[:SUBSET].double()
    log_pi_K = torch.zeros_like(problem.log_pi_K) if kind == "uniform" else problem.log_pi_K
    if kind == "linear":
        # The bias is handed over in bfloat16.
        log_pi_K = log_pi_K.bfloat16()
    state: State = (torch.full_like(q_QD[:, 0], -torch.inf), torch.zeros_like(q_QD[:, 0]), torch.zeros_like(q_QD))
    for ids_C, log_pi_C in zip(problem.ids_K.split(65536), log_pi_K.split(65536), strict=True):
        c_CD = problem.table_RD[ids_C].double()
        logits_QC = q_QD @ c_CD.T - log_pi_C.double()
        max_Q = logits_QC.amax(1)
        weight_QC = torch.exp(logits_QC - max_Q[:, None])
        state = merge(state, (max_Q, weight_QC.sum(1), weight_QC @ c_CD))
    max_Q, sum_Q, weighted_QD = state
    return max_Q + sum_Q.log() - (q_QD * target_QD).sum(-1), SCALE * (weighted_QD / sum_Q[:, None] - target_QD)


def relative_error(got: Tensor, right: Tensor) -> float:
    return float((got.double() - right).norm() / right.norm())


def timed(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def matmul_peak(device: str) -> float:
    """FLOP/s of the best of 20 bfloat16 products of random square matrices."""
    size = 8192 if device == "cuda" else 128
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2.0 * size**3 / min(timed(lambda: left @ right, device)[0] for _ in range(20))


def fastest(problem: Problem, variants: list[Callable[[Problem], Outcome]], device: str) -> tuple[float, int, Outcome]:
    """Seconds, peak bytes and outcome of the variant with the fastest single run after its warm-up."""
    found: list[tuple[float, int, Outcome]] = []
    problems = []
    for variant in variants:
        try:
            variant(problem)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if device == "cuda" else 0
            elapsed_s, outcome = timed(lambda run=variant: run(problem), device)
            peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
        except Exception as error:
            # A tile or a chunk too large for this card (each library has its own class for it); the others count.
            problems.append(f"{type(error).__name__}: {error}".splitlines()[0][:100])
            continue
        spent_s, runs = elapsed_s, 1
        while runs < RUNS and spent_s < RUNS_S:
            again_s, outcome = timed(lambda run=variant: run(problem), device)
            elapsed_s, spent_s, runs = min(elapsed_s, again_s), spent_s + again_s, runs + 1
        found.append((elapsed_s, peak, outcome))
    if not found:
        raise RuntimeError("; ".join(dict.fromkeys(problems)))
    elapsed_s, peak, outcome = min(found, key=lambda entry: entry[0])
    left_out = [f"{len(problems)} of {len(variants)} failed, first: {problems[0]}"] if problems else []
    return elapsed_s, peak, replace(outcome, note="; ".join(filter(None, [outcome.note, *left_out])))


def measure(mode: str, problem: Problem, device: str) -> dict[str, Any]:
    variants, kind = MODES[mode]
    if mode.startswith("triton") and (reason := why_not_fused(problem.h_QD, problem.table_RD)):
        raise RuntimeError(reason)
    elapsed_s, peak_bytes, outcome = fastest(problem, variants, device)
    loss_Q, grad_QD = exact(problem, kind)
    got_QD = outcome.grad_QD[:SUBSET].double() * len(problem.h_QD)
    return {
        "mode": mode,
        "seconds": elapsed_s,
        "useful_flops_per_s": problem.useful_flops / elapsed_s,
        "matmul_flops_per_s": matmul_peak(device),
        "extra_peak_bytes": peak_bytes,
        "loss_error": None if outcome.loss_Q is None else relative_error(outcome.loss_Q[:SUBSET], loss_Q),
        "gradient_error": relative_error(got_QD, grad_QD),
        "note": outcome.note,
    }


def in_fresh_process(mode: str, options: argparse.Namespace) -> dict[str, Any]:
    sizes = ["--queries", options.queries, "--candidates", options.candidates, "--width", options.width]
    command = [sys.executable, __file__, "--mode", mode, *map(str, sizes), *(["--tiny"] if options.tiny else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MODE_S)
    except subprocess.TimeoutExpired:
        return {"mode": mode, "failed": f"no result within {MODE_S} s"}
    if done.returncode:
        return {"mode": mode, "failed": (done.stderr.strip().splitlines() or ["?"])[-1][:150]}
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]], options: argparse.Namespace, place: str) -> str:
    lines = [
        "# The sampled softmax on a GPU",
        "",
        f"Written by `python benchmarks/softmax_gpu.py`: {options.queries:,} queries, K = {options.candidates:,}, "
        f"d = {options.width}, bfloat16, forward and backward; errors against float64 on {SUBSET} queries.",
        "",
        "| mode | ms | useful TFLOP/s | of the matmul peak | extra peak memory, MB | loss error | gradient error | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['mode']} | | | | | | | not run: {row['failed']} |")
            continue
        share = row["useful_flops_per_s"] / row["matmul_flops_per_s"]
        loss = "" if row["loss_error"] is None else f"{row['loss_error']:.1e}"
        lines.append(
            f"| {row['mode']} | {1e3 * row['seconds']:.1f} | {row['useful_flops_per_s'] / 1e12:.1f} | {share:.0%} | "
            f"{row['extra_peak_bytes'] / 2**20:,.0f} | {loss} | {row['gradient_error']:.1e} | {row['note']} |"
        )
    peaks = [row["matmul_flops_per_s"] / 1e12 for row in rows if "failed" not in row]
    if peaks:
        lines += ["", f"Matmul peak over the processes: {min(peaks):.0f} to {max(peaks):.0f} TFLOP/s."]
    return "\n".join([*lines, "", place, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=8192)
    parser.add_argument("--candidates", type=int, default=2**21)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU: checks the script")
    parser.add_argument("--mode", choices=MODES, help="measure one mode in this process and print it as JSON")
    options = parser.parse_args()
    device = "cpu" if options.tiny else "cuda"
    if options.tiny:
        options.queries, options.candidates, options.width = 64, 512, 32
    elif not torch.cuda.is_available():
        sys.exit("softmax_gpu: this benchmark needs a CUDA device; --tiny checks the script without one")
    if options.mode:
        problem = make_problem(options.queries, options.candidates, options.width, device)
        print(json.dumps(measure(options.mode, problem, device)))
        return
    rows = [in_fresh_process(mode, options) for mode in MODES]
    card = "CPU" if options.tiny else torch.cuda.get_device_name()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton") if installed(name))
    place = f"{card}; load average {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, {versions}."
    text = table(rows, options, place)
    if not options.tiny:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(text)
        RESULT.with_suffix(".json").write_text(json.dumps({"place": place, "rows": rows}, indent=1) + "\n")
    print(text)


def installed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError

    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
