"""Seconds from a task's assignment to its first optimizer step: reused Tune actors against the plain nested pattern.

The nested pattern is what Ray's documentation shows for tuning a distributed trainer: a Tune function that starts a
TorchTrainer, here with one worker. All train the same rung task of a toy log, in one Ray session, one after the other.
Run with `python benchmarks/trial_start.py`; writes benchmarks/results/trial_start.md.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import ray.train  # noqa: E402
from common import cpu_name  # noqa: E402
from ray import tune  # noqa: E402
from ray.train.torch import TorchTrainer  # noqa: E402
from ray.tune.search import Searcher  # noqa: E402

from bfm.files import Store  # noqa: E402
from bfm.sweep.ledger.task import Finished, Task, Wait  # noqa: E402
from bfm.training.config import TrainConfig  # noqa: E402
from ray_jobs.room import ClusterRoom  # noqa: E402
from ray_jobs.trial import Workplace  # noqa: E402
from ray_jobs.tuning import quiet_session, run_tasks  # noqa: E402
from tests.helpers import make_shards  # noqa: E402
from tests.ray_jobs.fakes import make_desk  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "trial_start.md"
CONFIG = TrainConfig(params=3000.0, embedder_share=0.1, window=8, group_windows=2, d_item=8, groups_per_step=2)
RUNG_FLOPS = 100_000_000
SINGLE = {"engine": "plain", "workers": 1, "zero_stage": 0, "cpus": 0.5, "gpus": 0.0, "micro_groups": 1}
PAIR = {**SINGLE, "engine": "deepspeed", "workers": 2, "zero_stage": 1}
WARM_TASKS, WARM_PAIRS, NESTED = 8, 6, 4


def make_task(scaling: dict[str, Any]) -> Task:
    name = uuid.uuid4().hex[:8]
    return Task(
        task_id=f"{name}-r0-a0",
        trial=name,
        rung=0,
        rung_flops=RUNG_FLOPS,
        config=CONFIG.as_dict(),
        seed=0,
        resume_from=None,
        from_rung=None,
        reserved_flops=RUNG_FLOPS,
        scaling=scaling,
    )


class ListDriver:
    """Hands out a list of tasks, one at a time, and keeps their rows."""

    def __init__(self, tasks: list[Task]) -> None:
        self.tasks = tasks
        self.open = 0
        self.rows: list[dict[str, Any]] = []

    def next_task(self, fits: Callable[[Task, int], bool]) -> Task | Wait | Finished:
        if self.open:
            return Wait("one at a time")
        if not self.tasks:
            return Finished("all done")
        self.open += 1
        return self.tasks.pop(0)

    def report(self, task_id: str, row: dict[str, Any]) -> bool:
        self.open -= 1
        self.rows.append(row)
        return True

    def growable(self, left_s: dict[str, float]) -> list[tuple[Task, list[Task]]]:
        return []

    def lost(self, task_id: str, reason: str, **how: Any) -> bool:
        raise RuntimeError(f"task {task_id} was lost: {reason}")


def measure_reused(workplace: Workplace) -> list[list[float]]:
    """Cold and warm starts, of one worker and then of two, in seconds."""
    tasks = [make_task(SINGLE) for _ in range(1 + WARM_TASKS)] + [make_task(PAIR) for _ in range(1 + WARM_PAIRS)]
    driver = ListDriver(tasks)
    run_tasks(make_desk(driver, 1, room=ClusterRoom(grows=False)), workplace)
    starts = [row["warm_start_s"] for row in driver.rows]
    single, pair = starts[: 1 + WARM_TASKS], starts[1 + WARM_TASKS :]
    return [single[:1], single[1:], pair[:1], pair[1:]]


class OneByOne(Searcher):
    """A new trial when the last one has ended; notes when it was assigned."""

    def __init__(self, num_trials: int) -> None:
        super().__init__()
        self.left, self.busy = num_trials, False

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.busy:
            return None
        if not self.left:
            return Searcher.FINISHED
        self.left, self.busy = self.left - 1, True
        return {"assigned_at_s": time.time(), "task": make_task(SINGLE).as_dict()}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self.busy = False

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_text("")

    def restore(self, checkpoint_path: str) -> None:
        raise RuntimeError("not used")


def measure_nested(workplace: Workplace, folder: Path) -> list[float]:
    """Starts of a Tune function that starts a one-worker TorchTrainer, in seconds."""
    answers = folder / "nested"
    answers.mkdir()
    tune.Tuner(
        tune.with_resources(nested_trial(workplace, str(answers), str(folder)), {"CPU": 0.5}),
        tune_config=tune.TuneConfig(search_alg=OneByOne(NESTED), num_samples=-1),
        run_config=tune.RunConfig(name="nested", storage_path=str(folder / "tune"), verbose=0),
    ).fit()
    rows = [json.loads(file.read_text()) for file in sorted(answers.iterdir(), key=lambda file: file.stat().st_mtime)]
    assert len(rows) == NESTED, "a nested trial failed"
    return [row["warm_start_s"] for row in rows]


def nested_trial(workplace: Workplace, answers: str, folder: str) -> Callable[[dict[str, Any]], None]:
    def train_loop(config: dict[str, Any]) -> None:
        row = workplace(config["task"], config["assigned_at_s"])
        (Path(answers) / config["task"]["trial"]).write_text(json.dumps(row))

    def trial(config: dict[str, Any]) -> None:
        TorchTrainer(
            train_loop,
            train_loop_config=config,
            scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5}),
            run_config=ray.train.RunConfig(name=config["task"]["trial"], storage_path=f"{folder}/train"),
        ).fit()

    return trial


def table(reused: list[list[float]], nested: list[float], load: tuple[float, ...]) -> str:
    def line(name: str, values: list[float]) -> str:
        return f"| {name} | {len(values)} | {statistics.median(values):.3g} | {min(values):.3g} | {max(values):.3g} |"

    later, (cold, warm, pair_cold, pair_warm) = nested[1:], reused
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "deepspeed"))
    return "\n".join(
        [
            "# Seconds from assignment to the first optimizer step",
            "",
            "Written by `python benchmarks/trial_start.py`: the same rung task, one Ray session, one after the other.",
            "",
            "| pattern | starts | median | least | most |",
            "|---|---|---|---|---|",
            line("reused actor, warm", warm),
            line("reused actor, its first task (cold)", cold),
            line("Tune function that starts a 1-worker TorchTrainer, later trials", later),
            line("Tune function that starts a 1-worker TorchTrainer, first trial", nested[:1]),
            line("2-worker DeepSpeed group from a reused actor, its first task", pair_cold),
            line("the same group, later tasks", pair_warm),
            "",
            f"Nested over warm, medians: **{statistics.median(later) / statistics.median(warm):.0f} x**.",
            "",
            f"Machine: {os.cpu_count()} cores, {cpu_name()}; load average before and after "
            f"{load[0]:.1f} and {load[1]:.1f}; Python {platform.python_version()}, {versions}.",
            "",
        ]
    )


def main() -> None:
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bfm-start-") as name, quiet_session(num_cpus=2):
        folder = Path(name)
        shards = make_shards(folder / "shards", queries=50)
        # What every worker looks for before it trains.
        Store(folder / "sweep").put("sweep.yaml", b"")
        workplace = Workplace(str(shards.path), str(folder / "sweep"), ("nll",))
        reused = measure_reused(workplace)
        nested = measure_nested(workplace, folder)
    text = table(reused, nested, (before, os.getloadavg()[0]))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
