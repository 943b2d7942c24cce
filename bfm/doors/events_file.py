"""One TensorBoard event file on any store: scalars and summaries in; what earlier files of the folder hold, out.

On a disk events are appended to one file. Object stores cannot append: there they wait in memory and become a file of
their own every `PART_S`, so that a running sweep is seen there too; TensorBoard reads the files of a folder in order of
their names. A disk that is full, or storage that is away, costs one warning and the plots, never the training.

Records are framed by tensorboard's own RecordWriter. Its EventFileWriter, and torch's SummaryWriter over it, are not
enough: their thread keeps a full disk's error for whoever writes next, and on an object store, which they reach by
boto3 or fsspec alone, each flush writes the whole file again.
"""

from __future__ import annotations

import io
import math
import os
import socket
import struct
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from bfm.errors import UserError
from bfm.files import Store
from bfm.patience import TRANSIENT

FLUSH_S = 5.0
PART_S = 60.0
"""On object stores: a request a minute."""
CLOSING_S = 60.0
"""How long storage that is away is waited for at the end."""
_WAITING_BYTES = 1 << 26
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
        self._stamp = f"{time.time_ns() // 1000:016d}.{socket.gethostname()}.{os.getpid()}"
        self._part = 0
        self._stream: BinaryIO | None = None
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
        self.flush(FLUSH_S)

    def flush(self, every_s: float = 0.0) -> None:
        """Show everything so far, if that was `every_s` ago, on object stores `PART_S`."""
        now_s = self._clock()
        if self._stream is not None and now_s - self._flushed_s >= max(every_s, 0.0 if self.store.is_local else PART_S):
            self._flushed_s = now_s
            self._guarded(self._show)

    def close(self) -> None:
        """Show everything and close; writing again opens another file."""
        if self._stream is not None:
            self._guarded(lambda: self._show(CLOSING_S))
        if self._stream is not None:
            self._stream.close()
            self._part += 1
        self._stream = self._writer = None

    def _write(self, event: Event) -> None:
        if self._writer is None:
            self._stream = _append(self.store.path(self._name())) if self.store.is_local else io.BytesIO()
            self._writer = RecordWriter(self._stream)
            self._writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        self._writer.write(event.SerializeToString())

    def _name(self) -> str:
        return f"events.out.tfevents.{self._stamp}.{self._part:06d}"

    def _show(self, patience_s: float = 0.0) -> None:
        if not isinstance(self._stream, io.BytesIO):
            assert self._stream is not None
            self._stream.flush()
            return
        try:
            self.store.with_patience(patience_s).put(self._name(), self._stream.getvalue())
        except OSError as error:
            # Plots are not worth a pause of training: what storage that is away did not take is tried again later.
            if error.errno in TRANSIENT and patience_s == 0 and self._stream.tell() < _WAITING_BYTES:
                return
            raise
        self._stream = self._writer = None
        self._part += 1

    def _guarded(self, action: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            action()
        except (OSError, UserError) as error:
            self._broken = True
            self._stream = self._writer = None
            warnings.warn(f"TensorBoard is off: {self.store.uri} cannot be written ({error})", stacklevel=4)


def _append(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "ab", buffering=1 << 16)


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
