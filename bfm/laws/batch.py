"""Critical batch: how many steps to a target a larger batch saves, and where it stops paying.

Per group (runs of one size to one target) log steps = log(a + b / B) (Zhang et al., arXiv 2410.21676): b events are the
least that the target costs (B -> 0), a steps the fewest (B -> infinity). Two definitions of the critical batch, never
to be confused, for they differ by a factor 3 to 4:

    overhead20     the batch with 20 % more events than linear scaling from a reference batch: b / (5 a) + 1.2 B_ref
    gain-halving   b / a (McCandlish et al., arXiv 1812.06162): twice the least events, twice the fewest steps

Fitted in (m, q) with a = e^m (1 + q) / 2, b = e^m (1 - q) B_0 / 2: e^m are the steps at B_0, the geometric middle of
the batches, and q passes smoothly through a = 0 (q = -1: no batch of the table saturates) and b = 0 (q = 1: all do),
where b / a is infinite or 0. All groups share one noise, times the runs' relative errors where `errors["steps"]` has
them.

Shape legend: G groups, P parameters (m, q of each group in turn), R runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bfm.errors import UserError
from bfm.laws.powerlaw import line
from bfm.laws.result import UNKNOWN, Estimate, LawFit
from bfm.laws.robust import METHOD, RobustFit, coordinate, robust_fit
from bfm.laws.runs import Runs, levels

MIN_BATCHES = 4
"""Distinct batches of a group: a and b are its own, two are left to judge them."""
_REFERENCE = 4.0
"""Two doublings above the smallest batch, where scaling is still all but linear: 256 in Zhang et al.'s tables."""
_KEYS = ("params", "target", "budget")
_LEAST = 1e-12
_EDGE = 1e-4


@dataclass(frozen=True)
class _Group:
    """Runs of one size to one target."""

    label: str
    key: Mapping[str, float]
    batch_R: np.ndarray
    places_R: np.ndarray
    """Of its runs among those of the fit."""

    @property
    def middle(self) -> float:
        return math.sqrt(float(self.batch_R.min() * self.batch_R.max()))


def fit_batch(runs: Runs, *, reference_batch: float | None = None) -> LawFit:
    """Critical batch of each group and its power law in N.

    Needs the columns batch and steps to a target, or events to it in the unit of batch; groups are runs of equal params
    (within 2 %), target and budget, as far as the table has them, with at least 4 batches. `reference_batch` is B_ref
    of overhead20 (default: 4 times the smallest batch of all groups, 256 in the paper's tables); a small one is nearer
    to linear scaling. Parameters: `overhead20[GROUP]` and `gain_halving[GROUP]` in the unit of batch, and,
    with two sizes or more, cbs_exponent and cbs_coefficient of overhead20 = coefficient * N^exponent, by least squares
    of logs over the groups (N in the table's unit), and those of gain-halving. `details["groups"]` holds a, b and the
    tested batches. Raises UserError that says which runs are missing.
    """
    runs.require("critical batch", "batch", "events" if runs.has("events") else "steps")
    kept, groups, warnings = _groups(runs)
    reference = _REFERENCE * min(float(group.batch_R.min()) for group in groups)
    reference = reference if reference_batch is None else reference_batch
    fit = _fit(kept, groups)
    parameters: dict[str, Estimate] = {}
    details: list[dict[str, Any]] = []
    values: dict[str, list[Estimate]] = {"overhead20": [], "gain_halving": []}
    for place, group in enumerate(groups):
        q = fit.region.interval(coordinate(2 * place + 1))
        for name in values:
            value = q.through_falling(partial(_critical, name, group, reference))
            if value.high == math.inf and value.low <= _critical(name, group, reference, 1.0):
                # From the least that it can be to no end: the runs say nothing of it.
                value = UNKNOWN.exp()
            values[name].append(value)
            parameters[f"{name}[{group.label}]"] = value
        warnings += _doubts(group, q.estimate, values["overhead20"][-1])
        details.append(_describe(fit.theta_P[2 * place : 2 * place + 2], group))
    for name, prefix in (("overhead20", "cbs"), ("gain_halving", "gain_halving")):
        law, notes = _power_law(fit, groups, name, values[name], reference)
        parameters |= {f"{prefix}_{part}": value for part, value in law.items()}
        warnings += notes
    return LawFit(
        law="batch",
        metric=runs.metric,
        parameters=parameters,
        definitions={**runs.definitions, **_definitions(reference)},
        runs=len(kept),
        interval_method=f"{METHOD}; one noise for all groups",
        objective=fit.objective,
        objective_name=f"sum of Huber losses of log steps, delta {fit.delta:.3g}",
        residuals=tuple(fit.residual_R.tolist()),
        outliers=fit.outliers(kept.names),
        warnings=(*runs.warnings, *warnings),
        details={"reference_batch": reference, "groups": details},
    )


