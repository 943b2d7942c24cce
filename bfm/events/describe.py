"""What a person wants to know first about a shard set: `describe` computes it, `format_description` writes it.

Figures of the raw log (order inside ties, item features that conflict) were measured by `data prepare` and stand in
the manifest's `checks`; all others are computed here from the shards, in chunks of users.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from bfm.events.protocol import PARTS, Protocol
from bfm.events.shards import Shards
from bfm.events.ties import Ties, count_ties, tie_facts
from bfm.events.times import are_plausible
from bfm.ragged import distinct
from bfm.units import format_count

_QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
_FACTS = ("name", "users", "events", "items", "catalogue", "has_clock", "rows_read", "rows_quarantined", "checks")


def describe(shards: Shards) -> dict[str, Any]:
    """JSON-able description of a finished shard set."""
    manifest = shards.manifest
    return {
        **{name: getattr(manifest, name) for name in _FACTS},
        "time_range": list(manifest.time_range),
        "history_length": _history_lengths(shards),
        "popularity": _popularity(shards.train_counts),
        **_repeats_and_ties(shards),
        "split": _split(shards),
        "protocol": _protocol(shards),
        "fields": [field.as_dict() for field in manifest.fields],
        "hash": shards.hash,
    }


def _history_lengths(shards: Shards) -> dict[str, Any]:
    lengths = shards.user_lengths
    quantiles = np.quantile(lengths, list(_QUANTILES.values()), method="inverted_cdf")
    figures = {name: int(value) for name, value in zip(_QUANTILES, quantiles, strict=True)}
    return {**figures, "mean": float(lengths.mean()), "users_with_one_event": int((lengths == 1).sum())}


def _popularity(counts: np.ndarray) -> dict[str, float]:
    """Of training events: shares of the most popular items, and the Gini coefficient of the counts."""
    total, num = counts.sum(), len(counts)
    # Counts fall with the id, so the Lorenz curve is summed from the end.
    rising = counts[::-1].astype(np.float64)
    gini = (2 * np.sum(np.arange(1, num + 1) * rising) / (num * total)) - (num + 1) / num
    return {
        "top_1_percent_share": float(counts[: -(-num // 100)].sum() / total),
        "top_10_percent_share": float(counts[: -(-num // 10)].sum() / total),
        "gini": float(gini),
        "items_with_one_training_event": int((counts == 1).sum()),
    }


def _repeats_and_ties(shards: Shards) -> dict[str, Any]:
    """Share of events whose item the user had before; ties, and whether their stored order is monotone in the item."""
    first_times, ties = 0, Ties()
    for user, _, index in shards.user_events(shards.all_events):
        item = shards.item_at(index)
        first_times += len(distinct(user * np.int64(shards.num_items) + item))
        ties += count_ties(user, shards.time_at(index), {"item": pa.array(item)})
    return {"repeat_share": 1 - first_times / shards.manifest.events, "ties_stored": tie_facts(ties)}


def _split(shards: Shards) -> dict[str, Any]:
    train, valid, every = shards.train_lengths, shards.valid_lengths, shards.user_lengths
    parts = {"train": train, "validation": valid - train, "test": every - valid}
    figures = {name: {"events": int(part.sum()), "users": int((part > 0).sum())} for name, part in parts.items()}
    return {**shards.manifest.split, **figures, "train_targets": shards.manifest.train_targets}


def _protocol(shards: Shards) -> dict[str, Any]:
    protocol = Protocol.load(shards)
    info = protocol.info
    parts = {}
    for name, part in info["parts"].items():
        shown = {key: value for key, value in part.items() if not key.endswith("sha256")}
        parts[name] = {**shown, "cold_target_share": part["cold_targets"] / max(part["targets"], 1)}
    rule = {key: info[key] for key in ("filter_seen", "filter_seen_by", "training_repeats")}
    return {"hash": protocol.hash, **rule, "seen_rule": protocol.seen_rule, "parts": parts}


# ---------------------------------------------------------------- text


def format_description(description: dict[str, Any]) -> str:
    """The description as lines for people."""
    d = description
    lengths, popularity, split = d["history_length"], d["popularity"], d["split"]
    quarantined = ", ".join(f"{reason} {count:,}" for reason, count in sorted(d["rows_quarantined"].items()))
    lines = [
        f"{d['name']}: {d['events']:,} events, {d['users']:,} users, {d['items']:,} items",
        f"rows read      {d['rows_read']:,}; quarantined: {quarantined or 'none'}",
        f"time           {time_text(d['time_range'], d['has_clock'])}",
        "history        "
        + ", ".join(f"{name} {lengths[name]:,}" for name in _QUANTILES)
        + f", mean {lengths['mean']:.1f}; {lengths['users_with_one_event']:,} users with one event",
        f"popularity     top 1% of items have {popularity['top_1_percent_share']:.1%} of training events, "
        f"top 10% {popularity['top_10_percent_share']:.1%}, Gini {popularity['gini']:.3f}; "
        f"{popularity['items_with_one_training_event']:,} items with one",
        f"repeats        {d['repeat_share']:.1%} of events are of an item that the user had before",
        f"ties in time   {d['ties_stored']['share']:.1%} of events share the time of the user's previous event",
        f"split          by {split['by']}: "
        + "; ".join(f"{part} {split[part]['events']:,} events of {split[part]['users']:,} users" for part in _PARTS),
        f"catalogue      {d['catalogue']:,} items known in training, {d['items'] - d['catalogue']:,} cold",
    ]
    for name in PARTS:
        part = d["protocol"]["parts"][name]
        lines.append(
            f"{name:<14} {part['queries']:,} queries of {part['candidates']:,} possible, {part['users']:,} users; "
            f"{part['basket_queries']:,} inside baskets; {part['cold_target_share']:.1%} of targets are cold"
        )
    lines += [_field_line(field, d["catalogue"]) for field in d["fields"]]
    lines.append(_tables_line(d["fields"]))
    lines += [f"cut            {line}" for line in cut_lines(d["checks"].get("cuts", {}))]
    lines += [
        f"{name.replace('_', ' '):<14} {_check_text(value)}"
        for name, value in sorted(d["checks"].items())
        if name != "cuts"
    ]
    return "\n".join(lines + _warnings(d))


_PARTS = ("train", "validation", "test")
_EXAMPLE_WIDTH = 16
# A weight, its gradient and AdamW's two moments in float32.
_NUMBER_BYTES = 16


def cut_lines(cuts: dict[str, dict[str, Any]]) -> list[str]:
    """The manifest's check `cuts` as lines for people: per field what is kept, how much was cut, and what to do."""
    lines = []
    for name, cut in sorted(cuts.items()):
        reason = "a larger max_length keeps more" if cut["by_max_length"] else "none in training is longer"
        lines.append(
            f"{name}: {cut['cut']:,} of {cut['values']:,} {cut['of']} with a value ({cut['cut'] / cut['values']:.1%}) "
            f"have more than {cut['kept']} {cut['unit']}, {cut['lost']:,} {cut['unit']} left out; {reason}"
        )
    return lines


