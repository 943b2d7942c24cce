import json
import math

import pyarrow as pa
import pytest

from bfm.events import clean
from bfm.events.schema import EventSchema, TimeSpec
from bfm.tables.pieces import RawChunk
from bfm.yaml import parse_yaml, validate

TIME = TimeSpec(column="t")
DAY_MS = 1_483_228_800_000  # 2017-01-01


def schema(text):
    return validate(EventSchema, parse_yaml(text, file="s.yaml"))


def text(values):
    return pa.array(values, pa.large_string())


# ---------------------------------------------------------------- whole rows

SHOP = clean.Cleaner(
    schema(
        "name: s\nuser: u\ntime: t\nitem: [mcc, {column: amount, buckets: [10, 100]}]\n"
        "item_fields: {brand: categorical, tags: list, size: numeric}\n"
        "context_fields: {quantity: numeric, shop: categorical, seen: time, note: text, place: vector}\n"
    ),
    ["brand", "tags", "size"],
)


def rows(**columns):
    good = {
        "u": "ann", "t": "2017-01-01", "mcc": 5411, "amount": 12.5, "brand": "x", "tags": ["a"], "size": 1.0,
        "quantity": "2", "shop": 7.0, "seen": DAY_MS, "note": "Hello", "place": [1.0, 2.0],
    }  # fmt: skip
    num = max(len(values) for values in columns.values())
    return pa.table({name: columns.get(name, [value] * num) for name, value in good.items()})


def test_a_good_row():
    cleaned = SHOP.clean(rows(u=["ann"]))
    assert cleaned.table.schema == SHOP.target
    assert cleaned.table.to_pylist() == [
        {
            "user": "ann", "time": DAY_MS, "item": "5411\x1f10..100", "i.brand": "x", "i.tags": "a", "i.size": "1",
            "c.quantity": 2.0, "c.shop": "7", "c.seen": DAY_MS, "c.note": "Hello", "c.place": [1.0, 2.0],
            "fault": None, "raw": None,
        }
    ]  # fmt: skip
    assert not cleaned.losses


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("u", None, "missing user"),
        ("u", math.nan, "missing user"),
        ("u", math.inf, "user is infinite"),
        ("u", {"id": 1}, "wrong type of user"),
        ("t", "soon", "unparsable time"),
        ("t", None, "missing time"),
        ("t", math.inf, "unparsable time"),
        ("mcc", "", "missing item"),
        ("mcc", "a\x1fb", "item holds a control character"),
        ("amount", None, "missing item"),
        ("amount", "much", "item is not a number"),
        ("amount", math.inf, "item is infinite"),
    ],
)
def test_unusable_rows_keep_reason_and_content(column, value, reason):
    cleaned = SHOP.clean(rows(**{column: [value]}))
    (row,) = cleaned.table.to_pylist()
    assert row["fault"] == reason
    raw = json.loads(row["raw"])
    assert raw["brand"] == "x"
    assert raw["u"] == "ann" or column == "u"


def test_bad_field_values_become_missing_and_are_counted():
    raw = rows(
        quantity=["x", "inf", ""],
        shop=[math.inf, 1.0, None],
        seen=["never", "2017-01-01", None],
        place=[[1.0, math.inf], [1.0, 2.0], None],
        tags=[["a"], [], None],
        size=[math.nan, math.inf, 1.0],
    )
    cleaned = SHOP.clean(raw)
    assert cleaned.table["fault"].null_count == 3
    assert cleaned.table["c.quantity"].to_pylist() == [None, None, None]
    assert cleaned.table["c.place"].to_pylist() == [None, [1.0, 2.0], None]
    assert cleaned.table["i.size"].to_pylist() == [None, None, "1"]
    assert dict(cleaned.losses) == {
        ("quantity", "not a number"): 1,
        ("quantity", "infinite"): 1,
        ("shop", "infinite"): 1,
        ("seen", "not a time"): 1,
        ("place", "not a vector of finite numbers"): 1,
        ("size", "infinite"): 1,
    }


def test_text_of_item_values_comes_back():
    for kind, values in (
        ("list", pa.array([["a", "b"], None], pa.large_list(pa.large_string()))),
        ("vector", pa.array([[0.1, -2.5e-30], None], pa.large_list(pa.float32()))),
        ("numeric", pa.array([0.1, None])),
        ("time", pa.array([DAY_MS, None])),
        ("categorical", text(["a", None])),
    ):
        assert clean.from_text(clean.to_text(values), kind).to_pylist() == values.to_pylist()


def test_rows_that_are_all_wrong_stay_rows():
    cleaned = SHOP.clean(rows(u=[None] * 3)).table
    assert cleaned["fault"].to_pylist() == ["missing user"] * 3
    unreadable = SHOP.unreadable(RawChunk(pa.table({}), ("{", "["), "not JSON"))
    assert unreadable.schema == cleaned.schema
    assert unreadable["raw"].to_pylist() == ["{", "["]
    assert unreadable["fault"].null_count == 0
