"""The catalogue spread over ranks gives the loss and the gradient of the whole one."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bfm.objective.frozen import WholeItems
from bfm.objective.sharded import DealtItems
from bfm.objective.tiled import loss_from_state, merge, softmax_state
from tests.objective.cases import NAMES, errors, make_case, relative_error, unit

torch.set_num_threads(1)
NUM_ITEMS, WIDTH, SCALE = 503, 12, 20.0


def merged_state(q_TD, table_RD, ids_K, log_pi_K, hit_T, shards=4):
    """The merge of the states of shards of the table, every so many rows one."""
    state = None
    for shard in range(shards):
        held_K = ids_K % shards == shard
        place_K = torch.where(held_K, held_K.cumsum(0) - 1, -1)
        hit = torch.where(hit_T >= 0, place_K[hit_T], -1) if len(ids_K) else hit_T
        part = softmax_state(q_TD, table_RD[shard::shards], ids_K[held_K] // shards, log_pi_K[held_K], hit)
        state = part if state is None else merge(state, part)
    return state


@pytest.mark.parametrize("name", NAMES)
def test_four_shards_merge_to_the_whole(name):
    def loss(h_TD, positive_TD, table_RD, ids_K, log_pi_K, hit_T, scale):
        q_TD = scale * h_TD
        return loss_from_state(q_TD, positive_TD, merged_state(q_TD, table_RD, ids_K, log_pi_K, hit_T))

    for key, error in errors(make_case(name).to(torch.float32), loss).items():
        assert error < 1e-5, key


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
        dealt = DealtItems(table_VD[rank::world].float(), NUM_ITEMS)
        check_lookup(dealt, table_VD)
        # Rows and candidates of every rank; the last takes a turn at having none.
        for step, (num_rows, num_candidates) in enumerate([(9, 200), (1 + 7 * rank, 20 + 90 * rank), (3, NUM_ITEMS)]):
            check_loss(dealt, table_VD, num_rows, num_candidates, seed=10 * step + rank)
        last = rank == world - 1
        check_loss(dealt, table_VD, 0 if last else 5, 100, seed=100 + rank)
        check_loss(dealt, table_VD, 5, 0 if last else 100, seed=200 + rank)
        check_loss(dealt, table_VD, 0, 0, seed=300 + rank)
        check_a_score_that_is_not_finite(dealt)
        check_refusals(dealt)
    finally:
        dist.destroy_process_group()


def check_lookup(dealt: DealtItems, table_VD: torch.Tensor) -> None:
    for num_ids in (0, 5 * dealt.rank, 40):
        ids_N = torch.from_numpy(np.random.default_rng(dealt.rank).integers(0, NUM_ITEMS, num_ids))
        assert torch.equal(dealt.vectors(ids_N), table_VD[ids_N].float())


def make_group(num_rows: int, num_candidates: int, seed: int):
    """Arguments of `loss`, floats in float64; candidates in no order, about half of the targets among them."""
    rng = np.random.default_rng(seed)
    ids_K = torch.from_numpy(rng.permutation(NUM_ITEMS)[:num_candidates])
    target_T = torch.from_numpy(rng.integers(0, NUM_ITEMS, num_rows))
    if num_candidates:
        target_T[::2] = ids_K[torch.from_numpy(rng.integers(0, num_candidates, len(target_T[::2])))]
    equal_TK = target_T[:, None] == ids_K
    hit_T = (
        torch.where(equal_TK.any(1), equal_TK.int().argmax(1), -1) if num_candidates else torch.full_like(target_T, -1)
    )
    h_TD = unit(num_rows, WIDTH, torch.Generator().manual_seed(seed))
    log_pi_K = torch.from_numpy(-rng.uniform(0, 3, num_candidates))
    return h_TD, target_T, ids_K, log_pi_K, hit_T, torch.tensor(SCALE, dtype=torch.float64)


def check_loss(dealt: DealtItems, table_VD: torch.Tensor, num_rows: int, num_candidates: int, seed: int) -> None:
    """Loss and gradients are those of all vectors on every rank, in float64."""
    h_TD, target_T, ids_K, log_pi_K, hit_T, scale = make_group(num_rows, num_candidates, seed)
    outcomes = []
    for items, dtype in ((WholeItems(table_VD, "reference"), torch.float64), (dealt, torch.float32)):
        leaves = [value.detach().to(dtype).requires_grad_() for value in (h_TD, scale)]
        loss_T = items.loss(leaves[0], target_T, ids_K, log_pi_K.to(dtype), hit_T, leaves[1])
        loss_T.sum().backward()
        outcomes.append((loss_T.detach(), *(leaf.grad for leaf in leaves)))
    for exact, got in zip(*outcomes, strict=True):
        assert got.shape == exact.shape
        assert relative_error(got, exact) < 1e-5


def check_a_score_that_is_not_finite(dealt: DealtItems) -> None:
    h_TD, target_T, ids_K, log_pi_K, hit_T, scale = make_group(4, 50, seed=dealt.rank)
    h_TD[2, 0] = torch.nan
    loss_T = dealt.loss(h_TD, target_T, ids_K, log_pi_K.float(), hit_T, scale)
    assert loss_T.isnan().tolist() == [False, False, True, False]


def check_refusals(dealt: DealtItems) -> None:
    unknown = torch.tensor([0, NUM_ITEMS if dealt.rank == 0 else 1])
    with pytest.raises(ValueError, match=r"ranks \[0\] ask for items outside 0 to 502"):
        dealt.vectors(unknown)
