"""The laws that a sweep can tell: its rows and axis in, one fit (or the reason why not) per law and metric out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bfm.errors import UserError
from bfm.laws.fitting import AXIS_OF_LAW, fit_law, runs_of_sweep
from bfm.laws.frontier import Row, metric_names
from bfm.laws.result import Estimate, LawFit
from bfm.laws.runs import Runs
from bfm.laws.surface import Surface, fit_surface

_WITHOUT_AXIS = ("isoflop", "hull", "agreement")
"""What rows of a space that varies several things may tell; they lie on no one surface in (N, D)."""
_MOST_METRICS = 5
_METRICS_OF_LAW = {"agreement": 1, "surface": 2}
"""Agreement is of the loss with all others; a surface takes seconds."""
_OUTLOOK = 10.0
"""The surface is asked up to so many times the largest C."""
_OUTLOOK_PLACES = 8


@dataclass(frozen=True)
class Fitted:
    """One law on one metric of a sweep."""

    law: str
    metric: str
    runs: Runs | None
    fit: LawFit | None
    refused: str = ""
    """Why there is no fit."""
    outlook: tuple[tuple[float, Estimate], ...] = ()
    """Of a surface: C, ascending to beyond the runs, and the metric of one run at the optimum there."""


def sweep_laws(rows: Sequence[Row], axis: str | None) -> list[Fitted]:
    """The laws of the axis (None: those that any rows may tell) and the metrics' agreement, losses first."""
    metrics = metric_names(rows)
    laws = [law for law, needed in AXIS_OF_LAW.items() if needed in (axis, None)] if axis else list(_WITHOUT_AXIS)
    return [_fitted(law, rows, metric) for law in laws for metric in metrics[: _METRICS_OF_LAW.get(law, _MOST_METRICS)]]


def told(laws: Sequence[Fitted], law: str) -> list[tuple[Runs, LawFit]]:
    """The fits of one law, metric by metric."""
    return [(found.runs, found.fit) for found in laws if found.law == law and found.runs and found.fit]


def _fitted(law: str, rows: Sequence[Row], metric: str) -> Fitted:
    runs: Runs | None = None
    try:
        runs = runs_of_sweep(law, rows, metric, "")
        if law == "surface":
            surface = fit_surface(runs)
            return Fitted(law, metric, runs, surface.fit, outlook=_outlook(surface, runs))
        return Fitted(law, metric, runs, fit_law(law, runs))
    except UserError as error:
        return Fitted(law, metric, runs, None, error.reason)


def _outlook(surface: Surface, runs: Runs) -> tuple[tuple[float, Estimate], ...]:
    """What the surface expects at its own optimum, events repeated where the log holds no more."""
    places = np.geomspace(runs["flops"].min(), _OUTLOOK * runs["flops"].max(), _OUTLOOK_PLACES)
    distinct = float(runs["unique_events"].max()) if runs.has("unique_events") else float("inf")
    found = []
    for flops in places.tolist():
        params, events = surface.best(flops)
        found.append((flops, surface.predict(params, events, min(events, distinct))))
    return tuple(found)
