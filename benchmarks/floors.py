"""One configuration, with what each log decides by default, beside the strongest floor of each metric.

    python benchmarks/floors.py NAME=SHARDS ... [--flops 1e11] [--processes 2]

Every run is `bfm train` without looks on the way; validation part, all queries, means over SEEDS.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from common import machine, publish, spread

from bfm.events.protocol import Protocol
from bfm.events.shards import Shards
from bfm.report.floors import strongest
from bfm.training.config import TrainConfig, log_defaults
from bfm.training.single import row_evaluation, train_single
from bfm.units import format_flops, parse_number

SEEDS = (0, 1, 2)
CONFIG = {"params": 1e4, "embedder_share": 0.05, "d_item": 32, "window": 256, "group_windows": 2}
METRICS = ("nll", "recall@10", "ndcg@10", "mrr@10", "coverage@10")
Job = tuple[str, str, float, int]
"""Name, shards, C, seed."""


def run(job: Job) -> tuple[str, dict[str, Any]]:
    """One seed: its row's evaluation beside the floors, in a process of its own."""
    name, shards, flops, seed = job
    opened = Shards.open(shards)
    decided = log_defaults(CONFIG, Protocol.load(opened).filter_seen, opened.history_length)
    config = TrainConfig.from_dict({**CONFIG, **decided})
    with tempfile.TemporaryDirectory(prefix="bfm-floors-") as folder:
        row = train_single(
            config, seed, shards, folder, flops=flops, queries=None, scaling={"micro_groups": 1}, validations=0
        )
        return name, row_evaluation(row, folder, shards, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", metavar="NAME=SHARDS")
    parser.add_argument("--flops", default="1e11")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    flops = parse_number(arguments.flops, key="--flops")
    logs = dict(log.split("=", 1) for log in arguments.logs)
    jobs = [(name, shards, flops, seed) for name, shards in logs.items() for seed in SEEDS]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in logs}
    with multiprocessing.get_context("spawn").Pool(arguments.processes, maxtasksperchild=1) as pool:
        for name, evaluation in pool.imap_unordered(run, jobs):
            found[name].append(evaluation)
            print(name, {metric: round(evaluation["metrics"][metric], 4) for metric in METRICS}, flush=True)
    lines = [
        "# Models beside floors",
        "",
        f"Written by `python benchmarks/floors.py`: {CONFIG}, C = {format_flops(flops)}, {len(SEEDS)} seeds (mean ± "
        "standard deviation); behind it the strongest floor. Validation part.",
        "",
        "| log | queries | " + " | ".join(METRICS) + " |",
        "|---|---|" + "---|" * len(METRICS),
    ]
    for name, evaluations in found.items():
        cells = []
        for metric in METRICS:
            values = [evaluation["metrics"][metric] for evaluation in evaluations]
            floor = strongest(evaluations[0]["baselines"], metric)
            beside = f" ({floor.name} {floor.value:.4f})" if floor else ""
            cells.append(f"{spread(values)}{beside}")
        lines.append(f"| {name} | {evaluations[0]['queries']:,} | {' | '.join(cells)} |")
    publish("floors", "\n".join([*lines, "", machine("torch"), ""]))


if __name__ == "__main__":
    main()
