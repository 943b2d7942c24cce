"""Optuna's TPE asked many times at one moment, at little more than the price of once.

Enters: axes, the points that were tried with their losses, and those that are running. Leaves: points, one per seed.
`Study.ask` copies the study and fits both densities again for every draw, though the draws of a pool differ by their
seeds alone, and inverts the normal distribution value by value in Python. Here Optuna fits the densities once, to
arrays, and they are drawn from together. The points are, rounding apart, those of a study whose multivariate TPESampler
with constant_liar is asked with the same seeds (tests/sweep/policies/test_tpe.py). Optuna's fit is no part of its
public interface: hence the narrow bounds on its version.

Shape legend: M points, X axes, S points that are drawn, K components of a mixture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator, _ParzenEstimatorParameters
from optuna.samplers._tpe.sampler import default_gamma, default_weights
from scipy.special import ndtr, ndtri

GLANCES = 24
"""Of so many points drawn from the density of good ones the likeliest to be good is taken; Optuna's own number."""
_FIT = _ParzenEstimatorParameters(
    prior_weight=1.0, consider_magic_clip=True, consider_endpoints=False, weights=default_weights, multivariate=True
)
Axes = Mapping[str, BaseDistribution]


def coordinates(axes: Axes, params: Mapping[str, Any]) -> list[float]:
    """(X,) of a point."""
    return [axis.to_internal_repr(params[name]) for name, axis in axes.items()]


def draws(
    axes: Axes, told_MX: np.ndarray, loss_M: np.ndarray, running_MX: np.ndarray, seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """A point per seed.

    `axes` are in order of their names. `told_MX` and `loss_M` are oldest first (the oldest weigh least); smaller losses
    are better, and inf is as bad as can be. What is running is held to be bad, so that draws keep away from it.
    """
    is_good_M = np.zeros(len(loss_M), dtype=bool)
    is_good_M[np.argsort(loss_M, kind="stable")[: default_gamma(len(loss_M))]] = True
    good = _Density(axes, told_MX[is_good_M])
    bad = _Density(axes, np.concatenate([told_MX[~is_good_M], running_MX]))
    drawn_XS = good.sample(seeds)
    gain_S = good.log_pdf(drawn_XS) - bad.log_pdf(drawn_XS)
    best = gain_S.reshape(len(seeds), GLANCES).argmax(1) + GLANCES * np.arange(len(seeds))
    values_XS = good.internal(drawn_XS[:, best])
    return [
        {name: axis.to_external_repr(value) for (name, axis), value in zip(axes.items(), point, strict=True)}
        for point in values_XS.T.tolist()
    ]


class _Density:
    """A mixture of products over the axes, one component per point and a wide one; log axes are held as logs."""

    def __init__(self, axes: Axes, points_MX: np.ndarray) -> None:
        columns = dict(zip(axes, points_MX.T, strict=True))
        mixture = _ParzenEstimator(columns, dict(axes), _FIT)._mixture_distribution
        self._weight_K, self._axes = mixture.weights, mixture.distributions

    def sample(self, seeds: Sequence[int]) -> np.ndarray:
        """(X, S): GLANCES points per seed."""
        rngs = [np.random.RandomState(seed) for seed in seeds]
        count = len(self._weight_K)
        of_S = np.concatenate([rng.choice(count, p=self._weight_K, size=GLANCES) for rng in rngs])
        share_XS = np.concatenate([rng.random_sample((len(self._axes), GLANCES)) for rng in rngs], axis=1)
        # Optuna draws for choices first.
        order = sorted(range(len(self._axes)), key=lambda axis: not _is_choice(self._axes[axis]))
        drawn_XS = np.empty_like(share_XS)
        for axis, share_S in zip(order, share_XS, strict=True):
            drawn_XS[axis] = _values(self._axes[axis], of_S, share_S)
        return drawn_XS

    def log_pdf(self, drawn_XS: np.ndarray) -> np.ndarray:
        """(S,), up to a constant that depends on the axes alone."""
        log_SK = np.log(self._weight_K) + sum(
            _log_pdf(axis, values_S) for axis, values_S in zip(self._axes, drawn_XS, strict=True)
        )
        most_S = log_SK.max(1)
        total_S: np.ndarray = most_S + np.log(np.exp(log_SK - most_S[:, None]).sum(1))
        return total_S

    def internal(self, drawn_XS: np.ndarray) -> np.ndarray:
        """As Optuna holds them."""
        is_log_X = [not _is_choice(axis) and axis.is_log for axis in self._axes]
        return np.where(np.array(is_log_X)[:, None], np.exp(drawn_XS), drawn_XS)


def _is_choice(axis: Any) -> bool:
    return hasattr(axis, "weights")


def _values(axis: Any, of_S: np.ndarray, share_S: np.ndarray) -> np.ndarray:
    """Where components have so much of their probability below."""
    if _is_choice(axis):
        below_SC = np.cumsum(axis.weights[of_S], axis=1)[:, :-1]
        return np.asarray((below_SC < share_S[:, None]).sum(1))
    mu_S, sigma_S, low, high = axis.mu[of_S], axis.sigma[of_S], axis.adapted_low, axis.adapted_high
    first_S, last_S = ndtr((low - mu_S) / sigma_S), ndtr((high - mu_S) / sigma_S)
    value_S = np.clip(mu_S + sigma_S * ndtri(first_S + share_S * (last_S - first_S)), low, high)
    if axis.step:
        value_S = np.clip(axis.low + np.round((value_S - axis.low) / axis.step) * axis.step, axis.low, axis.high)
    return value_S


def _log_pdf(axis: Any, value_S: np.ndarray) -> np.ndarray:
    """(S, K)."""
    if _is_choice(axis):
        return np.log(axis.weights[:, value_S.astype(int)].T)
    mass_K = ndtr((axis.adapted_high - axis.mu) / axis.sigma) - ndtr((axis.adapted_low - axis.mu) / axis.sigma)
    apart_SK = np.abs(value_S[:, None] - axis.mu) / axis.sigma
    if not axis.step:
        return np.asarray(-0.5 * apart_SK**2 - np.log(axis.sigma * mass_K))
    half_K = 0.5 * axis.step / axis.sigma
    inside_SK = ndtr(half_K - apart_SK) - ndtr(-half_K - apart_SK)
    return np.log(np.maximum(inside_SK, np.finfo(float).tiny)) - np.log(mass_K)
