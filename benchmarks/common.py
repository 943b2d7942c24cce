"""What the benchmarks share: the machine in words, and where results go."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev

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
