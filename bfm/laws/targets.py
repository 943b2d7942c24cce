"""Events to a target from the probes of a sweep: what the critical batch is fitted to."""

from __future__ import annotations

import itertools
import math

import numpy as np
from scipy import optimize

from bfm.errors import UserError
from bfm.laws.runs import Runs, levels
from bfm.laws.transform import from_loss, has_loss, to_loss, transform_name

_HALF = 3
MIN_PROBES = 2 * _HALF + 1
"""The window of the smoothing."""
_Curve = tuple[np.ndarray, np.ndarray, float]
"""Log events and values of the steps of a smoothed curve, and its value half a window before its end."""


def events_to_target(probes: Runs) -> Runs:
    """One run per curve: events and steps at which it first has the target of its size.

    Needs the columns curve, params, batch, events and loss of probe rows (`from_rows(..., probes=True)`); the curves of
    one size (params within 2 %) are to differ in the batch alone. Ranking metrics are read as -log(value), so that all
    go down. A curve is smoothed by a parabola through the 7 probes about each, then made decreasing (isotonic least
    squares), and interpolated linearly in log events. The target of a size is a value that every batch reaches: the
    worst of its curves' values half a window before their ends, so that all are read off whole windows and their
    errors are alike. Curves that had it at their first probe are left out and said. `errors["steps"]` is
    what a unit of noise in the metric is in log steps: 1 / the slope of the size's curves at its target (their median).
    Raises UserError where no curve is left.
    """
    probes.require("events to target", "curve", "params", "batch", "events", "loss")
    # A ranking metric can be 0 at the first probes.
    probes = probes.select(has_loss(probes.metric, probes["loss"]))
    loss_R, warnings = to_loss(probes.metric, probes["loss"]), list(probes.warnings)
    size_R = levels(probes["params"])
    found: list[tuple[str, float, float, float, float]] = []
    errors: list[float] = []
    for size in np.unique(size_R):
        curves: dict[str, _Curve] = {}
        batch: dict[str, float] = {}
        for name in np.unique(probes["curve"][size_R == size]):
            places = np.flatnonzero((probes["curve"] == name) & (size_R == size))
            if len(places) < MIN_PROBES:
                warnings.append(f"{name}: {len(places)} probes, {MIN_PROBES} are needed: left out")
                continue
            curves[name] = _smooth(np.log(probes["events"][places]), loss_R[places])
            batch[name] = float(np.median(probes["batch"][places]))
        if not curves:
            continue
        wanted = max(late for _, _, late in curves.values())
        value = float(from_loss(probes.metric, wanted))
        slopes: list[float] = []
        for name, (log_events, fall, _) in curves.items():
            if fall[0] <= wanted:
                warnings.append(f"{name}: reaches {probes.metric} = {value:.4g} at the first probe already: left out")
                continue
            log_reached = float(np.interp(-wanted, -fall, log_events))
            slopes.append(-float(np.interp(log_reached, log_events, np.gradient(fall, log_events))))
            found.append((name, float(size), batch[name], math.exp(log_reached), value))
        errors += [1 / float(np.median(slopes))] * len(slopes) if slopes else []
    if not found:
        raise UserError(
            f"no curve has {MIN_PROBES} probes on both sides of a target",
            file=probes.source,
            key="target",
            fix="let the sweep probe its runs at about 20 C",
        )
    return _runs(probes, found, errors, tuple(warnings))


def _smooth(log_events: np.ndarray, loss: np.ndarray) -> _Curve:
    order = np.argsort(log_events, kind="stable")
    log_events, loss = log_events[order], loss[order]
    smoothed = np.empty(len(loss))
    for place, here in enumerate(log_events):
        start = min(max(place - _HALF, 0), len(loss) - MIN_PROBES)
        window = slice(start, start + MIN_PROBES)
        smoothed[place] = np.polyfit(log_events[window] - here, loss[window], 2)[-1]
    fitted = optimize.isotonic_regression(smoothed, increasing=False)
    steps = fitted.blocks
    means = [float(log_events[start:end].mean()) for start, end in itertools.pairwise(steps)]
    return np.array(means), fitted.x[steps[:-1]], float(fitted.x[-1 - _HALF])


def _runs(
    probes: Runs, found: list[tuple[str, float, float, float, float]], errors: list[float], warnings: tuple[str, ...]
) -> Runs:
    names, *numbers = zip(*found, strict=True)
    params, batch, events, target = (np.array(column) for column in numbers)
    columns = {
        "curve": np.array(names),
        "params": params,
        "batch": batch,
        "events": events,
        "steps": events / batch,
        "target": target,
    }
    definitions = {
        **probes.definitions,
        "target": f"{probes.metric} that the runs of every batch of a size reach, 3 probes before their ends",
        "L": transform_name(probes.metric),
        "smoothing": "parabolas over 7 probes, made decreasing, linear in log events",
    }
    return Runs(probes.source, columns, names, probes.metric, {}, {"steps": np.array(errors)}, definitions, warnings)
