"""The sampled softmax on one CUDA device: useful TFLOP/s against the matmul peak, peak memory, error against float64.

    python benchmarks/softmax_gpu.py [--rows 8192] [--candidates 2097152] [--width 256]
    TRITON_INTERPRET=1 python benchmarks/softmax_gpu.py --tiny    (checks the script on the CPU, measures nothing)

bfloat16 vectors, forward and backward of the mean loss in h, the gathering of candidates included; useful work is
4 x rows x K x d. Every mode runs in a fresh process that also measures the card's matmul peak; minimum of 5 runs after
a warm-up (fewer where they take longer than 20 s together). The public losses have no frozen, corrected negatives:
they get the gathered candidates as a linear layer with the target's column among them and -log pi as its bias; SDPA
has no room for a bias at all and gets pi = 1. Each is compared with its own loss in float64.
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
from bfm.objective.softmax import sampled_softmax  # noqa: E402
from bfm.objective.tiled import State, loss_from_state, merge  # noqa: E402

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
    """T rows, every target among the K candidates; R table rows of width D."""

    h_TD: Tensor
    table_RD: Tensor
    ids_K: Tensor
    log_pi_K: Tensor
    hit_T: Tensor

    @property
    def positive_TD(self) -> Tensor:
        return self.table_RD[self.ids_K[self.hit_T]]

    @property
    def useful_flops(self) -> float:
        return 4.0 * len(self.h_TD) * len(self.ids_K) * self.h_TD.shape[1]


@dataclass(frozen=True)
class Outcome:
    """Loss per row where the mode gives it, gradient of the mean loss in h, what was chosen."""

    loss_T: Tensor | None
    grad_TD: Tensor
    note: str = ""


def make_problem(rows: int, candidates: int, width: int, device: str) -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def unit(num: int) -> Tensor:
        vectors = torch.randn(num, width, generator=generator, device=device)
        return F.normalize(vectors, dim=-1).bfloat16()

    table_RD = unit(candidates + candidates // 4)
    ids_K = torch.randperm(len(table_RD), generator=generator, device=device)[:candidates].sort().values
    log_pi_K = -3 * torch.rand(candidates, generator=generator, device=device)
    hit_T = torch.randint(0, candidates, (rows,), generator=generator, device=device)
    return Problem(unit(rows), table_RD, ids_K, log_pi_K, hit_T)


def through_state(problem: Problem, state_of: Callable[[Tensor], State], note: str = "") -> Outcome:
    """Loss and gradient where the state is computed from q without gradient."""
    leaf_TD = problem.h_TD.float().requires_grad_()
    q_TD = SCALE * leaf_TD
    loss_T = loss_from_state(q_TD, problem.positive_TD, state_of(q_TD.detach()))
    loss_T.mean().backward()
    return Outcome(loss_T.detach(), leaf_TD.grad, note)


def fused(problem: Problem, tile: Tile | None = None) -> Outcome:
    arguments = (problem.table_RD, problem.ids_K, problem.log_pi_K, problem.hit_T)
    return through_state(problem, lambda q_TD: fused_softmax_state(q_TD, *arguments, tile), str(tile or ""))


def one_pass(problem: Problem) -> Outcome:
    leaf_TD = problem.h_TD.float().requires_grad_()
    arguments = (problem.table_RD, problem.ids_K, problem.log_pi_K, problem.hit_T)
    scale = torch.tensor(SCALE, device=leaf_TD.device)
    loss_T = sampled_softmax(leaf_TD, problem.positive_TD, *arguments, scale, method="one_pass")
    loss_T.mean().backward()
    return Outcome(loss_T.detach(), leaf_TD.grad)


def attention_splits(problem: Problem) -> int:
    """Candidates are dealt to this many heads, since one head of few row tiles would not fill the device."""
    if problem.h_TD.device.type == "cpu":
        return 2
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    splits = num_splits(-(-len(problem.h_TD) // 128), 64, processors)
    return next(heads for heads in range(splits, 0, -1) if len(problem.ids_K) % heads == 0)


def merge_heads(lse_HT: Tensor, mean_HTD: Tensor) -> State:
    """The state of each row over all heads: a head's output is its mean candidate, its sum is 1 at max = lse."""
    states = [
        (lse_T.float(), torch.ones_like(lse_T).float(), mean_TD.float())
        for lse_T, mean_TD in zip(lse_HT, mean_HTD, strict=True)
    ]
    state = states[0]
    for other in states[1:]:
        state = merge(state, other)
    return state


