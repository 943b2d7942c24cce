"""How events get to disk: parts of whole users, and their join into one file per column.

Layout of a part, and below the shard set's folder of all parts joined (E events of U users, one user after the other):

    events/item.npy time.npy context/<field>.npy     [E] or [E, M]
    users/start.npy train_start.npy                  [U+1] events, and training events, of all users before
    users/train_length.npy valid_length.npy          [U] events in training, and before the end of validation
    users/key.parquet                                [U] original keys

So a log of any length is as many files as it has columns, and whoever maps them holds as many handles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bfm.events.encoding import map_array, save_array

KEYS = "users/key.parquet"
_TOTALS = ("users/start.npy", "users/train_start.npy")


def write_part(
    folder: Path,
    *,
    item: np.ndarray,
    time: np.ndarray,
    context: Mapping[str, np.ndarray],
    user_offsets: np.ndarray,
    train_end: np.ndarray,
    valid_end: np.ndarray,
    users: pa.Array,
) -> None:
    """Write some users. E events of U users, already in their final order.

    Args:
        folder: of the part.
        item: item ids [E]. time: milliseconds or positions [E]. context: encoded context fields [E] or [E, M].
        user_offsets: [U+1], first event of each user. train_end, valid_end: [U], counts of the user's events that lie
            in training, and before the end of validation (train_end <= valid_end <= the user's events).
        users: [U] original keys.
    """
    assert {len(time), int(user_offsets[-1]), *map(len, context.values())} == {len(item)}, f"events of {folder}"
    assert len(user_offsets) == len(users) + 1, f"users of {folder}"
    ends = (train_end >= 0) & (train_end <= valid_end) & (valid_end <= np.diff(user_offsets))
    assert ends.all(), f"splits of {folder}"
    save_array(folder / "events/item.npy", item, np.int32)
    columns = {
        "events/time": time,
        "users/start": user_offsets,
        "users/train_start": np.concatenate([[0], np.cumsum(train_end)]),
        "users/train_length": train_end,
        "users/valid_length": valid_end,
    }
    for name, values in columns.items():
        save_array(folder / f"{name}.npy", values, np.int64)
    for name, values in context.items():
        save_array(folder / f"events/context/{name}.npy", values, values.dtype)
    pq.write_table(pa.table({"user": users}), folder / KEYS)


def column_files(part: Path) -> list[str]:
    """Names of a part's files, those of the columns of all parts, the largest first."""
    files = [path for path in part.rglob("*") if path.is_file()]
    return [path.relative_to(part).as_posix() for path in sorted(files, key=lambda path: -path.stat().st_size)]


def join_column(parts: Sequence[Path], folder: Path, name: str) -> None:
    """Write one file of all parts, one after the other, below `folder`; memory and handles of one part at a time."""
    out = folder / name
    out.parent.mkdir(parents=True, exist_ok=True)
    if name == KEYS:
        with pq.ParquetWriter(out, pq.read_schema(parts[0] / KEYS)) as writer:
            for part in parts:
                writer.write_table(pq.read_table(part / KEYS))
        return
    totals = name in _TOTALS
    rows = sum(len(map_array(part / name)) - totals for part in parts) + totals
    first, before = map_array(parts[0] / name), 0
    header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False}
    with open(out, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (rows, *first.shape[1:])})
        if totals:
            first[:1].tofile(file)
        for part in parts:
            values = map_array(part / name)
            if totals:
                values, before = values[1:] + before, before + int(values[-1])
            values.tofile(file)
