"""The unit of work: train one trial from one rung's trunk to another rung, and what the driver answers instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bfm.training.task import object_name


@dataclass(frozen=True)
class Task:
    """One (trial, rung); JSON-able, carries everything that running it needs beside the shards."""

    task_id: str
    trial: str
    rung: int
    """Index in the ladder."""
    rung_flops: int
    config: dict[str, Any]
    """A whole TrainConfig."""
    seed: int
    resume_from: str | None
    """Name of the trunk checkpoint to go on from; None: from the start."""
    from_rung: int | None
    """The rung of that checkpoint."""
    reserved_flops: int
    """Upper bound of what the task trains, reserved under the cap."""
    scaling: dict[str, Any]
    """engine, workers, zero_stage, cpus, gpus, micro_groups, softmax."""
    attempt: int = 0
    """How often it was started before."""
    progress: str | None = None
    """Name of the in-rung checkpoint that an earlier attempt left; it goes before `resume_from`."""
    probes: tuple[int, ...] = ()
    """C on the way at which the trunk is evaluated."""
    evaluation_queries: int | None = None
    """The first so many validation queries; None: all."""
    stage1: str | None = None
    """Folder or URI of the trunk that a trial without one of its own begins with; None: initial weights."""

    @property
    def begins_flops(self) -> int:
        """C where it begins: that of the checkpoint that it goes on from, else 0."""
        return self.rung_flops - self.reserved_flops

    def name(self, what: str) -> str:
        """Name of an object of this task in the sweep's store."""
        return object_name(self.trial, self.rung, self.attempt, what)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**asdict(self), "probes": list(self.probes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Task:
        """Inverse of `as_dict`."""
        return cls(**{**values, "probes": tuple(values["probes"])})


@dataclass(frozen=True)
class Wait:
    """Nothing to start now."""

    reason: str
    task: Task | None = None
    """What would be started if there were room for it; None: a running task must end first."""


@dataclass(frozen=True)
class Finished:
    """The sweep is over."""

    reason: str
