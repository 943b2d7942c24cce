"""The compute frontier: ledger rows in, the best value of each metric reachable with at most C in one trial out.

A row is a ledger row as a plain dict; only rung rows count (`kind` "rung", `status` "ok", a finite value), because a
probe is measured on a subset of the queries. C is the row's nominal `rung_flops`: results at one rung have spent the
same C within 1 %, and must be compared with each other and not sorted by that last percent. Metrics are those of the
evaluation protocol (nll, recall@k, ndcg@k, mrr@k, coverage@k, also as `warm.`, `unseen.` and `basket.`) and
`loss_sampled`.

Two rows answered the same queries, so the error of their difference is far below that of either. Rows do not hold what
it takes; who has the answers hands down a `Compare` (bfm.ranking.paired), and what that does not know is `unpaired`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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


Compare = Callable[[Row, Row, str], Gap | None]
"""(row, other, metric) -> how much the row's value is above the other's, query by query; None where nobody knows."""


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
    """Rows of other trials at this rung, or at that of `row`, within error of it, with their difference from it."""

    @property
    def carried(self) -> bool:
        """Whether the value comes from a lower rung."""
        return float(self.row["rung_flops"]) < self.flops


def goal_of(metric: str) -> Goal:
    """Ranking metrics go up, everything else is a loss: 'warm.nll' -> 'minimize', 'recall@10' -> 'maximize'."""
    name = metric.rsplit(".", 1)[-1].lower()
    return "maximize" if name.startswith(("recall", "ndcg", "mrr", "coverage")) else "minimize"


def is_better(metric: str, value: float, other: float) -> bool:
    """Whether a value of a metric is better than another."""
    return value < other if goal_of(metric) == "minimize" else value > other


def metric_value(row: Row, metric: str) -> float:
    """The row's value, NaN where it has none (diverged rows, metrics that were not asked for)."""
    return _number((row.get("metrics") or {}).get(metric))


def metric_error(row: Row, metric: str) -> float:
    """The row's standard error of a metric, NaN where it has none."""
    return _number((row.get("errors") or {}).get(metric))


def no_answers(row: Row, other: Row, metric: str) -> None:
    """The `Compare` of those who have none of the answers."""


def gap_between(row: Row, other: Row, metric: str, compare: Compare) -> Gap:
    """The row's value minus the other's, paired where `compare` knows how."""
    return compare(row, other, metric) or unpaired(row, other, metric)


def unpaired(row: Row, other: Row, metric: str) -> Gap:
    """The difference as if the rows had answered different queries: the most that their own errors can say."""
    return _apart(
        metric_value(row, metric), metric_error(row, metric), metric_value(other, metric), metric_error(other, metric)
    )


def _apart(value: float, error: float, other_value: float, other_error: float) -> Gap:
    return Gap(value - other_value, math.hypot(error, other_error), paired=False)


def rung_rows(rows: Iterable[Row]) -> list[Row]:
    """Rung rows, diverged ones included, in ledger order; probes left out."""
    return _of_kind(rows, "rung")


def _of_kind(rows: Iterable[Row], kind: str) -> list[Row]:
    return [row for row in rows if row.get("kind", "rung") == kind]


def metric_names(rows: Iterable[Row], *, headline: bool = True) -> list[str]:
    """Metrics of the rows, losses first; `headline` leaves out kinds such as `warm.`, and `loss_sampled`."""
    names: set[str] = set().union(*(row.get("metrics") or () for row in rung_rows(rows)))
    if headline:
        names = {name for name in names if "." not in name and not name.startswith("loss_sampled")}
    return sorted(names, key=_sort_key)


def by_rung(rows: Iterable[Row]) -> dict[float, list[Row]]:
    """Rung rows, diverged ones included, by C in FLOPs, ascending."""
    groups: dict[float, list[Row]] = {}
    for row in rung_rows(rows):
        groups.setdefault(float(row["rung_flops"]), []).append(row)
    return {flops: groups[flops] for flops in sorted(groups)}


def measured(rows: Iterable[Row], metric: str, kind: str = "rung") -> list[Row]:
    """Rung rows, or those of another kind, with a finite value of the metric.

    Raises UserError where rows of different evaluation protocols are mixed: their values do not compare.
    """
    finished = filter(_is_ok, _of_kind(rows, kind))
    found = [row for row in finished if math.isfinite(metric_value(row, metric)) and row["rung_flops"] > 0]
    _check_protocols(found)
    return found


