"""The objective of both stages on real groups, with a small stand-in for the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bfm.errors import UserError
from bfm.events.statistics import inclusion_elsewhere
from bfm.events.windows import WindowOrder
from bfm.model.mixture import Queries, mixture_loss
from bfm.objective import objective as objective_module
from bfm.objective.frozen import WholeItems
from bfm.objective.objective import Objective
from bfm.objective.sampling import drawn_inclusion, group_rng
from bfm.objective.softmax import log_sum
from tests.helpers import make_shards
from tests.model.toys import ALL_FIELDS, batch_of, join, make_model, make_windows, perturb

DIM = 6


class StandIn(torch.nn.Module):
    """Item vectors from a table; query and gates are linear maps of the last item.

    The pointer, where there is one, weighs the user's events by their vectors.
    """

    def __init__(self, num_items, pointer=True):
        super().__init__()
        self.pointer = pointer
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(num_items, DIM, generator=generator).double())
        self.weight = torch.nn.Parameter(torch.randn(DIM, DIM, generator=generator).double())
        self.gate = torch.nn.Parameter(torch.randn(DIM, 2, generator=generator).double())
        self.log_scale = torch.nn.Parameter(torch.tensor(1.5).double())

    @property
    def scale(self):
        return self.log_scale.exp()

    def embed_items(self, ids_U):
        return torch.nn.functional.normalize(self.table[ids_U], dim=-1)

    def contextualize(self, batch, v_UD):
        v_UD = v_UD.to(self.weight.dtype)
        last_QD = v_UD[batch.places.take(batch.item_RL)]
        h_QD = torch.nn.functional.normalize(last_QD @ self.weight, dim=-1)
        if not self.pointer:
            return Queries(h_QD, h_QD.new_zeros(len(batch.query_T), 1), None)
        pairs = batch.places.pairs
        score_A = (v_UD[batch.item_RL.flatten()[pairs.position_A]] * last_QD[pairs.query_A]).sum(-1)
        log_gate_TX1 = (last_QD @ self.gate).log_softmax(-1)[batch.query_T]
        return Queries(h_QD, log_gate_TX1, pairs.softmax(score_A))


@pytest.fixture(params=["next_basket", "next_event"])
def world(toy_shards, request):
    order = WindowOrder(toy_shards, 16, 2, seed=0, targets=request.param)
    return toy_shards, [order.groups([index]) for index in range(4)]


def in_batch_log_pi(shards):
    return torch.from_numpy(np.log(np.linspace(1.0, 0.05, shards.num_catalogue)))


def live(shards, negatives=0, exponent=0.5, seed=0):
    return Objective(in_batch_log_pi(shards), shards.train_counts, negatives, exponent, seed)


def frozen(shards, model, negatives, *, exponent=0.5, method="auto"):
    items = WholeItems(model.embed_items(torch.arange(shards.num_items)).detach(), method)
    return Objective(in_batch_log_pi(shards), shards.train_counts, negatives, exponent, 5, items=items)


def objectives(shards, model):
    return [live(shards), live(shards, 9), frozen(shards, model, 7), frozen(shards, model, 0)]


def drawn_batch(groups, indices, objective):
    return objective.batch(join([groups[index] for index in indices]), indices)


def loss_of(objective, model, groups, indices=(0,)):
    return objective(model, drawn_batch(groups, indices, objective))[0]


def candidates(batch):
    """Numbers of live and frozen candidates, group by group."""
    return [
        group.candidates + sum(map(len, batch.frozen[place : place + 1])) for place, group in enumerate(batch.groups)
    ]


def value_and_gradient(model, objective, batches):
    model.zero_grad()
    losses = []
    for batch in batches:
        loss, _ = objective(model, batch)
        (loss / len(batches)).backward()
        losses.append(loss.item())
    gradient = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return np.mean(losses), torch.cat([part.flatten() for part in gradient])


@pytest.mark.parametrize("pointer", [True, False])
@pytest.mark.parametrize("which", range(4))
def test_micro_batches_change_neither_value_nor_gradient(world, which, pointer):
    shards, groups = world
    model = StandIn(shards.num_items, pointer)
    objective = objectives(shards, model)[which]
    results = []
    for size in (4, 2, 1):
        batches = [drawn_batch(groups, range(start, start + size), objective) for start in range(0, 4, size)]
        results.append((*value_and_gradient(model, objective, batches), [candidates(batch) for batch in batches]))
    for value, gradient, counts in results[1:]:
        assert value == pytest.approx(results[0][0], rel=1e-12)
        torch.testing.assert_close(gradient, results[0][1])
        assert [count for part in counts for count in part] == results[0][2][0]


@pytest.mark.parametrize("which", range(4))
def test_losses_are_summed_by_whether_the_target_is_later(world, which, monkeypatch):
    shards, groups = world
    model = StandIn(shards.num_items)
    objective = objectives(shards, model)[which]
    batch = drawn_batch(groups, range(4), objective)
    told = []
    monkeypatch.setattr(objective_module, "mixture_loss", lambda *given: told.append(given) or mixture_loss(*given))
    _, sums_2X2 = objective(model, batch)
    loss_T, gate_TX1 = mixture_loss(*told[0]).tolist(), told[0][1].exp().tolist()
    expected = np.zeros((2, 4))
    place_T = batch.places.position_Q[batch.query_T].tolist()
    for place, weight, loss, gates in zip(place_T, batch.weight_T.tolist(), loss_T, gate_TX1, strict=True):
        expected[int(batch.later_RL.flatten()[place])] += weight * np.array([loss, 1.0, *gates])
    assert expected[:, 1].min() > 1, "targets of both kinds"
    np.testing.assert_allclose(sums_2X2.numpy(), expected)


@pytest.mark.parametrize("scale", [20.0, 60.0, 100.0])
def test_in_bfloat16_the_loss_is_that_of_single_precision_by_any_method(world, scale, monkeypatch):
    """Whatever is multiplied has been rounded once, so targets cancel against their own terms of the sums."""
    shards, groups = world
    model = StandIn(shards.num_items).float()
    model.log_scale.data.fill_(np.log(scale))
    seen, losses = [], []
    monkeypatch.setattr(
        objective_module,
        "log_sum",
        lambda q_QD, v_UD, *more, **named: seen.append((q_QD, v_UD)) or log_sum(q_QD, v_UD, *more, **named),
    )
    with torch.autocast("cpu", torch.bfloat16):
        items = model.embed_items(torch.arange(shards.num_items)).detach().bfloat16()
        # The maps of the model are no subject here.
        model.contextualize = torch.autocast("cpu", enabled=False)(model.contextualize)
        for method in ("reference", "two_pass"):
            for frozen_method in ("reference", "two_pass", "one_pass"):
                objective = frozen(shards, model, 7, method=frozen_method)
                objective.items, objective.method = WholeItems(items, frozen_method), method
                losses.append(float(loss_of(objective, model, groups, range(4)).detach()))
    for q_QD, v_UD in seen:
        assert torch.equal(q_QD, q_QD.bfloat16().float())
        assert torch.equal(v_UD, v_UD.bfloat16().to(v_UD.dtype))
    double = StandIn(shards.num_items)
    double.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    exact = frozen(shards, double, 7)
    exact.items = WholeItems(items.double(), "reference")
    monkeypatch.setattr(objective_module, "as_multiplied", lambda x_ND: x_ND.bfloat16().double())
    single = float(loss_of(exact, double, groups, range(4)).detach())
    assert max(losses) - min(losses) < 1e-4
    assert single == pytest.approx(losses[0], abs=2e-3)


def plain_loss(model, group, candidate_ids, pi_V):
    """One group's loss, target by target: probabilities of the mixture, the targets of its own window with pi = 1."""
    losses, weights = [], []
    table_ID = model.embed_items(torch.arange(len(model.table)))
    for row, column in zip(*np.nonzero(group.target_RL >= 0), strict=True):
        at, target = group.query_RL[row, column], int(group.target_RL[row, column])
        last_D = table_ID[int(group.item_RL[row, at])]
        score_I = model.scale * table_ID @ torch.nn.functional.normalize(last_D @ model.weight, dim=-1)
        own = set(group.target_RL[row].tolist())
        total = sum(score_I[item].exp() / (1.0 if item in own else float(pi_V[item])) for item in candidate_ids)
        probability = score_I[target].exp() / total
        if model.pointer:
            seen = group.item_RL[row, : at + 1][group.segment_RL[row, : at + 1] == group.segment_RL[row, at]]
            copied = (table_ID[seen] @ last_D).softmax(0)[torch.from_numpy(seen == target)].sum()
            probability = torch.stack([probability, copied]) @ (last_D @ model.gate).softmax(0)
        losses.append(-probability.log())
        weights.append(float(group.weight_RL[row, column]))
    return torch.stack(losses) @ torch.tensor(weights).double() / sum(weights)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("pointer", [True, False])
