"""Every implementation of the sampled softmax against the dense formula in float64, and its use of memory."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import bfm.objective.tiled as tiled
from bfm.objective.softmax import choose_method, sampled_softmax
from bfm.objective.tiled import loss_from_state, merge, softmax_state
from tests.objective.cases import NAMES, errors, make_case, results

torch.set_num_threads(1)

SHAPES = [("one_pass", False), ("two_pass", False), ("two_pass", True), ("reference", True)]


@pytest.fixture
def small_tiles(monkeypatch):
    """No size of a case is a multiple of these."""
    monkeypatch.setattr(tiled, "_CPU_TILE", (8, 64, 512))


def by(method, window_T=None):
    return lambda *arguments: sampled_softmax(*arguments, window_T=window_T, method=method)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("method", "live"), SHAPES)
@pytest.mark.usefixtures("small_tiles")
def test_loss_and_gradients_are_the_dense_float64_ones(name, method, live):
    case = make_case(name).to(torch.float32)
    assert case.h_TD.dtype == torch.float32
    for part, error in errors(case, by(method), live).items():
        assert error < 1e-5, part


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["one_pass", "two_pass"])
@pytest.mark.usefixtures("small_tiles")
def test_float64_stays_float64(name, method):
    assert max(errors(make_case(name), by(method)).values()) < 1e-12


def with_windows(case, num_windows=5, seed=3):
    """The case with a pi of its own for every window (0 for some candidates), and the rows' windows."""
    generator = torch.Generator().manual_seed(seed)
    window_T = torch.randint(num_windows, (len(case.h_TD),), generator=generator)
    raised_GK = torch.rand(num_windows, len(case.ids_K), generator=generator, dtype=torch.float64)
    log_pi_GK = torch.where(raised_GK < 0.1, 0.0, case.log_pi_K * raised_GK)
    return replace(case, log_pi_K=log_pi_GK), window_T


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["two_pass", "reference"])
@pytest.mark.usefixtures("small_tiles")
def test_rows_with_a_pi_of_their_window_are_as_if_each_window_stood_alone(name, method):
    case, window_T = with_windows(make_case(name))
    got = results(case, by(method, window_T), live_table=True)
    total = {part: torch.zeros_like(value) for part, value in got.items()}
    for window in range(5):
        rows = window_T == window
        alone = replace(
            case,
            log_pi_K=case.log_pi_K[window],
            **{field: getattr(case, field)[rows] for field in ("h_TD", "positive_TD", "hit_T", "weight_T")},
        )
        for part, value in results(alone, by("reference"), live_table=True).items():
            if part in ("table", "scale"):
                total[part] += value
            else:
                total[part][rows] = value
    torch.testing.assert_close(got, total, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("small_tiles")
def test_gradients_are_those_of_the_loss():
    case, window_T = with_windows(make_case("hits", num_rows=9, num_candidates=70, width=2))
    leaves = [x.clone().requires_grad_() for x in (case.h_TD, case.positive_TD, case.table_RD, case.scale)]
    loss = by("two_pass", window_T)
    assert torch.autograd.gradcheck(lambda h, p, t, s: loss(h, p, t, case.ids_K, case.log_pi_K, case.hit_T, s), leaves)


@pytest.mark.parametrize("method", ["one_pass", "two_pass", "reference"])
def test_a_row_with_no_other_candidate_has_zero_loss_and_gradient(method):
    for name in ("all hit", "no candidates"):
        case = make_case(name).to(torch.float32)
        alone_T = case.hit_T >= 0 if name == "all hit" else torch.ones(len(case.h_TD), dtype=torch.bool)
        got = results(case, by(method))
        assert alone_T.any()
        assert not got["loss"][alone_T].any()
        assert not got["h"][alone_T].any()


@pytest.mark.usefixtures("small_tiles")
def test_the_order_of_candidates_does_not_matter():
    case = make_case("hits")
    place_K = torch.arange(len(case.ids_K)).flip(0)
    hit_T = torch.where(case.hit_T >= 0, place_K[case.hit_T], -1)
    other = replace(case, ids_K=case.ids_K[place_K], log_pi_K=case.log_pi_K[place_K], hit_T=hit_T)
    expected, got = results(case, by("one_pass")), results(other, by("one_pass"))
    for part, value in expected.items():
        torch.testing.assert_close(got[part], value)


@pytest.mark.parametrize("name", ["hits", "rising scores", "no candidates", "all hit"])
def test_the_states_of_four_shards_merge_into_the_whole(name):
    case = make_case(name)
    q_TD = (case.scale * case.h_TD).requires_grad_()
    # One shard is empty.
    edges = [0, 100, 100, 900, len(case.ids_K)]
    state = None
    for start, stop in itertools.pairwise(edges):
        here_T = (case.hit_T >= start) & (case.hit_T < stop)
        part = softmax_state(
            q_TD,
            case.table_RD,
            case.ids_K[start:stop],
            case.log_pi_K[start:stop],
            torch.where(here_T, case.hit_T - start, -1),
        )
        state = part if state is None else merge(state, part)
    loss_T = loss_from_state(q_TD, case.positive_TD, state)
    (grad_TD,) = torch.autograd.grad((loss_T * case.weight_T).sum(), q_TD)
    expected = results(case, by("reference"))
    torch.testing.assert_close(loss_T.detach(), expected["loss"])
    torch.testing.assert_close(case.scale * grad_TD, expected["h"])


@pytest.mark.parametrize("method", ["one_pass", "two_pass"])
@pytest.mark.parametrize("where", ["h", "positive", "first candidate", "last candidate", "log_pi"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.usefixtures("small_tiles")
def test_a_score_that_is_not_finite_is_never_lost(method, where, value):
    if where == "log_pi" and value == torch.inf:
        pytest.skip("1 / pi of infinite pi is 0: no score")
    case = make_case("hits", num_rows=9).to(torch.float32)
    tensor, row = {
        "h": (case.h_TD, 3),
        "positive": (case.positive_TD, 3),
        "first candidate": (case.table_RD, int(case.ids_K[0])),
        "last candidate": (case.table_RD, int(case.ids_K[-1])),
        "log_pi": (case.log_pi_K[:, None], 700),
    }[where]
    tensor[row, 0] = value
    loss_T = results(case, by(method))["loss"]
    assert not loss_T[3].isfinite()
    if where in ("h", "positive"):
        assert loss_T.isfinite().sum() == 8


@pytest.mark.parametrize("method", ["one_pass", "two_pass"])
def test_a_bfloat16_table_is_summed_in_single_precision(method):
    case = make_case("hits")
    rounded = replace(
        case.to(torch.float32), table_RD=case.table_RD.bfloat16(), positive_TD=case.positive_TD.bfloat16()
    )
    upcast = replace(rounded, table_RD=rounded.table_RD.float(), positive_TD=rounded.positive_TD.float())
    expected = results(upcast, by("reference"))
    got = results(rounded, by(method), live_table=method == "two_pass")
    assert got["loss"].dtype == torch.float32
    for part in ("loss", "h", "scale"):
        torch.testing.assert_close(got[part], expected[part], rtol=2e-5, atol=2e-5)
    if method == "two_pass":
        assert got["table"].dtype == torch.bfloat16


def test_automatic_choice():
    frozen = torch.zeros(10, 4)
    assert choose_method(128, 256, frozen, live=False) == "reference"
    assert choose_method(500, 300, frozen, live=True) == "reference"
    assert choose_method(128, 1 << 20, frozen, live=False) == "one_pass"
    assert choose_method(128, 1 << 20, frozen, live=True) == "two_pass"


def test_a_method_that_cannot_serve_is_refused():
    case = make_case("plain", num_rows=2)
    with pytest.raises(ValueError, match="no method"):
        results(case, by("quick"))
    with pytest.raises(ValueError, match="two_pass"):
        results(case, by("one_pass"), live_table=True)
    windows, window_T = with_windows(case)
    with pytest.raises(ValueError, match="one window"):
        results(windows, by("one_pass", window_T))


@pytest.mark.parametrize("method", ["one_pass", "two_pass"])
def test_no_tensor_grows_with_the_candidates(method):
    """The largest tensor made on the way is the same for 2^14 and 2^17 candidates, by torch's own count."""
    peaks = []
    for num_candidates in (1 << 14, 1 << 17):
        case = make_case("plain", num_rows=32, num_candidates=num_candidates, width=8).to(torch.float32)
        q_TD = case.h_TD.clone().requires_grad_()
        arguments = (case.positive_TD, case.table_RD, case.ids_K, case.log_pi_K, case.hit_T, case.scale)
        with torch.profiler.profile(profile_memory=True) as profile:
            sampled_softmax(q_TD, *arguments, method=method).sum().backward()
        peaks.append(max(event.self_cpu_memory_usage for event in profile.events()))
    assert peaks[0] == peaks[1] <= 4 << 20
