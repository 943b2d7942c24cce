"""Caches of a shard set: functions of the rest, kept in derived/, checked when read, never needed.

A name is bound to the manifest's hash, so a cache of an older preparation is never read. Where the disk is read-only
or full the value is simply computed again next time.
"""

from __future__ import annotations

import errno
from pathlib import Path

from bfm.events.shards import Shards
from bfm.files import sha256_bytes, write_atomic

_UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT}
_DIGEST_BYTES = 64


def derived_path(shards: Shards, name: str) -> Path:
    """Where a cache lies."""
    return shards.path / "derived" / f"{name}-{shards.hash[:16]}"


def load_derived(shards: Shards, name: str) -> bytes | None:
    """A cache's content; None where there is none or it is damaged."""
    path = derived_path(shards, name)
    if not path.is_file():
        return None
    raw = path.read_bytes()
    digest, data = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
    return data if digest == sha256_bytes(data).encode() else None


def save_derived(shards: Shards, name: str, data: bytes) -> bool:
    """Publish a cache atomically; False where the directory cannot be written."""
    try:
        write_atomic(derived_path(shards, name), sha256_bytes(data).encode() + data)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        return False
    return True
