"""Tables as people bring them: the same rows in many files, and what is to be said of each."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = Sequence[Mapping[str, Any]]
FIRST_ID = 2**63 + 12_345
"""No signed 64 bits and no double hold such ids."""


def lines(rows: Rows, separator: str = ",", decimal: str = ".", note: str = "fine", header: str = "note") -> str:
    """CSV of rows, each with a note."""
    written = [separator.join([*rows[0], header])]
    for row in rows:
        cells = [
            repr(value).replace(".", decimal) if isinstance(value, float) else str(value) for value in row.values()
        ]
        written.append(separator.join([*cells, note]))
    return "\n".join(written) + "\n"


def as_json(rows: Rows) -> list[str]:
    """JSON of rows, of which the second one has its whole numbers as floats, as far as these are exact."""

    def as_float(value: Any) -> Any:
        return float(value) if isinstance(value, int) and value < 2**53 else value

    second = {name: as_float(value) for name, value in rows[1].items()}
    return [json.dumps(second if n == 1 else row) for n, row in enumerate(rows)]


def decimals(rows: Rows) -> pa.Table:
    """Whole numbers as decimals, text as bytes."""

    def column(values: list[Any]) -> pa.Array:
        if isinstance(values[0], int):
            return pa.array([Decimal(value) for value in values], pa.decimal128(38, 10))
        return pa.array([value.encode() for value in values]) if isinstance(values[0], str) else pa.array(values)

    return pa.table({name: column([row[name] for row in rows]) for name in rows[0]})


def _text(name: str, write: Callable[[Rows], str], encoding: str = "utf-8") -> Callable[[Path, Rows], Path]:
    def make(folder: Path, rows: Rows) -> Path:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(write(rows).encode(encoding))
        return path

    return make


def _parquet(folder: Path, rows: Rows) -> Path:
    pq.write_table(decimals(rows), folder / "runs.parquet")
    return folder / "runs.parquet"


def _compressed(folder: Path, rows: Rows) -> Path:
    (folder / "runs.csv.gz").write_bytes(gzip.compress(lines(rows).encode()))
    return folder / "runs.csv.gz"


def _with_copies(folder: Path, rows: Rows) -> Path:
    place = folder / "brought"
    (place / ".ipynb_checkpoints").mkdir(parents=True)
    (place / "runs.csv").write_text(lines(rows))
    (place / ".ipynb_checkpoints" / "runs-checkpoint.csv").write_text(lines(rows))
    return place


def _in_parts(folder: Path, rows: Rows) -> Path:
    """A folder of parts in two formats, of which one does not show its decimal mark."""
    place = folder / "parts"
    place.mkdir()
    (place / "a.csv").write_text(lines(rows[:3], ";", ","))
    (place / "b.jsonl").write_text("\n".join(as_json(rows[3:])))
    return place


def _open_quote(rows: Rows) -> str:
    return lines(rows, "\t").replace("fine", '"best', 2)


KINDS: Mapping[str, tuple[Callable[[Path, Rows], Path], str]] = {
    "plain": (_text("runs.csv", lines), ""),
    "json": (_text("runs.jsonl", lambda rows: "\n".join(as_json(rows))), ""),
    "array": (
        _text("runs.json", lambda rows: f"[{','.join(as_json(rows))}]"),
        "read as: JSON values that are no lines",
    ),
    "quote": (_text("runs.tsv", _open_quote), ""),
    "commas": (_text("runs.csv", lambda rows: lines(rows, ";", ",")), "read as: separated by ';', decimal commas"),
    "utf-16": (_text("runs.csv", lines, "utf-16"), "read as: utf-16"),
    "marked": (_text("runs.csv", lines, "utf-8-sig"), ""),
    "header": (_text("runs.csv", lambda rows: lines(rows, header='"note\n(optional)"')), ""),
    "blank": (_text("runs.csv", lambda rows: "\n" + lines(rows)), ""),
    "brackets": (_text("runs [1]/all[2].csv", lines), ""),
    "copies": (_with_copies, "left out as hidden: .ipynb_checkpoints (1 file)"),
    "parts": (_in_parts, "read as: separated by ';', decimal commas"),
    "decimals": (_parquet, ""),
    "compressed": (_compressed, ""),
}
"""Name -> what writes the files into a folder and names the place; how what is said of it begins, if anything is."""
