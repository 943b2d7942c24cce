"""Times of every type and spelling to milliseconds."""

import datetime
import math

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bfm.events.schema import TimeSpec
from bfm.events.times import times
from bfm.tables.values import plain

TIME = TimeSpec(column="t")
DAY_MS = 1_483_228_800_000  # 2017-01-01


def text(values):
    return pa.array(values, pa.large_string())


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
    values, wrong = times(text([written]), TIME)
    assert values.to_pylist() == [expected_ms]
    assert not wrong[0]


@pytest.mark.parametrize("written", ["2017-02-30", "2017-13-01", "tomorrow", "01.02.2017", "2017-01-01 25:00", "inf"])
def test_text_that_is_no_time(written):
    values, wrong = times(text([written]), TIME)
    assert values.to_pylist() == [None]
    assert wrong[0]


@pytest.mark.parametrize("blank", ["", "  ", "nan", "NULL", None])
def test_a_blank_time_is_missing_and_not_wrong(blank):
    values, wrong = times(text([blank]), TIME)
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
        values, wrong = times(plain(array), TIME)
        assert (values.to_pylist(), wrong.tolist()) == ([DAY_MS], [False]), array.type
    for array in (pa.array([True]), pa.array([[1]]), pa.array([math.inf]), pa.array([9e21]), pa.array([1e300])):
        values, wrong = times(array, TIME)
        assert (values.to_pylist(), wrong.tolist()) == ([None], [True]), array.type


def test_units_and_formats():
    assert times(pa.array([5]), TimeSpec(column="t", unit="ms"))[0].to_pylist() == [5]
    assert times(pa.array([5]), TimeSpec(column="t", unit="s"))[0].to_pylist() == [5000]
    spec = TimeSpec(column="t", format="%m/%d/%Y %H:%M")
    values, wrong = times(text(["1/2/2017 8:30", "2017-01-02"]), spec)
    assert values.to_pylist() == [DAY_MS + 86_400_000 + 30_600_000, None]
    assert wrong.tolist() == [False, True]


@settings(deadline=None)
@given(st.datetimes(min_value=datetime.datetime(1, 1, 1), max_value=datetime.datetime(9999, 12, 31)))
def test_iso_times_agree_with_datetime(moment):
    expected = (moment - datetime.datetime(1970, 1, 1)) // datetime.timedelta(milliseconds=1)
    assert times(text([moment.isoformat()]), TIME)[0].to_pylist() == [expected]


def test_columns_of_odd_types_are_no_times():
    for array in (pa.array([b"a", None]), pa.array([b"ab", None], pa.binary(2)), pa.array([{"a": 1}, None])):
        assert times(array, TIME)[1].tolist() == [True, False]


@given(st.lists(st.one_of(st.none(), st.text(max_size=12), st.datetimes().map(str)), min_size=1, max_size=8))
@settings(deadline=None)
def test_every_time_is_judged_by_itself(written):
    written = [None if v is None else v.encode("utf-8", "replace").decode() for v in written]
    together, wrong = times(text(written), TIME)
    alone = [times(text([value]), TIME) for value in written]
    assert together.to_pylist() == [value.to_pylist()[0] for value, _ in alone]
    assert wrong.tolist() == [bool(mask[0]) for _, mask in alone]
    assert not (together.is_valid().to_numpy(zero_copy_only=False) & wrong).any()
