"""The floors beside models: which is the strongest at a metric, and what is below it, in words.

A floor needs no training (bfm.ranking.baselines). A model is below it where counting does better: a higher nll, a lower
recall, by more than two standard errors of the difference where these are known. Enters: metrics by the name of the
floor; leaves: names, sentences, and in the storage of a sweep floors.json and the floors' scores of its queries.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from bfm.files import Store, canonical_json
from bfm.laws.frontier import Compare, FrontierPoint, Gap, Row, gap_between, goal_of, is_better, metric_value
from bfm.ranking.metrics import QueryScores, summarise
from bfm.ranking.paired import scores_object
from bfm.report.digits import gap_text
from bfm.report.words import joined_words

Baselines = Mapping[str, Mapping[str, float]]
_FILE, _SCORES_FILE = "floors.json", "floors/scores.json"


def publish_floors(store: Store, scores: Mapping[str, QueryScores]) -> Baselines:
    """Keep the floors in a sweep's storage, by their scores of its validation queries; returns their metrics."""
    objects = {floor: scores_object(f"floors/{floor}", of_floor) for floor, of_floor in scores.items()}
    for name, data in objects.values():
        store.put(name, data)
    store.put(_SCORES_FILE, canonical_json({floor: name for floor, (name, _) in objects.items()}))
    floors = {floor: summarise(of_floor).metrics for floor, of_floor in scores.items()}
    store.put(_FILE, canonical_json(floors))
    return floors


def read_floors(store: Store) -> Baselines:
    """The floors in a sweep's storage; none where it has not run yet."""
    return json.loads(store.get(_FILE)) if store.exists(_FILE) else {}


def read_floor_scores(store: Store) -> dict[str, str]:
    """The names of the floors' scores in a sweep's storage, by the floors' shown names, for a Pairing."""
    names = json.loads(store.get(_SCORES_FILE)) if store.exists(_SCORES_FILE) else {}
    return {shown_name(floor): name for floor, name in names.items()}


class Floor(NamedTuple):
    """What counting reaches at a metric."""

    name: str
    """As it is shown."""
    value: float


@dataclass(frozen=True)
class AgainstFloor:
    """A row's metric beside the strongest floor's."""

    floor: Floor
    gap: Gap
    """Row minus floor; its error is known only where it is paired."""
    side: Literal["below", "within error of", "above"]
    """Equal values of unknown error are below."""

    @property
    def words(self) -> str:
        """Which floor, its value and the difference."""
        return f"{self.side} the strongest floor, {self.floor.name} {self.floor.value:.4g}: {gap_text(self.gap)}"


def against_strongest(row: Row, metric: str, baselines: Baselines, compare: Compare) -> AgainstFloor | None:
    """A row beside the strongest floor at a metric; None where either has no value."""
    floor, value = strongest(baselines, metric), metric_value(row, metric)
    if floor is None or not math.isfinite(value):
        return None
    # A floor as a row on the same queries. It has no errors, so an unpaired difference has none either.
    beside = {"floor": floor.name, "metrics": {metric: floor.value}, "protocol_hash": row.get("protocol_hash")}
    gap = gap_between(row, beside, metric, compare)
    side: Literal["above", "below"] = "above" if is_better(metric, value, floor.value) else "below"
    return AgainstFloor(floor, gap, "within error of" if gap.within_error else side)


def shown_name(floor: str) -> str:
    """The name of a floor for people."""
    return floor.replace("_", "-")


def floors_at(baselines: Baselines, metric: str) -> dict[str, float]:
    """Shown name -> value of the floors that have a metric."""
    found = {shown_name(name): values.get(metric, math.nan) for name, values in baselines.items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def strongest(baselines: Baselines, metric: str) -> Floor | None:
    """The floor that is best at a metric; None where no floor has it."""
    pick = min if goal_of(metric) == "minimize" else max
    known = (Floor(*entry) for entry in floors_at(baselines, metric).items())
    return pick(known, key=lambda floor: floor.value, default=None)


def verdict(model: str, rows: Mapping[str, Row], baselines: Baselines, compare: Compare) -> str:
    """Where a model is below the strongest floor, within error of it and above it, in one sentence.

    rows: metric -> the row that is held against the floors there. Empty without floors.
    """
    sides: dict[str, list[str]] = {"below": [], "within error of": [], "above": []}
    for metric, row in rows.items():
        found = against_strongest(row, metric, baselines, compare)
        if found is not None:
            gap = f": {gap_text(found.gap)}" if found.gap.paired else ""
            words = f"{metric} ({metric_value(row, metric):.4g}, {found.floor.name} {found.floor.value:.4g}{gap})"
            sides[found.side].append(words)
    parts: list[str] = []
    for side, found_there in sides.items():
        if found_there:
            floor = "it" if parts else "every floor" if side == "above" else "the strongest floor"
            parts.append(f"{'BELOW' if side == 'below' else side} {floor} in {', '.join(found_there)}")
    return f"{model} is {joined_words(parts)}." if parts else ""


def sweep_verdict(frontiers: Mapping[str, Sequence[FrontierPoint]], baselines: Baselines, compare: Compare) -> str:
    """The verdict on a sweep by the best row of each metric, which its frontier ends with."""
    best = {metric: points[-1].row for metric, points in frontiers.items() if points}
    return verdict("The best of the sweep", best, baselines, compare)
