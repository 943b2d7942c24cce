"""The sampled softmax against PyTorch's own losses on the CPU: forward and backward, drawing and gathering included.

    python benchmarks/softmax.py [--threads 2] [--rounds 5] [--shrink 1] [--only KEY]

Every mode has a process of its own; the modes take turns, and the least of the rounds counts. Memory is the most that
a process held in any round beyond what it held before its first (resident pages, sampled every 2 ms from outside),
less the drawn ids and their log probabilities, which all modes hold. All modes compute the same function of the same
draws: every target is certain to be drawn (pi = 1), so a query's own column is uncorrected. Candidates are constant,
the gradient is that of the queries. Writes benchmarks/results/softmax.md and .json.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from common import RESULTS, ROOT, cpu_name

NUM_ITEMS, FEW_ITEMS, WIDTH, CERTAIN, SCALE = 2_500_000, 100_000, 64, 1024, 20.0
CHUNKS = (8, 16, 32, 64, 128)
WIDE_CHUNKS = (64, 128, 256, 512, 1024)
SAMPLE_S = 0.002
PAGE = os.sysconf("SC_PAGE_SIZE")
OURS, TWO_PASS, DENSE, AUTO = "bfm one-pass", "bfm two-pass", "dense", "torch, auto"


@dataclass(frozen=True)
class Setting:
    """A problem and the modes that solve it."""

    key: str
    queries: int
    candidates: int
    items: int
    modes: tuple[str, ...]


SETTINGS = (
    Setting("many", 128, 2_097_152, NUM_ITEMS, (OURS, *(f"torch, {rows} rows" for rows in CHUNKS), AUTO)),
    Setting("few", 128, 65_536, NUM_ITEMS, (OURS,)),
    Setting("wide", 1024, 65_536, FEW_ITEMS, (OURS, TWO_PASS, DENSE, *(f"torch, {rows} rows" for rows in WIDE_CHUNKS))),
)
PEERS = {
    "liger-kernel": ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
    "cut-cross-entropy": ("cut_cross_entropy", "linear_cross_entropy"),
}


def solver(mode: str, queries: int, candidates: int, items: int, folder: Path) -> Callable[[int], list[float]]:
    """A function of the round that draws, gathers and computes; gives the loss and a few numbers of the gradient."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    from bfm.objective.sampling import Proposal, drawn_inclusion, group_rng
    from bfm.objective.softmax import log_sum

    table_VD = torch.from_numpy(np.load(folder / "table.npy", mmap_mode="r")[:items].copy())
    popularity_V = (1e9 / np.arange(1, items + 1) ** 0.8).astype(np.int64) + 1
    popularity_V[:CERTAIN] = 10**18
    pi_V = drawn_inclusion(popularity_V, candidates, 0.5)
    assert (pi_V[:CERTAIN] == 1.0).all()
    proposal, log_pi_V = Proposal.of(pi_V), torch.from_numpy(np.log(pi_V)).float()
    generator = torch.Generator().manual_seed(1)
    h_QD = F.normalize(torch.randn(queries, WIDTH, generator=generator), dim=-1)
    target_Q = torch.randint(0, CERTAIN, (queries,), generator=generator)

    def ours(q_QD: torch.Tensor, ids_K: torch.Tensor, log_pi_K: torch.Tensor) -> torch.Tensor:
        log_sum_Q = log_sum(q_QD, table_VD, ids_K, log_pi_K, method="two_pass" if mode == TWO_PASS else "one_pass")
        return (log_sum_Q - (q_QD * table_VD[target_Q]).sum(1)).mean()

    def theirs(q_QD: torch.Tensor, ids_K: torch.Tensor, log_pi_K: torch.Tensor) -> torch.Tensor:
        vectors_KD, column_Q = table_VD[ids_K], torch.searchsorted(ids_K, target_Q)
        if mode == DENSE:
            return F.cross_entropy(F.linear(q_QD, vectors_KD, -log_pi_K), column_Q)
        options = torch.nn.LinearCrossEntropyOptions()
        if mode != AUTO:
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=int(mode.split()[1]))
        return F.linear_cross_entropy(q_QD, vectors_KD, column_Q, linear_bias=-log_pi_K, options=options)

    def solve(index: int) -> list[float]:
        ids_K = torch.from_numpy(proposal.draw(group_rng(0, index)))
        leaf_QD = h_QD.clone().requires_grad_()
        loss = (ours if mode in (OURS, TWO_PASS) else theirs)(SCALE * leaf_QD, ids_K, log_pi_V[ids_K])
        loss.backward()
        return [float(loss.detach()), *leaf_QD.grad[0, :4].tolist(), float(leaf_QD.grad.norm())]

    # What the libraries set up once, at a size that does not show in the memory.
    small = torch.randn(64, WIDTH)
    torch.softmax(small @ small.T, 1).exp().sum().item()
    del popularity_V, pi_V
    # What the set-up has freed, the loss would fill unseen.
    ctypes.CDLL(None).malloc_trim(0)
    return solve


