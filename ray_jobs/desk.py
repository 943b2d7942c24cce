"""Between a sweep's driver and the trials that run its tasks: what is begun, what came of it, what needs a hand.

Enters: a driver; what trials bring; the live nodes. Leaves: the next task that has a place, calls on the driver, events
for a display. A task that stands still is ended, a node that spoils its tasks gets no more of them, room that nobody
takes goes to a running task.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from bfm.errors import PausedError
from bfm.sweep.driver.driver import SweepDriver
from bfm.sweep.driver.live import Waits
from bfm.sweep.driver.requests import Request, request_words
from bfm.sweep.ledger.state import CANCEL, NODE, STOP, STORAGE, WORKER
from bfm.sweep.ledger.task import Finished, Task, Wait
from bfm.training.task import Account
from ray_jobs import trial
from ray_jobs.attempts import Attempts
from ray_jobs.quarantine import Quarantine
from ray_jobs.room import ClusterRoom, Holding, Resources, fits, total_of
from ray_jobs.signals import Interrupted, Signals

WAIT_POLL_S = 1.0
LOOK_S = 10.0
"""How often running tasks are looked after."""
ROOM_S = 60.0
"""A task waits so long for its room; then smaller ones, with as long to go, yield theirs."""
STARTS_S = 60.0
"""A process that starts takes no longer, where there is room for it."""
YIELD_LIMIT_S = 45.0
"""A sweep that ends waits so long for the checkpoints of its running tasks."""
DIED = "its worker process died (killed, out of memory, or its node is gone)"
HUNG = "it stood still and was ended"
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class SweepEvent:
    """Something a display may show: `kind` is opened, imported, asked, assigned, row, lost, yielded, growing,
    quarantined, waiting or finished."""

    kind: str
    task: Task | None = None
    row: dict[str, Any] | None = None
    reason: str = ""


@dataclass
class Live:
    """A Tune trial that holds a slot."""

    task: Task
    nodes: frozenset[str]
    """Ids of those that were live when it was given out."""
    taken_at_s: float = 0.0
    """By the wall clock."""
    started_at_s: float | None = None
    settled_at_s: float | None = None
    ending: bool = False
    yields_room: bool = False
    """It was asked to end because a larger task waits for what it holds."""
    leaving: bool = False
    """Its actor ends by itself, and the trial with it."""
    gone: bool = False
    """It stood still: its task is lost and its slot is free, whenever its actor ends."""

    @property
    def is_running(self) -> bool:
        """Whether its actor has the task."""
        return self.started_at_s is not None and self.settled_at_s is None

    @property
    def stands_by(self) -> bool:
        """Whether its actor waits for another task."""
        return self.settled_at_s is not None and not self.gone and not self.leaving


class Desk:
    """See the module. `live` are all trials that hold something; `inbox` holds requests that nobody has answered;
    `tell_waits` takes what has no room, whenever that has changed.

    `failure` holds the first exception that the driver raised: the run ends, and its caller must raise it. A signal
    and a PausedError end it too, once the running tasks have left their checkpoints.
    """

    def __init__(
        self,
        driver: SweepDriver,
        slots: int,
        *,
        on_event: Callable[[SweepEvent], None],
        room: ClusterRoom,
        running: Attempts,
        signals: Signals,
        inbox: Callable[[], list[Request]] = list,
        tell_waits: Callable[[Sequence[Waits]], None] = lambda waits: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.driver, self.slots, self.clock = driver, slots, clock
        self.failure: Exception | None = None
        self.finished = False
        self.waiting: Task | None = None
        """What does not fit beside what runs."""
        self._waiting_since_s, self._waiting_at_s = clock(), 0.0
        """By the clock that only goes on, and by the wall clock."""
        self._tell_waits, self._waits = tell_waits, list[Waits]()
        self.quarantine = Quarantine()
        self._on_event, self._signals, self._inbox = on_event, signals, inbox
        self._room, self._running = room, running
        self._next: Task | None = None
        self._excused: set[tuple[str, int]] = set()
        """(trial, rung) that went with their node; it may also be what kills nodes, so that is believed once."""
        self._growing: str | None = None
        """Id of the task that was asked for a checkpoint, to go on with more workers."""
        self._paused: PausedError | None = None
        self._ends_at_s: float | None = None
        self._told_to_yield: set[str] = set()
        self._ask_again_at_s = self._look_again_at_s = float("-inf")

    def peek(self, live: Sequence[Live]) -> Task | None:
        """The next task, its cost reserved; None while there is none to start."""
        now_s = self.clock()
        if self._next is not None or self.finished or self.failure is not None or now_s < self._ask_again_at_s:
            return self._next
        answer = self._decide(live, self._nodes())
        if isinstance(answer, Finished):
            self.finished = True
            self._on_event(SweepEvent("finished", reason=answer.reason))
        elif isinstance(answer, Wait) and answer.task is None and not live:
            # A driver that waits with nothing running waits for ever; that must not look like work.
            self.failure = RuntimeError(f"nothing is running, and yet the sweep waits: {answer.reason}")
        elif not isinstance(answer, Task):
            self._ask_again_at_s = now_s + WAIT_POLL_S
        return self._next

    def _decide(self, live: Sequence[Live], nodes: Sequence[Resources]) -> Task | Wait | Finished | None:
        """Ask the driver; what it gives is in hand."""

        def there_is_room(task: Task, copies: int) -> bool:
            return fits([task] * copies, _holdings(live), nodes)

        answer = self._guard(lambda: self.driver.next_task(there_is_room))
        self._wait_for_room(answer.task if isinstance(answer, Wait) else None, live)
        self._next = answer if isinstance(answer, Task) else None
        return answer

    @property
    def in_hand(self) -> bool:
        """Whether the next task waits to be taken."""
        return self._next is not None

    def take(self) -> tuple[Live, dict[str, Any]]:
        """The next task, now held by a trial, and that trial's configuration."""
        task, self._next = self._next, None
        assert task is not None, "nothing was at hand"
        self._on_event(SweepEvent("assigned", task=task))
        avoid = ",".join(sorted(self.quarantine.nodes))
        now_s = time.time()
        config = {"task": json.dumps(task.as_dict()), "assigned_at_s": now_s, "avoid": avoid}
        return Live(task, frozenset(self._room.nodes()), now_s), config

    def settle(self, live: Live, result: Mapping[str, Any]) -> None:
        """Commit what a trial has brought, once."""
        if live.settled_at_s is not None or not trial.OUTCOMES & result.keys():
            return
        node = result.get(trial.NODE)
        if trial.LOST in result:
            self._lose(live, result[trial.LOST], node, retry=result["retry"])
        elif trial.PAUSED in result:
            self._paused = self._paused or PausedError(result[trial.PAUSED])
            self._lose(live, result[trial.PAUSED], node, fault=STORAGE)
        elif trial.FATAL in result:
            if node is not None and self.quarantine.fatal(node, result["message"], self._usable(live.task, node)):
                self._lose(live, result["message"], node, fault=NODE)
            else:
                self.failure = self.failure or trial.FATAL_ERRORS[result[trial.FATAL]](result["message"])
                self._close(live)
        elif trial.YIELDED in result:
            account = Account(**json.loads(result[trial.YIELDED]))
            live.leaving = bool(result.get(trial.LEAVES))
            self._close(live)
            self._guard(lambda: self.driver.yielded(live.task.task_id, account))
            self._on_event(SweepEvent("yielded", task=live.task))
        else:
            row = json.loads(result[trial.ROW])
            self._close(live)
            if node is not None:
                self.quarantine.row(node)
            self._guard(lambda: self.driver.report(live.task.task_id, row))
            self._on_event(SweepEvent("row", task=live.task, row=row))

    def died(self, live: Live) -> None:
        """A trial ended; without a row its task is lost."""
        if live.settled_at_s is None:
            seen = self._running.nodes(live.task)
            # One that told of no step yet was on any of them: as a sweep begins, idle nodes may just be taken away.
            place = live.task.trial, live.task.rung
            if place not in self._excused and self._room.gone(seen or live.nodes):
                self._excused.add(place)
                self._lose(live, DIED, None, fault=NODE)
            else:
                self._lose(live, DIED, seen[0] if len(seen) == 1 else None)

    def ends(self, live: Iterable[Live]) -> bool:
        """Whether the run is on its way to its end. Raises Interrupted when all tasks have yielded or were too slow."""
        if self._signals.received is None and self._paused is None:
            return False
        # One that has not started trained nothing; the next driver finds that in its account.
        running = [one.task for one in live if one.is_running]
        if self._ends_at_s is None:
            self._ends_at_s = self.clock() + YIELD_LIMIT_S
        for task in running:
            if task.task_id not in self._told_to_yield:
                self._told_to_yield.add(task.task_id)
                self._guard(partial(self._running.ask_to_yield, task))
        if not running or self.clock() > self._ends_at_s:
            if self._signals.received is not None:
                raise Interrupted(self._signals.received, self._signals.sender)
            self.failure = self.failure or self._paused
        return True

    def leave(self) -> None:
        """The cluster is asked for nothing any more."""
        self._room.ask([])

    def look_after(self, live: Sequence[Live]) -> None:
        """End what stands still and free what the dead hold; do what is asked from outside; make room for what has
        waited long; give idle room to a running task."""
        if self.clock() >= self._look_again_at_s:
            self._look_again_at_s = self.clock() + LOOK_S
            self._guard(lambda: self._look(live))

    def _look(self, live: Sequence[Live]) -> None:
        self._room.free_orphans()
        hung = self._running.end_hung()
        for one in live:
            if one.task.task_id in hung and one.settled_at_s is None:
                one.gone = True
                self._lose(one, HUNG, None)
        for request in self._inbox():
            self._take(request, live)
        self._tell(live)
        if self.in_hand or self.finished or self.failure is not None:
            return
        if self.waiting is None and self._growing is None:
            self._room.ask(*self._grow(live))
        elif self.waiting is not None and self.clock() - self._waiting_since_s > ROOM_S:
            self._make_room(self.waiting, live)

    def _tell(self, live: Sequence[Live]) -> None:
        """Say to those who watch from elsewhere what has no room, where that is not what they know already."""
        nodes, waits = self._nodes(), []
        there = f"nodes: {len(nodes)}, with {_amounts(_sum(nodes))}"
        if self.waiting is not None:
            why = f"for {_amounts(total_of(self.waiting.scaling))} beside what runs; {there}"
            waits.append(Waits(f"the next task, of rung {self.waiting.rung}", why, self._waiting_at_s))
        for one in live:
            if one.started_at_s is None and time.time() - one.taken_at_s > STARTS_S:
                why = (
                    f"for a process with {_amounts(total_of(one.task.scaling))} to start; {there}, others may hold them"
                )
                waits.append(Waits(one.task.task_id, why, one.taken_at_s))
        if waits != self._waits:
            self._waits = waits
            self._tell_waits(waits)

    def _take(self, request: Request, live: Sequence[Live]) -> None:
        """Answer a request, and do what it asks of running tasks."""
        record = self.driver.take(request)
        self._on_event(SweepEvent("asked", reason=request_words(record)))
        self._ask_again_at_s = float("-inf")
        if record["refused"] is not None:
            return
        if record["verb"] == STOP:
            self._signals.ask(f"`bfm stop` of {record['by']}")
        elif record["verb"] == CANCEL:
            self._cancel(record["trial"], live)
        else:
            # Something is to be tried, whatever the driver said before.
            self.finished = False

    def _cancel(self, trial_id: str, live: Sequence[Live]) -> None:
        if self._next is not None and self._next.trial == trial_id:
            task, self._next = self._next, None
            self.driver.yielded(task.task_id, Account())
        for one in live:
            if one.task.trial == trial_id and one.settled_at_s is None:
                self._running.ask_to_yield(one.task)

    def _make_room(self, waiting: Task, live: Sequence[Live]) -> None:
        """Have smaller tasks go on later, so that a large one never starves and nothing stands idle for it for long."""
        nodes, size = self._nodes(), _size(waiting)
        smaller = [one for one in live if one.is_running and _size(one.task) < size]
        left_s = {one.task.task_id: self._left_s(one) for one in smaller}
        # Those that have the longest way to go; one that is nearly there is waited for.
        smaller = sorted(smaller, key=lambda one: left_s[one.task.task_id], reverse=True)
        smaller = [one for one in smaller if left_s[one.task.task_id] > ROOM_S]
        for number in range(1, len(smaller) + 1):
            going = smaller[:number]
            others = [one for one in live if one not in going]
            if fits([waiting], _holdings(others), nodes):
                self._decide(others, nodes)
                for one in going if self.in_hand else ():
                    one.yields_room = True
                    self._running.ask_to_yield(one.task)
                return

    def _grow(self, live: Sequence[Live]) -> tuple[list[Task], list[Task]]:
        """Ask a running task for a checkpoint, to go on with more workers, if there is room for them; else what runs
        beside the one that could use more, and that one."""
        nodes = self._nodes()
        wished: tuple[list[Task], list[Task]] = [], []
        left_s = {one.task.task_id: self._left_s(one) for one in live if one.is_running}
        for task, wider in self.driver.growable(left_s):
            others = [other for other in live if other.task.task_id != task.task_id]
            if any(fits([way], _holdings(others), nodes) for way in wider):
                self._growing = task.task_id
                self._on_event(SweepEvent("growing", task=task))
                self._running.ask_to_yield(task)
                return [], []
            if not wished[1]:
                wished = _unsettled(others), wider[:1]
        return wished

    def _left_s(self, live: Live) -> float:
        """Seconds that a running task will take at its present speed; 0 where that is not known."""
        spent_flops = self._running.account(live.task).spent_flops
        if not spent_flops or live.started_at_s is None:
            return 0.0
        return (self.clock() - live.started_at_s) * (live.task.reserved_flops / spent_flops - 1)

    def _wait_for_room(self, task: Task | None, live: Sequence[Live]) -> None:
        if task is not None:
            running = _unsettled(live)
            # It may be one of many: as many like it as are running.
            self._room.ask(running, [task] * max(1, min(len(running), self.slots - len(running))))
            if self.waiting is None:
                self._waiting_since_s, self._waiting_at_s = self.clock(), time.time()
                self._on_event(SweepEvent("waiting", task=task, reason=f"for {_amounts(total_of(task.scaling))}"))
        self.waiting = task

    def _nodes(self) -> list[Resources]:
        return [resources for node, resources in self._room.nodes().items() if node not in self.quarantine.nodes]

    def _usable(self, task: Task, node: str) -> list[str]:
        """The nodes that take tasks; none where without a node such a task would have no place."""
        nodes = {name: resources for name, resources in self._room.nodes().items() if any(resources.values())}
        others = [nodes[name] for name in nodes if name != node and name not in self.quarantine.nodes]
        return list(nodes) if fits([task], [], others) else []

    def _close(self, live: Live) -> None:
        live.settled_at_s = self.clock()
        self._growing = None if self._growing == live.task.task_id else self._growing
        self._ask_again_at_s = float("-inf")

    def _lose(self, live: Live, reason: str, node: str | None, *, retry: bool = True, fault: str = WORKER) -> None:
        task = live.task
        self._close(live)
        if node is not None and retry and fault == WORKER:
            spoils = self.quarantine.lost(node, task.trial, self._usable(task, node))
            fault = NODE if spoils else fault
        self._guard(lambda: self.driver.lost(task.task_id, reason, retry=retry, fault=fault))
        self._on_event(SweepEvent("lost", task=task, reason=reason))
        if fault == NODE and node is not None:
            self._on_event(SweepEvent("quarantined", task=task, reason=f"node {node} gets no more tasks: {reason}"))

    def _guard(self, call: Callable[[], Answer]) -> Answer | None:
        if self.failure is not None:
            return None
        try:
            return call()
        except PausedError as error:
            self._paused = error
        except Exception as error:
            # Tune would bury it in a TuneError's text; the sweep's entry point raises it after the run has ended.
            self.failure = error
        return None


def _holdings(live: Iterable[Live]) -> list[Holding]:
    return [Holding(one.task, one.stands_by) for one in live if not one.leaving]


def _unsettled(live: Iterable[Live]) -> list[Task]:
    return [one.task for one in live if one.settled_at_s is None]


def _sum(nodes: Sequence[Resources]) -> Resources:
    return {name: sum(node.get(name, 0.0) for node in nodes) for name in ("GPU", "CPU")}


def _amounts(resources: Resources) -> str:
    return ", ".join(f"{amount:g} {name}s" for name, amount in resources.items() if amount) or "no CPUs"


def _size(task: Task) -> tuple[float, ...]:
    """GPUs, then CPUs."""
    return tuple(total_of(task.scaling).values())
