"""Logs as people bring them: each fault that was seen in one, small, with the right value."""

from __future__ import annotations

import gzip
import json
import math
import re
from decimal import Decimal
from statistics import fmean

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bfm.errors import UserError
from bfm.events.account import account_lines
from bfm.events.describe import time_text
from bfm.events.shards import Shards
from bfm.tables import dialect
from tests.events.serial import prepare_serially
from tests.helpers import user_keys

SCHEMA = "name: s\nuser: user\ntime: time\nitem: item\n"
DAY_S = 86_400
START_S = 1_600_000_000
ROWS = [(f"u{n % 12}", f"i{n * 7 % 10}", START_S + n * DAY_S) for n in range(120)]
USERS, ITEMS = 12, 10


def prepared(folder, *logs, schema=SCHEMA, out="out"):
    """The manifest, after a check of the account."""
    (folder / "s.yaml").write_text(schema)
    manifest = prepare_serially(folder / "s.yaml", logs or [folder / "log.csv"], folder / out)
    assert manifest.rows_read == manifest.events + sum(manifest.rows_quarantined.values())
    return manifest


def keys(folder, out="out"):
    return set(user_keys(Shards.open(folder / out)).to_pylist())


def write_csv(path, rows=ROWS, header="user,item,time", separator=",", encoding="utf-8"):
    lines = [header, *(separator.join(map(str, row)) for row in rows)]
    path.write_bytes(("\n".join(lines) + "\n").encode(encoding))


def told(manifest):
    return "\n".join(account_lines(manifest.rows_read, manifest.events, manifest.rows_quarantined, manifest.checks))


# ---------------------------------------------------------------- numbers that are ids


@pytest.mark.parametrize("base", [2**53, 2**62, 2**63 + 12_345, 2**64])
def test_integers_of_json_are_exact(tmp_path, base):
    with open(tmp_path / "log.jsonl", "w") as file:
        for n, (_, item, time) in enumerate(ROWS):
            file.write(json.dumps({"user": base + n % USERS, "item": item, "time": time}) + "\n")
    prepared(tmp_path, tmp_path / "log.jsonl")
    assert keys(tmp_path) == {str(base + n) for n in range(USERS)}


@pytest.mark.parametrize("array", [False, True])
def test_a_float_in_json_changes_no_other_row_of_its_column(tmp_path, array):
    ids = [2**62 + n % USERS for n in range(len(ROWS))]
    for place, value in ((30, 7.0), (42, 7.5), (54, 7.5), (55, 9.5e18)):
        ids[place] = value
    rows = [{"user": user, "item": item, "time": time} for user, (_, item, time) in zip(ids, ROWS, strict=True)]
    text = json.dumps(rows, indent=1) if array else "\n".join(map(json.dumps, rows))
    (tmp_path / "log.json").write_text(text)
    manifest = prepared(tmp_path, tmp_path / "log.json")
    assert keys(tmp_path) == {str(2**62 + n) for n in range(USERS)} | {"7", str(95 * 10**17)}
    assert manifest.rows_quarantined == {"user is a number that is not whole or was rounded": 2}


def test_decimals_are_exact(tmp_path):
    users = [Decimal(f"{9_100_000_000_000_000_000 + n % USERS}.0000000000") for n in range(len(ROWS))]
    table = {"user": pa.array(users, pa.decimal128(38, 10)), "item": [r[1] for r in ROWS], "time": [r[2] for r in ROWS]}
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    prepared(tmp_path, tmp_path / "log.parquet")
    assert keys(tmp_path) == {str(9_100_000_000_000_000_000 + n) for n in range(USERS)}


def test_an_id_is_one_id_with_and_without_a_point(tmp_path):
    """pandas writes integers with a gap as floats: here one month's items, not the other's and not the item table's."""
    rows = [(n % USERS, 100 + n * 7 % ITEMS, START_S + n * DAY_S) for n in range(120)]
    write_csv(tmp_path / "a.csv", [(u, f"{i}.0" if n else "", t) for n, (u, i, t) in enumerate(rows)])
    write_csv(tmp_path / "b.csv", rows)
    (tmp_path / "items.csv").write_text("item,brand\n" + "".join(f"{100 + n},b{n % 3}\n" for n in range(ITEMS - 1)))
    schema = SCHEMA + "items: {path: items.csv, key: item}\nitem_fields: {brand: categorical}\n"
    manifest = prepared(tmp_path, tmp_path / "a.csv", tmp_path / "b.csv", schema=schema)
    assert (manifest.items, manifest.events) == (ITEMS, 239)
    assert manifest.checks["items_without_row"] == 1
    assert "warning: 1 items of the log have no row in the item table" in told(manifest)
    assert "file a.csv: rows 120, missing item 1" in told(manifest)


