"""The shard set on disk: low-level writers (nothing but numpy and pyarrow), the manifest, the memory-mapping reader.

Layout of a shard set (one directory):

    manifest.json        written last by `finish`: a directory without it is not a shard set
    protocol.json, protocol-<part>.npy
    items.parquet        row i = item i: key columns (strings), train_count, first_time, raw field values
    items/<field>.npy    encoded item field, row = item id
    shard-00000/         item.npy time.npy context/<field>.npy user_offsets.npy train_end.npy valid_end.npy
                         users.parquet
    quarantine/*.parquet
    .cache/              see cache.py; not in the manifest, may be deleted at any time

How to write one: `write_shard` per partition, `write_items`, then `Shards(path, draft_manifest)` reads what stands
already (for the protocol and the checks), then `finish(path, manifest)` hashes every file and publishes manifest.json.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bfm.errors import CorruptError
from bfm.events.fields import FittedField
from bfm.events.manifest import MANIFEST, SHARD_SET, Manifest, fetch
from bfm.events.ragged import chunks, runs
from bfm.files import Store
from bfm.sealed import check_files, list_files

_CHUNK_EVENTS = 1 << 20

# ---------------------------------------------------------------- writers


def shard_name(index: int) -> str:
    """The directory name of a shard."""
    return f"shard-{index:05d}"


def write_shard(
    directory: Path,
    index: int,
    *,
    item: np.ndarray,
    time: np.ndarray,
    context: Mapping[str, np.ndarray],
    user_offsets: np.ndarray,
    train_end: np.ndarray,
    valid_end: np.ndarray,
    users: pa.Array,
) -> None:
    """Write one user partition. E events of U users, already in their final order.

    Args:
        directory: the shard set.
        index: the shard's number, from 0 without gaps.
        item: item ids [E]. time: milliseconds or positions [E]. context: encoded context fields [E] or [E, M].
        user_offsets: [U+1], first event of each user. train_end, valid_end: [U], counts of the user's events that lie
            in training, and before the end of validation (train_end <= valid_end <= the user's events).
        users: [U] original keys.
    """
    assert {len(time), int(user_offsets[-1]), *map(len, context.values())} == {len(item)}, f"events of shard {index}"
    assert len(user_offsets) == len(users) + 1, f"users of shard {index}"
    ends = (train_end >= 0) & (train_end <= valid_end) & (valid_end <= np.diff(user_offsets))
    assert ends.all(), f"parts of shard {index}"
    base = directory / shard_name(index)
    (base / "context").mkdir(parents=True, exist_ok=True)
    _save(base / "item.npy", item, np.int32)
    columns = {"time": time, "user_offsets": user_offsets, "train_end": train_end, "valid_end": valid_end}
    for name, values in columns.items():
        _save(base / f"{name}.npy", values, np.int64)
    for name, values in context.items():
        _save(base / "context" / f"{name}.npy", values, values.dtype)
    pq.write_table(pa.table({"user": users}), base / "users.parquet")


def write_items(directory: Path, table: pa.Table, encoded: Mapping[str, np.ndarray]) -> None:
    """Write the items in id order.

    Args:
        directory: the shard set.
        table: items.parquet; must have int64 columns train_count (falling over the catalogue, 0 for cold items) and
            first_time, besides key columns and raw values.
        encoded: item fields by name, [I] or [I, M].
    """
    (directory / "items").mkdir(parents=True, exist_ok=True)
    pq.write_table(table, directory / "items.parquet")
    for name, values in encoded.items():
        _save(directory / "items" / f"{name}.npy", values, values.dtype)


def finish(directory: Path, manifest: Manifest) -> Manifest:
    """Hash every file below the directory and publish manifest.json; returns the final manifest."""
    (directory / MANIFEST).unlink(missing_ok=True)
    manifest = dataclasses.replace(manifest, files=list_files(directory))
    SHARD_SET.write(Store(directory), manifest.as_dict())
    return manifest


def _save(path: Path, values: np.ndarray, dtype: Any) -> None:
    np.save(path, np.ascontiguousarray(values, dtype=dtype), allow_pickle=False)


# ---------------------------------------------------------------- reader


Located = list[tuple[int, np.ndarray | slice, np.ndarray]]
"""Global event indices split by shard once, so that several columns can be taken: (shard, where in the output, row in
the shard)."""


class Shards:
    """A shard set, memory-mapped and read-only. Events have a global index: shards one after the other."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Map the files that stand under `path` as the manifest describes them, without verification."""
        self.path, self.manifest = path, manifest
        bases = [path / shard_name(index) for index in range(manifest.shards)]
        self._item = [_map(base / "item.npy") for base in bases]
        self._time = [_map(base / "time.npy") for base in bases]
        self._context = {
            f.name: [_map(base / "context" / f"{f.name}.npy") for base in bases] for f in self.context_fields
        }
        self._first_event = np.cumsum([0] + [len(items) for items in self._item])
        offsets = [np.load(base / "user_offsets.npy") for base in bases]
        starts = [values[:-1] + first for values, first in zip(offsets, self._first_event, strict=False)]
        self.user_starts: np.ndarray = np.concatenate([*starts, self._first_event[-1:]])
        """[U+1] global index of each user's first event."""
        self.train_lengths: np.ndarray = np.concatenate([np.load(base / "train_end.npy") for base in bases])
        """[U] training events of each user."""
        self.valid_lengths: np.ndarray = np.concatenate([np.load(base / "valid_end.npy") for base in bases])
        """[U] events of each user up to the end of validation."""
        if len(self.train_lengths) != manifest.users or self._first_event[-1] != manifest.events:
            raise CorruptError(f"{path}: users or events differ from what {MANIFEST} says")

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process maps the files again; pickling a memory map would copy it.
        return type(self), (self.path, self.manifest)

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> Shards:
        """Open a finished shard set; a URI is copied to a local cache first.

        Args:
            path: directory or URI.
            verify: check the sha256 of every file, not only names and sizes.

        Raises:
            UserError: there is no shard set, or it is of another version.
            CorruptError: a file is missing, truncated or altered (the message names it).
        """
        local = fetch(str(path)) if "://" in str(path) else Path(path)
        manifest = Manifest.from_dict(SHARD_SET.read(Store(local)))
        check_files(local, manifest.files, whole=verify)
        return cls(local, manifest)

    @property
    def hash(self) -> str:
        """Identity of the shard set."""
        return self.manifest.hash

    @property
    def num_users(self) -> int:
        """Users over all shards."""
        return self.manifest.users

    @property
    def history_length(self) -> float:
        """Training events that the user of a training event has, on average."""
        lengths = self.train_lengths.astype(np.float64)
        return float(lengths @ lengths / lengths.sum())

    @property
    def num_items(self) -> int:
        """Items, cold ones included (I)."""
        return self.manifest.items

    @property
    def num_catalogue(self) -> int:
        """Items known in training (V)."""
        return self.manifest.catalogue

    @cached_property
    def item_fields(self) -> tuple[FittedField, ...]:
        """Fields that say what an item is."""
        return tuple(f for f in self.manifest.fields if f.side == "item")

    @cached_property
    def context_fields(self) -> tuple[FittedField, ...]:
        """Fields that say what happened."""
        return tuple(f for f in self.manifest.fields if f.side == "context")

    @cached_property
    def item_arrays(self) -> dict[str, np.ndarray]:
        """Encoded item fields, memory-mapped; row = item id."""
        return {f.name: _map(self.path / "items" / f"{f.name}.npy") for f in self.item_fields}

    @cached_property
    def train_counts(self) -> np.ndarray:
        """Int64 [V]: training events of each catalogue item, falling."""
        return self.items_table(["train_count"])["train_count"].to_numpy()[: self.num_catalogue]

    @cached_property
    def train_stops(self) -> np.ndarray:
        """Int64 [U]: training events of this user and all users before."""
        return np.cumsum(self.train_lengths)

    @property
    def user_lengths(self) -> np.ndarray:
        """Int64 [U]: events of each user."""
        return np.diff(self.user_starts)

    def items_table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """items.parquet (keys, counts and raw values); row = item id."""
        return pq.read_table(self.path / "items.parquet", columns=list(columns) if columns else None)

    def locate(self, index_N: np.ndarray) -> Located:
        """Split global event indices by shard."""
        if len(self._item) == 1:
            return [(0, slice(None), index_N)]
        shard_N = np.searchsorted(self._first_event, index_N, side="right") - 1
        located: Located = []
        for shard in np.flatnonzero(np.bincount(shard_N, minlength=len(self._item))):
            where = np.flatnonzero(shard_N == shard)
            located.append((int(shard), where, index_N[where] - self._first_event[shard]))
        return located

    def take_item(self, located: Located) -> np.ndarray:
        """Item ids int32 [N] of the located events."""
        return _take(self._item, located)

    def take_time(self, located: Located) -> np.ndarray:
        """Times int64 [N] of the located events."""
        return _take(self._time, located)

    def take_context(self, name: str, located: Located) -> np.ndarray:
        """A context field [N] or [N, M] of the located events."""
        return _take(self._context[name], located)


def training_events(shards: Shards, users: int) -> Iterator[tuple[np.ndarray, np.ndarray, Located]]:
    """The first so many users' training events, whole users at a time, about a million events per chunk.

    Yields user [E], place in the user's history [E], and the events located.
    """
    for low, high in chunks(shards.train_lengths[:users], _CHUNK_EVENTS):
        length_U = shards.train_lengths[low:high]
        user_E = np.repeat(np.arange(low, high), length_U)
        yield user_E, runs(0, length_U), shards.locate(runs(shards.user_starts[low:high], length_U))


def _map(path: Path) -> np.ndarray:
    # A plain view of the map: np.memmap's own indexing is several times slower.
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def _take(columns: list[np.ndarray], located: Located) -> np.ndarray:
    if len(columns) == 1:
        return columns[0][located[0][2]]
    count = sum(len(rows) for _, _, rows in located)
    out = np.empty((count, *columns[0].shape[1:]), columns[0].dtype)
    for shard, where, rows in located:
        out[where] = columns[shard][rows]
    return out
