"""What of a shard set encodes other logs in the same way: schema, seed, item keys, fitted fields, their vocabularies.

Enters: a shard set. Leaves: a few small files (items.parquet, vocabulary/<field>.parquet and a JSON object) that stand
on their own, without the events; and the same back from them. histories.py reads logs by it. No schema is parsed here:
whoever only ranks needs no more than numpy and pyarrow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bfm.errors import UserError
from bfm.events.fields import FittedField
from bfm.events.shards import Shards

ITEMS = "items.parquet"
_KEY, _ENCODED = "key_", "encoded_"


@dataclass(frozen=True)
class Encoding:
    """How a log is read and encoded. I = all items, V = the catalogue among them: ids 0..V-1."""

    schema: dict[str, Any]
    """The resolved schema, its fields in the order of the file."""
    seed: int
    """Of the order inside ties."""
    event_item_fields: tuple[str, ...]
    """Item fields that stand in the log itself; the others came from an item table."""
    fields: tuple[FittedField, ...]
    catalogue: int
    """V."""
    item_keys: pa.Table
    """[I]: one column of large strings per column of the item."""
    item_arrays: Mapping[str, np.ndarray]
    """Encoded item fields [I] or [I, M]."""
    vocabularies: Mapping[str, pa.Array]
    """Values behind the ids of the fields that have ids."""

    @classmethod
    def of(cls, shards: Shards) -> Encoding:
        """That of a shard set. Raises UserError where the set does not say by which schema it was prepared."""
        manifest = shards.manifest
        if not manifest.schema:
            raise UserError("does not hold its schema", file=str(shards.path), fix="prepare it with `bfm data prepare`")
        schema = _in_order(manifest.schema, manifest.fields)
        names = [f"{_KEY}{part['column']}" for part in schema["item"]]
        keys = shards.items_table(names).cast(pa.schema([(name, pa.large_string()) for name in names]))
        # The check of conflicting values is made for exactly the fields that stand in the log.
        in_log = manifest.checks.get("item_conflicts", {})
        event_fields = tuple(name for name in schema.get("item_fields", {}) if name in in_log)
        return cls(
            schema,
            manifest.seed,
            event_fields,
            manifest.fields,
            shards.num_catalogue,
            keys.rename_columns([name.removeprefix(_KEY) for name in names]),
            shards.item_arrays,
            read_vocabularies(shards.path, manifest.fields),
        )

    @property
    def num_items(self) -> int:
        """I."""
        return self.item_keys.num_rows

    @property
    def has_clock(self) -> bool:
        """Times are milliseconds since the epoch; else positions."""
        return "time" in self.schema

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the files; returns what `read` needs besides."""
        columns = {f"{_KEY}{name}": self.item_keys[name] for name in self.item_keys.column_names}
        columns |= {f"{_ENCODED}{name}": _to_column(values) for name, values in self.item_arrays.items()}
        pq.write_table(pa.table(columns), folder / ITEMS)
        for name, values in self.vocabularies.items():
            write_vocabulary(folder, name, values)
        return {
            "schema": self.schema,
            "seed": self.seed,
            "event_item_fields": list(self.event_item_fields),
            "fields": [field.as_dict() for field in self.fields],
            "catalogue": self.catalogue,
        }

    @classmethod
    def read(cls, folder: Path, facts: Mapping[str, Any]) -> Encoding:
        """Inverse of `write`."""
        table = pq.read_table(folder / ITEMS)
        fields = tuple(FittedField.from_dict(values) for values in facts["fields"])
        names = [name for name in table.column_names if name.startswith(_KEY)]
        return cls(
            _in_order(facts["schema"], fields),
            int(facts["seed"]),
            tuple(facts["event_item_fields"]),
            fields,
            int(facts["catalogue"]),
            table.select(names).rename_columns([name.removeprefix(_KEY) for name in names]),
            {f.name: _to_array(table[f"{_ENCODED}{f.name}"]) for f in fields if f.side == "item"},
            read_vocabularies(folder, fields),
        )


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


def write_vocabulary(folder: Path, name: str, values: pa.Array) -> None:
    """The values behind the ids of a field."""
    path = _vocabulary(folder, name)
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"value": values}), path)


def read_vocabularies(folder: Path, fields: Sequence[FittedField]) -> dict[str, pa.Array]:
    """Field -> what `write_vocabulary` wrote, of the fields that have any."""
    paths = {field.name: _vocabulary(folder, field.name) for field in fields}
    return {
        name: pq.read_table(path)["value"].cast(pa.large_string()).combine_chunks()
        for name, path in paths.items()
        if path.is_file()
    }


def _vocabulary(folder: Path, name: str) -> Path:
    return folder / "vocabulary" / f"{name}.parquet"


def _to_column(values: np.ndarray) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _to_array(column: pa.ChunkedArray) -> np.ndarray:
    values = column.combine_chunks()
    if not pa.types.is_fixed_size_list(values.type):
        return values.to_numpy(zero_copy_only=False)
    return values.flatten().to_numpy(zero_copy_only=False).reshape(-1, values.type.list_size)