def _groups(runs: Runs) -> tuple[Runs, list[_Group], list[str]]:
    """Runs of the groups that have batches enough, sorted by group."""
    keys = [name for name in _KEYS if runs.has(name)]
    parts = [levels(runs[name]) if name == "params" else runs[name] for name in keys]
    rows = np.stack(parts, 1) if keys else np.zeros((len(runs), 1))
    one_key = len(keys) > 0 and len(np.unique(rows[:, 0])) == len(np.unique(rows, axis=0))
    named = keys[:1] if one_key else keys
    warnings, groups, most = [], [], 0
    order: list[np.ndarray] = []
    for values in np.unique(rows, axis=0):
        places = np.flatnonzero((rows == values).all(1))
        key = dict(zip(keys, values.tolist(), strict=False))
        label = ", ".join(f"{name} {key[name]:g}" for name in named) or "all runs"
        distinct = len(np.unique(runs["batch"][places]))
        most = max(most, distinct)
        if distinct < MIN_BATCHES:
            warnings.append(f"{label}: {distinct} batches, {MIN_BATCHES} are needed: left out")
            continue
        start = sum(len(part) for part in order)
        groups.append(_Group(label, key, runs["batch"][places], start + np.arange(len(places))))
        order.append(places)
    if not groups:
        raise UserError(
            f"no group of runs ({', '.join(keys) or 'all runs'}) has {MIN_BATCHES} batches (most: {most})",
            file=runs.source,
            key="batch",
            fix=f"add {MIN_BATCHES - most} runs to the same target at other batches, a factor 2 or more apart",
        )
    return runs.select(np.concatenate(order)), groups, warnings


