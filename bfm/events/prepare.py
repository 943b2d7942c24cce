"""From a raw log to a shard set, as stages that know no engine: each reads and writes files of one staging folder.

    clean_piece       per piece of the log: raw rows -> cleaned rows, ordered by a seeded hash of their user
    sort_partition    per range of hashes: quarantine file; events by (user, time, seeded hash of the whole row)
    choose_split      once: boundaries from the merged histogram of times

and in build.py: measure_partition, fit_all, write_partition, join_events, finish_set.

Users stand in the order of their hashes, and all that follows is a function of the rows and the seed alone; the order
of files and workers leaves no trace but in the check of the raw order inside ties.
"""

from __future__ import annotations

import functools
import json
import pickle
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bfm.errors import UserError
from bfm.events import clean
from bfm.events.account import Reading, check_reading
from bfm.events.clean import Cleaner
from bfm.events.hashing import hash_column, moments, order_events
from bfm.events.histogram import Histogram
from bfm.events.log_files import find_item_table, find_logs
from bfm.events.schema import EventSchema, load_schema, schema_path
from bfm.events.split import Split, time_split
from bfm.events.spread import SPREAD, gather, num_partitions, write_spread
from bfm.events.ties import Ties, count_ties
from bfm.events.written_times import setting, written_times
from bfm.tables.pieces import Piece, require_columns, table_columns
from bfm.tables.values import are_numbers, numbers, plain, to_mask

PARTITION_ROWS = 1 << 18
_EXAMPLES = 10_000


