"""What a metric will be at (configuration, C), with uncertainty, from the rows seen so far.

Enters: rows as coordinates, log C and a loss (smaller is better). Leaves: normal mixtures at other coordinates.

The mean is the iso-FLOP law in log form: a parabola in log N whose vertex moves with log C, linear in its coefficients
(Hoffmann et al. 2022, approach 2), with parabolas along the other numeric axes and offsets of choices; differences may
shrink like a power of C, stay, or both. What it misses is a Gaussian process over all axes, plus one along log C for
each configuration of its own: so curves of like models resemble each other, and may cross. A handful of hypotheses
about the scales of these processes is drawn once from the prior; the rows weigh them by evidence instead of an
optimiser picking one.

Rows far above the frontier at their C are believed only roughly: that a model is bad is known, how bad is of no use,
and the steep beginnings of curves follow no parabola.

Shape legend: M rows or points, X numeric axes (log N first), G axes of choices, P coefficients, H hypotheses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.linalg.lapack import dtrtrs
from scipy.spatial.distance import cdist
from scipy.special import ndtr
from scipy.stats import qmc

HYPOTHESES = 32
MAX_ROWS = 192
_KEPT_WEIGHT = 1e-3
_DOUBT = 0.3
"""Standard error of a row per unit that it lies above the frontier at its C."""
_FLOPS_SPREAD = 1.5
"""Unit of log C in the parabola; about a factor of 4.5."""
_FADING = 0.5
"""What shrinks of the differences between settings does so like C to the power of minus a third."""
_OWN_FLOPS_SCALE = 3.0
_GLANCED_SDS = 96
_MAX_LEVELS = 8
"""So many values of a choice have offsets of their own; further ones differ by the processes alone."""
# Ranges of the prior, in units of the losses' spread (s_) or of standardised axes (l_): log-uniform from low to high.
_PRIOR = {
    "l_axes": (0.7, 4.2),
    "l_flops": (1.0, 6.0),
    "s_shared": (0.03, 0.3),
    "s_own": (0.005, 0.06),
    "s_noise": (0.002, 0.03),
}


@dataclass(frozen=True)
class Places:
    """Points of the domain: M configurations at M values of log C."""

    numbers_MX: np.ndarray
    codes_MG: np.ndarray
    log_flops_M: np.ndarray
    ids_M: np.ndarray
    """Equal exactly where the configuration (and seed) is the same."""

    def __len__(self) -> int:
        return len(self.log_flops_M)

    def take(self, index: np.ndarray | slice) -> Places:
        """Some of the points."""
        return Places(self.numbers_MX[index], self.codes_MG[index], self.log_flops_M[index], self.ids_M[index])

    def and_also(self, other: Places) -> Places:
        """These, then others."""
        return Places(
            np.concatenate([self.numbers_MX, other.numbers_MX]),
            np.concatenate([self.codes_MG, other.codes_MG]),
            np.concatenate([self.log_flops_M, other.log_flops_M]),
            np.concatenate([self.ids_M, other.ids_M]),
        )


@dataclass(frozen=True)
class Prediction:
    """A mixture of normals per point."""

    mean_HM: np.ndarray
    sd_HM: np.ndarray
    weight_H: np.ndarray

    @property
    def mean_M(self) -> np.ndarray:
        """Expected loss."""
        return self.weight_H @ self.mean_HM

    @property
    def sd_M(self) -> np.ndarray:
        """Standard deviation of the mixture."""
        second_M = self.weight_H @ (self.sd_HM**2 + self.mean_HM**2)
        return np.sqrt(np.maximum(second_M - self.mean_M**2, 0.0))

    def improvement_M(self, best: float) -> np.ndarray:
        """Expected amount by which a point's loss falls below `best`."""
        z_HM = (best - self.mean_HM) / self.sd_HM
        density_HM = np.exp(-0.5 * z_HM**2) / np.sqrt(2 * np.pi)
        return self.weight_H @ (self.sd_HM * (z_HM * ndtr(z_HM) + density_HM))

    def below_M(self, bound: float) -> np.ndarray:
        """Probability that a point's loss is at most `bound`."""
        return self.weight_H @ ndtr((bound - self.mean_HM) / self.sd_HM)


@dataclass(frozen=True)
class _Hypothesis:
    l_axes: float
    l_flops: float
    s_shared: float
    s_own: float
    s_noise: float


@dataclass(frozen=True)
class _Posterior:
    hypothesis: _Hypothesis
    factor: tuple[np.ndarray, bool]
    alpha_M: np.ndarray
    log_evidence: float


