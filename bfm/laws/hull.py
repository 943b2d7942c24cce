"""Approach 1 (Hoffmann et al. 2022) on a convex hull: the runs that no others beat, and a line through them.

Recipe of McLeish et al. 2025 (arXiv 2502.06857): the lower convex hull of log loss over log C of all points of all
curves, up to the lowest loss (a vantage point above and right of all points leaves exactly this part of the hull), then
ordinary least squares of log N and of log D on log C over its vertices, each vertex alike. Points count as they are, so
a denser reading of the same curves is another answer; and a single lucky run stays on the hull. D is the runs' own, or
C / (6 N) where they have none.

Shape legend: R runs, H vertices of the hull, B redraws, 2: N and D.
"""

from __future__ import annotations

import numpy as np

from bfm.errors import UserError
from bfm.laws.powerlaw import line
from bfm.laws.result import Estimate, LawFit
from bfm.laws.runs import Runs
from bfm.laws.transform import from_loss, to_loss, transform_name

_NAMES = ("N_exponent", "N_coefficient", "D_exponent", "D_coefficient")
_LEAST = 3
_REDRAWS = 200


def fit_hull(runs: Runs, *, seed: int = 0) -> LawFit:
    """N = N_coefficient C^N_exponent and D likewise along the hull of all runs.

    Intervals: percentiles over redraws of whole curves (column `curve`; without it, of runs), as points of one curve
    err together; `seed` is theirs. Raises UserError for one N only, and for hulls of fewer than three vertices.
    """
    runs.require("approach 1", "params", "flops", "loss")
    if len(np.unique(runs["params"])) < 2:
        what = f"all {len(runs)} runs have N = {runs['params'][0]:g}"
        raise UserError(what, file=runs.source, key="params", fix="add curves of at least 2 other sizes")
    x_R, n_R = np.log(runs["flops"]), np.log(runs["params"])
    d_R = np.log(runs["events"]) if runs.has("events") else x_R - np.log(6) - n_R
    logs_2R = np.stack([n_R, d_R])
    y_R = np.log(to_loss(runs.metric, runs["loss"]))
    hull_H = lower_hull(x_R, y_R)
    if len(hull_H) < _LEAST:
        what = f"the hull of {len(runs)} runs has {len(hull_H)} vertices, and a line needs {_LEAST}"
        raise UserError(what, file=runs.source, fix="add curves of smaller and larger models over a wider range of C")
    estimate_4 = _parameters(x_R, logs_2R, hull_H)
    # As texts: their order decides which curves a seed draws.
    curve_R = runs.curves_R.astype(str)
    draws_B4 = _redraw(x_R, y_R, logs_2R, curve_R, np.random.default_rng(seed))
    curves = len(np.unique(curve_R))
    return LawFit(
        law="hull",
        metric=runs.metric,
        parameters=_estimates(estimate_4, draws_B4),
        definitions={
            **runs.definitions,
            "fitted": f"log of {transform_name(runs.metric)}",
            "D_exponent": "of D = D_coefficient C^D_exponent; D is "
            + ("the runs' own" if runs.has("events") else "C / (6 N)"),
        },
        runs=len(runs),
        interval_method=f"percentiles of {len(draws_B4)} bootstraps over {curves} curves",
        warnings=runs.warnings + _doubts(runs, hull_H, curves, len(draws_B4)),
        details={
            "hull": [
                {
                    "run": runs.names[place],
                    "flops": float(runs["flops"][place]),
                    "params": float(runs["params"][place]),
                    "events": float(np.exp(d_R[place])),
                    "value": from_loss(runs.metric, float(np.exp(y_R[place]))),
                }
                for place in hull_H
            ]
        },
    )


def lower_hull(x_R: np.ndarray, y_R: np.ndarray) -> np.ndarray:
    """Places of the lower convex hull's vertices, ascending in x, up to the lowest y; (H,)."""
    hull: list[int] = []
    for place in np.lexsort((y_R, x_R)):
        while len(hull) > 1 and _left_turn(x_R, y_R, hull[-2], hull[-1], place) <= 0:
            hull.pop()
        if len(hull) == 1 and x_R[place] == x_R[hull[0]]:
            continue
        hull.append(int(place))
    hull_H = np.array(hull)
    return hull_H[: int(np.argmin(y_R[hull_H])) + 1]


def _left_turn(x_R: np.ndarray, y_R: np.ndarray, first: int, middle: int, last: int) -> float:
    along, rise = x_R[middle] - x_R[first], y_R[middle] - y_R[first]
    return float(along * (y_R[last] - y_R[first]) - rise * (x_R[last] - x_R[first]))


def _parameters(x_R: np.ndarray, logs_2R: np.ndarray, hull_H: np.ndarray) -> np.ndarray:
    """Exponent and log coefficient of N, then of D, (4,)."""
    return np.array([weights_H @ log_R[hull_H] for log_R in logs_2R for weights_H in line(x_R[hull_H])])


def _redraw(
    x_R: np.ndarray, y_R: np.ndarray, logs_2R: np.ndarray, curve_R: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Parameters of redrawn curves, (B, 4); draws whose hull is too short for a line are left out."""
    # No point inside its own curve's hull can be on a hull of several curves.
    members = [np.flatnonzero(curve_R == name) for name in np.unique(curve_R)]
    members = [places[lower_hull(x_R[places], y_R[places])] for places in members]
    draws = []
    for _ in range(_REDRAWS):
        chosen = np.unique(rng.integers(len(members), size=len(members)))
        places = np.concatenate([members[number] for number in chosen])
        hull_H = places[lower_hull(x_R[places], y_R[places])]
        if len(hull_H) >= _LEAST:
            draws.append(_parameters(x_R, logs_2R, hull_H))
    return np.array(draws).reshape(-1, 4)


def _estimates(estimate_4: np.ndarray, draws_B4: np.ndarray) -> dict[str, Estimate]:
    values = map(Estimate.of_draws, estimate_4.tolist(), draws_B4.T)
    return {
        name: value.exp() if name.endswith("coefficient") else value for name, value in zip(_NAMES, values, strict=True)
    }


def _doubts(runs: Runs, hull_H: np.ndarray, curves: int, kept: int) -> tuple[str, ...]:
    found = []
    sizes = len(np.unique(runs["params"][hull_H]))
    if sizes < _LEAST:
        found.append(f"only {sizes} sizes are on the hull: add curves of smaller and larger models")
    if curves < 10:
        found.append(f"{curves} curves are few to redraw: the interval is likely too narrow")
    if kept < 0.9 * _REDRAWS:
        found.append(f"{_REDRAWS - kept} of {_REDRAWS} redraws left a hull too short for a line")
    return tuple(found)
