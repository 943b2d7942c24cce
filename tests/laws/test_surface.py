"""The surface: planted truth, coverage of its intervals, repeated data, bounded metrics, refusals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bfm.errors import UserError
from bfm.laws.runs import Runs
from bfm.laws.surface import fit_surface
from bfm.laws.surface_form import Form
from bfm.laws.surface_notes import epochs_behind

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
    fit = fit_surface(runs_of(params, events, surface(params, events, law))).fit
    assert fit.parameters["alpha"].estimate == pytest.approx(alpha, abs=1e-6)
    assert fit.parameters["beta"].estimate == pytest.approx(beta, abs=1e-6)
    assert fit.parameters["a"].estimate == pytest.approx(beta / (alpha + beta), abs=1e-6)
    assert fit.parameters["E"].estimate == pytest.approx(1.7, rel=1e-6)
    top = fit.budgets[-1]
    assert top.flops == pytest.approx(1e19)
    assert top.optima["N_opt"].estimate == pytest.approx(best_size(top.flops, law), rel=1e-5)
    assert 6 * top.optima["N_opt"].estimate * top.optima["D_opt"].estimate == pytest.approx(top.flops)


@settings(max_examples=25, deadline=None)
@given(
    theta=st.tuples(*[st.floats(-2, 2)] * 3, st.floats(-2, 0), st.floats(-2, 0), st.floats(0, 3)),
    seed=st.integers(0, 9),
)
def test_derivatives_are_those_of_differences(theta, seed):
    rng = np.random.default_rng(seed)
    log_d = rng.normal(size=5)
    form = Form(rng.normal(size=5), log_d, log_d - rng.uniform(0, 3, 5))
    theta, psi, steps = np.array(theta), rng.normal(size=5), 1e-5 * np.eye(6)
    value, jacobian = form.jacobian(theta)
    assert value == pytest.approx(form.log_loss(theta))
    by_difference = [(form.log_loss(theta + h) - form.log_loss(theta - h)) / 2e-5 for h in steps]
    assert jacobian == pytest.approx(np.transpose(by_difference), abs=1e-7)
    bent = [(psi @ form.jacobian(theta + h)[1] - psi @ form.jacobian(theta - h)[1]) / 2e-5 for h in steps]
    second = form.curvature(theta, jacobian, psi) - jacobian.T @ (psi[:, None] * jacobian)
    assert second == pytest.approx(np.array(bent), abs=1e-6)


@pytest.mark.parametrize("design", [iso_flop(), grid()], ids=["6 C x 9 N", "8 N x 8 D"])
def test_intervals_hold_the_truth_as_often_as_they_say(design):
    params, events = design
    flops = float((6 * params * events).max())
    truths = {"E": 1.7, "alpha": 0.34, "beta": 0.28, "a": 0.28 / 0.62, "N_opt": best_size(flops)}
    held = dict.fromkeys(truths, 0)
    draws = 50
    for seed in range(draws):
        noise = 0.003 * np.random.default_rng(seed).standard_normal(len(params))
        fitted = fit_surface(runs_of(params, events, surface(params, events) + noise))
        estimates = {**fitted.fit.parameters, **fitted.optimum(flops).optima}
        for name, truth in truths.items():
            held[name] += estimates[name].low <= truth <= estimates[name].high
    least = stats.binom.ppf(0.001, draws, 0.95)
    assert all(count >= least for count in held.values()), held


def test_a_prediction_joins_parameters_noise_and_extrapolation():
    params, events = iso_flop()
    noise = 0.003 * np.random.default_rng(1).standard_normal(len(params))
    fitted = fit_surface(runs_of(params, events, surface(params, events) + noise))
    mean, new = fitted.mean(1e8, 1e10), fitted.predict(1e8, 1e10)
    assert new.low < mean.low < mean.estimate < mean.high < new.high
    assert mean.low < surface(1e8, 1e10) < mean.high
    assert fitted.fit.as_dict() == json.loads(json.dumps(fitted.fit.as_dict()))
    assert not fitted.optimum(1e22).bracketed
    assert fitted.optimum(10**16.6).bracketed


def repeated(scale, noise):
    params, events = grid()
    unique = np.minimum(events, events / np.array([1.0, 2, 5, 10, 30])[np.arange(len(events)) % 5])
    again = events / unique - 1
    worth = unique * (1 + (again if math.isinf(scale) else scale * -np.expm1(-again / scale)))
    loss = surface(params, worth) + noise * np.random.default_rng(0).standard_normal(len(params))
    return runs_of(params, events, loss, unique_events=unique)


def test_repeats_count_less_where_the_runs_say_so():
    fitted = fit_surface(repeated(15.0, 0.003))
    found = fitted.fit.parameters["R_star"]
    assert found.low < 15 < found.high < 20
    behind = fitted.fit.details["effective_data"]["epochs_10_percent_behind"]
    assert behind["low"] < epochs_behind(15.0) < behind["high"]
    worth = 1e9 * (1 + 15 * -math.expm1(-9 / 15))
    assert fitted.mean(1e8, 1e10, 1e9).estimate == pytest.approx(surface(1e8, worth), abs=0.005)
    assert fitted.expected(1e8, 1e10, 1e9) == fitted.mean(1e8, 1e10, 1e9).estimate
    assert fitted.mean(1e8, 1e10).estimate == pytest.approx(surface(1e8, 1e10), abs=0.005)


def test_repeats_that_count_in_full_leave_the_plain_form():
    fit = fit_surface(repeated(math.inf, 0.003)).fit
    assert fit.details["effective_data"]["used"] is False
    assert fit.details["effective_data"]["R_star"]["high"] is None
    assert "R_star" not in fit.parameters


def test_a_bounded_metric_is_predicted_in_its_own_units():
    params, events = grid(6)
    law = {"E": 1.2, "A": 40.0, "B": 100.0, "alpha": 0.34, "beta": 0.28}
    noise = np.exp(0.003 * np.random.default_rng(0).standard_normal(len(params)))
    recall = np.exp(-surface(params, events, law) * noise)
    fitted = fit_surface(runs_of(params, events, recall, "recall@10"))
    said = fitted.mean(1e9, 1e11)
    assert 0 < said.low < said.estimate < said.high < 1
    # One draw: what intervals cover is asked of many draws above.
    assert said.estimate == pytest.approx(math.exp(-surface(1e9, 1e11, law)), abs=said.high - said.low)
    assert fitted.fit.definitions["fitted"].startswith("ln of -ln(recall@10)")


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
    with pytest.raises(UserError, match="effective data need repeats"):
        fit_surface(runs_of(params, events, loss), effective=True)


def test_one_ratio_of_data_to_size_is_called_collinear():
    params = np.logspace(6, 9, 40)
    noise = 0.003 * np.random.default_rng(0).standard_normal(40)
    fit = fit_surface(runs_of(params, 20 * params, surface(params, 20 * params) + noise)).fit
    assert any("collinear" in warning for warning in fit.warnings)
    assert fit.parameters["a"].high - fit.parameters["a"].low > 0.3 or math.isinf(fit.parameters["a"].high)


def test_an_outlier_is_named_and_hardly_moves_the_fit():
    params, events = iso_flop()
    loss = surface(params, events) + 0.003 * np.random.default_rng(0).standard_normal(len(params))
    before = fit_surface(runs_of(params, events, loss)).fit
    loss[7] += 0.3
    after = fit_surface(runs_of(params, events, loss)).fit
    assert [outlier.run for outlier in after.outliers] == ["run 7"]
    assert after.parameters["a"].estimate == pytest.approx(before.parameters["a"].estimate, abs=0.01)


def test_bootstrap_draws_are_those_of_the_seed():
    params, events = iso_flop()
    loss = surface(params, events) + 0.003 * np.random.default_rng(0).standard_normal(len(params))
    runs = runs_of(params, events, loss)
    first, again = (fit_surface(runs, bootstrap=60, seed=3).fit for _ in range(2))
    assert first == again
    assert "60 bootstrap draws of runs" in first.interval_method
    profile = fit_surface(runs).fit.parameters["a"]
    drawn = first.parameters["a"]
    assert (drawn.high - drawn.low) / (profile.high - profile.low) == pytest.approx(1, abs=0.5)


@pytest.mark.parametrize("repeats", [0.0, 1e-9, 1e-3, 0.5, 15.0, 1e6])
def test_epochs_behind_falls_to_a_ninth_above_one_where_repeats_are_worthless(repeats):
    epochs = epochs_behind(repeats)
    assert epochs >= 1 / 0.9 - 1e-9
    worth = 1 + repeats * -math.expm1(-(epochs - 1) / repeats) if repeats > 0 else 1.0
    assert worth == pytest.approx(0.9 * epochs, rel=1e-4)


def test_an_optimum_below_all_runs_is_a_bound_and_no_point():
    params = np.tile(np.logspace(8, 9.5, 8), 5)
    events = np.repeat(np.logspace(7, 8, 5), 8)
    noise = 0.003 * np.random.default_rng(0).standard_normal(40)
    # Larger models are only worse here: nothing says how small the best one is.
    fit = fit_surface(runs_of(params, events, 2.0 + 500 / events**0.3 + 1e-3 * np.log(params) + noise)).fit
    for budget in fit.budgets:
        size = budget.optima["N_opt"]
        assert not budget.bracketed
        assert not size.is_known or size.estimate > params.min() / 4