def draw_hypotheses(count: int = HYPOTHESES) -> tuple[_Hypothesis, ...]:
    """Fixed quasi-random draws from the prior."""
    unit_HK = qmc.Sobol(len(_PRIOR), scramble=True, rng=0).random(count)
    low_K, high_K = np.log(np.array(list(_PRIOR.values()))).T
    return tuple(_Hypothesis(*row) for row in np.exp(low_K + unit_HK * (high_K - low_K)))


class Surrogate:
    """The posterior after some rows.

    Args:
        rows: where they were measured.
        loss_M: their finite losses.
        frontier_M: the best loss known at each row's C.
        center_log_flops: middle of the ladder.
        hypotheses: those to weigh; a few that were found likely before make it faster.
    """

    def __init__(
        self,
        rows: Places,
        loss_M: np.ndarray,
        frontier_M: np.ndarray,
        center_log_flops: float,
        hypotheses: tuple[_Hypothesis, ...],
    ) -> None:
        self._rows, self._center = rows, center_log_flops
        self.location = float(np.median(loss_M))
        spread = float(np.quantile(np.abs(loss_M - self.location), 0.6))
        self.spread = spread if spread > 0 else max(abs(self.location) * 0.1, 1e-9)
        doubt_M = _DOUBT * np.maximum(0.0, loss_M - frontier_M) / self.spread
        residual_M = (loss_M - self.location) / self.spread
        self._scaled_MP = trend(rows, self._center)
        between = _Between(rows, rows)
        linear_MM = self._scaled_MP @ self._scaled_MP.T
        fits = [_fit(h, between.kernel(h) + linear_MM, doubt_M, residual_M) for h in hypotheses]
        evidence_H = np.array([fit.log_evidence for fit in fits])
        weight_H = np.exp(evidence_H - evidence_H.max())
        weight_H /= weight_H.sum()
        kept = np.flatnonzero(weight_H >= _KEPT_WEIGHT)
        self._fits = [fits[place] for place in kept]
        self._weight_H = weight_H[kept] / weight_H[kept].sum()

    @property
    def likely(self) -> tuple[_Hypothesis, ...]:
        """The hypotheses that the rows leave, most likely first."""
        return tuple(self._fits[place].hypothesis for place in np.argsort(-self._weight_H, kind="stable"))

    @property
    def noise(self) -> float:
        """Standard error of a row at the frontier, in units of the loss."""
        return self.spread * float(
            sum(w * fit.hypothesis.s_noise for w, fit in zip(self._weight_H, self._fits, strict=True))
        )

    def predict(self, points: Places, hypotheses: int | None = None) -> Prediction:
        """Losses (without a new measurement's noise) at points; by all that are left, or so many of the likeliest."""
        order = np.argsort(-self._weight_H, kind="stable")[:hypotheses]
        weight_H = self._weight_H[order] / self._weight_H[order].sum()
        scaled_MP = trend(points, self._center)
        between = _Between(points, self._rows)
        linear = scaled_MP @ self._scaled_MP.T
        prior_M = (scaled_MP**2).sum(1)
        means, sds = [], []
        for fit in (self._fits[place] for place in order):
            h = fit.hypothesis
            cross = between.kernel(h)
            cross += linear
            means.append(cross @ fit.alpha_M)
            # Without solve_triangular's copies and checks, which cost as much as the solving.
            whitened, _ = dtrtrs(fit.factor[0], cross.T, lower=1, overwrite_b=1)
            variance_M = h.s_shared**2 + h.s_own**2 + prior_M - np.einsum("ij,ij->j", whitened, whitened)
            sds.append(np.sqrt(np.maximum(variance_M, 1e-10)))
        return Prediction(self.location + self.spread * np.array(means), self.spread * np.array(sds), weight_H)

    def glance(self, points: Places) -> Prediction:
        """Roughly what `predict` says by the likeliest hypothesis alone, for very many points.

        Means are in single precision and without a configuration's own process; standard deviations are those of the
        nearest of _GLANCED_SDS points of the same kind (configurations with an id, and those without).
        """
        fit = self._fits[int(np.argmax(self._weight_H))]
        h = fit.hypothesis
        near = _roughly_near(points, self._rows, h)
        mean_M = np.exp(near, out=near) @ (h.s_shared**2 * fit.alpha_M).astype(np.float32)
        mean_M = mean_M + trend(points, self._center) @ (self._scaled_MP.T @ fit.alpha_M)
        some = points.take(np.unique(np.linspace(0, len(points) - 1, _GLANCED_SDS).round().astype(int)))
        nearest_M = np.zeros(len(points), dtype=int)
        for known in (True, False):
            left, right = (np.flatnonzero((places.ids_M > 0) == known) for places in (points, some))
            if len(left) and len(right):
                nearest_M[left] = right[_roughly_near(points.take(left), some.take(right), h).argmax(1)]
        sd_M = self.predict(some, hypotheses=1).sd_HM[0][nearest_M]
        return Prediction(self.location + self.spread * mean_M[None], sd_M[None], np.ones(1))


