"""Tables of others: three formats give the same rows, a filter keeps what it says, every slip names its file."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from bfm.errors import UserError
from bfm.laws.tables import NUMBER, read_table

ROWS = [
    {"name": "a", "depth": 2, "rate": 0.1},
    {"name": "b", "depth": 8, "rate": 0.2},
    {"name": "b", "depth": 16, "rate": 0.3},
    {"name": "c", "depth": 16, "rate": 0.4},
]


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "runs.csv"
    pa.csv.write_csv(pa.Table.from_pylist(ROWS), path)
    return path


def test_every_format_gives_the_same_rows(csv):
    table = pa.Table.from_pylist(ROWS)
    pa.parquet.write_table(table, csv.with_suffix(".parquet"))
    csv.with_suffix(".jsonl").write_text(
        "".join(f'{{"name": "{r["name"]}", "depth": {r["depth"]}, "rate": {r["rate"]}}}\n' for r in ROWS)
    )
    for suffix in (".csv", ".parquet", ".jsonl"):
        found = read_table(csv.with_suffix(suffix), ["name", "depth"])
        assert found.drop_columns([NUMBER]).to_pylist() == ROWS


FILTERS = {
    "depth == 16": lambda r: r["depth"] == 16,
    "name != 'b'": lambda r: r["name"] != "b",
    "depth < 8": lambda r: r["depth"] < 8,
    "depth <= 8": lambda r: r["depth"] <= 8,
    "rate > 0.25": lambda r: r["rate"] > 0.25,
    "rate >= -1": lambda r: True,
    "name in ['a', 'c']": lambda r: r["name"] in "ac",
    "name not in ('a', 'c')": lambda r: r["name"] not in "ac",
    "not depth == 16": lambda r: r["depth"] != 16,
    "name == 'b' and depth == 16": lambda r: r["name"] == "b" and r["depth"] == 16,
    "name == 'a' or depth == 16 and rate > 0.35": lambda r: r["name"] == "a" or (r["depth"] == 16 and r["rate"] > 0.35),
    "(name == 'a' or depth == 16) and rate < 0.35": lambda r: (
        (r["name"] == "a" or r["depth"] == 16) and r["rate"] < 0.35
    ),
    "not (name == 'a' or name == 'b')": lambda r: r["name"] == "c",
    "name == 'a' or name == 'b' or name == 'c'": lambda r: True,
}


@pytest.mark.parametrize("where", FILTERS)
def test_filters_keep_what_they_say(csv, where):
    assert read_table(csv, [], where).drop_columns([NUMBER]).to_pylist() == [row for row in ROWS if FILTERS[where](row)]


@pytest.mark.parametrize(
    "where",
    [
        "depth",
        "depth ==",
        "depth + 1 == 3",
        "1 < depth < 9",
        "2 == depth",
        "width == 3",
        "depth == rate",
        "depth == 'deep'",
        "depth in 3",
        "depth == [1, 2]",
        "depth == {}",
        "depth is None",
        "__import__('os').getcwd() == 'x'",
        "-depth == 3",
        "",
    ],
)
def test_what_is_no_filter_is_a_users_error(csv, where):
    with pytest.raises(UserError) as caught:
        read_table(csv, [], where)
    assert caught.value.file == str(csv)
    assert caught.value.key == "--where"
    assert "is no filter" in str(caught.value)


def test_a_filter_that_keeps_nothing_is_named(csv):
    with pytest.raises(UserError, match="no row is left") as caught:
        read_table(csv, [], "depth > 99")
    assert caught.value.key == "--where"


def test_a_missing_column_is_named_with_those_that_there_are(csv):
    with pytest.raises(UserError, match="no column 'loss'; known: depth, name, rate") as caught:
        read_table(csv, ["depth", "loss"])
    assert caught.value.file == str(csv)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_table(tmp_path / "none.csv", [])
    for name, text, fragment in (
        ("runs.txt", "a\n1\n", "format .txt is not known"),
        ("runs", "a\n1\n", "format without an ending is not known"),
        ("runs.parquet", "not parquet", "cannot be read"),
        ("runs.csv", "a,b\n1\n1,2", r"1 rows that cannot be read \(wrong number of columns\), the first is 1"),
        ("empty.csv", "", "has no rows"),
        ("runs.jsonl", "{", "1 rows that cannot be read"),
        ("head.csv", "a,b\n", "has no rows"),
        ("latin.csv", b"a\ncaf\xe9\n", "is not utf-8 text: byte 5 is 0xe9; write it as UTF-8"),
    ):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match=fragment) as caught:
            read_table(path, [])
        assert caught.value.file == str(path)
        assert caught.value.key is None
