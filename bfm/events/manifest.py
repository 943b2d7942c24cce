"""The manifest of a shard set: what it holds, the sha256 of every file, and how a remote set is fetched.

It is the set's sealed file (bfm/sealed.py), so its presence says that the set is complete.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bfm.errors import CorruptError
from bfm.events.fields import FittedField
from bfm.files import Store
from bfm.objects import READ_BYTES
from bfm.sealed import Files, Sealed, check_files, staging

MANIFEST = "manifest.json"
SHARD_SET = Sealed("shard set", MANIFEST, version=5, fix="prepare it with `bfm data prepare`")


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
    has_clock: bool
    """Times are milliseconds since the epoch; else they are positions."""
    fields: tuple[FittedField, ...]
    event_item_fields: tuple[str, ...] = ()
    """Item fields that stand in the log itself; the others come from an item table."""
    split: dict[str, Any] = field(default_factory=dict)
    """{"by": "time", "valid_from": ms, "test_from": ms} or {"by": "leave_one_out"}."""
    train_events: int = 0
    train_targets: int = 0
    """Targets per epoch: sum over users of max(train_end - 1, 0)."""
    time_range: tuple[int, int] = (0, 0)
    rows_read: int = 0
    rows_quarantined: dict[str, int] = field(default_factory=dict)
    """Reason -> rows."""
    schema: dict[str, Any] = field(default_factory=dict)
    """The resolved schema that prepared it."""
    checks: dict[str, Any] = field(default_factory=dict)
    """What `data describe` prints; see describe.py."""
    files: Files = field(default_factory=dict)

    def windows_per_epoch(self, window: int) -> int:
        """W: windows of so many events that hold every training event once."""
        return -(-self.train_events // window)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Manifest:
        """Inverse of `as_dict`."""
        fields = tuple(FittedField.from_dict(f) for f in values["fields"])
        first, last = values["time_range"]
        known = {
            "fields": fields,
            "event_item_fields": tuple(values["event_item_fields"]),
            "time_range": (int(first), int(last)),
            "schema": _in_order(values["schema"], fields),
        }
        return cls(**{**values, **known})

    @cached_property
    def hash(self) -> str:
        """The identity of the shard set."""
        return SHARD_SET.hash(self.as_dict())


def _in_order(schema: Mapping[str, Any], fields: Sequence[FittedField]) -> dict[str, Any]:
    """The schema with its fields in the order in which it was written, which JSON files do not keep.

    The hash that orders ties runs over the columns in this order.
    """
    sides = {
        side: {field.name: schema[side][field.name] for field in fields if field.name in schema[side]}
        for side in ("item_fields", "context_fields")
        if side in schema
    }
    return {**schema, **sides}


def cache_root() -> Path:
    """Where shard sets of URIs are kept: $BFM_CACHE, else the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bfm"
    return Path(os.environ.get("BFM_CACHE", default))


def fetch(uri: str) -> Path:
    """Copy a remote shard set into the cache (keyed by its manifest); returns the local directory."""
    store = Store(uri)
    manifest = Manifest.from_dict(SHARD_SET.read(store))
    target = cache_root() / "shards" / manifest.hash[:32]
    if (target / MANIFEST).exists():
        return target
    with staging(target) as folder:
        for name in [*manifest.files, MANIFEST]:
            _download(store, name, folder / name)
        check_files(folder, manifest.files)
        try:
            folder.rename(target)
        except OSError:
            # Another process of this machine published the same content first.
            if not (target / MANIFEST).exists():
                raise
    return target


def _download(store: Store, name: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with store.open(name) as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target, READ_BYTES)
    except FileNotFoundError:
        raise CorruptError(f"{store.uri}/{name}: is missing") from None
