"""`bfm predict`: an export and a raw log to a Parquet file of predictions, and what is said about it.

Enters: the folder of an export, log files. Leaves: the file, whole or not at all, and counts of all that was read. Its
columns: user; items (keys as text; structs where an item has several columns); scores; events, how many the user has;
on request vector. A user without a usable event has empty lists and no vector.

Q = queries, k = list length.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from bfm.errors import UserError
from bfm.events.account import line_account
from bfm.events.clean import repairs
from bfm.events.histories import Histories, Part
from bfm.events.protocol import QueryTable
from bfm.ranking.metrics import check_k
from bfm.ranking.predictor import Predictor, Top
from bfm.tables.understood import reading_lines

_ROW_GROUP_USERS = 4096
# Shares of the progress bar.
_READING = 0.4


def predict_log(
    export: str,
    logs: list[str],
    out: Path,
    *,
    k: int = 10,
    vectors: bool = False,
    filter_seen: bool | None = None,
    progress: Callable[[str, float], None] = lambda words, share: None,
) -> dict[str, Any]:
    """Predict for every user of a log, a row group per 4,096 users. Memory does not grow with the log.

    Args:
        export: folder of an export.
        logs: files, folders, globs or URIs.
        out: the Parquet file; scratch files lie in a hidden folder beside it.
        k: list length.
        vectors: also write user vectors.
        filter_seen: leave out items of the user's history; None: as in the protocol of the export's shard set.
        progress: called with words and the share that is done.

    Returns:
        Counts of rows, users and items.

    Raises:
        UserError: the export is absent or of another version, k is too large, a file or column of the log is missing,
            or no row is usable.
        CorruptError: the export is damaged.
    """
    if out.is_dir():
        raise UserError("is a folder", file=str(out), key="--out", fix="name a file, e.g. predictions.parquet")
    predictor = Predictor.load(export, "cuda" if torch.cuda.is_available() else "cpu")
    check_k(k, predictor.encoding.num_catalogue)
    filter_seen = predictor.filter_seen if filter_seen is None else filter_seen
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    counts = {"users": 0, "users_without_event": 0, "short_lists": 0}
    with TemporaryDirectory(prefix=f".{out.name}.predicting-", dir=out.parent) as folder:
        spill, made = Path(folder, "spill"), Path(folder, "predictions")
        spill.mkdir()
        histories = Histories(
            predictor.encoding, logs, spill, progress=lambda share: progress("reading", _READING * share)
        )
        if histories.new.ids:
            predictor.add_items(histories.new.encode(histories.reading.losses))
        events = 0
        with pq.ParquetWriter(made, _schema(predictor, vectors)) as writer:
            for part in histories.parts():
                for table in _tables(predictor, part, k, filter_seen, writer.schema):
                    writer.write_table(table)
                    listed = pc.list_value_length(table["items"]).to_numpy()
                    counts["users"] += table.num_rows
                    counts["short_lists"] += int((listed[table["events"].to_numpy() > 0] < k).sum())
                    events += pc.sum(table["events"]).as_py()
                    progress(f"{counts['users']:,} users", _READING + (1 - _READING) * events / histories.reading.rows)
                counts["users_without_event"] += len(part.without_event)
        os.replace(made, out)
    return {"predictions": str(out), **counts, **_read_counts(histories)}


def _schema(predictor: Predictor, vectors: bool) -> pa.Schema:
    keys, text = predictor.encoding.item_keys, pa.large_string()
    item = text if keys.num_columns == 1 else pa.struct([(name, text) for name in keys.column_names])
    columns = [("user", text), ("items", pa.list_(item)), ("scores", pa.list_(pa.float32())), ("events", pa.int64())]
    if vectors:
        columns.append(("vector", pa.list_(pa.float32(), predictor.model.shape.d_item)))
    return pa.schema(columns)


def _tables(predictor: Predictor, part: Part, k: int, filter_seen: bool, schema: pa.Schema) -> Iterator[pa.Table]:
    """Rows of the users of a part."""
    last = part.shards.user_lengths - 1
    for start in range(0, len(last), _ROW_GROUP_USERS):
        position = last[start : start + _ROW_GROUP_USERS]
        user = np.arange(start, start + len(position))
        top = predictor.top(part.shards, QueryTable(user, position, np.zeros(len(user), bool), filter_seen), k)
        columns = {"user": part.users.slice(start, len(user)), "events": pa.array(position + 1)}
        columns |= _lists(predictor, top)
        yield pa.table([columns[name] for name in schema.names], schema=schema)
    if num := len(part.without_event):
        empty = {name: pa.array([[]] * num, schema.field(name).type) for name in ("items", "scores")}
        columns = {"user": part.without_event, "events": pa.array(np.zeros(num, np.int64)), **empty}
        yield pa.table([columns.get(field.name, pa.nulls(num, field.type)) for field in schema], schema=schema)


def _lists(predictor: Predictor, top: Top) -> dict[str, pa.Array]:
    listed_Qk = top.item_Qk >= 0
    offsets = pa.array(np.concatenate([[0], np.cumsum(listed_Qk.sum(1))]), pa.int32())
    keys = predictor.encoding.item_keys.take(pa.array(top.item_Qk[listed_Qk]))
    parts = [column.combine_chunks() for column in keys.columns]
    items = parts[0] if len(parts) == 1 else pa.StructArray.from_arrays(parts, keys.column_names)
    vectors = pa.array(np.ascontiguousarray(top.h_QD).reshape(-1))
    return {
        "items": pa.ListArray.from_arrays(offsets, items),
        "scores": pa.ListArray.from_arrays(offsets, pa.array(top.score_Qk[listed_Qk])),
        "vector": pa.FixedSizeListArray.from_arrays(vectors, top.h_QD.shape[1]),
    }


def _read_counts(histories: Histories) -> dict[str, Any]:
    reading = histories.reading
    return {
        "rows": reading.rows,
        "lines": dict(reading.lines),
        "unusable": dict(sorted(reading.reasons.items())),
        "read_as": histories.read_as,
        "left_out": dict(histories.left_out),
        "repairs": repairs(reading.losses),
        "cuts": {name: count for (name, what), count in sorted(reading.losses.items()) if what == "cut" and count},
        "duplicates": histories.duplicates,
        "new_items": len(histories.new.ids),
        "new_item_events": histories.new.events,
    }


def summary_text(summary: dict[str, Any]) -> str:
    """What was read and written, in lines; only what happened is said."""
    lines = [f"{summary['users']:,} users from {summary['rows']:,} rows", *line_account(summary["lines"])]
    if summary["unusable"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in summary["unusable"].items())
        lines.append(f"rows left out: {reasons}")
    if summary["duplicates"]:
        lines.append(f"repeated rows left out: {summary['duplicates']:,}")
    if summary["repairs"]:
        faults = ", ".join(f"{fault} {count:,}" for fault, count in summary["repairs"].items())
        lines.append(f"field values taken as missing: {faults}")
    if summary["cuts"]:
        cuts = ", ".join(f"{name} {count:,}" for name, count in summary["cuts"].items())
        lines.append(f"texts and lists cut to the length kept in training: {cuts}")
    if summary["users_without_event"]:
        lines.append(f"users without a usable row, with empty lists: {summary['users_without_event']:,}")
    if summary["new_items"]:
        lines.append(
            f"items the export does not know: {summary['new_items']:,} in {summary['new_item_events']:,} events, "
            "embedded from their fields in the log and never recommended"
        )
    if summary["short_lists"]:
        lines.append(f"users with fewer unseen items than asked for: {summary['short_lists']:,}")
    lines += reading_lines(summary["read_as"], summary["left_out"])
    return "\n".join(lines)
