"""Folders that appear whole or not at all, and that say what was altered in them.

A finished folder holds one sealed file, written last: JSON that names its kind, its version, the sha256 of what lies
beside it, and its own, which is the folder's identity. Shard sets, checkpoints and exports are kept so.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bfm.disk import is_full
from bfm.errors import CorruptError, PausedError, UserError
from bfm.files import Store, canonical_json, readable_json, sha256_bytes, sha256_file

Files = dict[str, dict[str, Any]]
"""Relative name -> {"sha256", "bytes"}."""


@dataclass(frozen=True)
class Sealed:
    """A kind of sealed file, and of the folders that hold one."""

    kind: str
    """What messages call such a folder."""
    file: str
    version: int
    fix: str
    """What to do where there is none, or one of another version."""

    def hash(self, facts: Mapping[str, Any]) -> str:
        """The identity of a folder with these facts."""
        return sha256_bytes(canonical_json({**facts, "kind": self.kind, "version": self.version}))

    def write(self, store: Store, facts: Mapping[str, Any], folder: str = "") -> None:
        """Publish the file over what lies in the folder already."""
        seal = {"kind": self.kind, "version": self.version, "hash": self.hash(facts)}
        store.put(_inside(folder, self.file), readable_json({**facts, **seal}))

    def read(self, store: Store, folder: str = "") -> dict[str, Any]:
        """The facts of a folder.

        Raises UserError where there is no such file or it is of another version, CorruptError where it was altered.
        """
        where = f"{store.uri}/{_inside(folder, self.file)}"
        try:
            facts = json.loads(store.get(_inside(folder, self.file)))
            kind, version, stated = (facts.pop(key) for key in ("kind", "version", "hash"))
            found = self.hash(facts)
        except (FileNotFoundError, NotADirectoryError):
            place = f"{store.uri}/{folder}".rstrip("/")
            raise UserError(f"there is no {self.kind} here", file=place, fix=self.fix) from None
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise CorruptError(f"{where}: was altered, or is not that of a {self.kind}") from error
        if kind != self.kind:
            raise CorruptError(f"{where}: is that of a {kind}, not of a {self.kind}")
        if version != self.version:
            raise UserError(f"{kind} of version {version}, this code reads {self.version}", file=where, fix=self.fix)
        if found != stated:
            raise CorruptError(f"{where}: was altered (its hash does not fit)")
        return facts


def _inside(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def list_files(folder: Path) -> Files:
    """All files below a folder but those whose path begins with a dot."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for name, path in paths.items()
        if not name.startswith(".")
    }


def check_files(
    folder: Path, files: Files, *, whole: bool = True, on_bytes: Callable[[int], None] = lambda _: None
) -> None:
    """Check names and sizes, and where `whole` the sha256. Raises CorruptError that names the file."""
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise CorruptError(f"{path}: is missing")
        if path.stat().st_size != entry["bytes"]:
            raise CorruptError(f"{path}: is truncated or altered ({path.stat().st_size} bytes, not {entry['bytes']})")
        if whole and sha256_file(path, on_bytes) != entry["sha256"]:
            raise CorruptError(f"{path}: was altered (its sha256 does not fit)")


# ---------------------------------------------------------------- whole or not at all


def check_free(out: Path, overwrites: Sealed | None = None, fix: str = "choose another folder") -> None:
    """Raise UserError where something stands at `out`, and is no folder that may be overwritten."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if overwrites is None:
        raise UserError("exists already", file=str(out), fix=fix)
    if not (out / overwrites.file).is_file():
        raise UserError(f"is not a {overwrites.kind}, so it is not overwritten", file=str(out), fix=fix)


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A fresh hidden folder beside `out` to work in; it is gone afterwards, whatever happens.

    Raises OSError where it cannot be made, PausedError where the disk got full inside.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.preparing-", dir=out.parent))
    try:
        yield folder
    except Exception as error:
        if is_full(error):
            what = "no space left on the disk; free some or choose another folder; nothing half-made was left behind"
            raise PausedError(f"{out}: {what}") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, out: Path) -> None:
    """Rename a finished folder (inside the staging of `out`) to `out`; what stood there goes with the staging."""
    if out.exists():
        out.rename(folder.parent / "replaced")
    folder.rename(out)
