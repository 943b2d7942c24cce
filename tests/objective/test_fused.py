"""The fused kernel against float64, on the GPU where there is one, otherwise in Triton's interpreter on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bfm.objective.fused import Tile, choose_tile, fused_available, fused_softmax_state, num_splits
from bfm.objective.tiled import log_sum_of_state, softmax_state
from tests.objective.cases import NAMES, Case, errors, make_case, relative_error

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = fused_available()
needs_kernel = pytest.mark.skipif(REASON is not None, reason=f"the kernel cannot run here: {REASON}")
SMALL = Tile(16, 32, 4, 1)


def fused_log_sum(q_QD, table_RD, ids_K, log_pi_K):
    return log_sum_of_state(q_QD, fused_softmax_state(q_QD, table_RD, ids_K, log_pi_K, SMALL))


def state_error(case: Case, tile: Tile | None = None) -> float:
    """Of log sum and mean candidate, against float64 arithmetic on the same rounded queries and table."""
    q_QD = case.q_QD.to(case.table_RD.dtype)
    got = fused_softmax_state(q_QD, case.table_RD, case.ids_K, case.log_pi_K, tile)
    exact = softmax_state(q_QD.double(), case.table_RD.double(), case.ids_K, case.log_pi_K)
    assert all(part.dtype == torch.float32 for part in got)
    log_sums, means = zip(*((m + s.log(), w / s[:, None]) for m, s, w in (got, exact)), strict=True)
    return max(relative_error(*log_sums), relative_error(*means))


@needs_kernel
@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_with_float64(name):
    for key, error in errors(make_case(name, 19, 301, width=24).to(torch.float32, DEVICE), fused_log_sum).items():
        assert error < 1e-5, key


@needs_kernel
@pytest.mark.parametrize("width", [1, 16, 50, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_widths_and_dtypes(width, dtype):
    case = make_case("some absent", num_queries=19, num_candidates=301, width=width).to(dtype, DEVICE)
    # Weights of the sum are rounded to the table's dtype before they meet the candidates.
    assert state_error(case) < {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}[dtype]


@needs_kernel
@pytest.mark.parametrize("num_queries", [1, 15, 33])
@pytest.mark.parametrize("num_candidates", [1, 31, 32, 33, 700])
def test_queries_and_candidates_need_not_fill_tiles(num_queries, num_candidates):
    case = make_case("rare candidates", num_queries, num_candidates, width=8).to(torch.float32, DEVICE)
    assert state_error(case, SMALL) < 2e-6


@needs_kernel
@pytest.mark.parametrize("name", ["all absent", "no candidates"])
def test_nothing_present_is_the_empty_state(name):
    case = make_case(name, width=8).to(torch.float32, DEVICE)
    max_Q, sum_Q, weighted_QD = fused_softmax_state(case.q_QD, case.table_RD, case.ids_K, case.log_pi_K)
    assert (max_Q == -torch.inf).all()
    assert not sum_Q.any()
    assert not weighted_QD.any()


@needs_kernel
def test_rows_of_the_table_that_are_no_candidates_are_not_read():
    case = make_case("plain", width=24).to(torch.float32, DEVICE)
    table_RD = torch.full_like(case.table_RD, torch.nan)
    table_RD[case.ids_K] = case.table_RD[case.ids_K]
    assert state_error(replace(case, table_RD=table_RD)) < 2e-6


@needs_kernel
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["q_QD", "table_RD"])
def test_a_score_that_is_not_finite_shows_in_the_log_sum(value, where):
    case = make_case("plain", num_queries=5, num_candidates=100, width=8).to(torch.float32, DEVICE)
    # Opposite signs in one vector give scores of +inf, -inf or NaN, whatever the signs of the other.
    row = 3 if where == "q_QD" else int(case.ids_K[60])
    getattr(case, where)[row] = torch.tensor([value] + [1.0] * 7)
    log_sum_Q = fused_log_sum(case.q_QD, case.table_RD, case.ids_K, case.log_pi_K)
    if where == "q_QD":
        assert log_sum_Q.isnan().tolist() == [False, False, False, True, False]
    elif value != value:
        assert log_sum_Q.isnan().all()
    else:
        # A candidate at -inf adds nothing to a query's sum; one at +inf must not pass for a number.
        assert torch.equal(log_sum_Q.isfinite(), case.q_QD @ case.table_RD[row] == -torch.inf)


@needs_kernel
def test_tables_the_kernel_does_not_take_are_refused_with_the_reason():
    arguments = (torch.zeros(3, dtype=torch.int64), torch.zeros(3))
    for table_RD, reason in (
        (torch.zeros(5, 8, dtype=torch.float64), "float64"),
        (torch.zeros(8, 5).T, "not contiguous"),
        (torch.zeros(5, 300), "wider than 256"),
    ):
        q_QD, table_RD = torch.zeros(2, table_RD.shape[1], device=DEVICE), table_RD.to(DEVICE)
        with pytest.raises(ValueError, match=reason):
            fused_softmax_state(q_QD, table_RD, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_device_the_reason_is_given(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert fused_available() in ("triton is not installed", "there is no CUDA device")
    with pytest.raises(ValueError, match=r"cannot run: (triton is not installed|there is no CUDA device)"):
        fused_softmax_state(torch.zeros(2, 8), torch.zeros(5, 8), torch.arange(3), torch.zeros(3))


@pytest.mark.parametrize("shared_kib", [48, 99, 163, 227])
@pytest.mark.parametrize("padded", [16, 64, 128, 256])
@pytest.mark.parametrize("item_bytes", [2, 4])
def test_tiles_fit_the_shared_memory(shared_kib, padded, item_bytes):
    for num_queries in (1, 40, 10_000):
        tile = choose_tile(num_queries, padded, item_bytes, shared_kib * 1024)
        assert tile.shared_bytes(padded, item_bytes) < shared_kib * 1024
        assert tile.rows < 2 * max(16, num_queries)


def test_splits_fill_the_device():
    assert num_splits(row_tiles=64, column_tiles=32768, processors=132) == 2
    assert num_splits(row_tiles=1, column_tiles=32768, processors=132) == 119
    assert num_splits(row_tiles=132, column_tiles=32768, processors=132) == 1
    assert num_splits(row_tiles=1, column_tiles=3, processors=132) == 3
    assert num_splits(row_tiles=10_000, column_tiles=1, processors=132) == 1
