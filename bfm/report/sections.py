"""The written parts of a sweep's page: a view of it and what is known of its data in, tables and facts out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from bfm.events.repeats import rule_words
from bfm.laws.frontier import FrontierPoint, Row, goal_of, rung_rows
from bfm.report.digits import UNPAIRED, gap_text, power_text, value_text
from bfm.report.floors import shown_name, strongest, sweep_verdict
from bfm.report.render import Cell, Facts, Table
from bfm.report.sweep_data import engine_text
from bfm.report.sweep_view import SweepView
from bfm.report.tables import (
    change_text,
    failed_rows,
    ladder_of,
    lost_tasks,
    point_text,
    points_at,
    size_words,
    wasted_flops,
)
from bfm.report.words import first_words, joined_words, plural
from bfm.sweep.ledger.state import SweepState
from bfm.sweep.recipe.verdicts import calibration_text, predicted
from bfm.units import format_count

_NAMED = 3
"""So many rows within error are named."""


@dataclass(frozen=True)
class Card:
    """A number that the page opens with."""

    name: str
    value: str
    note: str
    floor: str = ""
    side: str = ""
    """gain above the strongest floor, loss below it."""
    share: float | None = None


def lede(view: SweepView) -> str:
    """What was swept and what it cost, and whether anything is worth more than counting."""
    return f"{_headline(view)} {sweep_verdict(view.frontiers, view.floors, view.compare)}".strip()


def _headline(view: SweepView) -> str:
    rows = rung_rows(view.rows)
    num_results = sum(map(len, view.results.finished.values()))
    trials = {str(row["trial"]) for row in rows}
    if not trials:
        return "No result is in the ledger yet."
    steps = ", ".join(power_text(flops) for flops in ladder_of(view.results, view.state)[:8])
    sizes = [float(row["params"]) for row in rows if row.get("params")]
    text = f"{plural(len(trials), 'trial')} with {plural(num_results, 'result')} on a ladder of C = {steps} FLOPs"
    if sizes:
        text += f", model sizes N from {format_count(min(sizes))} to {format_count(max(sizes))}"
    # N is told by its range.
    if fields := [name.replace("_", " ") for name in view.swept if name != "params"]:
        text += f", searching {joined_words(fields)}"
    return f"{text}."


def cards(view: SweepView) -> list[Card]:
    """Best value of each headline metric so far, against the strongest floor; spend against the cap."""
    found = []
    for metric, best in view.bests.items():
        error = f"\u00b1 {best.error:.2g}" if math.isfinite(best.error) else ""
        who = f"{best.row['trial']} at C = {power_text(best.row['rung_flops'])}"
        note = ", ".join(filter(None, [error, size_words(best.row), who]))
        floor = view.beside_floor(best.row, metric)
        side = "" if floor is None else {"above": "gain", "below": "loss"}.get(floor.side, "")
        value = value_text(best.value, best.error).split(" ")[0]
        found.append(Card(metric, value, note, "" if floor is None else floor.words, side))
    spent, cap = view.state.spent_flops, view.state.cap_flops
    if spent:
        share = min(spent / cap, 1.0) if cap else 1.0
        under = f"{spent / cap:.0%} of the cap of {power_text(cap)} FLOPs" if cap else "FLOPs of training, no cap"
        found.append(Card("spent", power_text(spent), under, share=share))
    return found


def best_table(view: SweepView) -> Table:
    """Best so far per rung and metric beside the strongest floor, what it brings against the rung below, who holds it
    and who is within error."""
    metrics = list(view.frontiers)
    lines: list[list[Cell | str]] = []
    for flops, here in view.results.by_rung.items() if metrics else ():
        points = zip(metrics, points_at(view.frontiers, flops), strict=True)
        cells = [
            Cell(point_text(point), "" if point is None else _point_remark(point, metric, view))
            for metric, point in points
        ]
        lines.append([power_text(flops), str(len(here)), *cells])
    if view.floors and metrics:
        floors = [strongest(view.floors, metric) for metric in metrics]
        cells = [Cell("-") if floor is None else Cell(value_text(floor.value), floor.name) for floor in floors]
        lines.append(["strongest floor", "", *cells])
    note = (
        "A star: reached at a lower rung already. Within error: within two standard errors of the difference. "
        f"Differences are on the same queries, query by query ({UNPAIRED})."
    )
    heads = ["C at most", "trials", *[f"{metric}, {goal_of(metric)[:3]}" for metric in metrics]]
    return Table("The best value of each metric with at most C in one trial", heads, lines, note)


def _point_remark(point: FrontierPoint, metric: str, view: SweepView) -> str:
    change = f"{change_text(point)} against the rung below" if point.change is not None else ""
    names = [str(row["trial"]) + ("" if gap.paired else "~") for row, gap in point.rivals]
    rivals = f"within error: {first_words(names, _NAMED)}" if names else ""
    floor = view.beside_floor(point.row, metric)
    beside = "" if floor is None or point.carried else f"{gap_text(floor.gap)} to {floor.floor.name}"
    return "; ".join(filter(None, [str(point.row["trial"]), size_words(point.row), change, beside, rivals]))


def floor_table(view: SweepView) -> Table:
    """The floors without a model, on the same queries, the strongest marked, with the sweep's best beside them."""
    metrics = view.results.metrics or sorted({metric for values in view.floors.values() for metric in values})
    best_floors = [strongest(view.floors, metric) for metric in metrics]
    lines: list[list[Cell | str]] = []
    for floor, values in view.floors.items():
        name = shown_name(floor)
        kinds = ["best" if best and best.name == name else "" for best in best_floors]
        texts = [value_text(values.get(metric, math.nan)) for metric in metrics]
        lines.append([name, *[Cell(text, kind=kind) for text, kind in zip(texts, kinds, strict=True)]])
    if lines:
        lines.append(["best of the sweep", *[point_text(view.bests.get(metric)) for metric in metrics]])
    return Table("What counting reaches without training", ["floor", *metrics], lines, "On the same queries.")


