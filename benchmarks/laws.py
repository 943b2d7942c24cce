"""Whether the intervals of fitted laws hold what they say: coverage on planted laws, predictions of left-out runs.

`surface`: 1,000 noisy draws of a planted L(N, D) on each of two designs: per quantity, how often the 95 % interval
holds the truth, how often an end is open, and the seconds of a fit.
`holdout`: the runs with the most C are left out of tables that others published, and predicted from the rest.
`resampling`: widths of intervals on these tables against those of other samples of their own runs. The surface's
profile likelihood against 200 bootstrap draws of whole training runs; the joint law's t intervals against a jackknife
over 20 groups of training runs (runs drawn twice are twins without noise to REML, so a bootstrap is none for it).
Run with `python benchmarks/laws.py surface` and `python benchmarks/laws.py holdout --external DIRECTORY`, the folder
that holds gemstones/, kyo_takano_chinchilla/ and porian/. Writes benchmarks/results/laws_<part>.md.

Shape legend: R runs, G groups of runs.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import machine, publish
from scipy import stats

from bfm.errors import UserError
from bfm.laws.joint import fit_joint
from bfm.laws.joint_law import joint_law
from bfm.laws.result import Estimate
from bfm.laws.runs import Runs, from_table
from bfm.laws.surface import fit_surface

PLANTED = {"E": 1.7, "A": 406.0, "B": 410.0, "alpha": 0.34, "beta": 0.28}
NOISE = 0.003
"""Standard deviation of a loss, in nats."""

BOOTSTRAPS, GROUPS = 200, 20
LEAST = 1e-3
"""An E below it is none."""


@dataclass(frozen=True)
class Design:
    """Where the runs of a draw stand."""

    name: str
    params_R: np.ndarray
    events_R: np.ndarray


def iso_flop(budgets: int, sizes: int) -> Design:
    """Sizes spread a factor of 25 about the best one at each of some C from 1e15 to 1e19."""
    flops = np.logspace(15, 19, budgets)[:, None]
    params = best_size(flops) * np.logspace(-0.7, 0.7, sizes)
    words = f"{budgets} C from 1e15 to 1e19, {sizes} N each within a factor of 5 of the best"
    return Design(words, params.ravel(), (flops / 6 / params).ravel())


def grid(sizes: int) -> Design:
    """A square of N and D."""
    params, events = np.meshgrid(np.logspace(6, 8.5, sizes), np.logspace(8, 10.5, sizes))
    return Design(f"{sizes} N from 1e6 to 3e8 by {sizes} D from 1e8 to 3e10", params.ravel(), events.ravel())


def loss(params: np.ndarray, events: np.ndarray) -> np.ndarray:
    """The planted surface."""
    law = PLANTED
    return np.asarray(law["E"] + law["A"] * params ** -law["alpha"] + law["B"] * events ** -law["beta"])


def best_size(flops: np.ndarray) -> np.ndarray:
    """N_opt of the planted surface at C = 6 N D."""
    total = PLANTED["alpha"] + PLANTED["beta"]
    lead = (PLANTED["alpha"] * PLANTED["A"] / (PLANTED["beta"] * PLANTED["B"])) ** (1 / total)
    return np.asarray(lead * (flops / 6) ** (PLANTED["beta"] / total))


def draw(task: tuple[Design, int]) -> tuple[dict[str, tuple[Estimate, float]], float]:
    """Estimates and truths of one draw, and the processor seconds of its fit."""
    design, seed = task
    rng = np.random.default_rng(seed)
    params_R, events_R = design.params_R, design.events_R
    loss_R = loss(params_R, events_R) + NOISE * rng.standard_normal(len(params_R))
    flops_R = 6 * params_R * events_R
    columns = {"params": params_R, "events": events_R, "flops": flops_R, "loss": loss_R}
    names = tuple(f"run {place + 1}" for place in range(len(params_R)))
    begin = time.process_time()
    fit = fit_surface(Runs("planted", columns, names, "loss", {"loss": loss_R}, {}, {}))
    spent = time.process_time() - begin
    truths = {**PLANTED, "a": PLANTED["beta"] / (PLANTED["alpha"] + PLANTED["beta"])}
    found = {name: (fit.parameters[name], truth) for name, truth in truths.items()}
    top = fit.budgets[-1]
    found["N_opt at the largest C"] = (top.optima["N_opt"], float(best_size(np.array(top.flops))))
    return found, spent


def surface_part(draws: int, workers: int) -> str:
    """Coverage on planted surfaces."""
    lines: list[str] = []
    for design in (iso_flop(6, 9), grid(8)):
        with ProcessPoolExecutor(workers) as pool:
            results = list(pool.map(draw, [(design, seed) for seed in range(draws)], chunksize=10))
        seconds = np.array([spent for _, spent in results])
        lines += [
            f"## {len(design.params_R)} runs: {design.name}",
            "",
            f"{draws} draws, none refused; processor seconds of a fit with all its intervals: "
            f"median {np.median(seconds):.2f}, 95 % below {np.quantile(seconds, 0.95):.2f}.",
            "",
            "| quantity | truth | median interval | holds the truth | an end open |",
            "|---|---|---|---|---|",
        ]
        lines += [_coverage(name, [found[name] for found, _ in results]) for name in results[0][0]]
        lines.append("")
    law = "L = 1.7 + 406 / N^0.34 + 410 / D^0.28"
    title = f"# Coverage of the surface's 95 % intervals\n\nPlanted: {law}, noise {NOISE} nats; C = 6 N D."
    return "\n".join([title, _written("surface"), "", *lines])


def _coverage(name: str, pairs: list[tuple[Estimate, float]]) -> str:
    held = np.array([estimate.low <= truth <= estimate.high for estimate, truth in pairs])
    unclosed = np.array([not (math.isfinite(one.low) and math.isfinite(one.high)) for one, _ in pairs])
    unclosed |= np.array([name == "E" and one.low <= 0 for one, _ in pairs])
    low, high = (float(np.median([getattr(one, end) for one, _ in pairs])) for end in ("low", "high"))
    error = math.sqrt(held.mean() * (1 - held.mean()) / len(held))
    truth = f"{pairs[0][1]:.4g}" if len({truth for _, truth in pairs}) == 1 else "varies"
    share = f"{held.mean():.1%} ± {error:.1%}"
    return f"| {name} | {truth} | {low:.4g} to {high:.4g} | {share} | {unclosed.mean():.1%} |"


def tables(external: Path) -> Iterator[tuple[str, Runs]]:
    """Published runs: name, table."""
    hot = "gemstones/wandb_dfs/wandb_df_for_fitting_hot.jsonl"
    columns = [("params", "params_active_precise"), ("events", "tokens"), ("loss", "final_loss"), ("curve", "run_name")]
    yield "gemstones hot", from_table(external / hot, columns)
    columns = [("params", "N"), ("events", "D"), ("flops", "C"), ("loss", "loss")]
    yield "chinchilla (kyo-takano)", from_table(external / "kyo_takano_chinchilla/df.csv", columns)
    columns = [("params", "n"), ("events", "tokens"), ("flops", "flops"), ("loss", "loss")]
    settings = (
        "hparams == 'base' and warmup == 'long' and param_count == 'kaplan'",
        "hparams == 'base' and warmup == 'long' and param_count == 'standard'",
        "hparams == 'base' and warmup == 'short' and decay == 'kaplan' and param_count == 'standard'",
        "hparams == 'base' and warmup == 'short' and decay == 'chinchilla' and param_count == 'standard'",
        "hparams == 'tuned' and decay == 'const' and param_count == 'standard'",
    )
    for corpus, setting in itertools.product(("rw", "owt2"), settings):
        where = f"dataset == '{corpus}' and {setting}"
        try:
            found = from_table(external / "porian/isoflop_points.parquet", columns, where)
        except UserError as error:
            print(f"porian {corpus}, {setting}: {error}")
            continue
        yield f"porian {corpus}: {setting}", found


def holdout_part(external: Path) -> str:
    """The runs with the most C of published tables, predicted from the others by the joint model."""
    lines = [
        "| table | runs fitted | left out | C beyond | inside | median miss | median half width | CPU s a fit | "
        "p of the surface's form |",
        "|---" * 9 + "|",
    ]
    inside: list[np.ndarray] = []
    halves: list[float] = []
    for name, runs in tables(external):
        flops_R = runs["flops"] if runs.has("flops") else 6 * runs["params"] * runs["events"]
        levels = np.unique(np.round(np.log(flops_R), 2))
        edge = math.exp(levels[-1]) * 0.98 if len(levels) < 20 else flops_R.max() / 4
        top_R = flops_R >= edge
        left, kept = runs.select(top_R), runs.select(~top_R)
        begin = time.process_time()
        joint = fit_joint(kept)
        spent = time.process_time() - begin
        columns = {"params": left["params"], "events": left["events"], "flops": flops_R[top_R]}
        loss_R, half_R = joint.predict(columns)
        miss_R = left["loss"] - loss_R
        inside.append(np.abs(miss_R) <= half_R)
        halves.append(float(np.median(half_R)))
        times = f"up to {flops_R[top_R].max() / flops_R[~top_R].max():.2g} times"
        words = f"{inside[-1].mean():.0%} | {np.median(miss_R):+.3f} | {halves[-1]:.3f}"
        form_p = fit_surface(runs).details["form_p"]
        lines.append(f"| {name} | {len(kept)} | {len(left)} | {times} | {words} | {spent:.2f} | {form_p:.0e} |")
    every = np.concatenate(inside)
    lines += [
        "",
        f"Inside the interval: {every.mean():.0%} of all {len(every)} runs; median half width over tables "
        f"{np.median(halves):.3f} nats.",
    ]
    title = (
        "# Prediction intervals on runs of more C than the law has seen\n\n"
        "Each table's largest iso-FLOP level is left out; the largest factor of 4 in C where there are no levels.\n"
        "The last column, of all runs of a table: small where E + A/N^alpha + B/D^beta misses what a quadratic in ln N "
        "and ln D\nwould not."
    )
    return "\n".join([title, _written("holdout"), "", *lines, ""])


def resampling_part(external: Path) -> str:
    """Widths of intervals by other samples of the same runs, over those that the laws tell."""
    of_surface, of_joint = ("a", "E", "alpha", "beta"), ("N_exponent", "E")
    heads = [*(f"surface {name}" for name in of_surface), *(f"joint {name}" for name in of_joint)]
    lines = [f"| table | runs | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    ratios = []
    for name, runs in tables(external):
        told, redrawn = fit_surface(runs).parameters, fit_surface(runs, bootstrap=BOOTSTRAPS).parameters
        found = [_width(redrawn[one], one) / _width(told[one], one) for one in of_surface]
        left_out, law = _jackknife(runs, of_joint), joint_law(runs).parameters
        found += [left_out[one] / _width(law[one], one) for one in of_joint]
        ratios.append(found)
        lines.append(f"| {name} | {len(runs)} | {' | '.join(f'{ratio:.2f}' for ratio in found)} |")
        print(lines[-1], flush=True)
    middle = np.median(ratios, 0)
    lines.append(f"| median | | {' | '.join(f'{ratio:.2f}' for ratio in middle)} |")
    title = (
        "# Intervals against other samples of the same runs\n\n"
        f"Width by {BOOTSTRAPS} bootstrap draws of whole runs over that by profile likelihood (surface), and by a "
        f"jackknife\nover {GROUPS} groups of runs over that of t intervals (joint); of E in its log."
    )
    return "\n".join([title, _written("resampling"), "", *lines, ""])


def _jackknife(runs: Runs, names: Sequence[str]) -> dict[str, float]:
    """Widths of 95 % intervals by leaving out a group of whole training runs at a time."""
    curves = runs["curve"] if runs.has("curve") else np.arange(len(runs))
    _, curve_R = np.unique(curves, return_inverse=True)
    group_R = np.random.default_rng(0).permutation(curve_R.max() + 1)[curve_R] % GROUPS
    fits = [joint_law(runs.select(group_R != group)).parameters for group in range(GROUPS)]
    found = {}
    for name in names:
        value_G = np.array([_scaled(fit[name].estimate, name) for fit in fits])
        error = math.sqrt((GROUPS - 1) * float(value_G.var()))
        found[name] = 2 * float(stats.t.ppf(0.975, GROUPS - 1)) * error
    return found


def _width(value: Estimate, name: str) -> float:
    return _scaled(value.high, name) - _scaled(value.low, name)


def _scaled(value: float, name: str) -> float:
    return math.log(max(value, LEAST)) if name == "E" else value


def _written(part: str) -> str:
    return f"Written by `python benchmarks/laws.py {part}` on {datetime.date.today()}."


ON_TABLES = {"holdout": holdout_part, "resampling": resampling_part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("surface", *ON_TABLES))
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--external", type=Path, help="folder of the published tables")
    options = parser.parse_args()
    if options.part == "surface":
        text = surface_part(options.draws, options.workers)
    elif options.external is None:
        parser.error(f"{options.part} needs --external")
    else:
        text = ON_TABLES[options.part](options.external)
    publish(f"laws_{options.part}", f"{text}\n{machine('numpy', 'scipy')}\n")


if __name__ == "__main__":
    main()
