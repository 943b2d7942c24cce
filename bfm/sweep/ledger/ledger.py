"""The ledger: the only truth of a sweep, as immutable checksummed segments under one prefix.

Enters: batches of JSON records; each `append` creates the next object `ledger/<thousand>/<number>.jsonl`, whole or not
at all. Numbers run from 1 without gaps, and creating one is what decides between writers: who finds the next number
taken has lost the sweep, and no acknowledged record is ever left out. Leaves: all records in order.

Segments are read in few requests however many there are: segment n also brings a pack, the records of the last
`_covered(n)` segments, itself included (n = 12 covers 9..12), so the binary digits of the last number name all that has
to be read. A pack is a copy: where one is damaged, the segments that it covers are read instead. A segment names the
checksums of the one before it and of the one before its pack, so an altered, truncated or missing one is found.
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
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic_core import from_json

from bfm.errors import CorruptError, UserError
from bfm.files import Store, canonical_json, checksum
from bfm.sweep.ledger.repeats import Repeats
from bfm.sweep.ledger.state import SweepState

if TYPE_CHECKING:
    from bfm.sweep.ledger.lease import Lease

FOLDER = "ledger"
VERSION = 2
PER_FOLDER = 1000
"""Segments in a folder: one page of an object store's listing."""
COMPRESSED_FROM = 64
"""Packs of fewer segments are plain JSON lines."""
_NAME = re.compile(r"ledger/\d{5}/(\d{8})\.jsonl")
_READERS = 8
_BLOCK_BYTES = 1 << 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pack:
    """The records of consecutive segments, encoded."""

    covers: int
    data: bytes
    """JSON lines, compressed from COMPRESSED_FROM segments on."""


@dataclass
class Replay:
    """What a ledger holds."""

    records: list[dict[str, Any]] = field(default_factory=list)
    segments: int = 0
    epoch: int = 0
    """Of the lease under which the last segment was written."""
    packs: tuple[_Pack, ...] = ()
    """That hold all records, in order."""
    sums: dict[int, str] = field(default_factory=dict)
    """Number -> checksum of the segments that were read."""
    repeats: Repeats = field(default_factory=Repeats)


class Ledger:
    """The writer's side: holds a lease, reads what stands, appends."""

    def __init__(self, store: Store, lease: Lease) -> None:
        self.store, self.lease = store, lease
        while True:
            self.replay = read_ledger(store)
            if self.replay.epoch > self.epoch:
                raise self._lost()
            self._number, self._packs, self._sums = self.replay.segments, self.replay.packs, self.replay.sums
            # An empty segment shuts out the last holder; what it had appended until then is read.
            if self._publish([]):
                return

    @property
    def epoch(self) -> int:
        """Of the lease."""
        return self.lease.epoch

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Publish records together, in one request.

        Raises UserError where another driver has taken over, OSError if the storage refuses.
        """
        if not self._publish(records):
            raise self._lost()

    def _lost(self) -> UserError:
        return UserError("another sweep has taken over here", file=self.store.uri, fix="resume from its ledger")

    def _publish(self, records: Sequence[dict[str, Any]]) -> bool:
        number = self._number + 1
        short, new = self.replay.repeats.shorten(records)
        lines = b"".join(canonical_json(record) + b"\n" for record in short)
        older, pack = _packed(self._packs, _Pack(1, lines), _covered(number))
        header = {
            "segment": number,
            "version": VERSION,
            "epoch": self.epoch,
            "records": len(records),
            "previous": self._sums.get(number - 1),
            "before_pack": self._sums.get(number - pack.covers),
            "pack": checksum(pack.data) if pack.covers > 1 else None,
        }
        body = canonical_json(header) + b"\n" + lines
        told = checksum(body)
        first = canonical_json(told) + b"\n"
        data = first + body + (pack.data if pack.covers > 1 else b"")
        if not self.store.put_new(_name(number), data):
            return False
        self.replay.repeats.keep(new)
        self._number, self._packs = number, (*older, pack)
        # Later segments refer to this one and to those before the packs that still stand alone.
        ends = [number]
        for standing in reversed(self._packs):
            ends.append(ends[-1] - standing.covers)
        self._sums = {end: self._sums[end] for end in ends[1:] if end} | {number: told["sha256"]}
        return True

    def drop(self, folder: str) -> None:
        """Delete a folder of the sweep that the ledger says is kept no longer; where that fails, it may stay."""
        if not self.lease.is_held:
            return
        try:
            self.store.delete_folder(folder)
        except (OSError, UserError) as error:
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


def has_begun(store: Store) -> bool:
    """Whether anything was ever written into a ledger here."""
    return bool(store.folders(FOLDER) or store.names(FOLDER))


def read_ledger(store: Store) -> Replay:
    """All records, verified; needs no lease.

    Raises CorruptError that names the damaged segment, UserError for a ledger of another version.
    """
    with collector_paused():
        replay = _read(store)
        replay.records += _records(replay)
        return replay


def read_state(store: Store) -> SweepState:
    """The state of a sweep as its ledger stands; needs no lease. Raises as `read_ledger`."""
    with collector_paused():
        return SweepState.fold(_records(_read(store)))


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Segment:
    """A segment as read, verified but for its pack."""

    epoch: int
    checksum: str
    previous: str | None
    before_pack: str | None
    lines: bytes
    pack: bytes | None
    """None: damaged."""


def _read(store: Store) -> Replay:
    """What stands, verified, but for its records."""
    last = _last_number(store)
    numbers = [last]
    while numbers[-1]:
        numbers.append(numbers[-1] - _covered(numbers[-1]))
    ahead = dict(zip(numbers[:-1], _fetch(store, [_name(number) for number in numbers[:-1]]), strict=True))
    packs: list[_Pack] = []
    replay = Replay(segments=last)
    number, expected = last, None
    while number:
        segment = _decode(store, number, ahead.get(number) or _get(store, _name(number)))
        if expected is not None and segment.checksum != expected:
            raise CorruptError(f"{store.uri}/{_name(number)}: was altered (its successor knows another checksum)")
        replay.sums[number] = segment.checksum
        replay.epoch = max(replay.epoch, segment.epoch)
        if segment.pack is None:
            _log.warning("%s/%s: its pack is damaged; reading what it covers", store.uri, _name(number))
            packs.append(_Pack(1, segment.lines))
            number, expected = number - 1, segment.previous
        else:
            packs.append(_Pack(_covered(number), segment.pack))
            number, expected = number - _covered(number), segment.before_pack
    replay.packs = tuple(reversed(packs))
    return replay


def _records(replay: Replay) -> Iterator[dict[str, Any]]:
    """The records of the packs, in order: whoever folds them as they come finds them in the CPU's cache."""
    for lines in (block for pack in replay.packs for block in _blocks(pack)):
        # The parser that comes with pydantic takes a third of the time of `json`, and rounds no whole number. Values
        # are seldom seen twice: looking them up among those seen before costs more than it saves.
        records = from_json(b"[%b]" % lines.replace(b"\n", b","), cache_strings="keys")
        replay.repeats.restore(records)
        yield from records


