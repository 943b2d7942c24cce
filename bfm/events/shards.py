"""The shard set on disk, memory-mapped.

Layout of a shard set (one directory):

    manifest.json        written last by `finish`: a directory without it is not a shard set
    protocol.json, protocol-<part>.npy
    items.parquet, items/*.npy, vocabulary/*.parquet       see encoding.py
    events/, users/                                        see parts.py
    quarantine/*.parquet
    .cache/              see `Shards.kept`; not in the manifest, may be deleted at any time

How to write one: `write_part` and `join_column`, `write_items`, then `Shards(path, draft_manifest)` reads what stands
already (for the protocol and the checks), then `finish(path, manifest)` hashes every file and publishes manifest.json.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from bfm.errors import CorruptError
from bfm.events.encoding import Encoding, map_array
from bfm.events.manifest import MANIFEST, SHARD_SET, Manifest, fetch
from bfm.files import Store, sha256_bytes, write_atomic
from bfm.ragged import chunks, runs
from bfm.sealed import check_files, list_files

_CHUNK_EVENTS = 1 << 20
_CHUNK_USERS = 1 << 20
_UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT}
_DIGEST_BYTES = 64
Span = tuple[np.ndarray | int, np.ndarray]
"""Of users: the position [U] in each history at which some events begin, and how many [U] they are."""


def finish(directory: Path, manifest: Manifest) -> Manifest:
    """Hash every file below the directory and publish manifest.json; returns the final manifest."""
    (directory / MANIFEST).unlink(missing_ok=True)
    manifest = dataclasses.replace(manifest, files=list_files(directory))
    SHARD_SET.write(Store(directory), manifest.as_dict())
    return manifest


class Shards(Encoding):
    """A shard set, memory-mapped and read-only: its memory is the page cache's, shared by all processes.

    Events have a global index: users one after the other.
    """

    user_starts: np.ndarray
    """[U+1] global index of each user's first event."""
    train_lengths: np.ndarray
    """[U] training events of each user."""
    valid_lengths: np.ndarray
    """[U] events of each user up to the end of validation."""
    train_stops: np.ndarray
    """[U] training events of this user and all users before."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Map the files that stand under `path` as the manifest describes them, without verification."""
        super().__init__(path, manifest)
        names = ["item", "time", *(f"context/{field.name}" for field in self.context_fields)]
        self._columns = {name: map_array(path / f"events/{name}.npy") for name in names}
        self.user_starts, train_starts, self.train_lengths, self.valid_lengths = (
            map_array(path / f"users/{name}.npy") for name in ("start", "train_start", "train_length", "valid_length")
        )
        self.train_stops = train_starts[1:]
        if len(self.train_lengths) != manifest.users or self.user_starts[-1] != manifest.events:
            raise CorruptError(f"{path}: users or events differ from what {MANIFEST} says")

    @classmethod
    def open(cls, path: str | Path) -> Shards:
        """Open a finished shard set; a URI is copied to a local cache first. Sums are left to verified.py.

        Raises:
            UserError: there is no shard set, or it is of another version.
            CorruptError: a file is missing, or not as large as it was (the message names it).
        """
        local = fetch(str(path)) if "://" in str(path) else Path(path)
        manifest = Manifest.from_dict(SHARD_SET.read(Store(local)))
        check_files(local, manifest.files, whole=False)
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
        return int(self.train_lengths @ self.train_lengths) / self.manifest.train_events

    @cached_property
    def train_counts(self) -> np.ndarray:
        """Int64 [V]: training events of each catalogue item, falling."""
        return self.items_table(["train_count"])["train_count"].to_numpy()[: self.num_catalogue]

    @property
    def user_lengths(self) -> np.ndarray:
        """Int64 [U]: events of each user."""
        return np.diff(self.user_starts)

    def item_at(self, index_N: np.ndarray) -> np.ndarray:
        """Int32 [N]: item ids of the events with these global indices."""
        return self._columns["item"][index_N]

    def time_at(self, index_N: np.ndarray) -> np.ndarray:
        """Int64 [N]: their milliseconds or positions."""
        return self._columns["time"][index_N]

    def context_at(self, name: str, index_N: np.ndarray) -> np.ndarray:
        """A context field of theirs, [N] or [N, M]."""
        return self._columns[f"context/{name}"][index_N]

    def all_events(self, users: slice) -> Span:
        """The whole histories of users."""
        return 0, np.diff(self.user_starts[users.start : users.stop + 1])

    def train_events(self, users: slice) -> Span:
        """The training events of users."""
        return 0, self.train_lengths[users]

    def user_events(
        self, span: Callable[[slice], Span], num_users: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Walk through the histories of the first users, whole users at a time, about a million events per chunk.

        Yields user [E], position in the user's history [E] and global index [E] of the events of a `span`, that of all
        users without `num_users`.
        """
        num_users = self.num_users if num_users is None else num_users
        for start in range(0, num_users, _CHUNK_USERS):
            users = slice(start, min(start + _CHUNK_USERS, num_users))
            first_U, length_U = span(users)
            first_U = np.broadcast_to(first_U, length_U.shape)
            for low, high in chunks(length_U, _CHUNK_EVENTS):
                user_E = np.repeat(np.arange(start + low, start + high), length_U[low:high])
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