@pytest.mark.parametrize(("of_table", "pair"), [("107", ("00107", "107")), ("x", ("00100", "x"))])
def test_items_that_never_meet_the_item_table_are_told_with_a_key_of_each_side(tmp_path, of_table, pair):
    write_csv(tmp_path / "log.csv", [(n % USERS, f"00{100 + n * 7 % ITEMS}", START_S + n * DAY_S) for n in range(120)])
    (tmp_path / "items.csv").write_text(f"item,brand\n{of_table},a\n200,b\n")
    schema = SCHEMA + "items: {path: items.csv, key: item}\nitem_fields: {brand: categorical}\n"
    text = told(prepared(tmp_path, schema=schema))
    assert "no item of the log has a row in the item table" in text
    assert f"the log has keys such as {pair[0]!r}, the table such as {pair[1]!r}" in text


def test_ids_that_a_sheet_rounded_are_no_ids(tmp_path):
    write_csv(tmp_path / "log.csv", [("4.01235E+12", *row[1:]) if n % 4 else row for n, row in enumerate(ROWS)])
    wrong = "user is a number that is not whole or was rounded"
    assert prepared(tmp_path).rows_quarantined == {wrong: 90}


@pytest.mark.parametrize("word", ["None", "<NA>", "nan", "NULL", "NaT", " "])
def test_texts_that_say_that_there_is_nothing_are_no_ids(tmp_path, word):
    write_csv(tmp_path / "a.csv", [(word, *ROWS[0][1:]), *ROWS])
    rows = [{"user": user, "item": item, "time": time} for user, item, time in [("u1", word, START_S), *ROWS]]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    manifest = prepared(tmp_path, tmp_path)
    assert manifest.rows_quarantined == {"missing user": 1, "missing item": 1}
    assert keys(tmp_path) == {row[0] for row in ROWS}


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("tail", ["", ' 5"'])
@pytest.mark.parametrize("place", [0, 3])
def test_a_quote_that_nobody_closes_swallows_no_row(tmp_path, tail, place):
    rows = [[*row, "fine"] for row in ROWS]
    rows[20][place] = f'"{rows[20][place]}'
    rows[70][3] += tail
    write_csv(tmp_path / "log.tsv", rows, "user\titem\ttime\ttitle", "\t")
    manifest = prepared(tmp_path, tmp_path / "log.tsv")
    assert manifest.events == len(ROWS)
    assert manifest.checks["lines"]["with quotes as text"] == 1
    assert "lines: 121 = 1 header + 120 rows" in told(manifest)


def test_values_may_span_lines_and_hold_quotes(tmp_path):
    rows = [[*row, '"fine, and ""good"""'] for row in ROWS]
    rows[5][3] = '"two\n\nmore, lines\n"'
    rows[6][3] = '"as Spark \\"quotes\\", it"'
    write_csv(tmp_path / "log.csv", [*rows, ["u1", "i1"]], "user,item,time,note")
    manifest = prepared(tmp_path, schema=SCHEMA + "context_fields: {note: text}\n")
    assert (manifest.events, manifest.rows_quarantined) == (120, {"wrong number of columns": 1})
    assert manifest.checks["lines"] == {"header": 1, "rows": 121, "inside values": 3}


