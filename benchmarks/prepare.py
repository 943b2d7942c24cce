"""`data prepare` against a plain pandas script on the same log, and its memory and speed while a synthetic log grows.

    python benchmarks/prepare.py [--rounds 3] [--events 1e6,1e7] [--cpus 2]

The pandas script reads, cleans and sorts the same events in one process and writes them as arrays, with no quarantine,
fitted fields, protocol or checksums. Every round starts a Ray session and times the first preparation there, the next
one, and the script. Writes benchmarks/results/prepare.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from common import cpu_name

from bfm.events.log_files import find_logs
from bfm.events.schema import load_schema
from ray_jobs.cluster_session import local_ray
from ray_jobs.prepare import prepare_shards

NAMES = ("pandas script, one process", "data prepare, first on a fresh Ray", "data prepare, Ray workers warm")
RESULTS = Path(__file__).parent / "results" / "prepare.md"
PANDAS_SCRIPT = """
import sys
import time
import numpy as np
import pandas as pd
import pyarrow.parquet

begin_s = time.perf_counter()
log, out = sys.argv[1:]
context = ["quantity", "sales_value", "retail_disc", "coupon_disc", "store_id"]
columns = ["household_id", "transaction_timestamp", "product_id", *context]
frame = pd.read_parquet(log, columns=columns)
frame = frame.dropna(subset=columns[:3])
for name in context[:-1]:
    frame[name] = pd.to_numeric(frame[name], errors="coerce").replace([np.inf, -np.inf], np.nan)
frame["time"] = frame["transaction_timestamp"].astype("int64")
frame["user"] = pd.util.hash_array(frame["household_id"].astype(str).to_numpy())
frame["row"] = pd.util.hash_pandas_object(frame.drop(columns="user"), index=False)
frame = frame.sort_values(["user", "time", "row"])
item, keys = pd.factorize(frame["product_id"])
np.save(out + "/item.npy", item)
np.save(out + "/time.npy", frame["time"].to_numpy())
for name in context:
    np.save(out + f"/{name}.npy", frame[name].to_numpy())
print(time.perf_counter() - begin_s)
"""


@dataclass
class Usage:
    """Of one piece of work: seconds, processors' seconds, the largest private memory of one process and of all."""

    elapsed_s: float = 0.0
    cpu_s: float = 0.0
    """Of processes that outlive the work: of Ray, all that it needed."""
    largest_mb: float = 0.0
    together_mb: float = 0.0


class Watch:
    """Samples this process and all its descendants."""

    def __enter__(self) -> Watch:
        self.usage, self._done, self._start = Usage(cpu_s=-self._cpu_s()), threading.Event(), time.perf_counter()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.usage.elapsed_s = time.perf_counter() - self._start
        self.usage.cpu_s += self._cpu_s()
        self._done.set()
        self._thread.join()

    def _cpu_s(self) -> float:
        total_s = 0.0
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                total_s += sum(process.cpu_times()[:2])
        return total_s

    def _processes(self) -> list[psutil.Process]:
        return [psutil.Process(), *psutil.Process().children(recursive=True)]

    def _sample(self) -> None:
        while not self._done.wait(0.2):
            private = [0.0]
            for process in self._processes():
                with suppress(psutil.NoSuchProcess):
                    memory = process.memory_info()
                    # Mapped files and Ray's object store are shared memory: counted for no process.
                    private.append((memory.rss - memory.shared) / 2**20)
            self.usage.largest_mb = max(self.usage.largest_mb, *private)
            self.usage.together_mb = max(self.usage.together_mb, sum(private))


def run_pandas(log: str, folder: Path) -> Usage:
    folder.mkdir()
    with Watch() as watch:
        command = [sys.executable, "-c", PANDAS_SCRIPT, log, str(folder)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    # Without its imports: those of `data prepare` are there before it begins.
    watch.usage.elapsed_s = float(done.stdout)
    return watch.usage


def run_prepare(schema: str, logs: list[str], out: Path) -> tuple[Usage, int]:
    with Watch() as watch:
        manifest = prepare_shards(schema, logs, str(out))
    return watch.usage, manifest.events


def synthetic_log(folder: Path, events: int) -> Path:
    """Write a log of so many events by another process, whose memory is not to be counted."""
    path = folder / f"synthetic-{events}"
    arguments = f"Path({str(path)!r}), events={events}, users={events // 50}, items=20_000"
    code = f"from pathlib import Path; from bfm.synth.log import write_synthetic; write_synthetic({arguments})"
    subprocess.run([sys.executable, "-c", code], check=True)
    return path


def machine() -> str:
    memory_gb = psutil.virtual_memory().total / 2**30
    return f"{cpu_name()}, {os.cpu_count()} cores, {memory_gb:.0f} GB, {platform.system()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--events", default="1e6,1e7", help="of the synthetic logs")
    parser.add_argument("--cpus", type=int, default=2)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="prepare-benchmark-"))
    try:
        lines = [
            "# `data prepare`: speed and memory",
            "",
            f"{machine()}; {options.cpus} Ray CPUs; load average before: {os.getloadavg()[0]:.1f}",
            "",
            *against_pandas(folder, options.rounds, options.cpus),
            "",
            *growing(folder, [int(float(number)) for number in options.events.split(",")], options.cpus),
        ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def against_pandas(folder: Path, rounds: int, cpus: int) -> list[str]:
    (log,) = find_logs(load_schema("complete_journey"), []).paths
    found: dict[str, list[Usage]] = {name: [] for name in NAMES}
    for number in range(rounds):
        with local_ray(cpus):
            for name in NAMES[1:]:
                usage, events = run_prepare("complete_journey", [], folder / "out")
                found[name].append(usage)
                shutil.rmtree(folder / "out")
        found[NAMES[0]].append(run_pandas(log, folder / f"pandas-{number}"))
    rows = [
        f"The Complete Journey, {events:,} events; the quickest of {rounds} rounds (all of them):",
        "",
        "| | seconds | events/s | pandas / time | largest process, MB |",
        "|---|---|---|---|---|",
    ]
    best = {name: min(usage.elapsed_s for usage in usages) for name, usages in found.items()}
    for name, usages in found.items():
        every = ", ".join(f"{usage.elapsed_s:.1f}" for usage in usages)
        largest_mb = max(usage.largest_mb for usage in usages)
        ratio = best[NAMES[0]] / best[name]
        rows.append(
            f"| {name} | {best[name]:.1f} ({every}) | {events / best[name]:,.0f} | {ratio:.2f} | {largest_mb:.0f} |"
        )
    return rows


def growing(folder: Path, sizes: list[int], cpus: int) -> list[str]:
    rows = [
        "Synthetic logs, Ray workers warm (private memory; pages of files apart, which the system takes back):",
        "",
        "| events | seconds | events/s | CPU seconds per million | load after | largest process, MB | all, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    with local_ray(cpus):
        run_prepare("complete_journey", [], folder / "warm")
        for size in sizes:
            source = synthetic_log(folder, size)
            usage, events = run_prepare(str(source / "schema.yaml"), [str(source / "events")], folder / "out")
            shutil.rmtree(folder / "out")
            shutil.rmtree(source)
            rows.append(
                f"| {events:,} | {usage.elapsed_s:.1f} | {events / usage.elapsed_s:,.0f} "
                f"| {usage.cpu_s / events * 1e6:.2f} | {os.getloadavg()[1]:.1f} | {usage.largest_mb:.0f} "
                f"| {usage.together_mb:.0f} |"
            )
    return rows


if __name__ == "__main__":
    main()
