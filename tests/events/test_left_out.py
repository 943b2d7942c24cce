"""What counted neighbours say of training events: counted again by plain loops, without the target's own event."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from bfm.events import neighbours as module
from bfm.events.neighbours import BROAD, LAST_EVENTS, REACH, SHARP, Neighbours, count_neighbours
from bfm.events.protocol import Protocol
from bfm.events.windows import WindowOrder, eval_windows
from tests.helpers import history_of, make_shards

WINDOW = 24


@pytest.fixture
def shards(tmp_path):
    """Few items: histories repeat them, and pairs are often seen once."""
    return make_shards(tmp_path / "toy", users=12, items=20, num_parts=2, seed=3)


def plain_pairs(histories, counting, users):
    """(user, earlier position, later position, u, v, what it counts) of all counted pairs."""
    pairs = []
    for user in range(users):
        items = histories[user]
        for first in range(len(items)):
            for second in range(first + 1, min(first + REACH + 1, len(items))):
                near = counting.lag_decay ** (second - first - 1)
                pairs.append((user, first, second, items[first], items[second], near))
                pairs.append((user, first, second, items[second], items[first], near * counting.backward))
    return pairs


def plain_shares(pairs, n_V, counting, user, position):
    """{u: {v: p(v | u)}} without the event at this position of the user."""
    n_V = n_V.astype(float)
    counts = defaultdict(lambda: defaultdict(float))
    for of_user, first, second, u, v, near in pairs:
        if of_user != user or position not in (first, second):
            counts[u][v] += near
    weights = {u: {v: count / n_V[v] ** counting.damping for v, count in row.items()} for u, row in counts.items()}
    return {u: {v: weight / sum(row.values()) for v, weight in row.items()} for u, row in weights.items()}


@pytest.mark.parametrize("counting", [BROAD, SHARP])
@pytest.mark.parametrize(("all_users", "targets"), [(True, "next_event"), (False, "next_event"), (True, "next_basket")])
def test_shares_are_those_of_a_count_without_the_targets_event(shards, monkeypatch, counting, all_users, targets):
    monkeypatch.setattr(module, "NEIGHBOURS", 1000)
    if not all_users:
        monkeypatch.setattr(module, "MOST_EVENTS", int(shards.train_stops[7]))
    histories = [history_of(shards, user).item[: int(shards.train_lengths[user])].tolist() for user in range(12)]
    neighbours = count_neighbours(shards, [counting])[0]
    assert neighbours.users == (12 if all_users else 8)
    order = WindowOrder(shards, WINDOW, 2, 0, neighbours, targets)
    pairs = plain_pairs(histories, counting, neighbours.users)
    windows = order.windows(np.arange(order.windows_per_epoch))
    events = [(user, position) for user, items in enumerate(histories) for position in range(len(items))]
    seen = {"alone": 0, "repeat": 0}
    for place, (user, position) in enumerate(events):
        row, column = divmod(place, WINDOW)
        target = windows.target_RL[row, column]
        if target < 0 or place % 3:
            continue
        n_V = shards.train_counts.copy()
        n_V[target] -= user < neighbours.users
        # An item that only this event has keeps no pair, whatever its count.
        shares = plain_shares(pairs, np.maximum(n_V, 1), counting, user, position + 1)
        query = windows.query_RL[row, column]
        for age in range(LAST_EVENTS):
            found = windows.counted.item_RLM[row, column, age]
            share = windows.counted.share_RLM[row, column, age]
            last = position - (column - query) - age
            if last < max(0, position - column) or histories[user][last] not in shares:
                assert (found, share) == (-1, 0)
                continue
            item = histories[user][last]
            assert found == item
            assert share == pytest.approx(shares[item].get(target, 0.0), rel=1e-4, abs=1e-7)
            seen["repeat"] += item == target
            if neighbours.shares(np.array([item]), np.array([target]))[0] > 0 and target not in shares[item]:
                # Only this event was counted for the pair.
                assert share == 0.0
                seen["alone"] += 1
    assert min(seen.values()) > 5


def test_a_pair_that_would_not_be_listed_without_its_event_has_no_share(shards, monkeypatch):
    monkeypatch.setattr(module, "NEIGHBOURS", 3)
    neighbours = count_neighbours(shards, [BROAD])[0]
    windows = WindowOrder(shards, WINDOW, 2, 0, neighbours).groups([0])
    share_RLM, item_RLM = windows.counted.share_RLM, windows.counted.item_RLM
    whole_RLM = np.where(item_RLM >= 0, neighbours.shares(item_RLM, windows.target_RL[..., None]), 0.0)
    assert ((share_RLM == 0) & (whole_RLM > 0)).any()
    assert (share_RLM[whole_RLM == 0] == 0).all()
    assert (share_RLM <= 1).all()


def test_queries_know_the_last_events_of_their_own_user_that_have_neighbours(shards):
    neighbours = count_neighbours(shards, [SHARP])[0]
    table = Protocol.load(shards).queries("test")
    contexts = eval_windows(shards, table, WINDOW, neighbours)
    for query in range(len(table)):
        history = history_of(shards, int(table.user[query])).item[: int(table.position[query]) + 1][-WINDOW:]
        expected = [item if item < len(neighbours.lists) and len(neighbours.lists[item]) else -1 for item in history]
        expected = (expected[::-1] + [-1] * LAST_EVENTS)[:LAST_EVENTS]
        found = contexts.windows.counted.item_RLM[contexts.row[query], contexts.column[query]]
        assert found.tolist() == expected
    assert (contexts.windows.counted.share_RLM == 0).all()


def test_shares_sum_to_one_and_survive_as_bytes(shards):
    neighbours = count_neighbours(shards, [BROAD])[0]
    again = Neighbours.from_bytes(neighbours.to_bytes())
    assert again.counting == BROAD
    assert again.users == neighbours.users
    num_items = shards.num_catalogue
    share_VV = neighbours.shares(np.arange(num_items)[:, None], np.arange(num_items)[None])
    np.testing.assert_array_equal(share_VV, again.shares(np.arange(num_items)[:, None], np.arange(num_items)[None]))
    has_V = neighbours.known(np.arange(num_items)) >= 0
    np.testing.assert_allclose(share_VV.sum(1), has_V, rtol=1e-5)
    assert neighbours.known(np.array([-1, num_items])).tolist() == [-1, -1]
