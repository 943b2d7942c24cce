from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bfm.events.protocol import Protocol
from bfm.events.windows import WindowOrder, eval_windows
from bfm.randomness import permuted, stream_key
from tests.helpers import history_of, make_shards

TARGETS = ("next_event", "next_basket")
SHAPES = st.tuples(st.integers(1, 70), st.integers(1, 9), st.integers(0, 2**40))


@pytest.fixture(scope="module")
def split_in_three(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("three") / "shards", num_parts=3)


@pytest.fixture(scope="module")
def leave_one_out(tmp_path_factory):
    where = tmp_path_factory.mktemp("loo") / "shards"
    return make_shards(where, clock=False, split="leave_one_out", filter_seen=True)


def epoch_rows(order, epoch):
    """All windows of an epoch, taken one by one."""
    single = WindowOrder(order.shards, order.window, 1, order.seed)
    first = epoch * order.windows_per_epoch
    return [single.groups([first + index]) for index in range(order.windows_per_epoch)]


def same(first, second):
    names = ("item_RL", "target_RL", "segment_RL", "later_RL", "time_RL", "gap_RL")
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in names) and all(
        np.array_equal(first.context[name], second.context[name], equal_nan=True) for name in first.context
    )


@settings(max_examples=25, deadline=None)
@given(SHAPES)
def test_order_is_a_pure_function_of_seed_and_index(toy_shards, split_in_three, shape):
    window, group_windows, seed = shape
    order = WindowOrder(toy_shards, window, group_windows, seed)
    per_epoch = order.windows_per_epoch // group_windows
    indices = [0, 1, 7, per_epoch, per_epoch + 1, 3 * per_epoch]
    forward = [order.groups([index]) for index in indices]
    # Another reading order, another process's object, another partition into shards: the same groups.
    fresh = WindowOrder(toy_shards, window, group_windows, seed)
    elsewhere = WindowOrder(split_in_three, window, group_windows, seed)
    for index, group in reversed(list(zip(indices, forward, strict=True))):
        assert same(fresh.groups([index]), group)
        assert same(elsewhere.groups([index]), group)


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.integers(0, 3))
def test_every_training_event_is_input_once_per_epoch(toy_shards, shape, epoch):
    window, group_windows, seed = shape
    order = WindowOrder(toy_shards, window, group_windows, seed)
    seen, targets = Counter(), Counter()
    for row in epoch_rows(order, epoch):
        filled = row.item_RL >= 0
        seen.update(zip(row.item_RL[filled].tolist(), row.time_RL[filled].tolist(), strict=True))
        targets.update(row.target_RL[row.target_RL >= 0].tolist())
        assert (row.target_RL[~filled] == -1).all()
    expected, expected_targets = Counter(), Counter()
    for user in range(toy_shards.num_users):
        history = history_of(toy_shards, user)
        known = slice(0, history.train_end)
        expected.update(zip(history.item[known].tolist(), history.time[known].tolist(), strict=True))
        expected_targets.update(history.item[1 : history.train_end].tolist())
    assert seen == expected
    assert targets == expected_targets
    assert sum(targets.values()) == order.targets_per_epoch


@pytest.mark.parametrize("window", [3, 13, 200])
def test_positions_hold_what_the_history_holds(split_in_three, window):
    """Brute force over the stream: item, target, bit, gap, context, segments, user by user, windows dense."""
    shards = split_in_three
    order = WindowOrder(shards, window, 4, seed=5)
    rows = order.windows(np.arange(order.windows_per_epoch))
    place = 0
    for user in range(shards.num_users):
        history = history_of(shards, user)
        for position in range(history.train_end):
            row, column = divmod(place, window)
            last = position + 1 == history.train_end
            gap = history.time[position] - history.time[position - 1] if position else 0
            following = history.time[position] if last else history.time[position + 1]
            assert rows.item_RL[row, column] == history.item[position]
            assert rows.time_RL[row, column] == history.time[position]
            assert rows.target_RL[row, column] == (-1 if last else history.item[position + 1])
            assert rows.later_RL[row, column] == (following > history.time[position])
            assert rows.gap_RL[row, column] == np.float32(gap / 1000)
            assert rows.context["channel"][row, column] == history.context["channel"][position]
            # Segments count from 0 in every row and change exactly where the user does.
            before = rows.segment_RL[row, column - 1] if column else -1
            assert rows.segment_RL[row, column] == before + (position == 0 or column == 0)
            place += 1
    assert (rows.item_RL.ravel()[place:] == -1).all()
    assert rows.item_RL.size - place < window


