"""Whether the bytes of a shard set are those that were prepared: asked once per machine, beside the first training.

Enters: an opened shard set, of which names and sizes were looked at. Leaves: its hash once every sum has been compared.
What was found is remembered in the machine's temporary folder, bound to path, size, time of change and inode of every
file, so that the next process does not read them again.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from bfm.errors import CorruptError
from bfm.events.shards import Shards
from bfm.files import canonical_json, sha256_bytes, write_atomic
from bfm.sealed import check_files

_LOOK_S = 1.0


class Verification:
    """Runs in a thread from the beginning on."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._error: CorruptError | OSError | None = None
        self._read_bytes = 0
        self._thread = threading.Thread(target=self._run, name="verify-shards", daemon=True)
        self._thread.start()

    def result(self, moves: Callable[[], object] = lambda: None) -> str:
        """The hash of the shard set, all of it verified; `moves` is called while one waits for it and more is read.

        Raises CorruptError that names the file that was altered.
        """
        read_bytes = self._read_bytes
        while self._thread.is_alive():
            self._thread.join(_LOOK_S)
            if self._read_bytes != read_bytes:
                read_bytes = self._read_bytes
                moves()
        if self._error is not None:
            raise self._error
        return self._shards.hash

    def _run(self) -> None:
        try:
            known = _memory() / self._shards.hash[:32]
            look = self._look()
            if known.is_file() and known.read_bytes() == look:
                return
            check_files(self._shards.path, self._shards.manifest.files, on_bytes=self._count)
            write_atomic(known, look)
        except (CorruptError, OSError) as error:
            self._error = error

    def _count(self, num_bytes: int) -> None:
        self._read_bytes += num_bytes

    def _look(self) -> bytes:
        """Changes when a file does, without reading any."""
        stats = {name: os.stat(self._shards.path / name) for name in self._shards.manifest.files}
        facts = {name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in stats.items()}
        return sha256_bytes(canonical_json([str(self._shards.path.absolute()), facts])).encode()


def _memory() -> Path:
    return Path(tempfile.gettempdir()) / f"bfm-verified-{os.getuid()}"