@pytest.mark.parametrize("block", [50, 1 << 24])
def test_blocks_may_end_anywhere(tmp_path, block, monkeypatch):
    monkeypatch.setattr(dialect, "BLOCK_BYTES", block)
    rows = [[*row, f'"a\n{n}"'] for n, row in enumerate(ROWS)]
    rows[50][3] = '"open'
    write_csv(tmp_path / "log.csv", rows, "user,item,time,note", encoding="utf-16")
    manifest = prepared(tmp_path)
    assert manifest.events == 120
    assert manifest.checks["lines"]["inside values"] == 119


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
def test_encodings(tmp_path, encoding):
    rows = [(f"é{user}", item, time) for user, item, time in ROWS]
    marked = encoding in ("utf-8-sig", "utf-16")
    write_csv(tmp_path / "log.csv", rows, "usuário,item,time", encoding=encoding)
    schema = SCHEMA.replace("user: user", "user: usuário") + ("" if marked else f"read: {{encoding: {encoding}}}\n")
    manifest = prepared(tmp_path, schema=schema)
    assert keys(tmp_path) == {row[0] for row in rows}
    assert manifest.checks.get("read_as", {}) == ({} if encoding == "utf-8-sig" else {encoding: "log.csv"})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("row", [("é", "i1", START_S), ("u1", "é")])
def test_text_in_another_encoding_is_told_by_file_and_byte(tmp_path, row):
    write_csv(tmp_path / "log.csv", [*ROWS, row], encoding="latin-1")
    byte = (tmp_path / "log.csv").read_bytes().index(b"\xe9")
    expected = rf"log\.csv: read\.encoding: is not utf-8 text: byte {byte:,} is 0xe9; .*encoding: latin-1"
    with pytest.raises(UserError, match=expected):
        prepared(tmp_path)


@pytest.mark.parametrize(
    "text", ["\nuser,item,time\n", "sep=,\nuser,item,time\n", "\r\n\r\nuser,item,time\n", 'user,item,"time"\n']
)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_headers_and_line_ends(tmp_path, text, newline):
    body = (text + "".join(f"{u},{i},{t}\n" for u, i, t in ROWS)).replace("\r", "").replace("\n", newline)
    (tmp_path / "log.csv").write_bytes(body.encode())
    assert prepared(tmp_path).events == len(ROWS)


def test_a_header_may_span_lines_and_unwanted_columns_share_a_name(tmp_path):
    write_csv(
        tmp_path / "log.csv", [(*row, 1, 2) for row in ROWS], 'user,item,time,"note\n(optional)","note\n(optional)"'
    )
    manifest = prepared(tmp_path)
    assert (manifest.events, manifest.checks["lines"]["header"]) == (120, 3)
    write_csv(tmp_path / "log.csv", [(*row, 1) for row in ROWS], "user,item,time,user")
    with pytest.raises(UserError, match=r"log\.csv: has 2 columns 'user'"):
        prepared(tmp_path, out="again")


def test_bytes_are_text(tmp_path):
    users = [row[0].encode() if n else b"\xff" for n, row in enumerate(ROWS)]
    brands = pa.array([row[1].encode() for row in ROWS], pa.binary())
    pq.write_table(
        pa.table({"user": users, "item": brands, "time": [row[2] for row in ROWS], "brand": brands}),
        tmp_path / "log.parquet",
    )
    manifest = prepared(tmp_path, tmp_path / "log.parquet", schema=SCHEMA + "item_fields: {brand: categorical}\n")
    assert (manifest.events, manifest.items) == (120, ITEMS)
    assert next(field for field in manifest.fields if field.name == "brand").rows == ITEMS + 2
    assert keys(tmp_path) == {row[0] for row in ROWS} | {"\\xff"}


# ---------------------------------------------------------------- dialects


@pytest.mark.parametrize("separator", [";", "|", "\t"])
def test_separators_and_decimal_commas_are_seen(tmp_path, separator):
    rows = [(*row, f"1.23{n % 10},5") for n, row in enumerate(ROWS)]
    write_csv(tmp_path / "log.csv", rows, separator.join(["user", "item", "time", "price"]), separator)
    manifest = prepared(tmp_path, schema=SCHEMA + "context_fields: {price: numeric}\n")
    assert manifest.checks.get("repairs", {}) == {}
    (price,) = [field for field in manifest.fields if field.name == "price"]
    assert price.mean == pytest.approx(fmean(math.log1p(1230.5 + n % 10) for n in range(len(ROWS))), rel=0.01)
    assert "decimal commas (log.csv)" in told(manifest)


