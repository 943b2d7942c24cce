"""One TensorBoard event file on any store: scalars and summaries in; what earlier files of the folder hold, out.

Writes are synchronous and buffered: no thread to die behind the trainer's back. A disk that is full or read-only costs
one warning and the plots, never the training.
"""

from __future__ import annotations

import math
import os
import socket
import struct
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.fs
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from bfm.files import Store

FLUSH_S = 5.0
_HEADER_BYTES, _FOOTER_BYTES = 12, 4


def flops_step(flops: float) -> int:
    """TensorBoard's x axis is a whole number: C in FLOPs is plotted at round(1000 log10 C), so 1e12 is at 12000."""
    return round(1000 * math.log10(max(flops, 1.0)))


def stored_events(store: Store) -> Iterator[Event]:
    """All events of the folder's files, oldest file first; a file that a killed writer cut short ends early."""
    for name in store.names():
        if "tfevents" in name:
            yield from _events(store.get(name))


class EventFile:
    """A new event file in a folder. The first OSError turns it off with one warning."""

    def __init__(self, log_dir: str | Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.store = Store(log_dir)
        self._clock = clock
        self._writer: Any = None
        self._broken = False
        self._flushed_s = clock()

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """One event with all finite values; values that are missing or not finite are left out."""
        known = {tag: float(value) for tag, value in values.items() if value is not None and math.isfinite(value)}
        if known:
            self.summary(Summary(value=[Summary.Value(tag=tag, simple_value=known[tag]) for tag in known]), step)

    def summary(self, summary: Summary, step: int = 0) -> None:
        """One event with a summary."""
        self._guarded(lambda: self._write(Event(wall_time=time.time(), step=int(step), summary=summary)))
        if self._clock() - self._flushed_s > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Bring everything to the disk."""
        self._flushed_s = self._clock()
        if self._writer is not None:
            self._guarded(self._writer.flush)

    def close(self) -> None:
        """Flush and close; writing again opens another file."""
        if self._writer is not None:
            self._guarded(self._writer.close)
            self._writer = None

    def _write(self, event: Event) -> None:
        if self._writer is None:
            self._writer = RecordWriter(_new_stream(self.store))
            self._writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        self._writer.write(event.SerializeToString())

    def _guarded(self, action: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            action()
        except OSError as error:
            self._broken = True
            self._writer = None
            warnings.warn(f"TensorBoard is off: {self.store.uri} cannot be written ({error})", stacklevel=4)


def _new_stream(store: Store) -> Any:
    if store.is_local:
        Path(store.prefix).mkdir(parents=True, exist_ok=True)
    stamp = f"{time.time_ns() // 1000:016d}.{socket.gethostname()}.{os.getpid()}"
    path = f"{store.prefix}/events.out.tfevents.{stamp}"
    assert isinstance(store.filesystem, pyarrow.fs.FileSystem)
    return store.filesystem.open_output_stream(path, buffer_size=1 << 16)


def _events(data: bytes) -> Iterator[Event]:
    place = 0
    while place + _HEADER_BYTES <= len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        end = place + _HEADER_BYTES + length
        if end + _FOOTER_BYTES > len(data):
            return
        try:
            yield Event.FromString(data[place + _HEADER_BYTES : end])
        except DecodeError:
            return
        place = end + _FOOTER_BYTES
