import itertools
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bfm.errors import UserError
from bfm.events import fitting
from bfm.events.clean import Losses
from bfm.events.fields import FittedField
from bfm.events.hashing import hash_column, hash_rows
from bfm.events.items import choose_values, count_items, count_values, item_ids, merge_items


def text(values):
    return pa.array(values, pa.large_string())


def ones(values):
    return np.ones(len(values), np.int64)


class Fit(NamedTuple):
    field: FittedField
    vocabulary: pa.Array | None = None


def encode(values, fit):
    """The encoded array, and what was lost: what -> count."""
    losses = Losses()
    array = fitting.encode(values, *fit, losses)
    return array, {what: count for (_, what), count in losses.items()}


def fitted(values, kind, weights=None, max_length=None):
    weights = ones(values) if weights is None else np.asarray(weights)
    statistics = fitting.measure(values, kind, weights)
    return Fit(*fitting.fit("f", "context", kind, fitting.merge([statistics]), max_length))


# ---------------------------------------------------------------- hashes


@given(st.lists(st.text(max_size=40), max_size=20), st.integers(0, 2**31))
def test_a_hash_depends_on_the_text_alone(values, seed):
    values = [value.encode("utf-8", "replace").decode() for value in values]
    together = hash_column(text(values), seed)
    assert [int(h) for h in together] == [int(hash_column(text([value]), seed)[0]) for value in values]
    assert (hash_column(text(["x", *values]).slice(1), seed) == together).all()
    assert (hash_column(text(values).dictionary_encode(), seed) == together).all()
    assert len(set(together.tolist())) == len(set(values))


def test_hashes_are_fixed_for_ever():
    """A change of these numbers would make every shard set and every hashed field another one."""
    assert hash_column(text(["", "a", "item 17 of the catalogue", None]), 1).tolist() == FIXED


FIXED = [9014103220790814445, 4683418683685793008, 6330020383263801243, 5261602799308482815]


def test_hashes_of_rows_see_every_column():
    lists = pa.array([["a", "b"], ["a"], ["b", "a"], None], pa.large_list(pa.large_string()))
    assert len(set(hash_column(lists).tolist())) == 4
    assert hash_column(lists.slice(2)).tolist() == hash_column(lists)[2:].tolist()
    assert hash_column(pa.array([0.0, -0.0])).tolist()[0] == hash_column(pa.array([-0.0])).tolist()[0]
    columns = [text(["a", "b", "a"]), pa.array([1.0, 1.0, None])]
    assert len(set(hash_rows(columns, 0).tolist())) == 3
    assert hash_rows(columns, 0).tolist() != hash_rows(columns, 1).tolist()
    assert hash_rows(columns, 0).tolist() != hash_rows(columns[::-1], 0).tolist()


# ---------------------------------------------------------------- kinds


def test_categories_by_falling_training_frequency():
    values = text(["b", "b", "a", "c", "a", None, "later"])
    field = fitted(values, "categorical", [1, 1, 1, 1, 1, 1, 0])
    assert field.vocabulary.to_pylist() == ["a", "b", "c"]
    assert (field.field.kind, field.field.rows, field.field.columns) == ("categorical", 5, 1)
    found = encode(values, field)
    assert (found[0].tolist(), found[0].dtype, found[1]) == ([3, 3, 2, 4, 2, 0, 1], np.int32, {})


def test_many_categories_are_hashed():
    values = text([f"v{n}" for n in range(fitting.MAX_VALUES + 1)])
    field = fitted(values, "categorical")
    assert (field.field.kind, field.field.rows, field.field.columns, field.vocabulary) == ("hashed", 65536, 2, None)
    ids = encode(pa.chunked_array([values, text([None])]).combine_chunks(), field)[0]
    assert ids.shape == (len(values) + 1, 2)
    assert ids[-1].tolist() == [0, 0]
    assert 2 <= ids[:-1].min() <= ids.max() < 65536
    # Two hashes together tell nearly all apart, one does not.
    assert len(np.unique(ids, axis=0)) > len(values) - 3
    assert abs(np.corrcoef(ids[:-1].T)[0, 1]) < 0.02
    part = fitting.measure(values.slice(0, 40_000), "categorical", ones(values[:40_000]))
    rest = fitting.measure(values.slice(40_000), "categorical", ones(values[40_000:]))
    assert fitting.fit("f", "item", "categorical", fitting.merge([part, rest]))[0].kind == "hashed"


@pytest.mark.parametrize(
    ("values", "rows"), [(0, 1024), (1, 1024), (1024, 1024), (1025, 2048), (10**6, 1 << 20), (10**7, 1 << 24)]
)
def test_rows_of_a_hashed_table(values, rows):
    assert fitting.id_table_rows(values) == rows


