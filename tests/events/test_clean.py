import datetime
import decimal
import json
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bfm.events import clean, parse
from bfm.events.schema import EventSchema, TimeSpec
from bfm.events.source import RawChunk
from bfm.yaml import parse_yaml, validate

TIME = TimeSpec(column="t")
DAY_MS = 1_483_228_800_000  # 2017-01-01


def schema(text):
    return validate(EventSchema, parse_yaml(text, file="s.yaml"))


def text(values):
    return pa.array(values, pa.large_string())


# ---------------------------------------------------------------- parsers


@pytest.mark.parametrize(
    ("written", "expected_ms"),
    [
        ("2017-01-01", DAY_MS),
        (" 2017/1/1 ", DAY_MS),
        ("2017-01-01 10:30", DAY_MS + 37_800_000),
        ("2017-01-01T10:30:01.5Z", DAY_MS + 37_801_500),
        ("2017-01-01T10:30:00+02:00", DAY_MS + 30_600_000),
        ("2017-01-01T10:30:00-0530", DAY_MS + 57_600_000),
        ("2017-01-01T10:30:00.123456789 UTC", DAY_MS + 37_800_123),
        ("1483228800", DAY_MS),
        ("1483228800.25", DAY_MS + 250),
        ("1483228800000", DAY_MS),
        ("1969-12-31", -86_400_000),
    ],
)
def test_times_written_as_text(written, expected_ms):
    values, wrong = parse.times(text([written]), TIME)
    assert values.to_pylist() == [expected_ms]
    assert not wrong[0]


@pytest.mark.parametrize("written", ["2017-02-30", "2017-13-01", "tomorrow", "01.02.2017", "2017-01-01 25:00", "inf"])
def test_text_that_is_no_time(written):
    values, wrong = parse.times(text([written]), TIME)
    assert values.to_pylist() == [None]
    assert wrong[0]


@pytest.mark.parametrize("blank", ["", "  ", "nan", "NULL", None])
def test_a_blank_time_is_missing_and_not_wrong(blank):
    values, wrong = parse.times(text([blank]), TIME)
    assert values.to_pylist() == [None]
    assert not wrong[0]


def test_times_of_other_types():
    moment = datetime.datetime(2017, 1, 1, tzinfo=datetime.UTC)
    zone = datetime.timezone(datetime.timedelta(hours=2))
    for array in (
        pa.array([moment]),
        pa.array([moment], pa.timestamp("ns", "Europe/Paris")),
        pa.array([datetime.datetime(2017, 1, 1, 2, tzinfo=zone)]),
        pa.array([datetime.datetime(2017, 1, 1)], pa.timestamp("s")),
        pa.array([datetime.date(2017, 1, 1)]),
        pa.array([datetime.date(2017, 1, 1)], pa.date64()),
        pa.array([1483228800]),
        pa.array([1483228800.0]),
        pa.array([1483228800000]),
        pa.array([1483228800000000]),
        pa.array([1483228800000000001]),
        pa.array(["2017-01-01"]).dictionary_encode(),
    ):
        values, wrong = parse.times(parse.plain(array), TIME)
        assert (values.to_pylist(), wrong.tolist()) == ([DAY_MS], [False]), array.type
    for array in (pa.array([True]), pa.array([[1]]), pa.array([math.inf]), pa.array([9e21]), pa.array([1e300])):
        values, wrong = parse.times(array, TIME)
        assert (values.to_pylist(), wrong.tolist()) == ([None], [True]), array.type


def test_units_and_formats():
    assert parse.times(pa.array([5]), TimeSpec(column="t", unit="ms"))[0].to_pylist() == [5]
    assert parse.times(pa.array([5]), TimeSpec(column="t", unit="s"))[0].to_pylist() == [5000]
    spec = TimeSpec(column="t", format="%m/%d/%Y %H:%M")
    values, wrong = parse.times(text(["1/2/2017 8:30", "2017-01-02"]), spec)
    assert values.to_pylist() == [DAY_MS + 86_400_000 + 30_600_000, None]
    assert wrong.tolist() == [False, True]


def test_numbers():
    written = ["1", "+2.5", " 3 ", "x", "inf", "-Infinity", "1e400", "nan", "", "-.5", "5.", "1,000", "0x10", None]
    values, wrong, infinite = parse.numbers(text(written))
    assert values.to_pylist() == [1, 2.5, 3, None, None, None, None, None, None, -0.5, 5, None, None, None]
    assert [w for w, bad in zip(written, wrong, strict=True) if bad] == ["x", "1,000", "0x10"]
    assert [w for w, bad in zip(written, infinite, strict=True) if bad] == ["inf", "-Infinity", "1e400"]
    assert parse.numbers(pa.array([math.nan, math.inf, 2]))[0].to_pylist() == [None, None, 2]
    assert parse.numbers(pa.array([True, False]))[0].to_pylist() == [1, 0]
    assert parse.numbers(pa.array([[1]]))[1].tolist() == [True]


def test_keys_of_ids_that_pandas_made_floats():
    assert parse.keys(pa.array([17850.0, math.nan, 2.5, -0.0]))[0].to_pylist() == ["17850", None, "2.5", "0"]
    assert parse.keys(pa.array([0.1], pa.float32()))[0].to_pylist() == ["0.1"]
    assert parse.keys(pa.array([7, None]))[0].to_pylist() == ["7", None]
    assert parse.keys(text([" a ", "", "007"]))[0].to_pylist() == ["a", None, "007"]
    assert parse.keys(pa.array([math.inf]))[2].tolist() == [True]


