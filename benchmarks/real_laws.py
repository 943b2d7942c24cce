"""Scaling laws of real logs, measured by the product: the sweeps, a summary of their ledgers, the laws in them.

    python benchmarks/real_laws.py run LOG=SHARDS ... --storage DIR  # their sweeps; goes on where it stopped
    python benchmarks/real_laws.py rows LOG ... --storage DIR  # results/real_laws_LOG.csv, one line per result
    python benchmarks/real_laws.py laws LOG ... --storage DIR  # results/real_laws.md, a law a line

A log's sweeps stand in two studies, DIR/LOG and DIR/LOG_none: models with and without the pointer are never fitted
together. The spaces are those of search_spaces/real; `run` prices all of them before the first one begins (the stage 1
that the trials of `negatives` share is trained before, in seconds), and leaves the summary of every sweep as it ends.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import RESULTS, ROOT, machine, publish

from bfm.errors import UserError
from bfm.files import Store
from bfm.laws.frontier import Row, rung_rows
from bfm.laws.result import Estimate, LawFit
from bfm.report.digits import estimate_text
from bfm.report.law_details import agreements, ranked_metrics
from bfm.report.study import Chapter, chapters, read_study
from bfm.sweep.ledger.ledger import read_state
from bfm.sweep.ledger.study import is_study, list_sweeps
from bfm.sweep.plan.machine import Machine
from bfm.sweep.plan.plan import plan
from bfm.sweep.recipe.verdicts import check_text
from bfm.sweep.space.on_log import open_space
from bfm.sweep.space.spec import resolve
from bfm.units import format_flops
from ray_jobs.study import SIGNALLED
from ray_jobs.sweep import sweep_verb

SPACES = ROOT / "search_spaces" / "real"
METRICS = ("nll", "recall@10", "ndcg@10", "mrr@10")
COLUMNS = (
    *("sweep", "copy", "trial", "seed", "rung_flops", "path_flops", "params", "embedder_share"),
    *("events", "unique_events", "batch_events", "negatives", "learning_rate", "steps", "train_s"),
    *METRICS,
    *(f"{name} error" for name in METRICS),
)


@dataclass(frozen=True)
class Planned:
    """A sweep of the study of a log."""

    space: str
    name: str
    overrides: tuple[str, ...] = ()
    copy: str = "pointer"

    @property
    def file(self) -> Path:
        """Its space."""
        return SPACES / f"{self.space}.yaml"

    def study(self, log: str) -> str:
        """The folder of its study."""
        return log if self.copy == "pointer" else f"{log}_{self.copy}"

    def settings(self, shards: str) -> list[str]:
        """What it sets beside the space's file."""
        copy = f"parameters.copy={{value: {self.copy}}}"
        return [
            f"name={self.name}",
            f"data.shards={shards}",
            *([copy] if self.copy != "pointer" else ()),
            *self.overrides,
        ]


def _allocations(seeds: Iterable[int], *overrides: str, copy: str = "pointer") -> Iterable[Planned]:
    """A sweep a seed: where the valley is as flat as a seed's noise, one seed tells no exponent."""
    for seed in seeds:
        name = f"allocation_seed{seed}" if seed else "allocation"
        yield Planned("allocation", name, (*overrides, f"seeds=[{seed}]"), copy)


TO_1E11 = "budget.ladder_flops=[1e10, 3.2e10, 1e11]"
# Between those of the space: neighbours differ by their shapes, too, which further seeds do not average.
SIZES = (
    "parameters.params={values: [5.8e2, 8.3e2, 9.1e2, 1e3, 1.4e3, 1.55e3, 1.75e3, 2.3e3, 2.6e3, 3e3, 3.9e3, 4.4e3, "
    "5e3, 6.8e3, 7.6e3, 8.8e3, 1.15e4, 1.35e4, 1.5e4, 2e4, 2.4e4]}"
)
# Three decades, three to six sizes at each budget; 5e13 FLOPs, under three hours of two cores (`scaling.slots=2`).
# `bfm data synth log --events 5e7 --users 1.5e5 --items 2e3 --seed 1`, then `bfm data prepare`.
SYNTHETIC = (
    "budget.ladder_flops=[1e10, 3.2e10, 1e11, 3.2e11, 1e12, 3.2e12, 1e13]",
    "budget.events_per_param=[100, 8000]",
    "budget.total_flops=7e13",
    "parameters.params={values: [7e2, 1.2e3, 2e3, 3.4e3, 5.8e3, 1e4, 1.7e4, 2.9e4, 5e4, 8.5e4]}",
)
OTHER_AXES = tuple(Planned(name, name) for name in ("embedder_share", "critical_batch", "negatives", "joint"))
SWEEPS: Mapping[str, tuple[Planned, ...]] = {
    "complete_journey": (
        *OTHER_AXES,
        *_allocations(range(3)),
        *_allocations(range(3, 7), TO_1E11),
        Planned("allocation", "allocation_sizes", (TO_1E11, SIZES)),
        *_allocations(range(3), copy="none"),
    ),
    "online_retail": (*_allocations(range(3)), *_allocations(range(3), copy="none")),
    "synthetic": (*_allocations(range(1), *SYNTHETIC),),
}


