"""Which tasks can be started now, and what the cluster is asked for so that more could be.

Enters: the tasks that run, and one that would be next. Leaves: whether the live resources hold it beside them, and a
request to the autoscaler. A task is chosen only when there is room for it, so nothing is reserved for machines that may
come; what is asked for is what could be used now: the running tasks, and as many like the next one as are running.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
import ray.autoscaler.sdk

from bfm.sweep.task import Task
from ray_jobs.trial import slot_resources

Resources = dict[str, float]


@dataclass(frozen=True)
class Holding:
    """A Tune trial: what its actor holds, and the task that it trains."""

    task: Task
    is_idle: bool
    """Its task is done: the actor waits for another one, and the group's workers are gone."""


def bundles(scaling: Mapping[str, Any]) -> list[Resources]:
    """What a task with this scaling needs, machine by machine: its actor, and where several train, each worker."""
    worker = {"CPU": float(scaling["cpus"]), "GPU": float(scaling["gpus"])}
    return [slot_resources(scaling), *([worker] * scaling["workers"] if scaling["workers"] > 1 else [])]


def total_of(scaling: Mapping[str, Any]) -> Resources:
    """The same together."""
    return _sum(bundles(scaling))


def fits(task: Task, holdings: Sequence[Holding], total: Resources) -> bool:
    """Whether live resources hold a task beside what is held; an idle actor of the right size is taken over."""
    needed = bundles(task.scaling)
    if any(holding.is_idle and bundles(holding.task.scaling)[0] == needed[0] for holding in holdings):
        needed = needed[1:]
    held = [
        bundle for holding in holdings for bundle in bundles(holding.task.scaling)[: 1 if holding.is_idle else None]
    ]
    return all(amount <= total.get(name, 0.0) + 1e-9 for name, amount in _sum([*held, *needed]).items())


class Room(Protocol):
    """What the searcher asks."""

    def total(self) -> Resources:
        """CPUs and GPUs of the live nodes that stay."""
        ...

    def ask(self, running: Sequence[Task], waiting: Task | None, most: int) -> None:
        """Have room made for the running tasks and for some like the one that waits, at most `most`."""
        ...


class ClusterRoom:
    """Of the Ray at hand."""

    def __init__(self, *, grows: bool) -> None:
        """`grows`: an autoscaler may listen."""
        self._grows = grows
        self._asked: list[Resources] = []

    def total(self) -> Resources:
        """See Room. A node that is drained takes no new actor."""
        draining = ray._private.state.state.get_draining_nodes()
        return _sum(node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining)

    def ask(self, running: Sequence[Task], waiting: Task | None, most: int) -> None:
        """See Room. What is not asked for any more may go when it is idle."""
        more = [] if waiting is None else [waiting] * max(1, min(len(running), most))
        wanted = [_present(bundle) for task in (*running, *more) for bundle in bundles(task.scaling)] if more else []
        if self._grows and wanted != self._asked:
            self._asked = wanted
            ray.autoscaler.sdk.request_resources(bundles=wanted)


def _present(bundle: Resources) -> Resources:
    return {name: amount for name, amount in bundle.items() if amount > 0}


def _sum(parts: Iterable[Resources]) -> Resources:
    total: Resources = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0.0) + amount
    return total
