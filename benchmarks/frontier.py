"""Which policy finds the compute frontier with how much of a grid's compute, on known curves and planted laws.

`tables`: summed frontier regret of every policy on tables of real curves (--curves names them) and on a planted one.
`planted`: 600 configurations under laws with noise 0.002 nats, a tenth of the grid's FLOPs: how much compute the
configuration found at the top is worth. `speed`: decision times, what waiting for them costs 64 workers with tasks of
10 to 30 s, replay, growth with the number of trials; OPENBLAS_NUM_THREADS=1 is what bfm's own commands set.
Run with `python benchmarks/frontier.py tables --curves NAME=PATH:RUNGS:FEATURES[:WHERE] ...` (and so on).
Writes benchmarks/results/frontier_<part>.md.
"""

from __future__ import annotations

import argparse
import datetime
import heapq
import itertools
import math
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from common import ROOT, machine, publish

from bfm.files import Store
from bfm.sweep.driver.driver import SweepDriver
from bfm.sweep.ledger.lease import Lease
from bfm.sweep.ledger.ledger import Ledger, MemoryLedger, read_state
from bfm.sweep.ledger.task import Task
from bfm.sweep.policies.proposer import POOL_SIZE, Proposer
from bfm.sweep.simulator.contest import Contest, Entry, Standing, contest_spec, enter
from bfm.sweep.simulator.fleet import Fleet, parse_schedule
from bfm.sweep.simulator.forecast import forecast
from bfm.sweep.simulator.law import LAWS, Law
from bfm.sweep.simulator.table import Curve, TableArena, read_curves
from bfm.sweep.space.spec import resolve
from bfm.training.schedule import rule_learning_rate
from bfm.units import parse_count

POLICIES = ("frontier", "isoflop-window", "random", "asha-promote", "asha-stop")
RATIO = 4
POOL = POOL_SIZE + Proposer.optuna_draws
PLANTED_LAWS = (
    Law.through(params=0.5e6, flops=1e15),
    Law.through(params=1e6, flops=1e15, model_exponent=0.4, data_exponent=0.4, model_scale=250.0, rate_bowl=0.1),
)


@dataclass(frozen=True)
class Planted:
    """Configurations under a law, and the law's loss of each at any C."""

    law: Law
    configs: tuple[dict[str, float], ...]
    curves: tuple[Curve, ...]

    def loss(self, place: int, flops: float) -> float:
        """Without noise."""
        config = self.configs[place]
        return self.law.loss(config, config["params"], flops, config["batch"])


def plant(law: Law, count: int, rungs: tuple[int, ...], seed: int) -> Planted:
    """Sizes spread over a factor of 1,000 about the best ones, so that curves cross; other axes about their optima."""
    rng = np.random.default_rng(seed)
    middle = math.sqrt(float(rungs[0]) * float(rungs[-1]))
    sizes = np.exp(np.linspace(math.log(1e4), math.log(1e10), 2000))
    best = sizes[np.argmin([law.loss(_config(size, 0.02, 1.0, 32.0, 64.0), size, middle, 64.0) for size in sizes])]
    configs, curves = [], []
    for place in range(count):
        size = float(best * np.exp(rng.uniform(-3.45, 3.45)))
        share, rate, aspect = np.exp(rng.uniform([-5.3, -1.5, 2.8], [-1.6, 1.5, 4.6]))
        config = _config(size, float(share), float(rate), float(aspect), float(2 ** rng.integers(4, 10)))
        flops = [float(rung) / 2**half for rung in rungs for half in (1, 0)]
        losses = [law.measured(law.loss(config, size, c, config["batch"]), f"{seed} {place} {c}") for c in flops]
        known = {
            "config_id": f"c{place:04d}",
            **{key: config[key] for key in ("embedder_share", "learning_rate", "aspect", "batch")},
        }
        configs.append(config)
        curves.append(Curve(known, round(size), tuple(flops), tuple(losses), True))
    return Planted(law, tuple(configs), tuple(curves))


def _config(size: float, share: float, rate: float, aspect: float, batch: float) -> dict[str, float]:
    rate *= rule_learning_rate(size, 256 * batch)
    return {
        "params": size,
        "embedder_share": share,
        "learning_rate": rate,
        "aspect": aspect,
        "batch": batch,
        "window": 256.0,
        "negatives": 0.0,
    }


