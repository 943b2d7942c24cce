"""Which of the sizes that C allows is best, and what comes of it: the joint model asked at each of them.

Enters: the joint model of all rows (bfm.sweep.recipe.evidence), the sizes that C allows (bfm.sweep.recipe.choices).
Leaves: one of them, with the predicted metric and its 95 % prediction interval.

Shape legend: S sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bfm.laws.joint import labels
from bfm.laws.result import Estimate
from bfm.laws.transform import in_units
from bfm.sweep.recipe.choices import Sizes
from bfm.sweep.recipe.evidence import Fitted
from bfm.sweep.space.space import Feasible
from bfm.units import format_count

_VAGUE = 1e4
"""An interval of N whose ends are a factor this far apart is none."""


@dataclass(frozen=True)
class Expectation:
    """The best size and what it is expected to reach."""

    point: Feasible
    params: Estimate
    """N with the law's interval for the best N."""
    predicted: Estimate
    fresh: Estimate | None
    """Were every event seen once; None where the runs cannot tell, or tell nothing better."""
    notes: tuple[str, ...]


def expect(fitted: Fitted, variants: Sequence[Sizes], flops: float) -> Expectation:
    """The size of best expected metric over all variants of the other settings."""
    found = [(_foretold(fitted, sizes.trainable, flops), sizes) for sizes in variants]
    (loss_S, half_S), sizes = min(found, key=lambda one: float(one[0][0].min()))
    place = int(np.argmin(loss_S))
    point = sizes.trainable[place]
    best = fitted.best.size.at(flops)
    vague = not (best.low > 0 and best.high < _VAGUE * best.low)
    size = Estimate(float(point.cost.params), *((0.0, math.inf) if vague else (best.low, best.high)))
    fresh = None
    if fitted.joint.frame.repeats:
        (loss,), (half,) = _foretold(fitted, [point], flops, fresh=True)
        reached = in_units(fitted.runs.metric, Estimate.around(float(loss), float(half)))
        # No event is worth less the first time: where the rows say so they do not tell.
        fresh = reached if loss < loss_S[place] else None
    return Expectation(
        point=point,
        params=size,
        predicted=in_units(fitted.runs.metric, Estimate.around(float(loss_S[place]), float(half_S[place]))),
        fresh=fresh,
        notes=(*_edge_notes(sizes, place), *_size_notes(size)),
    )


def _foretold(
    fitted: Fitted, points: Sequence[Feasible], flops: float, *, fresh: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(loss, half width of the prediction interval) of points at a C, each of shape S."""
    events_S = np.array([point.cost.events(flops) for point in points])
    known = {
        "params": [point.cost.params for point in points],
        "events": events_S,
        "unique_events": events_S
        if fresh
        else np.minimum(events_S, [float(point.cost.epoch_events) for point in points]),
        "flops": [flops] * len(points),
        "batch": [point.cost.step_events for point in points],
        "share": [point.cost.embedder_share for point in points],
        "rate": [point.config.learning_rate for point in points],
    }
    configs = [point.config.as_dict() for point in points]
    columns = {
        name: np.array(known[name] if name in known else [config[name] for config in configs], float)
        for name in (*fitted.joint.columns, "unique_events")
    }
    choices = {}
    for name in fitted.joint.frame.choices:
        values = known[name] if name in known else [config[name] for config in configs]
        numeric = fitted.runs[name].dtype.kind == "f"
        choices[name] = labels(np.array(values, float) if numeric else np.array([str(value) for value in values]))
    return fitted.joint.predict(columns, choices)


def _edge_notes(sizes: Sizes, place: int) -> list[str]:
    """Whether the best size is only the best that can be trained."""
    asked, last = sizes.trainable[place].config.params, len(sizes.trainable) - 1
    smaller = [found for params, found in sizes.rejected if params < asked][-1:]
    larger = [found for params, found in sizes.rejected if params > asked][:1]
    notes = []
    for side, is_edge, beside in (("smaller", place == 0, smaller), ("larger", place == last, larger)):
        if is_edge and not beside:
            notes.append(f"the best N may be {side} than all that were tried")
        elif is_edge:
            why = f"{beside[0].reason} ({beside[0].detail})"
            better = "may be" if last == 0 else "is expected to be"
            notes.append(f"a {side} N {better} better, but cannot be trained at that C: {why}")
    return notes


def _size_notes(size: Estimate) -> list[str]:
    if not size.is_known:
        return ["the rows do not tell the best N at that C: more sizes at each rung, further apart, would"]
    if not size.low <= size.estimate <= size.high:
        span = f"{format_count(size.low)} to {format_count(size.high)}"
        return [f"by the law over the budgets the best N is {span}; costs, repeats or bounds of this log move it"]
    return []
