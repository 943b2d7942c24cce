"""Do the intervals of laws hold the truth on rows that a policy chose, and on rows that nobody chose.

    python benchmarks/coverage.py rows ROWS [--sweeps 200]
    python benchmarks/coverage.py table ROWS [--law joint]

`rows` runs simulated sweeps of every case (real policy, driver and proposer; planted laws) and keeps their rows in the
JSON-lines file ROWS; a study that was cut off goes on. `table` fits one law to each kept sweep: how often its 95 %
intervals hold the truth, how far its estimates are off, what it refuses. All laws are so compared on the same rows.

Shape legend: R rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from common import machine, publish
from coverage_laws import LAWS, Answer

from bfm.errors import UserError
from bfm.laws.result import Estimate
from bfm.laws.runs import Runs
from bfm.sweep.ledger.task import Task
from bfm.sweep.policies.space_arena import SpaceArena
from bfm.sweep.simulator.fleet import Fleet
from bfm.sweep.simulator.law import Law, LawCosts
from bfm.sweep.simulator.run import simulate, simulated_row
from bfm.sweep.space.settings import SweepSpec
from bfm.sweep.space.space import Feasible, FeasibleSet
from bfm.sweep.space.spec import from_dict
from bfm.training.config import TrainConfig
from bfm.training.schedule import rule_learning_rate

TRIALS = 100
LADDER = (1e15, 1e16, 1e17, 1e18, 1e19)
TOTAL_FLOPS = 1e20
PLANTED = {
    "paper": Law.through(params=0.5e6, flops=1e15),
    "skewed": Law.through(
        params=0.5e6, flops=1e15, floor=4.0, model_scale=300.0, model_exponent=0.5, data_exponent=0.2
    ),
}
SMALLEST, FIXED = 4, 16
"""Groups of 4 windows per step: the fewest of the joint space, those of sizes alone."""
_LOG = "log_uniform_values"
_SIZES = {"params": {"distribution": _LOG, "min": 1e5, "max": 1e9}}
_SHAPE = {name: {"value": value} for name, value in (("window", 256), ("group_windows", 4), ("embedder_depth", 1))}
SPACES: Mapping[str, Mapping[str, Any]] = {
    "joint": {
        **_SIZES,
        **_SHAPE,
        "embedder_share": {"distribution": _LOG, "min": 0.005, "max": 0.2},
        "learning_rate": {"distribution": _LOG, "min": 1e-4, "max": 3e-2},
        "groups_per_step": {"values": [SMALLEST, 8, 16, 32, 64, 128]},
    },
    "sizes": {**_SIZES, **_SHAPE, "embedder_share": {"value": 0.02}, "groups_per_step": {"value": FIXED}},
}
SHARED = {"own": 0.0, "half shared": 0.5}
"""Share of a row's noise variance that all rows of its trial have in common."""
COLUMNS = ("trial", "flops", "params", "events", "share", "rate", "batch", "loss")


@dataclass(frozen=True)
class Case:
    """What a sweep is run under."""

    design: str
    space: str
    law: str
    noise: str
    sd: float

    @property
    def planted(self) -> Law:
        return PLANTED[self.law]

    def waste(self) -> float:
        """How many events stand for one at the best batch of the space."""
        groups = SMALLEST if self.space == "joint" else FIXED
        return 1 + 4 * groups / self.planted.critical_batch


CASES = tuple(itertools.starmap(Case, itertools.product(("frontier", "fixed"), SPACES, PLANTED, SHARED, (0.003, 0.01))))


def spec_of(case: Case, seed: int) -> SweepSpec:
    """The sweep; D / N is free enough for both laws' optima."""
    return from_dict(
        {
            "name": "coverage",
            "metric": {"name": "nll"},
            "method": "optuna",
            "parameters": dict(SPACES[case.space]),
            "budget": {
                "ladder_flops": list(LADDER),
                "total_flops": TOTAL_FLOPS,
                "max_trials": TRIALS,
                "events_per_param": [1, 1_000_000],
            },
            "scheduler": {"type": "frontier"},
            "scaling": {"slots": 8, "tiers": [{"engine": "plain", "workers": 1, "gpus": 1, "micro_groups": 1}]},
            "data": {"shards": "none"},
            "seeds": [seed],
        }
    )


