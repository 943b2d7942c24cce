"""Everything that has to be known about one GPU, in at most nine minutes: `python benchmarks/gpu.py`.

    loss         8,192 queries x K = 2,097,152 x 256: each way to compute it, its speed, memory and errors
    training     model FLOP/s at N = 1e5, 1e6, 1e7, 1e8, and of stage 2 with drawn negatives
    resume       a run that is cut against one that is not, bit for bit
    precision    200 steps in bfloat16 against float32
    evaluation   1e5 queries x 1e7 items
    deepspeed    ZeRO with one worker against the plain engine

Needs torch and numpy (Python 3.11 or later), for the kernel triton, for training pyarrow; what needs what is not there
is skipped by name.
Every part runs in a process of its own with a limit of its own; what the nine minutes do not reach is named. MFU and
shares are of the bfloat16 matmul peak that the same process measures. Writes gpu.json and gpu.md into --out
(benchmarks/results). `--tiny --device cpu` checks the script in seconds and measures nothing; `--only loss` takes the
parts whose names begin so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import gpu_scores  # noqa: E402

TOTAL_S = 515.0
Figures = Iterator[tuple[str, object]]


@dataclass(frozen=True)
class Setting:
    """Where and how large."""

    device: str
    tiny: bool
    shards: Path


@dataclass(frozen=True)
class Part:
    """Measures some figures; `goals` are the least (True) or most (False) that some should be."""

    measure: Callable[[Setting], Figures]
    limit_s: float
    goals: dict[str, tuple[float, bool]]


def training() -> ModuleType:
    """Imported late: it needs more than torch, and the other parts do not."""
    from benchmarks import gpu_training

    return gpu_training


def loss_part(way: str, limit_s: float = 45.0) -> Part:
    def measure(setting: Setting) -> Figures:
        queries, candidates, width = (64, 512, 32) if setting.tiny else (8192, 1 << 21, 256)
        return gpu_scores.measure_loss(way, queries, candidates, width, setting.device)

    goals = {f"largest error of a loss at scale {scale:g}, nats": (2e-3, False) for scale in gpu_scores.SCALES}
    if "trained" not in way:
        # The gradient of a trained table is as large as the table.
        goals["extra peak over that at K / 4"] = (1.1, False)
    return Part(measure, limit_s, {"share of the matmul peak": (0.6, True), **goals})


def training_part(params: float, goal: float | None = None, negatives: int = 0) -> Part:
    def measure(setting: Setting) -> Figures:
        size, drawn = (2e3, min(negatives, 64)) if setting.tiny else (params, negatives)
        return training().measure_speed(setting.shards, setting.device, setting.tiny, size, drawn)

    return Part(measure, 60.0, {} if goal is None else {"MFU": (goal, True)})


def check_part(check: str, limit_s: float, goals: dict[str, tuple[float, bool]]) -> Part:
    """One of gpu_training's functions."""
    return Part(
        lambda setting: getattr(training(), check)(setting.shards, setting.device, setting.tiny), limit_s, goals
    )


# The most wanted first.
PARTS: dict[str, Part] = {
    "loss: triton": loss_part("triton"),
    "loss: one_pass": loss_part("one_pass"),
    "loss: two_pass": loss_part("two_pass"),
    "training: N = 1e8": training_part(1e8, 0.4),
    "training: N = 1e6": training_part(1e6, 0.1),
    "training: N = 1e7": training_part(1e7),
    "training: N = 1e5": training_part(1e5),
    "training: N = 1e7, stage 2, K = 65,536": training_part(1e7, negatives=1 << 16),
    "resume": check_part("check_resume", 60.0, {f"stage {stage} resumes bit for bit": (1.0, True) for stage in (1, 2)}),
    "precision": check_part(
        "compare_precisions", 90.0, {"mean loss of the last quarter, difference in nats": (0.01, False)}
    ),
    "evaluation": Part(
        lambda setting: gpu_scores.measure_evaluation(setting.device, setting.tiny),
        90.0,
        {"ranks that differ from float64, of 64": (0.0, False)},
    ),
    "loss: flex_attention": loss_part("flex_attention", 60.0),
    "loss: SDPA flash": loss_part("SDPA flash"),
    "loss: SDPA cuDNN": loss_part("SDPA cuDNN"),
    "loss: two_pass, trained table": loss_part("two_pass, trained table"),
    "deepspeed": check_part("compare_deepspeed", 60.0, {}),
    "loss: triton, best tile": loss_part("triton, best tile", 90.0),
}