def numbers(rows: Iterable[Row], part: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Name -> what each row has under it in its `part` (metrics, errors), NaN where it has nothing."""
    parts = [row.get(part) or {} for row in rows]
    return {name: np.array([held.get(name) for held in parts], float) for name in names}


def frontier(rows: Sequence[Row], metric: str, compare: Compare = no_answers) -> list[FrontierPoint]:
    """One point per rung that has a value, ascending in C; values never get worse as C grows. Ties: the smaller N.

    Raises as `measured`.
    """
    return _frontier(_measured_by_rung(Results(rows).finished, [metric])[metric], metric, compare)


@dataclass(frozen=True)
class Results:
    """The rows of a sweep for whoever asks several things of them: each way through many thousand rows takes time."""

    rows: Sequence[Row]

    @cached_property
    def by_rung(self) -> dict[float, list[Row]]:
        """Rung rows, diverged ones included, by C in FLOPs, ascending."""
        return by_rung(self.rows)

    @cached_property
    def finished(self) -> dict[float, list[Row]]:
        """Those of them with status ok; a rung may have none."""
        return {flops: [row for row in here if _is_ok(row)] for flops, here in self.by_rung.items()}

    @cached_property
    def metrics(self) -> list[str]:
        """Headline metrics of the rows, losses first."""
        return metric_names(self.rows)

    @cached_property
    def _measured(self) -> dict[str, dict[float, _Rung]]:
        return _measured_by_rung(self.finished, self.metrics)

    def frontiers(self, compare: Compare = no_answers) -> dict[str, list[FrontierPoint]]:
        """The frontier of every headline metric, losses first. Raises as `measured`."""
        return {metric: _frontier(rungs, metric, compare) for metric, rungs in self._measured.items()}

    def bests(self, metric: str) -> dict[float, Row]:
        """The best row measured at each rung (C) by a headline metric, whatever lower rungs have."""
        return {flops: best_row(rung.leaders(metric), metric) for flops, rung in self._measured[metric].items()}


def _frontier(rungs: Mapping[float, _Rung], metric: str, compare: Compare) -> list[FrontierPoint]:
    points: list[FrontierPoint] = []
    at_its_rung: tuple[tuple[Row, Gap], ...] = ()
    for flops, here in rungs.items():
        below = points[-1].row if points else None
        best = best_row([*([] if below is None else [below]), *here.leaders(metric)], metric)
        rivals = here.rivals(best, metric, compare)
        if best is below:
            known = {best["trial"], *(row["trial"] for row, _ in at_its_rung)}
            rivals = at_its_rung + tuple((row, gap) for row, gap in rivals if row["trial"] not in known)
        else:
            at_its_rung = rivals
        points.append(
            FrontierPoint(
                flops=flops,
                value=metric_value(best, metric),
                error=metric_error(best, metric),
                row=best,
                rows=len(here.rows),
                change=None if below is None or best is below else gap_between(best, below, metric, compare),
                rivals=rivals,
            )
        )
    return points


@dataclass(frozen=True)
class _Rung:
    """The rows of a rung that have a value of a metric."""

    rows: list[Row]
    value_R: np.ndarray
    error_R: np.ndarray

    def leaders(self, metric: str) -> list[Row]:
        """The rows with the best value."""
        best = self.value_R.min() if goal_of(metric) == "minimize" else self.value_R.max()
        return _where(self.rows, self.value_R == best)

    def rivals(self, best: Row, metric: str, compare: Compare) -> tuple[tuple[Row, Gap], ...]:
        """Rows beside `best` that are within error of it, with their difference from it."""
        value, error = metric_value(best, metric), metric_error(best, metric)
        # No difference has a larger error than both values' errors together.
        near_R = np.abs(self.value_R - value) <= 2 * (self.error_R + error)
        near = zip(_where(self.rows, near_R), self.value_R[near_R].tolist(), self.error_R[near_R].tolist(), strict=True)
        gaps = (
            (row, compare(row, best, metric) or _apart(its_value, its_error, value, error))
            for row, its_value, its_error in near
            if row is not best
        )
        return tuple((row, gap) for row, gap in gaps if gap.within_error)


def _measured_by_rung(finished: Mapping[float, list[Row]], metrics: Sequence[str]) -> dict[str, dict[float, _Rung]]:
    """Metric -> C, ascending -> the rows of status ok `measured` there; rungs without one are left out."""
    found: dict[str, dict[float, _Rung]] = {metric: {} for metric in metrics}
    for flops, here in finished.items():
        values, errors = numbers(here, "metrics", metrics), numbers(here, "errors", metrics)
        for metric in metrics:
            known_R = np.isfinite(values[metric])
            if known_R.any() and flops > 0:
                kept = _where(here, known_R), values[metric][known_R], errors[metric][known_R]
                found[metric][flops] = _Rung(*kept)
    # Rows of two protocols may still have no metric in common.
    if len(_protocols(row for here in finished.values() for row in here)) > 1:
        for of_metric in found.values():
            _check_protocols(row for rung in of_metric.values() for row in rung.rows)
    return found


def _protocols(rows: Iterable[Row]) -> set[Any]:
    return {row.get("protocol_hash") for row in rows} - {None, ""}


def _check_protocols(rows: Iterable[Row]) -> None:
    protocols = _protocols(rows)
    if len(protocols) > 1:
        short = ", ".join(sorted(str(protocol)[:12] for protocol in protocols))
        raise UserError(
            f"rows of {len(protocols)} evaluation protocols ({short}) do not compare",
            fix="report them apart, one protocol at a time",
        )


def _where(rows: list[Row], mask_R: np.ndarray) -> list[Row]:
    return rows if mask_R.all() else [rows[place] for place in np.flatnonzero(mask_R).tolist()]


def best_row(rows: Iterable[Row], metric: str) -> Row:
    """The best of rows that all have a value; of equal ones that of the smaller N."""
    sign = 1.0 if goal_of(metric) == "minimize" else -1.0
    return min(rows, key=lambda row: (sign * metric_value(row, metric), _number(row.get("params"))))


def _is_ok(row: Row) -> bool:
    return bool(row.get("status", "ok") == "ok")


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