@dataclass(frozen=True)
class Laboratory:
    """Measures configurations of one sweep: what they reach is the law, plus noise of the row and of its trial."""

    case: Case
    seed: int

    def row(self, config: Mapping[str, Any], trial: str, rung: int) -> dict[str, Any]:
        """A row of `COLUMNS`."""
        shape = TrainConfig.from_dict(dict(config)).shape()
        flops = LADDER[rung]
        batch = config["groups_per_step"] * config["group_windows"]
        loss = self.case.planted.loss_of(config, shape.params, flops)
        common = SHARED[self.case.noise]
        loss += self.case.sd * (math.sqrt(common) * self._draw(trial) + math.sqrt(1 - common) * self._draw(trial, rung))
        values = (trial, flops, shape.params, flops / 6 / shape.params, config["embedder_share"])
        return dict(zip(COLUMNS, (*values, config["learning_rate"], batch, loss), strict=True))

    def _draw(self, trial: str, rung: int = -1) -> float:
        key = [self.seed, int(trial[1:]), rung + 1, CASES.index(self.case)]
        return float(np.random.default_rng(key).standard_normal())


def sweep_rows(case: Case, seed: int) -> list[dict[str, Any]]:
    """Rows of one sweep."""
    spec, laboratory = spec_of(case, seed), Laboratory(case, seed)
    feasible = FeasibleSet(spec, LawCosts())
    if case.design == "fixed":
        return fixed_rows(feasible, laboratory, np.random.default_rng([seed, CASES.index(case)]))
    rows = []

    def execute(task: Task) -> dict[str, Any]:
        rows.append(laboratory.row(task.config, task.trial, task.rung))
        return simulated_row(task, rows[-1]["params"], {"nll": rows[-1]["loss"]}, f"{task.trial}-{task.rung}")

    fleet = Fleet(((0.0, 8),))
    simulate(spec, SpaceArena(feasible), execute, fleet, np.random.default_rng(seed))
    return rows


