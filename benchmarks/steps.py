"""Training steps now and at an earlier commit: events per second of small models, and their share of the matmul peak.

    python benchmarks/steps.py [--before COMMIT] [--rounds 5] [--threads 1,2]

Both trees prepare the same log (the demo package's) and train the same configurations in processes of their own that
take turns; best and median of the rounds, whole steps with the making of batches. `as before` has the model of the
commit (no pointer, the next event as target), so both sides compute the same; `now` is today's default. Writes
benchmarks/results/steps.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import ROOT, machine, publish

BEFORE = "f0a1394"
_SMALL = {"groups_per_step": 2, "window": 512, "group_windows": 2}
SIZES: dict[str, dict[str, Any]] = {
    "quickstart, N = 5e3": {"params": 5e3, "embedder_share": 0.2, "d_item": 16, **_SMALL},
    "N = 5e4": {"params": 5e4, "embedder_share": 0.1, "d_item": 64, **_SMALL},
    "N = 5e5": {"params": 5e5, "embedder_share": 0.1, "d_item": 64, **_SMALL},
}
SAME_MODEL = {"copy": "none", "targets": "next_event"}
CONFIGS = {
    f"{size}, {model}": {**sizes, **more}
    for model, more in (("as before", SAME_MODEL), ("now", {}))
    for size, sizes in SIZES.items()
}


def serve(shards_path: str, threads: int, seconds: float) -> None:
    """Answer names of configurations with rates, in whichever tree this process finds bfm; ends with stdin."""
    import dataclasses
    import time

    # Before torch, as everywhere: it says how threads wait.
    from bfm.events.shards import Shards

    import torch  # isort: skip

    from bfm.training.config import TrainConfig
    from bfm.training.data import TrainingData
    from bfm.training.loop import Trainer

    try:
        # As it was called at the earlier commit.
        from bfm.training.plain import PlainFactory as EngineFactory  # type: ignore[import-not-found]
    except ImportError:
        from bfm.training.engine import EngineFactory

    torch.set_num_threads(threads)
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    data = TrainingData.of(Shards.open(shards_path))
    trainers: dict[str, Trainer] = {}

    def step(trainer: Trainer) -> None:
        trainer.run_trunk(trainer.counters.path_flops + trainer.next_step_flops())

    for name in map(str.strip, sys.stdin):
        if name not in trainers:
            config = TrainConfig(**{key: value for key, value in CONFIGS[name].items() if key in known})
            trainers[name] = Trainer(config, 0, data, EngineFactory(), micro_groups=config.groups_per_step)
            for _ in range(3):
                step(trainers[name])
        trainer = trainers[name]
        events, flops = trainer.counters.events, trainer.counters.path_flops
        begin_s, steps = time.perf_counter(), 0
        while time.perf_counter() - begin_s < seconds:
            step(trainer)
            steps += 1
        elapsed_s = time.perf_counter() - begin_s
        rates = {"events": trainer.counters.events - events, "flops": trainer.counters.path_flops - flops}
        print(json.dumps({**{key: n / elapsed_s for key, n in rates.items()}, "ms": 1e3 * elapsed_s / steps}))


class Tree:
    """A checkout with its shards and a process that trains in it."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.shards = root, folder / "shards"
        arguments = ["data", "prepare", "complete_journey", "--out", str(self.shards)]
        command = f"import sys, bfm.cli; sys.argv = ['bfm', *{arguments!r}]; bfm.cli.main()"
        subprocess.run([sys.executable, "-c", command], check=True, cwd=folder, env=self.env(2))

    def env(self, threads: int) -> dict[str, str]:
        """With this tree's bfm."""
        return {**os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": str(threads)}

    def start(self, threads: int, seconds: float) -> subprocess.Popen[str]:
        """A process that serves."""
        command = [sys.executable, __file__, "--serve", str(self.shards), str(threads), str(seconds)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return subprocess.Popen(command, text=True, bufsize=1, env=self.env(threads), **pipes)


def measure(trees: dict[str, Tree], name: str, threads: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Best and median events/s of each tree, and its FLOP/s and ms at the best."""
    processes = {tree: of.start(threads, seconds) for tree, of in trees.items()}
    answers: dict[str, list[dict[str, float]]] = {tree: [] for tree in trees}
    for _ in range(rounds):
        for tree, process in processes.items():
            assert process.stdin is not None
            assert process.stdout is not None
            print(name, file=process.stdin)
            answers[tree].append(json.loads(process.stdout.readline()))
    for process in processes.values():
        process.communicate()
    return {
        tree: {
            **max(given, key=lambda answer: answer["events"]),
            "median": statistics.median(answer["events"] for answer in given),
        }
        for tree, given in answers.items()
    }


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that keep a core busy each."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def beside_table(found: dict[tuple[str, int], dict[str, Any]], beside: dict[str, dict[str, Any]]) -> list[str]:
    """The markdown of what is left beside as many busy processes as cores."""
    lines = [
        "",
        f"Beside {os.cpu_count()} processes that keep the cores busy, {os.cpu_count()} threads given, medians:",
        "",
        "| configuration | idle, events/s | beside them | of idle |",
        "|---|---|---|---|",
    ]
    for name, answer in beside.items():
        idle, left = found[name, os.cpu_count() or 1]["now"]["median"], answer["now"]["median"]
        lines.append(f"| {name} | {idle:,.0f} | {left:,.0f} | {left / idle:.0%} |")
    return lines


def table(
    found: dict[tuple[str, int], dict[str, Any]],
    beside: dict[str, dict[str, Any]],
    peaks: dict[int, float],
    before: str,
) -> str:
    """The markdown."""
    lines = [
        f"# Training steps beside those of commit {before}",
        "",
        "Written by `python benchmarks/steps.py`: grocery baskets of the demo package, 2 groups of 2 windows of 512 "
        "events a step, processes taking turns, best (median) of the rounds. `as before`: the model of that commit, "
        "without a pointer, every event a query; `now`: the default, whose baskets share a query.",
        "",
        "| configuration | threads | before, events/s | now, events/s | faster by | ms a step | of matmul peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, threads), answer in found.items():
        old, new = answer["before"], answer["now"]
        lines.append(
            f"| {name} | {threads} | {old['events']:,.0f} ({old['median']:,.0f}) | {new['events']:,.0f} "
            f"({new['median']:,.0f}) | {new['events'] / old['events']:.2f} ({new['median'] / old['median']:.2f}) | "
            f"{old['ms']:.1f} -> {new['ms']:.1f} | {old['flops'] / peaks[threads]:.0%} -> "
            f"{new['flops'] / peaks[threads]:.0%} |"
        )
    peak_words = ", ".join(f"{peak / 1e9:.0f} GFLOP/s with {threads}" for threads, peak in peaks.items())
    lines += beside_table(found, beside)
    return "\n".join([*lines, "", f"Matmul peak (threads): {peak_words}.", "", machine("torch", "numpy"), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", default=BEFORE, metavar="COMMIT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a round, at least")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve[0], int(options.serve[1]), float(options.serve[2]))
        return
    import torch

    from bfm.model.matmul_peak import matmul_peak

    found, peaks = {}, {}
    with tempfile.TemporaryDirectory(prefix="bfm-steps-") as name:
        folder = Path(name)
        for tree in ("before", "now"):
            (folder / tree).mkdir()
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "-q", "--detach", str(folder / "tree"), options.before], check=True)
        try:
            trees = {"before": Tree(folder / "tree", folder / "before"), "now": Tree(ROOT, folder / "now")}
            for threads in map(int, options.threads.split(",")):
                torch.set_num_threads(threads)
                # Measured anew: it is kept once per process, whatever the threads.
                peaks[threads] = matmul_peak.__wrapped__()
                for config in CONFIGS:
                    found[config, threads] = measure(trees, config, threads, options.rounds, options.seconds)
                    print(config, threads, found[config, threads], file=sys.stderr)
            now, cores = {"now": trees["now"]}, os.cpu_count() or 1
            with busy(cores):
                names = [config for config in CONFIGS if config.endswith("now")]
                beside = {config: measure(now, config, cores, options.rounds, 2 * options.seconds) for config in names}
        finally:
            subprocess.run([*git, "remove", "--force", str(folder / "tree")], check=True)
    publish("steps", table(found, beside, peaks, options.before))


if __name__ == "__main__":
    main()
