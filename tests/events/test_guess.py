"""The first schema of a log: who, what and when are found by names and values, fields stand where they vary, and what
it proposes can be prepared."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from bfm.errors import UserError
from bfm.events.guess import guess_schema
from bfm.events.schema import EventSchema
from bfm.yaml import parse_yaml, validate
from tests.events.serial import prepare_serially


def columns(rows=3000, **more):
    rng = np.random.default_rng(0)
    sku = rng.integers(0, 60, rows)
    return {
        "Customer ID": rng.integers(10_000, 10_200, rows),
        "order time": np.datetime64("2024-03-01T00:00:00") + rng.integers(0, 5_000_000, rows).astype("timedelta64[s]"),
        "sku": np.char.add("A", sku.astype(str)),
        "brand": np.array(["x", "y", "z"])[sku % 3],
        "title": np.array([f"a nice thing number {item}" for item in range(60)])[sku],
        "tags": np.array(["red|round", "blue|square|new"])[sku % 2],
        "quantity": rng.integers(1, 9, rows),
        "shop_id": rng.integers(1, 5, rows),
        "row": [f"r{row}" for row in range(rows)],
        "currency": ["EUR"] * rows,
        **more,
    }


def guessed(path):
    text = guess_schema([str(path)])
    return text, validate(EventSchema, parse_yaml(text, file="s.yaml"), file="s.yaml")


@pytest.mark.parametrize("form", ["parquet", "csv", "semicolons"])
def test_roles_and_sides_are_found_in_any_format(tmp_path, form):
    table = pa.table(columns())
    path = tmp_path / ("log.parquet" if form == "parquet" else "log.csv")
    if form == "parquet":
        pq.write_table(table, path)
    else:
        how = pyarrow.csv.WriteOptions(delimiter=";" if form == "semicolons" else ",")
        pyarrow.csv.write_csv(table, path, how)
    text, schema = guessed(path)
    assert (schema.user, schema.time.column) == ("Customer ID", "order time")
    assert [part.column for part in schema.item] == ["sku"]
    kinds = {name: field.kind for name, field in schema.item_fields.items()}
    assert kinds == {"brand": "categorical", "title": "text", "tags": "list"}
    assert schema.item_fields["tags"].separator == "|"
    assert {name: field.kind for name, field in schema.context_fields.items()} == {
        "quantity": "numeric",
        "shop_id": "categorical",
    }
    assert "# row is left out" in text
    assert "# currency is left out" in text


def test_what_is_proposed_can_be_prepared(tmp_path):
    pq.write_table(pa.table(columns()), tmp_path / "log.parquet")
    (tmp_path / "schema.yaml").write_text(guess_schema([str(tmp_path / "log.parquet")]))
    prepare_serially(tmp_path / "schema.yaml", [tmp_path / "log.parquet"], tmp_path / "shards")
    assert (tmp_path / "shards" / "manifest.json").exists()


def test_a_doubt_stands_beside_the_choice(tmp_path):
    pq.write_table(pa.table(columns(product=columns()["sku"])), tmp_path / "log.parquet")
    text, schema = guessed(tmp_path / "log.parquet")
    assert "or sku?" in text or "or product?" in text
    assert schema.item[0].column in ("sku", "product")


@pytest.mark.parametrize(
    ("dropped", "said"), [("order time", "no column holds times"), ("Customer ID", None), ("sku", None)]
)
def test_a_log_without_times_is_refused_and_other_names_are_guessed_by_what_repeats(tmp_path, dropped, said):
    left = {name: values for name, values in columns().items() if name != dropped}
    pq.write_table(pa.table(left), tmp_path / "log.parquet")
    if said is None:
        assert "no column's name says so" in guessed(tmp_path / "log.parquet")[0]
        return
    with pytest.raises(UserError, match=said):
        guess_schema([str(tmp_path / "log.parquet")])


def write_csv(path, separator=",", encoding="utf-8", **table):
    rows = zip(*table.values(), strict=True)
    lines = [separator.join(table), *(separator.join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding=encoding)


def events(rows=2000):
    rng = np.random.default_rng(1)
    days = np.datetime64("2020-06-01") + rng.integers(0, 400, rows)
    table = {"user": rng.integers(0, 100, rows), "item": rng.integers(0, 50, rows), "date": days}
    return table, pd.DatetimeIndex(days), rng


def test_numbers_with_decimal_commas_are_numeric(tmp_path):
    table, _, rng = events()
    prices = [f"{price:,.2f}".translate(str.maketrans(",.", ".,")) for price in rng.uniform(1, 3000, 2000).round(2)]
    write_csv(tmp_path / "log.csv", ";", **table, price=prices)
    assert guessed(tmp_path / "log.csv")[1].context_fields["price"].kind == "numeric"


def test_a_number_within_a_product_is_numeric_and_its_id_is_categorical(tmp_path):
    table, _, rng = events()
    price, shop = rng.uniform(1, 9, 2000).round(2), rng.integers(0, 9, 2000)
    columns = (table["user"], table["item"], table["date"], price, shop)
    rows = [
        {
            "user": int(u),
            "at": str(t),
            "product": {"sku": f"A{i}", "price": float(p), "stock": int(s), "rate_code": int(s)},
        }
        for u, i, t, p, s in zip(*columns, strict=True)
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kinds = {name: field.kind for name, field in guessed(tmp_path / "log.jsonl")[1].context_fields.items()}
    assert (kinds["product_price"], kinds["product_rate_code"]) == ("numeric", "categorical")


@pytest.mark.parametrize(
    "form",
    [
        *("%d.%m.%Y", "%m/%d/%Y %H:%M", "%d/%m/%Y %I:%M %p", "%d-%m-%Y %H:%M:%S", "%m/%d/%y", "%Y%m%d", "%Y%m%d%H%M"),
        *("%d-%b-%Y", "%b %d, %Y", "%d-%b-%y %H:%M", "%a %b %d %H:%M:%S %Y"),
        *("%d/%b/%Y:%H:%M:%S %z", "%a, %d %b %Y %H:%M:%S %z"),
    ],
)
def test_times_in_common_formats_are_proposed_with_their_format(tmp_path, form):
    table, days, _ = events()
    write_csv(tmp_path / "log.csv", ";", **{**table, "date": days.strftime(form.replace("%z", "+0200"))})
    text, schema = guessed(tmp_path / "log.csv")
    assert (schema.time.column, schema.time.format) == ("date", form)
    assert f"is read as '{form}'" in text
    (tmp_path / "s.yaml").write_text(text)
    manifest = prepare_serially(tmp_path / "s.yaml", [tmp_path / "log.csv"], tmp_path / "shards")
    assert manifest.events == 2000


def test_of_two_formats_that_fit_the_other_is_a_doubt(tmp_path):
    table, days, _ = events()
    write_csv(
        tmp_path / "log.csv", **{**table, "date": [f"{3 + day.day % 3:02d}/{day.day % 9 + 1:02d}/2020" for day in days]}
    )
    assert "is read as '%m/%d/%Y'; '%d/%m/%Y' fits too" in guessed(tmp_path / "log.csv")[0]


@pytest.mark.parametrize(("unit", "epoch"), [("days", "1970-01-01"), ("sheet_days", "1899-12-30")])
def test_numbers_of_days_are_times_only_where_a_name_says_so(tmp_path, unit, epoch):
    table, days, _ = events()
    numbers = (days - pd.Timestamp(epoch)).days
    write_csv(tmp_path / "log.csv", **{**table, "date": numbers})
    text, schema = guessed(tmp_path / "log.csv")
    assert (schema.time.column, schema.time.unit) == ("date", unit)
    assert "date holds numbers such as" in text
    write_csv(tmp_path / "other.csv", user=table["user"], item=table["item"], n=numbers)
    with pytest.raises(UserError, match="in a format that is known; write a schema by hand"):
        guess_schema([str(tmp_path / "other.csv")])


def test_times_in_no_known_format_are_shown(tmp_path):
    table, _, _ = events()
    write_csv(tmp_path / "log.csv", **{**table, "date": ["in week 7"] * 2000})
    with pytest.raises(UserError, match="date has values such as 'in week 7'"):
        guess_schema([str(tmp_path / "log.csv")])


def test_an_encoding_that_files_do_not_show_is_given_and_stands_in_the_schema(tmp_path):
    table, _, _ = events()
    write_csv(tmp_path / "log.csv", encoding="latin-1", **table, shop=["Büro", "Straße"] * 1000)
    with pytest.raises(UserError, match="--encoding latin-1"):
        guess_schema([str(tmp_path / "log.csv")])
    with pytest.raises(UserError, match="'latin-9x' is no text encoding"):
        guess_schema([str(tmp_path / "log.csv")], "latin-9x")
    text = guess_schema([str(tmp_path / "log.csv")], "latin-1")
    assert validate(EventSchema, parse_yaml(text, file="s.yaml"), file="s.yaml").read.encoding == "latin-1"


def test_heads_in_any_language_become_names_that_a_schema_takes(tmp_path):
    table, _, rng = events()
    heads = ("gr\u00f6\u00dfe", "2nd price", "Shop", "shop", "\u4ef7\u683c", "sku-no", "x" * 80)
    table |= {head: rng.integers(0, 5 + place, len(table["user"])) for place, head in enumerate(heads)}
    write_csv(tmp_path / "log.csv", **table)
    text, schema = guessed(tmp_path / "log.csv")
    fields = {**schema.item_fields, **schema.context_fields}
    assert len(fields) == len(heads)
    assert {spec.column or name for name, spec in fields.items()} == set(heads)
    (tmp_path / "s.yaml").write_text(text)
    assert prepare_serially(tmp_path / "s.yaml", [tmp_path / "log.csv"], tmp_path / "shards").events == 2000