def fixed_rows(feasible: FeasibleSet, laboratory: Laboratory, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Trials drawn from the space; how far each is trained is drawn as well, a third of them a rung further."""
    rows = []
    for number in range(TRIALS):
        point = feasible.judge(feasible.draw(rng))
        while not isinstance(point, Feasible):
            point = feasible.judge(feasible.draw(rng))
        rungs = list(point.rungs)
        count = min(len(rungs), int(rng.geometric(0.4)))
        rows += [laboratory.row(point.config.as_dict(), f"t{number:05d}", rung) for rung in rungs[:count]]
    return rows


def make_rows(path: Path, sweeps: int, designs: Sequence[str]) -> None:
    """All cases of one seed before the next seed."""
    known = {(Case(*made["case"]), made["seed"]) for made in kept(path)}
    for seed, case in itertools.product(range(sweeps), CASES):
        if (case, seed) in known or case.design not in designs:
            continue
        rows = sweep_rows(case, seed)
        columns = {name: [row[name] for row in rows] for name in COLUMNS}
        made = {"case": list(case.__dict__.values()), "seed": seed, "columns": columns}
        with path.open("a") as file:
            file.write(json.dumps(made) + "\n")


def kept(path: Path) -> Iterable[dict[str, Any]]:
    """Sweeps of a rows file."""
    return map(json.loads, path.read_text().splitlines() if path.exists() else [])


def runs_of(columns: Mapping[str, list[Any]], space: str) -> Runs:
    """As laws take them; without the axes that a space holds fixed."""
    names = ("flops", "params", "events", "share", "rate", "batch", "loss")
    left_out = () if space == "joint" else ("share", "rate", "batch")
    values = {name: np.array(columns[name], float) for name in names if name not in left_out}
    values |= {"budget": values["flops"], "curve": np.array(columns["trial"])}
    labels = tuple(f"{trial} at {flops:g}" for trial, flops in zip(columns["trial"], columns["flops"], strict=True))
    settings = tuple(name for name in ("share", "rate") if name in values)
    return Runs("simulated", values, labels, "nll", {"nll": values["loss"]}, {}, {}, settings=settings)


def truths(case: Case, seed: int) -> dict[str, float]:
    """What is to be held; sizes are those at the best other axes."""
    law, top = case.planted, LADDER[-1]
    exponent = law.data_exponent / (law.model_exponent + law.data_exponent)
    found = {"N exponent": exponent, "E": law.floor}
    rng = np.random.default_rng([seed, CASES.index(case), 1_000_003])
    for times in (1, 10):
        found[f"N* at {times} C"] = best_size(case, times * top)
    for times in (4, 10):
        found[f"a run at {times} C"] = expected(case, times * top) + case.sd * float(rng.standard_normal())
    return found


def best_size(case: Case, flops: float) -> float:
    """N* where every other axis is at its optimum."""
    law = case.planted
    pull = (
        law.model_exponent * law.model_scale / (law.data_exponent * law.data_scale * case.waste() ** law.data_exponent)
    )
    return float((pull * (flops / 6) ** law.data_exponent) ** (1 / (law.model_exponent + law.data_exponent)))


def expected(case: Case, flops: float) -> float:
    """The loss there."""
    law, params = case.planted, best_size(case, flops)
    events = flops / 6 / params / case.waste()
    return law.floor + law.model_scale / params**law.model_exponent + law.data_scale / events**law.data_exponent


def place_of(case: Case, flops: float) -> dict[str, float]:
    """Where the run to be predicted stands: best size, every other axis at its optimum."""
    params = best_size(case, flops)
    batch = 4 * (SMALLEST if case.space == "joint" else FIXED)
    rate = rule_learning_rate(params, batch * 256)
    place = {"params": params, "events": flops / 6 / params, "share": case.planted.best_share}
    return {**place, "batch": float(batch), "rate": rate}


def judge(name: str, made: Mapping[str, Any]) -> tuple[Answer, float]:
    """One law's answers on one sweep, and the seconds it took; no answer where it refuses."""
    case = Case(*made["case"])
    places = {times: place_of(case, times * LADDER[-1]) for times in (1, 4, 10)}
    begin = time.process_time()
    try:
        return LAWS[name](runs_of(made["columns"], case.space), places), time.process_time() - begin
    except UserError:
        return {}, time.process_time() - begin


def summarise(name: str, path: Path, most: int) -> list[str]:
    """Lines of a table over cases."""
    answers: dict[Case, list[tuple[Answer, dict[str, float]]]] = defaultdict(list)
    seconds = []
    for made in kept(path):
        case = Case(*made["case"])
        if len(answers[case]) < most:
            answer, spent = judge(name, made)
            answers[case].append((answer, truths(case, made["seed"])))
            seconds.append(spent)
    names = list(truths(CASES[0], 0))
    lines = [
        f"CPU s a fit with all its intervals: median {np.median(seconds):.2f}, most {max(seconds):.2f}.",
        "",
        "| design | space | law | noise | sd | sweeps | refused | " + " | ".join(names) + " |",
        "|---" * (7 + len(names)) + "|",
    ]
    lines += [_line(list(case.__dict__.values()), answers[case], names) for case in CASES if answers[case]]
    for design, space in itertools.product(("frontier", "fixed"), SPACES):
        pooled = [pair for case in CASES if (case.design, case.space) == (design, space) for pair in answers[case]]
        lines += [_line([design, space, "both", "both", "both"], pooled, names)] if pooled else []
    return lines


def _line(head: Sequence[Any], pairs: Sequence[tuple[Answer, dict[str, float]]], names: Sequence[str]) -> str:
    refused = sum(not answer for answer, _ in pairs)
    cells = [_cell([(answer[name], truth[name]) for answer, truth in pairs if name in answer]) for name in names]
    return f"| {' | '.join(map(str, head))} | {len(pairs)} | {refused} | {' | '.join(cells)} |"


def _cell(found: Sequence[tuple[Estimate, float]]) -> str:
    """Held, mean error in half widths, median half width, how many are open or not told."""
    if not found:
        return ""
    values = np.array([(one.estimate, one.low, one.high, truth) for one, truth in found])
    if values[0, 3] > 100:
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.log(values)
    estimate, low, high, truth = values.T
    held, closed = np.mean((low <= truth) & (truth <= high)), np.isfinite(high - low)
    if not closed.any():
        return f"{held:.0%} (all open)"
    half = (high - low)[closed] / 2
    off = float(np.mean((estimate - truth)[closed] / half))
    unclosed = "" if closed.all() else f" ({(~closed).sum()} open)"
    return f"{held:.0%} {off:+.2f} ±{np.median(half):.2g}{unclosed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("rows", "table"))
    parser.add_argument("rows", type=Path)
    parser.add_argument("--sweeps", type=int, default=200)
    parser.add_argument("--designs", nargs="+", default=("frontier", "fixed"))
    parser.add_argument("--law", choices=tuple(LAWS), default="joint")
    options = parser.parse_args()
    if options.part == "rows":
        make_rows(options.rows, options.sweeps, options.designs)
        return
    about = (
        "Each cell: how many 95 % intervals hold the truth, mean error in half widths, median half width (of ln N*); "
        "`open`: an end is infinite. D* is C / (6 N*) and its exponent 1 less that of N*, so theirs are the same.\n"
        f"Sweeps of {TRIALS} trials, rungs 1e15 to 1e19; written by `python benchmarks/coverage.py table`."
    )
    lines = [f"# Coverage of `{options.law}`", "", about, "", *summarise(options.law, options.rows, options.sweeps)]
    publish(f"coverage_{options.law}", "\n".join([*lines, "", machine("numpy", "scipy"), ""]))


if __name__ == "__main__":
    main()
