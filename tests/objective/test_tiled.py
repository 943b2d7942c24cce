"""Every implementation of the log sum against the dense formula in float64, and its use of memory."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import bfm.objective.tiled as tiled
from bfm.objective.methods import CONSTANT_ONLY
from bfm.objective.softmax import choose_method, log_sum
from bfm.objective.tiled import log_sum_of_state, merge, softmax_state
from tests.objective.cases import NAMES, errors, make_case, results

torch.set_num_threads(1)

SHAPES = [("one_pass", False), ("two_pass", False), ("two_pass", True), ("reference", True)]
METHODS = ["one_pass", "two_pass", "reference"]


@pytest.fixture
def small_tiles(monkeypatch):
    """No size of a case is a multiple of these."""
    monkeypatch.setattr(tiled, "_CPU_TILE", (8, 64, 512))


def by(method, window_Q=None):
    return lambda *arguments: log_sum(*arguments, window_Q=window_Q, method=method)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("method", "live"), SHAPES)
@pytest.mark.usefixtures("small_tiles")
def test_log_sum_and_gradients_are_the_dense_float64_ones(name, method, live):
    case = make_case(name).to(torch.float32)
    assert case.q_QD.dtype == torch.float32
    for part, error in errors(case, by(method), live).items():
        assert error < 1e-5, part


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["one_pass", "two_pass"])
@pytest.mark.usefixtures("small_tiles")
def test_float64_stays_float64(name, method):
    assert max(errors(make_case(name), by(method)).values()) < 1e-12


def with_windows(case, num_windows=5, seed=3):
    """The case with a pi of its own for every window (1 or absent for some candidates), and the queries' windows.

    In the last window nothing is present.
    """
    generator = torch.Generator().manual_seed(seed)
    window_Q = torch.randint(num_windows, (len(case.q_QD),), generator=generator)
    raised_GK = torch.rand(num_windows, len(case.ids_K), generator=generator, dtype=torch.float64)
    log_pi_GK = torch.where(raised_GK < 0.1, 0.0, case.log_pi_K * raised_GK)
    log_pi_GK[raised_GK > 0.8] = torch.inf
    log_pi_GK[-1] = torch.inf
    return replace(case, log_pi_K=log_pi_GK), window_Q


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["two_pass", "reference"])
@pytest.mark.usefixtures("small_tiles")
def test_queries_with_a_pi_of_their_window_are_as_if_each_window_stood_alone(name, method):
    case, window_Q = with_windows(make_case(name))
    got = results(case, by(method, window_Q), live_table=True)
    total = {part: torch.zeros_like(value) for part, value in got.items()}
    for window in range(5):
        rows = window_Q == window
        alone = replace(case, q_QD=case.q_QD[rows], log_pi_K=case.log_pi_K[window], weight_Q=case.weight_Q[rows])
        for part, value in results(alone, by("reference"), live_table=True).items():
            if part == "table":
                total[part] += value
            else:
                total[part][rows] = value
    torch.testing.assert_close(got, total, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", ["two_pass", "reference"])
@pytest.mark.usefixtures("small_tiles")
def test_gradients_are_those_of_the_log_sum(method):
    case, window_Q = with_windows(make_case("plain", num_queries=9, num_candidates=70, width=2))
    window_Q = window_Q.clamp(max=3)
    leaves = [x.clone().requires_grad_() for x in (case.q_QD, case.table_RD)]
    compute = by(method, window_Q)
    assert torch.autograd.gradcheck(lambda q, table: compute(q, table, case.ids_K, case.log_pi_K), leaves)


@pytest.mark.parametrize("name", ["all absent", "no candidates"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_present_is_minus_infinity_and_has_no_gradient(name, method):
    got = results(make_case(name).to(torch.float32), by(method), live_table=method != "one_pass")
    assert (got.pop("log sum") == -torch.inf).all()
    for gradient in got.values():
        assert not gradient.any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("small_tiles")
def test_candidates_that_are_absent_are_as_if_they_were_not_given(method):
    case = make_case("some absent")
    present_K = case.log_pi_K.isfinite()
    fewer = replace(case, ids_K=case.ids_K[present_K], log_pi_K=case.log_pi_K[present_K])
    live = method != "one_pass"
    torch.testing.assert_close(results(case, by(method), live), results(fewer, by(method), live))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("small_tiles")
def test_sums_over_parts_of_the_candidates_add_up_to_the_whole(method):
    """Also where nothing of a part is present: neither the value nor the gradient turns into NaN."""
    case = make_case("some absent")
    halves = slice(0, 200), slice(200, None)
    assert case.log_pi_K[halves[0]].isinf().all()

    def added(q_QD, table_RD, ids_K, log_pi_K):
        return torch.logaddexp(*(by(method)(q_QD, table_RD, ids_K[half], log_pi_K[half]) for half in halves))

    torch.testing.assert_close(results(case, added), results(case, by("reference")))


@pytest.mark.usefixtures("small_tiles")
def test_the_order_of_candidates_does_not_matter():
    case = make_case("plain")
    other = replace(case, ids_K=case.ids_K.flip(0), log_pi_K=case.log_pi_K.flip(0))
    torch.testing.assert_close(results(other, by("one_pass")), results(case, by("one_pass")))


@pytest.mark.parametrize("name", ["plain", "some absent", "rising scores", "no candidates", "one candidate"])
def test_the_states_of_four_shards_merge_into_the_whole(name):
    case = make_case(name)

    def merged(q_QD, table_RD, ids_K, log_pi_K):
        state = None
        # One shard is empty.
        for start, stop in itertools.pairwise([0, 100, 100, 900, len(ids_K)]):
            part = softmax_state(q_QD, table_RD, ids_K[start:stop], log_pi_K[start:stop])
            state = part if state is None else merge(state, part)
        return log_sum_of_state(q_QD, state)

    torch.testing.assert_close(results(case, merged), results(case, by("reference")))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["q", "first candidate", "last candidate", "log_pi"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.usefixtures("small_tiles")
def test_a_score_that_is_not_finite_is_never_lost(method, where, value):
    if where == "log_pi" and value == torch.inf:
        pytest.skip("a candidate of infinite pi is absent: no score")
    case = make_case("plain", num_queries=9).to(torch.float32)
    tensor, row = {
        "q": (case.q_QD, 3),
        "first candidate": (case.table_RD, int(case.ids_K[0])),
        "last candidate": (case.table_RD, int(case.ids_K[-1])),
        "log_pi": (case.log_pi_K[:, None], 700),
    }[where]
    tensor[row, 0] = value
    log_sum_Q = results(case, by(method))["log sum"]
    assert not log_sum_Q[3].isfinite()
    # -inf would be the best of all losses.
    assert not (log_sum_Q == -torch.inf).any()
    if where == "q":
        assert log_sum_Q.isfinite().sum() == 8


@pytest.mark.parametrize("method", ["one_pass", "two_pass"])
def test_a_bfloat16_table_is_summed_in_single_precision(method):
    case = make_case("plain").to(torch.float32)
    rounded = replace(case, table_RD=case.table_RD.bfloat16())
    expected = results(replace(rounded, table_RD=rounded.table_RD.float()), by("reference"))
    got = results(rounded, by(method), live_table=method == "two_pass")
    assert got["log sum"].dtype == torch.float32
    for part in ("log sum", "q"):
        torch.testing.assert_close(got[part], expected[part], rtol=2e-5, atol=2e-5)
    if method == "two_pass":
        assert got["table"].dtype == torch.bfloat16


def test_automatic_choice():
    frozen = torch.zeros(10, 4)
    assert choose_method(128, 256, frozen, live=False) == "reference"
    assert choose_method(500, 300, frozen, live=True) == "reference"
    assert choose_method(128, 1 << 20, frozen, live=False) == "one_pass"
    assert choose_method(128, 1 << 20, frozen, live=True) == "two_pass"


def test_on_a_gpu_scores_are_products_of_bfloat16_where_the_table_or_autocast_says_so(monkeypatch):
    def on_a_gpu(dtype):
        return SimpleNamespace(device=torch.device("cuda"), dtype=dtype, is_cuda=True, shape=(10, 4))

    single, half = on_a_gpu(torch.float32), on_a_gpu(torch.bfloat16)
    for autocast in (False, True):
        monkeypatch.setattr(tiled, "_autocasts_to_bfloat16", lambda device, autocast=autocast: autocast)
        assert tiled.product_dtype(single, half) == torch.bfloat16
        assert tiled.product_dtype(single, single) == (torch.bfloat16 if autocast else torch.float32)
        assert tiled.product_dtype(torch.zeros(2, 4), torch.zeros(3, 4).bfloat16()) == torch.float32
    # The dense form multiplies in float32.
    assert choose_method(8, 16, single, live=True) == "two_pass"
    assert choose_method(8, 16, single, live=False) == "one_pass"


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="no method"):
        results(make_case("plain", num_queries=2), by("quick"))


@pytest.mark.parametrize("method", CONSTANT_ONLY)
def test_live_candidates_leave_methods_of_frozen_ones_aside(method):
    case = make_case("plain", num_queries=2)
    windows, window_Q = with_windows(case)
    for found, auto in (
        (results(case, by(method), live_table=True), results(case, by("auto"), live_table=True)),
        (results(windows, by(method, window_Q)), results(windows, by("auto", window_Q))),
    ):
        assert found.keys() == auto.keys()
        assert all(torch.equal(found[name], auto[name]) for name in auto)


@pytest.mark.parametrize("method", ["one_pass", "two_pass"])
def test_no_tensor_grows_with_the_candidates(method):
    """The largest tensor made on the way is the same for 2^14 and 2^17 candidates, by torch's own count."""
    peaks = []
    for num_candidates in (1 << 14, 1 << 17):
        case = make_case("plain", num_queries=32, num_candidates=num_candidates, width=8).to(torch.float32)
        with torch.profiler.profile(profile_memory=True) as profile:
            q_QD = case.q_QD.requires_grad_()
            log_sum(q_QD, case.table_RD, case.ids_K, case.log_pi_K, method=method).sum().backward()
        peaks.append(max(event.self_cpu_memory_usage for event in profile.events()))
    assert peaks[0] == peaks[1] <= 4 << 20
