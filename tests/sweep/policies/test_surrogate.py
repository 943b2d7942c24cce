"""The surrogate against a dense Gaussian process written out here, Monte Carlo, and what units must not change."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bfm.sweep.policies.surrogate import Places, Prediction, Surrogate, draw_hypotheses

CENTER = 20.0


def places(count, seed, trials=None):
    """Points of a space with one axis beside log N and one choice; a trial is one configuration at several C."""
    rng = np.random.default_rng(seed)
    ids = np.arange(count) % (trials or count)
    numbers, codes = rng.normal(size=(count, 2))[ids], rng.integers(0, 3, (count, 1))[ids]
    return Places(numbers, codes, CENTER + rng.uniform(-3, 3, count), ids + 1000 * seed)


def planted(points):
    size, flops = points.numbers_MX[:, 0], points.log_flops_M - CENTER
    return 3.0 - 0.2 * flops + 0.3 * (size - 0.4 * flops) ** 2 + 0.1 * points.codes_MG[:, 0]


def fitted(rows, loss, hypotheses=None, frontier=None):
    frontier = np.full(len(loss), np.max(loss)) if frontier is None else frontier
    return Surrogate(rows, loss, frontier, CENTER, hypotheses or draw_hypotheses())


def brute_force(rows, loss, doubt, points, h):
    """Mean and variance of a GP whose covariance is written out pair by pair, and its log evidence."""

    def features(numbers, codes, log_flops):
        n, f = numbers[0], (log_flops - CENTER) / 1.5
        found = [(1.0, 3.0), (n, 1.0), (f, 1.0), (n * n, 1.0), (n * f, 1.0), (f * f, 1.0)]
        for other in numbers[1:]:
            found += [(other, 0.3), (other * other, 0.3), (other * np.exp(-0.5 * f), 0.15)]
        for code in codes:
            for level in range(8):
                found += [((code == level) * 1.0, 0.3), ((code == level) * np.exp(-0.5 * f), 0.15)]
        return found

    def covariance(a, i, b, j):
        left = features(a.numbers_MX[i], a.codes_MG[i], a.log_flops_M[i])
        right = features(b.numbers_MX[j], b.codes_MG[j], b.log_flops_M[j])
        total = sum(x * y * sd**2 for (x, sd), (y, _) in zip(left, right, strict=True))
        apart = np.sum((a.numbers_MX[i] - b.numbers_MX[j]) ** 2) + np.sum(a.codes_MG[i] != b.codes_MG[j])
        flops = (a.log_flops_M[i] - b.log_flops_M[j]) ** 2
        total += h.s_shared**2 * np.exp(-apart / (2 * h.l_axes**2) - flops / (2 * h.l_flops**2))
        if a.ids_M[i] == b.ids_M[j]:
            total += h.s_own**2 * np.exp(-flops / (2 * 3.0**2))
        return total

    def matrix(a, b):
        return np.array([[covariance(a, i, b, j) for j in range(len(b))] for i in range(len(a))])

    location = np.median(loss)
    spread = np.quantile(np.abs(loss - location), 0.6)
    residual = (loss - location) / spread
    noisy = matrix(rows, rows) + np.diag(h.s_noise**2 + (0.3 * doubt / spread) ** 2)
    inverse = np.linalg.inv(noisy)
    cross = matrix(points, rows)
    mean = location + spread * cross @ inverse @ residual
    variance = spread**2 * np.diag(matrix(points, points) - cross @ inverse @ cross.T)
    evidence = -0.5 * residual @ inverse @ residual - 0.5 * np.linalg.slogdet(noisy)[1]
    return mean, variance, evidence


@pytest.mark.parametrize("number", [0, 7, 20])
def test_one_hypothesis_is_a_dense_gaussian_process(number):
    h = draw_hypotheses()[number]
    rows, points = places(14, 1, trials=6), places(6, 2)
    # One point is a trial of the rows, at another C.
    points.numbers_MX[0], points.codes_MG[0], points.ids_M[0] = rows.numbers_MX[0], rows.codes_MG[0], rows.ids_M[0]
    loss = planted(rows) + np.random.default_rng(3).normal(0, 0.05, len(rows))
    frontier = np.full(len(rows), np.median(loss))
    got = fitted(rows, loss, (h,), frontier).predict(points)
    mean, variance, _ = brute_force(rows, loss, np.maximum(0, loss - frontier), points, h)
    assert got.mean_M == pytest.approx(mean, rel=1e-5, abs=1e-6)
    assert got.sd_M**2 == pytest.approx(variance, rel=1e-3, abs=1e-8)


def test_hypotheses_are_weighed_by_their_evidence():
    hypotheses = draw_hypotheses()[:3]
    rows, points = places(8, 1), places(3, 2)
    loss = planted(rows)
    parts = [brute_force(rows, loss, np.zeros(len(rows)), points, h) for h in hypotheses]
    weight = np.exp([part[2] - max(p[2] for p in parts) for part in parts])
    weight = np.where(weight / weight.sum() >= 1e-3, weight, 0)
    mean = sum(w * part[0] for w, part in zip(weight / weight.sum(), parts, strict=True))
    model = fitted(rows, loss, hypotheses)
    assert model.predict(points).mean_M == pytest.approx(mean, rel=1e-5)
    best = int(np.argmax(weight))
    assert model.likely[0] == hypotheses[best]
    assert model.predict(points, hypotheses=1).mean_M == pytest.approx(parts[best][0], rel=1e-5)


def test_hypotheses_lie_in_the_prior_and_are_always_the_same():
    drawn = draw_hypotheses()
    assert drawn == draw_hypotheses()
    assert len(set(drawn)) == 32
    assert all(0.7 <= h.l_axes <= 4.2 and 0.005 <= h.s_own <= 0.06 and 0.002 <= h.s_noise <= 0.03 for h in drawn)
    assert max(h.l_axes for h in drawn) > 3 * min(h.l_axes for h in drawn)


def test_rows_at_the_frontier_are_interpolated_and_unseen_points_predicted():
    rows, new = places(40, 1), places(30, 2)
    loss = planted(rows)
    model = fitted(rows, loss)
    assert np.abs(model.predict(rows).mean_M - loss).max() < 0.05 * model.spread
    guess = model.predict(new)
    error = np.abs(guess.mean_M - planted(new))
    assert np.median(error) < 0.1 * loss.std()
    assert (error < 4 * guess.sd_M).mean() > 0.9
    # Farther from the rows it is less sure.
    far = Places(new.numbers_MX + 8, new.codes_MG, new.log_flops_M, new.ids_M)
    assert model.predict(far).sd_M.min() > guess.sd_M.max()


def test_rows_far_above_the_frontier_hardly_move_predictions():
    rows, points = places(25, 1), places(10, 2)
    loss = planted(rows)
    frontier = loss.copy()
    # A run whose loss jumps at C's where nothing else is known to be that bad.
    odd = loss.copy()
    odd[4] += 8 * loss.std()
    clean = fitted(rows, loss, frontier=frontier).predict(points).mean_M
    doubted = fitted(rows, odd, frontier=frontier).predict(points).mean_M
    believed = fitted(rows, odd, frontier=odd).predict(points).mean_M
    assert np.abs(doubted - clean).max() < 0.25 * np.abs(believed - clean).max()


def test_improvement_and_probability_equal_monte_carlo():
    rng = np.random.default_rng(0)
    mixture = Prediction(
        np.array([[1.0, 2.0, 0.5], [1.5, 1.2, 0.4]]),
        np.array([[0.3, 0.8, 0.01], [0.1, 0.5, 0.2]]),
        np.array([0.3, 0.7]),
    )
    which = (rng.random(400_000) > 0.3).astype(int)
    for point in range(3):
        draws = rng.normal(mixture.mean_HM[which, point], mixture.sd_HM[which, point])
        for best in (0.45, 1.0, 1.6):
            gains = np.maximum(0, best - draws)
            error = 5 * gains.std() / np.sqrt(len(draws)) + 1e-9
            assert mixture.improvement_M(best)[point] == pytest.approx(gains.mean(), abs=error)
            assert mixture.below_M(best)[point] == pytest.approx((draws <= best).mean(), abs=0.004)
        assert mixture.mean_M[point] == pytest.approx(draws.mean(), abs=0.005)
        assert mixture.sd_M[point] == pytest.approx(draws.std(), rel=0.01)


def test_the_same_rows_give_the_same_answer():
    rows, points = places(20, 1, trials=9), places(9, 2)
    first, second = (fitted(rows, planted(rows)).predict(points) for _ in range(2))
    assert np.array_equal(first.mean_HM, second.mean_HM)
    assert np.array_equal(first.sd_HM, second.sd_HM)
    assert np.array_equal(first.weight_H, second.weight_H)


@given(shift=st.floats(-100, 100), scale=st.floats(0.01, 100), seed=st.integers(1, 50), count=st.integers(3, 12))
@settings(max_examples=25, deadline=None)
def test_units_of_the_loss_mean_nothing(shift, scale, seed, count):
    rows, points = places(count, seed), places(4, seed + 100)
    loss = planted(rows) + np.random.default_rng(seed).normal(0, 0.1, count)
    frontier = np.full(count, np.quantile(loss, 0.3))
    hypotheses = draw_hypotheses()[:8]
    plain = fitted(rows, loss, hypotheses, frontier).predict(points)
    other = fitted(rows, scale * loss + shift, hypotheses, scale * frontier + shift).predict(points)
    assert other.mean_M == pytest.approx(scale * plain.mean_M + shift, rel=1e-4, abs=1e-4 * scale)
    assert other.sd_M == pytest.approx(scale * plain.sd_M, rel=1e-3)
    assert other.improvement_M(scale * 3 + shift) == pytest.approx(scale * plain.improvement_M(3.0), rel=1e-2, abs=1e-6)


def test_one_row_and_equal_losses_are_no_special_case():
    for count in (1, 5):
        model = fitted(places(count, 1), np.full(count, 2.5))
        assert model.spread > 0
        guess = model.predict(places(3, 2))
        assert np.isfinite(guess.mean_M).all()
        assert (guess.sd_M > 0).all()


def test_a_glance_is_roughly_what_the_likeliest_hypothesis_says():
    rows, new = places(60, 1), places(400, 2)
    loss = planted(rows) + np.random.default_rng(3).normal(0, 0.02, len(rows))
    model = fitted(rows, loss)
    glanced, whole = model.glance(new), model.predict(new, hypotheses=1)
    assert glanced.mean_M == pytest.approx(whole.mean_M, abs=1e-3 * model.spread)
    assert np.median(np.abs(np.log(glanced.sd_M / whole.sd_M))) < 0.1
    # Of few points all are looked at.
    few = new.take(np.arange(5))
    assert model.glance(few).sd_M == pytest.approx(model.predict(few, hypotheses=1).sd_M)


def test_numpy_has_one_thread_however_many_cores_there_are():
    code = "import bfm.sweep.policies.surrogate, os; print(len(os.listdir('/proc/self/task')))"
    unset = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    assert int(subprocess.check_output([sys.executable, "-c", code], env=environment)) == 1