def test_in_batch_negatives_are_the_groups_other_distinct_targets(world, pointer):
    shards, groups = world
    model = StandIn(shards.num_items, pointer)
    log_pi_V = in_batch_log_pi(shards)
    expected = torch.stack(
        [plain_loss(model, group, np.unique(group.target_RL[group.target_RL >= 0]), log_pi_V.exp()) for group in groups]
    ).mean()
    loss = loss_of(live(shards), model, groups, range(4))
    # The mean of the groups' means, not the mean over targets.
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected))


def test_every_item_drawn_is_the_exact_mixture_over_the_catalogue(world):
    shards, groups = world
    model = StandIn(shards.num_items)
    expected = plain_loss(model, groups[0], range(shards.num_catalogue), np.ones(shards.num_catalogue))
    loss = loss_of(live(shards, shards.num_catalogue), model, groups)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0.0)
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected))
    constant = frozen(shards, model, shards.num_catalogue)
    torch.testing.assert_close(loss_of(constant, model, groups), expected, rtol=1e-7, atol=0.0)


def test_a_group_that_is_the_whole_stream_is_the_exact_mixture_over_its_targets(tmp_path):
    shards = make_shards(tmp_path / "small", users=12, max_events=25)
    order = WindowOrder(shards, 16, 1, seed=0)
    num_windows = order.windows_per_epoch
    group = order.windows(np.arange(num_windows))
    targets = np.unique(group.target_RL[group.target_RL >= 0])
    model = StandIn(shards.num_items)
    log_pi_V = torch.from_numpy(np.log(inclusion_elsewhere(shards, 16, num_windows)))
    loss = loss_of(Objective(log_pi_V, shards.train_counts, 0, 0.0, 0), model, [group])
    expected = plain_loss(model, group, targets, np.ones(shards.num_catalogue))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0.0)


