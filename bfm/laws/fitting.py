"""Every law by its name: the one place where the command line, the report and the recipe choose a fit.

Enters: rows of a sweep's ledger, or Runs. Leaves: LawFits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

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


@dataclass(frozen=True)
class Law:
    """What a name of a law stands for."""

    fit: Callable[..., LawFit]
    axis: str | None = None
    """What a sweep must measure for the law to be read off it; None: anything."""
    options: tuple[str, ...] = ()
    """Keyword arguments of `fit` that a user may give."""


LAWS: Mapping[str, Law] = {
    "joint": Law(joint_law),
    "isoflop": Law(fit_isoflop, "allocation", ("curve",)),
    "surface": Law(fit_surface, "allocation", ("objective", "delta", "bootstrap")),
    "hull": Law(fit_hull, "allocation"),
    "share": Law(partial(axis_law, name="share"), "embedder_share"),
    "batch": Law(fit_batch, "batch", ("reference_batch",)),
    "negatives": Law(partial(axis_law, name="negatives"), "negatives"),
    "agreement": Law(fit_agreement),
}


def law_named(law: str) -> Law:
    """Raises UserError where there is none of that name."""
    if law not in LAWS:
        raise UserError(f"there is no law {law!r}", key="LAW", fix=f"one of {', '.join(LAWS)}")
    return LAWS[law]


def fit_law(law: str, runs: Runs, **options: Any) -> LawFit:
    """One law on runs. Raises UserError where the law is unknown, takes no such option, or the runs lack what it needs.

    The options are those of the law's own function, in `LAWS`.
    """
    known = law_named(law)
    for name in options.keys() - set(known.options):
        others = [other for other, one in LAWS.items() if name in one.options]
        key = f"--{name.replace('_', '-')}"
        raise UserError(f"{law} takes no such option", key=key, fix=f"leave it out; it is for {', '.join(others)}")
    return known.fit(runs, **options)


def runs_of_sweep(law: str, rows: Iterable[Row], metric: str, source: str) -> Runs:
    """What a law is fitted on: the rung rows, or of the batch law events to target from the probes."""
    if law == "batch":
        return events_to_target(from_rows(rows, metric, source=source, probes=True))
    return from_rows(rows, metric, source=source)


def fit_metrics(
    law: str, metrics: Iterable[str], runs_of: Callable[[str], Runs], **options: Any
) -> dict[str, LawFit | UserError]:
    """The same law per metric, on its `runs_of`; where those cannot tell, the reason in its place."""
    found: dict[str, LawFit | UserError] = {}
    for metric in metrics:
        try:
            found[metric] = fit_law(law, runs_of(metric), **options)
        except UserError as error:
            found[metric] = error
    return found
