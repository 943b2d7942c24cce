"""Stage 2 with K drawn negatives against stage 1 alone, at equal C: K against NLL, recall@10 and NDCG@10.

    python benchmarks/negatives.py --shards SHARDS [--processes 2]

For every budget C one stage-1 trunk is trained to FREEZE_SHARE * C; every K goes on from it with the embedder frozen
and the catalogue embedded once (counted in C), stage 1 alone goes on as it is. All rows are cooled down to C and scored
on the first QUERIES validation queries. Rows are kept in benchmarks/results/negatives.jsonl, so a study that was cut
off goes on.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from common import Key, kept_rows, machine, make_rows, publish

from bfm.errors import InfeasibleError
from bfm.events.shards import Shards
from bfm.files import Store
from bfm.training.config import TrainConfig
from bfm.training.data import TrainingData
from bfm.training.engine import EngineFactory
from bfm.training.loop import Trainer
from bfm.training.rung import run_rung
from bfm.training.task import RungTask

BUDGETS = {5e10: 1e4, 2e11: 2e4, 8e11: 4e4}
"""C to N: about its compute-optimal size on a laptop's log."""
NEGATIVES = (0, 256, 1024, 4096, 16384)
"""K = 0 is stage 1 alone."""
FREEZE_SHARE = 0.4
QUERIES = 5_000
BASE: dict[str, Any] = {"embedder_share": 0.1, "window": 64, "group_windows": 8, "d_item": 32, "learning_rate": 4e-3}
METRICS = ("nll", "recall@10", "ndcg@10")
Job = tuple[str, str, float, int]


def configuration(budget_flops: float, negatives: int) -> TrainConfig:
    """Of one row; K = 0 never freezes."""
    stage_2 = {"freeze_at_flops": FREEZE_SHARE * budget_flops, "negatives": negatives} if negatives else {}
    return TrainConfig.from_dict({**BASE, "params": BUDGETS[budget_flops], **stage_2})


def train_trunk(job: tuple[str, str, float]) -> None:
    """The stage-1 checkpoint that all K of a budget share."""
    shards, folder, budget_flops = job
    trainer = Trainer(
        configuration(budget_flops, 0), 0, TrainingData.of(Shards.open(shards)), EngineFactory(), micro_groups=1
    )
    trainer.run_trunk(FREEZE_SHARE * budget_flops)
    trainer.save(Store(folder), f"{budget_flops:g}")
    trainer.close()


def run(job: Job) -> dict[str, Any]:
    """One row, in a process of its own."""
    shards, folder, budget_flops, negatives = job
    config = configuration(budget_flops, negatives)
    name = f"run-{budget_flops:g}-{negatives}"
    task = RungTask("run", name, 0, budget_flops, config, 0, f"{budget_flops:g}", evaluation_queries=QUERIES)
    label = {"budget_flops": budget_flops, "negatives": negatives}
    try:
        row = run_rung(task, Shards.open(shards), EngineFactory(), Store(folder))
    except InfeasibleError as error:
        return {**label, "infeasible": str(error), "metrics": {}}
    kept = {key: row[key] for key in ("params", "path_flops", "steps", "events", "metrics")}
    return {**label, **kept}


def table(rows: list[dict[str, Any]], log: str) -> str:
    """One line per (C, K)."""
    lines = [
        "# Negatives drawn in stage 2",
        "",
        f"Written by `python benchmarks/negatives.py` over the log `{log}`, validation part, one seed. "
        f"Stage 2 begins at {FREEZE_SHARE:.0%} of C; K = 0 is stage 1 alone (in-batch negatives).",
        "",
        "| C | N | K | steps | " + " | ".join(METRICS) + " |",
        "|---|---|---|---|" + "---|" * len(METRICS),
    ]
    for row in sorted(rows, key=lambda row: (row["budget_flops"], row["negatives"])):
        begin = f"| {row['budget_flops']:.2g} | {row.get('params', 0):,} | {row['negatives']:,} |"
        if "infeasible" in row:
            lines.append(f"{begin} fewer than 100 |" + " |" * len(METRICS))
            continue
        values = " | ".join(f"{row['metrics'][name]:.4f}" for name in METRICS)
        lines.append(f"{begin} {row['steps']:,} | {values} |")
    return "\n".join([*lines, "", machine("torch"), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    manifest = Shards.open(arguments.shards).manifest
    wanted = [(budget, k) for budget in BUDGETS for k in NEGATIVES if k <= manifest.catalogue]
    with tempfile.TemporaryDirectory(prefix="bfm-negatives-") as folder:
        jobs: dict[Key, Job] = {(budget, k): (arguments.shards, folder, budget, k) for budget, k in wanted}
        with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
            missing = {budget for budget, k in jobs.keys() - kept_rows("negatives").keys()}
            pool.map(train_trunk, [(arguments.shards, folder, budget) for budget in missing])
        rows = make_rows("negatives", jobs, run, arguments.processes, METRICS)
    publish("negatives", table(list(rows.values()), manifest.name))


if __name__ == "__main__":
    main()
