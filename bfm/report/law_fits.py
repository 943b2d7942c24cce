"""The laws that a sweep can tell: its rows and axis in, one fit (or the reason why not) per law and metric out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bfm.errors import UserError
from bfm.laws.fitting import fit_law, runs_of_sweep
from bfm.laws.frontier import Row, metric_names
from bfm.laws.result import LawFit
from bfm.laws.runs import Runs

_MOST_METRICS = 5


@dataclass(frozen=True)
class Fitted:
    """One law on one metric of a sweep."""

    law: str
    metric: str
    runs: Runs | None
    fit: LawFit | None
    refused: str = ""
    """Why there is no fit."""


def sweep_laws(rows: Sequence[Row], axis: str | None) -> list[Fitted]:
    """The joint law of each metric, losses first, critical batches where the axis is batch, the metrics' agreement."""
    metrics = metric_names(rows)[:_MOST_METRICS]
    laws = {"joint": metrics, "batch": metrics if axis == "batch" else [], "agreement": metrics[:1]}
    return [_fitted(law, rows, metric) for law, of_law in laws.items() for metric in of_law]


def told(laws: Sequence[Fitted], law: str) -> list[tuple[Runs, LawFit]]:
    """The fits of one law, metric by metric."""
    return [(found.runs, found.fit) for found in laws if found.law == law and found.runs and found.fit]


def _fitted(law: str, rows: Sequence[Row], metric: str) -> Fitted:
    try:
        runs = runs_of_sweep(law, rows, metric, "")
        return Fitted(law, metric, runs, fit_law(law, runs))
    except UserError as error:
        return Fitted(law, metric, None, None, error.reason)
