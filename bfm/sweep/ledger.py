"""The ledger: the only truth of a sweep, as immutable checksummed segments under one prefix.

Enters: batches of JSON records; each `append` publishes one new object `ledger/<lease epoch>-<number>.jsonl`, whole or
not at all. Leaves: all records in order. A segment's first line is the sha256 of the rest, its second line a header
that names the previous segment and its sha256, so segments form a chain: an altered, truncated or missing one is
found and named, and what a fenced writer appended after its successor had read it is off the chain and ignored.
"""

from __future__ import annotations

import gc
import json
import logging
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from bfm.errors import CorruptError, UserError
from bfm.files import Store, canonical_json, sha256_bytes
from bfm.sweep.lease import Lease
from bfm.sweep.state import SweepState

FOLDER = "ledger"
VERSION = 1
_NAME = re.compile(r"ledger/(\d{6})-(\d{8})\.jsonl")
_READERS = 8
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Link:
    """A segment as its successor refers to it."""

    name: str
    sha256: str


@dataclass
class Replay:
    """What a ledger holds."""

    records: list[dict[str, Any]] = field(default_factory=list)
    fenced: list[str] = field(default_factory=list)
    """Segments of writers that had lost their lease; their records are left out."""
    segments: int = 0
    last: _Link | None = None


class Ledger:
    """The writer's side: holds a lease, reads what stands, appends."""

    def __init__(self, store: Store, lease: Lease) -> None:
        self.store, self.lease = store, lease
        self.replay = read_ledger(store)
        self._last = self.replay.last
        self._next_number = 0

    @property
    def epoch(self) -> int:
        """Of the lease."""
        return self.lease.epoch

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Publish records together. Raises UserError after the lease was lost, OSError if the storage refuses."""
        if not self.lease.is_held:
            raise UserError("another sweep has taken over here", file=self.store.uri, fix="resume from its ledger")
        name = f"{FOLDER}/{self.lease.epoch:06d}-{self._next_number:08d}.jsonl"
        data = _encode(name, records, self._last)
        if not self.store.put_new(name, data):
            raise UserError("another sweep writes here", file=f"{self.store.uri}/{name}", fix="stop one of them")
        self._last = _Link(name, sha256_bytes(data))
        self._next_number += 1

    def drop(self, folder: str) -> None:
        """Delete a folder of the sweep that the ledger says is kept no longer; a failure is left to the next resume."""
        if not self.lease.is_held:
            return
        try:
            self.store.delete_folder(folder)
        except OSError as error:
            _log.warning("%s/%s could not be deleted: %s", self.store.uri, folder, error)

    def close(self) -> None:
        """Give the lease back."""
        self.lease.release()


class MemoryLedger:
    """A ledger that ends with the process: for simulations."""

    def __init__(self, records: Sequence[dict[str, Any]] = ()) -> None:
        self.replay = Replay(records=list(records))
        self.records = list(records)
        self.epoch = 1
        self.dropped: list[str] = []

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Keep records, as JSON would bring them back."""
        self.records += json.loads(canonical_json(list(records)))

    def drop(self, folder: str) -> None:
        """Note what would be deleted."""
        self.dropped.append(folder)

    def close(self) -> None:
        """Nothing is held."""


@contextmanager
def collector_paused() -> Iterator[None]:
    """Python's cycle collector off: it walks all of a growing ledger again and again and finds no cycle."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_ledger(store: Store) -> Replay:
    """All records, verified; needs no lease. Raises CorruptError that names the damaged segment."""
    with collector_paused():
        return _read(store)


def read_state(store: Store) -> SweepState:
    """The state of a sweep as its ledger stands; needs no lease. Raises CorruptError as `read_ledger`."""
    with collector_paused():
        return SweepState.fold(_read(store).records)


def _read(store: Store) -> Replay:
    names = [name for name in store.names(FOLDER) if _NAME.fullmatch(name)]
    chain: list[tuple[_Link, list[dict[str, Any]]]] = []
    places: dict[_Link, int] = {}
    replay = Replay()
    for name, data in zip(names, _fetch(store, names), strict=True):
        previous, records = _decode(f"{store.uri}/{name}", name, data)
        kept = _place(previous, places, chain, name)
        for link, _ in chain[kept:]:
            replay.fenced.append(link.name)
            del places[link]
        del chain[kept:]
        link = _Link(name, sha256_bytes(data))
        places[link] = len(chain)
        chain.append((link, records))
    for _, records in chain:
        replay.records += records
    replay.segments = len(chain)
    replay.last = chain[-1][0] if chain else None
    return replay


def _place(
    previous: _Link | None, places: dict[_Link, int], chain: list[tuple[_Link, list[dict[str, Any]]]], name: str
) -> int:
    """How many segments of the chain stay when `name` is put behind `previous`."""
    kept = 0 if previous is None else places.get(previous, -1) + 1
    if previous is not None and kept == 0:
        raise CorruptError(f"{previous.name}: is missing or was altered ({name} follows it)")
    if any(_epoch(link.name) >= _epoch(name) for link, _ in chain[kept:]):
        raise CorruptError(f"{name}: does not follow {chain[-1][0].name}; a segment between them is missing")
    return kept


def _encode(name: str, records: Sequence[dict[str, Any]], previous: _Link | None) -> bytes:
    header = {
        "segment": name,
        "version": VERSION,
        "records": len(records),
        "previous": None if previous is None else [previous.name, previous.sha256],
    }
    body = b"".join(canonical_json(line) + b"\n" for line in (header, *records))
    return canonical_json({"sha256": sha256_bytes(body)}) + b"\n" + body


def _decode(place: str, name: str, data: bytes) -> tuple[_Link | None, list[dict[str, Any]]]:
    checksum, _, body = data.partition(b"\n")
    if checksum != canonical_json({"sha256": sha256_bytes(body)}):
        raise CorruptError(f"{place}: truncated or altered (its checksum does not fit); restore it from a copy")
    header, *records = json.loads(b"[" + b",".join(body.splitlines()) + b"]")
    if header["version"] != VERSION:
        raise UserError(f"ledger version {header['version']}", file=place, fix="read it with the bfm that wrote it")
    if header["segment"] != name or header["records"] != len(records):
        raise CorruptError(f"{place}: is a copy of {header['segment']}")
    previous = header["previous"]
    return (None if previous is None else _Link(*previous)), records


def _fetch(store: Store, names: Sequence[str]) -> list[bytes]:
    if store.is_local:
        return [store.path(name).read_bytes() for name in names]
    # One request per segment: object stores answer slowly, but many at once.
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(store.get, names))


def _epoch(name: str) -> int:
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match[1])
