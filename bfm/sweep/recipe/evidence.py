"""What a recipe rests on: all rows of a folder's sweeps, one joint model of them, and the sweep that it goes on from.

Enters: the folder of one sweep, or of a study (bfm.sweep.ledger.study), and a metric. Leaves: sweeps with their specs
and rows, all of one evaluation protocol; the joint model of their rung rows, whichever axis a sweep was run for.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

from bfm.errors import UserError
from bfm.files import canonical_json
from bfm.laws.frontier import Row, by_rung, measured, metric_names, metric_value
from bfm.laws.joint import Joint, fit_joint
from bfm.laws.joint_optimum import Optima, optima_of
from bfm.laws.runs import Runs, from_rows
from bfm.sweep.ledger.state import spec_of
from bfm.sweep.ledger.study import by_axis, of_sweep, read_sweeps
from bfm.sweep.space.metric import Metric
from bfm.sweep.space.settings import SweepSpec

ALLOCATION = "allocation"


@dataclass(frozen=True)
class Swept:
    """One sweep, as far as it has come."""

    folder: str
    spec: SweepSpec
    rows: tuple[Row, ...] = field(repr=False)
    """Rung rows and probe rows; in a study their trials are named by their sweep, too."""

    @property
    def axis(self) -> str | None:
        """What it was run to find: embedder_share, batch, allocation, negatives; None: everything at once."""
        return self.spec.axis

    def searched(self, name: str) -> bool:
        """Whether the space leaves a setting free."""
        return any(parameter.name == name for parameter in self.spec.free_parameters)

    def rungs(self, metric: str) -> dict[float, list[Row]]:
        """C, ascending -> the rows that have the metric, best first."""
        groups = by_rung(measured(self.rows, metric))
        return {flops: sorted(rows, key=_loss_of(metric)) for flops, rows in groups.items()}

    def top_runs(self, metric: str) -> list[Row]:
        """The best quarter (at least one) of the rows at the highest rung, best first."""
        *_, last = self.rungs(metric).values()
        return last[: max(1, len(last) // 4)]


@dataclass(frozen=True)
class Evidence:
    """All sweeps of a folder."""

    folder: str
    sweeps: tuple[Swept, ...]
    """Those with rows; of a study one or more."""
    waiting: tuple[str, ...] = ()
    """Sweeps of a study that have no rows yet."""

    def on(self, axis: str) -> Swept | None:
        """The sweep that was run to find a setting."""
        return next((sweep for sweep in self.sweeps if sweep.axis == axis), None)

    @cached_property
    def sizes(self) -> Swept:
        """The sweep that tells how large a model should be: the allocation sweep, else the one of all settings.

        Raises UserError where there is neither.
        """
        joint = [sweep for sweep in self.sweeps if sweep.axis is None and sweep.searched("params")]
        found = self.on(ALLOCATION) or max(joint, key=lambda sweep: len(sweep.rows), default=None)
        if found is None:
            raise UserError(
                "no sweep of model sizes has rows",
                file=self.folder,
                fix="run an allocation sweep: 5 or more sizes at each of 3 or more rungs",
            )
        return found

    @cached_property
    def rows(self) -> list[Row]:
        """Those of all sweeps."""
        return [row for sweep in self.sweeps for row in sweep.rows]


@dataclass(frozen=True)
class Fitted:
    """The joint model of all rows of some evidence."""

    runs: Runs
    joint: Joint
    best: Optima

    @classmethod
    def to(cls, evidence: Evidence, metric: str) -> Fitted:
        """Of a metric. Raises UserError where rows lack it, or are too few, with how many are needed."""
        runs = from_rows(evidence.rows, metric, source=evidence.folder)
        joint = fit_joint(runs)
        return cls(runs, joint, optima_of(joint, runs))

    def size_at(self, flops: float) -> float:
        """The best N at a C: of the law, of the nearest budget where there is no law."""
        size = self.best.size.at(flops).estimate
        nearest = min(self.best.budgets, key=lambda budget: abs(math.log(budget / flops)))
        return size if math.isfinite(size) else math.exp(self.best.log_size(nearest))


def read_evidence(folder: str) -> Evidence:
    """The sweeps of a sweep's or a study's folder.

    Raises UserError where there is none, where none has a row, or where rows are of several protocols; CorruptError
    where a ledger is damaged.
    """
    sweeps = read_sweeps(folder)
    found = [sweep for sweep in sweeps if metric_names(sweep.rows)]
    if not found:
        raise UserError("no row has a metric yet", file=folder, fix="let the sweep finish a rung")
    hashes = {row["protocol_hash"] for sweep in found for row in sweep.rows if row.get("protocol_hash")}
    if len(hashes) > 1:
        short = ", ".join(sorted(str(value)[:12] for value in hashes))
        raise UserError(
            f"its sweeps have rows of {len(hashes)} evaluation protocols ({short})",
            file=folder,
            fix="make the recipe from sweeps over one shard set",
        )
    rows = {sweep.folder: sweep.rows if len(found) == 1 else of_sweep(sweep.folder, sweep.rows) for sweep in found}
    swept = [
        Swept(group[0].store.uri, spec_of(group[0].state), tuple(row for sweep in group for row in rows[sweep.folder]))
        for group in by_axis(found)
    ]
    return Evidence(folder, tuple(swept), tuple(sweep.folder for sweep in sweeps if sweep not in found))


def seed_noise(rows: Iterable[Row], metric: str) -> float:
    """Standard deviation over seeds, from rows alike in all but the seed; NaN where there are none."""
    alike: dict[tuple[float, bytes], list[float]] = {}
    for row in measured(rows, metric):
        if row.get("seed") is not None:
            place = float(row["rung_flops"]), canonical_json(row["config"])
            alike.setdefault(place, []).append(metric_value(row, metric))
    groups = [values for values in alike.values() if len(values) > 1]
    if not groups:
        return math.nan
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in groups)
    return math.sqrt(squares / sum(len(values) - 1 for values in groups))


def _loss_of(metric: str) -> Callable[[Row], float]:
    """A row's value, signed so that smaller is better."""
    named = Metric(metric)
    return lambda row: named.loss(metric_value(row, metric))