@pytest.mark.parametrize("values", [1000, 65_537, 300_000])
def test_two_hashes_tell_the_items_of_any_catalogue_apart(values):
    rows = fitting.id_table_rows(values)
    keys = text([f"item {n}" for n in range(values)])
    ids = encode(keys, Fit(fitting.hashed_field("item_id", "item", rows)))[0]
    # At most one pair of items is expected to share both rows; seven or more happen once in 10,000 tables.
    assert values - len(np.unique(np.sort(ids, axis=1), axis=0)) < 7
    assert 2 <= ids.min() <= ids.max() < rows
    assert np.bincount(ids.ravel(), minlength=rows)[2:].mean() <= 2.01


def test_numbers_keep_their_raw_value_and_know_their_quantiles():
    rng = np.random.default_rng(0)
    raw = rng.lognormal(1, 1, 20_000)
    values = pa.array(np.concatenate([raw, [np.nan]]), from_pandas=True)
    field = fitted(values, "numeric").field
    squashed = np.log1p(raw)
    expected = np.quantile(squashed, np.arange(1, 32) / 32, method="inverted_cdf")
    np.testing.assert_allclose(field.edges, expected, rtol=2e-4)
    assert np.all(np.diff(field.edges) > 0)
    assert (field.mean, field.std) == (pytest.approx(squashed.mean()), pytest.approx(squashed.std()))
    array = encode(values, Fit(field))[0]
    assert array.dtype == np.float32
    np.testing.assert_allclose(array[:-1], raw, rtol=1e-6)
    assert np.isnan(array[-1])


def test_constant_and_absent_numbers():
    constant = fitted(pa.array([2016.0] * 50), "numeric").field
    assert (constant.std, len(constant.edges)) == (1.0, 1)
    absent = fitted(pa.array([None, None], pa.float64()), "numeric").field
    assert (absent.mean, absent.std, absent.edges) == (0.0, 1.0, ())