def test_columns_of_odd_types_are_wrong_and_not_a_crash():
    for array in (pa.array([b"a", None]), pa.array([b"ab", None], pa.binary(2)), pa.array([{"a": 1}, None])):
        assert parse.keys(array)[0].to_pylist() == [None, None]
        assert parse.keys(array)[1].tolist() == [True, False]
        assert parse.numbers(array)[1].tolist() == [True, False]
        assert parse.times(array, TIME)[1].tolist() == [True, False]
        assert parse.lists(array, None)[1].tolist() == [True, False]
        assert parse.vectors(array, None)[1].tolist() == [True, False]
    big = decimal.Decimal("12345678901234567890")
    assert parse.keys(pa.array([big, None]))[0].to_pylist() == [str(big), None]
    assert parse.keys(pa.array([decimal.Decimal("2.50")]))[0].to_pylist() == ["2.5"]
    assert parse.keys(pa.array([np.float16(3)]))[0].to_pylist() == ["3"]
    assert parse.keys(pa.array([datetime.date(2017, 1, 1)]))[0].to_pylist() == ["2017-01-01"]


def test_positions_are_whole_numbers():
    values, wrong = parse.positions(pa.array([1.0, 2.5, None, math.inf]))
    assert (values.to_pylist(), wrong.tolist()) == ([1, None, None, None], [False, True, False, True])
    assert parse.positions(text(["3", "x"]))[1].tolist() == [False, True]


def test_lists_and_vectors():
    assert parse.lists(text(["a|b||c", "", None]), "|")[0].to_pylist() == [["a", "b", "c"], None, None]
    assert parse.lists(pa.array([[1, None, 2], [], None]), None)[0].to_pylist() == [["1", "2"], None, None]
    assert parse.lists(pa.array([1, None]), None)[0].to_pylist() == [["1"], None]
    assert parse.lists(pa.array([[[1]]]), None)[1].tolist() == [True]
    values, wrong = parse.vectors(text(["1 2.5", "1 x", None]), " ")
    assert (values.to_pylist(), wrong.tolist()) == ([[1, 2.5], None, None], [False, True, False])
    assert parse.vectors(pa.array([[1.0, math.nan]]), None)[1].tolist() == [True]
    assert parse.vectors(pa.array([3]), None)[1].tolist() == [True]


def test_buckets_are_half_open():
    names = parse.bucket_names(pa.array([9.9, 10, 50, 100, None]), [10, 50, 100])
    assert names.to_pylist() == ["..10", "10..50", "50..100", "100..", None]


_ANY = st.one_of(
    st.none(), st.text(max_size=12), st.floats().map(repr), st.integers().map(str), st.datetimes().map(str)
)


@given(st.lists(_ANY, min_size=1, max_size=8))
@settings(deadline=None)
def test_every_value_is_judged_by_itself(values):
    """The outcome of a value depends on no other value, and is either usable, missing or wrong."""
    values = [None if v is None else v.encode("utf-8", "replace").decode() for v in values]
    for parser in (
        lambda a: parse.times(a, TIME),
        lambda a: parse.numbers(a)[:2],
        parse.positions,
        lambda a: parse.keys(a)[:2],
        lambda a: parse.lists(a, "|"),
        lambda a: parse.vectors(a, " "),
    ):
        together = parser(text(values))
        alone = [parser(text([value])) for value in values]
        assert together[0].to_pylist() == [part[0].to_pylist()[0] for part in alone]
        assert together[1].tolist() == [bool(part[1][0]) for part in alone]
        assert not (parse.to_mask(together[0].is_valid()) & together[1]).any()


@settings(deadline=None)
@given(st.datetimes(min_value=datetime.datetime(1, 1, 1), max_value=datetime.datetime(9999, 12, 31)))
def test_iso_times_agree_with_datetime(moment):
    expected = (moment - datetime.datetime(1970, 1, 1)) // datetime.timedelta(milliseconds=1)
    assert parse.times(text([moment.isoformat()]), TIME)[0].to_pylist() == [expected]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_written_by_python_come_back(number):
    assert parse.numbers(text([repr(number)]))[0].to_pylist() == [number]


# ---------------------------------------------------------------- whole rows

SHOP = schema(
    "name: s\nuser: u\ntime: t\nitem: [mcc, {column: amount, buckets: [10, 100]}]\n"
    "item_fields: {brand: categorical, tags: list, size: numeric}\n"
    "context_fields: {quantity: numeric, shop: categorical, seen: time, note: text, place: vector}\n"
)
FIELDS = ["brand", "tags", "size"]


def rows(**columns):
    good = {
        "u": "ann", "t": "2017-01-01", "mcc": 5411, "amount": 12.5, "brand": "x", "tags": ["a"], "size": 1.0,
        "quantity": "2", "shop": 7.0, "seen": DAY_MS, "note": "Hello", "place": [1.0, 2.0],
    }  # fmt: skip
    num = max(len(values) for values in columns.values())
    return pa.table({name: columns.get(name, [value] * num) for name, value in good.items()})


def test_a_good_row():
    cleaned = clean.clean_table(rows(u=["ann"]), SHOP, FIELDS)
    assert cleaned.table.schema == clean.cleaned_schema(SHOP, FIELDS)
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
    cleaned = clean.clean_table(rows(**{column: [value]}), SHOP, FIELDS)
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
    cleaned = clean.clean_table(raw, SHOP, FIELDS)
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
    cleaned = clean.clean_table(rows(u=[None] * 3), SHOP, FIELDS).table
    assert cleaned["fault"].to_pylist() == ["missing user"] * 3
    unreadable = clean._unreadable(RawChunk(pa.table({}), ("{", "["), "not JSON"), SHOP, FIELDS).table
    assert unreadable.schema == cleaned.schema
    assert unreadable["raw"].to_pylist() == ["{", "["]
    assert np.all(parse.to_mask(unreadable["fault"].is_valid()))
