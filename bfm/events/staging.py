"""A directory that appears whole or not at all: work goes on in a hidden sibling that is renamed at the end."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bfm.errors import UserError
from bfm.events.manifest import MANIFEST


@contextmanager
def staging(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A fresh sibling of `out` to work in; it is gone afterwards, whatever happens.

    Raises:
        UserError: `out` stands already (and is no shard set that may be overwritten), or the disk got full inside.
    """
    check_free(out, overwrite=overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.preparing-", dir=out.parent))
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", file=str(out), fix="choose another folder") from error
    try:
        yield folder
    except Exception as error:
        if disk_is_full(error):
            fix = "free some space or choose another folder; nothing half-made was left behind"
            raise UserError("no space left on the disk", file=str(out), fix=fix) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_free(out: Path, *, overwrite: bool) -> None:
    """Raise UserError where `out` stands and must not be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise UserError("exists already", file=str(out), fix="choose another folder, or pass --overwrite")
    if not (out / MANIFEST).is_file():
        raise UserError("is not a shard set, so it is not overwritten", file=str(out), fix="choose another folder")


def publish(folder: Path, out: Path) -> None:
    """Rename a finished folder (inside the staging of `out`) to `out`; what stood there goes with the staging."""
    if out.exists():
        out.rename(folder.parent / "replaced")
    folder.rename(out)


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, is a full disk (also from another process, where only the text is left)."""
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
