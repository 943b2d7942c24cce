"""Whether more threads want to run here than there are cores: training beside other work loses more than its share.

Enters: the kernel's load average; in a container with a quota of the cores, how long its threads wait. Leaves: a
clause. Both sides of the first are the whole machine's, in a container too; a quota that is used up shows in the
container's own pressure alone.
"""

from __future__ import annotations

import os
from pathlib import Path

from bfm.sweep.plan.machine import CGROUP, quota_cores, read_kernel

CROWDED = 1.25
"""Threads per core, over a minute; less is chance."""
WAITED = 0.5
"""Share of a minute in which a thread of a container with a quota waits."""


def crowding(cgroup: Path = CGROUP) -> str:
    """What to say beside a rate that others have a part in; empty where there is room."""
    cores = os.cpu_count() or 1
    quota, waited = quota_cores(cgroup), _waited(cgroup)
    if quota is not None and quota < cores and waited is not None:
        return f"crowded: threads wait {waited:.0%} of the time for {quota:g} cores" if waited > WAITED else ""
    threads = os.getloadavg()[0]
    return f"crowded: {threads:.1f} threads for {cores} cores" if threads > CROWDED * cores else ""


def _waited(cgroup: Path) -> float | None:
    """Over the last minute; None where the kernel does not count it."""
    some = read_kernel(cgroup / "cpu.pressure").partition("avg60=")[2].split()
    return float(some[0]) / 100 if some else None
