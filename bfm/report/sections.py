"""The written parts of the report page: rows, state, baselines and provenance in, pieces of HTML out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
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
    metric_error,
    metric_names,
    metric_value,
    no_answers,
    rung_ladder,
    rung_rows,
)
from bfm.report.digits import UNPAIRED, gap_text, value_text
from bfm.report.figures import varied_fields
from bfm.report.floors import Baselines, against_strongest, shown_name, strongest, sweep_verdict
from bfm.report.style import power_text
from bfm.report.tables import (
    behind_text,
    change_text,
    failed_rows,
    lost_tasks,
    point_text,
    trials_in_order,
)
from bfm.report.template import Cell, escape, facts, paragraph, table
from bfm.sweep.state import SweepState
from bfm.units import format_count, format_seconds

_NAMED = 3
"""So many rows within error are named."""
_DEFINITIONS = (
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


def lede(rows: Sequence[Row], state: SweepState, baselines: Baselines, compare: Compare = no_answers) -> str:
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
    fields = varied_fields(rows)
    if fields:
        text += f", varying {_listed([field.replace('_', ' ') for field in fields])}"
    return f"{text}."


def cards(rows: Sequence[Row], state: SweepState, baselines: Baselines, compare: Compare = no_answers) -> str:
    """Best value of each headline metric so far, against the strongest floor; spend against the cap."""
    found = []
    for metric, points in frontiers(rows).items():
        if points:
            best = points[-1]
            size = f"N {format_count(best.row['params'])}, " if best.row.get("params") else ""
            notes = f"{size}{escape(best.row['trial'])} at C = {power_text(float(best.row['rung_flops']))}"
            value = value_text(best.value, best.error).split(" ")[0]
            error = f"\u00b1 {best.error:.2g}, " if math.isfinite(best.error) else ""
            found.append(
                f'<div class="card"><div class="name">{escape(metric)}</div><div class="value">{escape(value)}</div>'
                f'<div class="note">{error}{notes}<br>{_beside_floor(best.row, metric, baselines, compare)}</div></div>'
            )
    spent, cap = state.spent_flops, state.cap_flops
    if spent:
        share = min(spent / cap, 1.0) if cap else 1.0
        under = f"{spent / cap:.0%} of the cap of {power_text(cap)} FLOPs" if cap else "FLOPs of training, no cap"
        found.append(
            f'<div class="card"><div class="name">spent</div><div class="value">{power_text(spent)}</div>'
            f'<div class="meter"><span style="width:{share:.1%}"></span></div><div class="note">{under}</div></div>'
        )
    return f'<div class="cards">{"".join(found)}</div>' if found else ""


def best_table(rows: Sequence[Row], compare: Compare = no_answers) -> str:
    """Best so far per rung and metric, what it brings against the rung below, who holds it and who is within error."""
    told = frontiers(rows, compare)
    metrics = list(told)
    points = {metric: {point.flops: point for point in told[metric]} for metric in metrics}
    lines: list[list[Cell | str]] = []
    for flops, here in by_rung(rows).items():
        line: list[Cell | str] = [Cell(power_text(flops)), Cell(str(len(here)))]
        for metric in metrics:
            point = points[metric].get(flops)
            line.append(Cell(point_text(point), "" if point is None else _point_remark(point)))
        lines.append(line)
    heads = ["C at most", "trials", *[f"{metric}, {goal_of(metric)[:3]}" for metric in metrics]]
    note = (
        "A star: reached at a lower rung already. Within error: within two standard errors of the difference. "
        f"Differences are on the same queries, query by query ({UNPAIRED})."
    )
    return table(heads, lines) + paragraph(note, "muted") if lines and metrics else ""


def _point_remark(point: FrontierPoint) -> str:
    size = f"N {format_count(point.row['params'])}" if point.row.get("params") else ""
    change = f"{change_text(point)} against the rung below" if point.change is not None else ""
    names = [str(row["trial"]) + ("" if gap.paired else "~") for row, gap in point.rivals]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    rivals = f"within error: {', '.join(names[:_NAMED])}{more}" if names else ""
    return "; ".join(part for part in (str(point.row["trial"]), size, change, rivals) if part)


def trial_table(rows: Sequence[Row], compare: Compare = no_answers, *, every_row: bool = False) -> str:
    """Trials at their highest rung, or every rung row, each against the best of its rung; heads sort."""
    results, fields = Results(rows), [field for field in varied_fields(rows) if field != "embedder_share"]
    shown = rung_rows(rows) if every_row else trials_in_order(results)
    best = {metric: points[-1].row for metric, points in results.frontiers().items() if points}
    metrics, bests = results.metrics, {metric: results.bests(metric) for metric in results.metrics}
    lines: list[list[Cell | str]] = []
    for row in shown:
        status = str(row.get("status", "ok"))
        line: list[Cell | str] = [
            Cell(str(row["trial"])),
            Cell(status, kind="" if status == "ok" else "bad"),
            _numeric(row.get("rung_flops"), power_text),
            _numeric(row.get("params"), format_count),
            _numeric(row.get("embedder_share"), lambda share: f"{share:.2%}"),
        ]
        for metric in metrics:
            value = metric_value(row, metric)
            kind = "best" if best.get(metric) is row else ""
            behind = behind_text(row, bests[metric].get(row["rung_flops"]), metric, compare)
            line.append(Cell(value_text(value, metric_error(row, metric)), behind, value=value, kind=kind))
        config = row.get("config") or {}
        line += [_numeric(config.get(field), lambda value: f"{value:.4g}") for field in fields]
        line += [
            _numeric(row.get("events"), format_count),
            _numeric(_ratio(row.get("events"), row.get("params")), lambda value: f"{value:.3g}"),
            _numeric(row.get("epochs"), lambda value: f"{value:.2f}"),
            _numeric(row.get("batch_events"), format_count),
            _numeric(row.get("steps"), format_count),
            _numeric(row.get("train_s"), format_seconds),
            Cell(_engine(row)),
        ]
        lines.append(line)
    heads = ["trial", "status", "C", "N", "s", *metrics, *[field.replace("_", " ") for field in fields]]
    return table([*heads, "D", "D/N", "epochs", "B", "steps", "training", "engine"], lines, sortable=True)


def baseline_table(rows: Sequence[Row], baselines: Baselines) -> str:
    """The floors without a model, on the same queries, the strongest marked, with the sweep's best beside them."""
    metrics = metric_names(rows) or sorted({metric for values in baselines.values() for metric in values})
    if not baselines:
        return ""
    best_floors = {metric: strongest(baselines, metric) for metric in metrics}

    def cell(name: str, metric: str, value: float) -> Cell:
        floor = best_floors[metric]
        return Cell(value_text(value), kind="best" if floor is not None and floor[0] == name else "")

    lines = [
        [Cell(name), *[cell(name, metric, values.get(metric, math.nan)) for metric in metrics]]
        for name, values in ((shown_name(floor), values) for floor, values in baselines.items())
    ]
    best = {metric: points[-1] for metric, points in frontiers(rows).items() if points}
    lines.append([Cell("best of the sweep"), *[Cell(point_text(best.get(metric))) for metric in metrics]])
    return table(["", *metrics], lines)


