"""The objectives of both stages on real groups, with a small stand-in for the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bfm.errors import UserError
from bfm.events.windows import WindowOrder
from bfm.model.batch import make_batch
from bfm.objective.frozen import WholeItems
from bfm.objective.objectives import DrawnObjective, LiveObjective

DIM = 6


class StandIn(torch.nn.Module):
    """Item vectors from a table; a query is a linear map of its last item."""

    def __init__(self, num_items):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(num_items, DIM, generator=generator).double())
        self.weight = torch.nn.Parameter(torch.randn(DIM, DIM, generator=generator).double())
        self.log_scale = torch.nn.Parameter(torch.tensor(1.5).double())

    @property
    def scale(self):
        return self.log_scale.exp()

    def embed_items(self, ids_U):
        return torch.nn.functional.normalize(self.table[ids_U], dim=-1)

    def contextualize(self, batch, v_UD):
        last_TD = v_UD[batch.item_RL.flatten()[batch.target_position_T]]
        return torch.nn.functional.normalize(last_TD @ self.weight, dim=-1)


@pytest.fixture
def world(toy_shards):
    order = WindowOrder(toy_shards, 16, 2, seed=0)
    return toy_shards, [order.group(index) for index in range(4)]


def in_batch_log_pi(shards):
    return torch.from_numpy(np.log(np.linspace(1.0, 0.05, shards.num_catalogue)))


def drawn(shards, model, negatives, *, in_batch=False, exponent=0.5):
    catalogue_ID = model.embed_items(torch.arange(shards.num_items)).detach()
    items = WholeItems(catalogue_ID)
    return DrawnObjective(items, shards.train_counts, negatives, exponent, in_batch, in_batch_log_pi(shards), seed=5)


def objectives(shards, model):
    return [
        LiveObjective(in_batch_log_pi(shards), shards.train_counts, 0, 0.0, 0),
        LiveObjective(in_batch_log_pi(shards), shards.train_counts, 9, 0.5, 0),
        drawn(shards, model, 7),
        drawn(shards, model, 7, in_batch=True),
        drawn(shards, model, 0, in_batch=True),
    ]


def live_batch(groups, indices, objective):
    chosen = [groups[index] for index in indices]
    return make_batch(chosen, group_indices=indices, drawn=[objective.drawn(index) for index in indices])


def value_and_gradient(model, objective, batches):
    model.zero_grad()
    losses = []
    for batch in batches:
        loss = objective(model, batch)
        (loss / len(batches)).backward()
        losses.append(loss.item())
    gradient = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return np.mean(losses), torch.cat([part.flatten() for part in gradient])


@pytest.mark.parametrize("which", range(5))
def test_micro_batches_change_neither_value_nor_gradient(world, which):
    shards, groups = world
    model = StandIn(shards.num_items)
    objective = objectives(shards, model)[which]
    results = []
    for size in (4, 2, 1):
        batches = [live_batch(groups, range(start, start + size), objective) for start in range(0, 4, size)]
        results.append((*value_and_gradient(model, objective, batches), [objective.candidates(b) for b in batches]))
    for value, gradient, counts in results[1:]:
        assert value == pytest.approx(results[0][0], rel=1e-12)
        torch.testing.assert_close(gradient, results[0][1])
        assert [count for part in counts for count in part] == results[0][2][0]


def plain_loss(model, shards, group, candidate_ids, log_pi_V):
    """One group's loss, row by row."""
    losses = []
    table_ID = model.embed_items(torch.arange(shards.num_items))
    for row, column in zip(*np.nonzero(group.target_RL >= 0), strict=True):
        h_D = torch.nn.functional.normalize(table_ID[int(group.item_RL[row, column])] @ model.weight, dim=-1)
        target = int(group.target_RL[row, column])
        others = [item for item in candidate_ids if item != target]
        positive = model.scale * h_D @ table_ID[target]
        negative_K = model.scale * table_ID[others] @ h_D - log_pi_V[others]
        losses.append(torch.logsumexp(torch.cat([positive[None], negative_K]), 0) - positive)
    return torch.stack(losses).mean().item()


def test_in_batch_negatives_are_the_groups_other_distinct_targets(world):
    shards, groups = world
    model = StandIn(shards.num_items)
    log_pi_V = in_batch_log_pi(shards)
    expected = [
        plain_loss(model, shards, group, np.unique(group.target_RL[group.target_RL >= 0]), log_pi_V) for group in groups
    ]
    loss = LiveObjective(log_pi_V, np.ones(len(log_pi_V)), 0, 0.0, 0)(model, make_batch(groups))
    # The mean of the groups' means, not the mean over rows.
    assert loss.item() == pytest.approx(np.mean(expected))


