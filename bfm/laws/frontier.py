"""The compute frontier: ledger rows in, the best value of each metric reachable with at most C in one trial out.

A row is a ledger row as a plain dict; only rung rows count (`kind` "rung", `status` "ok", a finite value), because a
probe is measured on a subset of the queries. C is the row's nominal `rung_flops`: results at one rung have spent the
same C within 1 %, and must be compared with each other and not sorted by that last percent. Metrics are those of the
evaluation protocol (nll, recall@k, ndcg@k, mrr@k, coverage@k, also as `warm.`, `unseen.` and `basket.`) and
`loss_sampled`.

Two rows answered the same queries, so the error of their difference is far below that of either. Rows do not hold what
it takes; who has the answers hands down a `Compare` (bfm.ranking.paired), and without one differences are `unpaired`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from bfm.errors import UserError

Row = Mapping[str, Any]
Goal = Literal["minimize", "maximize"]

_KINDS = ("", "warm", "unseen", "basket")
_ORDER = ("nll", "loss_sampled", "recall", "ndcg", "mrr", "coverage")


@dataclass(frozen=True)
class Gap:
    """A row's value of a metric minus another's."""

    value: float
    error: float
    """Standard error over queries, clustered by user; NaN where it is not known. No seed-to-seed spread is in it."""
    paired: bool
    """Whether the error is that of the differences query by query."""

    @property
    def within_error(self) -> bool:
        """Whether 0 is within two standard errors; False where the error is not known."""
        return abs(self.value) <= 2 * self.error


Compare = Callable[[Row, Row, str], Gap]
"""(row, other, metric) -> how much the row's value is above the other's."""


@dataclass(frozen=True)
class FrontierPoint:
    """The best value of one metric with at most `flops` (C) in one trial, and who reached it."""

    flops: float
    value: float
    error: float
    """Standard error of `value` over queries, clustered by user; NaN where the row has none."""
    row: Row
    """The row that holds the value; its `rung_flops` is below `flops` where no trial of this rung did better."""
    rows: int
    """Rows measured at exactly this rung."""
    change: Gap | None
    """`value` minus that of the rung below; None at the lowest rung and where the value is carried."""
    rivals: tuple[tuple[Row, Gap], ...]
    """Other rows of this rung, or of that of `row`, within error of it, with their difference from it."""

    @property
    def carried(self) -> bool:
        """Whether the value comes from a lower rung."""
        return float(self.row["rung_flops"]) < self.flops


def goal_of(metric: str) -> Goal:
    """Ranking metrics go up, everything else is a loss: 'warm.nll' -> 'minimize', 'recall@10' -> 'maximize'."""
    name = metric.rsplit(".", 1)[-1].lower()
    return "maximize" if name.startswith(("recall", "ndcg", "mrr", "coverage")) else "minimize"


def metric_value(row: Row, metric: str) -> float:
    """The row's value, NaN where it has none (diverged rows, metrics that were not asked for)."""
    return _number((row.get("metrics") or {}).get(metric))


def metric_error(row: Row, metric: str) -> float:
    """The row's standard error of a metric, NaN where it has none."""
    return _number((row.get("errors") or {}).get(metric))


def unpaired(row: Row, other: Row, metric: str) -> Gap:
    """The difference as if the rows had answered different queries: the most that their own errors can say."""
    error = math.hypot(metric_error(row, metric), metric_error(other, metric))
    return Gap(metric_value(row, metric) - metric_value(other, metric), error, paired=False)


def rung_rows(rows: Iterable[Row]) -> list[Row]:
    """Rung rows, diverged ones included, in ledger order; probes left out."""
    return [row for row in rows if row.get("kind", "rung") == "rung"]


def metric_names(rows: Iterable[Row], *, headline: bool = True) -> list[str]:
    """Metrics of the rows, losses first; `headline` leaves out kinds such as `warm.`, and `loss_sampled`."""
    names = {name for row in rung_rows(rows) for name in row.get("metrics") or {}}
    if headline:
        names = {name for name in names if "." not in name and not name.startswith("loss_sampled")}
    return sorted(names, key=_sort_key)


