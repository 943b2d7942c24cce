"""The state of a sweep: a pure fold over the records of its ledger, nothing else.

Kinds of records: opened, spec, proposal, task (a reservation), row (rung row with its probe rows), lost (a task that
ended without a row, and what it is charged), yielded (the same of one that was asked to end early), abandoned (a task
that will not be tried again), evicted (a trunk that is kept no longer), imported (rows that were trained elsewhere),
check (a recipe's prediction against its run), request (what somebody asked for from outside, and why it was refused, if
it was: bfm.sweep.driver.requests), finished. Unknown fields are carried, unknown kinds refused. What a
task's place in the ladder is called is its integer rung index, never a FLOP count.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from bfm.errors import CorruptError
from bfm.sweep.space.parameters import ConfigKey, config_key
from bfm.sweep.space.settings import SweepSpec
from bfm.sweep.space.spec import from_dict

Record = dict[str, Any]
DRIVER = "driver"
WORKER = "worker"
NODE = "node"
STORAGE = "storage"
"""Who is to blame for a loss; only a worker's own are held against its task."""
IMPORT = "import"
STOP, CANCEL, ENQUEUE = "stop", "cancel", "enqueue"
"""Verbs of requests."""
LAST_DECISIONS = 5


@dataclass
class Trial:
    """One configuration and seed, and how far it has come."""

    trial: str
    number: int | None
    """Proposals count from 0; those of one configuration follow each other, one per seed. None: not proposed here."""
    config: dict[str, Any]
    seed: int
    params: int
    """Nominal N, as sized."""
    source: str
    rows: dict[int, Record] = field(default_factory=dict)
    """Rung rows by rung index."""

    @classmethod
    def proposed(cls, record: Record) -> Trial:
        """What a `proposal` record begins."""
        return cls(**{name: record[name] for name in ("trial", "number", "config", "seed", "params", "source")})

    @cached_property
    def key(self) -> ConfigKey:
        """Equal for equal configurations."""
        return config_key(self.config)


@dataclass
class Attempt:
    """What is known of one (trial, rung) that has no row yet."""

    task: Record
    lost: int = 0
    """How often running it failed since it last got further (ends of the driver itself are not held against it)."""
    tries: int = 1
    is_open: bool = True
    """False: it is owed, to be started again."""
    meant_for: int = 0
    """The rung that the trial is on its way to."""
    nominal_flops: int = 0
    """What was reserved first: decisions rest on this, whatever is lost or yielded later."""
    redone_flops: int = 0
    """The part of its reservation that an evicted trunk would have spared."""
    progress: str | None = None
    """In-rung checkpoint that its next try goes on from."""
    progress_flops: int = 0
    """path_flops there."""

    def gain(self, record: Record) -> int:
        """How much further than before it got by a lost or yielded try."""
        if record["progress"] is None:
            return 0
        begins_flops = self.task["rung_flops"] - self.task["reserved_flops"]
        return max(0, record["progress_flops"] - begins_flops)


