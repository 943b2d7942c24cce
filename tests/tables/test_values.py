"""Values of any type as ids, numbers, lists and vectors: each by itself, usable, missing or wrong."""

import datetime
import decimal
import math

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from bfm.tables import values as parse


def text(values):
    return pa.array(values, pa.large_string())


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
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_written_by_python_come_back(number):
    assert parse.numbers(text([repr(number)]))[0].to_pylist() == [number]
