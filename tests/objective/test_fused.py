"""The fused kernel against float64, on the GPU where there is one, otherwise in Triton's interpreter on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bfm.objective.fused import Tile, choose_tile, fused_available, fused_softmax_state, num_splits
from bfm.objective.tiled import loss_from_state, softmax_state
from tests.objective.cases import NAMES, Case, errors, make_case, relative_error

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = fused_available()
needs_kernel = pytest.mark.skipif(REASON is not None, reason=f"the kernel cannot run here: {REASON}")
SMALL = Tile(16, 32, 4, 1)


def fused_loss(h_TD, positive_TD, table_RD, ids_K, log_pi_K, hit_T, scale, tile=SMALL):
    q_TD = scale * h_TD
    return loss_from_state(q_TD, positive_TD, fused_softmax_state(q_TD, table_RD, ids_K, log_pi_K, hit_T, tile))


def state_error(case: Case, tile: Tile | None = None) -> float:
    """Of log sum and mean candidate, against float64 arithmetic on the same rounded queries and table."""
    q_TD = (case.scale * case.h_TD).to(case.table_RD.dtype)
    rest = (case.ids_K, case.log_pi_K, case.hit_T)
    got = fused_softmax_state(q_TD, case.table_RD, *rest, tile)
    exact = softmax_state(q_TD.double(), case.table_RD.double(), *rest)
    assert all(part.dtype == torch.float32 for part in got)
    # A row whose only candidate is its hit has no mean.
    some_T = exact[1] > 0
    assert torch.equal(got[1] > 0, some_T)
    parts = [[part[some_T] for part in state] for state in (got, exact)]
    log_sums, means = zip(*((m + s.log(), w / s[:, None]) for m, s, w in parts), strict=True)
    return max(relative_error(*log_sums), relative_error(*means))


@needs_kernel
@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_with_float64(name):
    for key, error in errors(make_case(name, 19, 301, width=24).to(torch.float32, DEVICE), fused_loss).items():
        assert error < 1e-5, key


@needs_kernel
@pytest.mark.parametrize("width", [1, 16, 50, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_widths_and_dtypes(width, dtype):
    case = make_case("hits", num_rows=19, num_candidates=301, width=width).to(dtype, DEVICE)
    # Weights of the sum are rounded to the table's dtype before they meet the candidates.
    assert state_error(case) < {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}[dtype]


@needs_kernel
@pytest.mark.parametrize("num_rows", [1, 15, 33])
@pytest.mark.parametrize("num_candidates", [1, 31, 32, 33, 700])
def test_rows_and_candidates_need_not_fill_tiles(num_rows, num_candidates):
    case = make_case("rare candidates", num_rows, num_candidates, width=8).to(torch.float32, DEVICE)
    assert state_error(case, SMALL) < 2e-6


@needs_kernel
def test_rows_without_candidates_are_the_empty_state():
    case = make_case("all hit", width=8).to(torch.float32, DEVICE)
    q_TD = case.scale * case.h_TD
    for ids_K, hit_T in ((case.ids_K, case.hit_T), (case.ids_K[:0], torch.full_like(case.hit_T, -1))):
        max_T, sum_T, weighted_TD = fused_softmax_state(q_TD, case.table_RD, ids_K, case.log_pi_K[: len(ids_K)], hit_T)
        assert (max_T == -torch.inf).all()
        assert not sum_T.any()
        assert not weighted_TD.any()


@needs_kernel
def test_rows_of_the_table_that_are_no_candidates_are_not_read():
    case = make_case("hits", width=24).to(torch.float32, DEVICE)
    table_RD = torch.full_like(case.table_RD, torch.nan)
    table_RD[case.ids_K] = case.table_RD[case.ids_K]
    assert state_error(replace(case, table_RD=table_RD)) < 2e-6


@needs_kernel
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["h_TD", "table_RD"])
def test_a_score_that_is_not_finite_shows_in_the_loss(value, where):
    case = make_case("plain", num_rows=5, num_candidates=100, width=8).to(torch.float32, DEVICE)
    # Opposite signs in one vector give scores of +inf, -inf or NaN, whatever the signs of the other.
    row = 3 if where == "h_TD" else int(case.ids_K[60])
    getattr(case, where)[row] = torch.tensor([value] + [1.0] * 7)
    loss_T = fused_loss(case.h_TD, case.positive_TD, case.table_RD, case.ids_K, case.log_pi_K, case.hit_T, case.scale)
    if where == "h_TD":
        assert loss_T.isnan().tolist() == [False, False, False, True, False]
    elif value != value:
        assert loss_T.isnan().all()
    else:
        # A candidate at -inf adds nothing to a row's sum; one at +inf must not pass for a number.
        scores_T = case.scale * case.h_TD @ case.table_RD[row]
        assert torch.equal(loss_T.isfinite(), scores_T == -torch.inf)


@needs_kernel
def test_tables_the_kernel_does_not_take_are_refused_with_the_reason():
    arguments = (torch.zeros(3, dtype=torch.int64), torch.zeros(3), torch.full((2,), -1))
    for table_RD, reason in (
        (torch.zeros(5, 8, dtype=torch.float64), "float64"),
        (torch.zeros(8, 5).T, "not contiguous"),
        (torch.zeros(5, 300), "wider than 256"),
    ):
        q_TD, table_RD = torch.zeros(2, table_RD.shape[1], device=DEVICE), table_RD.to(DEVICE)
        with pytest.raises(ValueError, match=reason):
            fused_softmax_state(q_TD, table_RD, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_device_the_reason_is_given(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert fused_available() in ("triton is not installed", "there is no CUDA device")
    with pytest.raises(ValueError, match=r"cannot run: (triton is not installed|there is no CUDA device)"):
        fused_softmax_state(torch.zeros(2, 8), torch.zeros(5, 8), torch.arange(3), torch.zeros(3), torch.full((2,), -1))


@pytest.mark.parametrize("shared_kib", [48, 99, 163, 227])
@pytest.mark.parametrize("padded", [16, 64, 128, 256])
@pytest.mark.parametrize("item_bytes", [2, 4])
def test_tiles_fit_the_shared_memory(shared_kib, padded, item_bytes):
    for num_rows in (1, 40, 10_000):
        tile = choose_tile(num_rows, padded, item_bytes, shared_kib * 1024)
        assert tile.shared_bytes(padded, item_bytes) < shared_kib * 1024
        assert tile.rows < 2 * max(16, num_rows)


def test_splits_fill_the_device():
    assert num_splits(row_tiles=64, column_tiles=32768, processors=132) == 2
    assert num_splits(row_tiles=1, column_tiles=32768, processors=132) == 119
    assert num_splits(row_tiles=132, column_tiles=32768, processors=132) == 1
    assert num_splits(row_tiles=1, column_tiles=3, processors=132) == 3
    assert num_splits(row_tiles=10_000, column_tiles=1, processors=132) == 1
