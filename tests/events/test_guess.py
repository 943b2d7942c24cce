"""The first schema of a log: who, what and when are found by names and values, fields stand where they vary, and what
it proposes can be prepared."""

from __future__ import annotations

import numpy as np
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