def compute_worth(planted: Planted, places: list[int], found: int, top: int) -> float:
    """The C at which the frontier of `places` has the found one's loss at `top`, over `top`."""
    loss, low, high = planted.loss(found, top), math.log(top) - 3.0, math.log(top)
    for _ in range(40):
        at = (low + high) / 2
        reached = min(planted.loss(place, math.exp(at)) for place in places) <= loss
        low, high = (low, at) if reached else (at, high)
    return math.exp(high) / top


def _one(job: tuple[Contest, str, int]) -> Entry:
    return enter(*job)


def run_all(contest: Contest, policies: tuple[str, ...], seeds: int, processes: int) -> list[Standing]:
    """Seeds over processes; every entry is a function of its job alone."""
    jobs = [(contest, policy, seed) for policy in policies for seed in range(seeds)]
    with ProcessPoolExecutor(processes) as pool:
        entries = list(pool.map(_one, jobs, chunksize=2))
    return [
        Standing(policy, tuple(entries[place * seeds : (place + 1) * seeds])) for place, policy in enumerate(policies)
    ]


def tables(options: argparse.Namespace) -> None:
    """Regrets of all policies on all tables."""
    known = {}
    for text in options.curves:
        name, _, rest = text.partition("=")
        path, rungs, features, *where = rest.split(":")
        curves = read_curves(path, features.split(","), where=where[0] if where else None)
        known[name] = curves, tuple(parse_count(rung) for rung in rungs.split(","))
    rungs = tuple(10**16 * RATIO**rung for rung in range(4))
    known["planted"] = plant(PLANTED_LAWS[1], 60, rungs, seed=5).curves, rungs
    lines = []
    settings = list(itertools.product((0.15, 0.30), options.workers))
    for fraction, workers in settings:
        sums: dict[str, list[float]] = {policy: [] for policy in POLICIES}
        lines += ["", f"## {fraction:.0%} of the full cost, {workers} worker{'s' if workers > 1 else ''}", ""]
        lines += ["| policy | " + " | ".join(known) + " | mean |", "|---" * (len(known) + 2) + "|"]
        cells: dict[str, list[str]] = {policy: [] for policy in POLICIES}
        for curves, ladder in known.values():
            contest = Contest(curves, ladder, fraction, 0.7, fleet=Fleet(((0.0, workers),)))
            for standing in run_all(contest, POLICIES, options.seeds, options.processes):
                total = standing.as_dict(ladder)["regret_sum"]
                sums[standing.policy].append(total["mean"])
                cells[standing.policy].append(f"{total['mean']:.4f} ({total['se']:.4f})")
        lines += [f"| {p} | " + " | ".join(cells[p]) + f" | {np.mean(sums[p]):.4f} |" for p in POLICIES]
    head = f"""# Frontier regret of policies on known curves

Summed over rungs, in nats: best loss seen within a rung's C minus the best there is; mean over {options.seeds} seeds
(standard error), each on a random 70 % of the configurations. Budget: a share of what training all of them would cost.
Written by `python benchmarks/frontier.py tables` on {datetime.date.today()}.
"""
    publish("frontier_tables", head + "\n".join(lines) + "\n\n" + machine("numpy", "scipy") + "\n")


def planted(options: argparse.Namespace) -> None:
    """How much compute the configuration found at the top rung is worth."""
    rungs = tuple(10**15 * 10**rung for rung in range(5))
    policies = ("frontier", "isoflop-window", "random")
    lines = ["| law | budget / grid | " + " | ".join(policies) + " |", "|---" * (len(policies) + 2) + "|"]
    for number, law in enumerate(PLANTED_LAWS):
        world = plant(law, 600, rungs, seed=11)
        names = {curve.config["config_id"]: place for place, curve in enumerate(world.curves)}
        for fraction in options.fractions:
            contest = Contest(world.curves, rungs, fraction)
            cells = []
            for standing in run_all(contest, policies, options.seeds, options.processes):
                worth = [_worth(world, names, entry, rungs[-1]) for entry in standing.entries]
                error = np.std(worth, ddof=1) / math.sqrt(len(worth))
                cells.append(f"{np.mean(worth):.1%} ({error:.1%})")
            lines.append(f"| {number + 1} | {fraction:.0%} | " + " | ".join(cells) + " |")
    head = f"""# What the configuration found at the top rung is worth, as compute

600 configurations (N, s, learning rate, aspect, batch) under two planted laws with noise of 0.002 nats per row; rungs
1e15 to 1e19 FLOPs. Worth: the C at which the best of all 600 has the found one's true loss, over the top rung's C;
mean over {options.seeds} seeds (standard error). Budgets are shares of training all 600 to the top.
Written by `python benchmarks/frontier.py planted` on {datetime.date.today()}.

"""
    publish("frontier_planted", head + "\n".join(lines) + "\n\n" + machine("numpy", "scipy") + "\n")


