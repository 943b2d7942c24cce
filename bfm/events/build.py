"""From sorted partitions to a finished shard set: statistics, fit, columns, protocol, manifest (see prepare.py).

measure_partition per partition: partial statistics of items and fields over the training range
fit_all           once: item ids, field values, fitted fields; a draft of the manifest
write_partition   per partition: a part of the events, and how much repeats in it
join_events       per column: the file of all parts
finish_set        once: evaluation protocol, manifest
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bfm.errors import UserError
from bfm.events import clean, fitting
from bfm.events.account import reading_checks
from bfm.events.clean import Losses
from bfm.events.encoding import Encoding, write_items
from bfm.events.fields import FittedField, Side
from bfm.events.fitting import Fit
from bfm.events.items import (
    ITEM_ID,
    POPULARITY,
    Items,
    choose_values,
    count_items,
    count_values,
    item_ids,
    join_item_table,
    key_columns,
    known_keys,
    merge_items,
)
from bfm.events.manifest import Manifest
from bfm.events.parts import column_files, join_column, write_part
from bfm.events.prepare import Job, PartitionFacts, load_file, quarantined, rows_read
from bfm.events.protocol import build_protocol
from bfm.events.repeats import training_repeats
from bfm.events.schema import MAX_LENGTH, FieldSpec
from bfm.events.shards import Shards, finish
from bfm.events.split import Split
from bfm.events.ties import Ties, tie_facts
from bfm.ragged import runs

# Share of training events whose item features are not the item's: above it, `describe` warns.
_MANY_CONFLICTS = 0.05


# ---------------------------------------------------------------- statistics


def measure_partition(job: Job, split: Split, index: int, partition: Path) -> None:
    """Write partial statistics of a sorted partition over the training range, one file per field."""
    table = load_file(partition)
    time, offsets = table[clean.TIME].to_numpy(), user_offsets(table)
    train_end, _ = split.ends(time, offsets)
    lengths = np.diff(offsets)
    train = (runs(0, lengths) < np.repeat(train_end, lengths)).astype(np.int64)
    item = table[clean.ITEM].combine_chunks()
    events = pa.table({"item": item, "train_count": train, "first_time": time, "first_hash": table[clean.HASH]})
    job.save("items", index, count_items(events))
    for name in job.event_item_fields:
        values = events.append_column("value", table[clean.item_column(name)])
        job.save(f"values-{name}", index, count_values(values))
    for name, spec in job.schema.context_fields.items():
        values = table[clean.context_column(name)].combine_chunks()
        job.save(f"context-{name}", index, fitting.measure(values, spec.kind, train))
    job.save("measure", index, int(np.maximum(train_end - 1, 0).sum()))


def user_offsets(table: pa.Table) -> np.ndarray:
    """Int64 [U+1]: first row of each user of a sorted partition."""
    user = table[clean.USER].combine_chunks()
    return np.searchsorted(user.indices.to_numpy(), np.arange(len(user.dictionary) + 1)).astype(np.int64)


# ---------------------------------------------------------------- fit


def fit_all(job: Job, split: Split) -> None:
    """Number the items, choose their values, fit all fields; writes items, vocabularies and a draft of the manifest.

    Raises:
        UserError: a single item, nothing to train on, or a vector field without values.
    """
    schema, items, losses = job.schema, merge_items(list(job.load("items"))), Losses()
    draft = _draft(job, split, items)
    texts, checks = _item_texts(job, items, losses)
    raw = {name: clean.from_text(texts[name], spec.kind) for name, spec in schema.item_fields.items()}
    values = {**raw, ITEM_ID: items.keys, POPULARITY: pa.array(items.train_count.astype(np.float64))}
    statistics = {
        name: fitting.measure(raw[name], spec.kind, items.train_count) for name, spec in schema.item_fields.items()
    }
    statistics |= {name: fitting.merge(list(job.load(f"context-{name}"))) for name in schema.context_fields}
    checks["no_value_in_training"] = [name for name, found in statistics.items() if found.known == 0]

    def declared(side: Side, specs: Mapping[str, FieldSpec]) -> list[Fit]:
        return [fitting.fit(name, side, spec.kind, statistics[name], spec.max_length) for name, spec in specs.items()]

    fitted = declared("item", schema.item_fields)
    if schema.id_field:
        rows = schema.hash_rows or fitting.id_table_rows(items.catalogue)
        fitted.append((fitting.hashed_field(ITEM_ID, "item", rows), None))
    if schema.popularity_field:
        of_catalogue = fitting.measure(values[POPULARITY], "numeric", (items.train_count > 0).astype(np.int64))
        fitted.append(fitting.fit(POPULARITY, "item", "numeric", of_catalogue))
    item_fields = [field for field, _ in fitted]
    fitted += declared("context", schema.context_fields)
    vocabularies = {field.name: words for field, words in fitted if words is not None}
    counts = {"train_count": pa.array(items.train_count), "first_time": pa.array(items.first_time)}
    table = pa.table({**key_columns(schema, items), **counts, **raw})
    arrays = fitting.encode_fields(values, item_fields, vocabularies, losses)
    write_items(job.shard_set, table, arrays, vocabularies)
    draft = dataclasses.replace(draft, fields=tuple(field for field, _ in fitted), checks=checks)
    job.save("fit", 0, (draft, losses))


def _item_texts(job: Job, items: Items, losses: Losses) -> tuple[dict[str, pa.Array], dict[str, Any]]:
    """Field values as text [I], and what the checks say about conflicts and joining."""
    texts, conflicts = {}, dict[str, Any]()
    for name in job.event_item_fields:
        texts[name], count = choose_values(list(job.load(f"values-{name}")), items)
        conflicts[name] = count / items.train_events
    many = ", ".join(
        f"{name} in {share:.1%} of training events" for name, share in conflicts.items() if share > _MANY_CONFLICTS
    )
    if many:
        what = f"item fields that are not unique to the item: {many}; what varies per event should be a context field"
        conflicts["warning"] = what
    misfits = dict[str, Any]()
    if job.item_table is not None:
        names = [name for name in job.schema.item_fields if name not in texts]
        joined, misfits = join_item_table(job.schema, job.item_table, names, items, losses)
        texts |= joined
    return texts, {"item_conflicts": conflicts, **misfits}


def _draft(job: Job, split: Split, items: Items) -> Manifest:
    """The manifest without fields, checks and files. Raises UserError: a single item, nothing to train on."""
    if len(items.keys) == 1:
        raise UserError("the log has a single item", key="item", fix="nothing can be ranked; check the item column")
    partitions: list[PartitionFacts] = list(job.load("sort"))
    times = [partition.time_range for partition in partitions if partition.events]
    train_targets = sum(job.load("measure"))
    if train_targets == 0:
        fix = "check the split and the user column"
        raise UserError("no user has two events in the training range", key="split", fix=fix)
    return Manifest(
        name=job.schema.name,
        seed=job.seed,
        users=sum(partition.users for partition in partitions),
        events=sum(partition.events for partition in partitions),
        items=len(items.keys),
        catalogue=items.catalogue,
        has_clock=job.schema.has_clock,
        split=split.as_dict(),
        fields=(),
        event_item_fields=tuple(job.event_item_fields),
        train_events=items.train_events,
        train_targets=train_targets,
        time_range=(min(first for first, _ in times), max(last for _, last in times)),
        rows_read=rows_read(job),
        rows_quarantined=quarantined(partitions),
        schema=job.schema.model_dump(mode="json", exclude_none=True),
    )


# ---------------------------------------------------------------- write


@lru_cache(maxsize=1)
def _encoding(shard_set: Path, fitted: Path) -> tuple[Encoding, pa.Array]:
    # One worker writes many partitions; the item keys are its largest table.
    draft, _ = load_file(fitted)
    encoding = Encoding(shard_set, draft)
    return encoding, known_keys(encoding)


def write_partition(job: Job, split: Split, index: int, partition: Path) -> None:
    """Encode a sorted partition, write it as a part, and count its repeats."""
    table, losses = load_file(partition), Losses()
    offsets, time = user_offsets(table), table[clean.TIME].to_numpy()
    train_end, valid_end = split.ends(time, offsets)
    encoding, keys = _encoding(job.shard_set, job.files("fit")[0])
    folder = job.part(index)
    write_part(
        folder,
        item=item_ids(table[clean.ITEM].combine_chunks(), keys),
        time=time,
        context=fitting.encode_context(table, encoding, losses),
        user_offsets=offsets,
        train_end=train_end,
        valid_end=valid_end,
        users=table[clean.USER].combine_chunks().dictionary,
    )
    part = Shards(folder, dataclasses.replace(encoding.manifest, users=len(train_end), events=len(time)))
    job.save("write", index, (losses, training_repeats(part)))


def event_files(job: Job) -> list[str]:
    """Names of the files of all events, once the partitions are written."""
    return column_files(job.part(0))


def join_events(job: Job, index: int, name: str) -> None:
    """Write one of these files, number `index`, into the staged shard set."""
    parts = [job.part(part) for part in range(len(job.files("write")))]
    join_column(parts, job.shard_set, name)
    job.save("join", index, None)


def finish_set(job: Job) -> Manifest:
    """Choose the queries, publish the manifest in the staged shard set."""
    draft, of_items = next(job.load("fit"))
    shards, asked = Shards(job.shard_set, draft), job.schema.evaluation
    of_parts, repeats = zip(*job.load("write"), strict=True)
    protocol = build_protocol(
        shards,
        repeats={name: sum(part[name] for part in repeats) for name in repeats[0]},
        queries=asked.queries,
        filter_seen=asked.filter_seen,
        seed=job.seed,
    )
    ties, losses, pieces = Ties(), sum(of_parts, of_items), list(job.load("read"))
    for piece in pieces:
        losses += piece.losses
        ties += piece.ties
    checks = {
        **draft.checks,
        "ties_raw": tie_facts(ties),
        "repairs": clean.repairs(losses),
        "cuts": _cuts(job, draft.fields, losses),
        "seen_items": protocol.seen_rule,
        **reading_checks(pieces, job.left_out),
    }
    if shards.num_users == 1:
        checks["users"] = {"warning": "there is a single user: standard errors over users do not exist"}
    checks = {name: check for name, check in checks.items() if check}
    return finish(job.shard_set, dataclasses.replace(draft, checks=checks))


def _cuts(job: Job, fields: tuple[FittedField, ...], losses: Losses) -> dict[str, Any]:
    """What encoding cut of texts and lists."""
    cuts = {}
    for field in fields:
        if losses[field.name, "cut"]:
            specs = job.schema.item_fields if field.side == "item" else job.schema.context_fields
            limit = specs[field.name].max_length or MAX_LENGTH[field.kind]
            cuts[field.name] = {
                "of": "items" if field.side == "item" else "events",
                "unit": "words" if field.kind == "text" else "elements",
                "kept": field.columns,
                "by_max_length": field.columns == limit,
                **{what: losses[field.name, what] for what in clean.BAG_COUNTS},
            }
    return cuts
