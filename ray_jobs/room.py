"""Which tasks can be started now or ever, and what the cluster is asked for so that more could be.

Enters: a sweep's tiers; the tasks that run, and those that would be next. Leaves: a refusal before Ray starts; whether
the live nodes hold tasks beside one another; a request to the autoscaler. A task is chosen only when there is room for
it, so nothing is reserved for machines that may come; what is asked for is what could be used now.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.autoscaler.sdk
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, PlacementGroupID, remove_placement_group

from bfm.errors import UserError
from bfm.sweep.ledger.task import Task
from bfm.sweep.plan.machine import Machine
from bfm.sweep.space.settings import SweepSpec
from ray_jobs.cluster_session import knock
from ray_jobs.preemption import draining_nodes
from ray_jobs.trial import slot_resources

Resources = dict[str, float]
_NAMES = ("GPU", "CPU")
_SLACK = 1e-9
ASK_LESS_S = 180.0
_ANSWER_S = 1.0
_AGAIN_S = 30.0


@dataclass(frozen=True)
class Holding:
    """A Tune trial: what its actor holds, and the task that it trains."""

    task: Task
    is_idle: bool
    """Its task is done: the actor waits for another one, and workers that stand by give way to who needs their room."""


def bundles(scaling: Mapping[str, Any]) -> list[Resources]:
    """What a task with this scaling needs, machine by machine: its actor, and where several train, each worker."""
    worker = {"CPU": float(scaling["cpus"]), "GPU": float(scaling["gpus"])}
    return [slot_resources(scaling), *([worker] * scaling["workers"] if scaling["workers"] > 1 else [])]


def total_of(scaling: Mapping[str, Any]) -> Resources:
    """The same together."""
    parts = bundles(scaling)
    return {name: sum(part[name] for part in parts) for name in _NAMES}


def check_fits(spec: SweepSpec, machine: Machine) -> None:
    """Raises UserError where a machine's CPUs or GPUs cannot hold a task of every tier; `slots` is only the most."""
    for place, tiers in enumerate(spec.scaling.tiers):
        # One of them is enough.
        if not any(map(machine.holds, tiers)):
            fix = "lower workers, cpus or gpus, or join a larger cluster with RAY_ADDRESS"
            raise UserError(machine.lack(tiers[0]), key=f"scaling.tiers.{place}", fix=fix)


def fits(tasks: Sequence[Task], holdings: Sequence[Holding], nodes: Sequence[Resources]) -> bool:
    """Whether live nodes hold some tasks beside what is held; idle actors of the right size are taken over."""
    idle = [bundles(holding.task.scaling)[0] for holding in holdings if holding.is_idle]
    wanted = [bundle for holding in holdings if not holding.is_idle for bundle in bundles(holding.task.scaling)]
    for task in tasks:
        actor, *workers = bundles(task.scaling)
        if actor in idle:
            idle.remove(actor)
        wanted += [actor, *workers]
    return _pack([*idle, *wanted], nodes)


class ClusterRoom:
    """Of the Ray at hand, and this job's part of it."""

    def __init__(self, *, grows: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """`grows`: an autoscaler may listen."""
        self._grows, self._clock = grows, clock
        self._asked: list[Resources] | None = None
        """None: a driver before this one may have asked for machines that nobody needs any more."""
        self._asked_s = clock()
        self._num_nodes, self._since_s = 0, clock()

    def nodes(self) -> dict[str, Resources]:
        """Id -> CPUs and GPUs of each live node that is not about to go."""
        leaving = draining_nodes()
        return {
            node["NodeID"]: {name: node["Resources"].get(name, 0.0) for name in _NAMES}
            for node in ray.nodes()
            if node["Alive"] and node["NodeID"] not in leaving
        }

    def gone(self, nodes: Iterable[str]) -> set[str]:
        """Those of some nodes that do not answer: Ray takes seconds to find that out."""
        told = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        return {node for node in nodes if node not in told or not _answers(told[node])}

    def ask(self, tasks: Sequence[Task], more: Sequence[Task] = ()) -> None:
        """Have room made for these tasks and some more beside them; without more, what is idle may go."""
        if self._grows:
            wanted = [*tasks, *more[: self._at_most(len(more))]] if more else []
            bundled = [_present(bundle) for task in wanted for bundle in bundles(task.scaling)]
            # A cluster keeps one request: that of another sweep takes this one's place.
            again = bundled and self._clock() - self._asked_s > _AGAIN_S
            if bundled != self._asked or again:
                self._asked, self._asked_s = bundled, self._clock()
                ray.autoscaler.sdk.request_resources(bundles=bundled)

    def free_orphans(self) -> None:
        """Give back what worker groups still hold whose controller is dead; Ray Train's own cleaner may be, too."""
        job = bytes.fromhex(ray.get_runtime_context().get_job_id())
        # No public call tells whose a group is.
        for told in ray._private.state.state._connect_and_get_accessor().get_placement_group_table():
            group = PlacementGroupTableData.FromString(told)
            # Of what a driver has made itself, as Tune does, Ray says that no actor made it, and that this one is dead.
            is_orphan = group.creator_actor_dead and not ray.ActorID(group.creator_actor_id).is_nil()
            if is_orphan and group.creator_job_id == job and group.state != PlacementGroupTableData.REMOVED:
                remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))

    def _at_most(self, number: int) -> int:
        """Half as many after every while that brought no node, down to one: for a request that is above its limits
        Ray's autoscaler starts nothing at all."""
        num_nodes, now_s = len(ray.nodes()), self._clock()
        if not number or num_nodes != self._num_nodes:
            self._num_nodes, self._since_s = num_nodes, now_s
        return max(1, number >> int((now_s - self._since_s) / ASK_LESS_S))


def _answers(node: Mapping[str, Any]) -> bool:
    try:
        knock(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}", _ANSWER_S)
    except OSError:
        return False
    return True


def _pack(parts: Sequence[Resources], nodes: Sequence[Resources]) -> bool:
    """Whether the parts, the largest first, find each a node with room left: no part spans two nodes."""
    left = [dict(node) for node in nodes]
    for part in sorted(parts, key=lambda part: [part[name] for name in _NAMES], reverse=True):
        needed = _present(part)
        holders = [
            node for node in left if all(amount <= node.get(name, 0.0) + _SLACK for name, amount in needed.items())
        ]
        if not holders:
            return False
        # The fullest one, and GPUs are kept for those that need some.
        best = min(holders, key=lambda node: [node.get(name, 0.0) for name in _NAMES])
        for name, amount in needed.items():
            best[name] -= amount
    return True


def _present(bundle: Resources) -> Resources:
    return {name: amount for name, amount in bundle.items() if amount > 0}