@dataclass(frozen=True)
class Job:
    """What every stage needs; small, and sent to every worker."""

    schema: EventSchema
    seed: int
    folder: Path
    event_item_fields: list[str]
    """Item fields that stand in the log itself."""
    item_table: str | None
    """Holds the other ones."""
    left_out: dict[str, int]
    """Hidden files and folders among the log's -> files."""

    @property
    def cleaner(self) -> Cleaner:
        """What is read of the log."""
        return Cleaner(self.schema, self.event_item_fields)

    @property
    def shard_set(self) -> Path:
        """The shard set in the making."""
        return self.folder / "set"

    def part(self, index: int) -> Path:
        """The folder of a part of the events in the making."""
        return self.folder / "work" / "parts" / f"{index:05d}"

    def place(self, stage: str, index: int, part: int = 0) -> Path:
        """Where a task of a stage keeps what it makes, without the ending."""
        folder = self.folder / "work" / stage
        try:
            folder.mkdir(exist_ok=True)
        except FileNotFoundError as error:
            fix = "give an --out (for a URI, a TMPDIR) on a file system that all nodes share"
            raise UserError("a node of the cluster does not see this folder", file=str(self.folder), fix=fix) from error
        return folder / f"{index:05d}-{part:05d}"

    def save(self, stage: str, index: int, value: Any) -> None:
        """Keep what a task of a stage made: a table (memory-mappable, of one batch) or another value."""
        path = self.place(stage, index)
        if not isinstance(value, pa.Table):
            path.with_suffix(".pickle").write_bytes(pickle.dumps(value))
            return
        rows = pa.RecordBatch.from_struct_array(value.to_struct_array().combine_chunks())
        with pa.OSFile(f"{path}.arrow", "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
            writer.write_batch(rows)

    def files(self, stage: str) -> list[Path]:
        """Files of what the tasks of a stage made, in the order of their indices."""
        return sorted((self.folder / "work" / stage).glob("*"))

    def load(self, stage: str) -> Iterator[Any]:
        """What the tasks of a stage made, in the order of their indices."""
        return map(load_file, self.files(stage))

    def drop(self, stage: str) -> None:
        """Remove what a stage made, once nobody needs it."""
        shutil.rmtree(self.folder / "work" / stage)


def load_file(path: Path) -> Any:
    """What `Job.save` kept; a table is memory-mapped."""
    if path.suffix == ".arrow":
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    return pickle.loads(path.read_bytes())


@dataclass(frozen=True)
class PartitionFacts:
    """What a sorted partition holds."""

    users: int
    events: int
    time_range: tuple[int, int]
    """Meaningless where there are no events."""
    reasons: dict[str, int]
    """Of what was put into quarantine -> rows."""


def plan_job(schema: str, logs: list[str], folder: Path, seed: int | None) -> tuple[Job, list[Piece]]:
    """Resolve schema, log and item table; nothing is read but headers.

    Args:
        schema: a path or the name of a built-in schema.
        logs: files, folders, globs or URIs; empty for the log of an installed package.
        folder: where the stages work; every worker must see it.
        seed: None takes the schema's.

    Raises:
        UserError: schema, files or columns are not as they should be.
    """
    file = schema_path(schema)
    checked = load_schema(schema)
    found = find_logs(checked, logs)
    item_table, present = None, list[str]()
    if checked.items is not None:
        item_table = find_item_table(checked, file, found.paths)
        present = table_columns(item_table, checked.items.key, checked.read)
        require_columns(checked.items.key, present, item_table)
    from_events = [name for name, spec in checked.item_fields.items() if spec.column not in present]
    pieces = Cleaner(checked, from_events).pieces(found.paths)
    (folder / "set").mkdir(parents=True)
    (folder / "work").mkdir()
    seed = checked.seed if seed is None else seed
    return Job(checked, seed, folder, from_events, item_table, dict(found.left_out)), pieces


# ---------------------------------------------------------------- clean


def clean_piece(job: Job, piece: Piece) -> None:
    """Keep cleaned tables of bounded size, and what was read, repaired and tied."""
    reading = Reading(piece.path, piece.words())
    for part, cleaned in enumerate(job.cleaner.read(piece)):
        reading.add(cleaned)
        if cleaned.table.num_rows:
            order, table = _by_hash(cleaned.table, job.seed)
            reading.ties += _raw_ties(job.schema, cleaned.raw, order, table)
            write_spread(job.place("cleaned", piece.index, part), table)
    job.save("read", piece.index, reading)


def _by_hash(cleaned: pa.Table, seed: int) -> tuple[np.ndarray, pa.Table]:
    """The order of rows by user, time and place in the log, and the rows in this order.

    Users stand by their hash, SPREAD (uint64), unusable rows by a hash of their content.
    """
    who = plain(pc.if_else(cleaned[clean.FAULT].is_null(), cleaned[clean.USER], cleaned[clean.RAW]))
    codes = who.dictionary_encode()
    hashed, code = hash_column(codes.dictionary, seed), codes.indices.to_numpy()
    rank = np.argsort(np.argsort(hashed))
    moment = moments(rank[code], plain(cleaned[clean.TIME]).fill_null(0).to_numpy())
    order = np.argsort((moment << len(moment).bit_length()) | np.arange(len(moment)))
    return order, cleaned.take(pa.array(order)).append_column(SPREAD, pa.array(hashed[code[order]]))


def _raw_ties(schema: EventSchema, raw: pa.Table, order: np.ndarray, table: pa.Table) -> Ties:
    """Order inside ties as the log has it, in the columns of the item and the context."""
    good = to_mask(table[clean.FAULT].is_null())
    user, time = (plain(table[name]).fill_null(0).to_numpy()[good] for name in (SPREAD, clean.TIME))
    columns: dict[str, Any] = {}
    names = {part.column for part in schema.item} | {spec.column for spec in schema.context_fields.values()}
    for name in names.intersection(raw.column_names):
        values = plain(raw[name]).take(pa.array(order[good]))
        as_number, wrong, _ = numbers(values)
        # Text ids that are numbers are sorted as numbers by those who sort them.
        if not wrong.any():
            columns[name] = as_number
        elif pa.types.is_large_string(values.type):
            columns[name] = values
    return count_ties(user, time, columns)


def rows_read(job: Job) -> int:
    """Rows of the whole log, once all pieces are read. Raises UserError as `check_reading`."""
    return check_reading(list(job.load("read")), job.cleaner.columns)


def count_partitions(job: Job) -> int:
    """Parts of the log that one task each holds in memory, once all pieces are read. Raises as `rows_read`."""
    return num_partitions(rows_read(job), PARTITION_ROWS)


# ---------------------------------------------------------------- shuffle and sort


def sort_partition(job: Job, partitions: int, index: int) -> None:
    """Write the quarantine and the events, in their final order, of one of so many equal ranges of hashes."""
    table = gather(job.files("cleaned"), partitions, index)
    unusable = table.filter(table[clean.FAULT].is_valid()).select([clean.FAULT, clean.RAW])
    good = clean.usable(table.drop_columns([SPREAD]), job.seed)
    users, user = _ranked_users(good[clean.USER].combine_chunks(), job.seed)
    order, repeated = order_events(user, good[clean.TIME].to_numpy(), good[clean.HASH].to_numpy())
    if job.schema.clean.drop_duplicates and repeated.any():
        doubles = good.take(pa.array(np.sort(order[repeated])))
        unusable = pa.concat_tables([unusable, clean.as_quarantined(doubles, "duplicate row")])
        order = order[~repeated]
    reasons = _write_quarantine(job, index, unusable)
    ranked = pa.DictionaryArray.from_arrays(pa.array(user), users)
    events = good.set_column(0, clean.USER, ranked).take(pa.array(order))
    time = events[clean.TIME].to_numpy()
    if len(time):
        job.save("partitions", index, events)
    job.save("times", index, Histogram.of(time))
    time_range = (int(time.min()), int(time.max())) if len(time) else (0, 0)
    job.save("sort", index, PartitionFacts(len(users), len(order), time_range, reasons))


def _ranked_users(user: pa.DictionaryArray, seed: int) -> tuple[pa.Array, np.ndarray]:
    """Keys in the shard's user order (seeded hash, then key), and each row's place in it (int32 [n])."""
    by_hash = pa.table({"hash": hash_column(user.dictionary, seed), "key": user.dictionary})
    order = pc.sort_indices(by_hash, sort_keys=[("hash", "ascending"), ("key", "ascending")]).to_numpy()
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    return user.dictionary.take(pa.array(order)), place[user.indices.to_numpy()]


def _write_quarantine(job: Job, index: int, rows: pa.Table) -> dict[str, int]:
    if rows.num_rows == 0:
        return {}
    ordered = rows.sort_by([(clean.FAULT, "ascending"), (clean.RAW, "ascending")]).combine_chunks()
    path = job.shard_set / "quarantine" / f"part-{index:05d}.parquet"
    path.parent.mkdir(exist_ok=True)
    pq.write_table(ordered.rename_columns(["reason", "row"]), path)
    return Counter(ordered[clean.FAULT].to_pylist())


# ---------------------------------------------------------------- split


def choose_split(job: Job) -> Split:
    """The split, once all partitions are sorted.

    Raises UserError where nothing usable is left.
    """
    partitions: list[PartitionFacts] = list(job.load("sort"))
    if not any(partition.events for partition in partitions):
        unusable = pq.read_table(min((job.shard_set / "quarantine").glob("*.parquet")))
        raise clean.nothing_usable(quarantined(partitions), _unusable_fix(job.schema, unusable))
    if job.schema.split_by == "leave_one_out":
        return Split()
    return time_split(job.schema.split, functools.reduce(Histogram.merged, job.load("times")))


def _unusable_fix(schema: EventSchema, unusable: pa.Table) -> str:
    """What to do where every row is like these of the quarantine: rows as JSON and their reasons."""
    fix = f"check the schema's columns; a row: {unusable['row'][0].as_py():.200}"
    rows = unusable.filter(pc.equal(unusable["reason"], "unparsable time"))["row"].slice(0, _EXAMPLES).to_pylist()
    if schema.time is None or not rows:
        return fix
    column = schema.time.column
    values = [str(json.loads(row)[column]) for row in rows]
    written = next(iter(written_times(column, pa.array(values, pa.large_string()))), None)
    how = setting(written) if written else ""
    if schema.time.unit != "auto" and are_numbers(pa.array(values, pa.large_string())):
        return f"{column} holds {values[0]:.40}: no times in {schema.time.unit}; leave `unit` out, or {fix}"
    say = f"write `time: {{column: {column}, {how}}}`" if how else "name its format, e.g. `format: '%d.%m.%Y'`"
    return f"{column} holds {values[0]:.40}: {say}; or {fix}"


def quarantined(partitions: list[PartitionFacts]) -> dict[str, int]:
    """Reason -> rows of all partitions."""
    reasons = sum((Counter(partition.reasons) for partition in partitions), Counter[str]())
    return dict(sorted(reasons.items()))
