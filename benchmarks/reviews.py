"""Leave-one-out on the reviews of cosmetics that papers use: the two-part model beside floors and published values.

    python benchmarks/reviews.py --data FOLDER [--movielens EVENTS] [--processes 2]

FOLDER holds events.parquet (user_id, position, item_id) and items.parquet (item_id, attribute_ids). Trained on all but
the last two events of every user; the validation item enters only the test query; ranked against the full catalogue,
all users, seen items filtered (asked for by the schemas, as the published protocol does). The network alone, with
counted neighbours as a component whose gate is learned with it (`counts: neighbours`), and with a share of them that
is given (`counts_share`). --movielens adds the ratings of a MovieLens file. Settings were chosen on the validation
parts. Rows are kept in benchmarks/results/reviews.jsonl, so a study that was cut off goes on.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from choices import REVIEWS
from common import ROOT, Key, machine, make_rows, publish

from bfm.events.protocol import Protocol
from bfm.events.shards import Shards
from bfm.ranking.baselines import baseline_metrics
from bfm.training.config import TrainConfig
from bfm.training.single import evaluate_checkpoint, train_single

SEEDS = (0, 1, 2)
FLOPS = 2.5e12
MOVIES: dict[str, Any] = {
    **REVIEWS,
    "window": 200,
    "group_windows": 8,
    "dropout": 0.2,
    "table_weight_decay": 1.0,
}
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
METRICS = tuple(f"{part} {metric}" for part in PARTS for metric in ("recall@10", "ndcg@10"))
PUBLISHED = {
    "SASRec + sampled softmax (published)": (0.0921, 0.0531),
    "eSASRec (published)": (0.0928, 0.0523),
    "HSTU (published re-run)": (0.0788, 0.0439),
}
Job = tuple[str, dict[str, Any], int]
"""Shards, configuration, seed."""


def prepare(folder: Path, name: str, schema: str, log: Path) -> str:
    """Shards of one reading of a log."""
    (folder / f"{name}.yaml").write_text(schema)
    command = [str(Path(sys.executable).with_name("bfm")), "data", "prepare", str(folder / f"{name}.yaml"), str(log)]
    subprocess.run([*command, "--out", str(folder / name)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return str(folder / name)


def run(job: Job) -> dict[str, Any]:
    """One seed: trained, cooled down, scored on both parts."""
    shards, values, seed = job
    config = TrainConfig.from_dict(values)
    with tempfile.TemporaryDirectory(prefix="bfm-reviews-") as storage:
        row = train_single(config, seed, shards, storage, flops=FLOPS, queries=None, scaling={"micro_groups": 1})
        checkpoint = f"{storage}/{row['model']}"
        found = {part: evaluate_checkpoint(checkpoint, shards, part, None)["metrics"] for part in PARTS}
    metrics = {f"{part} {metric}": value for part in PARTS for metric, value in found[part].items()}
    return {"config": values, "params": row["params"], "steps": row["steps"], "metrics": metrics}


def line(name: str, scores: list[dict[str, float]]) -> str:
    """Means over the seeds, and their range on the test part."""
    cells = []
    for metric in METRICS:
        values = [score[metric] for score in scores]
        seeds = len(values) > 1 and metric.startswith("test")
        cells.append(f"{mean(values):.4f}" + (f" ({min(values):.4f}-{max(values):.4f})" if seeds else ""))
    return f"| {name} | {' | '.join(cells)} |"


def floor_lines(shards: str) -> list[str]:
    """Of one shard set."""
    opened = Shards.open(shards)
    protocol = Protocol.load(opened)
    floors = {part: baseline_metrics(opened, protocol, part) for part in PARTS}
    lines = []
    for floor in ("co_occurrence", "personal", "popularity"):
        scores = {f"{part} {metric}": value for part in PARTS for metric, value in floors[part][floor].items()}
        lines.append(line(f"{floor.replace('_', '-')} floor", [scores]))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--movielens", type=Path)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    events = arguments.data.resolve() / "events.parquet"
    attributes = ATTRIBUTES.format(items=arguments.data.resolve() / "items.parquet")
    head = [f"| | {' | '.join(METRICS)} |", "|---" * (1 + len(METRICS)) + "|"]
    counted = {"counts": "neighbours"}
    given = {**counted, "counts_share": 0.15}
    with tempfile.TemporaryDirectory(prefix="bfm-reviews-") as name:
        folder = Path(name)
        full = prepare(folder, "attributes", SCHEMA.format(name="reviews") + attributes, events)
        ids = prepare(folder, "ids_only", SCHEMA.format(name="reviews_ids") + IDS_ONLY, events)
        jobs: dict[Key, Job] = {("network alone", seed): (full, REVIEWS, seed) for seed in SEEDS}
        jobs |= {("network with counts, gate learned", seed): (full, {**REVIEWS, **counted}, seed) for seed in SEEDS}
        jobs |= {("network with counts, share 0.15", seed): (full, {**REVIEWS, **given}, seed) for seed in SEEDS}
        jobs["network alone, ids only", 0] = ids, REVIEWS, 0
        movies = None
        if arguments.movielens:
            movies = prepare(folder, "movielens", MOVIELENS, arguments.movielens.resolve())
            jobs |= {("films, network alone", seed): (movies, MOVIES, seed) for seed in SEEDS}
            jobs["films, network with counts, gate learned", 0] = movies, {**MOVIES, **counted}, 0
            jobs |= {
                ("films, network with counts, share 0.15", seed): (movies, {**MOVIES, **given}, seed) for seed in SEEDS
            }
        rows = make_rows("reviews", jobs, run, arguments.processes, METRICS)
        of_films = {key: row for key, row in rows.items() if str(key[0]).startswith("films")}
        of_reviews = {key: row for key, row in rows.items() if key not in of_films}
        manifest = Shards.open(full).manifest
        lines = [
            "# Reviews of cosmetics, leave-one-out",
            "",
            f"Written by `python benchmarks/reviews.py`: C = {FLOPS:.3g}, {manifest.users:,} users, "
            f"{manifest.catalogue:,} items. Means of {len(SEEDS)} seeds with their range in brackets; otherwise one.",
            "",
            *head,
            *seed_lines(of_reviews),
            *floor_lines(full),
            *(f"| {title} | | | {recall:.4f} | {ndcg:.4f} |" for title, (recall, ndcg) in PUBLISHED.items()),
        ]
        if movies:
            lines += ["", "Ratings of films:", "", *head, *seed_lines(of_films), *floor_lines(movies)]
    publish("reviews", "\n".join([*lines, "", machine("torch"), ""]))


def seed_lines(rows: dict[Key, dict[str, Any]]) -> list[str]:
    """One line per model."""
    labels = dict.fromkeys(str(key[0]) for key in rows)
    return [line(label, [row["metrics"] for key, row in rows.items() if key[0] == label]) for label in labels]


if __name__ == "__main__":
    main()
