"""The catalogue spread over ranks gives the loss and the gradient of the whole one."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from bfm.objective.frozen import DealtItems, WholeItems
from bfm.objective.sharded import ShardedCatalogue, shard_range
from bfm.objective.tiled import loss_from_state, merge, softmax_state
from tests.objective.cases import NAMES, errors, make_case, relative_error, unit

torch.set_num_threads(1)
NUM_ITEMS, WIDTH, SCALE = 503, 12, 20.0


def merged_state(q_TD, table_RD, ids_K, log_pi_K, hit_T, shards=4):
    """The merge of the states of contiguous shards of the table."""
    state = None
    for shard in range(shards):
        low, high = shard_range(len(table_RD), shards, shard)
        held_K = (ids_K >= low) & (ids_K < high)
        place_K = torch.where(held_K, held_K.cumsum(0) - 1, -1)
        hit = torch.where(hit_T >= 0, place_K[hit_T], -1) if len(ids_K) else hit_T
        part = softmax_state(q_TD, table_RD[low:high], ids_K[held_K] - low, log_pi_K[held_K], hit)
        state = part if state is None else merge(state, part)
    return state


@pytest.mark.parametrize("name", NAMES)
def test_four_shards_merge_to_the_whole(name):
    def loss(h_TD, positive_TD, table_RD, ids_K, log_pi_K, hit_T, scale):
        q_TD = scale * h_TD
        return loss_from_state(q_TD, positive_TD, merged_state(q_TD, table_RD, ids_K, log_pi_K, hit_T))

    for key, error in errors(make_case(name).to(torch.float32), loss).items():
        assert error < 1e-5, key


@given(st.integers(0, 1000), st.integers(1, 70))
@settings(max_examples=50, deadline=None)
def test_shards_are_contiguous_and_even(num_items, num_shards):
    ranges = [shard_range(num_items, num_shards, shard) for shard in range(num_shards)]
    assert [item for low, high in ranges for item in range(low, high)] == list(range(num_items))
    sizes = [high - low for low, high in ranges]
    assert max(sizes) - min(sizes) <= 1


def test_one_rank_holds_everything(tmp_path):
    check_rank(0, 1, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_with_their_own_rows_and_candidates(world, tmp_path):
    mp.spawn(check_rank, (world, tmp_path), nprocs=world)


def check_rank(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", datetime.timedelta(seconds=60), rank=rank, world_size=world
    )
    try:
        table_VD = unit(NUM_ITEMS, WIDTH, torch.Generator().manual_seed(0))
        low, high = shard_range(NUM_ITEMS, world, rank)
        catalogue = ShardedCatalogue(table_VD[low:high].float(), low, NUM_ITEMS)
        check_lookup(catalogue, table_VD)
        check_dealt(rank, world, table_VD)
        # Rows and candidates of every rank; the last takes a turn at having none.
        for step, (num_rows, num_candidates) in enumerate([(9, 200), (1 + 7 * rank, 20 + 90 * rank), (3, NUM_ITEMS)]):
            check_loss(catalogue, table_VD, num_rows, num_candidates, seed=10 * step + rank)
        last = rank == world - 1
        check_loss(catalogue, table_VD, 0 if last else 5, 100, seed=100 + rank)
        check_loss(catalogue, table_VD, 5, 0 if last else 100, seed=200 + rank)
        check_loss(catalogue, table_VD, 0, 0, seed=300 + rank)
        check_a_score_that_is_not_finite(catalogue, table_VD)
        check_refusals(catalogue, table_VD)
    finally:
        dist.destroy_process_group()


def check_dealt(rank: int, world: int, table_VD: torch.Tensor) -> None:
    """Every world-th item on a rank: the same vectors, loss and gradient as all of them on each."""
    dealt = DealtItems(table_VD[rank::world].float(), NUM_ITEMS, rank, world)
    whole = WholeItems(table_VD.float(), "reference")
    generator = torch.Generator().manual_seed(rank)
    target_T = torch.randint(NUM_ITEMS, (11,), generator=generator)
    assert torch.equal(dealt.vectors(target_T), whole.vectors(target_T))
    ids_K = torch.randperm(NUM_ITEMS, generator=generator)[: 60 + 9 * rank].sort().values
    match_TK = ids_K == target_T[:, None]
    hit_T = torch.where(match_TK.any(1), match_TK.int().argmax(1), -1)
    log_pi_K = -3 * torch.rand(len(ids_K), generator=generator)
    outcomes = []
    for items in (dealt, whole):
        h_TD = unit(11, WIDTH, torch.Generator().manual_seed(50 + rank)).float().requires_grad_()
        scale = torch.tensor(SCALE, requires_grad=True)
        loss_T = items.loss(h_TD, target_T, ids_K, log_pi_K, hit_T, scale)
        loss_T.sum().backward()
        outcomes.append((loss_T.detach(), h_TD.grad, scale.grad))
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def check_lookup(catalogue: ShardedCatalogue, table_VD: torch.Tensor) -> None:
    for num_ids in (0, 5 * catalogue.rank, 40):
        ids_N = torch.from_numpy(np.random.default_rng(catalogue.rank).integers(0, NUM_ITEMS, num_ids))
        assert torch.equal(catalogue.vectors(ids_N), table_VD[ids_N].float())


def make_group(num_rows: int, num_candidates: int, seed: int):
    """q in float64 and the other arguments of `loss`; candidates in no order, about half of the targets among them."""
    rng = np.random.default_rng(seed)
    ids_K = torch.from_numpy(rng.permutation(NUM_ITEMS)[:num_candidates])
    target_T = torch.from_numpy(rng.integers(0, NUM_ITEMS, num_rows))
    if num_candidates:
        target_T[::2] = ids_K[torch.from_numpy(rng.integers(0, num_candidates, len(target_T[::2])))]
    equal_TK = target_T[:, None] == ids_K
    hit_T = (
        torch.where(equal_TK.any(1), equal_TK.int().argmax(1), -1) if num_candidates else torch.full_like(target_T, -1)
    )
    q_TD = SCALE * unit(num_rows, WIDTH, torch.Generator().manual_seed(seed))
    return q_TD, target_T, ids_K, torch.from_numpy(-rng.uniform(0, 3, num_candidates)), hit_T


def check_loss(catalogue, table_VD, num_rows: int, num_candidates: int, seed: int) -> None:
    q_TD, target_T, ids_K, log_pi_K, hit_T = make_group(num_rows, num_candidates, seed)
    exact_TD = q_TD.clone().requires_grad_()
    state = softmax_state(q_TD, table_VD, ids_K, log_pi_K, hit_T)
    exact_T = loss_from_state(exact_TD, table_VD[target_T], state)
    exact_T.sum().backward()
    leaf_TD = q_TD.float().requires_grad_()
    loss_T = catalogue.loss(leaf_TD, target_T, ids_K, log_pi_K.float(), hit_T)
    loss_T.sum().backward()
    assert loss_T.shape == (num_rows,)
    assert relative_error(loss_T.detach(), exact_T.detach()) < 1e-5
    assert relative_error(leaf_TD.grad, exact_TD.grad) < 1e-5


def check_a_score_that_is_not_finite(catalogue, table_VD) -> None:
    q_TD, *rest = make_group(4, 50, seed=catalogue.rank)
    q_TD[2, 0] = torch.nan
    rest[2] = rest[2].float()
    assert catalogue.loss(q_TD.float(), *rest).isnan().tolist() == [False, False, True, False]


def check_refusals(catalogue, table_VD) -> None:
    unknown = torch.tensor([0, NUM_ITEMS if catalogue.rank == 0 else 1])
    with pytest.raises(ValueError, match=r"ranks \[0\] ask for items outside 0 to 502"):
        catalogue.vectors(unknown)
    with pytest.raises(ValueError, match="must follow each other over all 503 items"):
        ShardedCatalogue(catalogue.rows_SD, catalogue.first + 1, NUM_ITEMS)