def spend_table(view: SweepView) -> Table:
    """FLOPs per rung, work without a result, lost and redone work, and what is left under the cap."""
    state, results, failed = view.state, view.results, failed_rows(view.rows)
    failed_flops = Counter[int]()
    for row in failed:
        failed_flops[row["rung"]] += state.trained_flops[row["trial"], row["rung"]]
    entries: list[tuple[str, str, float]] = []
    for rung, flops in enumerate(ladder_of(results, state)):
        num_results, trained_flops = len(results.finished.get(flops, [])), state.trained_at(rung) - failed_flops[rung]
        if num_results or trained_flops:
            entries.append((f"rung {power_text(flops)}", plural(num_results, "result"), trained_flops))
    if failed:
        entries.append(("without a result", str(len(failed)), failed_flops.total()))
    entries += [(what, "", flops) for what, flops in wasted_flops(state).items()]
    spent, cap = state.spent_flops, state.cap_flops or 0
    if cap > spent:
        entries.append(("left under the cap", "", cap - spent))
    total = cap or spent or 1.0
    lines: list[list[Cell | str]] = [
        [what, count, power_text(flops), Cell(f"{flops / total:.0%}", kind="bar", share=flops / total)]
        for what, count, flops in entries
    ]
    note = "Training FLOPs. Lost and redone work counts against the cap; evaluation does not."
    share = "share of the cap" if cap else "share"
    return Table("Where the FLOPs went", ["what", "results", "FLOPs", share], lines, note)


def failure_table(view: SweepView) -> Table:
    """Divergences and lost tasks, each with its reason."""
    lines: list[list[Cell | str]] = [
        [
            str(row["trial"]),
            Cell(power_text(row.get("rung_flops") or 0)),
            Cell(str(row["status"]), kind="text bad"),
            Cell(f"at C = {power_text(row.get('path_flops') or 0)}; {_settings(row)}", kind="wrap"),
        ]
        for row in failed_rows(view.rows)
    ]
    lines += [
        [trial, f"rung {rung}", Cell("lost", kind="text bad"), Cell(reason, kind="wrap")]
        for trial, rung, reason in lost_tasks(view.state)
    ]
    return Table("Divergences and lost tasks", ["trial", "C", "what", "detail"], lines)


def refusal_table(state: SweepState) -> Table:
    """Proposals that never ran, by reason."""
    lines = [[str(reason), str(count)] for reason, count in state.rejected.items()]
    return Table("Proposals refused before they cost anything", ["reason", "count"], lines)


def recipe_table(recipe: Mapping[str, Any] | None, checks: Sequence[Mapping[str, Any]]) -> Table:
    """Every prediction that was trained (ledger records), and that of recipe.json: predicted, measured, inside."""
    shown = list(checks)
    if recipe and not any(_same(recipe, check) for check in checks):
        shown.append(recipe.get("check") or recipe)
    lines: list[list[Cell | str]] = []
    for one in shown:
        measured, error = one.get("measured"), one.get("error")
        verdict = Cell("not trained")
        if measured is not None:
            verdict = Cell("inside") if one["inside"] else Cell("outside", kind="bad")
        foretold = predicted(one)
        ends = ["open" if math.isnan(end) else f"{end:.4g}" for end in (foretold.low, foretold.high)]
        lines.append(
            [
                power_text(one["flops"]),
                str(one["metric"]),
                Cell(value_text(foretold.estimate)),
                Cell(f"[{ends[0]}, {ends[1]}]"),
                Cell("-" if measured is None else value_text(measured, math.nan if error is None else error)),
                verdict,
            ]
        )
    held = f"{calibration_text(checks)}." if checks else ""
    return Table(
        "Recipe: predicted and measured", ["C", "metric", "predicted", "95 % interval", "measured", ""], lines, held
    )


