"""A sweep or a study as tables, for notebooks: `bfm.open_sweep`.

Enters: its folder or URI. Leaves: its rows (pyarrow, pandas), the frontier of a metric, the joint law per axis. What is
read is the ledger as it stands at that moment, without a lease: open it again to see further rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from bfm.errors import UserError
from bfm.files import Store
from bfm.laws.fitting import fit_metrics, runs_of_sweep
from bfm.laws.frontier import frontier, metric_names
from bfm.laws.result import LawFit
from bfm.report.floors import strongest
from bfm.report.runs_file import runs_table
from bfm.report.study import read_study
from bfm.report.sweep_view import SweepView
from bfm.sweep.ledger.study import by_axis, joined

if TYPE_CHECKING:
    import pandas
    import pyarrow


@dataclass(frozen=True)
class OpenedSweep:
    """The sweeps that stand at a place, as they were when it was opened."""

    location: str
    sweeps: tuple[SweepView, ...]
    """Those that have begun; more than one in a study alone, whose trials are named by their sweep, too."""

    @classmethod
    def at(cls, location: str) -> OpenedSweep:
        """Raises UserError where there is neither a sweep nor a study, CorruptError where a ledger is damaged."""
        return cls(location, tuple(sweep for sweep in read_study(location) if sweep.has_begun))

    def __repr__(self) -> str:
        rows = joined(self.sweeps)
        rungs = len({row["rung_flops"] for row in rows})
        names = ", ".join(sweep.folder or Store(self.location).uri.rsplit("/", 1)[-1] for sweep in self.sweeps)
        return f"OpenedSweep({names}: {len(rows):,} rows at {rungs} C, {self.location})"

    @cached_property
    def metrics(self) -> list[str]:
        """Headline metrics of the rows, losses first."""
        return metric_names(joined(self.sweeps))

    def table(self) -> pyarrow.Table:
        """Every row of the ledger, failed ones and probes included, as in report/runs.parquet."""
        return runs_table(joined(self.sweeps))

    def rows(self) -> pandas.DataFrame:
        """`table` for pandas: columns such as `params` (N), `events` (D), `config.window`, `metrics.nll`."""
        return self.table().to_pandas()

    def frontier(self, metric: str = "nll") -> pandas.DataFrame:
        """Per sweep and rung: C (`flops`), the best `value` with at most C in one trial, its standard `error` over
        queries, its `trial` and N, the `change` from the rung below with its error, the trials within error of it, the
        strongest floor. Raises UserError for a metric that no row has.
        """
        import pandas

        self._check(metric)
        found = [point for sweep in self.sweeps for point in self._points(sweep, metric)]
        return pandas.DataFrame(found).drop(columns=[] if len(self.sweeps) > 1 else "sweep")

    def laws(self, metric: str = "nll") -> dict[str, LawFit | UserError]:
        """Axis -> the joint law on the rows of its sweeps together, or why the runs cannot tell it. A sweep without an
        axis stands under its name. Raises UserError for a metric that no row has."""
        self._check(metric)
        found = {}
        for group in by_axis(self.sweeps):
            name = group[0].axis or _name(group[0])
            runs_of = partial(runs_of_sweep, "joint", joined(group), source=self.location)
            found[name] = fit_metrics("joint", [metric], runs_of)[metric]
        return found

    def _check(self, metric: str) -> None:
        if metric not in self.metrics:
            known = ", ".join(self.metrics) or "none yet"
            raise UserError(f"no row has {metric!r}", file=self.location, fix=f"one of: {known}")

    def _points(self, sweep: SweepView, metric: str) -> list[dict[str, Any]]:
        floor = strongest(sweep.floors, metric)
        prefix = f"{sweep.folder}/" if len(self.sweeps) > 1 else ""
        return [
            {
                "sweep": _name(sweep),
                "flops": point.flops,
                "value": point.value,
                "error": point.error,
                "trial": f"{prefix}{point.row['trial']}",
                "params": point.row["params"],
                "change": None if point.change is None else point.change.value,
                "change_error": None if point.change is None else point.change.error,
                "within_error": [f"{prefix}{row['trial']}" for row, _ in point.rivals],
                "floor": None if floor is None else floor.value,
                "floor_of": None if floor is None else floor.name,
            }
            for point in frontier(sweep.rows, metric, sweep.compare)
        ]


def _name(sweep: SweepView) -> str:
    return sweep.folder or str((sweep.state.spec or {}).get("name", ""))
