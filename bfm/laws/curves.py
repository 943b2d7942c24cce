"""Curves of the loss over log N at one C: valleys of all budgets at once, and splines through one budget's runs.

At fixed C a two-term law L = E + A/N^alpha + B/D^beta with D = C/(kappa N) is, in t = log N - log N*,

    L = c + h g(t),   g(t) = 2/(alpha + beta) ((exp(-alpha t) - 1)/alpha + (exp(beta t) - 1)/beta) = t^2 + O(t^3):

a parabola (alpha, beta -> 0; Hoffmann et al. 2022, approach 2) whose sides rise at different rates. The vertex of a
plain parabola is off by about 0.1 w^2 (beta - alpha) in log N where runs lie within +-w, at any number of runs.
Budgets have their own c, h and N*; the two rates are common to all. Data that say little about the rates leave them to
a prior, log rate = log 0.3 +- 2, so that the doubt about the shape is in every interval.

Splines (Porian et al. 2024, arXiv 2406.19146) assume no shape: Akima's, of log loss over log N. As one goes through
every run, noise moves its lowest point; so the runs are redrawn with noise of the level found in them.

Shape legend: K budgets, R runs, S shape parameters (2, or 0 for parabolas), V vertex parameters, P = 2 K + V + S,
B redraws, X places. theta_P = (c of each budget, h of each, the vertices', log alpha, log beta).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import Akima1DInterpolator

RATE = float(np.log(0.3))
_RATE_SPREAD = 2.0
_STEEP = 50.0
"""Largest exponent of a side; beyond it the valley is a wall."""
_RATES = (-7.0, 3.0)
"""Log rates that a search may try; the prior leads it back."""
_PLACES = 1000
_NEIGHBOURS = (-2, -1, 1, 2)
"""The cubic through them predicts the run in the middle."""


@dataclass(frozen=True)
class Valleys:
    """The valleys of all budgets, at the runs."""

    x_R: np.ndarray
    """log N."""
    budget_R: np.ndarray
    """Place of each run's budget, 0 to K - 1."""
    vertices_KV: np.ndarray
    """log N* of each budget = vertices_KV @ the V vertex parameters: one each, or two of a line in log C."""

    def loss(self, theta_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the loss of shape R, its derivatives of shape R x P)."""
        num = len(self.vertices_KV)
        c_R, h_R = theta_P[: 2 * num].reshape(2, -1)[:, self.budget_R]
        rise_R, slope_R, change_RS = rise(self.x_R - self.vertices(theta_P)[self.budget_R], self.shape(theta_P))
        own_RK = np.eye(num)[self.budget_R]
        by_vertex_RV = (-h_R * slope_R)[:, None] * self.vertices_KV[self.budget_R]
        jacobian_RP = np.hstack([own_RK, own_RK * rise_R[:, None], by_vertex_RV, h_R[:, None] * change_RS])
        return c_R + h_R * rise_R, jacobian_RP

    def prior(self, theta_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How far the log rates are from what is expected, in standard deviations, (S,), and the derivatives."""
        rest_S = (self.shape(theta_P) - RATE) / _RATE_SPREAD
        return rest_S, np.eye(len(rest_S), len(theta_P), len(theta_P) - len(rest_S)) / _RATE_SPREAD

    def shape(self, theta_P: np.ndarray) -> np.ndarray:
        """(log alpha, log beta), or nothing, (S,)."""
        return theta_P[2 * len(self.vertices_KV) + self.vertices_KV.shape[1] :]

    def vertices(self, theta_P: np.ndarray) -> np.ndarray:
        """log N* of each budget, (K,)."""
        num, parameters = self.vertices_KV.shape
        return self.vertices_KV @ theta_P[2 * num : 2 * num + parameters]


def rise(t_R: np.ndarray, shape_S: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(g, which is how far the loss is above its minimum at curvature 1, dg/dt, dg/dshape of shape R x S)."""
    if len(shape_S) == 0:
        return t_R**2, 2 * t_R, np.empty((len(t_R), 0))
    alpha, beta = np.exp(np.clip(shape_S, *_RATES))
    scale = 2 / (alpha + beta)
    down_R, up_R = np.minimum(-alpha * t_R, _STEEP), np.minimum(beta * t_R, _STEEP)
    left_R, right_R = np.expm1(down_R) / alpha, np.expm1(up_R) / beta
    down_R, up_R = np.exp(down_R), np.exp(up_R)
    rise_R = scale * (left_R + right_R)
    by_alpha_R = scale * (-t_R * down_R - left_R) - alpha / (alpha + beta) * rise_R
    by_beta_R = scale * (t_R * up_R - right_R) - beta / (alpha + beta) * rise_R
    return rise_R, scale * (up_R - down_R), np.stack([by_alpha_R, by_beta_R], 1)


def spline(x_R: np.ndarray, y_RB: np.ndarray, x_X: np.ndarray) -> np.ndarray:
    """Akima's spline through runs, ascending in x, at other places, (X, B)."""
    return np.asarray(Akima1DInterpolator(x_R, y_RB)(x_X))


def redraw_minima(
    x_R: np.ndarray, y_R: np.ndarray, noise: float, draws: int, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """(log N* of the spline itself and of its redraws, (1 + B,), log loss of the first); x_R ascending, at least three.

    A redraw that is lowest at the smallest or largest size has no minimum: minus or plus infinity.
    """
    y_RB = np.concatenate([y_R[:, None], y_R[:, None] + noise * rng.standard_normal((len(y_R), draws))], 1)
    x_X = np.linspace(x_R[0], x_R[-1], _PLACES)
    y_XB = spline(x_R, y_RB, x_X)
    lowest_B = np.argmin(y_XB, 0)
    minima_B = np.where(lowest_B == 0, -np.inf, np.where(lowest_B == _PLACES - 1, np.inf, x_X[lowest_B]))
    return minima_B, float(y_XB[:, 0].min())


def noise_level(curves: Sequence[np.ndarray]) -> float:
    """Robust standard deviation of log loss about cubics through four neighbours, pooled; (2, S) a curve.

    The curves' own bends count as noise. NaN where no budget has five sizes.
    """
    scaled: list[float] = []
    for x_R, y_R in curves:
        for place in range(2, len(x_R) - 2):
            others = [place + step for step in _NEIGHBOURS]
            weight_4 = [
                np.prod([(x_R[place] - x_R[m]) / (x_R[one] - x_R[m]) for m in others if m != one]) for one in others
            ]
            scaled.append((y_R[place] - weight_4 @ y_R[others]) / np.sqrt(1 + np.square(weight_4).sum()))
    return float(np.median(np.abs(scaled)) / 0.6745) if scaled else np.nan
