"""Files that survive: checksums, canonical JSON, and one small store of objects over local paths and URIs.

Everything the platform must not lose is written through this module and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from bfm.disk import Disk
from bfm.errors import CorruptError, UserError
from bfm.objects import Objects, ObjectStream, buffered
from bfm.patience import PATIENCE_S, Result, patiently

_PIECE_BYTES = 1 << 18


def check_encoding() -> None:
    """Raises UserError where this Python takes file names for anything but UTF-8: it would find other files."""
    if (encoding := sys.getfilesystemencoding()) != "utf-8":
        fix = "set it to 1, or take a UTF-8 locale"
        raise UserError(f"this Python takes the names of files for {encoding}", key="PYTHONUTF8", fix=fix)


def absolute(place: str) -> str:
    """A path or URI that means the same from any working directory."""
    return place if "://" in place else str(Path(place).absolute())


def sha256_bytes(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def checksum(data: bytes) -> dict[str, Any]:
    """What tells later whether bytes are whole and unaltered."""
    return {"sha256": sha256_bytes(data), "bytes": len(data)}


def sha256_file(path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """Hex digest of a file, read in pieces; `on_bytes` is told how many came with each."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE_BYTES))
    with open(path, "rb", buffering=0) as handle:
        while count := handle.readinto(piece):
            digest.update(piece[:count])
            on_bytes(count)
    return digest.hexdigest()


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_json(value: Any) -> bytes:
    """The one byte string of a JSON value: sorted keys, no spaces, UTF-8; NaN is refused (ValueError)."""
    return _CANONICAL.encode(value).encode()


def write_atomic(path: Path, data: bytes) -> None:
    """Publish a file whole or not at all; a full disk leaves the old file and raises OSError."""
    Store(path.parent).put(path.name, data)


def readable_json(value: Any) -> bytes:
    """JSON for people too: sorted, indented; NaN is refused (ValueError)."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def write_json(path: Path, value: Any) -> None:
    """Publish readable JSON atomically."""
    write_atomic(path, readable_json(value))


def read_json(path: Path) -> Any:
    """Read JSON; raises CorruptError that names the file when it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptError(f"{path}: not valid JSON ({error})") from error


class Store:
    """Named byte objects under one prefix, on a local path or an object store's URI (bfm/disk.py, bfm/objects.py).

    Objects are immutable by convention: `put` publishes whole objects, `put_new` only where none stands. A storage
    that is away is waited for (bfm/patience.py). Every method raises UserError where bucket, credentials or access
    are wanting, and OSError where the storage refuses or was away for longer than `patience_s`.
    """

    def __init__(self, uri: str | Path, *, patience_s: float = PATIENCE_S) -> None:
        self.uri, self.patience_s = _tidy(str(uri)), patience_s
        self.is_local = "://" not in self.uri
        self._place: Disk | Objects = Disk(Path(self.uri).absolute()) if self.is_local else Objects(self.uri)

    def child(self, name: str) -> Store:
        """The store under `name/`."""
        if isinstance(self._place, Disk):
            return Store(f"{self.uri}/{name}", patience_s=self.patience_s)
        return self._with(f"{self.uri}/{name}", self._place.child(name), self.patience_s)

    def with_patience(self, patience_s: float) -> Store:
        """The same store that waits so long for storage that is away; 0 tries once."""
        return self._with(self.uri, self._place, patience_s)

    @staticmethod
    def _with(uri: str, place: Disk | Objects, patience_s: float) -> Store:
        other = object.__new__(Store)
        other.uri, other._place, other.patience_s = uri, place, patience_s
        other.is_local = isinstance(place, Disk)
        return other

    def path(self, name: str = "") -> Path:
        """The local path of an object, or of the store itself; only where `is_local`."""
        assert isinstance(self._place, Disk), f"{self.uri} is not local"
        return self._place.folder / name

    def put(self, name: str, data: bytes | Path) -> None:
        """Publish bytes, or those of a file of any size, whole or not at all."""
        self._patiently(name, lambda _: self._place.put(name, data))

    def put_new(self, name: str, data: bytes) -> bool:
        """Publish an object only where none stands; False if one does. Of many callers exactly one succeeds.

        Callers that compete must bring different data.
        """

        def create(failed: int) -> bool:
            if self._place.create(name, data):
                return True
            # Of an attempt that seemed to fail only the answer may have been lost.
            return failed > 0 and self._place.get(name) == data

        return self._patiently(name, create)

    def check_writable(self) -> None:
        """Put something and take it away again: raises now what writing here would raise later."""
        name = f"writable-{uuid.uuid4().hex}"
        try:
            self.put(name, b"written")
            self.delete(name)
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), self.uri) from error

    def get(self, name: str) -> bytes:
        """Read an object; FileNotFoundError where there is none."""
        return self._patiently(name, lambda _: self._place.get(name))

    def open(self, name: str) -> BinaryIO:
        """A seekable stream of an object, to be read in parts; FileNotFoundError where there is none."""
        place = self._place
        if isinstance(place, Disk):
            return self._patiently(name, lambda _: place.open(name))
        size = self._patiently(name, lambda _: place.size(name))
        return buffered(
            ObjectStream(size, lambda low, high: self._patiently(name, lambda _: place.read(name, low, high)))
        )

    def exists(self, name: str) -> bool:
        """Whether an object stands."""
        return self._patiently(name, lambda _: self._place.exists(name))

    def names(self, folder: str = "") -> list[str]:
        """Sorted names of the objects directly in a folder, relative to the store; hidden ones are left out."""
        return self._visible(folder, self._patiently(folder, lambda _: self._place.entries(folder)[0]))

    def folders(self, folder: str = "") -> list[str]:
        """Sorted names of the folders directly in a folder, relative to the store; hidden ones are left out."""
        return self._visible(folder, self._patiently(folder, lambda _: self._place.entries(folder)[1]))

    def walk(self, folder: str = "") -> list[str]:
        """Sorted names of all objects below a folder, relative to the store."""
        return sorted(self._patiently(folder, lambda _: self._place.walk(folder)))

    def delete(self, name: str) -> None:
        """Remove an object if it stands."""
        self._patiently(name, lambda _: self._place.delete(name))

    def delete_folder(self, folder: str) -> None:
        """Remove a folder of objects if it stands."""
        self._patiently(folder, lambda _: self._place.delete_folder(folder))

    def _patiently(self, name: str, action: Callable[[int], Result]) -> Result:
        return patiently(action, f"{self.uri}/{name}".rstrip("/"), self.patience_s)

    @staticmethod
    def _visible(folder: str, names: list[str]) -> list[str]:
        return sorted(f"{folder}/{name}" if folder else name for name in names if not name.startswith("."))


def parent_store(uri: str) -> tuple[Store, str]:
    """The store that a folder or an object lies in, and its name there."""
    folder, slash, name = uri.rstrip("/").rpartition("/")
    return Store(folder or slash or "."), name


def _tidy(uri: str) -> str:
    """Without slashes at its end; file:// URIs as the paths that they are."""
    uri = uri.removeprefix("file://")
    return uri.rstrip("/") or uri