def _fit(runs: Runs, groups: list[_Group]) -> RobustFit:
    steps_R = runs["steps"] if runs.has("steps") else runs["events"] / runs["batch"]
    error_R = runs.errors.get("steps", np.ones(len(runs)))
    # Relative errors: the residuals stay in the unit of log steps.
    error_R = error_R / float(np.exp(np.log(error_R).mean()))
    observed_R = np.log(steps_R)

    def model(theta_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        prediction_R, jacobian_RP = np.empty(len(runs)), np.zeros((len(runs), len(theta_P)))
        for place, group in enumerate(groups):
            here, ratio_R = group.places_R, group.middle / group.batch_R
            log_steps, q = theta_P[2 * place : 2 * place + 2]
            inner_R = np.maximum(0.5 * (1 + q) + 0.5 * (1 - q) * ratio_R, _LEAST)
            prediction_R[here] = log_steps + np.log(inner_R)
            jacobian_RP[here, 2 * place] = 1.0
            jacobian_RP[here, 2 * place + 1] = 0.5 * (1 - ratio_R) / inner_R
        return prediction_R / error_R, jacobian_RP / error_R[:, None]

    start = [_start(group, observed_R[group.places_R]) for group in groups]
    low, high = np.tile([-math.inf, math.inf], (2 * len(groups), 1)).T
    for place, group in enumerate(groups):
        low[2 * place + 1], high[2 * place + 1] = _q_bounds(group)
    return robust_fit(model, observed_R / error_R, np.concatenate(start), (low, high))


def _q_bounds(group: _Group) -> tuple[float, float]:
    """Beyond them a + b / B is not above 0 at every batch of the group."""
    spread = math.sqrt(float(group.batch_R.max() / group.batch_R.min()))
    bound = (1 - _EDGE) * (spread + 1) / (spread - 1)
    return -bound, bound


def _start(group: _Group, log_steps_R: np.ndarray) -> list[float]:
    """Best of a grid over q."""
    low, high = _q_bounds(group)
    q_Q = np.linspace(low, high, 83)[1:-1]
    ratio_R = group.middle / group.batch_R
    rest_QR = log_steps_R - np.log(0.5 * (1 + q_Q[:, None]) + 0.5 * (1 - q_Q[:, None]) * ratio_R)
    best = int(rest_QR.var(1).argmin())
    return [float(rest_QR[best].mean()), float(q_Q[best])]


def _critical(name: str, group: _Group, reference: float, q: float) -> float:
    """Critical batch of one definition: from infinite (q <= -1) down to its least (q >= 1)."""
    b_over_a = math.inf if q <= -1 else max(group.middle * (1 - q) / (1 + q), 0.0)
    return b_over_a / 5 + 1.2 * reference if name == "overhead20" else b_over_a


def _power_law(
    fit: RobustFit, groups: list[_Group], name: str, values: list[Estimate], reference: float
) -> tuple[dict[str, Estimate], list[str]]:
    """Least squares of log critical batch on log N over the groups where both ends of it are known."""
    usable = [place for place, value in enumerate(values) if value.low > 0 and value.high < math.inf]
    usable = [place for place in usable if "params" in groups[place].key]
    log_size_G = np.log([groups[place].key["params"] for place in usable])
    if len(set(log_size_G.tolist())) < 2:
        law = {"exponent": UNKNOWN, "coefficient": UNKNOWN.exp()}
        return law, [f"{name}: a power law in N needs groups of two sizes whose interval is finite"]
    slope_G, at_one_G = line(log_size_G)

    def weighted(weight_G: np.ndarray, theta_P: np.ndarray) -> float:
        critical_G = [_critical(name, groups[place], reference, theta_P[2 * place + 1]) for place in usable]
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(weight_G @ np.log(critical_G))

    exponent, log_coefficient = (fit.region.interval(partial(weighted, weight_G)) for weight_G in (slope_G, at_one_G))
    law = {"exponent": exponent, "coefficient": log_coefficient.exp()}
    left_out = len(values) - len(usable)
    return law, [f"{name}: {left_out} groups without a finite interval are not in its power law"] if left_out else []


def _doubts(group: _Group, q: float, overhead: Estimate) -> list[str]:
    smallest, largest = float(group.batch_R.min()), float(group.batch_R.max())
    if q <= -1:
        return [
            f"{group.label}: no batch up to {largest:g} saturates (a -> 0): critical batch above {overhead.low:.4g}"
        ]
    if q >= 1:
        return [f"{group.label}: every batch from {smallest:g} saturates (b -> 0): the critical batch is below them"]
    if overhead.high == math.inf:
        return [f"{group.label}: the data do not close the critical batch from above (at least {overhead.low:.4g})"]
    if not smallest <= overhead.estimate <= largest:
        where = f"tested {smallest:g} to {largest:g}"
        return [f"{group.label}: the critical batch {overhead.estimate:.4g} is beyond the tested range ({where})"]
    return []


def _describe(theta_P: np.ndarray, group: _Group) -> dict[str, Any]:
    scale, q = math.exp(theta_P[0]), float(theta_P[1])
    return {
        "group": group.label,
        **group.key,
        "a": 0.5 * scale * (1 + q),
        "b": 0.5 * scale * (1 - q) * group.middle,
        "smallest_batch": float(group.batch_R.min()),
        "largest_batch": float(group.batch_R.max()),
        "runs": len(group.batch_R),
    }


def _definitions(reference: float) -> dict[str, str]:
    return {
        "law": "steps to target = a + b / B of each group, fitted in logs",
        "overhead20": f"batch with 20 % more events than linear scaling from B_ref = {reference:g} (Zhang et al.): "
        "b / (5 a) + 1.2 B_ref; the headline critical batch",
        "gain_halving": "b / a (McCandlish et al.)",
        "cbs_exponent": "overhead20 = cbs_coefficient * N^cbs_exponent, least squares of logs over the groups, N in "
        "the unit of its column; its interval is from the runs' noise, not from the scatter of sizes about the law",
    }