@dataclass
class SweepState:
    """Everything that decisions and reports are made from."""

    spec: Record | None = None
    trials: dict[str, Trial] = field(default_factory=dict)
    num_proposals: int = 0
    """Trials that this sweep began: the number of the next proposal."""
    rungs: dict[int, dict[str, Record]] = field(default_factory=dict)
    """Rung index -> trial -> rung row, in order of arrival."""
    attempts: dict[tuple[str, int], Attempt] = field(default_factory=dict)
    """Reserved or owed (trial, rung), in order of their first reservation."""
    abandoned: dict[tuple[str, int], str] = field(default_factory=dict)
    """(trial, rung) given up -> reason."""
    arrivals: list[tuple[str, int]] = field(default_factory=list)
    """(trial, rung) of the rung rows, in order of arrival."""
    arrivals_before_proposal: int = 0
    """How many of them stood before the last proposal or import: what is drawn for the next one rests on these alone,
    and so not on when it is first asked for."""
    nominal_flops: Counter[int] = field(default_factory=Counter)
    """Rung -> FLOPs first reserved for its tasks; what was redone after losses and evictions is left out."""
    probes: list[Record] = field(default_factory=list)
    closed_tasks: set[str] = field(default_factory=set)
    """Ids of tasks that have a row or are lost."""
    open_tasks: dict[str, tuple[str, int]] = field(default_factory=dict)
    spent_flops: int = 0
    """Everything trained: task_flops of rows, and what lost and yielded tasks were charged."""
    trained_flops: Counter[tuple[str, int]] = field(default_factory=Counter)
    """(trial, rung) -> what all its tries trained, the lost and the redone part of it left out."""
    lost_flops: int = 0
    """The part of spent_flops that was lost: neither a row nor a checkpoint came of it."""
    redone_flops: int = 0
    """The part of spent_flops that evicted trunks would have spared."""
    reserved_flops: int = 0
    eval_flops: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """Reason -> infeasible proposals."""
    memory_limits: dict[str, int] = field(default_factory=dict)
    """Kind of tier -> the smallest estimate of bytes per worker that ran out of memory there."""
    losses: list[Record] = field(default_factory=list)
    evicted: dict[tuple[str, int], Record] = field(default_factory=dict)
    """(trial, rung) of trunks that are kept no longer."""
    imports: list[Record] = field(default_factory=list)
    """Of each import: file, counts of rows, trials and rows known already, reasons of those left out."""
    decisions: deque[Record] = field(default_factory=lambda: deque(maxlen=LAST_DECISIONS))
    """The last reservations that a policy decided on: task id, FLOPs, reason, the rung that it is meant for."""
    checks: list[Record] = field(default_factory=list)
    """Recipes that were trained, each with what was predicted and what was measured; their FLOPs are not in the spend,
    so no decision of the sweep depends on them."""
    requests: dict[str, Record] = field(default_factory=dict)
    """Id -> the last answer to a request."""
    queue: dict[str, Record] = field(default_factory=dict)
    """Id -> the request for a configuration that has not begun, oldest first."""
    cancelled: dict[str, str] = field(default_factory=dict)
    """Trial -> who asked that it be trained no further."""
    finished: str | None = None
    """Why the sweep ended; None while it has not."""
    num_records: int = 0

    @classmethod
    def fold(cls, records: Iterable[Record]) -> SweepState:
        """The state after all records."""
        state = cls()
        for record in records:
            state.apply(record)
        return state

    def apply(self, record: Record) -> None:
        """One record further. Raises CorruptError for one that no writer can have meant."""
        handler = _HANDLERS.get(record["kind"])
        if handler is None:
            raise CorruptError(f"ledger record {self.num_records}: unknown kind {record['kind']!r}")
        try:
            handler(self, record)
        except KeyError as error:
            raise CorruptError(f"ledger record {self.num_records} ({record['kind']}): no {error}") from error
        self.num_records += 1

    @property
    def cap_flops(self) -> int | None:
        """What `spent_flops` may grow to; None where nothing was started."""
        return None if self.spec is None else self.spec["budget"]["total_flops"]

    def all_rows(self) -> list[Record]:
        """Rung rows by rung, in order of arrival, then probe rows."""
        return [row for rung in sorted(self.rungs) for row in self.rungs[rung].values()] + self.probes

    @property
    def given_up(self) -> set[str]:
        """Trials with a task that will not be tried again, or that were cancelled."""
        return {trial for trial, _ in self.abandoned} | self.cancelled.keys()

    def trunk_below(self, trial: str, rung: int, *, or_evicted: bool = False) -> int | None:
        """The highest rung below one with a trunk to go on from (`or_evicted`: one that was trained); None: no such."""
        rows = self.trials[trial].rows if trial in self.trials else {}
        trained = (at for at, row in rows.items() if at < rung and row.get("checkpoint"))
        return max((at for at in trained if or_evicted or (trial, at) not in self.evicted), default=None)

    @property
    def kept_trunks(self) -> dict[tuple[str, int], int]:
        """(trial, rung) -> bytes of the trunks that stand, oldest first; 0 where the row does not say."""
        rows = {place: self.trials[place[0]].rows[place[1]] for place in self.arrivals if place not in self.evicted}
        return {place: row.get("checkpoint_bytes") or 0 for place, row in rows.items() if row.get("checkpoint")}

    def trained_at(self, rung: int) -> int:
        """FLOPs of `trained_flops` on the way to a rung."""
        return sum(flops for (_, at), flops in self.trained_flops.items() if at == rung)

    def pending(self, rung: int) -> list[str]:
        """Trials that are reserved or owed at a rung."""
        return [trial for trial, at in self.attempts if at == rung]

    def owed(self) -> list[tuple[str, int]]:
        """Lost (trial, rung) to be started again, oldest first."""
        return [place for place, attempt in self.attempts.items() if not attempt.is_open]

    def _take_spec(self, record: Record) -> None:
        self.spec = record["spec"]
        self.finished = None

    def _propose(self, record: Record) -> None:
        trial = Trial.proposed(record)
        if trial.number != self.num_proposals:
            raise CorruptError(f"proposal {trial.number} stands where {self.num_proposals} is due")
        self.num_proposals += 1
        self.arrivals_before_proposal = len(self.arrivals)
        self.trials[trial.trial] = trial
        self.queue.pop(record.get("request") or "", None)
        self.rejected.update(record["rejected"])

    def _reserve(self, record: Record) -> None:
        task = record["task"]
        place = task["trial"], task["rung"]
        if task["task_id"] in self.closed_tasks or task["task_id"] in self.open_tasks:
            raise CorruptError(f"task {task['task_id']} is reserved twice")
        attempt = self.attempts.get(place)
        if attempt is None:
            meant_for, redone_flops = record.get("meant_for", task["rung"]), record.get("redone_flops", 0)
            nominal_flops = task["reserved_flops"]
            self.attempts[place] = Attempt(
                task, meant_for=meant_for, nominal_flops=nominal_flops, redone_flops=redone_flops
            )
            self.nominal_flops[task["rung"]] += nominal_flops - redone_flops
            decision = {"task_id": task["task_id"], "reserved_flops": nominal_flops, "meant_for": meant_for}
            decision["reason"] = record.get("reason")
            self.decisions.append(decision)
        else:
            attempt.task, attempt.is_open = task, True
            attempt.tries += 1
        self.open_tasks[task["task_id"]] = place
        self.reserved_flops += task["reserved_flops"]

    def _close(self, task_id: str) -> tuple[tuple[str, int], Attempt]:
        place = self.open_tasks.pop(task_id)
        attempt = self.attempts[place]
        self.reserved_flops -= attempt.task["reserved_flops"]
        self.closed_tasks.add(task_id)
        return place, attempt

    def _take_row(self, record: Record) -> None:
        row = record["row"]
        (trial, rung), attempt = self._close(record["task_id"])
        if (row["trial"], row["rung"]) != (trial, rung):
            raise CorruptError(f"task {record['task_id']} brought the row of another place")
        del self.attempts[trial, rung]
        self._place(row)
        redone_flops = min(attempt.redone_flops, row["task_flops"])
        self.spent_flops += row["task_flops"]
        self.redone_flops += redone_flops
        self.trained_flops[trial, rung] += row["task_flops"] - redone_flops
        self.eval_flops += row["eval_flops"]
        if row["status"] == "oom" and record.get("memory"):
            kind, needed_bytes = record["memory"]
            self.memory_limits[kind] = min(needed_bytes, self.memory_limits.get(kind, needed_bytes))
        for probe in record["probes"]:
            self.probes.append(probe)
            self.eval_flops += probe["eval_flops"]

    def _lose(self, record: Record) -> None:
        self.losses.append(record)
        attempt, gained = self._suspend(record)
        attempt.lost = 0 if gained else attempt.lost + (record["fault"] == WORKER)

    def _yield(self, record: Record) -> None:
        self._suspend(record)

    def _suspend(self, record: Record) -> tuple[Attempt, int]:
        """A try ended without a row; the attempt, and how much further it got."""
        place, attempt = self._close(record["task_id"])
        attempt.is_open = False
        gained = attempt.gain(record)
        attempt.progress, attempt.progress_flops = record["progress"], record["progress_flops"]
        lost_flops = max(0, record["charged_flops"] - gained)
        self.spent_flops += record["charged_flops"]
        self.lost_flops += lost_flops
        self.trained_flops[place] += record["charged_flops"] - lost_flops
        return attempt, gained

    def _abandon(self, record: Record) -> None:
        place = record["trial"], record["rung"]
        del self.attempts[place]
        self.abandoned[place] = record["reason"]

    def _evict(self, record: Record) -> None:
        self.evicted[record["trial"], record["rung"]] = record

    def _import(self, record: Record) -> None:
        for trial in record["trials"]:
            self.trials[trial["trial"]] = Trial(**trial, number=None, source=IMPORT)
        for row in record["rows"]:
            self._place(row)
        self.arrivals_before_proposal = len(self.arrivals)
        self.imports.append(counted_import(record))
        self.finished = None

    def _place(self, row: Record) -> None:
        trial, rung = row["trial"], row["rung"]
        self.rungs.setdefault(rung, {})[trial] = row
        self.trials[trial].rows[rung] = row
        self.arrivals.append((trial, rung))

    def _check(self, record: Record) -> None:
        needed = ("flops", "metric", "predicted", "measured", "inside", "task_flops")
        self.checks.append({name: record[name] for name in needed} | record)

    def _answer(self, record: Record) -> None:
        self.requests[record["id"]] = record
        if record["refused"] is not None:
            self.queue.pop(record["id"], None)
        elif record["verb"] == ENQUEUE:
            self.queue[record["id"]] = record
            self.finished = None
        elif record["verb"] == CANCEL and self.queue.pop(record["trial"], None) is None:
            self.cancelled[record["trial"]] = record["by"]

    def _finish(self, record: Record) -> None:
        self.finished = record["reason"]


