"""One folder of a file system as a place for whole objects: what `bfm.files.Store` does on local paths.

Every write is durable before it is seen, and seen whole or not at all.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from bfm.errors import UserError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_ROOM_WORDS = os.strerror(errno.ENOSPC)
_NEARLY_FULL_BYTES = 1 << 20
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_EXCLUSIVE_RENAME = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1


def is_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, is a full disk (also from another process, where only the text is left)."""
    return any(getattr(seen, "errno", None) in _NO_ROOM or _NO_ROOM_WORDS in str(seen) for seen in _causes(error))


def full_words(error: BaseException, folder: str) -> str | None:
    """What to free, in a line, where an error is that the disk of a folder is full; None where it is another error, or
    another disk's."""
    if not is_full(error):
        return None
    is_named = any(folder in str(seen) for seen in _causes(error))
    if not is_named and (not os.path.isdir(folder) or shutil.disk_usage(folder).free > _NEARLY_FULL_BYTES):
        return None
    told = next((seen.strerror for seen in _causes(error) if isinstance(seen, OSError) and seen.strerror), None)
    return f"{folder}: {told or _NO_ROOM_WORDS}; free some of that disk"


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


@contextmanager
def _written_beside(path: Path, data: bytes | Path) -> Iterator[Path]:
    """A durable temporary file in the folder of `path`, with the permissions of any new file; gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as handle:
            if isinstance(data, Path):
                with open(data, "rb") as source:
                    shutil.copyfileobj(source, handle)
            else:
                handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        yield temporary
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        # What writes to an open file does not say to which.
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


class Disk:
    """Objects are the files below a folder. Names are relative paths; raises what the file system raises."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, name: str, data: bytes | Path) -> None:
        """Publish bytes, or those of a file, over what stands under the name; a full disk leaves the old one."""
        path = self.folder / name
        with _written_beside(path, data) as temporary:
            os.replace(temporary, path)

    def create(self, name: str, data: bytes) -> bool:
        """Publish an object only where none stands; whether it was done.

        Raises UserError on file systems where that cannot be done exactly.
        """
        path = self.folder / name
        with _written_beside(path, data) as temporary:
            try:
                # A hard link fails where the name is taken, and shows the whole content at once.
                os.link(temporary, path)
            except FileExistsError:
                # A network file system may repeat a request of which only the answer was lost.
                return temporary.stat().st_nlink > 1
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return _rename_to_new(temporary, path)
        return True

    def get(self, name: str) -> bytes:
        """Read an object; FileNotFoundError where there is none."""
        return (self.folder / name).read_bytes()

    def open(self, name: str) -> BinaryIO:
        """A seekable stream of an object."""
        return open(self.folder / name, "rb")

    def exists(self, name: str) -> bool:
        """Whether an object stands."""
        return (self.folder / name).is_file()

    def entries(self, folder: str) -> tuple[list[str], list[str]]:
        """Objects and folders directly in a folder, by their last part."""
        try:
            with os.scandir(self.folder / folder) as entries:
                kinds = {entry.name: entry.is_dir() for entry in entries}
        except (FileNotFoundError, NotADirectoryError):
            return [], []
        return [name for name, is_dir in kinds.items() if not is_dir], [name for name in kinds if kinds[name]]

    def walk(self, folder: str) -> list[str]:
        """All objects below a folder."""
        paths = (self.folder / folder).rglob("*")
        return [path.relative_to(self.folder).as_posix() for path in paths if path.is_file()]

    def delete(self, name: str) -> None:
        """Remove an object if it stands."""
        (self.folder / name).unlink(missing_ok=True)

    def delete_folder(self, folder: str) -> None:
        """Remove a folder if it stands."""
        if (self.folder / folder).is_dir():
            shutil.rmtree(self.folder / folder)


def _rename_to_new(temporary: Path, path: Path) -> bool:
    """Rename where nothing stands: for file systems without hard links, such as FUSE mounts of buckets."""
    if path.exists():
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    rename = getattr(libc, "renameat2", None)
    source, target = os.fsencode(temporary), os.fsencode(path)
    if rename is not None and rename(_AT_FDCWD, source, _AT_FDCWD, target, _RENAME_NOREPLACE) == 0:
        return True
    number = errno.ENOSYS if rename is None else ctypes.get_errno()
    if number == errno.EEXIST:
        return False
    if number not in _NO_EXCLUSIVE_RENAME:
        raise OSError(number, os.strerror(number), str(path))
    raise UserError(
        "this file system can neither link files nor rename without overwriting, so no two writers are safe on it",
        file=str(path.parent),
        fix="use another disk, or the bucket's own URI such as s3://...",
    )