def run_part(name: str, setting: Setting) -> dict[str, Any]:
    """A part's figures, in this process; where it cannot run, why."""
    try:
        return {"part": name, "figures": dict(PARTS[name].measure(setting))}
    except Exception as error:
        # Whatever it is, the other parts count, and each library has its own class for what it cannot do.
        return {"part": name, "skipped": (f"{type(error).__name__}: {error}".splitlines() or ["?"])[0][:160]}


def run_apart(name: str, setting: Setting, limit_s: float) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--part", name, "--shards", str(setting.shards), "--device", setting.device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"part": name, "skipped": f"no result within {limit_s:.0f} s"}
    if done.returncode:
        return {"part": name, "skipped": (done.stderr.strip().splitlines() or ["died without a word"])[-1][:160]}
    return json.loads(done.stdout.splitlines()[-1])


def run_all(names: list[str], setting: Setting) -> list[dict[str, Any]]:
    """Every part, until the time is out; tiny ones stay in this process."""
    deadline_s, found = time.monotonic() + TOTAL_S, []
    for name in names:
        begin_s = time.monotonic()
        left_s = deadline_s - begin_s
        if setting.tiny:
            result = run_part(name, setting)
        elif left_s < 15.0:
            result = {"part": name, "skipped": "the time was out"}
        else:
            result = run_apart(name, setting, min(PARTS[name].limit_s, left_s))
        found.append({**result, "seconds": round(time.monotonic() - begin_s, 1)})
        print(json.dumps(found[-1]), flush=True)
    return found


def shown(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def met(value: object, least: float, at_least: bool) -> bool:
    number = float(value)  # type: ignore[arg-type]
    return number >= least if at_least else abs(number) <= least


def table(results: list[dict[str, Any]], place: str) -> str:
    """One line per figure."""
    lines = [
        "# One GPU",
        "",
        "Written by `python benchmarks/gpu.py`; what each part does stands at its top.",
        "",
        "| part | figure | value | goal | met |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        if "skipped" in result:
            lines.append(f"| {result['part']} | skipped: {result['skipped']} | | | |")
        goals = PARTS[result["part"]].goals
        for name, value in result.get("figures", {}).items():
            goal = ""
            if name in goals:
                least, at_least = goals[name]
                goal = f"{'>=' if at_least else '<='} {least:g} | {'yes' if met(value, least, at_least) else 'no'}"
            lines.append(f"| {result['part']} | {name} | {shown(value)} | {goal or '|'} |")
    return "\n".join([*lines, "", place, ""])


def describe(device: str) -> str:
    """The machine and what it runs."""
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    packages = {package.metadata["Name"] for package in metadata.distributions()}
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("torch", "triton", "deepspeed") if name in packages
    )
    return f"{card}; load average {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, {versions}."


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where the results go")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes: checks the script")
    parser.add_argument("--only", default="", help="the parts whose names begin so")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu: there is no CUDA device; --tiny --device cpu checks the script without one")
    if options.part:
        print(json.dumps(run_part(options.part, Setting(options.device, False, options.shards))))
        return
    begin_s, names = time.monotonic(), [name for name in PARTS if name.startswith(options.only)]
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(options.device, options.tiny, Path(folder) / "shards")
        setting.shards.mkdir()
        # Parts that need the log say themselves what is not there.
        with suppress(ImportError):
            training().write_log(setting.shards, *((300, 20, 500) if options.tiny else (20_000, 100, 200_000)))
        results = run_all(names, setting)
    place, text = describe(options.device), table(results, describe(options.device))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.md").write_text(text)
    facts = {"place": place, "seconds": round(time.monotonic() - begin_s, 1), "parts": results}
    (options.out / "gpu.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
