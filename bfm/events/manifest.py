"""The manifest of a shard set: what it holds, the sha256 of every file, how a finished set is checked and fetched.

The manifest is published last, so its presence says that a shard set is complete; its own hash is the set's identity.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bfm.errors import CorruptError, UserError
from bfm.events.fields import FittedField
from bfm.files import Store, canonical_json, read_json, sha256_bytes, sha256_file

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_PREPARE_FIX = "prepare it with `bfm data prepare`"


@dataclass(frozen=True)
class Manifest:
    """What a shard set holds. Everything here is a function of the input, the schema and the seed."""

    name: str
    seed: int
    users: int
    events: int
    items: int
    """All items, cold ones included (I)."""
    catalogue: int
    """Items with at least one training event (V); their ids are 0..V-1."""
    shards: int
    """Number of shard-* directories."""
    has_clock: bool
    """Times are milliseconds since the epoch; else they are positions."""
    split: dict[str, Any]
    """{"by": "time", "valid_from": ms, "test_from": ms} or {"by": "leave_one_out"}."""
    fields: tuple[FittedField, ...]
    train_events: int
    train_targets: int
    """Targets per epoch: sum over users of max(train_end - 1, 0)."""
    time_range: tuple[int, int]
    rows_read: int = 0
    rows_quarantined: dict[str, int] = field(default_factory=dict)
    """Reason -> rows."""
    schema: dict[str, Any] = field(default_factory=dict)
    """The resolved schema that prepared it."""
    distinct_curve: dict[str, Any] = field(default_factory=dict)
    """Distinct items per group as a function of (window, group_windows); see statistics.py."""
    checks: dict[str, Any] = field(default_factory=dict)
    """What `data describe` prints; see describe.py."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Relative name -> {"sha256", "bytes"}."""
    schema_version: int = SCHEMA_VERSION

    def windows_per_epoch(self, window: int) -> int:
        """W: windows of so many events that hold every training event once."""
        return -(-self.train_events // window)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return {**values, "fields": [f.as_dict() for f in self.fields], "time_range": list(self.time_range)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Manifest:
        """Inverse of `as_dict`."""
        fields = tuple(FittedField.from_dict(f) for f in values["fields"])
        first, last = values["time_range"]
        return cls(**{**values, "fields": fields, "time_range": (int(first), int(last))})

    @cached_property
    def hash(self) -> str:
        """Sha256 of the canonical JSON: the identity of the shard set."""
        return sha256_bytes(canonical_json(self.as_dict()))


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a finished shard set. Raises UserError where there is none, CorruptError where it was altered."""
    path = directory / MANIFEST
    if not path.exists():
        state = "is not finished" if directory.exists() else "does not exist"
        raise UserError(f"the shard set {state}", file=str(directory), fix=_PREPARE_FIX)
    values = read_json(path)
    if not isinstance(values, dict) or "schema_version" not in values:
        raise CorruptError(f"{path}: is not the manifest of a shard set")
    if values["schema_version"] != SCHEMA_VERSION:
        found = f"shard set of version {values['schema_version']}, this code reads {SCHEMA_VERSION}"
        raise UserError(found, file=str(path), fix="prepare it again")
    stated = values.pop("hash", None)
    try:
        manifest = Manifest.from_dict(values)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{path}: is not the manifest of a shard set ({error})") from error
    if manifest.hash != stated:
        raise CorruptError(f"{path}: was altered (its hash does not fit)")
    return manifest


def check_files(directory: Path, manifest: Manifest, verify: bool) -> None:
    """Names and sizes of every file (and sha256 where `verify`). Raises CorruptError that names the file."""
    for name, entry in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise CorruptError(f"{path}: is missing")
        if path.stat().st_size != entry["bytes"]:
            raise CorruptError(f"{path}: is truncated or altered ({path.stat().st_size} bytes, not {entry['bytes']})")
        if verify and sha256_file(path) != entry["sha256"]:
            raise CorruptError(f"{path}: was altered (its sha256 does not fit the manifest)")


# ---------------------------------------------------------------- URIs


def cache_root() -> Path:
    """Where shard sets of URIs are kept: $BFM_CACHE, else the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bfm"
    return Path(os.environ.get("BFM_CACHE", default))


def fetch(uri: str) -> Path:
    """Copy a remote shard set into the cache (keyed by its manifest); returns the local directory."""
    store = Store(uri)
    if not store.exists(MANIFEST):
        raise UserError("there is no shard set", file=uri, fix=_PREPARE_FIX)
    raw = store.get(MANIFEST)
    target = cache_root() / "shards" / sha256_bytes(raw)[:32]
    if (target / MANIFEST).exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=".fetch-"))
    try:
        (staging / MANIFEST).write_bytes(raw)
        manifest = read_manifest(staging)
        for name in manifest.files:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            _download(store, name, staging / name)
        check_files(staging, manifest, verify=True)
        _publish(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _download(store: Store, name: str, path: Path) -> None:
    source_name = f"{store.prefix}/{name}"
    with store.filesystem.open_input_stream(source_name) as source, open(path, "wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 22)


def _publish(staging: Path, target: Path) -> None:
    try:
        staging.rename(target)
    except OSError:
        # Another process of this machine published the same content first.
        if not (target / MANIFEST).exists():
            raise
