"""Full-catalogue metrics against the bare floor: the matmul of all scores, and that with torch.topk.

The floor does no ranks, ties, likelihood or coverage; it runs at the best of several chunk sizes with torch's own
threads. Ours makes recall, NDCG, MRR, coverage and the exact NLL of every query. Each mode in a process of its own,
modes interleaved, minimum of the rounds; memory sampled from outside.
Run with `python benchmarks/ranking.py`; writes benchmarks/results/ranking.md and .json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from common import RESULTS, cpu_name  # noqa: E402
from torch import Tensor  # noqa: E402

from bfm.ragged import Ragged  # noqa: E402
from bfm.ranking.metrics import score_queries, summarise  # noqa: E402
from bfm.ranking.ranks import DotScores, rank_targets  # noqa: E402

K = 10
SCALE = 20.0
# Rows and items of a block of the floor; ALL items make torch.topk's job one call per row.
ALL = 0
FLOOR_BLOCKS = ((16, ALL), (64, ALL), (256, ALL), (1024, ALL), (128, 4096), (256, 2048), (256, 8192), (1024, 2048))
SAMPLE_S = 0.005
TRIED = 2048


@dataclass(frozen=True)
class Measured:
    """One run of one mode."""

    elapsed_s: float
    cpu_s: float
    grown_mb: float
    """Peak of the process above what it held when its inputs were made and its code was warm."""


def inputs(users: int, items: int, width: int) -> tuple[Tensor, Tensor, Ragged]:
    """Scaled queries, unit items and one target per query."""
    generator = torch.Generator().manual_seed(0)
    unit = [torch.nn.functional.normalize(torch.randn(n, width, generator=generator), dim=1) for n in (users, items)]
    ids = torch.randint(items, (users,), generator=generator, dtype=torch.int32)
    return SCALE * unit[0], unit[1], Ragged(ids.numpy(), np.arange(users + 1))


def matmul(queries_QD: Tensor, items_VD: Tensor, rows: int, columns: int, with_topk: bool) -> None:
    """The floor: scores of all queries block by block, and their first K."""
    columns = columns or len(items_VD)
    scores_RC = torch.empty(rows * columns)
    for part_RD in queries_QD.split(rows):
        values, ids = [], []
        for start in range(0, len(items_VD), columns):
            items_CD = items_VD[start : start + columns]
            block_RC = scores_RC[: len(part_RD) * len(items_CD)].view(len(part_RD), len(items_CD))
            torch.mm(part_RD, items_CD.T, out=block_RC)
            if with_topk:
                value_Rk, index_Rk = torch.topk(block_RC, K, dim=1)
                values.append(value_Rk)
                ids.append(index_Rk + start)
        if len(values) > 1:
            torch.cat(ids, 1).gather(1, torch.topk(torch.cat(values, 1), K, dim=1).indices)


def full_metrics(queries_QD: Tensor, items_VD: Tensor, targets: Ragged) -> dict[str, float]:
    """Everything that an evaluation says of its queries."""
    ranked = rank_targets(DotScores(queries_QD, items_VD), targets, len(items_VD), K)
    rows = np.arange(len(queries_QD))
    scores = score_queries(
        ranked, targets, len(items_VD), (K,), query_Q=rows, user_Q=rows, basket_Q=np.zeros(len(rows), bool)
    )
    return summarise(scores).metrics


def mode(name: str, users: int, items: int, width: int) -> Callable[[int], object]:
    """A function of the number of queries, from `ours`, `matmul:ROWS:ITEMS` or `topk:ROWS:ITEMS`."""
    queries_QD, items_VD, targets = inputs(users, items, width)
    if name == "ours":
        return lambda count: full_metrics(
            queries_QD[:count], items_VD, Ragged(targets.ids[:count], targets.offsets[: count + 1])
        )
    kind, rows, columns = name.split(":")
    return lambda count: matmul(queries_QD[:count], items_VD, int(rows), int(columns), kind == "topk")


def child(name: str, users: int, items: int, width: int) -> None:
    """Measure a mode; the parent samples memory between the two lines that are printed."""
    run = mode(name, users, items, width)
    run(min(users, 1024))
    print("ready", flush=True)
    sys.stdin.readline()
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    run(users)
    print(json.dumps([time.perf_counter() - begin_s, time.process_time() - begin_cpu_s]), flush=True)


def measure(name: str, users: int, items: int, width: int) -> Measured:
    """One run in a fresh process."""
    command = [sys.executable, __file__, "--mode", name, "--users", str(users), "--items", str(items)]
    process = subprocess.Popen(
        [*command, "--width", str(width)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise RuntimeError(f"{name}: the measuring process failed")
    watched, done = psutil.Process(process.pid), threading.Event()
    held = [watched.memory_info().rss]

    def watch() -> None:
        while not done.wait(SAMPLE_S):
            held.append(watched.memory_info().rss)

    sampler = threading.Thread(target=watch)
    sampler.start()
    process.stdin.write("go\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    done.set()
    sampler.join()
    process.stdin.close()
    if process.wait() or not answer:
        raise RuntimeError(f"{name}: the measuring process failed")
    elapsed_s, cpu_s = json.loads(answer)
    return Measured(elapsed_s, cpu_s, (max(held) - held[0]) / 2**20)


def best_block(kind: str, items: int, width: int) -> tuple[str, dict[str, float]]:
    """The floor at its best block, found on a few queries in this process, and the seconds of every block."""
    seconds = {}
    for rows, columns in FLOOR_BLOCKS:
        name = f"{kind}:{rows}:{columns}"
        run = mode(name, TRIED, items, width)
        run(TRIED)
        times = []
        for _ in range(3):
            begin_s = time.perf_counter()
            run(TRIED)
            times.append(time.perf_counter() - begin_s)
        seconds[name] = min(times)
    return min(seconds, key=seconds.__getitem__), seconds


def block_title(name: str) -> str:
    _, rows, columns = name.split(":")
    return f"blocks of {rows} x {'all' if int(columns) == ALL else columns}"


def machine() -> str:
    memory_gb = psutil.virtual_memory().total / 2**30
    return f"{os.cpu_count()} cores, {cpu_name()}, {memory_gb:.0f} GB"


def report(options: argparse.Namespace) -> tuple[list[str], dict[str, object]]:
    users, items, width = options.users, options.items, options.width
    before = os.getloadavg()[0]
    chosen = {kind: best_block(kind, items, width) for kind in ("matmul", "topk")}
    names = {"matmul": chosen["matmul"][0], "topk": chosen["topk"][0], "ours": "ours"}
    runs: dict[str, list[Measured]] = {key: [] for key in names}
    for _ in range(options.rounds):
        for key, name in names.items():
            runs[key].append(measure(name, users, items, width))
    growth = {count: measure("ours", count, items, width).grown_mb for count in (users // 10, users)}
    best = {key: min(measured, key=lambda one: one.elapsed_s) for key, measured in runs.items()}
    lines = [
        "# Full-catalogue evaluation against its floor",
        "",
        f"Written by `python benchmarks/ranking.py`: {users:,} users, {items:,} items, d = {width}, k = {K}; fresh",
        f"processes, modes interleaved, minimum of {options.rounds}, {torch.get_num_threads()} threads.",
        "",
        "| | seconds | CPU seconds | useful GFLOP/s | time / (matmul + topk) | peak memory beyond inputs, MB |",
        "|---|---|---|---|---|---|",
    ]
    titles = {
        "matmul": f"matmul alone, {block_title(names['matmul'])}",
        "topk": f"matmul and torch.topk, {block_title(names['topk'])}",
        "ours": "recall, NDCG, MRR, coverage and exact NLL",
    }
    for key, one in best.items():
        rate = 2 * users * items * width / one.elapsed_s / 1e9
        ratio = one.elapsed_s / best["topk"].elapsed_s
        memory = max(run.grown_mb for run in runs[key])
        lines.append(
            f"| {titles[key]} | {one.elapsed_s:.1f} | {one.cpu_s:.1f} | {rate:.0f} | {ratio:.2f} | {memory:.0f} |"
        )
    few, many = growth
    outputs_mb = (many - few) * 8 * (K + 2 + 7) / 2**20
    lines += [
        "",
        f"Peak memory of ours beyond inputs, {few:,} -> {many:,} users: {growth[few]:.0f} -> {growth[many]:.0f} MB;",
        f"the outputs (first {K} ids, rank, NLL, seven metrics per user) are {outputs_mb:.0f} MB of the difference.",
        "",
        f"Machine: {machine()}; load average before and after {before:.1f} and {os.getloadavg()[0]:.1f}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}.",
    ]
    raw = {
        "options": {"users": users, "items": items, "width": width, "rounds": options.rounds},
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "load": [before, os.getloadavg()[0]],
        "floor_blocks_s": {kind: seconds for kind, (_, seconds) in chosen.items()},
        "runs": {key: [asdict(one) for one in measured] for key, measured in runs.items()},
        "grown_mb": growth,
    }
    return lines, raw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=70_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mode", help="measure one mode in this process; used by the benchmark itself")
    options = parser.parse_args()
    if options.mode:
        child(options.mode, options.users, options.items, options.width)
        return
    lines, raw = report(options)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "ranking.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "ranking.json").write_text(json.dumps(raw, indent=2) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