def test_a_decimal_mark_that_one_file_does_not_show_is_that_of_the_others(tmp_path):
    write_csv(tmp_path / "a.csv", [(*row, "1,5") for row in ROWS], "user;item;time;price", ";")
    write_csv(
        tmp_path / "b.csv",
        [(*row, n if n < 100 else "1,5") for n, row in enumerate(ROWS)][:90],
        "user;item;time;price",
        ";",
    )
    manifest = prepared(tmp_path, tmp_path, schema=SCHEMA + "context_fields: {price: numeric}\n")
    assert manifest.checks["read_as"] == {"separated by ';', decimal commas": "a.csv and 1 more"}


def test_points_stay_points(tmp_path):
    write_csv(tmp_path / "log.csv", [(*row, "1.5", "7,5") for row in ROWS], "user;item;time;price;note", ";")
    manifest = prepared(tmp_path, schema=SCHEMA + "context_fields: {price: numeric}\n")
    assert manifest.checks["read_as"] == {"separated by ';'": "log.csv"}
    assert "repairs" not in manifest.checks


def test_the_schema_may_say_it(tmp_path):
    write_csv(tmp_path / "log.csv", [(*row, "1,555") for row in ROWS], "user:item:time:price", ":")
    with pytest.raises(UserError, match="has no column 'user'"):
        prepared(tmp_path)
    schema = SCHEMA + 'context_fields: {price: numeric}\nread: {delimiter: ":", decimal: ","}\n'
    manifest = prepared(tmp_path, schema=schema)
    assert manifest.checks["read_as"] == {"separated by ':', decimal commas": "log.csv"}
    for wrong, expected in (("delimiter: ab", "one character"), ("encoding: klingon", "no text encoding")):
        with pytest.raises(UserError, match=expected):
            prepared(tmp_path, schema=SCHEMA + f"read: {{{wrong}}}\n", out="wrong")


def test_paths_into_nested_values(tmp_path):
    rows = [{"actor": {"id": 2**63 + int(u[1:])}, "item": i, "meta": {"at": {"t": t}}} for u, i, t in ROWS]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pa_rows = pa.Table.from_pylist([{**row, "actor": {"id": str(row["actor"]["id"])}} for row in rows])
    pq.write_table(pa_rows, tmp_path / "log.parquet")
    schema = "name: s\nuser: actor.id\ntime: meta.at.t\nitem: item\n"
    prepared(tmp_path, tmp_path / "log.jsonl", schema=schema)
    prepared(tmp_path, tmp_path / "log.parquet", schema=schema, out="parquet")
    assert keys(tmp_path) == keys(tmp_path, "parquet") == {str(2**63 + n) for n in range(USERS)}
    with pytest.raises(UserError, match=r"no column 'actor.name'; did you mean 'actor.id'"):
        prepared(tmp_path, tmp_path / "log.jsonl", schema=schema.replace("actor.id", "actor.name"), out="wrong")


def test_folders_may_say_columns(tmp_path):
    frame = pd.DataFrame(ROWS, columns=["user", "item", "time"])
    for user, part in frame.groupby("user"):
        folder = tmp_path / "log" / f"user={user}%2F"
        folder.mkdir(parents=True)
        part.drop(columns="user").to_parquet(folder / "part.parquet")
        part.drop(columns="user").to_json(folder / "part.jsonl", orient="records", lines=True)
        part.drop(columns="user").to_csv(folder / "part.csv", index=False)
    manifest = prepared(tmp_path, tmp_path / "log")
    assert manifest.events == 3 * len(ROWS)
    assert keys(tmp_path) == {f"{row[0]}/" for row in ROWS}
    assert "read as: user by the folders' names" in told(manifest)


def test_json_arrays_and_objects_of_several_lines(tmp_path, monkeypatch):
    rows = [{"user": user, "item": item, "time": time} for user, item, time in ROWS]
    monkeypatch.setattr(dialect, "BLOCK_BYTES", 100)
    for name, text in (
        ("one_line.json", json.dumps(rows)),
        ("indented.json", json.dumps(rows, indent=2)),
        ("objects.json", "\n".join(json.dumps(row, indent=2) for row in rows)),
    ):
        (tmp_path / name).write_text(text)
        assert prepared(tmp_path, tmp_path / name, out=name[:3]).events == len(ROWS)
    (tmp_path / "cut.json").write_text(json.dumps(rows)[:-30])
    with pytest.raises(UserError, match=r"cut\.json: is not JSON from"):
        prepared(tmp_path, tmp_path / "cut.json", out="cut")


