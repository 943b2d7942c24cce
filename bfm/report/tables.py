"""Tables of a sweep for the terminal: ledger rows in, aligned text out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bfm.laws.frontier import (
    Compare,
    FrontierPoint,
    Gap,
    Results,
    Row,
    gap_between,
    goal_of,
    metric_error,
    metric_names,
    metric_value,
    no_answers,
    rung_rows,
)
from bfm.report.digits import UNPAIRED, gap_text, value_text
from bfm.report.floors import Baselines, shown_name, strongest, sweep_verdict, verdict
from bfm.sweep.ledger.state import SweepState
from bfm.units import format_count, format_flops, format_seconds, ruled

_MARKS = (
    ("*", "* reached at a lower rung"),
    ("  change", "change: against the rung below, on the same queries"),
    ("  within error", "within error: trials less than two standard errors of the difference from the best"),
    ("~", UNPAIRED),
)
"""Ends of cells, and what they mean."""


def frontier_text(results: Results, baselines: Baselines, compare: Compare = no_answers) -> str:
    """The frontier per metric for a terminal: a line per rung with the best values; N is that of the first metric's.

    Under it, what it brings against the rung below, and how many more are within error of it. Below stand the floors,
    the name of the strongest at each metric, and whether the sweep's best is below it.
    """
    frontiers = results.frontiers(compare)
    if not frontiers:
        return "no results yet"
    metrics, lines = list(frontiers), []
    for flops, finished in results.finished.items():
        points = points_at(frontiers, flops)
        size = format_count(points[0].row["params"]) if points[0] and points[0].row.get("params") else "-"
        lines.append([f"C {format_flops(flops)}", str(len(finished)), size, *map(point_text, points)])
        told = {"change": [*map(change_text, points)], "within error": [*map(_more_text, points)]}
        lines += [[f"  {name}", "", "", *cells] for name, cells in told.items() if any(cells)]
    for name, values in baselines.items():
        cells = [value_text(values.get(metric, math.nan)) for metric in metrics]
        lines.append([shown_name(name), "", "", *cells])
    if baselines:
        lines.append(["strongest", "", "", *[_strongest_name(baselines, metric) for metric in metrics]])
    text = ruled(["at most", "trials", "N", *metrics], [[_tight(cell) for cell in line] for line in lines])
    cells = [cell for line in lines for cell in line]
    notes = [f"N: of the best {metrics[0]}"] if len(metrics) > 1 else []
    notes += [note for mark, note in _MARKS if any(cell.endswith(mark) for cell in cells)]
    return "\n".join(filter(None, [text, *notes, sweep_verdict(frontiers, baselines, compare)]))


def trials_text(results: Results, compare: Compare = no_answers, limit: int = 20) -> str:
    """The trials by their best loss at their highest rung, with the difference from the best there, for a terminal;
    empty where none has a row."""
    metrics, ordered = results.metrics[:3], trials_in_order(results)
    if not ordered:
        return ""
    bests = results.bests(metrics[0]) if metrics else {}
    lines = [
        [
            str(row["trial"]),
            f"C {format_flops(row['rung_flops'])}",
            str(row.get("status", "ok")),
            format_count(row["params"]) if row.get("params") else "-",
            f"{row.get('embedder_share') or 0.0:.1%}",
            *[value_text(metric_value(row, metric), metric_error(row, metric)) for metric in metrics],
            *[behind_text(row, bests.get(row["rung_flops"]), metric, compare) for metric in metrics[:1]],
        ]
        for row in ordered[:limit]
    ]
    against = [f"{metric} to the best there" for metric in metrics[:1]]
    text = ruled(["trial", "reached", "status", "N", "s", *metrics, *against], lines)
    notes = [f"... and {len(ordered) - limit} more"] if len(ordered) > limit else []
    notes += [UNPAIRED] if any("~" in line[-1] for line in lines) else []
    return "\n".join([text, *notes])


def ladder_of(results: Results, state: SweepState) -> list[float]:
    """C of the rungs by their index; of those that have rows where no spec names them."""
    return list(results.by_rung) if state.spec is None else [*map(float, state.spec["budget"]["ladder_flops"])]


def spend_text(results: Results, state: SweepState) -> str:
    """FLOPs spent per rung, what was lost and redone, and the cap, for a terminal; seconds are those of the rows."""
    lines = []
    for rung, flops in enumerate(ladder_of(results, state)):
        here, trained_flops = results.by_rung.get(flops, []), state.trained_at(rung)
        if not here and not trained_flops:
            continue
        elapsed_s = sum(float(row.get("train_s") or 0.0) for row in here)
        good = len(results.finished.get(flops, []))
        lines.append([f"C {format_flops(flops)}", str(good), str(len(here) - good), format_flops(trained_flops)])
        lines[-1].append(format_seconds(elapsed_s))
    table = ruled(["rung", "ok", "failed", "FLOPs", "training"], lines) if lines else ""
    spent_flops, cap_flops = state.spent_flops, state.cap_flops
    if not spent_flops:
        return table
    under = f" of {format_flops(cap_flops)} ({spent_flops / cap_flops:.0%})" if cap_flops else ""
    told = "".join(f", {format_flops(flops)} of them {what}" for what, flops in wasted_flops(state).items())
    return f"{table}\nspent {format_flops(spent_flops)} FLOPs{under}{told}".lstrip()


def wasted_flops(state: SweepState) -> dict[str, int]:
    """What was spent without a gain, by how."""
    apart = {"lost": state.lost_flops, "redone for want of evicted trunks": state.redone_flops}
    return {what: flops for what, flops in apart.items() if flops}


def failures_text(rows: Sequence[Row], state: SweepState) -> str:
    """Divergences, lost tasks and refused proposals with their reasons; empty where nothing failed."""
    lines = [f"{row['trial']} rung {row['rung']}: {row['status']}" for row in failed_rows(rows)]
    lines += [f"{trial} rung {rung}: {reason}" for trial, rung, reason in lost_tasks(state)]
    lines += [f"refused {count}: {reason}" for reason, count in state.rejected.items()]
    return "\n".join(lines)


def evaluation_text(evaluation: Mapping[str, Any]) -> str:
    """An evaluation, with the floors on the same queries: a line per metric, for a terminal.

    The strongest floor at each metric is named, and in a sentence where the model is below it.
    """
    row = {"metrics": evaluation["metrics"], "errors": evaluation["errors"]}
    baselines = evaluation["baselines"]
    beside = {shown_name(name): values for name, values in baselines.items()}
    lines = [
        [
            metric,
            value_text(metric_value(row, metric), metric_error(row, metric)),
            *[value_text(values.get(metric, math.nan)) for values in beside.values()],
            _strongest_name(baselines, metric),
        ]
        for metric in metric_names([row], headline=False)
    ]
    table = ruled(["metric", "model", *beside, "strongest floor"], lines)
    text = [
        table,
        verdict("The model", dict.fromkeys(metric_names([row]), row), baselines, _compare_of(evaluation)),
        f"{evaluation['part']}: {evaluation['queries']:,} queries against {evaluation['catalogue']:,} items; protocol "
        f"{evaluation['protocol_hash'][:12]}",
        f"seen items {evaluation['seen_rule']}",
    ]
    if any("sampled" in metric and not metric.startswith("loss_") for metric in row["metrics"]):
        text.append("sampledN.*: the target against N drawn items, not the catalogue: other numbers by far")
    return "\n".join(text)


def _compare_of(evaluation: Mapping[str, Any]) -> Compare:
    """The differences of the model from the floors that an evaluation holds."""
    told = {shown_name(floor): gaps for floor, gaps in evaluation["against_baselines"].items()}

    def compare(row: Row, floor: Row, metric: str) -> Gap | None:
        gap = told.get(floor["floor"], {}).get(metric)
        return None if gap is None else Gap(**gap)

    return compare


def failed_rows(rows: Sequence[Row]) -> list[Row]:
    """Rung rows without a result (diverged, oom)."""
    return [row for row in rung_rows(rows) if row.get("status", "ok") != "ok"]


def lost_tasks(state: SweepState) -> list[tuple[str, int, str]]:
    """(trial, rung, why) of the tasks that ended without a row, then of those that will not be tried again."""
    lost = [
        (record["trial"], record["rung"], f"{record['reason']}, {record['charged_flops']:.3g} FLOPs charged")
        for record in state.losses
    ]
    return lost + [(trial, rung, f"given up: {reason}") for (trial, rung), reason in state.abandoned.items()]


def trials_in_order(results: Results) -> list[Row]:
    """The highest-rung row of each trial: higher rungs first, then the better loss; rows without a value last."""
    metrics = results.metrics
    highest: dict[str, Row] = {}
    for here in results.by_rung.values():
        highest |= {str(row["trial"]): row for row in here}
    if not metrics:
        return list(highest.values())
    sign = 1.0 if goal_of(metrics[0]) == "minimize" else -1.0

    def place(row: Row) -> tuple[bool, float, float]:
        value = sign * metric_value(row, metrics[0])
        return math.isnan(value), -row["rung_flops"], 0.0 if math.isnan(value) else value

    return sorted(highest.values(), key=place)


def points_at(frontiers: Mapping[str, Sequence[FrontierPoint]], flops: float) -> list[FrontierPoint | None]:
    """The point of each metric's frontier at a rung; None where it has none yet."""
    return [next((point for point in points if point.flops == flops), None) for points in frontiers.values()]


