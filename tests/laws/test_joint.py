"""The joint model on planted rows: what was planted is found, its errors are whitened, its optimum is its minimum."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from bfm.errors import UserError
from bfm.laws.joint import fit_joint
from bfm.laws.joint_form import GROWTH, LOG_ALPHA, LOG_BETA, LOG_E, Frame, rise
from bfm.laws.joint_optimum import ends_of, optima_of
from bfm.laws.reml import Errors, Problem
from bfm.laws.runs import Runs

E, A, ALPHA, B, BETA = 2.0, 60.0, 0.3, 400.0, 0.45
BEST_SHARE, SHARE_POWER, HEIGHT, CRITICAL = 0.03, 0.1, 0.02, 500.0
EXPONENT = BETA / (ALPHA + BETA)


def best_size(flops, waste=1.0):
    pull = ALPHA * A / (BETA * B * waste**BETA)
    return (pull * (flops / 6) ** BETA) ** (1 / (ALPHA + BETA))


def planted(rng, trials=80, *, sd=0.003, shared=0.0, chosen=False, bend=0.0, steep=0.0):
    """Rows of trials up a ladder; `chosen`: only the better half of a rung goes on.

    `bend` is what no form holds; too large a share costs e^(steep u) times as much as a parabola.
    """
    columns = {name: [] for name in ("params", "events", "flops", "share", "batch", "loss", "curve")}
    ladder = (1e15, 1e16, 1e17, 1e18)
    at = {
        name: (
            best_size(1e16) * np.exp(rng.uniform(-3, 3)),
            np.exp(rng.uniform(-5.3, -1.6)),
            2.0 ** rng.integers(3, 10),
        )
        for name in range(trials)
    }
    common = {name: math.sqrt(shared) * sd * rng.standard_normal() for name in at}
    alive = list(at)
    for flops in ladder:
        seen = {}
        for name in alive:
            params, share, batch = at[name]
            events = flops / 6 / params
            off = math.log(share / BEST_SHARE) - SHARE_POWER * math.log(flops / 1e16)
            loss = (
                E
                + A / params**ALPHA
                + B / (events / (1 + batch / CRITICAL)) ** BETA
                + HEIGHT * off**2 * math.exp(steep * max(off, 0.0))
            )
            loss += bend * math.sin(math.log(params) / 2)
            seen[name] = loss + common[name] + math.sqrt(1 - shared) * sd * rng.standard_normal()
            values = (params, events, flops, share, batch, seen[name], f"t{name}")
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
        ranked = sorted(alive, key=seen.get) if chosen else alive
        alive = ranked[: max(len(ranked) // 2, 12)]
    values = {name: np.array(column) for name, column in columns.items()}
    names = tuple(f"{trial} at {flops:g}" for trial, flops in zip(values["curve"], values["flops"], strict=True))
    return Runs("planted", values, names, "nll", {"nll": values["loss"]}, {}, {}, settings=("share",))


def columns_of(runs):
    return {name: runs[name] for name in ("params", "events", "flops", "share", "batch")}


def test_the_gradient_is_that_of_the_mean():
    rng = np.random.default_rng(0)
    runs = planted(rng)
    columns = columns_of(runs)
    columns["unique_events"] = np.minimum(columns["events"], 1e9)
    columns["share"] = np.where(np.arange(len(runs)) % 7 == 0, 0.0, columns["share"])
    choices = {"embedder_kind": np.array(["mlp", "attention", "gru"])[np.arange(len(runs)) % 3]}
    frame = Frame.of(columns, ("share",), choices, repeats=True)
    places = frame.places(columns, choices).growing(-0.1)
    base, batch, share = [0.3, -0.2, 0.5, -1.1, -0.7, 1.5], [0.4, 0.1], [-4.0, 0.1, -1.2, 0.2, 0.2, 0.1, 0.3]
    theta_P = np.concatenate([base, batch, share, [0.1, -0.2], rng.normal(size=places.miss_RM.shape[1])])
    assert places.size == 17
    _, jacobian_RP = places.mean(theta_P)
    steps = 1e-6 * np.eye(len(theta_P))
    numeric = [(places.mean(theta_P + step)[0] - places.mean(theta_P - step)[0]) / 2e-6 for step in steps]
    np.testing.assert_allclose(jacobian_RP, np.stack(numeric, 1), rtol=1e-6, atol=1e-8)


def test_an_axis_is_the_two_term_law_from_its_lowest_point():
    alpha, beta = 0.8, 0.4
    u_R = np.linspace(-4, 4, 9)
    value_R, slope_R, _, _ = rise(u_R, beta, alpha)
    law_R = np.exp(alpha * u_R) / alpha + np.exp(-beta * u_R) / beta
    np.testing.assert_allclose(value_R, 2 / (alpha + beta) * (law_R - 1 / alpha - 1 / beta), atol=1e-12)
    assert slope_R[4] == 0
    np.testing.assert_allclose(rise(u_R, 1e-4, 1e-4)[0], u_R**2, rtol=1e-6)


def test_errors_are_white_in_their_own_units():
    runs = planted(np.random.default_rng(1), trials=12)
    places = Frame.of(columns_of(runs)).places(columns_of(runs))
    _, trial_R, count_T = np.unique(runs["curve"], return_inverse=True, return_counts=True)
    size = places.size + places.miss_RM.shape[1]
    errors = Errors(trial=0.7, growth=-0.05)
    problem = Problem(
        places, runs["loss"], trial_R, count_T, np.ones(len(trial_R)), np.zeros(size), np.ones(size), 1.0, errors
    )
    scale_R = np.exp(-0.05 * places.log_c_R)
    same_RR = trial_R[:, None] == trial_R[None]
    covariance_RR = scale_R[:, None] * scale_R[None] * (np.eye(len(scale_R)) + 0.7 * same_RR)
    half_RR = problem.white(np.eye(len(scale_R)))
    np.testing.assert_allclose(half_RR @ covariance_RR @ half_RR.T, np.eye(len(scale_R)), atol=1e-10)


def test_knots_know_the_rows_and_not_what_is_far():
    runs = planted(np.random.default_rng(2))
    frame = Frame.of(columns_of(runs))
    assert frame.places(columns_of(runs)).beyond_R.max() < 0.05
    far = {
        name: values[:1] * (1e9 if name in ("params", "events") else 1.0) for name, values in columns_of(runs).items()
    }
    assert frame.places(far).beyond_R[0] > 0.99


@pytest.mark.parametrize("chosen", [False, True])
def test_what_is_planted_is_found_whoever_chose_the_rows(chosen):
    runs = planted(np.random.default_rng(3), sd=1e-5, chosen=chosen)
    fit = fit_joint(runs)
    theta_P = fit.theta_P
    assert math.exp(theta_P[LOG_E]) == pytest.approx(E, abs=1e-3)
    assert np.exp(theta_P[[LOG_ALPHA, LOG_BETA]]) == pytest.approx([ALPHA, BETA], abs=2e-4)
    critical = math.exp(theta_P[fit.problem.places.critical] + fit.frame.logs["batch"])
    assert critical == pytest.approx(CRITICAL, rel=0.01)
    best = optima_of(fit, runs)
    smallest = 1 + runs["batch"].min() / CRITICAL
    assert best.size.exponent().estimate == pytest.approx(EXPONENT, abs=5e-4)
    for flops in (1e18, 1e19):
        assert best.size.at(flops).estimate == pytest.approx(best_size(flops, smallest), rel=5e-3)
    assert best.size.own(1e17).estimate == pytest.approx(best_size(1e17, smallest), rel=5e-3)
    assert best.size.own(3e17) is None


def test_an_optimum_is_a_minimum_and_moves_as_its_gradient_says():
    runs = planted(np.random.default_rng(4), bend=0.02)
    fit = fit_joint(runs)
    best = optima_of(fit, runs)
    log_n = math.log(best.size.own(1e17).estimate)
    loss_3, _ = fit.along(1e17, log_n + np.array([-0.2, 0.0, 0.2]))
    assert loss_3[1] < min(loss_3[0], loss_3[2])
    direction_P = fit.covariance_PP @ np.random.default_rng(5).normal(size=len(fit.theta_P))
    step = 0.02 / np.abs(direction_P).max()
    moved = [
        optima_of(replace(fit, theta_P=fit.theta_P + sign * step * direction_P), runs).size.log_x_K for sign in (-1, 1)
    ]
    doubled = replace(fit, covariance_PP=np.outer(direction_P, direction_P))
    slope_K = (moved[1] - moved[0]) / (2 * step)
    np.testing.assert_allclose(optima_of(doubled, runs).size.covariance_KK, np.outer(slope_K, slope_K), rtol=0.1)


def test_what_the_ends_of_a_rate_cost_is_told_at_the_batch_that_is_asked_for():
    """The best rate goes from the lower end of what was swept at B = 8 to its upper end at 512."""
    rng = np.random.default_rng(6)
    runs = planted(rng)
    rates = {name: math.exp(rng.uniform(0, math.log(8))) for name in np.unique(runs["curve"])}
    rate_R = np.array([rates[name] for name in runs["curve"]])
    loss_R = runs["loss"] + 0.02 * (np.log(rate_R) - 0.5 * np.log(runs["batch"] / 8)) ** 2
    columns = {**runs.columns, "rate": rate_R, "loss": loss_R}
    fit = fit_joint(replace(runs, columns=columns, settings=("share", "rate")))
    for batch, best in ((8.0, 0), (512.0, 1)):
        ends = ends_of(fit, "rate", 1e17, math.log(best_size(1e17)), batch)
        rises = (ends.low_rise, ends.high_rise)
        assert rises[best].high < 0.03 < rises[1 - best].low, batch
        assert ends.falls_towards == ("low", "high")[best]


def test_noise_of_trials_and_rows_is_told_apart():
    shares = []
    for seed in range(6):
        fit = fit_joint(planted(np.random.default_rng(seed), trials=150, sd=0.01, shared=0.5))
        errors, variance = fit.problem.errors, fit.problem.variance
        shares.append(errors.trial / (1 + errors.trial))
        assert math.sqrt(variance * (1 + errors.trial)) == pytest.approx(0.01, rel=0.2)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.1)


def test_intervals_hold_the_exponent_where_the_better_half_went_on():
    held, widths = [], []
    for seed in range(12):
        runs = planted(np.random.default_rng(seed), sd=0.01, shared=0.5, chosen=True)
        found = optima_of(fit_joint(runs), runs).size.exponent()
        held.append(found.low <= EXPONENT <= found.high)
        widths.append(found.high - found.low)
    assert sum(held) >= 10
    assert np.median(widths) < 0.1


def test_a_law_that_does_not_hold_is_followed_and_doubted():
    straight, bent = (fit_joint(planted(np.random.default_rng(7), bend=bend)) for bend in (0.0, 0.1))
    size = straight.problem.variance * straight.problem.errors.miss
    assert bent.problem.variance * bent.problem.errors.miss > 100 * size
    rows = planted(np.random.default_rng(8), bend=0.1, trials=40)
    loss_R, half_R = bent.predict(columns_of(rows))
    assert np.mean(np.abs(loss_R - rows["loss"]) <= half_R) > 0.85
    assert np.median(half_R) < 0.02


def test_a_run_far_away_is_foretold_with_its_interval():
    held = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        fit = fit_joint(planted(rng, chosen=True))
        flops, batch = 1e19, 8.0
        params = best_size(flops, 1 + batch / CRITICAL)
        events = flops / 6 / params
        share = BEST_SHARE * (flops / 1e16) ** SHARE_POWER
        truth = E + A / params**ALPHA + B / (events / (1 + batch / CRITICAL)) ** BETA
        values = {"params": params, "events": events, "flops": flops, "share": share, "batch": batch}
        (loss,), (half,) = fit.predict({name: np.array([value]) for name, value in values.items()})
        held.append(abs(loss - truth - 0.003 * rng.standard_normal()) <= half)
        assert half < 0.02
    assert sum(held) >= 10


def test_too_few_rows_are_refused_with_how_many_are_needed():
    runs = planted(np.random.default_rng(9), trials=80)
    with pytest.raises(UserError, match="15 rows for 8 parameters"):
        fit_joint(runs.select(np.arange(15)))


def test_gross_outliers_count_little():
    runs = planted(np.random.default_rng(10))
    clean = optima_of(fit_joint(runs), runs).size.exponent()
    loss_R = runs["loss"].copy()
    loss_R[[3, 70, 140]] += [0.5, 2.0, -0.3]
    spoilt = replace(runs, columns={**runs.columns, "loss": loss_R})
    fit = fit_joint(spoilt)
    assert set(np.flatnonzero(fit.problem.weight_R < 0.5)) == {3, 70, 140}
    found = optima_of(fit, spoilt).size.exponent()
    assert found.estimate == pytest.approx(clean.estimate, abs=(clean.high - clean.low) / 4)
    assert found.high - found.low < 1.5 * (clean.high - clean.low)


def test_a_skewed_bowl_does_not_move_the_best_size():
    held = []
    for seed in range(8):
        runs = planted(np.random.default_rng(seed), steep=0.4, chosen=True)
        found = optima_of(fit_joint(runs), runs).size.exponent()
        held.append(found.low <= EXPONENT <= found.high)
    assert sum(held) >= 7


def test_what_a_step_costs_does_not_grow_beyond_where_its_axis_was_swept():
    """Rows at 0 are better by more and more: a prediction takes no more of it than the largest C with others shows."""
    rng = np.random.default_rng(7)
    runs = planted(rng)
    off_R = rng.random(len(runs)) < 0.4
    gain_R = 0.02 * (runs["flops"] / 1e15) ** 0.2
    columns = {**runs.columns, "share": np.where(off_R, 0.0, runs["share"]), "loss": runs["loss"] - off_R * gain_R}
    fit = fit_joint(replace(runs, columns=columns))
    span = fit.problem.places.spans["share"]
    assert fit.theta_P[span][-1] < 0 < fit.theta_P[span][GROWTH]
    flops = np.array([1e17, 1e18, 1e22])
    at = {name: np.full(3, float(runs[name].mean())) for name in ("params", "events", "batch")}
    gained_3, _ = fit.frame.places({**at, "flops": flops, "share": np.zeros(3)}).axes["share"].mean(fit.theta_P[span])
    assert gained_3[1] < gained_3[0] < 0
    assert gained_3[2] == gained_3[1] == pytest.approx(-0.02 * 1e3**0.2, rel=0.3)