def rung_ladder(rows: Iterable[Row]) -> list[float]:
    """The rungs (C in FLOPs, ascending) that have rows."""
    return sorted({float(row["rung_flops"]) for row in rung_rows(rows)})


def measured(rows: Iterable[Row], metric: str) -> list[Row]:
    """Rung rows with a finite value of the metric.

    Raises UserError where rows of different evaluation protocols are mixed: their values do not compare.
    """
    found = [
        row
        for row in rung_rows(rows)
        if row.get("status", "ok") == "ok" and math.isfinite(metric_value(row, metric)) and row["rung_flops"] > 0
    ]
    protocols = {row["protocol_hash"] for row in found if row.get("protocol_hash")}
    if len(protocols) > 1:
        short = ", ".join(sorted(str(protocol)[:12] for protocol in protocols))
        raise UserError(
            f"rows of {len(protocols)} evaluation protocols ({short}) do not compare",
            fix="report them apart, one protocol at a time",
        )
    return found


def frontier(rows: Iterable[Row], metric: str, compare: Compare = unpaired) -> list[FrontierPoint]:
    """One point per rung that has a value, ascending in C; values never get worse as C grows. Ties: the smaller N."""
    rungs = _by_rung(rows, metric)
    points: list[FrontierPoint] = []
    for flops, here in rungs.items():
        below = points[-1].row if points else None
        best = best_row([*([] if below is None else [below]), *here.rows], metric)
        rivals = here.near(best, metric)
        if best is below:
            rivals = rungs[float(best["rung_flops"])].near(best, metric) + rivals
        gaps = [(row, compare(row, best, metric)) for row in rivals]
        points.append(
            FrontierPoint(
                flops=flops,
                value=metric_value(best, metric),
                error=metric_error(best, metric),
                row=best,
                rows=len(here.rows),
                change=None if below is None or best is below else compare(best, below, metric),
                rivals=tuple((row, gap) for row, gap in gaps if gap.within_error),
            )
        )
    return points


@dataclass(frozen=True)
class _Rung:
    """The rows of a rung that have a value of a metric."""

    rows: list[Row]
    value_R: np.ndarray
    error_R: np.ndarray

    def near(self, best: Row, metric: str) -> list[Row]:
        """Rows beside `best` for which it takes a comparison to tell whether they are within error of it.

        No difference has a larger error than both values' errors together.
        """
        most_R = self.error_R + metric_error(best, metric)
        near_R = np.abs(self.value_R - metric_value(best, metric)) <= 2 * most_R
        return [row for row in map(self.rows.__getitem__, np.flatnonzero(near_R).tolist()) if row is not best]


def _by_rung(rows: Iterable[Row], metric: str) -> dict[float, _Rung]:
    """The measured rows of every rung, ascending in C."""
    groups: dict[float, list[Row]] = {}
    for row in measured(rows, metric):
        groups.setdefault(float(row["rung_flops"]), []).append(row)
    return {
        flops: _Rung(
            groups[flops],
            np.array([metric_value(row, metric) for row in groups[flops]]),
            np.array([metric_error(row, metric) for row in groups[flops]]),
        )
        for flops in sorted(groups)
    }


def best_row(rows: Iterable[Row], metric: str) -> Row:
    """The best of rows that all have a value; of equal ones that of the smaller N."""
    sign = 1.0 if goal_of(metric) == "minimize" else -1.0
    return min(rows, key=lambda row: (sign * metric_value(row, metric), _number(row.get("params"))))


def rung_bests(rows: Iterable[Row], metric: str) -> dict[float, Row]:
    """The best row measured at each rung (C), whatever lower rungs have."""
    return {flops: best_row(rung.rows, metric) for flops, rung in _by_rung(rows, metric).items()}


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _sort_key(name: str) -> tuple[int, int, float, str]:
    prefix, _, base = name.rpartition(".")
    stem, _, cut = base.partition("@")
    place = _ORDER.index(stem) if stem in _ORDER else len(_ORDER)
    kind = _KINDS.index(prefix) if prefix in _KINDS else len(_KINDS)
    return kind, place, _cut(cut), name


def _cut(text: str) -> float:
    return float(text) if text.isdigit() else 0.0
