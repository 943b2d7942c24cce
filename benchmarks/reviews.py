"""Leave-one-out on the reviews of cosmetics that papers use: the two-part model beside floors and published values.

    python benchmarks/reviews.py --data FOLDER [--movielens EVENTS] [--processes 2]

FOLDER holds events.parquet (user_id, position, item_id) and items.parquet (item_id, attribute_ids). Trained on all but
the last two events of every user; the validation item enters only the test query; ranked against the full catalogue,
all users, seen items filtered (asked for by the schemas, as the published protocol does); means over SEEDS. The model
mixes in counted neighbours, trained with it (`counts: neighbours`). --movielens adds the ratings of a MovieLens file,
with the same settings, which were chosen on the validation part of the reviews (choices_one_at_a_time.md).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from choices import REVIEWS
from common import ROOT, machine, publish

from bfm.events.protocol import Protocol
from bfm.events.shards import Shards
from bfm.ranking.baselines import baseline_metrics
from bfm.training.config import TrainConfig
from bfm.training.single import evaluate_checkpoint, train_single

SEEDS = (0, 1, 2)
CONFIG = {**REVIEWS, "counts": "neighbours", "params": 3e5, "dropout": 0.05, "table_weight_decay": 2.0}
FLOPS = 5.15e12
SCHEMA = """\
name: {name}
user: user_id
position: position
item: item_id
split: {{by: leave_one_out}}
evaluation: {{queries: all, filter_seen: true}}
"""
ATTRIBUTES = "items: {{path: {items}, key: item_id}}\nitem_fields: {{attribute_ids: list}}\n"
IDS_ONLY = "popularity_field: false\n"
MOVIELENS = """\
name: movielens
user: user_id
time: timestamp
item: item_id
item_fields: {genres: {kind: list, separator: "|"}, year: numeric}
split: {by: leave_one_out}
evaluation: {queries: all, filter_seen: true}
"""
PARTS = ("validation", "test")
METRICS = ("recall@10", "ndcg@10")
PUBLISHED = {
    "SASRec + sampled softmax (published)": (0.0921, 0.0531),
    "eSASRec (published)": (0.0928, 0.0523),
    "HSTU (published re-run)": (0.0788, 0.0439),
}
Scores = dict[str, dict[str, float]]
"""Part to metrics."""
Job = tuple[str, str, int]
"""Shards, storage, seed."""


def prepare(folder: Path, name: str, schema: str, log: Path) -> str:
    """Shards of one reading of a log."""
    (folder / f"{name}.yaml").write_text(schema)
    command = [str(Path(sys.executable).with_name("bfm")), "data", "prepare", str(folder / f"{name}.yaml"), str(log)]
    subprocess.run([*command, "--out", str(folder / name)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return str(folder / name)


def measure(jobs: list[Job], processes: int) -> dict[str, list[Scores]]:
    """Scores by shard set."""
    scores: dict[str, list[Scores]] = {}
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        for shards, metrics in pool.imap_unordered(run, jobs):
            shown = {part: [round(metrics[part][name], 4) for name in METRICS] for part in PARTS}
            print(Path(shards).name, shown, flush=True)
            scores.setdefault(shards, []).append(metrics)
    return scores


def run(job: Job) -> tuple[str, Scores]:
    """One seed: trained, cooled down, scored on both parts."""
    shards, folder, seed = job
    config = TrainConfig.from_dict(CONFIG)
    storage = f"{folder}/{Path(shards).name}-{seed}"
    row = train_single(config, seed, shards, storage, flops=FLOPS, queries=None, scaling={"micro_groups": 1})
    checkpoint = f"{storage}/{row['model']}"
    metrics = {part: evaluate_checkpoint(checkpoint, shards, part, None)["metrics"] for part in PARTS}
    return shards, metrics


def line(name: str, scores: list[Scores]) -> str:
    """Means over the seeds, and their range on the test part."""
    cells = []
    for part in PARTS:
        for metric in METRICS:
            values = [score[part][metric] for score in scores]
            spread = f" ({min(values):.4f}-{max(values):.4f})" if len(values) > 1 and part == "test" else ""
            cells.append(f"{mean(values):.4f}{spread}")
    return f"| {name} | {' | '.join(cells)} |"


def floor_lines(shards: str) -> list[str]:
    """Of one shard set."""
    opened = Shards.open(shards)
    floors: dict[str, Any] = {part: baseline_metrics(opened, Protocol.load(opened), part) for part in PARTS}
    return [
        line(f"{floor.replace('_', '-')} floor", [{part: floors[part][floor] for part in PARTS}])
        for floor in ("co_occurrence", "personal", "popularity")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--movielens", type=Path)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    events = arguments.data.resolve() / "events.parquet"
    attributes = ATTRIBUTES.format(items=arguments.data.resolve() / "items.parquet")
    head = ["| | validation recall@10 | validation ndcg@10 | test recall@10 | test ndcg@10 |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory(prefix="bfm-reviews-") as name:
        folder = Path(name)
        full = prepare(folder, "attributes", SCHEMA.format(name="reviews") + attributes, events)
        ids = prepare(folder, "ids_only", SCHEMA.format(name="reviews_ids") + IDS_ONLY, events)
        jobs = [*((full, name, seed) for seed in SEEDS), (ids, name, SEEDS[0])]
        movies = None
        if arguments.movielens:
            movies = prepare(folder, "movielens", MOVIELENS, arguments.movielens.resolve())
            jobs.append((movies, name, SEEDS[0]))
        scores = measure(jobs, arguments.processes)
        manifest = Shards.open(full).manifest
        lines = [
            "# Reviews of cosmetics, leave-one-out",
            "",
            f"Written by `python benchmarks/reviews.py`: C = {FLOPS:.3g}, {len(SEEDS)} seeds, {manifest.users:,} "
            f"users, {manifest.catalogue:,} items. The range over the seeds stands in brackets.",
            "",
            *head,
            line("two-part model, item attributes", scores[full]),
            line("two-part model, ids only (one seed)", scores[ids]),
            *floor_lines(full),
            *(f"| {title} | | | {recall:.4f} | {ndcg:.4f} |" for title, (recall, ndcg) in PUBLISHED.items()),
        ]
        if movies:
            lines += ["", "The same settings on ratings of films:", "", *head]
            lines += [line("two-part model (one seed)", scores[movies]), *floor_lines(movies)]
    publish("reviews", "\n".join([*lines, "", machine("torch"), ""]))


if __name__ == "__main__":
    main()