def size_words(row: Row) -> str:
    """N of a row; empty where it has none."""
    return f"N {format_count(row['params'])}" if row.get("params") else ""


def point_text(point: FrontierPoint | None) -> str:
    """A frontier value with its error; a star where it was reached at a lower rung."""
    if point is None:
        return "-"
    return value_text(point.value, point.error) + ("*" if point.carried else "")


def change_text(point: FrontierPoint | None) -> str:
    """What a frontier value brings against the rung below; empty where there is none or it is the same row."""
    return "" if point is None or point.change is None else gap_text(point.change)


def behind_text(row: Row, best: Row | None, metric: str, compare: Compare) -> str:
    """A row against the best of its rung, and whether it is within error of it; empty where there is no value."""
    if best is None or not math.isfinite(metric_value(row, metric)):
        return ""
    if row is best:
        return "best"
    gap = gap_between(row, best, metric, compare)
    return gap_text(gap) + (", within error" if gap.within_error else "")


def _more_text(point: FrontierPoint | None) -> str:
    if point is None or not point.rivals:
        return ""
    return f"{len(point.rivals)} more" + ("" if all(gap.paired for _, gap in point.rivals) else "~")


def _tight(cell: str) -> str:
    return cell.replace(" \u00b1 ", "\u00b1")


def _strongest_name(baselines: Baselines, metric: str) -> str:
    floor = strongest(baselines, metric)
    return floor.name if floor else "-"