def serve(mode: str, queries: int, candidates: int, items: int, folder: Path, threads: int) -> None:
    """Solves a round for every line of input."""
    import torch

    torch.set_num_threads(threads)
    solve = solver(mode, queries, candidates, items, folder)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        start, cpu_start = time.perf_counter(), time.process_time()
        answer = solve(int(line))
        print(json.dumps([time.perf_counter() - start, time.process_time() - cpu_start, answer]), flush=True)


class Mode:
    """One mode's process, seen from outside."""

    def __init__(self, name: str, setting: Setting, folder: Path, threads: int) -> None:
        self.name, self.seconds, self.cpu_seconds, self.answers, self.peak_bytes = name, [], [], [], 0
        sizes = map(str, (setting.queries, setting.candidates, setting.items))
        command = [sys.executable, __file__, "--serve", name, *sizes, str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [*command, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answer()
        self.before_bytes = self._resident_bytes()

    def round(self, index: int) -> None:
        """One round, on the draw of this index."""
        self.process.stdin.write(f"{index}\n")
        self.process.stdin.flush()
        elapsed_s, cpu_s, answer = self._answer()
        self.seconds.append(elapsed_s)
        self.cpu_seconds.append(cpu_s)
        self.answers.append(answer)

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> list:
        while not select.select([self.process.stdout], [], [], SAMPLE_S)[0]:
            self.peak_bytes = max(self.peak_bytes, self._resident_bytes())
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with code {self.process.wait()}")
        return json.loads(line)

    def _resident_bytes(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * PAGE


def measure(setting: Setting, folder: Path, threads: int, rounds: int) -> list[dict]:
    """The least time and the extra memory of every mode of a setting."""
    modes = []
    for name in setting.modes:
        modes.append(Mode(name, setting, folder, threads))
        # What loading held for a moment is not what the loss holds.
        modes[-1].peak_bytes = 0
    for index in range(rounds):
        for mode in modes:
            mode.round(index)
    rows = []
    for mode in modes:
        mode.close()
        ids_bytes = setting.candidates * 12
        rows.append(
            {
                "mode": mode.name,
                "rounds": len(mode.seconds),
                "seconds": min(mode.seconds),
                "cpu_seconds": min(mode.cpu_seconds),
                "extra_mb": (mode.peak_bytes - mode.before_bytes - ids_bytes) / 1e6,
                "distance": distance(mode.answers[0], modes[0].answers[0]),
            }
        )
    return rows


def distance(answer: list[float], first: list[float]) -> float:
    """The largest difference of what two modes give for the same draw, relative to its size."""
    size = max(map(abs, first[1:5]))
    gradient = max(abs(a - b) / size for a, b in zip(answer[1:5], first[1:5], strict=True))
    return max(gradient, abs(answer[0] / first[0] - 1), abs(answer[5] / first[5] - 1))


def peers() -> list[str]:
    """What the published kernels say to a small problem on this machine."""
    import torch

    h_QD, vectors_KD = torch.randn(16, WIDTH, requires_grad=True), torch.randn(1000, WIDTH)
    column_Q, bias_K = torch.randint(0, 1000, (16,)), torch.randn(1000)
    lines = []
    for package, (module, function) in PEERS.items():
        try:
            loss = getattr(importlib.import_module(module), function)
            loss(h_QD, vectors_KD, column_Q, bias=bias_K).backward()
            lines.append(f"{package} {importlib.metadata.version(package)}: runs here, but is not measured.")
        except Exception as error:
            lines.append(f"{package}: does not run here ({type(error).__name__}: {str(error).splitlines()[0]}).")
    return lines


def table(setting: Setting, rows: list[dict]) -> list[str]:
    """A setting's rows in markdown."""
    first = rows[0]["seconds"]
    lines = [
        f"## {setting.queries:,} queries, K = {setting.candidates:,} of {setting.items:,} items",
        "",
        "| mode | rounds | seconds | time / one-pass | CPU seconds | useful GFLOP/s | extra MB | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate = 4 * setting.queries * setting.candidates * WIDTH / row["seconds"] / 1e9
        lines.append(
            f"| {row['mode']} | {row['rounds']} | {row['seconds']:.3f} | {row['seconds'] / first:.2f} "
            f"| {row['cpu_seconds']:.3f} | {rate:.0f} "
            f"| {row['extra_mb']:.1f} | {row['distance']:.0e} |"
        )
    return [*lines, ""]


def summary(measured: dict[str, list[dict]]) -> list[str]:
    """The ratios that matter."""
    by = {key: {row["mode"]: row for row in rows} for key, rows in measured.items()}
    lines = []
    if "many" in by:
        best = min((by["many"][f"torch, {rows} rows"] for rows in CHUNKS), key=lambda row: row["seconds"])
        ours = by["many"][OURS]["seconds"]
        lines.append(
            f"K = {SETTINGS[0].candidates:,}: {best['seconds'] / ours:.2f} x faster than F.linear_cross_entropy at its "
            f"best chunk ({best['mode']}), {by['many'][AUTO]['seconds'] / ours:.1f} x than its automatic setting."
        )
    if "many" in by and "few" in by:
        growth_mb = by["many"][OURS]["extra_mb"] - by["few"][OURS]["extra_mb"]
        lines.append(f"Memory beyond ids and log probabilities grows by {growth_mb:.1f} MB from K = 65,536.")
    if "wide" in by:
        ours, dense = by["wide"][OURS], by["wide"][DENSE]
        lines.append(
            f"1,024 queries, K = 65,536: {dense['seconds'] / ours['seconds']:.2f} x faster than "
            f"F.cross_entropy(F.linear(...)) with {ours['extra_mb'] / dense['extra_mb']:.3f} of its extra memory."
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shrink", type=int, default=1, help="divide catalogue and candidates, for a trial run")
    parser.add_argument("--only", choices=[setting.key for setting in SETTINGS])
    parser.add_argument("--serve", nargs=6, metavar=("MODE", "QUERIES", "CANDIDATES", "ITEMS", "FOLDER", "THREADS"))
    arguments = parser.parse_args()
    if arguments.serve:
        mode, queries, candidates, items, folder, threads = arguments.serve
        serve(mode, int(queries), int(candidates), int(items), Path(folder), int(threads))
        return
    import numpy as np

    load, start = os.getloadavg()[0], time.monotonic()
    measured, text = {}, []
    with tempfile.TemporaryDirectory(prefix="bfm-softmax-") as name:
        rng = np.random.default_rng(0)
        vectors_VD = rng.standard_normal((NUM_ITEMS // arguments.shrink, WIDTH), dtype=np.float32)
        np.save(Path(name) / "table.npy", vectors_VD / np.linalg.norm(vectors_VD, axis=1, keepdims=True))
        del vectors_VD
        for setting in SETTINGS:
            if arguments.only not in (None, setting.key):
                continue
            setting = replace(
                setting, candidates=setting.candidates // arguments.shrink, items=setting.items // arguments.shrink
            )
            measured[setting.key] = measure(setting, Path(name), arguments.threads, arguments.rounds)
            text += table(setting, measured[setting.key])
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("torch", "numpy"))
    text = [
        "# Sampled softmax on the CPU: speed and memory",
        "",
        f"Written by `python benchmarks/softmax.py`: d = {WIDTH}, float32, forward and backward, "
        f"{arguments.threads} threads, drawing and gathering included.",
        "",
        *text,
        *(f"- {line}" for line in [*summary(measured), *peers()]),
        "",
        f"Machine: {os.cpu_count()} cores, {cpu_name()}; load average before and after {load:.1f} and "
        f"{os.getloadavg()[0]:.1f}; Python {platform.python_version()}, {versions}; "
        f"{time.monotonic() - start:.0f} s in all.",
        "",
    ]
    print("\n".join(text))
    if arguments.shrink == 1 and arguments.only is None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "softmax.md").write_text("\n".join(text))
        (RESULTS / "softmax.json").write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
