"""The shard set on disk: low-level writers (nothing but numpy and pyarrow), the memory-mapping reader.

Layout of a shard set (one directory):

    manifest.json        written last by `finish`: a directory without it is not a shard set
    protocol.json, protocol-<part>.npy
    items.parquet, items/*.npy, vocabulary/*.parquet       see encoding.py
    shard-00000/         item.npy time.npy context/<field>.npy user_offsets.npy train_end.npy valid_end.npy
                         users.parquet
    quarantine/*.parquet
    .cache/              see `Shards.kept`; not in the manifest, may be deleted at any time

How to write one: `write_shard` per partition, `write_items`, then `Shards(path, draft_manifest)` reads what stands
already (for the protocol and the checks), then `finish(path, manifest)` hashes every file and publishes manifest.json.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bfm.errors import CorruptError
from bfm.events.encoding import Encoding, map_array, save_array
from bfm.events.manifest import MANIFEST, SHARD_SET, Manifest, fetch
from bfm.events.ragged import chunks, runs
from bfm.files import Store, sha256_bytes, write_atomic
from bfm.sealed import check_files, list_files

_CHUNK_EVENTS = 1 << 20
_UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT}
_DIGEST_BYTES = 64

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
    save_array(base / "item.npy", item, np.int32)
    columns = {"time": time, "user_offsets": user_offsets, "train_end": train_end, "valid_end": valid_end}
    for name, values in columns.items():
        save_array(base / f"{name}.npy", values, np.int64)
    for name, values in context.items():
        save_array(base / "context" / f"{name}.npy", values, values.dtype)
    pq.write_table(pa.table({"user": users}), base / "users.parquet")


def finish(directory: Path, manifest: Manifest) -> Manifest:
    """Hash every file below the directory and publish manifest.json; returns the final manifest."""
    (directory / MANIFEST).unlink(missing_ok=True)
    manifest = dataclasses.replace(manifest, files=list_files(directory))
    SHARD_SET.write(Store(directory), manifest.as_dict())
    return manifest


# ---------------------------------------------------------------- reader


class Shards(Encoding):
    """A shard set, memory-mapped and read-only. Events have a global index: shards one after the other."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Map the files that stand under `path` as the manifest describes them, without verification."""
        super().__init__(path, manifest)
        bases = [path / shard_name(index) for index in range(manifest.shards)]
        names = ["item", "time", *(f"context/{field.name}" for field in self.context_fields)]
        self._columns = {name: [map_array(base / f"{name}.npy") for base in bases] for name in names}
        self._first_event = np.cumsum([0] + [len(items) for items in self._columns["item"]])
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

    def at(self, index_N: np.ndarray) -> Events:
        """The events with these global indices."""
        return Events(self._columns, self._first_event, index_N)

    def user_events(
        self, length_U: np.ndarray, first_U: np.ndarray | int = 0
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Walk through the histories of the first U users, whole users at a time, about a million events per chunk.

        Yields user [E], position in the user's history [E] and global index [E] of events: length_U of each user, from
        position first_U on.
        """
        first_U = np.broadcast_to(first_U, length_U.shape)
        for low, high in chunks(length_U, _CHUNK_EVENTS):
            user_E = np.repeat(np.arange(low, high), length_U[low:high])
            position_E = runs(first_U[low:high], length_U[low:high])
            yield user_E, position_E, self.user_starts[user_E] + position_E

    def kept_path(self, name: str) -> Path:
        """Where a kept value lies. The name is bound to this set's hash: nothing of an older preparation is read."""
        return self.path / ".cache" / f"{name}-{self.hash[:16]}"

    def kept(self, name: str, make: Callable[[], bytes]) -> bytes:
        """The value of `make`, a function of this set; called where none is kept on disk, or a damaged one.

        Where the disk is read-only or full the value is simply made again next time.
        """
        path = self.kept_path(name)
        raw = path.read_bytes() if path.is_file() else b""
        if raw[:_DIGEST_BYTES] == sha256_bytes(raw[_DIGEST_BYTES:]).encode():
            return raw[_DIGEST_BYTES:]
        data = make()
        try:
            write_atomic(path, sha256_bytes(data).encode() + data)
        except OSError as error:
            if error.errno not in _UNWRITABLE:
                raise
        return data


class Events:
    """Some events of a shard set: split by shard once, every column read when it is asked for."""

    def __init__(self, columns: Mapping[str, list[np.ndarray]], first_event: np.ndarray, index_N: np.ndarray) -> None:
        self._columns, self._first_event, self._index_N = columns, first_event, index_N

    @cached_property
    def _by_shard(self) -> list[tuple[np.intp, np.ndarray, np.ndarray]]:
        """Shard, places among the N events, rows in the shard."""
        shard_N = np.searchsorted(self._first_event, self._index_N, side="right") - 1
        places = ((shard, np.flatnonzero(shard_N == shard)) for shard in np.flatnonzero(np.bincount(shard_N)))
        return [(shard, place, self._index_N[place] - self._first_event[shard]) for shard, place in places]

    @property
    def item(self) -> np.ndarray:
        """Int32 [N]: item ids."""
        return self._read("item")

    @property
    def time(self) -> np.ndarray:
        """Int64 [N]: milliseconds or positions."""
        return self._read("time")

    def context(self, name: str) -> np.ndarray:
        """A context field [N] or [N, M]."""
        return self._read(f"context/{name}")

    def _read(self, name: str) -> np.ndarray:
        of_shards = self._columns[name]
        if len(of_shards) == 1:
            return of_shards[0][self._index_N]
        out = np.empty((len(self._index_N), *of_shards[0].shape[1:]), of_shards[0].dtype)
        for shard, place, row in self._by_shard:
            out[place] = of_shards[shard][row]
        return out