def test_every_item_drawn_is_the_full_softmax(world):
    shards, groups = world
    model = StandIn(shards.num_items)
    expected = plain_loss(model, shards, groups[0], range(shards.num_catalogue), torch.zeros(shards.num_catalogue))
    for objective in (
        drawn(shards, model, shards.num_catalogue),
        LiveObjective(in_batch_log_pi(shards), shards.train_counts, shards.num_catalogue, 0.5, 0),
    ):
        assert objective(model, live_batch(groups, [0], objective)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("num_items", [0, 1])
def test_a_catalogue_without_negatives_is_refused(num_items):
    with pytest.raises(UserError, match="no negative"):
        LiveObjective(torch.zeros(num_items), np.ones(num_items), 0, 0.0, 0)
    with pytest.raises(UserError, match="no negative"):
        DrawnObjective(
            WholeItems(torch.zeros(num_items, 2)), np.ones(num_items), 1, 0.5, False, torch.zeros(num_items), 0
        )


def test_live_draws_join_the_targets_and_are_corrected_by_both(world):
    shards, groups = world
    model = StandIn(shards.num_items)
    pi_batch_V = np.exp(in_batch_log_pi(shards).numpy())
    objective = LiveObjective(in_batch_log_pi(shards), shards.train_counts, 9, 0.0, 4)
    ids = objective.drawn(1)
    assert len(ids) == 9
    assert not np.array_equal(ids, objective.drawn(0))
    union = np.union1d(ids, groups[1].target_RL[groups[1].target_RL >= 0])
    log_pi_V = torch.from_numpy(np.log(1 - (1 - pi_batch_V) * (1 - 9 / shards.num_catalogue)))
    batch = live_batch(groups, [1], objective)
    assert objective.candidates(batch) == [len(union)]
    assert objective(model, batch).item() == pytest.approx(plain_loss(model, shards, groups[1], union, log_pi_V))


def test_a_mixture_joins_draws_and_targets_and_corrects_by_both(world):
    shards, groups = world
    model = StandIn(shards.num_items)
    alone, mixed = drawn(shards, model, 7), drawn(shards, model, 7, in_batch=True)
    targets = set(np.unique(groups[0].target_RL[groups[0].target_RL >= 0]).tolist())
    ids = set(alone._candidate_ids(make_batch(groups[:1]), 0).tolist())
    pi_batch_V = np.linspace(1.0, 0.05, shards.num_catalogue)
    log_pi_V = torch.from_numpy(np.log(1 - (1 - pi_batch_V) * (1 - alone.pi_V)))
    expected = plain_loss(model, shards, groups[0], sorted(ids | targets), log_pi_V)
    assert mixed(model, make_batch(groups[:1])).item() == pytest.approx(expected, rel=1e-6)
    assert mixed.candidates(make_batch(groups[:1])) == [len(ids | targets)]
    assert alone.candidates(make_batch(groups[:2])) == [7, 7]


def test_the_frozen_catalogue_gets_no_gradient_and_draws_follow_the_groups_index(world):
    shards, groups = world
    model = StandIn(shards.num_items)
    objective = drawn(shards, model, 7)
    first = objective(model, make_batch(groups[:1], group_indices=[0]))
    first.backward()
    assert model.table.grad is None
    assert objective(model, make_batch(groups[:1], group_indices=[0])).item() == first.item()
    assert objective(model, make_batch(groups[:1], group_indices=[1])).item() != first.item()


def test_more_negatives_than_items_is_a_users_mistake(world):
    shards, _ = world
    with pytest.raises(UserError, match="negatives"):
        drawn(shards, StandIn(shards.num_items), shards.num_catalogue + 1)


@pytest.mark.parametrize("which", range(5))
def test_evaluation_candidates_are_a_fixed_sample_of_the_proposal(world, which):
    shards, _ = world
    objective = objectives(shards, StandIn(shards.num_items))[which]
    fixed = objective.evaluation_candidates(seed=2)
    np.testing.assert_array_equal(fixed.ids_K, objective.evaluation_candidates(seed=2).ids_K)
    np.testing.assert_allclose(fixed.log_pi_K, objective.log_pi_V[fixed.ids_K], rtol=1e-5, atol=1e-6)
    if which == 2:
        assert len(fixed.ids_K) == 7