def test_text_is_a_bag_of_words():
    values = text(["Café au lait", "AU REVOIR!", "", None, " - ", "unseen"])
    field = fitted(values, "text", [1, 1, 1, 1, 1, 0])
    assert field.vocabulary.to_pylist() == ["au", "café", "lait", "revoir"]
    ids = encode(values, field)[0]
    assert ids.tolist() == [[3, 2, 4], [2, 5, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert (encode(values.dictionary_encode(), field)[0] == ids).all()
    long = fitted(text([" ".join(f"w{n}" for n in range(50))]), "text").field
    assert (long.columns, long.rows) == (32, 52)


def test_lists_are_padded():
    values = pa.array([["b", "a"], ["b"], None, ["new"] * 20], pa.large_list(pa.large_string()))
    field = fitted(values, "list", [1, 1, 1, 0])
    assert (field.field.rows, field.field.columns) == (4, 2)
    found = encode(values, field)
    assert found[0].tolist() == [[2, 3], [2, 0], [0, 0], [1, 1]]
    assert found[1] == {"values": 3, "cut": 1, "lost": 18}


@settings(deadline=None)
@given(st.lists(st.none() | st.lists(st.sampled_from("abcde"), max_size=8), min_size=1, max_size=20), st.integers(1, 9))
def test_what_a_bag_loses_is_counted(bags, max_length):
    """A bag is its first `max_length` elements, and kept and lost ones are all there were; as words of a text too."""
    lists = pa.array(bags, pa.large_list(pa.large_string()))
    texts = text([bag if bag is None else " ".join(bag) for bag in bags])
    ids = {}
    for kind, values in (("list", lists), ("text", texts), ("text", texts.dictionary_encode())):
        field = fitted(values, kind, max_length=max_length)
        found = encode(values, field)
        names = [None, None, *field.vocabulary.to_pylist()]
        kept = [[names[place] for place in row if place] for row in found[0].tolist()]
        assert kept == [(bag or [])[:max_length] for bag in bags]
        lengths = [len(bag or []) for bag in bags]
        over = [length - max_length for length in lengths if length > max_length]
        assert found[1] == dict(values=sum(length > 0 for length in lengths), cut=len(over), lost=sum(over))
        assert found[0].shape[1] == max(1, min(max_length, max(lengths)))
        ids.setdefault(kind, found[0].tolist())
        assert found[0].tolist() == ids[kind]


def test_vectors_have_the_most_frequent_length():
    values = pa.array([[1.0, 2.0], [3.0, 4.0], [5.0], None], pa.large_list(pa.float32()))
    field = fitted(values, "vector")
    assert field.field.columns == 2
    found = encode(values, field)
    assert (found[0].tolist(), found[1]) == ([[1, 2], [3, 4], [0, 0], [0, 0]], {"another length": 1})
    with pytest.raises(UserError, match="no vector"):
        fitted(pa.array([None], pa.large_list(pa.float32())), "vector")


def test_times_stay_milliseconds():
    values = pa.array([5, None], pa.int64())
    found = encode(values, fitted(values, "time"))
    assert (found[0].tolist(), found[0].dtype, found[1]) == ([5, 0], np.int64, {"missing, written as the epoch": 1})


@pytest.mark.parametrize("kind", ["categorical", "numeric", "text", "list", "vector"])
def test_merged_parts_fit_like_the_whole(kind):
    rng = np.random.default_rng(1)
    num = 300
    columns = {
        "categorical": text(rng.integers(0, 40, num).astype(str)),
        "numeric": pa.array(rng.integers(-20, 20, num).astype(np.float64)),
        "text": text([" ".join(rng.choice(["a", "b", "c"], 3)) for _ in range(num)]),
        "list": pa.array([list(rng.choice(["a", "b", "c"], 2)) for _ in range(num)], pa.large_list(pa.large_string())),
        "vector": pa.array([[1.0, 2.0]] * num, pa.large_list(pa.float32())),
    }
    values, weights = columns[kind], rng.integers(0, 3, num)
    whole = Fit(*fitting.fit("f", "item", kind, fitting.measure(values, kind, weights)))
    spans = itertools.pairwise([0, 100, 101, num])
    parts = [fitting.measure(values.slice(a, b - a), kind, weights[a:b]) for a, b in spans]
    merged = Fit(*fitting.fit("f", "item", kind, fitting.merge(parts)))
    assert merged.vocabulary == whole.vocabulary
    assert merged.field.edges == whole.field.edges
    assert (merged.field.rows, merged.field.columns) == (whole.field.rows, whole.field.columns)
    assert merged.field.mean == pytest.approx(whole.field.mean)


# ---------------------------------------------------------------- items


def _log(seed, num=400):
    """Events whose item field changes now and then; the last quarter of the times is after the split."""
    rng = np.random.default_rng(seed)
    time = rng.integers(0, 100, num)
    item = np.array([f"i{n}" for n in np.minimum(rng.geometric(0.1, num), 30)])
    value = np.array([f"v{n}" for n in rng.integers(0, 3, num)])
    known = rng.random(num) < 0.8
    return item, value, known, time, rng.permutation(num).astype(np.uint64), time < 75


def _partial(log, rows):
    item, value, known, time, row_hash, train = (column[rows] for column in log)
    columns = {"train_count": train.astype(np.int64), "first_time": time, "first_hash": row_hash}
    events = pa.table({"item": text(item).dictionary_encode(), **columns})
    values = pa.array(value, pa.large_string(), mask=~known).dictionary_encode()
    return count_items(events), count_values(events.append_column("value", values))


@pytest.mark.parametrize("seed", range(4))
def test_items_against_a_plain_count(seed):
    """Ids, counts and values from partials in any order equal those of a loop over all events."""
    log = _log(seed)
    rng = np.random.default_rng(seed)
    parts = [_partial(log, np.flatnonzero(where)) for where in np.eye(5, dtype=bool)[:, rng.integers(0, 5, 400)]]
    order = rng.permutation(len(parts))
    items = merge_items([parts[n][0] for n in order])
    texts, counted = choose_values([parts[n][1] for n in order], items)

    counts, first, seen, late = {}, {}, {}, {}
    for item, value, known, time, row_hash, train in zip(*log, strict=True):
        counts[item] = counts.get(item, 0) + int(train)
        first[item] = min(first.get(item, 10**9), time)
        if known and train:
            seen.setdefault(item, {}).setdefault(value, 0)
            seen[item][value] += 1
        if known:
            late[item] = min(late.get(item, (10**9, 0, "")), (time, row_hash, value))
    ids = sorted(counts, key=lambda item: (-counts[item], first[item] if not counts[item] else 0, item))
    chosen = [
        min(seen[item], key=lambda value: (-seen[item][value], value)) if seen.get(item)
        else late[item][2] if not counts[item] and item in late else None
        for item in ids
    ]  # fmt: skip
    conflicts = sum(sum(found.values()) - max(found.values()) for found in seen.values())
    assert items.keys.to_pylist() == ids
    assert items.train_count.tolist() == [counts[item] for item in ids]
    assert items.first_time.tolist() == [first[item] for item in ids]
    assert items.catalogue == sum(count > 0 for count in counts.values())
    assert texts.to_pylist() == chosen
    assert counted == conflicts
    assert item_ids(text(["i1", ids[-1]]), items.keys).tolist() == [ids.index("i1"), len(ids) - 1]
