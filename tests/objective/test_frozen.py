"""The catalogue spread over ranks gives the log sum and the gradient of the whole one."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bfm.objective.frozen import DealtItems, WholeItems
from bfm.objective.tiled import log_sum_of_state, merge, softmax_state
from tests.objective.cases import NAMES, errors, make_case, relative_error, unit

torch.set_num_threads(1)
NUM_ITEMS, WIDTH, SCALE = 503, 12, 20.0


def merged_log_sum(q_QD, table_RD, ids_K, log_pi_K, shards=4):
    """By the merge of the states of shards of the table, every so many rows one."""
    state = None
    for shard in range(shards):
        held_K = ids_K % shards == shard
        part = softmax_state(q_QD, table_RD[shard::shards], ids_K[held_K] // shards, log_pi_K[held_K])
        state = part if state is None else merge(state, part)
    return log_sum_of_state(q_QD, state)


@pytest.mark.parametrize("name", NAMES)
def test_four_shards_merge_to_the_whole(name):
    for key, error in errors(make_case(name).to(torch.float32), merged_log_sum).items():
        assert error < 1e-5, key


def test_one_rank_holds_everything(tmp_path):
    check_rank(0, 1, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_with_their_own_queries_and_candidates(world, tmp_path):
    mp.spawn(check_rank, (world, tmp_path), nprocs=world)


def check_rank(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", datetime.timedelta(seconds=60), rank=rank, world_size=world
    )
    try:
        table_VD = unit(NUM_ITEMS, WIDTH, torch.Generator().manual_seed(0))
        dealt = DealtItems(table_VD[rank::world].float())
        check_lookup(dealt, table_VD)
        # Queries and candidates of every rank; the last takes a turn at having none.
        sizes = [(9, 200), (1 + 7 * rank, 20 + 90 * rank), (3, NUM_ITEMS)]
        for step, (num_queries, num_candidates) in enumerate(sizes):
            check_log_sum(dealt, table_VD, *make_group(num_queries, num_candidates, seed=10 * step + rank))
        last = rank == world - 1
        check_log_sum(dealt, table_VD, *make_group(0 if last else 5, 100, seed=100 + rank))
        check_log_sum(dealt, table_VD, *make_group(5, 0 if last else 100, seed=200 + rank))
        check_log_sum(dealt, table_VD, *make_group(0, 0, seed=300 + rank))
        check_absent_candidates(dealt, table_VD, last)
        check_a_score_that_is_not_finite(dealt)
    finally:
        dist.destroy_process_group()


def check_lookup(dealt: DealtItems, table_VD: torch.Tensor) -> None:
    for num_ids in (0, 5 * dealt.rank, 40):
        ids_N = torch.from_numpy(np.random.default_rng(dealt.rank).integers(0, NUM_ITEMS, num_ids))
        assert torch.equal(dealt.vectors(ids_N), table_VD[ids_N].float())


def make_group(num_queries: int, num_candidates: int, seed: int):
    """Arguments of `log_sum`, floats in float64; candidates in no order, a tenth of them absent."""
    rng = np.random.default_rng(seed)
    ids_K = torch.from_numpy(rng.permutation(NUM_ITEMS)[:num_candidates])
    q_QD = SCALE * unit(num_queries, WIDTH, torch.Generator().manual_seed(seed))
    log_pi_K = torch.from_numpy(-rng.uniform(0, 3, num_candidates))
    log_pi_K[::10] = torch.inf
    return q_QD, ids_K, log_pi_K


def check_log_sum(dealt: DealtItems, table_VD: torch.Tensor, q_QD, ids_K, log_pi_K) -> None:
    """Value and gradient are those of all vectors on every rank, in float64."""
    outcomes = []
    for items, dtype in ((WholeItems(table_VD, "reference"), torch.float64), (dealt, torch.float32)):
        leaf_QD = q_QD.detach().to(dtype).requires_grad_()
        log_sum_Q = items.log_sum(leaf_QD, ids_K, log_pi_K.to(dtype))
        log_sum_Q.sum().backward()
        outcomes.append((log_sum_Q.detach(), leaf_QD.grad))
    for exact, got in zip(*outcomes, strict=True):
        assert relative_error(got, exact) < 1e-5


def check_absent_candidates(dealt: DealtItems, table_VD: torch.Tensor, last: bool) -> None:
    """Of the last rank's candidates none is present; of the others' none that the first rank holds."""
    q_QD, ids_K, log_pi_K = make_group(4, 60, seed=400 + dealt.rank)
    log_pi_K[(ids_K % dealt.world == 0) | last] = torch.inf
    check_log_sum(dealt, table_VD, q_QD, ids_K, log_pi_K)


def check_a_score_that_is_not_finite(dealt: DealtItems) -> None:
    q_QD, ids_K, log_pi_K = make_group(4, 50, seed=dealt.rank)
    q_QD[2, 0] = torch.nan
    log_sum_Q = dealt.log_sum(q_QD.float(), ids_K, log_pi_K.float())
    assert log_sum_Q.isnan().tolist() == [False, False, True, False]
