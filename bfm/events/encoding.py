"""What of a shard set encodes other logs in the same way: schema, items, fitted fields and their vocabularies.

    items.parquet                row i = item i: key columns (`key_<column>`, strings), in a shard set also train_count,
                                 first_time and raw field values
    items/<field>.npy            encoded item field, row = item id
    vocabulary/<field>.parquet   values behind the ids of the fields that have ids

An exported model keeps these files without the events; histories.py reads logs by them. No schema is parsed here:
whoever only ranks needs no more than numpy and pyarrow. I = all items, V = the catalogue among them: ids 0..V-1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bfm.events.fields import FittedField
from bfm.events.manifest import Manifest

KEY = "key_"


def write_items(
    directory: Path, table: pa.Table, encoded: Mapping[str, np.ndarray], vocabularies: Mapping[str, pa.Array]
) -> None:
    """Write the items in id order.

    Args:
        directory: the shard set or export.
        table: items.parquet; of a shard set it must have int64 columns train_count (falling over the catalogue, 0 for
            cold items) and first_time, besides key columns and raw values.
        encoded: item fields by name, [I] or [I, M].
        vocabularies: item and context fields by name, large strings; entry i has the id i + 2.
    """
    pq.write_table(table, directory / "items.parquet")
    for name, values in encoded.items():
        save_array(directory / "items" / f"{name}.npy", values, values.dtype)
    for name, vocabulary in vocabularies.items():
        path = _vocabulary(directory, name)
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"value": vocabulary}), path)


class Encoding:
    """The files above, as the manifest describes them, memory-mapped."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process maps the files again; pickling a memory map would copy it.
        return type(self), (self.path, self.manifest)

    @property
    def num_items(self) -> int:
        """Items, cold ones included (I)."""
        return self.manifest.items

    @property
    def num_catalogue(self) -> int:
        """Items known in training (V)."""
        return self.manifest.catalogue

    @cached_property
    def item_fields(self) -> tuple[FittedField, ...]:
        """Fields that say what an item is."""
        return tuple(f for f in self.manifest.fields if f.side == "item")

    @cached_property
    def context_fields(self) -> tuple[FittedField, ...]:
        """Fields that say what happened."""
        return tuple(f for f in self.manifest.fields if f.side == "context")

    @cached_property
    def item_arrays(self) -> dict[str, np.ndarray]:
        """Encoded item fields; row = item id."""
        return {f.name: map_array(self.path / "items" / f"{f.name}.npy") for f in self.item_fields}

    @cached_property
    def vocabularies(self) -> dict[str, pa.Array]:
        """Values behind the ids of the fields that have ids."""
        paths = {field.name: _vocabulary(self.path, field.name) for field in self.manifest.fields}
        return {name: pq.read_table(path)["value"].combine_chunks() for name, path in paths.items() if path.is_file()}

    @cached_property
    def item_keys(self) -> pa.Table:
        """[I]: one column of large strings per column of the item."""
        columns = [part["column"] for part in self.manifest.schema["item"]]
        return self.items_table([f"{KEY}{column}" for column in columns]).rename_columns(columns)

    def items_table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """items.parquet; row = item id."""
        return pq.read_table(self.path / "items.parquet", columns=list(columns) if columns else None)

    def copy_to(self, folder: Path) -> None:
        """Write the files into another folder, of the items' table only the keys."""
        keys = self.item_keys.rename_columns([f"{KEY}{column}" for column in self.item_keys.column_names])
        write_items(folder, keys, self.item_arrays, self.vocabularies)


def save_array(path: Path, values: np.ndarray, dtype: Any) -> None:
    """Write an array as a file that `map_array` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.ascontiguousarray(values, dtype=dtype), allow_pickle=False)


def map_array(path: Path) -> np.ndarray:
    """A file's array, memory-mapped and read-only."""
    # A plain view of the map: np.memmap's own indexing is several times slower.
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def _vocabulary(folder: Path, name: str) -> Path:
    return folder / "vocabulary" / f"{name}.parquet"
