"""runs.parquet: the rows of a ledger, one flat line each."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from bfm.laws.frontier import Row

_NESTED = ("config", "metrics", "errors", "shape")
_LEADING = ("trial", "rung", "rung_flops", "kind", "status", "seed", "params", "embedder_share", "path_flops")


def runs_table(rows: Sequence[Row]) -> pa.Table:
    """One line per ledger row, probes included; nested parts become columns such as `config.params`, `metrics.nll`.

    A column is whole numbers, numbers, truth values or text, by what it holds; what is missing is null.
    """
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys([*_LEADING, *sorted({name for row in flat for name in row})]))
    columns = {name: _column([row.get(name) for row in flat]) for name in names}
    return pa.table(columns)


def runs_parquet(rows: Sequence[Row]) -> bytes:
    """The content of runs.parquet."""
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(runs_table(rows), buffer, compression="zstd")
    return buffer.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name in _NESTED and isinstance(value, Mapping):
            flat.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            flat[name] = value
    return {
        name: json.dumps(value, sort_keys=True) if isinstance(value, (dict, list, tuple)) else value
        for name, value in flat.items()
    }


def _column(values: list[Any]) -> pa.Array:
    known = [value for value in values if value is not None]
    if all(isinstance(value, bool) for value in known):
        return pa.array(values, pa.bool_() if known else pa.null())
    if all(isinstance(value, int) and abs(value) < 2**63 for value in known):
        return pa.array(values, pa.int64())
    if all(isinstance(value, (int, float)) for value in known):
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array([None if value is None else str(value) for value in values], pa.string())
