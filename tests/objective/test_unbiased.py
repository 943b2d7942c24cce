"""Expectations over every group that a row's window can be in, enumerated: the candidates estimate without bias."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from bfm.events.statistics import inclusion_elsewhere, target_windows
from bfm.events.windows import WindowOrder
from bfm.objective.objective import own_window_certain
from bfm.objective.softmax import log_sum
from tests.helpers import make_shards
from tests.model.toys import batch_of
from tests.objective.cases import unit

LENGTH, SCALE = 40, torch.tensor(4.0, dtype=torch.float64)


class World:
    """A stream of few windows; `groups` are all that hold a window, which stands first."""

    def __init__(self, shards, group_windows):
        self.order = WindowOrder(shards, LENGTH, group_windows, seed=0)
        self.num_windows, self.group_windows = self.order.windows_per_epoch, group_windows
        self.count_V = target_windows(shards, LENGTH)
        self.log_pi_V = torch.from_numpy(np.log(inclusion_elsewhere(shards, LENGTH, group_windows)))

    def groups(self, window):
        others = [other for other in range(self.num_windows) if other != window]
        for chosen in itertools.combinations(others, self.group_windows - 1):
            batch = batch_of([self.order.windows(np.array([window, *chosen]))])
            log_pi_K = self.log_pi_V[batch.items_U[batch.candidates_C]]
            window_T = batch.window_Q(0)[batch.query_T]
            yield batch, own_window_certain(log_pi_K, window_T, batch.candidate_T, self.group_windows)


@pytest.fixture(scope="module", params=[2, 3])
def world(request, tmp_path_factory):
    shards = make_shards(tmp_path_factory.mktemp("few") / "toy", users=30, items=60, max_events=30)
    return World(shards, request.param)


def test_the_toy_has_items_of_one_window_and_of_most(world):
    assert 6 <= world.num_windows <= 12
    assert {0, 1} < set(world.count_V.tolist())
    assert world.count_V.max() > world.num_windows / 2


def test_every_target_of_the_stream_is_expected_once(world):
    """E[1{in} / pi] = 1, whether the query's own window holds the item or not."""
    for window in range(world.num_windows):
        seen_NV = []
        for batch, log_pi_GK in world.groups(window):
            seen_V = torch.zeros(len(world.count_V), dtype=torch.float64)
            seen_V[batch.items_U[batch.candidates_C]] = torch.exp(-log_pi_GK[0])
            seen_NV.append(seen_V)
        expected_V = torch.from_numpy((world.count_V > 0).astype(float))
        torch.testing.assert_close(torch.stack(seen_NV).mean(0), expected_V, rtol=0, atol=1e-12)


def sum_and_gradients(q_QD, table_VD, ids_K, log_pi_GK, window_Q):
    """sum_Q of exp(score) / pi over the candidates; the gradients of its total in q and the table."""
    leaves = [q_QD.clone().requires_grad_(), table_VD.clone().requires_grad_()]
    sum_Q = log_sum(*leaves, ids_K, log_pi_GK, window_Q=window_Q).exp()
    return sum_Q.detach(), *torch.autograd.grad(sum_Q.sum(), leaves)


def test_the_sum_over_the_candidates_and_its_gradients_are_expected_to_be_those_over_all_targets(world):
    table_VD = unit(len(world.count_V), 5, torch.Generator().manual_seed(0))
    every_K = torch.from_numpy(np.flatnonzero(world.count_V))
    for window in range(world.num_windows):
        sampled = []
        for batch, log_pi_GK in world.groups(window):
            window_Q = batch.window_Q(0)[batch.window_Q(0) == 0]
            q_QD = SCALE * unit(len(window_Q), 5, torch.Generator().manual_seed(window))
            ids_K = batch.items_U[batch.candidates_C]
            sampled.append(sum_and_gradients(q_QD, table_VD, ids_K, log_pi_GK, window_Q))
        full = sum_and_gradients(q_QD, table_VD, every_K, torch.zeros(len(every_K)), None)
        means = tuple(torch.stack(part).mean(0) for part in zip(*sampled, strict=True))
        torch.testing.assert_close(means, full, rtol=1e-11, atol=1e-11)


def test_with_one_pi_for_all_rows_the_same_check_fails(world):
    """The chance that any window of a group brings an item is not the chance given what the row's window holds."""
    absent_V = np.ones(len(world.count_V))
    for draw in range(world.group_windows):
        absent_V *= 1 - np.minimum(1, world.count_V / (world.num_windows - draw))
    rare = int(np.flatnonzero(world.count_V == 1)[0])
    window = next(w for w in range(world.num_windows) if rare in world.order.windows(np.array([w])).target_RL)
    seen = [rare in batch.items_U[batch.candidates_C] for batch, _ in world.groups(window)]
    assert np.mean(seen) / (1 - absent_V[rare]) > 2
