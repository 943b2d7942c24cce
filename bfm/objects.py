"""One prefix of an object store (S3, GCS, Azure) as a place for whole objects: what `bfm.files.Store` does on URIs.

The libraries' errors leave as the few that callers tell apart: FileNotFoundError, UserError for what the user has to
mend (no such bucket, no credentials, no access), OSError(EIO) for what waiting mends, other OSErrors for the rest.
Credentials and endpoints come from the environment, as obstore reads it (AWS_*, GOOGLE_*, AZURE_*).
"""

from __future__ import annotations

import errno
import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from bfm.errors import UserError

SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss", "azure", "adl")
CLIENT = {"connect_timeout": "5s", "read_timeout": "60s", "timeout": "30m"}
READ_BYTES = 1 << 23
_CLOUDS = ("AWS", "GOOGLE", "AZURE")
_STATUS = re.compile(r"status code: (\d{3})")
_NO_BUCKET = re.compile(r"NoSuchBucket|bucket does not exist|ContainerNotFound|container does not exist", re.I)
_NO_CREDENTIALS = re.compile(r"169\.254\.169\.254|metadata\.google\.internal|no credentials|MissingCredential", re.I)
_WRONG_REGION = re.compile(r"incorrectly configured region|AuthorizationHeaderMalformed|PermanentRedirect", re.I)
_THROTTLED = {"408", "425", "429"}


class Objects:
    """Objects below a URI; a child shares the connections."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._client, self._prefix = _connect(uri), ""
        self._answered = threading.Event()

    def child(self, name: str) -> Objects:
        """The objects under `name/`."""
        other = object.__new__(Objects)
        other.uri, other._client, other._answered = f"{self.uri}/{name}", self._client, self._answered
        other._prefix = f"{self._prefix}{name}/"
        return other

    def put(self, name: str, data: bytes | Path) -> None:
        """Publish bytes, or a file's, over what stands under the name; large ones go in parts, and are seen whole."""
        with self._plain_errors(name):
            self._client.put(self._prefix + name, data)

    def create(self, name: str, data: bytes) -> bool:
        """Publish an object only where none stands; whether it was done."""
        import obstore.exceptions

        with self._plain_errors(name):
            try:
                self._client.put(self._prefix + name, data, mode="create", use_multipart=False)
            except obstore.exceptions.AlreadyExistsError as error:
                if "ConditionalRequestConflict" in str(error):
                    # S3 has not decided yet between writers that came at once.
                    raise OSError(errno.EIO, "conflicting writes", f"{self.uri}/{name}") from error
                return False
        return True

    def get(self, name: str) -> bytes:
        """Read an object; FileNotFoundError where there is none."""
        with self._plain_errors(name):
            return self._client.get(self._prefix + name).bytes().to_bytes()

    def size(self, name: str) -> int:
        """Bytes of an object; FileNotFoundError where there is none."""
        with self._plain_errors(name):
            return int(self._client.head(self._prefix + name)["size"])

    def read(self, name: str, start: int, end: int) -> bytes:
        """A part of an object, from byte `start` to before `end`."""
        with self._plain_errors(name):
            return self._client.get_range(self._prefix + name, start=start, end=end).to_bytes()

    def exists(self, name: str) -> bool:
        """Whether an object stands."""
        try:
            self.size(name)
        except FileNotFoundError:
            return False
        return True

    def entries(self, folder: str) -> tuple[list[str], list[str]]:
        """Objects and folders directly in a folder, by their last part."""
        prefix = f"{self._prefix}{folder}".rstrip("/")
        with self._plain_errors(folder):
            found = self._client.list_with_delimiter(prefix or None)
        paths = [entry["path"] for entry in found["objects"]], found["common_prefixes"]
        objects, folders = ([path.rstrip("/").rpartition("/")[2] for path in part] for part in paths)
        return objects, folders

    def walk(self, folder: str) -> list[str]:
        """All objects below a folder."""
        prefix = f"{self._prefix}{folder}".rstrip("/")
        with self._plain_errors(folder):
            found = [entry["path"] for chunk in self._client.list(prefix or None) for entry in chunk]
        return [path[len(self._prefix) :] for path in found]

    def delete(self, name: str) -> None:
        """Remove an object if it stands."""
        try:
            with self._plain_errors(name):
                self._client.delete(self._prefix + name)
        except FileNotFoundError:
            pass

    def delete_folder(self, folder: str) -> None:
        """Remove all objects below a folder."""
        names = [self._prefix + name for name in self.walk(folder)]
        if names:
            with self._plain_errors(folder):
                self._client.delete(names)

    @contextmanager
    def _plain_errors(self, name: str) -> Iterator[None]:
        import obstore.exceptions

        try:
            yield
        except FileNotFoundError as error:
            raise self._plain(name, error) from None
        except obstore.exceptions.BaseError as error:
            raise self._plain(name, error) from error
        self._answered.set()

    def _plain(self, name: str, error: Exception) -> Exception:
        text, place = str(error), f"{self.uri}/{name}"
        words = " ".join(text.partition("Debug source")[0].split())[:300]
        code = _STATUS.search(text)
        status = code[1] if code else None
        if _NO_BUCKET.search(text):
            return UserError("there is no such bucket", file=self.uri, fix="create it, or check the URI")
        # Once the storage has answered, the same failures are hiccups of what renews the credentials.
        if _NO_CREDENTIALS.search(text) and not self._answered.is_set():
            fix = f"set {_credentials(self.uri)} in the environment"
            return UserError("no credentials found for this storage", file=self.uri, fix=fix)
        if "builder error" in text:
            fix = "set AWS_ALLOW_HTTP=true where it is meant to be plain http"
            return UserError("the endpoint cannot be used", file=self.uri, fix=fix)
        if _WRONG_REGION.search(text):
            return UserError("the bucket is in another region", file=self.uri, fix="set AWS_REGION")
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place)
        if status in ("401", "403") or type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
            return UserError(
                f"access refused ({words})",
                file=place,
                fix="check the credentials, their rights and this machine's clock",
            )
        if status is None or status.startswith("5") or status in _THROTTLED:
            return OSError(errno.EIO, words, place)
        return OSError(errno.EPROTO, words, place)