def _worth(world: Planted, names: dict[str, int], entry: Entry, top: int) -> float:
    rows = entry.state.rungs.get(4, {})
    if not rows:
        return 0.0
    trial = min(rows, key=lambda name: rows[name]["metrics"]["loss"])
    found = names[entry.state.trials[trial].config["config_id"]]
    return compute_worth(world, list(range(len(world.configs))), found, top)


def speed(options: argparse.Namespace) -> None:
    """Decision times at 600 trials and 5 rungs, growth up to 10,000 trials, replay of 100,000 rows."""
    lines = ["| trials known | rows | new candidates | median decision, ms | p99, ms | share waited |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [_growth(count, new, options.decisions) for count in options.trials for new in (POOL, count)]
    rungs = tuple(10**15 * RATIO**rung for rung in range(5))
    contest = Contest(plant(PLANTED_LAWS[0], 600, rungs, seed=3).curves, rungs, 0.25, fleet=Fleet(((0.0, 64),)))
    begun_s = time.perf_counter()
    entry = enter(contest, "frontier", 0)
    took_s = time.perf_counter() - begun_s
    lines += ["", f"A whole sweep with 64 workers, {len(entry.state.trials)} of 600 configurations begun, 5 rungs,"]
    lines += [f"{len(entry.state.arrivals):,} rows: {took_s:.0f} s; {_times(entry.timeline.decision_s)}."]
    lines += ["", _simulated(), "", _replay(options.rows)]
    head = f"""# Speed of decisions and replay

The frontier policy over planted tables of 5 rungs, one process: decisions of a sweep that knows so many trials (each
with its lowest row, a quarter of them with the next, and so on), one worker; CPU time. New candidates: a search space
offers 112 at a time, a table all of its configurations.
Share waited: of the time of 64 workers whose tasks take 10 to 30 s, one decision after the other in real time.
Written by `python benchmarks/frontier.py speed` on {datetime.date.today()}.

"""
    publish("frontier_speed", head + "\n".join(lines) + "\n\n" + machine("numpy", "scipy") + "\n")


def _growth(count: int, new: int, decisions: int) -> str:
    rungs = tuple(10**15 * RATIO**rung for rung in range(5))
    world = plant(PLANTED_LAWS[0], count + new, rungs, seed=3)
    arena = TableArena(world.curves, rungs)
    spec = contest_spec(Contest(world.curves, rungs, 1.0), "frontier", int(arena.full_flops(rungs[-1])), 0)
    driver = SweepDriver(spec, MemoryLedger(), arena)
    depths = np.random.default_rng(0).geometric(1 - 1 / RATIO, count).clip(1, len(rungs))
    _fill(driver, arena, depths.tolist())
    rows, times_ms = len(driver.state.arrivals), []
    for _ in range(decisions):
        begun_s = time.process_time()
        task = driver.next_task()
        times_ms.append(1e3 * (time.process_time() - begun_s))
        assert isinstance(task, Task)
        driver.report(task.task_id, arena.execute(task))
    # The first one learns all rows at once, as after a resume.
    share = share_waited([ms / 1e3 for ms in times_ms[1:]])
    median_ms, p99_ms = np.median(times_ms), np.quantile(times_ms[1:], 0.99)
    return f"| {count:,} | {rows:,} | {new:,} | {median_ms:.1f} | {p99_ms:.1f} | {share:.1%} |"


def share_waited(decision_s: Sequence[float], workers: int = 64, task_s: float = 20.0, rounds: int = 50) -> float:
    """Of the time of workers, what goes by until each is told what comes next.

    Decisions take turns, each as long as the next of `decision_s`, over and over; tasks take half of `task_s` to one
    and a half; the first of each, which all workers ask for at once, are left out.
    """
    rng = np.random.default_rng(0)
    free_s, decided_s, waited_s = [0.0] * workers, 0.0, 0.0
    for number in range(workers * rounds):
        asks_s = heapq.heappop(free_s)
        decided_s = max(asks_s, decided_s) + decision_s[number % len(decision_s)]
        heapq.heappush(free_s, decided_s + task_s * rng.uniform(0.5, 1.5))
        waited_s += decided_s - asks_s if number >= workers else 0.0
    return waited_s / (waited_s + workers * (rounds - 1) * task_s)


def _times(decision_s: Sequence[float]) -> str:
    median, p99 = np.quantile(decision_s, [0.5, 0.99]) * 1e3
    return f"median decision {median:.0f} ms, p99 {p99:.0f} ms, share waited {share_waited(decision_s):.1%}"


def _simulated() -> str:
    """The example of docs/spaces.md of a space under a law, TPE among its candidates."""
    spec = resolve(ROOT / "search_spaces" / "full_study.yaml", [])
    machines = {"startup_s": 120, "task_startup_s": 20, "preempted_per_hour": 0.05}
    fleet, begun_s = Fleet(parse_schedule("8,64@1h"), 4e14, **machines), time.perf_counter()
    (made,) = forecast(spec, LAWS["paper"], fleet, ["frontier"], [0])
    took_s = time.perf_counter() - begun_s
    times = _times(made.timeline.decision_s)
    return f"`bfm simulate search_spaces/full_study.yaml` as in docs/spaces.md: {took_s:.0f} s; {times}."


def _replay(rows: int) -> str:
    rungs = tuple(10**15 * RATIO**rung for rung in range(4))
    world = plant(PLANTED_LAWS[0], rows // 4, rungs, seed=3)
    contest = Contest(world.curves, rungs, 1.0)
    arena = TableArena(world.curves, rungs)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        lease = Lease.acquire(store)
        ledger = Ledger(store, lease)
        batch = _Batched(ledger)
        spec = contest_spec(contest, "grid", 2 * int(arena.full_flops(rungs[-1])), 0)
        driver = SweepDriver(spec, batch, arena)
        _fill(driver, arena, [len(rungs)] * len(world.curves))
        batch.flush()
        lease.release()
        begun_s = time.perf_counter()
        state = read_state(store)
        took_s = time.perf_counter() - begun_s
    counts = f"{len(state.arrivals):,} rows ({state.num_records:,} records)"
    return f"A ledger of {counts} is read, checked and replayed in {took_s:.1f} s."


class _Batched(MemoryLedger):
    """Segments of many records, as an import writes them; replay does not depend on their size."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger, self.kept = ledger, []

    def append(self, records) -> None:
        self.kept += records
        if len(self.kept) >= 1000:
            self.flush()

    def flush(self) -> None:
        if self.kept:
            self.ledger.append(self.kept)
            self.kept = []


def _fill(driver: SweepDriver, arena: TableArena, depths: list[int]) -> None:
    """The first rows of the first curves, decided by nobody."""
    for number, (proposal, depth) in enumerate(zip(arena.pool(driver.state, 0), depths, strict=False)):
        name = f"t{number:05d}"
        record = {"kind": "proposal", "trial": name, "number": number, "seed": 0, "config": proposal.config}
        driver._write(record | {"params": proposal.params, "source": "table", "rejected": {}})
        for rung in range(depth):
            task = driver._task(driver.state.trials[name], rung, rung - 1 if rung else None, 0)
            row = {"kind": "row", "task_id": task.task_id, "row": arena.execute(task), "probes": []}
            driver._write({"kind": "task", "task": task.as_dict(), "reason": "all of them"}, row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("tables")
    one.add_argument("--curves", action="append", default=[], help="NAME=PATH:RUNGS:FEATURES[:WHERE]")
    one.add_argument("--workers", type=int, nargs="+", default=[1, 8])
    two = parts.add_parser("planted")
    two.add_argument("--fractions", type=float, nargs="+", default=[0.05, 0.10])
    for part in (one, two):
        part.add_argument("--seeds", type=int, default=20)
        part.add_argument("--processes", type=int, default=2)
    three = parts.add_parser("speed")
    three.add_argument("--trials", type=int, nargs="+", default=[100, 600, 2500, 10_000])
    three.add_argument("--decisions", type=int, default=40)
    three.add_argument("--rows", type=int, default=100_000)
    options = parser.parse_args()
    {"tables": tables, "planted": planted, "speed": speed}[options.part](options)


if __name__ == "__main__":
    main()
