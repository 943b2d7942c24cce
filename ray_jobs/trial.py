"""One (configuration, rung) task as a Ray Tune trial on an actor that is reused.

Enters: a task as JSON, and the executor that turns it into a ledger row. Leaves: the row as JSON in the Tune result.
The actor imports torch once and keeps the shards open, so a warm task starts its first step in a fraction of a second.
Checkpoints lie in the sweep's own store, never in Tune's trial folders.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from typing import Any

from ray.tune import PlacementGroupFactory, Trainable

# (task, wall-clock time of its assignment in seconds) -> ledger row
Executor = Callable[[dict[str, Any], float], dict[str, Any]]
ROW, LOST = "row", "lost"
STANDBY_S = 0.1
COORDINATOR_CPUS = 1.0


def slot_resources(scaling: dict[str, Any]) -> dict[str, float]:
    """What the trial's own actor holds while it has the task.

    One worker: the actor trains, and holds that worker's CPUs and GPUs. Several: the actor only coordinates, the
    workers are a Ray Train group with resources of its own; equal CPU requests keep the actor reusable for both.
    """
    if scaling["workers"] == 1:
        return {"CPU": float(scaling["cpus"]), "GPU": float(scaling["gpus"])}
    return {"CPU": min(float(scaling["cpus"]), COORDINATOR_CPUS), "GPU": 0.0}


class RungTrial(Trainable):
    """Runs its task in the first step; further steps stand by until the searcher has the actor's next task."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:
        """The placement group of the trial's actor; trials with equal groups share actors."""
        held = slot_resources(json.loads(config["task"])["scaling"])
        return PlacementGroupFactory([{name: amount for name, amount in held.items() if amount > 0}])

    def setup(self, config: dict[str, Any], execute: Executor | None = None) -> None:
        """Pay for the imports, once per actor."""
        import torch  # noqa: F401

        assert execute is not None, "bind the executor with tune.with_parameters"
        self._execute = execute
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next task."""
        self._task = json.loads(new_config["task"])
        self._assigned_at_s = float(new_config["assigned_at_s"])
        self._delivered = False
        return True

    def step(self) -> dict[str, Any]:
        """{"row": JSON} once, or {"lost": reason} where the executor failed; afterwards an empty standby result."""
        if self._delivered:
            time.sleep(STANDBY_S)
            return {}
        self._delivered = True
        try:
            row = self._execute(self._task, self._assigned_at_s)
        except Exception as error:
            # The actor is sound and stays; the sweep's driver decides what a lost task means.
            traceback.print_exc()
            return {LOST: f"{type(error).__name__}: {error}"}
        return {ROW: json.dumps(row)}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing to keep: the trunk checkpoint lies in the sweep's store. Tune calls this at the end of a trial."""
        return {"task_id": self._task["task_id"]}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing to load, for the same reason."""