def test_the_loss_of_a_real_model_in_half_precision_is_near_single():
    model = perturb(make_model(share=0.2, fields=ALL_FIELDS))
    groups = [make_windows(ALL_FIELDS, num_items=20, seed=seed) for seed in range(3)]
    objective = Objective(torch.linspace(-2, 0, 20), np.ones(20), 0, 0.0, 0)
    batch = batch_of(groups)
    expected, _ = objective(model, batch)
    whole_D = torch.cat([part.flatten() for part in gradients(model, expected)])
    with torch.autocast("cpu", torch.bfloat16):
        loss, sums_2X2 = model(batch, objective)
    assert loss.dtype == sums_2X2.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    half_D = torch.cat([part.flatten() for part in gradients(model, loss)]).float()
    assert torch.nn.functional.cosine_similarity(half_D, whole_D, dim=0) > 0.97


@pytest.mark.parametrize("num_items", [0, 1])
def test_a_catalogue_without_negatives_is_refused(num_items):
    with pytest.raises(UserError, match="no negative"):
        Objective(torch.zeros(num_items), np.ones(num_items), 0, 0.0, 0)


def test_live_draws_join_the_targets_and_are_corrected_by_both(world):
    shards, groups = world
    model = StandIn(shards.num_items)
    pi_batch_V = np.exp(in_batch_log_pi(shards).numpy())
    objective = live(shards, 9, exponent=0.0, seed=4)
    ids, others = (objective.proposal.draw(group_rng(4, index)) for index in (1, 0))
    assert len(ids) == 9
    assert not np.array_equal(ids, others)
    union = np.union1d(ids, groups[1].target_RL[groups[1].target_RL >= 0])
    pi_V = 1 - (1 - pi_batch_V) * (1 - 9 / shards.num_catalogue)
    assert candidates(drawn_batch(groups, [1], objective)) == [len(union)]
    loss = loss_of(objective, model, groups, [1])
    assert loss.item() == pytest.approx(plain_loss(model, groups[1], union, pi_V).item())


def test_frozen_draws_join_the_targets_and_are_corrected_by_both(world):
    shards, groups = world
    model = StandIn(shards.num_items)
    objective = frozen(shards, model, 7)
    targets = set(np.unique(groups[0].target_RL[groups[0].target_RL >= 0]).tolist())
    ids = set(objective.proposal.draw(group_rng(5, 0)).tolist())
    assert len(ids) == 7
    assert 0 < len(ids - targets) < 7
    drawn_pi_V = drawn_inclusion(shards.train_counts, 7, 0.5)
    pi_V = 1 - (1 - np.exp(in_batch_log_pi(shards).numpy())) * (1 - drawn_pi_V)
    expected = plain_loss(model, groups[0], sorted(ids | targets), pi_V)
    assert loss_of(objective, model, groups).item() == pytest.approx(expected.item(), rel=1e-6)
    batch = drawn_batch(groups, [0], objective)
    assert set(batch.frozen[0].tolist()) == ids - targets
    assert candidates(batch) == [len(ids | targets)]
    assert candidates(drawn_batch(groups, [0], frozen(shards, model, 0))) == [len(targets)]


def test_the_frozen_catalogue_gets_no_gradient_and_draws_follow_the_groups_index(world):
    shards, groups = world
    model = StandIn(shards.num_items)
    objective = frozen(shards, model, 7)
    first, again, other = (objective(model, objective.batch(groups[0], [index]))[0] for index in (0, 0, 1))
    first.backward()
    assert model.table.grad is None
    assert again.item() == first.item() != other.item()


@pytest.mark.parametrize("method", ["reference", "one_pass", "two_pass"])
def test_the_loss_does_not_depend_on_the_method(world, method):
    shards, groups = world
    model = StandIn(shards.num_items)
    expected, other = (
        loss_of(frozen(shards, model, 7, method=name), model, groups, [0, 1]) for name in ("auto", method)
    )
    assert other.item() == pytest.approx(expected.item(), rel=1e-6)


def test_more_negatives_than_items_is_a_users_mistake(world):
    shards, _ = world
    with pytest.raises(UserError, match="negatives"):
        frozen(shards, StandIn(shards.num_items), shards.num_catalogue + 1)