_HANDLERS = {
    "opened": lambda state, record: None,
    "spec": SweepState._take_spec,
    "proposal": SweepState._propose,
    "task": SweepState._reserve,
    "row": SweepState._take_row,
    "lost": SweepState._lose,
    "yielded": SweepState._yield,
    "abandoned": SweepState._abandon,
    "evicted": SweepState._evict,
    "imported": SweepState._import,
    "check": SweepState._check,
    "request": SweepState._answer,
    "finished": SweepState._finish,
}


def counted_import(record: Record) -> Record:
    """What is told of an import: its rows and trials as counts."""
    told = {name: record[name] for name in ("file", "known", "left_out")}
    return told | {name: len(record[name]) for name in ("rows", "trials")}


def comparable_value(row: Mapping[str, Any], metric: str, tolerance: float) -> float | None:
    """The row's value where it may be compared: status ok, finite, and C within the tolerance of the rung."""
    value = row["metrics"].get(metric) if row["status"] == "ok" else None
    if value is None or not math.isfinite(value):
        return None
    # A last step that did not fit is allowed for; one that is larger than the tolerance is not.
    within = abs(row["path_flops"] / row["rung_flops"] - 1.0) <= tolerance
    return float(value) if within else None


def spec_of(state: SweepState) -> SweepSpec:
    """The spec that a ledger was last driven by. Raises ValueError for one that holds none."""
    if state.spec is None:
        raise ValueError("the ledger holds no sweep")
    return from_dict(state.spec)