@pytest.mark.parametrize(("window", "power"), [(5, 0.0), (13, 0.5), (200, 1.0)])
def test_a_basket_is_predicted_from_where_the_one_before_it_ended(split_in_three, window, power):
    """Brute force: the query is the last event of the user, inside the window, that is earlier than the target."""
    shards = split_in_three
    order = WindowOrder(shards, window, 4, seed=5, targets="next_basket", basket_power=power)
    rows = order.windows(np.arange(order.windows_per_epoch))
    moved, place = Counter(), 0
    weights = defaultdict(list)
    for user in range(shards.num_users):
        history = history_of(shards, user)
        for position in range(history.train_end):
            row, column = divmod(place, window)
            place += 1
            if position + 1 == history.train_end:
                assert rows.weight_RL[row, column] == 0
                continue
            target_time, begin = history.time[position + 1], max(0, position - column)
            earlier = [p for p in range(begin, position + 1) if history.time[p] < target_time]
            expected = column - (position - earlier[-1]) if earlier else column
            assert rows.query_RL[row, column] == expected
            moved[bool(earlier), expected != column] += 1
            weights[row, user, target_time].append(rows.weight_RL[row, column])
    assert min(moved[True, True], moved[True, False], moved[False, False]) > 10
    # A basket weighs what the part of it that the window holds is worth.
    assert {len(weight) for weight in weights.values()} > {1, 2, 3}
    for weight in weights.values():
        assert weight == pytest.approx([len(weight) ** power / len(weight)] * len(weight))


def test_logs_without_baskets_have_the_same_targets_either_way(leave_one_out):
    first, second = (WindowOrder(leave_one_out, 16, 4, 0, None, targets).groups([1]) for targets in TARGETS)
    assert same(first, second)
    assert np.array_equal(first.query_RL, second.query_RL)
    assert np.array_equal(first.weight_RL, second.weight_RL)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**63), st.data())
def test_the_permutation_is_one_and_needs_no_neighbours(size, seed, data):
    key = stream_key(seed)
    whole = permuted(key, np.arange(size), size)
    assert np.array_equal(np.sort(whole), np.arange(size))
    some = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=8)), np.int64)
    assert np.array_equal(permuted(key, some, size), whole[some])


def test_pairs_of_windows_meet_as_often_as_chance_says():
    """Which windows are neighbours in the order: every pair alike, over many keys."""
    size, keys = 40, 4000
    met = np.zeros((size, size))
    for key in range(keys):
        first, second = permuted(stream_key(key), np.arange(2), size)
        met[first, second] += 1
    others = met[~np.eye(size, dtype=bool)]
    expected = keys / len(others)
    assert np.diag(met).sum() == 0
    # Chi squared over its degrees of freedom.
    assert np.mean((others - expected) ** 2 / expected) == pytest.approx(1.0, abs=0.15)


def test_windows_of_a_group_are_of_unrelated_users(tmp_path):
    """Long histories: a group holds as many users as its windows would, and they share no more than chance."""
    shards = make_shards(tmp_path, users=60, items=300, max_events=200)
    order = WindowOrder(shards, 16, 8, seed=1)
    user_R = np.array([_user_of(shards, order, row) for row in range(order.windows_per_epoch)])
    pairs, same = 0, 0
    for index in range(300):
        chosen = permuted_windows(order, index)
        pairs += len(chosen) * (len(chosen) - 1)
        same += (user_R[chosen][:, None] == user_R[chosen]).sum() - len(chosen)
    share_U = np.bincount(user_R) / len(user_R)
    assert same / pairs == pytest.approx((share_U**2).sum() - 1 / len(user_R), rel=0.15)


def permuted_windows(order, index):
    """Numbers of the windows of a group inside one epoch, found by their first event."""
    every = order.windows(np.arange(order.windows_per_epoch))
    first = {
        (row.tobytes(), time.tobytes()): number
        for number, (row, time) in enumerate(zip(every.item_RL, every.time_RL, strict=True))
    }
    group = order.groups([index])
    return np.array(
        [first[row.tobytes(), time.tobytes()] for row, time in zip(group.item_RL, group.time_RL, strict=True)]
    )


def _user_of(shards, order, row):
    """The user of most of a window's events."""
    position = np.arange(row * order.window, min((row + 1) * order.window, shards.manifest.train_events))
    return np.bincount(np.searchsorted(shards.train_stops, position, side="right")).argmax()


