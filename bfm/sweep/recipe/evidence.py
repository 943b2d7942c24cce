"""What a recipe rests on: the sweeps of a folder with their axes, and which of their rows a law of sizes may see.

Enters: the folder of one sweep, or of a study (bfm.sweep.study). Leaves: sweeps with their specs and rung rows, all of
one evaluation protocol.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from bfm.errors import UserError
from bfm.files import canonical_json
from bfm.laws.frontier import Row, by_rung, measured, metric_names, metric_value
from bfm.sweep.metric import Metric
from bfm.sweep.settings import SweepSpec
from bfm.sweep.status import spec_of
from bfm.sweep.study import by_axis, joined, read_sweeps

ALLOCATION = "allocation"
BINS_PER_DECADE = 4
"""Of N, in the lower envelope of a sweep that also searched other settings."""


@dataclass(frozen=True)
class Swept:
    """One sweep, as far as it has come."""

    folder: str
    spec: SweepSpec
    rows: tuple[Row, ...] = field(repr=False)
    """Rung rows and probe rows."""

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
        return best_quarter(last)


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
    swept = (Swept(group[0].store.uri, spec_of(group[0].state), tuple(joined(group))) for group in by_axis(found))
    return Evidence(folder, tuple(swept), tuple(sweep.folder for sweep in sweeps if sweep not in found))


def best_quarter(ranked: Sequence[Row]) -> list[Row]:
    """The first quarter, at least one, of rows that stand best first."""
    return list(ranked[: max(1, len(ranked) // 4)])


def envelope(rows: Iterable[Row], metric: str) -> list[Row]:
    """The best row of each rung and quarter of a decade of N: what is left where other settings were searched too."""
    places: dict[tuple[float, int], list[Row]] = {}
    for row in measured(rows, metric):
        place = float(row["rung_flops"]), math.floor(BINS_PER_DECADE * math.log10(row["params"]))
        places.setdefault(place, []).append(row)
    return [min(places[place], key=_loss_of(metric)) for place in sorted(places)]


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
