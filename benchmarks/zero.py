"""A step of two ZeRO workers beside a plain step of as many micro-batches, and what the difference is made of.

    python benchmarks/zero.py [--rounds 7] [--steps 10]

Every process runs `bfm.training.rung.run_rung`, the path of a sweep, with one thread, and stops after every few steps
for the others' turn; least and median of the turns. Beside two workers with m micro-batches each:
`plain` takes all 2 m in one process; `twins` are two plain processes at once with m each, so the same work without a
word between them: what the hardware allows; `alone` is ZeRO with one worker and 2 m: DeepSpeed's own part.
Writes benchmarks/results/zero.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, machine, publish
from steps import SIZES, Tree

ENDLESS_FLOPS = 1e18
CELLS = [(size, 1) for size in SIZES] + [("N = 5e4", 4)]
STAGE = 1
WAYS = {"plain": (1, 2), "twins": (2, 1), "alone": (1, 2), "zero": (2, 2)}
"""Processes of each, and the micro-batches of its step as multiples of m."""
MESSAGES = 200


def serve(way: str, rank: int, meeting: str, task: dict[str, Any], shards_path: str, steps: int) -> None:
    """Train; rank 0 answers every line with the ms of a step and messages between workers in it."""
    from bfm.events.shards import Shards

    import torch  # isort: skip
    import torch.distributed as dist

    from bfm.files import Store
    from bfm.training.engine import EngineFactory
    from bfm.training.rung import run_rung
    from bfm.training.task import RungTask

    torch.set_num_threads(1)
    factory = EngineFactory()
    if way in ("alone", "zero"):
        from bfm.training.zero import ZeroFactory

        workers = WAYS[way][0]
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers)
        factory = ZeroFactory(STAGE, torch.device("cpu"))
    message_ms, count = _message_ms() if way == "zero" else 0.0, _count_messages() if way == "zero" else [0]
    seen, begin_s = 0, 0.0

    def observe(record: Any) -> None:
        nonlocal seen, begin_s
        if seen % steps == 0:
            if seen:
                ms = 1e3 * (time.perf_counter() - begin_s) / steps
                told = {"ms": ms, "messages": count[0] / steps, "message_ms": message_ms}
                print(json.dumps(told), flush=True)
            if not sys.stdin.readline():
                # Whoever waits for this one is ended by the parent.
                os._exit(0)
            begin_s, count[0] = time.perf_counter(), 0
        seen += 1

    with tempfile.TemporaryDirectory() as folder:
        own = Store(folder if rank else meeting + "-store")
        run_rung(RungTask.from_task(task), Shards.open(shards_path), factory, own, observe)


def _message_ms() -> float:
    """A sum of one number over the workers, alone: the least of several runs."""
    import torch
    import torch.distributed as dist

    value, runs = torch.zeros(1), []
    for _ in range(5):
        begin_s = time.perf_counter()
        for _ in range(MESSAGES):
            dist.all_reduce(value)
        runs.append(1e3 * (time.perf_counter() - begin_s) / MESSAGES)
    return min(runs)


def _count_messages() -> list[int]:
    """A counter of collective operations from here on, whoever calls for them."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    count = [0]

    def counting(original: Any) -> Any:
        def counted(*arguments: Any, **more: Any) -> Any:
            count[0] += 1
            return original(*arguments, **more)

        return counted

    for name in ("all_reduce", "all_gather_into_tensor", "all_gather", "reduce", "reduce_scatter_tensor", "broadcast"):
        for module in (dist, c10d):
            setattr(module, name, counting(getattr(module, name)))
    return count


class Side:
    """The processes of one way to train a step."""

    def __init__(self, way: str, size: str, micro_batches: int, tree: Tree, folder: Path, steps: int) -> None:
        processes, times = WAYS[way]
        config = {**SIZES[size], "groups_per_step": times * micro_batches}
        task = {"task_id": way, "trial": way, "rung": 0, "rung_flops": ENDLESS_FLOPS, "config": config, "seed": 0}
        meeting = str(folder / f"{way}-{micro_batches}-{len(list(folder.iterdir()))}")
        command = [sys.executable, __file__, "--steps", str(steps), "--serve", way]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.processes = [
            subprocess.Popen(
                [*command, str(rank if way == "zero" else 0), f"{meeting}{rank if way == 'twins' else ''}"]
                + [json.dumps(task), str(tree.shards)],
                text=True,
                bufsize=1,
                env=tree.env(1),
                **pipes,
            )
            for rank in range(processes)
        ]
        self.speakers = self.processes if way == "twins" else self.processes[:1]
        self.turns: list[dict[str, float]] = []

    def turn(self) -> None:
        """Some steps; of two that do not wait for each other, the slower one."""
        for process in self.speakers:
            assert process.stdin is not None
            print("on", file=process.stdin)
        answers = [json.loads(process.stdout.readline()) for process in self.speakers if process.stdout is not None]
        self.turns.append(max(answers, key=lambda answer: answer["ms"]))

    def end(self) -> None:
        """Of its processes."""
        for process in self.processes:
            process.kill()
            process.communicate()

    @property
    def least_ms(self) -> float:
        """Of a step, over the turns but the first."""
        return min(turn["ms"] for turn in self.turns[1:])

    @property
    def median_ms(self) -> float:
        """The same in the middle."""
        return statistics.median(turn["ms"] for turn in self.turns[1:])


def measure(size: str, micro_batches: int, tree: Tree, folder: Path, rounds: int, steps: int) -> str:
    """A line of the table; all ways take turns."""
    sides = {way: Side(way, size, micro_batches, tree, folder, steps) for way in WAYS}
    try:
        for _ in range(rounds + 1):
            for side in sides.values():
                side.turn()
    finally:
        for side in sides.values():
            side.end()
    ms = {way: side.least_ms for way, side in sides.items()}
    zero = sides["zero"]
    words = [f"{side.least_ms:.1f} ({side.median_ms:.1f})" for side in sides.values()]
    messages, message_ms = zero.turns[-1]["messages"], zero.turns[-1]["message_ms"]
    ratios = [f"**{ms['zero'] / ms['plain']:.2f}**", f"{ms['zero'] / ms['twins']:.2f}"]
    ratios += [f"{ms['twins'] / ms['plain']:.2f}", f"{ms['alone'] / ms['plain']:.2f}"]
    cells = [size, str(micro_batches), *words, *ratios, f"{messages:.0f} x {message_ms:.2f} ms"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--serve", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        way, rank, meeting, task, shards = options.serve
        serve(way, int(rank), meeting, json.loads(task), shards, options.steps)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tree = Tree(ROOT, folder)
        lines = [measure(*cell, tree, folder, options.rounds, options.steps) for cell in CELLS]
    titles = ["configuration", "m", "plain, 2 m, ms", "twins, m each", "alone, 2 m", "zero, m each", "zero / plain"]
    titles += ["zero / twins", "twins / plain", "alone / plain", "messages a step x one alone"]
    text = [
        "# A step of two ZeRO workers beside plain ones",
        "",
        f"Written by `python benchmarks/zero.py`: ZeRO {STAGE} on gloo, one thread a process, grocery baskets of the "
        f"demo package, a group a micro-batch; least (median) of {options.rounds} turns of {options.steps} steps. "
        "`plain`: one process with all micro-batches; `twins`: two plain processes at once that share no word; "
        "`alone`: ZeRO with one worker.",
        "",
        f"| {' | '.join(titles)} |",
        "|---" * len(titles) + "|",
        *lines,
        "",
        machine("torch", "deepspeed"),
        "",
    ]
    publish("zero", "\n".join(text))


if __name__ == "__main__":
    main()
