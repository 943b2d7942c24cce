"""bfm: scaling laws of behavioral foundation models, from event log to recipe (arXiv 2606.05257 and beyond)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from bfm.version import __version__

if TYPE_CHECKING:
    from bfm.doors.opened import OpenedSweep

__all__ = ["__version__", "open_sweep"]

# Numpy's matrices are small here: further threads of its BLAS wait for each other, by spinning, and beside other work
# decisions take many times as long. It reads this when it is first imported; torch has threads of its own.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Threads of a training step wait for each other by spinning, which beside other work holds the core that others need: a
# tenth of the usual turns, then they sleep. torch's OpenMP reads this when torch is first imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")


def open_sweep(location: str) -> OpenedSweep:
    """The sweep or study in a folder or URI, for notebooks: `.rows()`, `.table()`, `.frontier(metric)`, `.laws()`.

    Raises UserError where there is none, CorruptError where a ledger is damaged.
    """
    from bfm.doors.opened import OpenedSweep

    return OpenedSweep.at(location)
