"""Whole tables as they are brought: every row in its order, every value exact, types that depend on no file's cut."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bfm.errors import UserError
from bfm.tables.whole import read_whole
from tests.tables.brought import FIRST_ID, KINDS

ROWS = [{"id": FIRST_ID + n, "size": 400 + n, "rate": 0.001 * (n + 1), "kind": f"é{n % 2}"} for n in range(7)]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_stand_as_they_were_brought(tmp_path, kind):
    write, told = KINDS[kind]
    found = read_whole(str(write(tmp_path, ROWS)), ["id", "rate"])
    assert found.table.select(list(ROWS[0])).to_pylist() == ROWS
    assert "".join(found.told).startswith(told)
    assert bool(found.told) == bool(told)


def column(tmp_path, cells):
    (tmp_path / "t.csv").write_text("\n".join(["a,b", *(f"{cell},x" for cell in cells)]) + "\n")
    found = read_whole(str(tmp_path / "t.csv"), ["a"]).table["a"]
    return str(found.type), found.to_pylist()


@pytest.mark.parametrize(
    ("cells", "kind", "expected"),
    [
        (["1", "", "+3.0"], "int64", [1, None, 3]),
        (["1", str(2**64 - 1)], "uint64", [1, 2**64 - 1]),
        (["-1", str(2**63)], "double", [-1.0, 2.0**63]),
        (["1", "2.5e3", "nan", "-inf"], "double", [1, 2500, None, float("-inf")]),
        (["7", "NA", "-nan"], "int64", [7, None, None]),
        (["NA", "NA"], "large_string", ["NA", "NA"]),
        (["True", "false", ""], "bool", [True, False, None]),
        (["a", "", "1"], "large_string", ["a", "", "1"]),
        (["", "None"], "null", [None, None]),
    ],
)
def test_types_of_text(tmp_path, cells, kind, expected):
    assert column(tmp_path, cells) == (kind, expected)


def test_types_of_json(tmp_path):
    rows = [{"a": 1, "b": True, "c": {"d": [1]}}, {"a": 2.5, "b": "x", "e": 1}, {"a": None, "c": {"d": [2]}}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = read_whole(str(tmp_path / "t.jsonl"), ["a", "c.d"]).table
    assert table["a"].to_pylist() == [1, 2.5, None]
    assert table["b"].to_pylist() == ["true", "x", None]
    assert table["c.d"].to_pylist() == [[1], None, [2]]
    assert table["e"].to_pylist() == [None, 1, None]


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl"])
def test_columns_by_folders_and_paths(tmp_path, form):
    for source, seed in (("rw", 1), ("owt", 2)):
        place = tmp_path / f"source={source}" / f"seed={seed}"
        place.mkdir(parents=True)
        if form == "csv":
            (place / "a.csv").write_text("m.loss\n1.5\n")
        elif form == "jsonl":
            (place / "a.jsonl").write_text('{"m": {"loss": 1.5}}\n')
        else:
            pq.write_table(pa.table({"m": [{"loss": 1.5}]}), place / "a.parquet")
    table = read_whole(str(tmp_path), ["m.loss", "source", "seed"]).table
    assert table.select(["m.loss", "source", "seed"]).to_pylist() == [
        {"m.loss": 1.5, "source": "owt", "seed": 2},
        {"m.loss": 1.5, "source": "rw", "seed": 1},
    ]


def test_columns_that_stand_twice_are_refused_where_they_are_needed(tmp_path):
    (tmp_path / "t.csv").write_text("a,b,b\n1,2,3\n")
    assert read_whole(str(tmp_path / "t.csv"), ["a"]).table.to_pylist() == [{"a": 1}]
    pq.write_table(pa.table([[1], [2], [3]], names=["a", "b", "b"]), tmp_path / "t.parquet")
    for name in ("t.csv", "t.parquet"):
        with pytest.raises(UserError, match="has 2 columns 'b'"):
            read_whole(str(tmp_path / name), ["b"])
