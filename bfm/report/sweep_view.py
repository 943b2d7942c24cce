"""A sweep seen from outside: its ledger read without a lease, for `bfm status` and all that reads sweeps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from bfm.laws.frontier import FrontierPoint, Gap, Results, Row
from bfm.ranking.paired import Pairing
from bfm.report.floors import AgainstFloor, Baselines, against_strongest, read_floor_scores, read_floors
from bfm.sweep.driver.live import live_figures
from bfm.sweep.driver.status import summarise
from bfm.sweep.ledger.study import StoredSweep, read_alone
from bfm.sweep.space.parameters import read_parameters

if TYPE_CHECKING:
    from bfm.report.law_fits import Fitted


@dataclass(frozen=True)
class SweepView(StoredSweep):
    """What a sweep's ledger says."""

    def as_dict(self) -> dict[str, Any]:
        """What `bfm status --json` prints."""
        return {**summarise(self.state), **self.live, "frontier": self.frontier_dicts(), "floors": self.floors}

    def frontier_dicts(self) -> dict[str, list[dict[str, Any]]]:
        """JSON-able form of the frontiers: each point, who reached it, the change, and who is within error."""
        return {metric: [_point_dict(point) for point in points] for metric, points in self.frontiers.items()}

    @cached_property
    def frontiers(self) -> dict[str, list[FrontierPoint]]:
        """The frontier of each headline metric, losses first, C ascending; without a value there is none."""
        return self.results.frontiers(self.compare)

    @property
    def bests(self) -> dict[str, FrontierPoint]:
        """The best of each metric that has a value."""
        return {metric: points[-1] for metric, points in self.frontiers.items() if points}

    def beside_floor(self, row: Row, metric: str) -> AgainstFloor | None:
        """A row beside the strongest floor at a metric; None where either has no value."""
        return against_strongest(row, metric, self.floors, self.compare)

    @cached_property
    def live(self) -> dict[str, Any]:
        """Who drives it, what runs and how far it is, what waits and why (bfm.sweep.driver.live)."""
        return live_figures(self.store, self.state)

    @cached_property
    def swept(self) -> tuple[str, ...]:
        """The settings that its space searches; none where no space stands."""
        parameters = read_parameters((self.state.spec or {}).get("parameters", ()))
        return tuple(parameter.name for parameter in parameters if parameter.is_free)

    @cached_property
    def results(self) -> Results:
        """The rows, for what is asked of all of them."""
        return Results(self.rows)

    @cached_property
    def compare(self) -> Pairing:
        """Differences of the rows, and from the floors, by their scores of the same queries."""
        return Pairing(self.store, read_floor_scores(self.store))

    @cached_property
    def floors(self) -> Baselines:
        """What counting reaches on the same queries, by floor; none where the sweep has not run yet."""
        return read_floors(self.store)

    @cached_property
    def laws(self) -> list[Fitted]:
        """The laws of the sweep's axis, fitted on its rows."""
        # Nobody who asks how a sweep stands waits until scipy is loaded.
        from bfm.report.law_fits import sweep_laws

        return sweep_laws(self.rows, self.axis)


def read_sweep(sweep_dir: str) -> SweepView:
    """Read a sweep's ledger. Raises as `read_alone`."""
    sweep = read_alone(sweep_dir)
    return SweepView(sweep.store, sweep.state)


def _point_dict(point: FrontierPoint) -> dict[str, Any]:
    return {
        "flops": point.flops,
        "value": point.value,
        "error": _known(point.error),
        "trial": point.row["trial"],
        "params": point.row["params"],
        "change": None if point.change is None else _gap_dict(point.change),
        "within_error": {str(row["trial"]): _gap_dict(gap) for row, gap in point.rivals},
    }


def _gap_dict(gap: Gap) -> dict[str, Any]:
    return {"value": gap.value, "error": _known(gap.error), "paired": gap.paired}


def _known(value: float) -> float | None:
    """JSON has no word for NaN."""
    return value if math.isfinite(value) else None
