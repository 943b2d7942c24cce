"""The folder of an exported model: what is in it, how it is sealed, and how it is opened again.

    export.json           shape, window, table width, schema, fitted fields, versions; sha256 of every other file
    weights.safetensors   all weights, float32
    catalogue.safetensors vectors of all items
    neighbours.npz        counted neighbours of the catalogue's items, where the model mixes them in
    items.parquet         row i = item i: its key, its encoded fields
    vocabulary/*.parquet  values behind the ids of fields
    README.md

Enters and leaves: plain JSON facts; what they mean is predictor.py's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bfm.errors import CorruptError, UserError
from bfm.files import canonical_json, read_json, sha256_bytes, sha256_file, write_json

VERSION = 3
EXPORT, README = "export.json", "README.md"
WEIGHTS, CATALOGUE, NEIGHBOURS = "weights.safetensors", "catalogue.safetensors", "neighbours.npz"


def seal(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write export.json over all files that stand in the folder; returns what it holds."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        str(path.relative_to(folder)): {"sha256": sha256_file(path), "bytes": path.stat().st_size} for path in paths
    }
    sealed = {**facts, "version": VERSION, "files": files}
    sealed["hash"] = sha256_bytes(canonical_json(sealed))
    write_json(folder / EXPORT, sealed)
    return sealed


def open_sealed(folder: Path) -> dict[str, Any]:
    """The facts of an export, all files checked.

    Raises UserError where there is none or it is of another version, CorruptError that names a damaged file.
    """
    path = folder / EXPORT
    if not path.is_file():
        raise UserError("there is no exported model here", file=str(folder), fix="write one with `bfm export`")
    facts = read_json(path)
    if not isinstance(facts, dict) or "version" not in facts:
        raise CorruptError(f"{path}: is not that of an exported model")
    if facts["version"] != VERSION:
        found = f"exported model of version {facts['version']}, this code reads {VERSION}"
        raise UserError(found, file=str(path), fix="export the checkpoint again")
    if sha256_bytes(canonical_json({key: value for key, value in facts.items() if key != "hash"})) != facts.get("hash"):
        raise CorruptError(f"{path}: was altered (its hash does not fit)")
    for name, entry in facts["files"].items():
        if not (folder / name).is_file():
            raise CorruptError(f"{folder / name}: is missing")
        if sha256_file(folder / name) != entry["sha256"]:
            raise CorruptError(f"{folder / name}: is truncated or altered (its sha256 does not fit {EXPORT})")
    return facts
