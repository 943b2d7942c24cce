"""Files that survive: atomic publish, checksums, canonical JSON, and one small object store over local paths and URIs.

Everything the platform must not lose is written through this module and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec.core
import pyarrow.fs

from bfm.errors import CorruptError, UserError


def sha256_bytes(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one byte string of a JSON value: sorted keys, no spaces, UTF-8; NaN is refused (ValueError)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def write_atomic(path: Path, data: bytes) -> None:
    """Publish a file whole or not at all; a full disk leaves the old file and raises OSError."""
    with _written_beside(path, data) as temporary:
        os.replace(temporary, path)


@contextmanager
def _written_beside(path: Path, data: bytes) -> Iterator[Path]:
    """A durable temporary file in the folder of `path`, with the permissions of any new file; gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


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
    """Named byte objects under one prefix, on a local path or any URI that pyarrow (or fsspec) knows.

    Objects are immutable by convention: `put` publishes whole objects, `put_new` only where none stands.
    """

    def __init__(self, uri: str | Path) -> None:
        self.uri = str(uri)
        self.filesystem, self.prefix = open_filesystem(self.uri)
        self.is_local = isinstance(self.filesystem, pyarrow.fs.LocalFileSystem)

    def child(self, name: str) -> Store:
        """The store under `name/`."""
        return Store(f"{self.uri.rstrip('/')}/{name}")

    def path(self, name: str) -> Path:
        """The local path of an object; only where `is_local`."""
        assert self.is_local, f"{self.uri} is not local"
        return Path(self.prefix) / name

    def put(self, name: str, data: bytes) -> None:
        """Publish an object whole or not at all."""
        if self.is_local:
            write_atomic(self.path(name), data)
            return
        # Object stores publish on close; there is no partial object to see.
        with self.filesystem.open_output_stream(f"{self.prefix}/{name}") as stream:
            stream.write(data)

    def put_new(self, name: str, data: bytes) -> bool:
        """Publish an object only where none stands; False if one does (exact on local disks, best effort elsewhere)."""
        if not self.is_local:
            if self.exists(name):
                return False
            self.put(name, data)
            return self.get(name) == data
        path = self.path(name)
        try:
            with _written_beside(path, data) as temporary:
                # A hard link fails where the name is taken, and shows the whole content at once.
                os.link(temporary, path)
        except FileExistsError:
            return False
        return True

    def get(self, name: str) -> bytes:
        """Read an object; FileNotFoundError where there is none."""
        with self.filesystem.open_input_file(f"{self.prefix}/{name}") as stream:
            return stream.read()

    def exists(self, name: str) -> bool:
        """Whether an object stands."""
        return self.filesystem.get_file_info(f"{self.prefix}/{name}").type == pyarrow.fs.FileType.File

    def names(self, folder: str = "") -> list[str]:
        """Sorted names of the objects directly in a folder, relative to the store."""
        base = f"{self.prefix}/{folder}".rstrip("/")
        selector = pyarrow.fs.FileSelector(base, allow_not_found=True)
        found = [info.base_name for info in self.filesystem.get_file_info(selector) if info.is_file]
        return sorted(f"{folder}/{name}" if folder else name for name in found if not name.startswith("."))

    def delete_folder(self, folder: str) -> None:
        """Remove a folder of objects if it stands."""
        if self.filesystem.get_file_info(f"{self.prefix}/{folder}").type == pyarrow.fs.FileType.Directory:
            self.filesystem.delete_dir(f"{self.prefix}/{folder}")


def parent_store(uri: str) -> tuple[Store, str]:
    """The store that a folder of objects lies in, and its name there."""
    folder, slash, name = uri.rstrip("/").rpartition("/")
    return Store(folder or slash or "."), name


def open_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system and path of a local path or URI. Raises UserError where it is not known.

    Schemes unknown to pyarrow are asked of fsspec.
    """
    if "://" not in uri:
        return pyarrow.fs.LocalFileSystem(), str(Path(uri).absolute())
    try:
        return pyarrow.fs.FileSystem.from_uri(uri)
    except pyarrow.ArrowInvalid:
        pass
    except OSError as error:
        raise _cannot_open(uri, error) from error
    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise _cannot_open(uri, error) from error
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), path


def _cannot_open(uri: str, error: Exception) -> UserError:
    return UserError(f"cannot open {uri!r} ({error})", fix="use a local path or a URI such as s3://...")
