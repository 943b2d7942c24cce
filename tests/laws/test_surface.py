"""The surface: planted truth, coverage of its intervals, bounded metrics, refusals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from bfm.errors import UserError
from bfm.laws.runs import Runs
from bfm.laws.surface import fit_surface

LAW = {"E": 1.7, "A": 406.0, "B": 410.0, "alpha": 0.34, "beta": 0.28}


def surface(params, events, law=LAW):
    return law["E"] + law["A"] * params ** -law["alpha"] + law["B"] * events ** -law["beta"]


def runs_of(params, events, loss, metric="loss", **columns):
    columns = {"params": params, "events": events, "loss": loss, **columns}
    names = tuple(f"run {place}" for place in range(len(params)))
    return Runs("planted", columns, names, metric, {metric: loss}, {}, {})


def best_size(flops, law=LAW):
    total = law["alpha"] + law["beta"]
    lead = (law["alpha"] * law["A"] / (law["beta"] * law["B"])) ** (1 / total)
    return lead * (flops / 6) ** (law["beta"] / total)


def iso_flop(budgets=6, sizes=9):
    flops = np.logspace(15, 19, budgets)[:, None]
    params = best_size(flops) * np.logspace(-0.7, 0.7, sizes)
    return params.ravel(), (flops / 6 / params).ravel()


def grid(sizes=8):
    params, events = np.meshgrid(np.logspace(6, 8.5, sizes), np.logspace(8, 10.5, sizes))
    return params.ravel(), events.ravel()


@pytest.mark.parametrize(("alpha", "beta"), [(0.34, 0.28), (0.465, 0.155), (0.155, 0.465), (0.5, 0.5)])
def test_a_surface_without_noise_is_found_again(alpha, beta):
    law = {**LAW, "alpha": alpha, "beta": beta}
    params, events = iso_flop()
    fit = fit_surface(runs_of(params, events, surface(params, events, law)))
    assert fit.parameters["alpha"].estimate == pytest.approx(alpha, abs=1e-6)
    assert fit.parameters["beta"].estimate == pytest.approx(beta, abs=1e-6)
    assert fit.parameters["a"].estimate == pytest.approx(beta / (alpha + beta), abs=1e-6)
    assert fit.parameters["E"].estimate == pytest.approx(1.7, rel=1e-6)
    top = fit.budgets[-1]
    assert top.flops == pytest.approx(1e19)
    assert top.optima["N_opt"].estimate == pytest.approx(best_size(top.flops, law), rel=1e-5)
    assert 6 * top.optima["N_opt"].estimate * top.optima["D_opt"].estimate == pytest.approx(top.flops)


@pytest.mark.parametrize("design", [iso_flop(), grid()], ids=["6 C x 9 N", "8 N x 8 D"])
def test_intervals_hold_the_truth_as_often_as_they_say(design):
    params, events = design
    flops = float((6 * params * events).max())
    truths = {"E": 1.7, "alpha": 0.34, "beta": 0.28, "a": 0.28 / 0.62, "N_opt": best_size(flops)}
    held = dict.fromkeys(truths, 0)
    draws = 30
    for seed in range(draws):
        noise = 0.003 * np.random.default_rng(seed).standard_normal(len(params))
        fit = fit_surface(runs_of(params, events, surface(params, events) + noise))
        top = fit.budgets[-1]
        assert top.flops == pytest.approx(flops)
        estimates = {**fit.parameters, **top.optima}
        for name, truth in truths.items():
            held[name] += estimates[name].low <= truth <= estimates[name].high
    least = stats.binom.ppf(0.001, draws, 0.95)
    assert all(count >= least for count in held.values()), held


def test_a_budget_off_the_runs_is_not_bracketed():
    params, events = grid()
    noise = 0.003 * np.random.default_rng(1).standard_normal(len(params))
    fit = fit_surface(runs_of(params, events, surface(params, events) + noise))
    reasons = {round(math.log10(budget.flops), 1): budget.reason for budget in fit.budgets}
    assert reasons[17.0] == ""
    assert reasons[19.8] == "no larger run near this C"
    assert fit.as_dict() == json.loads(json.dumps(fit.as_dict()))


def test_a_bounded_metric_is_fitted_as_a_loss():
    params, events = grid(6)
    law = {"E": 1.2, "A": 40.0, "B": 100.0, "alpha": 0.34, "beta": 0.28}
    noise = np.exp(0.003 * np.random.default_rng(0).standard_normal(len(params)))
    recall = np.exp(-surface(params, events, law) * noise)
    fit = fit_surface(runs_of(params, events, recall, "recall@10"))
    top = fit.budgets[-1]
    size, data = (top.optima[name].estimate for name in ("N_opt", "D_opt"))
    assert top.best == pytest.approx(math.exp(-surface(size, data, law)), rel=0.01)
    assert fit.definitions["fitted"].startswith("ln of -ln(recall@10)")


def test_designs_that_cannot_say_are_refused_or_doubted():
    params, events = iso_flop()
    loss = surface(params, events)
    with pytest.raises(UserError, match=r"6 runs are too few.*add 1"):
        fit_surface(runs_of(params[:6], events[:6], loss[:6]))
    one = np.full(len(params), 1e7)
    with pytest.raises(UserError, match=r"stand at 1 N.*add runs at 2 or more other N"):
        fit_surface(runs_of(one, events, surface(one, events)))
    with pytest.raises(UserError, match=r"stand at 1 D.*add runs at 2 or more other D"):
        fit_surface(runs_of(params, one, surface(params, one)))
    with pytest.raises(UserError, match=r"stand at one C.*3 or more sizes at each of 2 other C"):
        fit_surface(runs_of(params[:9], events[:9], loss[:9]))


def test_one_ratio_of_data_to_size_is_called_collinear():
    params = np.logspace(6, 9, 40)
    noise = 0.003 * np.random.default_rng(0).standard_normal(40)
    fit = fit_surface(runs_of(params, 20 * params, surface(params, 20 * params) + noise))
    assert any("collinear" in warning for warning in fit.warnings)
    assert fit.parameters["a"].high - fit.parameters["a"].low > 0.3 or math.isinf(fit.parameters["a"].high)


@pytest.mark.parametrize("bend", [0.0, 0.003])
def test_a_form_that_misses_the_runs_is_doubted(bend):
    params, events = grid()
    log_n = np.log(params / params.mean())
    loss = surface(params, events) * np.exp(0.003 * np.random.default_rng(0).standard_normal(len(params)))
    fit = fit_surface(runs_of(params, events, loss * np.exp(bend * log_n * np.log(events / events.mean()))))
    assert any("misses" in warning for warning in fit.warnings) == (bend > 0)
    assert (fit.details["form_p"] < 0.01) == (bend > 0)


def test_an_outlier_is_named_and_hardly_moves_the_fit():
    params, events = iso_flop()
    loss = surface(params, events) + 0.003 * np.random.default_rng(0).standard_normal(len(params))
    before = fit_surface(runs_of(params, events, loss))
    loss[7] += 0.3
    after = fit_surface(runs_of(params, events, loss))
    assert [outlier.run for outlier in after.outliers] == ["run 7"]
    assert after.parameters["a"].estimate == pytest.approx(before.parameters["a"].estimate, abs=0.01)


def test_bootstrap_draws_are_those_of_the_seed():
    params, events = iso_flop()
    loss = surface(params, events) + 0.003 * np.random.default_rng(0).standard_normal(len(params))
    runs = runs_of(params, events, loss)
    first, again = (fit_surface(runs, bootstrap=60, seed=3) for _ in range(2))
    assert first == again
    assert "60 bootstrap draws of runs" in first.interval_method
    profile = fit_surface(runs).parameters["a"]
    drawn = first.parameters["a"]
    assert (drawn.high - drawn.low) / (profile.high - profile.low) == pytest.approx(1, abs=0.5)


def test_an_optimum_below_all_runs_is_a_bound_and_no_point():
    params = np.tile(np.logspace(8, 9.5, 8), 5)
    events = np.repeat(np.logspace(7, 8, 5), 8)
    noise = 0.003 * np.random.default_rng(0).standard_normal(40)
    # Larger models are only worse here: nothing says how small the best one is.
    fit = fit_surface(runs_of(params, events, 2.0 + 500 / events**0.3 + 1e-3 * np.log(params) + noise))
    for budget in fit.budgets:
        size = budget.optima["N_opt"]
        assert not budget.bracketed
        assert not size.is_known or size.estimate > params.min() / 4


def test_a_cost_that_no_size_changes_has_no_best_size():
    """A table whose events cost the same at every N, for all that its C say: there is a surface and no optimum."""
    grid = np.array([(n, d) for n in np.geomspace(1e6, 1e8, 6) for d in np.geomspace(1e8, 1e10, 5)])
    params, events = grid.T
    noise = np.random.default_rng(0).normal(size=(2, 30))
    loss = 1.7 + 20 / params**0.3 + 400 / events**0.3 + 0.002 * noise[0]
    columns = {"params": params, "events": events, "flops": 1e9 * events * np.exp(0.01 * noise[1]), "loss": loss}
    names = tuple(f"run {place}" for place in range(30))
    fit = fit_surface(Runs("planted", columns, names, "nll", {"nll": loss}, {}, {}))
    assert fit.parameters["alpha"].low < 0.3 < fit.parameters["alpha"].high
    assert fit.budgets == ()
    assert not fit.parameters["a"].is_known
    assert "no size is the best" in fit.warnings[-1]
