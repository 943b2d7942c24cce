"""What is computed once per shard set: functions of the rest, kept in its .cache/, checked when read, never needed.

A name is bound to the manifest's hash, so what was kept of an older preparation is never read. Where the disk is
read-only or full the value is simply computed again next time.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

from bfm.events.shards import Shards
from bfm.files import sha256_bytes, write_atomic

_UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT}
_DIGEST_BYTES = 64


def kept_path(shards: Shards, name: str) -> Path:
    """Where a value lies."""
    return shards.path / ".cache" / f"{name}-{shards.hash[:16]}"


def kept(shards: Shards, name: str, make: Callable[[], bytes]) -> bytes:
    """The value of `make`, which is called where none is kept, or a damaged one."""
    path = kept_path(shards, name)
    raw = path.read_bytes() if path.is_file() else b""
    if raw[:_DIGEST_BYTES] == sha256_bytes(raw[_DIGEST_BYTES:]).encode():
        return raw[_DIGEST_BYTES:]
    data = make()
    try:
        write_atomic(path, sha256_bytes(data).encode() + data)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
    return data
