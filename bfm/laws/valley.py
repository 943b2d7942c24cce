"""A valley of two power laws told from its lowest point, and the valleys of several budgets at once.

At fixed C a two-term law L = E + A/N^alpha + B/D^beta with D = C/(kappa N) is, in u = log N - log N*,

    L = c + h rise(u),   rise(u) = 2/(alpha + beta) ((exp(-alpha u) - 1)/alpha + (exp(beta u) - 1)/beta) = u^2 + O(u^3):

a parabola (alpha, beta -> 0; Hoffmann et al. 2022, approach 2) whose sides rise at different rates. The vertex of a
plain parabola is off by about 0.1 w^2 (beta - alpha) in log N where runs lie within +-w, at any number of runs.
Budgets have their own c, h and N*; the two rates are common to all. Data that say little about the rates leave them to
a prior, log rate = log 0.3 +- 2, so that the doubt about the shape is in every interval.

Shape legend: K budgets, R runs, S shape parameters (2, or 0 for parabolas), V vertex parameters, P = 2 K + V + S.
theta_P = (c of each budget, h of each, the vertices', log alpha, log beta).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RATE = float(np.log(0.3))
_RATE_SPREAD = 2.0
_RATES = (-7.0, 3.0)
"""Log rates that a search may try; the prior leads it back."""
_STEEP = 20.0
"""Of a side's exponent: no sweep goes where it is larger, and there it goes straight on."""


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
        u_R, shape_S = self.x_R - self.vertices(theta_P)[self.budget_R], self.shape(theta_P)
        rates_S = np.exp(np.clip(shape_S, *_RATES))
        rise_R, slope_R, *by_rates = rise(u_R, *rates_S) if len(rates_S) else (u_R**2, 2 * u_R)
        own_RK = np.eye(num)[self.budget_R]
        by_vertex_RV = (-h_R * slope_R)[:, None] * self.vertices_KV[self.budget_R]
        columns = [own_RK, own_RK * rise_R[:, None], by_vertex_RV, *((h_R * by_R)[:, None] for by_R in by_rates)]
        return c_R + h_R * rise_R, np.hstack(columns)

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


def rise(off_R: np.ndarray, left: float, right: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """2 / (l + r) ((e^(-l u) - 1) / l + (e^(r u) - 1) / r) and its derivatives by u, ln l and ln r.

    u^2 + O(u^3): height and curvature hang on neither rate at the lowest point.
    """
    down_R, by_down_R, fall_R = _side(-off_R, left)
    up_R, by_up_R, climb_R = _side(off_R, right)
    scale = 2 / (left + right)
    value_R, slope_R = scale * (down_R + up_R), scale * (climb_R - fall_R)
    by_left_R = scale * by_down_R - left / (left + right) * value_R
    by_right_R = scale * by_up_R - right / (left + right) * value_R
    return value_R, slope_R, by_left_R, by_right_R


def _side(t_R: np.ndarray, rate: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """((e^(rate t) - 1) / rate, its derivative by ln rate, by t), straight on where it is too steep."""
    x_R = rate * t_R
    near_R = np.minimum(x_R, _STEEP)
    grown_R = np.expm1(near_R)
    beyond_R = np.maximum(x_R - _STEEP, 0.0)
    value_R = (grown_R + np.exp(_STEEP) * beyond_R) / rate
    slope_R = np.exp(near_R)
    return value_R, t_R * slope_R - value_R, slope_R