def run(storage: str, shards: Mapping[str, str]) -> int:
    """Train what is not trained yet, log by log. Returns the worst exit code."""
    planned = [(log, sweep) for log in shards for sweep in SWEEPS[log]]
    for log, sweep in planned:
        if sweep.space == "negatives":
            _train_stage1(storage, log, shards[log])
    _price(storage, planned, shards)
    worst = 0
    for log, sweep in planned:
        code = _sweep(storage, log, sweep, shards[log])
        if code >= SIGNALLED:
            return code
        worst = max(worst, code)
        _write_rows(storage, log)
    return worst


def _sweep(storage: str, log: str, sweep: Planned, shards: str) -> int:
    """Its exit code. One that has begun is extended to what its space is now: the same space changes nothing."""
    store = Store(storage).child(sweep.study(log))
    list_sweeps(store, [sweep.name])
    has_begun = read_state(store.child(sweep.name)).spec is not None
    settings = _settings(storage, log, sweep, shards)
    return sweep_verb(sweep.file, store.uri, extend=has_begun, overrides=settings)


def _settings(storage: str, log: str, sweep: Planned, shards: str) -> list[str]:
    trunk = f"stage1.checkpoint={_stage1(storage, log)}/trials/run/checkpoints/rung0-trunk"
    return [*sweep.settings(shards), *([trunk] if sweep.space == "negatives" else ())]


def _price(storage: str, planned: Iterable[tuple[str, Planned]], shards: Mapping[str, str]) -> None:
    """Print what every sweep costs from its beginning, and all of them."""
    total = 0
    for log, sweep in planned:
        settings = _settings(storage, log, sweep, shards[log])
        opened = open_space(resolve(sweep.file, settings))
        flops = plan(opened.spec, opened.costs, Machine.here()).training_flops
        total += flops
        print(f"{sweep.study(log)}/{sweep.name}: {format_flops(flops)} FLOPs")
    print(f"together {format_flops(total)} FLOPs, what is trained already included", flush=True)


def _stage1(storage: str, log: str) -> str:
    return f"{storage}/{log}-stage1"


def _train_stage1(storage: str, log: str, shards: str) -> None:
    """The trunk that all trials of `negatives` share, and its cooldown; nothing where it stands."""
    place = ["--shards", shards, "--out", _stage1(storage, log), "--flops", "1.25e10", "--validations", "0"]
    bfm = str(Path(sys.executable).with_name("bfm"))
    subprocess.run([bfm, "train", str(SPACES.parent / "stage1" / "real_negatives.yaml"), *place], check=True)


