"""`bfm doctor`: what this machine can do and what is missing, before a sweep finds out."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from bfm.model.matmul_peak import matmul_peak
from bfm.sweep.plan.crowding import crowding
from bfm.sweep.plan.machine import Machine
from bfm.units import GIB, format_flops

REQUIRED = ("torch", "ray", "deepspeed", "pyarrow", "optuna", "tensorboard")
# ray[default]: without it jobs cannot be submitted and a stopped trial's resources are never freed.
DASHBOARD_MODULES = ("aiohttp", "opencensus", "prometheus_client")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's answer."""

    name: str
    value: str
    ok: bool
    advice: str = ""

    def as_dict(self) -> dict[str, object]:
        """JSON-able form."""
        return asdict(self)


def examine(storage: Path) -> list[Finding]:
    """Versions, cores and who wants them, memory, accelerator, disk at `storage` and the matmul peak (about 2 s)."""
    findings = [Finding("python", platform.python_version(), True)]
    findings += [_package(name) for name in REQUIRED]
    missing = [name for name in DASHBOARD_MODULES if importlib.util.find_spec(name) is None]
    findings.append(
        Finding(
            "ray dashboard",
            f"missing {', '.join(missing)}" if missing else "installed",
            not missing,
            "pip install 'ray[default]'" if missing else "",
        )
    )
    memory_bytes = psutil.virtual_memory().available
    # Other work is no fault of the machine.
    findings.append(Finding("cores", "; ".join(filter(None, (f"{Machine.here().cores:g}", crowding()))), True))
    findings.append(Finding("free memory", f"{memory_bytes / GIB:.1f} GiB", memory_bytes > 2 * GIB, "2 GiB are needed"))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    findings.append(Finding("gpu", gpu, True))
    existing = next(folder for folder in (storage, *storage.parents) if folder.exists())
    free_bytes = shutil.disk_usage(existing).free
    findings.append(Finding("free disk", f"{free_bytes / GIB:.1f} GiB at {existing}", free_bytes > GIB, "free 1 GiB"))
    findings.append(Finding("matmul peak", f"{format_flops(matmul_peak())} FLOP/s", True))
    return findings


def _package(name: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name), True)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", False, f"pip install {name}")
