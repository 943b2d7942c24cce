from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from bfm.events.windows import EvalWindows, Windows
from bfm.model.batch import first_columns, make_query_batch
from tests.model.toys import ALL_FIELDS, PLAIN_FIELDS, batch_of, make_windows


@pytest.fixture(scope="module")
def groups() -> list[Windows]:
    return [make_windows(ALL_FIELDS, rows, 16, seed=rows, baskets=True) for rows in (2, 4, 3)]


def test_indices_lead_back_to_the_windows(groups):
    batch = batch_of(groups, [7, 8, 11])
    item_RL = np.concatenate([group.item_RL for group in groups])
    target_RL = np.concatenate([group.target_RL for group in groups])
    valid_RL = item_RL >= 0
    np.testing.assert_array_equal(batch.items_U[batch.item_RL].numpy()[valid_RL], item_RL[valid_RL])
    assert (batch.item_RL.numpy()[~valid_RL] == 0).all()
    query_RL = np.concatenate([group.query_RL for group in groups]) + 16 * np.arange(len(target_RL))[:, None]
    np.testing.assert_array_equal(batch.places.position_Q[batch.query_T], query_RL[target_RL >= 0])
    assert len(np.unique(query_RL[target_RL >= 0])) == len(batch.places.position_Q) < len(batch.query_T)
    np.testing.assert_array_equal(batch.items_U[batch.target_index_T].numpy(), target_RL[target_RL >= 0])
    first_RL = np.concatenate([first_columns(group.segment_RL) for group in groups])
    np.testing.assert_array_equal(batch.first_RL, first_RL)
    np.testing.assert_array_equal(batch.places.first_Q, first_RL.ravel()[batch.places.position_Q])
    for name in ("gap_RL", "time_RL", "later_RL"):
        np.testing.assert_array_equal(getattr(batch, name), np.concatenate([getattr(group, name) for group in groups]))
    assert [(group.index, group.windows) for group in batch.groups] == [(7, 2), (8, 4), (11, 3)]


def test_each_group_has_its_own_items_and_candidates(groups):
    batch = batch_of(groups)
    for number, (group, counts) in enumerate(zip(groups, batch.groups, strict=True)):
        inputs, targets = set(group.item_RL.ravel()) - {-1}, set(group.target_RL.ravel()) - {-1}
        first_item = sum(before.items for before in batch.groups[:number])
        items = batch.items_U[first_item : first_item + counts.items].tolist()
        candidates_K = batch.candidates_of(number)
        rows = batch.targets_of(number)
        assert items == sorted(inputs | targets)
        assert batch.items_U[candidates_K].tolist() == sorted(targets)
        assert counts.candidates == len(targets)
        assert counts.targets == (group.target_RL >= 0).sum()
        assert torch.equal(candidates_K[batch.candidate_T[rows]], batch.target_index_T[rows])
        window_T = batch.window_Q(number)[batch.query_T[rows] - batch.queries_of(number).start]
        assert window_T.tolist() == np.nonzero(group.target_RL >= 0)[0].tolist()


def test_slots_hold_the_queries_of_their_window_once(groups):
    places = batch_of(groups).places
    windows, x_QX = sum(len(group.item_RL) for group in groups), torch.rand(len(places.position_Q), 2)
    spread_RSX = places.spread(x_QX, windows)
    assert torch.equal(places.gather(spread_RSX), x_QX)
    assert torch.equal(places.slot_Q // places.slots, places.position_Q // 16)
    assert len(torch.unique(places.slot_Q)) == len(x_QX)
    assert places.slots == torch.bincount(places.position_Q // 16).max()


def test_copies_are_the_users_events_of_the_target_up_to_its_query():
    groups = [make_windows(ALL_FIELDS, rows, 16, num_items=5, seed=rows, baskets=True) for rows in (2, 3)]
    batch = batch_of(groups)
    pairs = batch.places.pairs
    copies = iter(batch.copy_N.split(batch.copies_T.tolist()))
    for number, group in enumerate(groups):
        for row, column in zip(*np.nonzero(group.target_RL >= 0), strict=True):
            at, found = group.query_RL[row, column], next(copies)
            past = [p for p in range(at + 1) if group.segment_RL[row, p] == group.segment_RL[row, at]]
            same = [p for p in past if group.item_RL[row, p] == group.target_RL[row, column]]
            assert (pairs.position_A[found] % 16).tolist() == same
            position_N = batch.places.position_Q[pairs.query_A[found]]
            assert (position_N == 16 * (row + sum(before.windows for before in batch.groups[:number])) + at).all()
    assert batch.copies_T.max() > 1


def test_a_group_without_targets_or_events_is_empty_not_an_error():
    windows = make_windows(PLAIN_FIELDS, rows=1, length=8)
    empty = np.full_like(windows.item_RL, -1)
    nothing = dataclasses.replace(windows, item_RL=empty, target_RL=empty, segment_RL=empty)
    (counts,) = batch_of([nothing]).groups
    assert counts.items == counts.targets == counts.queries == counts.candidates == counts.attended_pairs == 0
    full, empty = batch_of([windows, nothing]).groups
    assert (full, empty.candidates) == (batch_of([windows]).groups[0], 0)


def test_every_group_needs_an_index(groups):
    with pytest.raises(ValueError, match="broadcast"):
        batch_of(groups, [4])


def test_a_batch_is_sent_as_one_block_and_is_what_it_was(groups):
    batch = batch_of(groups, drawn=[np.array([3, 5]), np.array([], np.int64), np.array([7])])
    batch = dataclasses.replace(batch, frozen=(torch.tensor([1, 2]), torch.zeros(0, dtype=torch.int64)))
    sent, blocks = batch._sent(torch.device("cpu")), set()

    def compare(here, there):
        if torch.is_tensor(here):
            torch.testing.assert_close(here, there, rtol=0, atol=0, equal_nan=True)
            blocks.add(there.untyped_storage().data_ptr())
        elif isinstance(here, (dict, tuple)):
            values = (part.values() if isinstance(part, dict) else part for part in (here, there))
            for pair in zip(*values, strict=True):
                compare(*pair)
        elif dataclasses.is_dataclass(here):
            compare(vars(here), vars(there))
        else:
            assert here == there

    compare(batch, sent)
    assert len(blocks) == 1


def test_query_rows_stand_in_the_order_of_the_queries():
    windows = make_windows(PLAIN_FIELDS, rows=3, length=16)
    row, column = np.array([2, 0, 0, 1]), np.array([5, 15, 3, 0])
    batch = make_query_batch(EvalWindows(windows, row, column))
    assert batch.places.position_Q.tolist() == [37, 15, 3, 16]
    valid_RL = windows.item_RL >= 0
    np.testing.assert_array_equal(batch.items_U[batch.item_RL].numpy()[valid_RL], windows.item_RL[valid_RL])
    assert len(batch.target_index_T) == len(batch.candidates_C) == len(batch.candidate_T) == 0
    (counts,) = batch.groups
    assert (counts.queries, counts.targets, counts.candidates, counts.windows) == (4, 0, 0, 3)


def test_first_columns_of_known_rows():
    segment_RL = np.array([[0, 0, 0, 1, 1, -1], [5, 5, 5, 5, 5, 5]], np.int32)
    assert first_columns(segment_RL).tolist() == [[0, 0, 0, 3, 3, 5], [0] * 6]