def _last_number(store: Store) -> int:
    """The number of the last segment; 0 if none. Raises CorruptError where one beside it is missing."""
    folders = store.folders(FOLDER)
    if not folders:
        if store.names(FOLDER):
            place = f"{store.uri}/{FOLDER}"
            raise UserError(f"is not of version {VERSION}", file=place, fix="read it with the bfm that wrote it")
        return 0
    found = sorted(int(match[1]) for name in store.names(folders[-1]) if (match := _NAME.fullmatch(name)))
    due = max(1, int(folders[-1].rpartition("/")[2]) * PER_FOLDER)
    for number in found:
        if number != due:
            raise CorruptError(f"{store.uri}/{_name(due)}: is missing")
        due += 1
    return due - 1


def _fetch(store: Store, names: Sequence[str]) -> list[bytes]:
    if store.is_local:
        return [_get(store, name) for name in names]
    # Object stores answer slowly, but many at once.
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda name: _get(store, name), names))


def _get(store: Store, name: str) -> bytes:
    try:
        return store.get(name)
    except FileNotFoundError:
        raise CorruptError(f"{store.uri}/{name}: is missing") from None


def _decode(store: Store, number: int, data: bytes) -> _Segment:
    place = f"{store.uri}/{_name(number)}"
    first, _, rest = data.partition(b"\n")
    try:
        told = json.loads(first)
        body, pack = rest[: told["bytes"]], rest[told["bytes"] :]
        whole = canonical_json(checksum(body)) == first
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise CorruptError(f"{place}: truncated or altered (its checksum does not fit); restore it from a copy")
    head, _, lines = body.partition(b"\n")
    header = json.loads(head)
    if header["version"] != VERSION:
        raise UserError(f"ledger version {header['version']}", file=place, fix="read it with the bfm that wrote it")
    if header["segment"] != number or header["records"] != lines.count(b"\n"):
        raise CorruptError(f"{place}: is a copy of segment {header['segment']}")
    kept: bytes | None = lines
    if header["pack"] is not None:
        kept = pack if checksum(pack) == header["pack"] else None
    return _Segment(header["epoch"], told["sha256"], header["previous"], header["before_pack"], lines, kept)


# ---------------------------------------------------------------- packs


def _name(number: int) -> str:
    return f"{FOLDER}/{number // PER_FOLDER:05d}/{number:08d}.jsonl"


def _covered(number: int) -> int:
    """How many segments the pack of one holds: the lowest binary digit of its number."""
    return number & -number


def _packed(packs: tuple[_Pack, ...], own: _Pack, covers: int) -> tuple[tuple[_Pack, ...], _Pack]:
    """The packs that stay, and one of so many segments from the others and `own`."""
    total, first = own.covers, len(packs)
    while total < covers:
        first -= 1
        total += packs[first].covers
    joined = [*packs[first:], own]
    if covers < COMPRESSED_FROM:
        return packs[:first], _Pack(covers, b"".join(pack.data for pack in joined))
    parts, plain = [], b""
    for pack in joined:
        if pack.covers < COMPRESSED_FROM:
            plain += pack.data
            continue
        parts += [_compressed(plain), pack.data]
        plain = b""
    return packs[:first], _Pack(covers, b"".join([*parts, _compressed(plain)]))


def _compressed(lines: bytes) -> bytes:
    """One zstd frame; frames that follow each other are read as one."""
    return pa.compress(lines, codec="zstd", asbytes=True) if lines else b""


def _blocks(pack: _Pack) -> Iterator[bytes]:
    """The lines of a pack, whole ones without the last one's end, so many at a time that the CPU's cache holds them."""
    if not pack.data:
        return
    stream = pa.BufferReader(pack.data)
    if pack.covers >= COMPRESSED_FROM:
        stream = pa.CompressedInputStream(stream, "zstd")
    cut = b""
    while block := stream.read(_BLOCK_BYTES):
        lines, end, cut = (cut + block).rpartition(b"\n")
        if end:
            yield lines
