"""The written parts of the report page: rows, state, baselines and provenance in, tables and facts out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from bfm.events.repeats import rule_words
from bfm.laws.frontier import (
    Compare,
    FrontierPoint,
    Results,
    Row,
    by_rung,
    frontiers,
    goal_of,
    metric_names,
    rung_ladder,
    rung_rows,
)
from bfm.report.digits import UNPAIRED, gap_text, power_text, value_text
from bfm.report.floors import Baselines, against_strongest, against_words, shown_name, strongest, sweep_verdict
from bfm.report.render import Cell, Facts, Table
from bfm.report.sweep_data import engine_text, varied_choices, varied_fields
from bfm.report.tables import change_text, failed_rows, lost_tasks, point_text
from bfm.sweep.state import SweepState
from bfm.units import format_count

_NAMED = 3
"""So many rows within error are named."""
DEFINITIONS = (
    (
        "C",
        "training FLOPs (forward and backward) on the path that made a result: matmuls as the reference implementation "
        "runs them; evaluation, recomputation and lost work are not in it",
    ),
    ("rung", "a step of the ladder of C; a result at a rung has spent exactly that C within 1 %"),
    ("trial", "one configuration and seed, trained along the ladder as far as it was promoted"),
    ("frontier", "the best value of a metric reachable with at most C in one trial"),
    (
        "N",
        "dense weights after the field tokens and before the final logits: embedder + contextualizer; stem and tables "
        "are counted apart",
    ),
    ("s", "embedder share: embedder weights / N"),
    ("D", "training positions with a next-event target, repeats counted; epochs = D / distinct ones"),
    ("B", "mean target positions of one optimizer step"),
    ("nll", "exact negative log-likelihood over the full catalogue, in nats per warm target"),
    (
        "recall@k, ndcg@k, mrr@k",
        "means over queries against the full catalogue; a target unseen in training is a miss, and so is one that the "
        "user had before where lists leave those out",
    ),
    (
        "floor",
        "what counting reaches without training: popularity, co-occurrence, the personal history; a model is below it "
        "where counting does better",
    ),
    ("coverage@k", "share of the catalogue that appears in any query's top k"),
    (
        "\u00b1",
        "one standard error over queries, clustered by user; it holds no seed-to-seed spread. That of a difference is "
        "of the differences query by query, as all rows answer the same ones",
    ),
    ("within error", "less than two standard errors of the difference from the best"),
)


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


def lede(rows: Sequence[Row], state: SweepState, baselines: Baselines, compare: Compare) -> str:
    """What was swept and what it cost, and whether anything is worth more than counting."""
    best = {metric: points[-1].row for metric, points in frontiers(rows).items() if points}
    return f"{_headline(rows, state)} {sweep_verdict(best, baselines, compare)}".strip()


def _headline(rows: Sequence[Row], state: SweepState) -> str:
    results = [row for row in rung_rows(rows) if row.get("status", "ok") == "ok"]
    trials = {str(row["trial"]) for row in rung_rows(rows)}
    if not trials:
        return "No result is in the ledger yet."
    ladder = rung_ladder(rows) if state.spec is None else state.spec["budget"]["ladder_flops"]
    steps = ", ".join(power_text(flops) for flops in ladder[:8])
    sizes = [float(row["params"]) for row in rung_rows(rows) if row.get("params")]
    text = f"{_plural(len(trials), 'trial')} with {_plural(len(results), 'result')} on a ladder of C = {steps} FLOPs"
    if sizes:
        text += f", model sizes N from {format_count(min(sizes))} to {format_count(max(sizes))}"
    fields = [*varied_fields(rows), *varied_choices(rows)]
    if fields:
        text += f", varying {_listed([field.replace('_', ' ') for field in fields])}"
    return f"{text}."


def cards(rows: Sequence[Row], state: SweepState, baselines: Baselines, compare: Compare) -> list[Card]:
    """Best value of each headline metric so far, against the strongest floor; spend against the cap."""
    found = []
    for metric, points in frontiers(rows).items():
        if points:
            best = points[-1]
            size = f"N {format_count(best.row['params'])}, " if best.row.get("params") else ""
            error = f"\u00b1 {best.error:.2g}, " if math.isfinite(best.error) else ""
            note = f"{error}{size}{best.row['trial']} at C = {power_text(float(best.row['rung_flops']))}"
            floor = against_strongest(best.row, metric, baselines, compare)
            side = "" if floor is None else {"above": "gain", "below": "loss"}.get(floor.side, "")
            words = against_words(best.row, metric, baselines, compare)
            value = value_text(best.value, best.error).split(" ")[0]
            found.append(Card(metric, value, note, words, side))
    spent, cap = state.spent_flops, state.cap_flops
    if spent:
        share = min(spent / cap, 1.0) if cap else 1.0
        under = f"{spent / cap:.0%} of the cap of {power_text(cap)} FLOPs" if cap else "FLOPs of training, no cap"
        found.append(Card("spent", power_text(spent), under, share=share))
    return found


def best_table(results: Results, baselines: Baselines, compare: Compare) -> Table:
    """Best so far per rung and metric beside the strongest floor, what it brings against the rung below, who holds it
    and who is within error."""
    told = results.frontiers(compare)
    points = {metric: {point.flops: point for point in told[metric]} for metric in told}
    lines: list[list[Cell | str]] = []
    for flops, here in results.by_rung.items():
        line: list[Cell | str] = [power_text(flops), str(len(here))]
        for metric in told:
            point = points[metric].get(flops)
            remark = "" if point is None else _point_remark(point, metric, baselines, compare)
            line.append(Cell(point_text(point), remark))
        lines.append(line)
    if baselines and told:
        floors = [strongest(baselines, metric) for metric in told]
        cells = [Cell("-") if floor is None else Cell(value_text(floor[1]), floor[0]) for floor in floors]
        lines.append(["strongest floor", "", *cells])
    note = (
        "A star: reached at a lower rung already. Within error: within two standard errors of the difference. "
        f"Differences are on the same queries, query by query ({UNPAIRED})."
    )
    heads = ["C at most", "trials", *[f"{metric}, {goal_of(metric)[:3]}" for metric in told]]
    return Table("The best value of each metric with at most C in one trial", heads, lines if told else [], note)


def _point_remark(point: FrontierPoint, metric: str, baselines: Baselines, compare: Compare) -> str:
    size = f"N {format_count(point.row['params'])}" if point.row.get("params") else ""
    change = f"{change_text(point)} against the rung below" if point.change is not None else ""
    names = [str(row["trial"]) + ("" if gap.paired else "~") for row, gap in point.rivals]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    rivals = f"within error: {', '.join(names[:_NAMED])}{more}" if names else ""
    floor = against_strongest(point.row, metric, baselines, compare)
    beside = "" if floor is None or point.carried else f"{gap_text(floor.gap)} to {floor.floor}"
    return "; ".join(part for part in (str(point.row["trial"]), size, change, beside, rivals) if part)


def baseline_table(rows: Sequence[Row], baselines: Baselines) -> Table:
    """The floors without a model, on the same queries, the strongest marked, with the sweep's best beside them."""
    metrics = metric_names(rows) or sorted({metric for values in baselines.values() for metric in values})
    best_floors = {metric: strongest(baselines, metric) for metric in metrics}

    def cell(name: str, metric: str, value: float) -> Cell:
        floor = best_floors[metric]
        return Cell(value_text(value), kind="best" if floor is not None and floor[0] == name else "")

    lines: list[list[Cell | str]] = [
        [name, *[cell(name, metric, values.get(metric, math.nan)) for metric in metrics]]
        for name, values in ((shown_name(floor), values) for floor, values in baselines.items())
    ]
    best = {metric: points[-1] for metric, points in frontiers(rows).items() if points}
    if lines:
        lines.append(["best of the sweep", *[Cell(point_text(best.get(metric))) for metric in metrics]])
    return Table("What counting reaches without training", ["floor", *metrics], lines, "On the same queries.")