def flex(problem: Problem) -> Outcome:
    """Candidates as keys and values of flex_attention; log pi and the hit are a score modification."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    heads, width = attention_splits(problem), problem.h_TD.shape[1]
    log_pi_HK = problem.log_pi_K.view(heads, -1)
    hit_T, per_head = problem.hit_T, log_pi_HK.shape[1]

    def correct(score: Tensor, b: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return torch.where(hit_T[row] == head * per_head + column, -torch.inf, score - log_pi_HK[head, column])

    def state_of(q_TD: Tensor) -> State:
        c_1HKD = problem.table_RD[problem.ids_K].view(1, heads, per_head, width)
        q_1HTD = q_TD.bfloat16().expand(1, heads, -1, -1)
        out_1HTD, extra = COMPILED["flex"](
            q_1HTD, c_1HKD, c_1HKD, score_mod=correct, scale=1.0, return_aux=AuxRequest(lse=True)
        )
        return merge_heads(extra.lse[0], out_1HTD[0])

    if "flex" not in COMPILED:
        COMPILED["flex"] = torch.compile(flex_attention) if problem.h_TD.device.type == "cuda" else flex_attention
    return through_state(problem, state_of, f"{heads} heads")


def attention(problem: Problem, backend: str) -> Outcome:
    """Candidates as keys and values of SDPA, pi = 1: out - c_target is the gradient in q, lse - s_target the loss."""
    heads, width = attention_splits(problem), problem.h_TD.shape[1]
    c_1HKD = problem.table_RD[problem.ids_K].view(1, heads, -1, width)
    q_1HTD = (SCALE * problem.h_TD.float()).bfloat16().expand(1, heads, -1, -1).contiguous()
    if backend == "flash":
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q_1HTD, c_1HKD, c_1HKD, scale=1.0)
    else:
        arguments = (q_1HTD, c_1HKD, c_1HKD, None, True)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*arguments, scale=1.0)
    max_T, sum_T, weighted_TD = merge_heads(lse.reshape(heads, -1), out[0])
    positive_TD = problem.positive_TD.float()
    loss_T = max_T + sum_T.log() - (SCALE * problem.h_TD.float() * positive_TD).sum(-1)
    grad_TD = SCALE / len(loss_T) * (weighted_TD / sum_T[:, None] - positive_TD)
    return Outcome(loss_T, grad_TD, f"{heads} heads")


def linear_layer(problem: Problem, loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], note: str = "") -> Outcome:
    """The mean loss of a public fused linear cross entropy (queries, weight, target column, bias)."""
    leaf_TD = problem.h_TD.float().requires_grad_()
    weight_KD = problem.table_RD[problem.ids_K]
    loss((SCALE * leaf_TD).bfloat16(), weight_KD, problem.hit_T, -problem.log_pi_K.bfloat16()).backward()
    return Outcome(None, leaf_TD.grad, note)


def torch_chunked(problem: Problem, rows: int | None) -> Outcome:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)

    def loss(q_TD: Tensor, weight_KD: Tensor, target_T: Tensor, bias_K: Tensor) -> Tensor:
        return F.linear_cross_entropy(q_TD, weight_KD, target_T, linear_bias=bias_K, options=options)

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
    """Loss and gradient (of the sum) in h of the first SUBSET rows in float64, candidate block by block."""
    h_TD, hit_T = problem.h_TD[:SUBSET].double(), problem.hit_T[:SUBSET]
    log_pi_K = torch.zeros_like(problem.log_pi_K) if kind == "uniform" else problem.log_pi_K
    if kind == "linear":
        # The bias is handed over in bfloat16.
        log_pi_K = log_pi_K.bfloat16()
    positive_TD = problem.table_RD[problem.ids_K[hit_T]].double()
    positive_T = SCALE * (h_TD * positive_TD).sum(-1)
    if kind == "linear":
        positive_T = positive_T - log_pi_K[hit_T].double()
    state: State = (positive_T, torch.ones_like(positive_T), positive_TD)
    for start in range(0, len(log_pi_K), 65536):
        c_CD = problem.table_RD[problem.ids_K[start : start + 65536]].double()
        logits_TC = SCALE * h_TD @ c_CD.T - log_pi_K[start : start + 65536].double()
        columns = torch.arange(start, start + len(c_CD), device=hit_T.device)
        logits_TC[columns == hit_T[:, None]] = -torch.inf
        max_T = logits_TC.amax(1)
        weight_TC = torch.exp(logits_TC - max_T[:, None])
        state = merge(state, (max_T, weight_TC.sum(1), weight_TC @ c_CD))
    max_T, sum_T, weighted_TD = state
    return max_T + sum_T.log() - positive_T, SCALE * (weighted_TD / sum_T[:, None] - positive_TD)


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
    if mode.startswith("triton") and (reason := why_not_fused(problem.h_TD, problem.table_RD)):
        raise RuntimeError(reason)
    elapsed_s, peak_bytes, outcome = fastest(problem, variants, device)
    loss_T, grad_TD = exact(problem, kind)
    got_TD = outcome.grad_TD[:SUBSET].double() * len(problem.h_TD)
    return {
        "mode": mode,
        "seconds": elapsed_s,
        "useful_flops_per_s": problem.useful_flops / elapsed_s,
        "matmul_flops_per_s": matmul_peak(device),
        "extra_peak_bytes": peak_bytes,
        "loss_error": None if outcome.loss_T is None else relative_error(outcome.loss_T[:SUBSET], loss_T),
        "gradient_error": relative_error(got_TD, grad_TD),
        "note": outcome.note,
    }


def in_fresh_process(mode: str, options: argparse.Namespace) -> dict[str, Any]:
    sizes = ["--rows", options.rows, "--candidates", options.candidates, "--width", options.width]
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
        f"Written by `python benchmarks/softmax_gpu.py`: {options.rows:,} rows, K = {options.candidates:,}, "
        f"d = {options.width}, bfloat16, forward and backward; errors against float64 on {SUBSET} rows.",
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
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--candidates", type=int, default=2**21)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU: checks the script")
    parser.add_argument("--mode", choices=MODES, help="measure one mode in this process and print it as JSON")
    options = parser.parse_args()
    device = "cpu" if options.tiny else "cuda"
    if options.tiny:
        options.rows, options.candidates, options.width = 64, 512, 32
    elif not torch.cuda.is_available():
        sys.exit("softmax_gpu: this benchmark needs a CUDA device; --tiny checks the script without one")
    if options.mode:
        problem = make_problem(options.rows, options.candidates, options.width, device)
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
