"""From sorted partitions to a finished shard set: statistics, fit, shards, protocol, manifest (see prepare.py).

measure_partition per partition: partial statistics of items and fields over the training range
fit_all           once: item ids, field values, fitted fields
write_partition   per partition: one shard
finish_set        once: evaluation protocol, manifest
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bfm.errors import UserError
from bfm.events import clean, fitting, source
from bfm.events.encoding import write_items
from bfm.events.fields import FittedField, Side
from bfm.events.fitting import Fitted, Loss
from bfm.events.items import (
    ITEM_ID,
    POPULARITY,
    Items,
    choose_values,
    count_items,
    count_values,
    join_item_table,
    key_columns,
    merge_items,
)
from bfm.events.manifest import Manifest
from bfm.events.prepare import ROW_HASH, Job, PartitionFacts, quarantined, read_arrow, rows_read, write_arrow
from bfm.events.protocol import build_protocol
from bfm.events.schema import MAX_LENGTH, FieldSpec
from bfm.events.shards import Shards, finish, write_shard
from bfm.events.split import Split
from bfm.events.ties import TieCounts

# Share of training events whose item features are not the item's: above it, `describe` warns.
_MANY_CONFLICTS = 0.05


# ---------------------------------------------------------------- statistics


def measure_partition(job: Job, split: Split, shard: int) -> None:
    """Write partial statistics of a shard in the making over the training range, one file per field."""
    table = read_arrow(job.files("sorted", "arrow")[shard])
    time = table[clean.TIME].to_numpy()
    offsets = user_offsets(table)
    train_end, _ = split.ends(time, offsets)
    train = np.arange(len(time)) - np.repeat(offsets[:-1], np.diff(offsets)) < np.repeat(train_end, np.diff(offsets))
    item = _column(table, clean.ITEM)
    columns = {"item": item, "train_count": train.astype(np.int64), "first_time": time, "first_hash": table[ROW_HASH]}
    events = pa.table(columns)
    write_arrow(job.file("items", shard, "arrow"), count_items(events))
    for name in job.event_item_fields:
        values = events.append_column("value", _column(table, clean.item_column(name)))
        write_arrow(job.file(f"values-{name}", shard, "arrow"), count_values(values))
    for name, spec in job.schema.context_fields.items():
        values = _column(table, clean.context_column(name))
        statistics = fitting.measure(values, spec.kind, train.astype(np.int64))
        job.save(f"context-{name}", shard, statistics)
    job.save("measured", shard, (int(train_end.sum()), int(np.maximum(train_end - 1, 0).sum())))


def user_offsets(table: pa.Table) -> np.ndarray:
    """Int64 [U+1]: first row of each user of a sorted partition."""
    user = _column(table, clean.USER)
    return np.searchsorted(user.indices.to_numpy(), np.arange(len(user.dictionary) + 1)).astype(np.int64)


def _column(table: pa.Table, name: str) -> pa.Array:
    column = table[name]
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


# ---------------------------------------------------------------- fit


def fit_all(job: Job) -> dict[str, Any]:
    """Number the items, choose their values, fit all fields; writes items and vocabularies into the shard set.

    Returns:
        Checks for the manifest.

    Raises:
        UserError: a single item, nothing to train on, or a vector field without values.
    """
    items = merge_items(_partials(job, "items"))
    if len(items.keys) == 1:
        raise UserError("the log has a single item", key="item", fix="nothing can be ranked; check the item column")
    if sum(targets for _, targets in job.load("measured")) == 0:
        fix = "check the split and the user column"
        raise UserError("no user has two events in the training range", key="split", fix=fix)
    texts, checks = _item_texts(job, items)
    raw = {name: clean.from_text(texts[name], spec.kind) for name, spec in job.schema.item_fields.items()}
    popularity = pa.array(items.train_count.astype(np.float64))
    statistics = {
        name: fitting.measure(raw[name], spec.kind, items.train_count) for name, spec in job.schema.item_fields.items()
    }
    statistics |= {name: fitting.merge(list(job.load(f"context-{name}"))) for name in job.schema.context_fields}

    def declared(side: Side, specs: dict[str, FieldSpec]) -> list[Fitted]:
        return [fitting.fit(name, side, spec.kind, statistics[name], spec.max_length) for name, spec in specs.items()]

    fields = declared("item", job.schema.item_fields)
    if job.schema.id_field:
        rows = job.schema.hash_rows or fitting.id_table_rows(items.catalogue)
        fields.append(Fitted(fitting.hashed_field(ITEM_ID, "item", rows)))
    if job.schema.popularity_field:
        of_catalogue = fitting.measure(popularity, "numeric", (items.train_count > 0).astype(np.int64))
        fields.append(fitting.fit(POPULARITY, "item", "numeric", of_catalogue))
    values = {**raw, ITEM_ID: items.keys, POPULARITY: popularity}
    encoded = {each.field.name: fitting.encode(values[each.field.name], each) for each in fields}
    fields += declared("context", job.schema.context_fields)

    counts = {"train_count": pa.array(items.train_count), "first_time": pa.array(items.first_time)}
    write_items(
        job.shard_set,
        pa.table({**key_columns(job.schema, items), **counts, **raw}),
        {name: array for name, (array, _) in encoded.items()},
        {fitted.field.name: fitted.vocabulary for fitted in fields if fitted.vocabulary is not None},
    )
    write_arrow(job.file("fitted", 0, "arrow"), pa.table({"key": items.keys, **counts}))
    job.save("fields", 0, fields)
    job.save("item-losses", 0, {name: loss for name, (_, loss) in encoded.items()})
    return {**checks, "no_value_in_training": [name for name, found in statistics.items() if found.known == 0]}


def _partials(job: Job, stage: str) -> list[pa.Table]:
    return [read_arrow(path) for path in job.files(stage, "arrow")]


def _item_texts(job: Job, items: Items) -> tuple[dict[str, pa.Array], dict[str, Any]]:
    """Field values as text [I], and what the checks say about reading and joining."""
    train_events = int(items.train_count.sum())
    repairs: Counter[tuple[str, str]] = Counter()
    ties = TieCounts()
    for piece in job.load("read"):
        repairs.update(piece.repairs)
        ties += piece.ties
    checks: dict[str, Any] = {"ties_raw": ties.as_dict(), "item_conflicts": {}}
    texts = {}
    for name in job.event_item_fields:
        texts[name], conflicts = choose_values(_partials(job, f"values-{name}"), items)
        checks["item_conflicts"][name] = conflicts / train_events
    if job.item_table is not None:
        raw = source.read_table(job.item_table, job.table_columns)
        joined, misfits = join_item_table(job.schema, raw, job.table_item_fields, items, repairs)
        texts |= joined
        checks |= misfits
    many = [name for name, share in checks["item_conflicts"].items() if share > _MANY_CONFLICTS]
    if many:
        shown = ", ".join(f"{name} in {checks['item_conflicts'][name]:.1%} of training events" for name in many)
        what = f"item fields that are not unique to the item: {shown}; what varies per event should be a context field"
        checks["item_conflicts"]["warning"] = what
    checks["repairs"] = {f"{name}: {fault}": count for (name, fault), count in sorted(repairs.items())}
    return texts, checks


def _fields(job: Job) -> list[Fitted]:
    return next(job.load("fields"))


# ---------------------------------------------------------------- write


@lru_cache(maxsize=1)
def _items(job_folder: Path) -> Items:
    # One worker writes many partitions; the item keys are its largest table.
    table = read_arrow(job_folder / "work" / "fitted" / "00000.arrow")
    keys, counts, first = (table[name].combine_chunks() for name in table.column_names)
    return Items(keys, counts.to_numpy(), first.to_numpy())


def write_partition(job: Job, split: Split, shard: int) -> None:
    """Encode the sorted partition that becomes this shard, and write it."""
    table = read_arrow(job.files("sorted", "arrow")[shard])
    offsets, time = user_offsets(table), table[clean.TIME].to_numpy()
    encoded = {
        fitted.field.name: fitting.encode(_column(table, clean.context_column(fitted.field.name)), fitted)
        for fitted in _fields(job)
        if fitted.field.side == "context"
    }
    train_end, valid_end = split.ends(time, offsets)
    write_shard(
        job.shard_set,
        shard,
        item=_items(job.folder).ids(_column(table, clean.ITEM)),
        time=time,
        context={name: array for name, (array, _) in encoded.items()},
        user_offsets=offsets,
        train_end=train_end,
        valid_end=valid_end,
        users=_column(table, clean.USER).dictionary,
    )
    job.save("written", shard, {name: loss for name, (_, loss) in encoded.items()})


def finish_set(job: Job, split: Split, checks: dict[str, Any]) -> Manifest:
    """Choose the queries, publish the manifest in the staged shard set."""
    partitions: list[PartitionFacts] = list(job.load("sorted"))
    fields = tuple(fitted.field for fitted in _fields(job))
    checks = _with_losses(job, fields, checks)
    users = sum(partition.users for partition in partitions)
    if users == 1:
        checks["users"] = {"warning": "there is a single user: standard errors over users do not exist"}
    measured = list(job.load("measured"))
    times = [partition.time_range for partition in partitions if partition.events]
    items = _items(job.folder)
    draft = Manifest(
        name=job.schema.name,
        seed=job.seed,
        users=users,
        events=sum(partition.events for partition in partitions),
        items=len(items.keys),
        catalogue=items.catalogue,
        shards=len(partitions),
        has_clock=job.schema.has_clock,
        split=split.as_dict(),
        fields=fields,
        event_item_fields=tuple(job.event_item_fields),
        train_events=sum(events for events, _ in measured),
        train_targets=sum(targets for _, targets in measured),
        time_range=(min(first for first, _ in times), max(last for _, last in times)),
        rows_read=rows_read(job),
        rows_quarantined=quarantined(partitions),
        schema=job.schema.model_dump(mode="json", exclude_none=True),
    )
    shards = Shards(job.shard_set, draft)
    asked = job.schema.evaluation
    protocol = build_protocol(shards, queries=asked.queries, filter_seen=asked.filter_seen, seed=job.seed)
    checks["seen_items"] = protocol.seen_rule
    checks = {name: check for name, check in checks.items() if check}
    return finish(job.shard_set, dataclasses.replace(draft, checks=checks))


def _with_losses(job: Job, fields: tuple[FittedField, ...], checks: dict[str, Any]) -> dict[str, Any]:
    """The checks of `fit_all`, and what encoding made missing or cut."""
    repairs, cuts = Counter(checks["repairs"]), {}
    found = [*job.load("item-losses"), *job.load("written")]
    for field in fields:
        loss = sum((losses[field.name] for losses in found if field.name in losses), Loss())
        if loss["missing"]:
            repairs[f"{field.name}: {fitting.LOST[field.kind]}"] += loss["missing"]
        if loss["cut"]:
            specs, of = (
                (job.schema.item_fields, "items") if field.side == "item" else (job.schema.context_fields, "events")
            )
            limit = specs[field.name].max_length or MAX_LENGTH[field.kind]
            cuts[field.name] = {
                "of": of,
                "unit": "words" if field.kind == "text" else "elements",
                "kept": field.columns,
                "by_max_length": field.columns == limit,
                **{name: loss[name] for name in ("values", "cut", "lost")},
            }
    return {**checks, "repairs": dict(sorted(repairs.items())), "cuts": cuts}