def spend_table(rows: Sequence[Row], state: SweepState) -> Table:
    """FLOPs per rung, diverged and lost work, and what is left under the cap."""
    entries = []
    for flops, here in by_rung(rows).items():
        finished = [row for row in here if row.get("status", "ok") == "ok"]
        entries.append((f"rung {power_text(flops)}", _plural(len(finished), "result"), sum(map(_spent, finished))))
    if failed := failed_rows(rows):
        entries.append(("without a result", str(len(failed)), sum(map(_spent, failed))))
    in_rows = sum(spent for _, _, spent in entries)
    spent_all, cap = float(state.spent_flops or in_rows), float(state.cap_flops or 0.0)
    if spent_all - in_rows > 1e-3 * max(spent_all, 1.0):
        entries.append(("lost, redone, probes", "", spent_all - in_rows))
    if cap > spent_all:
        entries.append(("left under the cap", "", cap - spent_all))
    total = cap or spent_all or 1.0
    lines: list[list[Cell | str]] = [
        [what, count, power_text(flops), Cell(f"{flops / total:.0%}", kind="bar", share=flops / total)]
        for what, count, flops in entries
    ]
    note = "Training FLOPs. Lost and redone work counts against the cap; evaluation does not."
    share = "share of the cap" if cap else "share"
    return Table("Where the FLOPs went", ["what", "results", "FLOPs", share], lines, note)


