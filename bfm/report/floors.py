"""The floors beside models: which is the strongest at a metric, and what is below it, in words.

A floor needs no training (bfm.ranking.baselines). A model is below it where counting does better: a higher nll, a lower
recall. Enters: metrics by the name of the floor; leaves: names, sentences, and floors.json in the storage of a sweep.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from bfm.events.protocol import Protocol
from bfm.events.shards import Shards
from bfm.files import Store, canonical_json
from bfm.laws.frontier import Row, frontier, goal_of, metric_names
from bfm.ranking.baselines import baseline_metrics

Baselines = Mapping[str, Mapping[str, float]]
_FILE = "floors.json"


def publish_floors(store: Store, shards: Shards, queries: int | None) -> Baselines:
    """Measure the floors on the validation queries of a sweep and keep them in its storage."""
    floors = baseline_metrics(shards, Protocol.load(shards), "validation", queries=queries)
    store.put(_FILE, canonical_json(floors))
    return floors


def read_floors(store: Store) -> Baselines:
    """The floors in a sweep's storage; none where it has not run yet."""
    return json.loads(store.get(_FILE)) if store.exists(_FILE) else {}


def shown_name(floor: str) -> str:
    """The name of a floor for people."""
    return floor.replace("_", "-")


def strongest(baselines: Baselines, metric: str) -> tuple[str, float] | None:
    """Name and value of the floor that is best at a metric; None where no floor has it."""
    known = {shown_name(name): values.get(metric, math.nan) for name, values in baselines.items()}
    known = {name: value for name, value in known.items() if math.isfinite(value)}
    if not known:
        return None
    pick = min if goal_of(metric) == "minimize" else max
    return pick(known.items(), key=lambda entry: entry[1])


def is_above(value: float, floor: float, metric: str) -> bool:
    """Whether a value is better than a floor's."""
    return value < floor if goal_of(metric) == "minimize" else value > floor


def verdict(model: str, values: Mapping[str, float], baselines: Baselines, metrics: Sequence[str]) -> str:
    """Where a model is below the strongest floor and where above it, in one sentence; empty without floors."""
    sides: dict[bool, list[str]] = {False: [], True: []}
    for metric in metrics:
        floor, value = strongest(baselines, metric), values.get(metric, math.nan)
        if floor is not None and math.isfinite(value):
            sides[is_above(value, floor[1], metric)].append(f"{metric} ({value:.4g}, {floor[0]} {floor[1]:.4g})")
    below, above = (", ".join(sides[side]) for side in (False, True))
    parts = ([f"BELOW the strongest floor in {below}"] if below else []) + (
        [f"above {'it' if below else 'every floor'} in {above}"] if above else []
    )
    return f"{model} is {' and '.join(parts)}." if parts else ""


def sweep_verdict(rows: Sequence[Row], baselines: Baselines) -> str:
    """The verdict on the best of a sweep, metric by metric."""
    points = {metric: frontier(rows, metric) for metric in metric_names(rows)}
    values = {metric: found[-1].value for metric, found in points.items() if found}
    return verdict("The best of the sweep", values, baselines, list(values))
