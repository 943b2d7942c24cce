import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bfm.errors import UserError
from bfm.events import histogram as histogram_module
from bfm.events.histogram import Histogram, from_ordered_bits, ordered_bits
from bfm.events.schema import SplitSpec
from bfm.events.split import Split, time_split

_TIMES = st.lists(st.integers(-(10**13), 10**13), min_size=1, max_size=60)


@given(_TIMES, st.integers(0, 2**32), st.integers(1, 6), st.integers(2, 9))
def test_merging_does_not_depend_on_the_parts(values, seed, parts, max_bins):
    """Any division of the values, merged in any order, gives the histogram of all of them."""
    rng = np.random.default_rng(seed)
    patch = pytest.MonkeyPatch()
    patch.setattr(histogram_module, "MAX_BINS", max_bins)
    array = np.array(values)
    whole = Histogram.of(array)
    where = rng.integers(0, parts, len(array))
    merged = Histogram.of(np.zeros(0))
    for part in rng.permutation(parts):
        merged = merged.merged(Histogram.of(array[where == part]))
    patch.undo()
    assert merged.shift == whole.shift
    assert merged.bins.tolist() == whole.bins.tolist()
    assert merged.counts.tolist() == whole.counts.tolist()
    assert len(whole.bins) <= max_bins
    assert whole.total == len(values)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=30))
def test_ordered_bits_sort_like_the_floats(values):
    array = np.array(values, np.float32)
    bits = ordered_bits(array)
    assert (np.sign(np.subtract.outer(bits, bits)) == np.sign(_differences(array))).all()
    assert (from_ordered_bits(bits) == array).all()


def _differences(array):
    return np.greater.outer(array, array).astype(int) - np.less.outer(array, array).astype(int)


def test_quantiles_are_exact_for_few_values():
    histogram = Histogram.of(np.array([5, 5, 5, 7]), np.array([1, 1, 1, 1]))
    assert histogram.quantiles(np.array([0.5, 0.75, 0.76, 0.99])).tolist() == [5, 5, 7, 7]


def test_shares_of_events_give_the_boundaries():
    split = time_split(SplitSpec(), Histogram.of(np.arange(1000)))
    assert split == Split(800, 900)
    split = time_split(SplitSpec(valid=0.2, test=0.3), Histogram.of(np.arange(1000)))
    assert split == Split(500, 700)
    # A large tie is never cut.
    split = time_split(SplitSpec(), Histogram.of(np.array([1] * 70 + [2] * 15 + [3] * 15)))
    assert split == Split(2, 3)


def test_dates_are_utc():
    times = Histogram.of(np.array([0, 1_483_228_799_999, 1_483_228_800_000, 1_485_907_200_000]))
    split = time_split(SplitSpec(valid_from="2017-01-01", test_from="2017-02-01"), times)
    assert split == Split(1_483_228_800_000, 1_485_907_200_000)


@pytest.mark.parametrize(
    ("spec", "times", "expected"),
    [
        (SplitSpec(), [5, 5, 5], "fewer than three distinct times"),
        (SplitSpec(), [1, 2], "fewer than three distinct times"),
        (SplitSpec(valid_from="1970-01-01", test_from="1970-01-02"), [0, 10**8], "training part has no events"),
        (SplitSpec(valid_from="1970-01-03", test_from="1970-01-02"), [0, 10**8], "would be empty"),
        (SplitSpec(valid_from="1980-01-01", test_from="1980-01-02"), [0, 10**8], "validation part has no events"),
        (SplitSpec(valid_from="1970-01-02", test_from="1980-01-02"), [0, 10**8], "test part has no events"),
        (SplitSpec(valid_from="soon", test_from="later"), [0, 10**8], "'soon' is no date"),
    ],
)
def test_impossible_splits(spec, times, expected):
    with pytest.raises(UserError, match=expected):
        time_split(spec, Histogram.of(np.array(times)))


def test_ends_of_users():
    time = np.array([1, 5, 8, 9, 2, 3, 7])
    offsets = np.array([0, 4, 4, 6, 7])
    train, valid = Split(5, 9).ends(time, offsets)
    assert (train.tolist(), valid.tolist()) == ([1, 0, 2, 0], [3, 0, 2, 1])
    train, valid = Split().ends(time, offsets)
    assert (train.tolist(), valid.tolist()) == ([2, 0, 2, 1], [3, 0, 2, 1])