def failures_part(rows: Sequence[Row], state: SweepState) -> str:
    """Divergences, lost tasks and refused proposals, each with its reason."""
    lines: list[list[Cell | str]] = [
        [
            Cell(str(row["trial"])),
            _numeric(row.get("rung_flops"), power_text),
            Cell(str(row["status"]), kind="text bad"),
            Cell(f"at C = {power_text(float(row.get('path_flops') or 0))}; {_settings(row)}", kind="wrap"),
        ]
        for row in failed_rows(rows)
    ]
    lines += [
        [
            Cell(trial),
            Cell(f"rung {rung}"),
            Cell("lost", kind="text bad"),
            Cell(reason, kind="wrap"),
        ]
        for trial, rung, reason in lost_tasks(state)
    ]
    refused = [[Cell(str(reason)), Cell(str(count))] for reason, count in state.rejected.items()]
    parts = [table(["trial", "C", "what", "detail"], lines)]
    if refused:
        parts += ["<h3>Proposals refused before they cost anything</h3>", table(["reason", "count"], refused)]
    return "".join(parts) or paragraph("Nothing diverged, nothing was lost, nothing was refused.")


def data_part(extra: Mapping[str, Any], scored: int | None = None) -> str:
    """What the sweep was trained on, and measured with: the first `scored` validation queries (None: all)."""
    manifest, protocol = extra.get("manifest"), extra.get("protocol")
    events = f"<h3>Events</h3>{facts(_events(manifest))}" if manifest else ""
    return events + (f"<h3>Evaluation protocol</h3>{facts(_rules(protocol, scored))}" if protocol else "")


def _events(manifest: Mapping[str, Any]) -> list[tuple[str, object]]:
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


def _rules(protocol: Mapping[str, Any], scored: int | None) -> list[tuple[str, object]]:
    parts = protocol["parts"].items()
    return [
        *((f"{name} queries", _queries(part, scored if name == "validation" else None)) for name, part in parts),
        ("seen items", rule_words(protocol)),
        ("equal scores", "each counts half a rank" if protocol["ties"] == "half" else protocol["ties"]),
        ("targets of a query", protocol["target_rule"]),
        ("protocol", protocol["hash"]),
    ]


def provenance_part(rows: Sequence[Row], extra: Mapping[str, Any]) -> str:
    """Which code, data and machine made the rows; several values of one thing are shown with their counts."""
    names = ("code_version", "flops_version", "protocol_hash", "shards_hash", "device", "dtype", "threads")
    pairs: list[tuple[str, object]] = [(name.replace("_", " "), _tally(rows, name)) for name in names]
    pairs.append(("engines", _counted(Counter(_engine(row) for row in rung_rows(rows)))))
    pairs += [(str(name), value) for name, value in (extra.get("provenance") or {}).items()]
    return facts(pairs)


def definitions_part() -> str:
    """The words of the page."""
    return facts([(word, meaning) for word, meaning in _DEFINITIONS])


def _beside_floor(row: Row, metric: str, baselines: Baselines, compare: Compare) -> str:
    found = against_strongest(row, metric, baselines, compare)
    if found is None:
        return ""
    kind = {"above": ' class="gain"', "below": ' class="loss"'}.get(found.side, "")
    amount = f"{gap_text(found.gap)} to {found.reference:.3g}"
    return f"<span{kind}>{found.side} the strongest floor, {escape(found.floor)}: {escape(amount)}</span>"


def _numeric(value: object, text: Any) -> Cell:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return Cell("-", value=math.nan)
    return Cell(text(float(value)), value=float(value))


def _ratio(upper: object, lower: object) -> float:
    numbers = isinstance(upper, (int, float)) and isinstance(lower, (int, float))
    return upper / lower if numbers and lower else math.nan  # type: ignore[operator]


def _engine(row: Row) -> str:
    name = row.get("engine") or "-"
    if name == "zero" and row.get("zero_stage") is not None:
        name = f"ZeRO-{row['zero_stage']}"
    return f"{name}, {_plural(int(row.get('workers') or 1), 'worker')}"


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