# ---------------------------------------------------------------- places


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", "_temporary/0", "_delta_log"])
def test_hidden_folders_are_left_out_and_told(tmp_path, hidden):
    for place in (tmp_path / "log", tmp_path / "log" / hidden):
        place.mkdir(parents=True)
        write_csv(place / "log.csv")
    for n, log in enumerate((tmp_path / "log", tmp_path / "log" / "**" / "*.csv")):
        manifest = prepared(tmp_path, log, out=f"out{n}")
        assert manifest.events == len(ROWS)
        assert f"left out as hidden: {hidden.split('/')[0]} (1 file)" in told(manifest)


@pytest.mark.parametrize("name", ["export[1].csv", "log [2024]/a.csv", "with space & ü.csv", "a=b*.csv"])
def test_a_name_is_taken_as_it_is_written(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    write_csv(path)
    logs = [path, path.parent] if path.parent != tmp_path else [path]
    for n, log in enumerate([*logs, path.as_uri()]):
        assert prepared(tmp_path, log, out=f"out{n}").events == len(ROWS)


# ---------------------------------------------------------------- times


@pytest.mark.parametrize(
    ("write", "looks_like", "time"),
    [
        (lambda n: f"2020{n // 28 + 1:02d}{n % 28 + 1:02d}", "format: '%Y%m%d'", "{column: time, format: '%Y%m%d'}"),
        (lambda n: str(44_000 + n + 0.25), "unit: sheet_days", "{column: time, unit: sheet_days}"),
        (lambda n: str(18_500 + n), "unit: days", "{column: time, unit: days}"),
        (lambda n: str(438_000 + n), "write `position", "{column: time, unit: s}"),
        (lambda n: f"20200101{n % 24:02d}{n // 24:02d}30", "%H%M%S", "{column: time, format: '%Y%m%d%H%M%S'}"),
    ],
)
def test_numbers_that_are_no_epoch_are_refused_with_what_they_look_like(tmp_path, write, looks_like, time):
    write_csv(tmp_path / "log.csv", [(user, item, write(n)) for n, (user, item, _) in enumerate(ROWS)])
    with pytest.raises(UserError, match=r"times from .* to .*, is the unit right\?") as caught:
        prepared(tmp_path)
    assert looks_like in str(caught.value)
    manifest = prepared(tmp_path, schema=SCHEMA.replace("time: time", f"time: {time}"))
    assert manifest.events == len(ROWS)
    if "sheet" in time:
        assert pd.Timestamp(manifest.time_range[0], unit="ms") == pd.Timestamp("2020-06-18 06:00")
    if "unit: days" in time:
        assert pd.Timestamp(manifest.time_range[0], unit="ms") == pd.Timestamp("2020-08-26")


def test_one_file_of_other_times_is_named(tmp_path):
    write_csv(tmp_path / "a.csv")
    write_csv(tmp_path / "b.csv", [(user, item, f"2020{n % 12 + 1:02d}23") for n, (user, item, _) in enumerate(ROWS)])
    with pytest.raises(UserError, match=r"b\.csv: time: times from 1970-.* these look like written dates"):
        prepared(tmp_path, tmp_path / "a.csv", tmp_path / "b.csv")


@pytest.mark.parametrize(
    ("place", "write"),
    [
        ("context_fields", lambda n: f"2020{n % 12 + 1:02d}23"),
        ("context_fields", lambda n: 44_000 + n),
        ("item_fields", lambda n: 18_500 + n % 10),
    ],
)
def test_fields_of_other_times_are_refused_too(tmp_path, place, write):
    rows = [(*row, write(n * 7 % 10 if place == "item_fields" else n)) for n, row in enumerate(ROWS)]
    write_csv(tmp_path / "log.csv", rows, header="user,item,time,day")
    schema = f"{SCHEMA}{place}:\n  day: {{kind: time, column: day}}\n"
    with pytest.raises(UserError, match=rf"{place}\.day: times from 1970-.*, is the unit right"):
        prepared(tmp_path, schema=schema)


def test_times_of_an_item_table_are_looked_at(tmp_path):
    write_csv(tmp_path / "log.csv")
    write_csv(tmp_path / "items.csv", [(f"i{n}", 44_000 + n) for n in range(ITEMS)], header="item,released")
    table = "items: {path: items.csv, key: [item]}\nitem_fields:\n  released: {kind: time, column: released}\n"
    with pytest.raises(UserError, match=r"item_fields\.released: times from 1970-.* days of a spreadsheet"):
        prepared(tmp_path, schema=SCHEMA + table)


def test_dates_of_birth_before_1980_are_times(tmp_path):
    births = [(*row, -300_000_000 + 86_400 * n) for n, row in enumerate(ROWS)]
    write_csv(tmp_path / "log.csv", births, header="user,item,time,born")
    manifest = prepared(tmp_path, schema=f"{SCHEMA}context_fields:\n  born: {{kind: time, column: born}}\n")
    assert not manifest.checks.get("repairs")


def test_a_stated_unit_is_taken_and_doubted(tmp_path):
    """Seconds called milliseconds are in 1970; milliseconds called seconds are no times at all."""
    write_csv(tmp_path / "log.csv")
    manifest = prepared(tmp_path, schema=SCHEMA.replace("time: time", "time: {column: time, unit: ms}"))
    assert time_text(manifest.time_range, has_clock=True).endswith("days): is the unit right?")
    write_csv(tmp_path / "log.csv", [(user, item, 1000 * time) for user, item, time in ROWS])
    with pytest.raises(UserError, match=r"time holds 1600000000000: no times in s; leave `unit` out"):
        prepared(tmp_path, schema=SCHEMA.replace("time: time", "time: {column: time, unit: s}"), out="out2")


@pytest.mark.parametrize("form", ["%d.%m.%Y", "%m/%d/%Y %H:%M"])
def test_a_format_that_nobody_named_is_told_with_a_value(tmp_path, form):
    rows = [(user, item, pd.Timestamp(time, unit="s").strftime(form)) for user, item, time in ROWS]
    write_csv(tmp_path / "log.csv", rows)
    with pytest.raises(UserError, match=r"unparsable time 120") as caught:
        prepared(tmp_path)
    how = f"{{column: time, format: '{form}'}}"
    assert re.search(r"time holds \d\d[./]\d\d[./]\d{4}", str(caught.value))
    assert f"write `time: {how}`" in str(caught.value)
    assert prepared(tmp_path, schema=SCHEMA.replace("time: time", f"time: {how}")).events == len(ROWS)


def test_fractions_of_seconds_in_a_format(tmp_path):
    rows = [(user, item, f"{1 + n % 28:02d}.03.2021 10:00:00.{n:03d}9Z") for n, (user, item, _) in enumerate(ROWS)]
    write_csv(tmp_path / "log.csv", rows)
    schema = SCHEMA.replace("time: time", "time: {column: time, format: '%d.%m.%Y %H:%M:%S.%fZ'}")
    assert prepared(tmp_path, schema=schema).time_range[0] == pd.Timestamp("2021-03-01 10:00").value // 10**6
    with pytest.raises(UserError, match="%f needs a mark before it"):
        prepared(tmp_path, schema=schema.replace(".%f", "%f"), out="wrong")


def test_repairs_are_told(tmp_path):
    write_csv(
        tmp_path / "log.csv", [(*row, "much" if n < 3 else 1) for n, row in enumerate(ROWS)], "user,item,time,price"
    )
    manifest = prepared(tmp_path, schema=SCHEMA + "context_fields: {price: numeric}\n")
    assert "repaired: values taken as missing: price: not a number 3" in told(manifest)


def test_compressed_files_of_several_parts(tmp_path):
    text = ("user,item,time\n" + "".join(f"{u},{i},{t}\n" for u, i, t in ROWS)).encode()
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(text[:1000]) + gzip.compress(text[1000:]))
    assert prepared(tmp_path, tmp_path / "log.csv.gz").events == len(ROWS)