def event_facts(manifest: Mapping[str, Any]) -> Facts:
    """What the sweep was trained on."""
    bad_rows = "; ".join(f"{count} {reason}" for reason, count in manifest["rows_quarantined"].items() if count)
    counts = {
        "users": "users",
        "events": "events",
        "items": "items",
        "catalogue V": "catalogue",
        "targets per epoch": "train_targets",
    }
    return [
        ("log", manifest["name"]),
        ("rows read", f"{manifest['rows_read']:,}"),
        ("quarantined", bad_rows or "none"),
        *((words, f"{manifest[name]:,}") for words, name in counts.items()),
        ("time range", _times(manifest)),
        ("split", _split(manifest)),
        ("item fields", _fields(manifest, "item")),
        ("context fields", _fields(manifest, "context")),
    ]


def protocol_facts(protocol: Mapping[str, Any], scored: int | None) -> Facts:
    """What it was measured with: the first `scored` validation queries (None: all)."""
    parts = protocol["parts"].items()
    return [
        *((f"{name} queries", _queries(part, scored if name == "validation" else None)) for name, part in parts),
        ("seen items", rule_words(protocol)),
        ("equal scores", "each counts half a rank" if protocol["ties"] == "half" else protocol["ties"]),
        ("targets of a query", protocol["target_rule"]),
        ("protocol", protocol["hash"]),
    ]


def provenance_facts(rows: Sequence[Row], known: Mapping[str, object]) -> Facts:
    """Which code, data and machine made the rows; several values of one thing are shown with their counts."""
    names = ("code_version", "flops_version", "protocol_hash", "shards_hash", "device", "dtype", "threads")
    pairs: list[tuple[str, object]] = [(name.replace("_", " "), _tally(rows, name)) for name in names]
    pairs.append(("engines", _counted(Counter(engine_text(row) for row in rung_rows(rows)))))
    return [*pairs, *known.items()]


def _settings(row: Row) -> str:
    config = row.get("config") or {}
    return ", ".join(f"{name} {value:.3g}" for name, value in config.items() if isinstance(value, float))


def _tally(rows: Sequence[Row], name: str) -> str:
    return _counted(Counter(str(row[name]) for row in rung_rows(rows) if row.get(name) is not None))


def _counted(found: Counter[str]) -> str:
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{value} ({plural(count, 'row')})" for value, count in found.most_common())


def _times(manifest: Mapping[str, Any]) -> str:
    first, last = manifest["time_range"]
    if not manifest["has_clock"]:
        return f"positions {first} to {last}"
    return f"{_clock(first, '%Y-%m-%d')} to {_clock(last, '%Y-%m-%d')}"


def _split(manifest: Mapping[str, Any]) -> str:
    parts = []
    for name, value in manifest["split"].items():
        is_time = manifest["has_clock"] and name.endswith("from")
        text = _clock(value, "%Y-%m-%d %H:%M UTC") if is_time else str(value).replace("_", "-")
        parts.append(f"{name.replace('_', ' ')} {text}")
    return ", ".join(parts)


def _queries(part: Mapping[str, Any], scored: int | None) -> str:
    """Headline queries stand first, and after them those inside baskets."""
    text, basket = f"{part['queries']:,} of {part['users']:,} users", part["basket_queries"]
    if scored is not None and scored < part["queries"] + basket:
        text = f"{min(scored, part['queries']):,} scored, the first of {text}"
        basket = max(scored - part["queries"], 0)
    return f"{text}, and {basket:,} inside baskets, reported apart" if basket else text


def _fields(manifest: Mapping[str, Any], side: str) -> str:
    return ", ".join(f"{field['name']} ({field['kind']})" for field in manifest["fields"] if field["side"] == side)


def _clock(milliseconds: int, pattern: str) -> str:
    """A time in UTC; the bare number where a log's clock lies outside the calendar."""
    try:
        return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=milliseconds)).strftime(pattern)
    except OverflowError:
        return f"{milliseconds} ms"


def _same(recipe: Mapping[str, Any], check: Mapping[str, Any]) -> bool:
    return (recipe["flops"], recipe["metric"]) == (check["flops"], check["metric"])