def _field_line(field: dict[str, Any], catalogue: int) -> str:
    rows = f", {format_count(field['rows'])} table rows" if field["rows"] else ""
    if field["name"] == "item_id":
        rows += f", {2 * catalogue / field['rows']:.2g} items a row"
    return f"field          {field['side']} {field['name']}: {field['kind']}{rows}"


def _tables_line(fields: list[dict[str, Any]]) -> str:
    rows = sum(field["rows"] for field in fields)
    return (
        f"tables         {format_count(rows)} rows in all: training holds "
        f"{rows * _EXAMPLE_WIDTH * _NUMBER_BYTES / (1 << 20):.3g} MiB for tables of width {_EXAMPLE_WIDTH}"
    )


def _check_text(value: Any) -> str:
    if isinstance(value, dict):
        shown = {key: entry for key, entry in value.items() if key != "warning"}
        return ", ".join(f"{key} {_check_text(entry)}" for key, entry in shown.items()) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _warnings(d: dict[str, Any]) -> list[str]:
    raw = [check.get("warning") for check in d["checks"].values() if isinstance(check, dict)]
    lines = [f"warning: {text}" for text in raw if text]
    if d["ties_stored"]["warning"]:
        lines.append(f"warning: in the shards themselves, {d['ties_stored']['warning']}")
    return lines


def time_text(time_range: Sequence[int], has_clock: bool) -> str:
    """From when to when; what is before 1980 or after 2100 is doubted."""
    if not has_clock:
        return f"positions {time_range[0]:,} to {time_range[1]:,}"
    epoch = datetime.datetime(1970, 1, 1)
    first, last = (epoch + datetime.timedelta(milliseconds=value) for value in time_range)
    doubt = "" if are_plausible(*time_range) else ": is the unit right?"
    return f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC ({(last - first).days:,} days){doubt}"
