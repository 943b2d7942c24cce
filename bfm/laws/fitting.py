"""Every law by its name: the one place where the command line, the report and the recipe choose a fit.

Enters: rows of a sweep's ledger, or Runs. Leaves: LawFits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from bfm.errors import UserError
from bfm.laws.agreement import fit_agreement
from bfm.laws.batch import fit_batch
from bfm.laws.frontier import Row
from bfm.laws.hull import fit_hull
from bfm.laws.isoflop import fit_isoflop
from bfm.laws.joint_law import axis_law, joint_law
from bfm.laws.result import LawFit
from bfm.laws.runs import Runs, from_rows
from bfm.laws.surface import fit_surface
from bfm.laws.targets import events_to_target

AXIS_OF_LAW: Mapping[str, str | None] = {
    "joint": None,
    "isoflop": "allocation",
    "surface": "allocation",
    "hull": "allocation",
    "share": "embedder_share",
    "batch": "batch",
    "negatives": "negatives",
    "agreement": None,
}
"""The axis that a sweep must measure for a law to be read off it; None: any."""
LAWS = tuple(AXIS_OF_LAW)


@dataclass(frozen=True)
class FitOptions:
    """What a user may choose; each law takes what concerns it."""

    curve: str = "valley"
    """isoflop: valley, quadratic or akima."""
    objective: str = "huber"
    """surface: huber or asym_mae."""
    delta: float = 1e-3
    """surface: where Huber's loss turns linear, in log loss."""
    reference_batch: float | None = None
    """batch: B_ref of the 20 % overhead; None: the law's own rule."""
    bootstrap: int = 0
    """surface: full bootstrap draws in place of the profile likelihood."""
    seed: int = 0


def fit_law(law: str, runs: Runs, options: FitOptions = FitOptions()) -> LawFit:
    """One law on runs. Raises UserError where the law is unknown, or the runs lack what it needs."""
    fits: dict[str, Callable[[], LawFit]] = {
        "isoflop": lambda: fit_isoflop(runs, curve=options.curve, seed=options.seed),
        "surface": lambda: fit_surface(
            runs, objective=options.objective, delta=options.delta, seed=options.seed, bootstrap=options.bootstrap
        ),
        "hull": lambda: fit_hull(runs, seed=options.seed),
        "joint": lambda: joint_law(runs),
        "share": lambda: axis_law(runs, "share"),
        "batch": lambda: fit_batch(runs, reference_batch=options.reference_batch),
        "negatives": lambda: axis_law(runs, "negatives"),
        "agreement": lambda: fit_agreement(runs),
    }
    if law not in fits:
        raise UserError(f"there is no law {law!r}", key="LAW", fix=f"one of {', '.join(LAWS)}")
    return fits[law]()


def runs_of_sweep(law: str, rows: Iterable[Row], metric: str, source: str) -> Runs:
    """What a law is fitted on: the rung rows, or of the batch law events to target from the probes."""
    if law == "batch":
        return events_to_target(from_rows(rows, metric, source=source, probes=True))
    return from_rows(rows, metric, source=source)


def fit_metrics(
    law: str, rows: Sequence[Row], metrics: Sequence[str], source: str, options: FitOptions = FitOptions()
) -> dict[str, LawFit | UserError]:
    """The same law per metric; where the runs cannot tell, the reason in its place."""
    found: dict[str, LawFit | UserError] = {}
    for metric in metrics:
        try:
            found[metric] = fit_law(law, runs_of_sweep(law, rows, metric, source), options)
        except UserError as error:
            found[metric] = error
    return found