def summary(studies: Iterable[str]) -> str:
    """One line per rung row, as CSV; numbers with 7 digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for study in studies:
        for sweep in read_study(study):
            for row in rung_rows(sweep.rows):
                writer.writerow([sweep.folder, *_cells(row)])
    return text.getvalue()


def _cells(row: Row) -> list[str]:
    config, metrics, errors = row["config"], row.get("metrics") or {}, row.get("errors") or {}
    named = {**row, "negatives": config["negatives"], "learning_rate": config["learning_rate"], **metrics}
    named |= {f"{name} error": value for name, value in errors.items()}
    numbers = (named.get(name) for name in COLUMNS[4:])
    told = ("" if value is None else f"{value:.7g}" for value in numbers)
    return [config["copy"], row["trial"], str(row["seed"]), *told]


def _studies(storage: str, log: str) -> list[str]:
    """Those of a log that have begun."""
    folders = dict.fromkeys(f"{storage}/{sweep.study(log)}" for sweep in SWEEPS[log])
    return [folder for folder in folders if is_study(folder)]


def _write_rows(storage: str, log: str) -> None:
    (RESULTS / f"real_laws_{log}.csv").write_text(summary(_studies(storage, log)))


def write_laws(storage: str, logs: Iterable[str]) -> None:
    """Every law of every axis and metric as a line of a table, and the checks of recipes."""
    lines = [
        "# Laws on real sweeps",
        "",
        "The spaces of `search_spaces/real`, all sweeps of one axis fitted together; 95 % intervals; what is not",
        "identifiable is left out.",
        f"Written by `python benchmarks/real_laws.py laws` on {datetime.date.today()}.",
    ]
    for study in (study for log in logs for study in _studies(storage, log)):
        told = chapters(read_study(study))
        lines += ["", f"## {Store(study).uri.rsplit('/', 1)[-1]}", "", "| axis | law | metric | what the runs say |"]
        lines += ["|---|---|---|---|", *(line for chapter in told for line in laws(chapter))]
        sweeps = [sweep for chapter in told for sweep in chapter.sweeps]
        lines += ["", *_seeds([row for sweep in sweeps for row in rung_rows(sweep.rows)])]
        lines += ["", *[check_text(check) for sweep in sweeps for check in sweep.state.checks]]
    publish("real_laws", "\n".join([*lines, "", machine("torch", "ray", "scipy"), ""]))


def _seeds(rows: Iterable[Row]) -> Iterable[str]:
    """What a seed is worth: the deviation of rows that are equal but for it, and their means."""
    alike: dict[tuple[float, str], list[Row]] = {}
    for row in rows:
        alike.setdefault((row["rung_flops"], json.dumps(row["config"], sort_keys=True)), []).append(row)
    groups = {key: rows for key, rows in alike.items() if len({row["seed"] for row in rows}) > 1}
    for metric in METRICS:
        values = [[row["metrics"][metric] for row in rows] for rows in groups.values()]
        free = sum(len(of_group) - 1 for of_group in values)
        if free:
            deviation = math.sqrt(sum(np.var(of_group) * len(of_group) for of_group in values) / free)
            yield f"One run's {metric} has a standard deviation of {deviation:.4f} over seeds ({len(values)} groups).\n"
    means = sorted((flops, rows[0]["params"], rows) for (flops, _), rows in groups.items())
    for flops, params, rows in means:
        told = ", ".join(f"{name} {np.mean([row['metrics'][name] for row in rows]):.4f}" for name in METRICS)
        yield f"- C {flops:.3g}, N {params:,}: mean of {len(rows)} seeds {told}"


def laws(chapter: Chapter) -> Iterable[str]:
    """Lines of a table: every law of an axis on every metric, and how the loss orders runs beside ranking metrics."""
    for found in chapter.laws:
        said = f"refused: {found.refused}" if found.fit is None else _said(found.fit)
        yield f"| {chapter.title} | {found.law} | {found.metric} | {said} |"


def _said(fit: LawFit) -> str:
    told = _agreed(fit) if fit.law == "agreement" else _known(fit)
    return f"{fit.runs} runs; {'; '.join(told) or 'nothing identifiable'}".replace("|", "/")


def _agreed(fit: LawFit) -> Iterable[str]:
    for metric in ranked_metrics(fit):
        by_budget = [
            f"at {flops:.3g} {estimate_text(value, '{:+.2f}'.format)}" for flops, value in agreements(fit, metric)
        ]
        trend = estimate_text(fit.parameters[f"trend[{metric}]"], "{:+.2f}".format)
        yield f"Spearman with {metric} {', '.join(by_budget)}, its z per factor 10 in C {trend}"


def _known(fit: LawFit) -> Iterable[str]:
    """Parameters, then the optima of each budget."""
    told = [
        f"{name} {estimate_text(value, '{:.4g}'.format)}" for name, value in fit.parameters.items() if value.is_known
    ]
    for budget in fit.budgets:
        known = {name: value for name, value in budget.optima.items() if value.is_known}
        optima = [f"{name} {estimate_text(value, '{:.4g}'.format)}" for name, value in known.items()]
        if {"N_opt", "D_opt"} <= set(known):
            n, d = known["N_opt"], known["D_opt"]
            ratio = Estimate(d.estimate / n.estimate, d.low / n.high, d.high / n.low)
            optima.append(f"D/N {estimate_text(ratio, '{:.4g}'.format)}")
        if optima:
            told.append(f"at {budget.flops:.3g}: {', '.join(optima)}")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "rows", "laws"))
    parser.add_argument("logs", nargs="+", metavar="LOG", help=f"{' or '.join(SWEEPS)}; with =SHARDS for `run`")
    parser.add_argument("--storage", required=True, help="where the studies stand")
    options = parser.parse_args()
    shards = dict(text.partition("=")[::2] for text in options.logs)
    if unknown := [log for log in shards if log not in SWEEPS]:
        parser.error(f"no sweeps are planned for {', '.join(unknown)}")
    if options.verb == "run":
        raise SystemExit(run(options.storage, shards))
    if options.verb == "laws":
        return write_laws(options.storage, shards)
    for log in shards:
        _write_rows(options.storage, log)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"real_laws: {error}") from None