def test_epochs_and_seeds_have_other_orders(toy_shards):
    order = WindowOrder(toy_shards, 16, 2, seed=0)
    first, second = epoch_rows(order, 0)[0], epoch_rows(order, 1)[0]
    other = WindowOrder(toy_shards, 16, 2, seed=1).groups([0])
    assert not np.array_equal(first.item_RL, second.item_RL)
    assert not np.array_equal(first.item_RL[0], other.item_RL[0])


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.integers(0, 500))
def test_the_cursor_is_one_integer(toy_shards, shape, index):
    """Group g is windows g*G .. g*G+G-1 of the endless order, across epochs."""
    window, group_windows, seed = shape
    order = WindowOrder(toy_shards, window, group_windows, seed)
    group, single = order.groups([index]), WindowOrder(toy_shards, window, 1, seed)
    assert group.item_RL.shape == (group_windows, window)
    for row in range(group_windows):
        alone = single.groups([index * group_windows + row])
        assert np.array_equal(group.item_RL[row], alone.item_RL[0])
        assert np.array_equal(group.target_RL[row], alone.target_RL[0])
        assert np.array_equal(group.segment_RL[row], alone.segment_RL[0])


def test_no_target_after_the_split(toy_shards, leave_one_out):
    for shards in (toy_shards, leave_one_out):
        order = WindowOrder(shards, 8, 1, seed=0)
        items = np.concatenate([row.item_RL.ravel() for row in epoch_rows(order, 0)])
        targets = np.concatenate([row.target_RL.ravel() for row in epoch_rows(order, 0)])
        assert max(items.max(), targets.max()) < shards.num_catalogue
        expected = np.concatenate(
            [history_of(shards, user).item[: shards.train_lengths[user]] for user in range(shards.num_users)]
        )
        assert np.array_equal(np.sort(items[items >= 0]), np.sort(expected))


def test_positions_instead_of_times(leave_one_out):
    row = WindowOrder(leave_one_out, 64, 1, seed=0).groups([0])
    inside = (row.segment_RL >= 0) & (row.time_RL > 0)
    assert (row.gap_RL[inside] == 1.0).all()
    assert (row.later_RL == (row.target_RL >= 0)).all()


def test_pads_are_marked_everywhere(tmp_path):
    shards = make_shards(tmp_path, users=9, max_events=9, every_kind=True)
    group = WindowOrder(shards, 50, 2, seed=0).groups([0])
    pad = group.item_RL < 0
    assert pad.any()
    assert (group.segment_RL[pad] == -1).all()
    assert np.isnan(group.context["quantity"][pad]).all()
    assert (group.context["channel"][pad] == 0).all()
    assert not group.later_RL[pad].any()


@pytest.mark.parametrize(("window", "group_windows"), [(0, 1), (8, 0)])
def test_windows_of_no_length_are_refused(toy_shards, window, group_windows):
    with pytest.raises(ValueError, match="at least 1"):
        WindowOrder(toy_shards, window, group_windows, seed=0)


@pytest.mark.parametrize("window", [1, 7, 64])
@pytest.mark.parametrize("part", ["validation", "test"])
def test_eval_windows_hold_each_query_s_context(split_in_three, leave_one_out, part, window):
    for shards in (split_in_three, leave_one_out):
        protocol = Protocol.load(shards)
        queries = protocol.queries(part)
        # Headline queries stand first, basket queries last: take some of both.
        queries = queries[np.r_[10:40, len(queries) - 15 : len(queries)]]
        assert queries.basket.any() == (shards is split_in_three)
        packed = eval_windows(shards, queries, window)
        cells = Counter()
        for query, (row, column) in enumerate(zip(packed.row, packed.column, strict=True)):
            user, position = queries.user[query], queries.position[query]
            history = history_of(shards, user)
            length = min(position + 1, window)
            context = slice(position + 1 - length, position + 1)
            place = (row, slice(column + 1 - length, column + 1))
            cells.update((row, cell) for cell in range(column + 1 - length, column + 1))
            windows = packed.windows
            assert np.array_equal(windows.item_RL[place], history.item[context])
            assert np.array_equal(windows.time_RL[place], history.time[context])
            assert len(set(windows.segment_RL[place].tolist())) == 1
            true_bits = history.time[1 : position + 1] > history.time[:position]
            assert np.array_equal(windows.later_RL[place][:-1], true_bits[position + 1 - length :])
            assert windows.later_RL[row, column] == (not queries.basket[query])
        assert max(cells.values()) == 1
        assert len(cells) == (packed.windows.item_RL >= 0).sum()
        for row in packed.windows.segment_RL:
            # Packed contexts stand one after the other: segments rise from 0, pads come last.
            filled = row[row >= 0]
            assert np.array_equal(np.unique(filled), np.arange(filled.max() + 1))
            assert (np.diff(filled) >= 0).all()
            assert (row[len(filled) :] == -1).all()
        assert (packed.windows.target_RL == -1).all()


def test_packing_wastes_little(tmp_path):
    shards = make_shards(tmp_path, users=200, max_events=90)
    packed = eval_windows(shards, Protocol.load(shards).queries("validation"), 128)
    assert (packed.windows.item_RL >= 0).mean() > 0.85
