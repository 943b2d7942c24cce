"""What scores items on one device, for benchmarks/gpu.py: the sampled softmax and the pass over a catalogue.

Of the loss: ways to compute it, their time, memory and errors.

A problem is q = scale * h and unit vectors, both rounded to bfloat16, so that every way has the same right answer: the
float64 loss of these. Time is of forward and backward of the mean loss in q, the gathering of candidates included;
useful work is 4 x queries x K x d, 6 where the table is trained too. SDPA has no room for log pi and gets pi = 1.

Q = queries, K = candidates, R = table rows, V = items, D = width, H = heads that share the candidates of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bfm.model.matmul_peak import timed_s
from bfm.objective.fused import Tile, fused_softmax_state, num_splits
from bfm.objective.softmax import log_sum
from bfm.objective.tiled import State, log_sum_of_state, merge
from bfm.ragged import Ragged
from bfm.ranking.ranks import DotScores, rank_targets

SCALES = (20.0, 60.0, 100.0)
SUBSET = 256
RUNS, RUNS_S = 5, 8.0
TILES = (Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 128, 8, 2), Tile(64, 64, 4, 3), Tile(128, 32, 8, 4))


@dataclass(frozen=True)
class Problem:
    """Q queries, the target of each among the K candidates and certain to be there; R table rows of width D."""

    q_QD: Tensor
    """Float32 with bfloat16 values."""
    table_RD: Tensor
    """Bfloat16."""
    ids_K: Tensor
    log_pi_K: Tensor
    column_Q: Tensor
    """Of the target among the candidates."""

    @property
    def target_QD(self) -> Tensor:
        return self.table_RD[self.ids_K[self.column_Q]].float()


@dataclass(frozen=True)
class Outcome:
    """Loss per query, gradient of the mean loss in q, what was chosen."""

    loss_Q: Tensor
    grad_QD: Tensor
    note: str = ""


Way = Callable[[Problem], Outcome]


def make_problem(queries: int, candidates: int, width: int, scale: float, device: str) -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def unit(num: int) -> Tensor:
        return F.normalize(torch.randn(num, width, generator=generator, device=device), dim=-1)

    table_RD = unit(candidates + candidates // 4).bfloat16()
    ids_K = torch.randperm(len(table_RD), generator=generator, device=device)[:candidates].sort().values
    log_pi_K = -3 * torch.rand(candidates, generator=generator, device=device)
    column_Q = torch.randint(0, candidates, (queries,), generator=generator, device=device)
    log_pi_K[column_Q] = 0.0
    return Problem((scale * unit(queries)).bfloat16().float(), table_RD, ids_K, log_pi_K, column_Q)


def differentiated(problem: Problem, log_sum_of: Callable[[Tensor], Tensor], note: str = "") -> Outcome:
    """Loss and gradient by a log sum that is differentiable in q."""
    leaf_QD = problem.q_QD.clone().requires_grad_()
    loss_Q = log_sum_of(leaf_QD) - (leaf_QD * problem.target_QD).sum(-1)
    loss_Q.mean().backward()
    assert leaf_QD.grad is not None
    return Outcome(loss_Q.detach(), leaf_QD.grad, note)


def by_method(method: str, *, trained: bool = False) -> Way:
    """As bfm computes it."""

    def way(problem: Problem) -> Outcome:
        table_RD = problem.table_RD.clone().requires_grad_() if trained else problem.table_RD
        arguments = (table_RD, problem.ids_K, problem.log_pi_K)
        return differentiated(problem, lambda q_QD: log_sum(q_QD, *arguments, method=method))

    return way


def by_tile(tile: Tile) -> Way:
    """The Triton kernel with a tile of one's own choice."""

    def way(problem: Problem) -> Outcome:
        arguments = (problem.table_RD, problem.ids_K, problem.log_pi_K, tile)
        return differentiated(
            problem, lambda q_QD: log_sum_of_state(q_QD, fused_softmax_state(q_QD, *arguments)), str(tile)
        )

    return way


