"""Do the intervals of the laws of share, critical batch and negatives cover planted truth as often as they say.

    python benchmarks/laws_axes.py --rows ROWS [--draws 1000] [--processes 2]

Two designs per law, 40 to 60 runs each, noise of sd .003 nats. A draw is a sweep with new noise; a cover is a draw
whose interval holds the planted value. Draws that are refused, and ends that are infinite, are counted apart. Draws are
kept in the JSON-lines file ROWS, so a study that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from common import machine, publish

from bfm.errors import UserError
from bfm.laws.batch import fit_batch
from bfm.laws.joint_law import axis_law
from bfm.laws.result import Estimate, LawFit
from bfm.laws.runs import Runs
from bfm.laws.targets import events_to_target

NOISE = 0.003
REFERENCE = 256.0


@dataclass(frozen=True)
class Design:
    """A sweep that a sensible user would run, its truth, and the law to be fitted."""

    name: str
    about: str
    draw: Callable[[np.random.Generator, float], Runs]
    """(noise, its sd in nats) -> runs."""
    fit: Callable[[Runs], LawFit]
    truth: dict[str, float]
    """Quantities as `answers` names them."""


def table(columns: dict[str, np.ndarray], metric: str = "nll") -> Runs:
    """Runs of planted columns."""
    count = len(next(iter(columns.values())))
    names = tuple(f"run {place}" for place in range(count))
    return Runs("planted", columns, names, metric, {metric: columns["loss"]} if "loss" in columns else {}, {}, {})


def two_term(
    column: str,
    flops: np.ndarray,
    x: np.ndarray,
    optimum: np.ndarray,
    exponents: tuple[float, float],
    seeds: int,
    noise: np.random.Generator,
    sd: float,
) -> Runs:
    """L* falls with C; the law is A = .02 nats per e-fold steep on both sides of the optimum."""
    alpha, beta = exponents
    values = np.repeat(x, seeds)
    budget = np.repeat(np.arange(len(flops)), len(values))
    u = np.log(np.tile(values, len(flops)) / optimum[budget])
    loss = 8.0 - 0.5 * budget + 0.02 * (np.expm1(alpha * u) / alpha + np.expm1(-beta * u) / beta)
    return table(
        {
            "flops": flops[budget],
            column: np.tile(values, len(flops)),
            "loss": loss + sd * noise.standard_normal(len(loss)),
        }
    )


def planted_two_term(
    name: str,
    column: str,
    flops: np.ndarray,
    x: np.ndarray,
    law: tuple[float, float],
    exponents: tuple[float, float],
    seeds: int = 1,
) -> Design:
    """x* = law[0] * (C / 1e15)^law[1]."""
    symbol = {"share": "s", "negatives": "K"}[column]
    optimum = law[0] * (flops / 1e15) ** law[1]
    middle = len(flops) // 2
    return Design(
        name,
        f"{len(flops)} budgets {flops[0]:g} to {flops[-1]:g}, {len(x)} values of {symbol} from {x[0]:.3g} to "
        f"{x[-1]:.3g}, {seeds} seed{'s' * (seeds > 1)}: {len(flops) * len(x) * seeds} runs; alpha {exponents[0]}, "
        f"beta {exponents[1]}, {symbol}* = {law[0]:g} (C / 1e15)^{law[1]:g}",
        lambda noise, sd: two_term(column, flops, x, optimum, exponents, seeds, noise, sd),
        lambda runs: axis_law(runs, column),
        {
            "alpha": exponents[0],
            "beta": exponents[1],
            f"{column}_exponent": law[1],
            f"{symbol}_opt at C = {flops[middle]:g}": float(optimum[middle]),
        },
    )


SLOPE = 0.1
"""Nats per e-fold of events at the target: noise of a loss is 1 / SLOPE times that in log steps."""


def steps_table(
    noise: np.random.Generator, sd: float, *, size: np.ndarray, batch: np.ndarray, gain: np.ndarray
) -> Runs:
    """Steps to target of every (size, batch), measured with the noise of the loss over SLOPE."""
    size_R, gain_R, batch_R = np.repeat(size, len(batch)), np.repeat(gain, len(batch)), np.tile(batch, len(size))
    steps_R = 3e5 * size_R * (1 / gain_R + 1 / batch_R)
    return table(
        {
            "params": size_R,
            "batch": batch_R,
            "steps": steps_R * np.exp(sd / SLOPE * noise.standard_normal(len(steps_R))),
        }
    )


def probe_table(
    noise: np.random.Generator, sd: float, *, size: np.ndarray, batch: np.ndarray, gain: np.ndarray
) -> Runs:
    """Probe rows, 20 C per run; E events in batches of B teach what E / (1 + B / gain) in small ones do."""
    events_P = 3e6 * np.geomspace(1 / 60, 1, 20)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("curve", "params", "batch", "events", "loss")}
    for place, params in enumerate(size):
        for b in batch:
            taught_P = events_P / (1 + b / gain[place])
            loss_P = 4.0 + 0.5 * (taught_P / 3e6) ** -0.25 + sd * noise.standard_normal(len(events_P))
            label = np.full(len(events_P), f"N {params:g} B {b:g}")
            scaled = events_P * params / size[0]
            for name, values in zip(parts, (label, 0 * scaled + params, 0 * scaled + b, scaled, loss_P), strict=True):
                parts[name].append(values)
    return table({name: np.concatenate(values) for name, values in parts.items()})


def planted_batch(name: str, about: str, size: np.ndarray, batch: np.ndarray, *, probes: bool, law: tuple) -> Design:
    """overhead20 = law[0] * N^law[1]."""
    overhead = law[0] * size ** law[1]
    gain = 5 * (overhead - 1.2 * REFERENCE)
    make = partial(probe_table if probes else steps_table, size=size, batch=batch, gain=gain)
    middle = len(size) // 2
    label = f"params {size[middle]:g}"

    def fit(runs: Runs) -> LawFit:
        return fit_batch(events_to_target(runs) if probes else runs, reference_batch=REFERENCE)

    return Design(
        name,
        f"{len(size)} sizes, {len(batch)} batches from {batch[0]:g} to {batch[-1]:g}: {len(size) * len(batch)} runs; "
        f"overhead20 = {law[0]:g} N^{law[1]:g}; {about}",
        make,
        fit,
        {
            "cbs_exponent": law[1],
            f"overhead20[{label}]": float(overhead[middle]),
            f"gain_halving[{label}]": float(gain[middle]),
        },
    )


def designs() -> list[Design]:
    """Two per law."""
    four, five, three = np.logspace(15, 18, 4), np.logspace(15, 19, 5), np.logspace(15, 17, 3)
    return [
        planted_two_term("share 1", "share", four, np.geomspace(0.002, 0.5, 12), (0.018, 0.05), (0.8, 0.5)),
        planted_two_term("share 2", "share", three, np.geomspace(0.001, 0.5, 9), (0.03, 0.0), (1.2, 0.3), seeds=2),
        planted_two_term("negatives 1", "negatives", five, np.geomspace(1e3, 2**21, 12), (2e4, 0.3), (0.4, 0.5)),
        planted_two_term("negatives 2", "negatives", four, np.geomspace(4096, 2**21, 10), (3e4, 0.25), (0.3, 1.2)),
        planted_batch(
            "batch 1",
            f"table of steps, {NOISE / SLOPE:g} in log steps ({SLOPE} nats per e-fold of events at the target)",
            np.array([85.0, 151.0, 302.0, 604.0, 1200.0]),
            64.0 * 2.0 ** np.arange(9),
            probes=False,
            law=(93.0, 0.47),
        ),
        planted_batch(
            "batch 2",
            "20 probes per run through events_to_target",
            np.array([1e5, 4e5, 1.6e6, 6.4e6]),
            64.0 * 2.0 ** np.arange(10),
            probes=True,
            law=(20.0, 0.3),
        ),
    ]


def answers(fit: LawFit) -> dict[str, Estimate]:
    """Parameters, and optima as `NAME at C = FLOPS`."""
    optima = {
        f"{name} at C = {budget.flops:g}": value for budget in fit.budgets for name, value in budget.optima.items()
    }
    return {**fit.parameters, **optima}


def one_draw(task: tuple[int, int]) -> dict[str, Any]:
    """Draw `seed` of design `number`: CPU seconds and intervals by quantity, none where the law refuses."""
    number, seed = task
    design = designs()[number]
    runs = design.draw(np.random.default_rng((number, seed)), NOISE)
    start = time.process_time()
    try:
        found = answers(design.fit(runs))
    except UserError:
        found = {}
    ends = {name: [found[name].low, found[name].high] for name in design.truth} if found else None
    return {"design": number, "seed": seed, "seconds": time.process_time() - start, "ends": ends}


def lines(design: Design, rows: list[dict[str, Any]]) -> list[str]:
    """Rows of the table of one design."""
    kept = [row["ends"] for row in rows if row["ends"]]
    refused, seconds = len(rows) - len(kept), float(np.median([row["seconds"] for row in rows]))
    text = []
    for name, truth in design.truth.items():
        low, high = np.array([ends[name] for ends in kept]).T
        covered, below = float(((low <= truth) & (truth <= high)).mean()), float((truth > high).mean())
        width = float(np.median(high - low))
        open_ends = int((~np.isfinite(low) | ~np.isfinite(high)).sum())
        text.append(
            f"| {design.name} | {name} | {truth:.4g} | {width:.2g} | {covered:.1%} | {below:.1%} | "
            f"{open_ends} | {refused} | {len(rows)} | {seconds:.2f} |"
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.rows.read_text().splitlines()] if arguments.rows.exists() else []
    done = {(row["design"], row["seed"]) for row in rows}
    wanted = [(number, seed) for seed in range(arguments.draws) for number in range(len(designs()))]
    with (
        multiprocessing.get_context("spawn").Pool(arguments.processes) as pool,
        arguments.rows.open("a") as file,
    ):
        for row in pool.imap_unordered(one_draw, [task for task in wanted if task not in done], chunksize=6):
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
    text = [
        "# Intervals of the laws of share, negatives and critical batch",
        "",
        f"Written by `python benchmarks/laws_axes.py`: up to {arguments.draws:,} draws per design, noise of sd {NOISE} "
        "nats, 95 % intervals (a coverage of 95 % has a standard error of "
        f"{math.sqrt(0.95 * 0.05 / arguments.draws):.1%}).",
        "",
        *[f"- {design.name}: {design.about}" for design in designs()],
        "",
        "| design | quantity | truth | median width | covered | truth above | infinite | refused | draws | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for number, design in enumerate(designs()):
        text += lines(design, [row for row in rows if row["design"] == number])
    publish("laws_axes", "\n".join([*text, "", machine("numpy", "scipy"), ""]))


if __name__ == "__main__":
    main()
