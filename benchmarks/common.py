"""What the benchmarks share: the machine in words, and where results go."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

from bfm.model.flops import FLOPS_VERSION

Key = tuple[str | float, ...]
Job = TypeVar("Job")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def cpu_name() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def machine(*packages: str) -> str:
    """One line: cores, processor, load average, versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"Machine: {os.cpu_count()} cores, {cpu_name()}; load average at the end {os.getloadavg()[0]:.1f}; "
        f"Python {platform.python_version()}, {versions}."
    )


def publish(name: str, text: str) -> None:
    """Print a result and write it as benchmarks/results/<name>.md."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


def spread(values: list[float]) -> str:
    """Mean of the seeds, and their standard deviation where there are several."""
    deviation = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):.4f}{deviation}"


def kept_rows(name: str) -> dict[Key, dict[str, Any]]:
    """Rows of benchmarks/results/<name>.jsonl by key; those of another version of the objective are left out."""
    kept = RESULTS / f"{name}.jsonl"
    known = map(json.loads, kept.read_text().splitlines() if kept.exists() else [])
    return {tuple(row["key"]): row for row in known if row["flops_version"] == FLOPS_VERSION}


def make_rows(
    name: str, jobs: Mapping[Key, Job], run: Callable[[Job], dict[str, Any]], processes: int, metrics: Sequence[str]
) -> dict[Key, dict[str, Any]]:
    """Rows by key, each made by `run` in a process of its own and kept in benchmarks/results/<name>.jsonl.

    A study that was cut off goes on; rows of another version of the objective are made again. `metrics` are printed.
    """
    RESULTS.mkdir(exist_ok=True)
    rows = kept_rows(name)
    missing = [(key, job) for key, job in jobs.items() if key not in rows]
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(processes, len(missing) or 1), maxtasksperchild=1) as pool:
        for key, row in pool.imap_unordered(functools.partial(_keyed, run), missing):
            rows[key] = {"key": key, "flops_version": FLOPS_VERSION, **row}
            with (RESULTS / f"{name}.jsonl").open("a") as file:
                file.write(json.dumps(rows[key]) + "\n")
            print(*key, {metric: round(row["metrics"].get(metric, float("nan")), 4) for metric in metrics}, flush=True)
    return {key: rows[key] for key in jobs}


def _keyed(run: Callable[[Job], dict[str, Any]], job: tuple[Key, Job]) -> tuple[Key, dict[str, Any]]:
    return job[0], run(job[1])