def attention_heads(problem: Problem) -> int:
    """Candidates are dealt to this many heads, since one head of few query tiles would not fill the device."""
    if problem.q_QD.device.type == "cpu":
        return 2
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    splits = num_splits(-(-len(problem.q_QD) // 128), 64, processors)
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


def flex() -> Way:
    """Candidates as keys and values of flex_attention; log pi is a score modification."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    attend = torch.compile(flex_attention) if torch.cuda.is_available() else flex_attention

    def way(problem: Problem) -> Outcome:
        heads, width = attention_heads(problem), problem.q_QD.shape[1]
        log_pi_HK = problem.log_pi_K.view(heads, -1)

        def correct(score: Tensor, b: Tensor, head: Tensor, query: Tensor, column: Tensor) -> Tensor:
            return score - log_pi_HK[head, column]

        def log_sum_of(q_QD: Tensor) -> Tensor:
            c_1HKD = problem.table_RD[problem.ids_K].view(1, heads, -1, width)
            q_1HQD = q_QD.detach().bfloat16().expand(1, heads, -1, -1)
            out_1HQD, extra = attend(
                q_1HQD, c_1HKD, c_1HKD, score_mod=correct, scale=1.0, return_aux=AuxRequest(lse=True)
            )
            return log_sum_of_state(q_QD, merge_heads(extra.lse[0], out_1HQD[0]))

        return differentiated(problem, log_sum_of, f"{heads} heads")

    return way


def attention(backend: str) -> Way:
    """Candidates as keys and values of SDPA, pi = 1: its output is the gradient of the log sum, its lse the log sum."""

    def way(problem: Problem) -> Outcome:
        heads, width = attention_heads(problem), problem.q_QD.shape[1]
        c_1HKD = problem.table_RD[problem.ids_K].view(1, heads, -1, width)

        def log_sum_of(q_QD: Tensor) -> Tensor:
            q_1HQD = q_QD.detach().bfloat16().expand(1, heads, -1, -1).contiguous()
            if backend == "flash":
                out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q_1HQD, c_1HKD, c_1HKD, scale=1.0)
            else:
                arguments = (q_1HQD, c_1HKD, c_1HKD, None, True)
                out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*arguments, scale=1.0)
            return log_sum_of_state(q_QD, merge_heads(lse.reshape(heads, -1), out[0]))

        return differentiated(problem, log_sum_of, f"{heads} heads")

    return way


def uniform(problem: Problem) -> Problem:
    """The same with pi = 1 for all."""
    return replace(problem, log_pi_K=torch.zeros_like(problem.log_pi_K))


# Name: its variants, of which the fastest counts; made where they are measured, since some import what may lack.
WAYS: dict[str, Callable[[], list[Way]]] = {
    "triton": lambda: [by_method("triton")],
    "one_pass": lambda: [by_method("one_pass")],
    "two_pass": lambda: [by_method("two_pass")],
    "two_pass, trained table": lambda: [by_method("two_pass", trained=True)],
    "flex_attention": lambda: [flex()],
    "SDPA flash": lambda: [attention("flash")],
    "SDPA cuDNN": lambda: [attention("cudnn")],
    "triton, best tile": lambda: [by_tile(tile) for tile in TILES],
}


def exact(problem: Problem) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the sum in q of the first SUBSET queries in float64, candidate block by block."""
    q_QD, target_QD = problem.q_QD[:SUBSET].double(), problem.target_QD[:SUBSET].double()
    state: State = (torch.full_like(q_QD[:, 0], -torch.inf), torch.zeros_like(q_QD[:, 0]), torch.zeros_like(q_QD))
    for ids_C, log_pi_C in zip(problem.ids_K.split(65536), problem.log_pi_K.split(65536), strict=True):
        c_CD = problem.table_RD[ids_C].double()
        logits_QC = q_QD @ c_CD.T - log_pi_C.double()
        max_Q = logits_QC.amax(1)
        weight_QC = torch.exp(logits_QC - max_Q[:, None])
        state = merge(state, (max_Q, weight_QC.sum(1), weight_QC @ c_CD))
    max_Q, sum_Q, weighted_QD = state
    return max_Q + sum_Q.log() - (q_QD * target_QD).sum(-1), weighted_QD / sum_Q[:, None] - target_QD


def matmul_peak(device: str) -> float:
    """FLOP/s of the best of 20 bfloat16 products of random square matrices."""
    size = 8192 if device == "cuda" else 128
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2.0 * size**3 / min(timed_s(lambda: left @ right, torch.device(device)) for _ in range(20))


def extra_bytes(way: Way, problem: Problem, device: str) -> int:
    """Peak memory of a run beyond the problem, 0 on the CPU."""
    if device == "cpu":
        way(problem)
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way(problem)
    return torch.cuda.max_memory_allocated() - before


def fastest(variants: list[Way], problem: Problem, device: str) -> tuple[float, Way, list[Exception]]:
    """Seconds of the variant with the fastest single run after its warm-up, and what kept others from running.

    Raises the first of these where none runs.
    """
    found, failures = [], []
    for variant in variants:
        try:
            variant(problem)
            spent_s = [timed_s(lambda run=variant: run(problem), torch.device(device))]
            while len(spent_s) < RUNS and sum(spent_s) < RUNS_S:
                spent_s.append(timed_s(lambda run=variant: run(problem), torch.device(device)))
            found.append((min(spent_s), variant))
        except Exception as error:
            # A tile too large for this card; the others count.
            failures.append(error)
    if not found:
        raise failures[0]
    return *min(found, key=lambda pair: pair[0]), failures


def largest_error(way: Way, problem: Problem) -> float:
    """Of the losses of SUBSET queries against float64, nats."""
    return float((way(problem).loss_Q[:SUBSET] - exact(problem)[0]).abs().max())


def gradient_error(way: Way, problem: Problem) -> float:
    """Relative, in norm, over SUBSET queries."""
    got_QD, right_QD = way(problem).grad_QD[:SUBSET].double() * len(problem.q_QD), exact(problem)[1]
    return float((got_QD - right_QD).norm() / right_QD.norm())


def measure_loss(name: str, queries: int, candidates: int, width: int, device: str) -> Iterator[tuple[str, object]]:
    """(figure, value) pairs of a way. Raises what it raises where none of its variants runs."""

    def problem(scale: float, candidates: int) -> Problem:
        made = make_problem(queries, candidates, width, scale, device)
        return uniform(made) if name.startswith("SDPA") else made

    elapsed_s, way, failures = fastest(WAYS[name](), problem(SCALES[0], candidates), device)
    useful_flops = (6.0 if "trained" in name else 4.0) * queries * candidates * width
    yield "ms", 1e3 * elapsed_s
    yield "useful TFLOP/s", useful_flops / elapsed_s / 1e12
    yield "share of the matmul peak", useful_flops / elapsed_s / matmul_peak(device)
    extra, of_fewer = (extra_bytes(way, problem(SCALES[0], candidates // part), device) for part in (1, 4))
    yield "extra peak MB", extra / 2**20
    yield "extra peak over that at K / 4", extra / max(1, of_fewer)
    yield "relative error of the gradient", gradient_error(way, problem(SCALES[0], candidates))
    for scale in SCALES:
        yield f"largest error of a loss at scale {scale:g}, nats", largest_error(way, problem(scale, candidates))
    note = way(problem(SCALES[0], candidates)).note
    if note or failures:
        yield "note", "; ".join(filter(None, [note, f"{len(failures)} variants failed" if failures else ""]))


def measure_evaluation(device: str, tiny: bool) -> Iterator[tuple[str, object]]:
    """One pass of 1e5 queries over a catalogue of 1e7 items, and ranks against float64."""
    queries, items, width = (64, 5000, 16) if tiny else (100_000, 10_000_000, 64)
    generator = torch.Generator(device).manual_seed(0)
    h_QD, v_VD = (
        F.normalize(torch.randn(number, width, generator=generator, device=device), dim=1)
        for number in (queries, items)
    )
    ids = np.random.default_rng(0).integers(0, items, queries).astype(np.int32)
    # A fifth of the targets lie near their query, so that some are ranked.
    near = torch.arange(0, queries, 5, device=device)
    h_QD[near] = F.normalize(h_QD[near] + v_VD[torch.from_numpy(ids[::5].copy()).long().to(device)], dim=1)
    found = []
    targets = Ragged(ids, np.arange(queries + 1))
    elapsed_s = timed_s(
        lambda: found.append(rank_targets(DotScores(20 * h_QD, v_VD), targets, items, 10)), torch.device(device)
    )
    yield "s", elapsed_s
    yield "scores per s", queries * items / elapsed_s
    if device == "cuda":
        yield "peak GB", torch.cuda.max_memory_allocated() / 2**30
    wrong = 0
    for query in range(0, min(320, queries), 5):
        score_V = torch.cat([part.double() @ h_QD[query].double() for part in v_VD.split(1 << 20)])
        rank = 1 + int((score_V > score_V[int(ids[query])]).sum())
        wrong += (rank if rank <= 10 else np.inf) != found[0].rank_N[query]
    yield "ranks that differ from float64, of 64", int(wrong)
