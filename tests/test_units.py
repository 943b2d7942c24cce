import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bfm.errors import UserError
from bfm.units import aligned, format_count, format_flops, format_seconds, parse_count, parse_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e17", 1e17),
        ("1.0e+17", 1e17),
        ("64k", 64e3),
        ("2M", 2e6),
        ("1.5G", 1.5e9),
        ("3e19 FLOPs", 3e19),
        ("1_000", 1e3),
        ("8.2T", 8.2e12),
        ("4.1e3M", 4.1e9),
    ],
)
def test_written_numbers_are_read(text, number):
    assert parse_number(text) == number


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_float_survives_as_text(number):
    assert parse_number(repr(number)) == number
    assert parse_number(number) == number


@given(st.text(max_size=12))
def test_any_text_is_a_number_or_a_named_error(text):
    try:
        assert math.isfinite(parse_number(text, file="space.yaml", key="budget.total_flops"))
    except UserError as error:
        assert str(error).startswith("space.yaml: budget.total_flops: ")


@pytest.mark.parametrize("value", [True, None, [], "nan", "inf", float("nan"), float("inf"), "12:30", "1e999"])
def test_not_numbers_are_refused(value):
    with pytest.raises(UserError):
        parse_number(value, key="budget.total_flops")


def test_counts_refuse_fractions():
    assert parse_count("1e5") == 100_000
    for tenth in range(1, 100):
        for suffix, power in (("k", 3), ("M", 6), ("G", 9), ("T", 12), ("P", 15)):
            assert parse_count(f"{tenth / 10}{suffix}") == tenth * 10 ** (power - 1)
    with pytest.raises(UserError, match="whole"):
        parse_count("1.5")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (format_count(1_234_567), "1.23M"),
        (format_count(999), "999"),
        (format_count(999.7), "1k"),
        (format_count(999_999), "1M"),
        (format_count(-999_999_999), "-1B"),
        (format_flops(1.8e11), "1.8e11"),
        (format_flops(0), "0"),
        (format_seconds(75), "1m15s"),
        (format_seconds(7_260), "2h01m"),
        (format_seconds(59.7), "1m00s"),
        (format_seconds(9.97), "10s"),
        (format_seconds(86_399), "23h59m"),
        (format_seconds(86_399.8), "1d00h"),
        (format_seconds(11 * 86_400 + 3 * 3600), "11d03h"),
        (format_seconds(2 * 365.25 * 86_400), "2 years"),
        (format_seconds(17_195_979 * 3600.0), "1.96k years"),
        (format_seconds(math.inf), "?"),
    ],
)
def test_numbers_are_written_for_people(written, expected):
    assert written == expected


def test_columns_are_as_wide_as_their_widest_cell():
    rows = [("rung", "C", "note"), ("10", "1.5e9", "")]
    assert aligned(rows) == ["rung      C  note", "  10  1.5e9"]
    assert aligned(rows, left=1) == ["rung      C  note", "10    1.5e9"]
    with pytest.raises(ValueError, match="zip"):
        aligned([*rows, ("11",)])
