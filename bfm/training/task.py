"""What one task of a sweep, or a run without a sweep, is asked to train, score and keep.

In: a sweep's task as a dict, or fields. Out: a `RungTask`, and the names of its objects in the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from bfm.training.config import TrainConfig
from bfm.training.schedule import trunk_flops

MADE = ("progress", "trunk", "model")
"""The checkpoints of a try: in the rung, at its trunk's end, cooled."""
PROBE_QUERIES = 1_000
"""A probe scores the first so many queries of the validation part: a nested, user-stratified subset."""


@dataclass(frozen=True)
class Account:
    """What an attempt at a task leaves behind, however it ended."""

    spent_flops: int = 0
    """It has trained no more than this."""
    progress: str | None = None
    """Its in-rung checkpoint."""
    progress_flops: int = 0
    """path_flops there."""


@dataclass(frozen=True)
class RungTask:
    """What to train. `config` and `seed` say what the trunk is, `rung_flops` where the row is taken."""

    task_id: str
    trial: str
    rung: int
    rung_flops: float
    config: TrainConfig
    seed: int
    attempt: int | None = None
    """Of a sweep: what this try's objects are named by, so that an earlier one can replace nothing of them."""
    resume_from: str | None = None
    """Trunk checkpoint of a lower rung (a name in the store); None starts at `stage1`."""
    progress: str | None = None
    """In-rung checkpoint of an earlier attempt, which goes before the trunk of a lower rung."""
    stage1: str | None = None
    """Stage-1 trunk of another run (a folder or URI) that stage 2 begins with; None starts at step 0."""
    probes: tuple[float, ...] = ()
    """C values at which the trunk's averaged weights are scored on the way."""
    micro_groups: int = 1
    """Groups per micro-batch, at most; the largest divisor of a worker's groups below it is used."""
    softmax: str = "auto"
    """How the loss is computed (bfm.objective.methods)."""
    evaluation_queries: int | None = None
    """The first so many validation queries are scored; None: all."""
    validations: int = 0
    """So many evenly spaced C of the trunk, and the cooled end, are validated, and the best weights kept."""

    @classmethod
    def from_task(cls, task: Mapping[str, Any]) -> RungTask:
        """From a sweep's task as a dict; what belongs to the sweep alone is left out."""
        values = {**task, **task.get("scaling", {})}
        own = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        numbers = {"rung_flops": float(task["rung_flops"]), "probes": tuple(map(float, task.get("probes", ())))}
        return cls(**{**own, **numbers, "config": TrainConfig.from_dict(task["config"])})

    @property
    def trunk_flops(self) -> float:
        """C at which the trunk ends and the cooldown begins."""
        return trunk_flops(self.rung_flops, self.config.cooldown_fraction)

    @property
    def validation_flops(self) -> list[float]:
        """C values at which the trunk is validated; the last is its end."""
        return [self.trunk_flops * (place / self.validations) for place in range(1, self.validations + 1)]

    @property
    def validation_queries(self) -> int:
        """Queries of every validation, the one of the cooled end included."""
        return min(PROBE_QUERIES, self.evaluation_queries or PROBE_QUERIES)

    def name(self, what: str) -> str:
        """Name of an object of this task in the store."""
        return object_name(self.trial, self.rung, self.attempt, what)


def object_name(trial: str, rung: int, attempt: int | None, what: str) -> str:
    """Name in the store of an object of a task; `attempt` is that of a sweep's task."""
    tried = "" if attempt is None else f"-a{attempt}"
    return f"trials/{trial}/checkpoints/rung{rung}{tried}-{what}"