class ObjectStream(io.RawIOBase):
    """A seekable stream over ranges of one object; `read(start, end)` fetches."""

    def __init__(self, size: int, read: Callable[[int, int], bytes]) -> None:
        self._size, self._read, self._place = size, read, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte."""
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        """The current byte."""
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the object goes."""
        end = min(self._place + len(buffer), self._size)
        if end <= self._place:
            return 0
        data = self._read(self._place, end)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def buffered(stream: ObjectStream) -> BinaryIO:
    """Few large requests instead of many small ones."""
    return io.BufferedReader(stream, READ_BYTES)


def _connect(uri: str) -> Any:
    scheme = urlsplit(uri).scheme
    fix = f"use a local path or one of {', '.join(f'{name}://' for name in SCHEMES[:4])}"
    if scheme not in SCHEMES:
        raise UserError(f"storage of the kind {scheme}:// is not known", file=uri, fix=fix)
    try:
        import obstore.exceptions
        from obstore.store import from_url
    except ImportError as error:
        raise UserError("obstore is not installed", file=uri, fix="pip install obstore, or use a local path") from error
    try:
        # Attempts are counted in `bfm.patience`, where a repeated conditional create is understood.
        return from_url(uri, client_options=_client_options(), retry_config={"max_retries": 0})
    except (obstore.exceptions.BaseError, ValueError) as error:
        words = " ".join(str(error).partition("Debug source")[0].split())[:200]
        raise UserError(f"cannot be opened ({words})", file=uri, fix=fix) from error


def _client_options() -> Any:
    """Options of the client hide those of the environment, so that one is handed on."""
    allowed = any(os.environ.get(f"{cloud}_ALLOW_HTTP", "").lower() in ("true", "1") for cloud in _CLOUDS)
    return {**CLIENT, "allow_http": allowed}


def _credentials(uri: str) -> str:
    scheme = urlsplit(uri).scheme
    if scheme.startswith("s3"):
        return "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    return "GOOGLE_APPLICATION_CREDENTIALS" if scheme == "gs" else "AZURE_STORAGE_ACCOUNT_KEY"
