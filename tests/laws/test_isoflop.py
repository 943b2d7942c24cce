"""Iso-FLOP laws against planted surfaces, published exponents and tables that cannot answer."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bfm.errors import UserError
from bfm.laws.isoflop import fit_isoflop
from bfm.laws.runs import Runs, from_table
from bfm.laws.valley import Valleys, rise
from tests.helpers import published

ALPHA, BETA = 0.465, 0.155
BUDGETS = np.logspace(15, 19, 5)


def best(flops, alpha=ALPHA, beta=BETA):
    return 1e7 * (flops / 1e17) ** (beta / (alpha + beta))


def surface(params_R, events_R, alpha=ALPHA, beta=BETA):
    pivot = 1e17 / 6 / 1e7
    return 1.8 + 0.15 * (params_R / 1e7) ** -alpha + 0.15 * alpha / beta * (events_R / pivot) ** -beta


def table(params_R, flops_R, loss_R, metric="loss", **more):
    columns = {"params": params_R, "flops": flops_R, "loss": loss_R, **more}
    names = tuple(f"run {place}" for place in range(len(params_R)))
    return Runs("planted", columns, names, metric, {metric: loss_R}, {}, {"C": "6 N D"})


def planted(noise=0.0, seed=0, budgets=BUDGETS, sizes=8, alpha=ALPHA, beta=BETA, off=1.0):
    flops_R = np.repeat(budgets, sizes)
    params_R = best(flops_R, alpha, beta) * np.tile(off * 8 ** np.linspace(-1, 1, sizes), len(budgets))
    events_R = flops_R / 6 / params_R
    loss_R = surface(params_R, events_R, alpha, beta) + noise * np.random.default_rng(seed).standard_normal(
        len(flops_R)
    )
    return table(params_R, flops_R, loss_R, events=events_R)


@settings(max_examples=3, deadline=None)
@given(st.floats(0.12, 0.7), st.floats(0.12, 0.7), st.floats(0.4, 2.5))
def test_the_surface_itself_comes_back_without_noise(alpha, beta, off):
    fit = fit_isoflop(planted(alpha=alpha, beta=beta, off=off))
    assert fit.parameters["N_exponent"].estimate == pytest.approx(beta / (alpha + beta), abs=1e-3)
    assert fit.parameters["D_exponent"].estimate == pytest.approx(alpha / (alpha + beta), abs=1e-3)
    for budget in fit.budgets:
        assert budget.bracketed
        assert budget.optima["N_opt"].estimate == pytest.approx(float(best(budget.flops, alpha, beta)), rel=0.01)
    assert not fit.warnings


def test_a_parabola_is_biased_where_the_valley_is_skewed():
    ratios = []
    for curve in ("valley", "quadratic"):
        middle = fit_isoflop(planted(), curve=curve).budgets[2]
        ratios.append(abs(math.log(middle.optima["N_opt"].estimate / best(middle.flops))))
    assert ratios[0] < 0.01 < 0.08 < ratios[1]


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    held = np.zeros(3)
    for seed in range(60):
        fit = fit_isoflop(planted(0.003, seed))
        middle = fit.budgets[2]
        pairs = [(fit.parameters["N_exponent"], 0.25), (fit.parameters["D_exponent"], 0.75)]
        pairs.append((middle.optima["N_opt"], best(middle.flops)))
        held += [value.low <= truth <= value.high for value, truth in pairs]
    # 57 expected; below 51 with a chance of 1 %. benchmarks/laws_isoflop.py has 1,000 draws.
    assert held.min() >= 51


def test_an_outlier_is_named_and_moves_little():
    runs = planted(0.003)
    loss_R = runs["loss"].copy()
    loss_R[17] += 0.2
    fit = fit_isoflop(table(runs["params"], runs["flops"], loss_R, events=runs["events"]))
    assert [outlier.run for outlier in fit.outliers] == ["run 17"]
    assert fit.outliers[0].residual == pytest.approx(0.2, abs=0.02)
    assert fit.parameters["N_exponent"].estimate == pytest.approx(0.25, abs=0.015)


def test_a_metric_to_maximise_has_its_maximum():
    runs = planted()
    recall_R = np.exp(-runs["loss"])
    fit = fit_isoflop(table(runs["params"], runs["flops"], recall_R, "recall@10", events=runs["events"]))
    assert fit.parameters["N_exponent"].estimate == pytest.approx(0.25, abs=1e-3)
    top = recall_R[runs.budgets()[BUDGETS[2]]].max()
    assert top <= fit.budgets[2].best < top * 1.01
    assert "recall@10" in fit.definitions["fitted"]
    json.dumps(fit.as_dict())


def test_a_scattered_law_gets_wider_intervals():
    runs = planted(0.0005)
    shift = dict(zip(BUDGETS, [1.0, 1.5, 0.7, 1.6, 0.9], strict=True))
    params_R = runs["params"] * np.array([shift[flops] for flops in runs["flops"]])
    fit = fit_isoflop(table(params_R, runs["flops"], runs["loss"]))
    exponent = fit.parameters["N_exponent"]
    assert any("scatter" in warning for warning in fit.warnings)
    assert exponent.high - exponent.low > 0.1
    assert "6, as the runs have no D" in fit.definitions["D_opt"]


def test_budgets_without_an_optimum_say_why():
    runs = planted(0.001)
    keep = np.ones(len(runs), bool)
    keep[2:8] = False
    keep[12:16] = False
    fit = fit_isoflop(runs.select(keep))
    few, edge, *rest = fit.budgets
    assert not few.bracketed
    assert "2 of the 3" in few.reason
    assert not few.optima
    assert not edge.bracketed
    assert "add 2 larger ones" in edge.reason
    assert all(budget.bracketed for budget in rest)
    assert sum("C = " in warning for warning in fit.warnings) == 2


def test_two_budgets_give_an_exponent_and_one_gives_none():
    two = fit_isoflop(planted(0.001, budgets=BUDGETS[:2]))
    found = two.parameters["N_exponent"]
    # One draw: what intervals cover is asked of many draws below.
    assert found.estimate == pytest.approx(0.25, abs=found.high - found.low)
    assert any("two budgets" in warning for warning in two.warnings)
    one = fit_isoflop(planted(0.001, budgets=BUDGETS[:1]))
    optimum = one.budgets[0].optima["N_opt"]
    assert optimum.low < best(BUDGETS[0]) < optimum.high
    assert one.parameters["N_exponent"].low == -math.inf
    assert one.parameters["N_exponent"].high == math.inf
    assert one.as_dict()["parameters"]["N_exponent"]["estimate"] is None


def test_noise_alone_is_no_valley():
    runs = planted()
    loss_R = 3 + 0.003 * np.random.default_rng(1).standard_normal(len(runs))
    with pytest.raises(UserError, match="no budget of 5 has an optimum"):
        fit_isoflop(table(runs["params"], runs["flops"], loss_R))


@pytest.mark.parametrize("curve", ["valley", "quadratic"])
def test_one_size_only_is_refused(curve):
    runs = planted()
    same = table(np.full(len(runs), 1e7), runs["flops"], runs["loss"])
    with pytest.raises(UserError, match=r"1 of the 3 or more sizes.*3 budgets or more"):
        fit_isoflop(same, curve=curve)


def test_as_many_parameters_as_runs_are_refused():
    with pytest.raises(UserError, match="at least 5 sizes"):
        fit_isoflop(planted(0.001, sizes=3))


def test_a_hill_is_no_valley():
    runs = planted()
    with pytest.raises(UserError, match="no budget"):
        fit_isoflop(table(runs["params"], runs["flops"], 6 - runs["loss"]))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_derivatives_are_those_of_differences(seed, skewed, on_a_line):
    rng = np.random.default_rng(seed)
    vertices_KV = np.array([[1.0, -1.0], [1.0, 0.0], [1.0, 1.0]]) if on_a_line else np.eye(3)
    valleys = Valleys(rng.normal(size=9), np.repeat(np.arange(3), 3), vertices_KV)
    theta_P = rng.uniform(-1, 1, 6 + vertices_KV.shape[1] + 2 * skewed)
    for rows in (valleys.loss, valleys.prior):
        steps = 1e-5 * np.eye(len(theta_P))
        by_difference = [(rows(theta_P + h)[0] - rows(theta_P - h)[0]) / 2e-5 for h in steps]
        assert rows(theta_P)[1] == pytest.approx(np.transpose(by_difference), rel=1e-5, abs=1e-5)


def test_the_valley_is_a_parabola_at_its_bottom_and_rises_to_both_sides():
    t_R = np.linspace(-3, 3, 61)
    for rates in ((0.1, 0.6), (0.6, 0.1), (0.3, 0.3)):
        g_R, slope_R, *_ = rise(t_R, *rates)
        assert g_R.min() == pytest.approx(0, abs=1e-12)
        assert np.all(np.diff(g_R, 2) > 0)
        assert np.gradient(g_R, t_R)[1:-1] == pytest.approx(slope_R[1:-1], abs=0.01)
        assert rise(np.array([1e-3]), *rates)[0][0] == pytest.approx(1e-6, rel=1e-2)


NAMES = ("dataset", "hparams", "warmup", "decay", "param_count", "val")
PUBLISHED = [
    *((corpus, *rest) for corpus in ("rw", "owt2") for rest in (
        ("base", "long", "kaplan", "kaplan", "train"),
        ("base", "long", "kaplan", "standard", "val"),
        ("base", "short", "kaplan", "standard", "val"),
        ("base", "short", "chinchilla", "standard", "val"),
        ("tuned", "short", "const", "standard", "val"),
    )),
    ("rw", "base", "long", "kaplan", "attention", "train"),
    ("rw", "base", "short", "kaplan", "attention", "train"),
    ("rw", "base", "short", "chinchilla", "attention", "train"),
    ("rw", "tuned", "short", "const", "attention", "train"),
    ("rw", "tuned", "long", "const", "kaplan", "train"),
]  # fmt: skip


@pytest.mark.parametrize("setting", PUBLISHED, ids="-".join)
def test_published_exponents(setting):
    """Porian et al. 2024, who fit splines: our interval and their 95 % one have most of the narrower in common."""
    where = " and ".join(f"{name} == {value!r}" for name, value in zip(NAMES, setting, strict=True))
    columns = [("params", "n"), ("events", "tokens"), ("flops", "flops"), ("loss", "loss")]
    runs = from_table(published("porian/isoflop_points.parquet"), columns, where)
    fit = fit_isoflop(runs)
    fits = json.loads(published("porian/published_fits.json").read_text())
    interval = next(fit for fit in fits if tuple(fit[name] for name in NAMES) == setting)["bootstrap_weighted"]
    exponent = fit.parameters["N_exponent"]
    low, high = (interval[f"n_exponent_q{end}"] for end in ("025", "975"))
    common = min(exponent.high, high) - max(exponent.low, low)
    assert common > 0.5 * min(exponent.high - exponent.low, high - low)
    assert exponent.high - exponent.low < 0.2
    assert sum(budget.bracketed for budget in fit.budgets) >= 7
