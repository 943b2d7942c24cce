"""Where tables lie: paths, folders, globs and URIs to files, each absolute, so that any worker finds it.

A name is taken as it is written where something stands there, else as a glob. Inside of folders and globs, what is
hidden by a leading dot or underscore is left out and told: copies that notebooks keep, the remains of a dead job, the
log of a table format. A folder `key=value` is a column of the files in it, and never hidden.

Formats go by the file's ending: Parquet (.parquet, .pq), CSV and TSV (.csv, .tsv), JSON (.jsonl, .ndjson, .json), the
text formats also compressed (.gz, .bz2, .zst).
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from bfm.errors import UserError
from bfm.files import Store, absolute, parent_store

FORMATS = {
    ".parquet": "parquet", ".pq": "parquet",
    ".csv": "csv", ".tsv": "tsv",
    ".jsonl": "json", ".ndjson": "json", ".json": "json",
}  # fmt: skip
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class Found:
    """Files that places hold."""

    paths: list[str]
    """Absolute, sorted and without doubles."""
    left_out: Mapping[str, int]
    """Hidden files and folders -> how many files of a known format."""


def find_files(places: Sequence[str]) -> Found:
    """Files of places that a user names. Raises UserError where one has none."""
    left_out = Counter[str]()
    return Found(sorted({path for place in places for path in _expand(place, left_out)}), left_out)


def is_table(name: str) -> bool:
    """Whether a file's name ends as those of tables do."""
    return _suffix(name) in FORMATS


def file_format(path: str) -> str:
    """Format by the file's ending: parquet, csv, tsv or json. Raises UserError for others."""
    suffix = _suffix(path)
    if suffix not in FORMATS:
        what = f"format {suffix or 'without an ending'} is not known"
        raise UserError(what, file=path, fix=f"use {', '.join(FORMATS)}")
    return FORMATS[suffix]


def partitions(path: str) -> dict[str, str | None]:
    """Columns that the folders of a file say: name -> value, None where it is missing."""
    pairs = (part.split("=", 1) for part in path.split("/")[:-1] if "=" in part)
    return {name: None if value == _NO_PARTITION else unquote(value) for name, value in pairs}


def decoded(place: str) -> str:
    """A file:// URI as the path that it is."""
    return unquote(place.removeprefix("file://")) if place.startswith("file://") else place


# ---------------------------------------------------------------- inside


def _suffix(path: str) -> str:
    """The ending of a file without that of its compression."""
    name = path.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return Path(name).suffix


def _expand(place: str, left_out: Counter[str]) -> list[str]:
    """Files of a path, folder or glob, local or of a URI."""
    place = decoded(place)
    parent, name = parent_store(place)
    if parent.exists(name):
        return [absolute(place)]
    store = Store(place)
    found = store.walk()
    if not found and not (store.is_local and store.path().is_dir()):
        parts = place.split("/")
        fixed = next((n for n, part in enumerate(parts) if any(mark in part for mark in "*?[")), None)
        if fixed is None:
            raise UserError("there is no such file", file=place, fix="check the path")
        store = Store("/".join(parts[:fixed]) or ("/" if place.startswith("/") else "."))
        found = [name for name in store.walk() if _matches(name.split("/"), parts[fixed:])]
    paths = []
    for name in found:
        if is_table(name):
            hidden = _hidden_part(name)
            if hidden is None:
                paths.append(str(store.path(name)) if store.is_local else f"{store.uri}/{name}")
            else:
                left_out[hidden] += 1
    if not paths:
        raise UserError("no files found", file=place, fix=f"expected files ending in {', '.join(FORMATS)}")
    return paths


def _hidden_part(name: str) -> str | None:
    """What hides a file: the first part of its place that begins with a dot or an underscore."""
    return next((part for part in name.split("/") if part.startswith((".", "_")) and "=" not in part), None)


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether a relative path is one of a glob: `*` stays inside a folder, `**` does not."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skipped:], pattern[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