def _roughly_near(left: Places, right: Places, h: _Hypothesis) -> np.ndarray:
    """Minus half the squared distances in the scales of a hypothesis, in single precision and one multiplication."""
    middle = float(right.log_flops_M.mean())
    scaled = [np.column_stack([p.numbers_MX / h.l_axes, (p.log_flops_M - middle) / h.l_flops]) for p in (left, right)]
    lengths = [-0.5 * (coordinates**2).sum(1) for coordinates in scaled]
    ones = [np.ones(len(length)) for length in lengths]
    left_MX = np.column_stack([scaled[0], lengths[0], ones[0]]).astype(np.float32)
    right_MX = np.column_stack([scaled[1], ones[1], lengths[1]]).astype(np.float32)
    near = left_MX @ right_MX.T
    for left_M, right_M in zip(left.codes_MG.T, right.codes_MG.T, strict=True):
        near -= (left_M[:, None] != right_M) * np.float32(0.5 / h.l_axes**2)
    return near


def trend(points: Places, center_log_flops: float, steepness: float = 1.0) -> np.ndarray:
    """(M, P): parabola in log N and log C, parabolas along the other axes, offsets of choices, some of them fading.

    Each times the prior standard deviation of its coefficient, in units of the losses' spread, and the steepness.
    """
    size_M, flops_M = points.numbers_MX[:, 0], (points.log_flops_M - center_log_flops) / _FLOPS_SPREAD
    fading_M = np.exp(-_FADING * flops_M)
    columns = [(3.0, np.ones(len(points)))]
    columns += [(1.0, column_M) for column_M in (size_M, flops_M, size_M**2, size_M * flops_M, flops_M**2)]
    for other_M in points.numbers_MX[:, 1:].T:
        columns += [(0.3, other_M), (0.3, other_M**2), (0.15, other_M * fading_M)]
    for codes_M in points.codes_MG.T:
        for code in range(_MAX_LEVELS):
            chosen_M = (codes_M == code).astype(float)
            columns += [(0.3, chosen_M), (0.15, chosen_M * fading_M)]
    sd_P = np.array([sd for sd, _ in columns])
    return np.array([column_M for _, column_M in columns]).T * (steepness * sd_P)


class _Between:
    """Squared distances between two sets of points, from which the kernel of any hypothesis follows."""

    def __init__(self, left: Places, right: Places) -> None:
        self._axes = cdist(left.numbers_MX, right.numbers_MX, "sqeuclidean")
        for left_M, right_M in zip(left.codes_MG.T, right.codes_MG.T, strict=True):
            self._axes += left_M[:, None] != right_M[None]
        self._flops = (left.log_flops_M[:, None] - right.log_flops_M[None]) ** 2
        self._same = np.nonzero(left.ids_M[:, None] == right.ids_M[None])
        self._own = np.exp(-0.5 * self._flops[self._same] / _OWN_FLOPS_SCALE**2)

    def kernel(self, h: _Hypothesis) -> np.ndarray:
        """Covariance of the two processes."""
        covariance = self._axes / h.l_axes**2
        covariance += self._flops / h.l_flops**2
        covariance *= -0.5
        np.exp(covariance, out=covariance)
        covariance *= h.s_shared**2
        covariance[self._same] += h.s_own**2 * self._own
        return covariance


def _fit(h: _Hypothesis, covariance_MM: np.ndarray, doubt_M: np.ndarray, residual_M: np.ndarray) -> _Posterior:
    covariance_MM[np.diag_indices(len(residual_M))] += h.s_noise**2 + doubt_M**2
    factor = cho_factor(covariance_MM, lower=True, overwrite_a=True, check_finite=False)
    alpha_M = cho_solve(factor, residual_M, check_finite=False)
    log_evidence = -0.5 * residual_M @ alpha_M - np.log(np.diag(factor[0])).sum()
    return _Posterior(h, factor, alpha_M, float(log_evidence))
