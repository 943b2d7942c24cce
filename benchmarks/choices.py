"""Which settings of model and training are good: rows of equal cost that differ in one thing.

    python benchmarks/choices.py STUDY --shards SHARDS [--processes 2]

STUDY is one of STUDIES below. Every run is the product's own `run_rung` (trunk, cooldown, the first so many queries of
the validation part). Rows are kept in benchmarks/results/choices_<study>.jsonl, so a study that was cut off goes on
(rows of another version of the objective are made again); the table is written beside it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from common import machine, make_rows, publish, spread
from variants import Variant

from bfm.events.shards import Shards
from bfm.files import Store
from bfm.training.config import TrainConfig
from bfm.training.plain import PlainFactory
from bfm.training.rung import run_rung
from bfm.training.task import RungTask


class Run(NamedTuple):
    """One row to be made."""

    label: str
    config: dict[str, Any]
    flops: float
    """C."""
    seed: int = 0
    variant: Variant = Variant()
    queries: int = 5_000
    """The first so many of the validation part."""


# Reviews of cosmetics, leave-one-out: about five epochs.
REVIEWS: dict[str, Any] = {
    "params": 1e5,
    "embedder_share": 0.0,
    "learning_rate": 3e-3,
    "window": 50,
    "group_windows": 32,
    "d_item": 64,
    "table_width": 64,
    "dropout": 0.1,
    "table_weight_decay": 0.5,
    "copy": "none",
}
REVIEWS_FLOPS = 8.5e11
ONE_AT_A_TIME: dict[str, list[Any]] = {
    "dropout": [0.0, 0.3],
    "table_weight_decay": [0.0, 1.0, 4.0],
    "weight_decay": [1.0],
    "initial_scale": [10.0, 40.0],
    "group_windows": [8, 16],
    "table_width": [16],
    "live_negatives": [1024],
    "embedder_share": [0.2],
    "cooldown_fraction": [0.5],
    "params": [4e4, 3e5],
}
# Grocery baskets, split by time. Rates are written down, so that rows do not change with the rule.
HISTORY: dict[str, Any] = {
    "params": 5e3,
    "embedder_share": 0.05,
    "learning_rate": 3.2e-3,
    "window": 256,
    "group_windows": 2,
    "d_item": 16,
}
OWN = ("certain", "biased", "excluded")
WIDTH_PARAMS = 5e4
"""N of one layer of the depth study."""


def one_at_a_time() -> Iterator[Run]:
    """The base configuration, and each setting varied alone, at equal C (G at equal windows per step where it can)."""
    yield Run("base", REVIEWS, REVIEWS_FLOPS)
    for name, values in ONE_AT_A_TIME.items():
        for value in values:
            config = {**REVIEWS, name: value}
            if name == "group_windows":
                config["groups_per_step"] = max(1, 32 // value)
            yield Run(f"{name} = {value:g}", config, REVIEWS_FLOPS)


def depth() -> Iterator[Run]:
    """Layers of about equal width: N grows with the depth, the events seen are about equal."""
    for layers in (1, 2, 4, 8):
        config = {**REVIEWS, "params": WIDTH_PARAMS * layers, "depth": layers}
        yield Run(f"{layers} layers", config, REVIEWS_FLOPS * (0.6 + 0.2 * layers))


def learning_rate() -> Iterator[Run]:
    """Corners of (N, B), learning rates a factor 2 apart; D / N falls from about 1,000 to 1 as N grows."""
    for params, flops, groups, rates in (
        (2.5e3, 3e10, 1, (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)),
        (2.5e3, 1.2e11, 8, (4e-3, 8e-3, 1.6e-2, 3.2e-2)),
        (4e4, 2e11, 1, (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)),
        (4e4, 3e11, 4, (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)),
        (2e5, 5e11, 1, (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)),
    ):
        for rate in rates:
            config = {**HISTORY, "window": 512, "params": params, "groups_per_step": groups, "learning_rate": rate}
            yield Run(f"N = {params:g}, B = {groups * 1024} positions, rate {rate:g}", config, flops, queries=2_000)


def history() -> Iterator[Run]:
    """Order of windows x candidates of the own window x copying, and what is predicted from where, at two budgets."""
    config = {**HISTORY, "targets": "next_event"}
    for flops in (1e10, 4e10):
        for copy, order, own in itertools.product(("pointer", "none"), ("permuted", "neighbours"), OWN):
            for seed in range(3):
                label = f"C {flops:g}, copy {copy}, windows {order}, own window {own}"
                yield Run(label, {**config, "copy": copy}, flops, seed, Variant(order=order, own=own), 2_000)
        for own in OWN:
            for seed in range(3):
                label = f"C {flops:g}, copy pointer, windows permuted, own window {own}, a basket a query"
                yield Run(label, HISTORY, flops, seed, Variant(own=own), 2_000)


def groups() -> Iterator[Run]:
    """Windows and groups of 2,048 events a step, at equal C."""
    for window, group_windows, groups_per_step in ((256, 2, 4), (256, 8, 1), (512, 2, 2), (512, 4, 1), (1024, 2, 1)):
        config = {**HISTORY, "learning_rate": 6e-3, "window": window, "group_windows": group_windows}
        config["groups_per_step"] = groups_per_step
        for seed in range(2):
            yield Run(f"L {window}, G {group_windows}, B {groups_per_step}", config, 4e10, seed, queries=2_000)


def targets() -> Iterator[Run]:
    """Every event predicted from the one before it, or every basket from where the one before it ended, at equal C."""
    choices: dict[str, dict[str, Any]] = {"next_event": {"targets": "next_event"}}
    choices |= {f"next_basket, power {power:g}": {"basket_power": power} for power in (0.0, 0.35, 0.5, 1.0)}
    for name, values in choices.items():
        for seed in range(3):
            yield Run(name, {**HISTORY, "learning_rate": 4.4e-3, "window": 512, **values}, 1e11, seed, queries=2_000)


def budgets() -> Iterator[Run]:
    """What more compute buys on grocery baskets."""
    small = {**HISTORY, "learning_rate": 4.4e-3, "window": 512}
    large = {**HISTORY, "learning_rate": 3.9e-3, "params": 1e4, "window": 1024, "d_item": 32}
    larger = {**large, "learning_rate": 5.4e-3, "group_windows": 4}
    for flops, config in ((5e10, small), (1.8e11, large), (1e12, larger), (3e12, {**larger, "params": 2e4})):
        for seed in range(3):
            yield Run(f"C {flops:g}", config, flops, seed, queries=2_000)


STUDIES = {
    "budgets": budgets,
    "one_at_a_time": one_at_a_time,
    "depth": depth,
    "learning_rate": learning_rate,
    "history": history,
    "groups": groups,
    "targets": targets,
}
METRICS = ("nll", "recall@10", "ndcg@10", "mrr@10", "coverage@10")


def run(job: tuple[str, Run]) -> dict[str, Any]:
    """One row, in a process of its own."""
    shards, (_, values, flops, seed, variant, queries) = job
    if variant != Variant():
        variant.install()
    config = TrainConfig.from_dict(values)
    with tempfile.TemporaryDirectory(prefix="bfm-choices-") as folder:
        task = RungTask("run", "run", 0, flops, config, seed=seed, evaluation_queries=queries)
        row = run_rung(task, Shards.open(shards), PlainFactory(), Store(folder))
    keys = ("status", "params", "embedder_share", "path_flops", "events", "unique_events", "steps", "metrics")
    return {"config": values, "variant": asdict(variant), **{key: row.get(key) for key in keys}}


def rule_lines(rows: list[tuple[Run, dict[str, Any]]]) -> list[str]:
    """Where a parabola in log rate is lowest at every corner, and the power law in (N, positions) through them."""
    corners: dict[tuple[float, int], list[tuple[float, float]]] = {}
    for (_, config, *_), row in rows:
        positions = config["groups_per_step"] * config["group_windows"] * config["window"]
        corners.setdefault((config["params"], positions), []).append((config["learning_rate"], row["metrics"]["nll"]))
    lines, best = [], []
    for (params, positions), found in corners.items():
        log_rates, nll = np.log([rate for rate, _ in found]), np.array([value for _, value in found])
        place = int(nll.argmin())
        if place in (0, len(nll) - 1):
            raise ValueError(
                f"N = {params:g}, {positions} positions: no worse rate beyond the best, {found[place][0]:g}"
            )
        lowest = slice(place - 1, place + 2)
        curvature, slope, _ = np.polyfit(log_rates[lowest], nll[lowest], 2)
        best.append((np.log(params), np.log(positions), -slope / (2 * curvature)))
        lines.append(f"- N = {params:g}, {positions} positions: best rate {np.exp(best[-1][-1]):.2g}")
    log_N, log_positions, log_rate = np.array(best).T
    design = np.stack([np.ones_like(log_N), log_N - np.log(5e4), log_positions - np.log(2048)], 1)
    fitted, *_ = np.linalg.lstsq(design, log_rate)
    missed = np.exp(np.abs(design @ fitted - log_rate).max())
    law = f"{np.exp(fitted[0]):.2g} x (N / 5e4)^{fitted[1]:.2f} x (positions / 2048)^{fitted[2]:.2f}"
    lines.append(f"\nRate {law}; it misses the corners by a factor of at most {missed:.2f}.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    log = Shards.open(arguments.shards).manifest.name
    wanted = list(STUDIES[arguments.study]())
    jobs = {(point.label, point.seed): (arguments.shards, point) for point in wanted}
    rows = make_rows(f"choices_{arguments.study}", jobs, run, arguments.processes, METRICS)
    lines = [
        f"# {arguments.study.replace('_', ' ').capitalize()}",
        "",
        f"Written by `python benchmarks/choices.py {arguments.study}` over the log `{log}`, validation part. "
        "Of several seeds the mean, and behind it their standard deviation.",
        "",
        "| setting | C | N | steps | seeds | " + " | ".join(METRICS) + " |",
        "|---|---|---|---|---|" + "---|" * len(METRICS),
    ]
    for label, points in itertools.groupby(wanted, lambda point: point.label):
        found = [rows[label, point.seed] for point in points]
        row = found[0]
        values = " | ".join(spread([one["metrics"].get(name, float("nan")) for one in found]) for name in METRICS)
        what = f"{row['path_flops']:.3g} | {row['params']:,} | {row['steps']:,} | {len(found)}"
        lines.append(f"| {label} | {what} | {values} |")
    if arguments.study == "learning_rate":
        lines += ["", *rule_lines([(point, rows[point.label, point.seed]) for point in wanted])]
    publish(f"choices_{arguments.study}", "\n".join([*lines, "", machine("torch"), ""]))


if __name__ == "__main__":
    main()
