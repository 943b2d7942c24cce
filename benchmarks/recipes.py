"""Do recipes come true, and do they beat rules of thumb: trained at C that their rows do not reach.

    python benchmarks/recipes.py NAME=STUDY SHARDS --work DIR [--below 1e11] [--flops 3e11 1e12] [--rules 3e11]
        [--metrics nll ndcg@10]

A recipe is made from the rows of a study up to `--below`, trained at every C of `--flops`, and held against its
interval; beside it, at equal C (those of `--rules`, or all) and of equal settings otherwise, two rules: 20 events per
parameter, and the best trial of the rows with N grown as C^0.5. Runs are kept under DIR, so a comparison that was cut
off goes on. Writes results/recipes_NAME.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import machine, publish

from bfm.events.protocol import Protocol
from bfm.events.shards import Shards
from bfm.files import Store
from bfm.laws.frontier import metric_error, metric_value
from bfm.laws.runs import from_rows
from bfm.ranking.paired import paired_gap, read_scores
from bfm.sweep.recipe.choices import Power, Sizes, own_negatives, stage_settings, try_sizes
from bfm.sweep.recipe.evidence import Evidence, read_evidence
from bfm.sweep.recipe.recipe import Recipe, make_recipe
from bfm.sweep.recipe.verdicts import range_text
from bfm.sweep.space.costs import Costs
from bfm.sweep.space.space import Feasible
from bfm.training.config import TrainConfig
from bfm.training.single import train_single
from bfm.units import format_count, format_flops

HOFFMANN = 20.0
"""Events per parameter."""


@dataclass(frozen=True)
class Bench:
    """A log, the rows below a C, and where runs are kept."""

    evidence: Evidence
    costs: Costs
    shards: str
    work: Path

    @classmethod
    def below(cls, study: str, shards: str, flops: float, work: Path) -> Bench:
        """Of the rows of a study up to a C."""
        whole = read_evidence(study)
        sweeps = [
            dataclasses.replace(
                sweep, rows=tuple(row for row in sweep.rows if float(row["rung_flops"]) <= flops * 1.001)
            )
            for sweep in whole.sweeps
        ]
        evidence = dataclasses.replace(whole, sweeps=tuple(sweep for sweep in sweeps if sweep.rows))
        opened = Shards.open(shards)
        queries = evidence.sizes.spec.data.evaluation_queries
        return cls(evidence, Costs.on(opened, Protocol.load(opened), queries), shards, work)

    def run(self, config: Mapping[str, Any], flops: float) -> dict[str, Any]:
        """The row of a configuration trained to C, from its own folder where it stands there already."""
        trained = TrainConfig.from_dict(dict(config))
        folder = self.work / f"{flops:g}-{trained.fingerprint[:12]}"
        kept = folder / "row.json"
        if not kept.exists():
            queries = self.evidence.sizes.spec.data.evaluation_queries
            row = train_single(
                trained, 0, self.shards, str(folder), flops=flops, queries=queries, scaling={"micro_groups": 1}
            )
            kept.write_text(json.dumps({**row, "folder": str(folder)}))
        return json.loads(kept.read_text())

    def rules(self, flops: float, metric: str) -> dict[str, Feasible]:
        """Rules of thumb at a C: the best trial's settings at N of 20 events per parameter, and of N grown as C^0.5."""
        best = self.evidence.sizes.top_runs(metric)[0]
        runs = from_rows(self.evidence.rows, metric)
        settings = stage_settings(best, own_negatives(best), flops)
        batch = Power(float(best["batch_events"]), 0.0)
        sizes = try_sizes(self.evidence.sizes, runs, self.costs, flops, settings=settings, batch=batch, rate_ratio=1.0)
        grown = float(best["params"]) * math.sqrt(flops / float(best["rung_flops"]))
        return {
            "D / N = 20": _nearest(sizes, flops, lambda point: point.cost.events(flops) / point.cost.params / HOFFMANN),
            "best trial, N as C^0.5": _nearest(sizes, flops, lambda point: point.cost.params / grown),
        }


def _nearest(sizes: Sizes, flops: float, ratio: Any) -> Feasible:
    return min(sizes.trainable, key=lambda point: abs(math.log(ratio(point))))


def _cells(row: Mapping[str, Any], metric: str) -> str:
    return f"{metric_value(row, metric):.4g} ± {metric_error(row, metric):.2g}"


def compared(bench: Bench, flops: float, metric: str, beside_rules: bool) -> tuple[list[str], bool, float]:
    """Lines of one C and metric, whether the interval held, its width in the metric's own units."""
    recipe: Recipe = make_recipe(bench.evidence, bench.costs, flops, metric)
    own = bench.run(recipe.config, flops)
    measured = metric_value(own, metric)
    inside = recipe.predicted.low <= measured <= recipe.predicted.high
    head = f"| {format_flops(flops)} | {metric}"
    foretold = range_text(recipe.predicted, "{:.4g}".format)
    lines = [
        f"{head} | recipe | {format_count(own['params'])} | {own['events'] / own['params']:.0f} | {foretold} | "
        f"{_cells(own, metric)} | {'inside' if inside else 'outside'} | |"
    ]
    for name, point in bench.rules(flops, metric).items() if beside_rules else ():
        other = bench.run(point.config.as_dict(), flops)
        gap = paired_gap(*(read_scores(Store(row["folder"]), row["scores"]) for row in (own, other)), metric)
        shown = "" if gap is None else f"{gap.value:+.4f} ± {gap.error:.4f}"
        lines.append(
            f"{head} | {name} | {format_count(other['params'])} | {other['events'] / other['params']:.0f} | | "
            f"{_cells(other, metric)} | | {shown} |"
        )
    return lines, inside, recipe.predicted.high - recipe.predicted.low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", metavar="NAME=STUDY")
    parser.add_argument("shards")
    parser.add_argument("--below", type=float, default=1e11)
    parser.add_argument("--flops", type=float, nargs="+", default=[3e11, 1e12])
    parser.add_argument("--rules", type=float, nargs="*", help="C of --flops at which rules are trained, too (all)")
    parser.add_argument("--metrics", nargs="+", default=["nll", "ndcg@10"])
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    name, _, study = arguments.study.partition("=")
    bench = Bench.below(study, arguments.shards, arguments.below, arguments.work)
    lines: list[str] = []
    held, widths = [], []
    for flops in arguments.flops:
        for metric in arguments.metrics:
            beside_rules = arguments.rules is None or flops in arguments.rules
            found, inside, width = compared(bench, flops, metric, beside_rules)
            lines += found
            held.append(inside)
            widths.append(f"{metric} at {format_flops(flops)}: {width:.3g}")
    text = [
        f"# Recipes of {name}",
        "",
        f"Made from rows up to {format_flops(arguments.below)} FLOPs, trained beyond; {sum(held)} of {len(held)} "
        f"measured values inside their 95 % prediction interval. Widths of the intervals: {'; '.join(widths)}.",
        "The last column is the recipe less the rule, on the same queries (standard error clustered by user).",
        "",
        "| C | metric | | N | D / N | predicted | measured | | recipe less rule |",
        "|---|---|---|---|---|---|---|---|---|",
        *lines,
        "",
        machine("torch", "scipy"),
        "",
    ]
    publish(f"recipes_{name}", "\n".join(text))


if __name__ == "__main__":
    main()