def failure_table(rows: Sequence[Row], state: SweepState) -> Table:
    """Divergences and lost tasks, each with its reason."""
    lines: list[list[Cell | str]] = [
        [
            str(row["trial"]),
            Cell(power_text(float(row.get("rung_flops") or 0))),
            Cell(str(row["status"]), kind="text bad"),
            Cell(f"at C = {power_text(float(row.get('path_flops') or 0))}; {_settings(row)}", kind="wrap"),
        ]
        for row in failed_rows(rows)
    ]
    lines += [
        [trial, f"rung {rung}", Cell("lost", kind="text bad"), Cell(reason, kind="wrap")]
        for trial, rung, reason in lost_tasks(state)
    ]
    return Table("Divergences and lost tasks", ["trial", "C", "what", "detail"], lines)


def refusal_table(state: SweepState) -> Table:
    """Proposals that never ran, by reason."""
    lines = [[str(reason), str(count)] for reason, count in state.rejected.items()]
    return Table("Proposals refused before they cost anything", ["reason", "count"], lines)


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


def provenance_facts(rows: Sequence[Row], extra: Mapping[str, Any]) -> Facts:
    """Which code, data and machine made the rows; several values of one thing are shown with their counts."""
    names = ("code_version", "flops_version", "protocol_hash", "shards_hash", "device", "dtype", "threads")
    pairs: list[tuple[str, object]] = [(name.replace("_", " "), _tally(rows, name)) for name in names]
    pairs.append(("engines", _counted(Counter(engine_text(row) for row in rung_rows(rows)))))
    pairs += [(str(name), value) for name, value in (extra.get("provenance") or {}).items()]
    return pairs


def _spent(row: Row) -> float:
    return float(row.get("task_flops") or 0.0)


def _settings(row: Row) -> str:
    config = row.get("config") or {}
    return ", ".join(f"{name} {value:.3g}" for name, value in config.items() if isinstance(value, float))


def _tally(rows: Sequence[Row], name: str) -> str:
    return _counted(Counter(str(row[name]) for row in rung_rows(rows) if row.get(name) is not None))


def _counted(found: Counter[str]) -> str:
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{value} ({_plural(count, 'row')})" for value, count in found.most_common())


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


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
