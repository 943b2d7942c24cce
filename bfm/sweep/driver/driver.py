"""The driver of a sweep: asks the policy, reserves under the cap, journals, and can be killed at any point.

Enters: `next_task` for a free slot, `report` of rows, `lost` of dead tasks. Leaves: tasks, and ledger records; nothing
is true before it stands in the ledger. A driver that resumes charges the tasks it finds open with what they may have
trained, and starts them again first, from their in-rung checkpoints; with one worker its decisions then equal those of
the unbroken run. No Ray here: whoever asks for tasks, trains them and reports is an executor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import count, takewhile

from bfm.sweep.driver.breaker import Breaker
from bfm.sweep.driver.quota import evictions
from bfm.sweep.driver.requests import Request, answer, next_asked
from bfm.sweep.driver.workers import GROW_LEFT_S, worthwhile
from bfm.sweep.ledger.changes import check_changes, check_rows, past_parameters
from bfm.sweep.ledger.imports import RunTable, import_record
from bfm.sweep.ledger.ledger import Ledger, MemoryLedger, collector_paused
from bfm.sweep.ledger.rows import Row, checked_row, without_nan
from bfm.sweep.ledger.state import DRIVER, WORKER, Record, SweepState, Trial, counted_import
from bfm.sweep.ledger.task import Finished, Task, Wait
from bfm.sweep.policies.arena import Arena, Proposal
from bfm.sweep.policies.by_name import make_policy
from bfm.sweep.policies.policy import Start, Stop
from bfm.sweep.policies.space_arena import SpaceArena
from bfm.sweep.space.settings import SweepSpec
from bfm.sweep.space.space import FeasibleSet
from bfm.training.task import MADE, Account, object_name
from bfm.units import format_flops

_LOOKS_BACK = 200
"""So many of the last rows tell how fast so many workers are."""
Fits = Callable[[Task, int], bool]
Settle = Callable[[Task], Account]
"""What a task that ended without a row may have trained; afterwards it can train nothing more."""


def charge_all(task: Task) -> Account:
    """Where nothing is known of a task: its whole reservation."""
    return Account(task.reserved_flops)


class SweepDriver:
    """One sweep over one ledger."""

    def __init__(
        self,
        spec: SweepSpec,
        ledger: Ledger | MemoryLedger,
        arena: Arena,
        *,
        settle: Settle = charge_all,
        extend: bool = False,
        log: Mapping[str, str] | None = None,
    ) -> None:
        self.spec, self.arena, self.policy = spec, arena, make_policy(spec, arena)
        with collector_paused():
            self.state = SweepState.fold(ledger.replay.records)
        self._ledger = ledger
        self._settle = settle
        self._breaker = Breaker(self.state)
        self._open(extend, log or {})

    @classmethod
    def start(
        cls,
        feasible: FeasibleSet,
        ledger: Ledger | MemoryLedger,
        *,
        settle: Settle = charge_all,
        extend: bool = False,
        log: Mapping[str, str] | None = None,
    ) -> SweepDriver:
        """Of a space on its log.

        Args:
            feasible, ledger: what is swept, and where it is written down.
            settle: tells what a lost task may have trained.
            extend: more of the spec may differ from the ledger's (see bfm.sweep.ledger.changes).
            log: shards_hash and protocol_hash of what tasks are trained and scored on; rows of a ledger that name
                others are refused.

        Raises:
            InfeasibleError: the space has no point.
            UserError: a change would spoil the rows at hand.
        """
        past = past_parameters(ledger.replay.records)
        arena = SpaceArena(feasible, past)
        return cls(feasible.spec, ledger, arena, settle=settle, extend=extend, log=log)

    @property
    def epoch(self) -> int:
        """Of the lease that it writes under."""
        return self._ledger.epoch

    @property
    def available_flops(self) -> int:
        """What may still be reserved."""
        return self.spec.budget.total_flops - self.state.spent_flops - self.state.reserved_flops

    def next_task(self, fits: Fits = lambda task, copies: True) -> Task | Wait | Finished:
        """The next task, its cost reserved in the ledger; Wait only while tasks are running or it does not fit.

        `fits`: whether there is room for so many tasks like it now. Nothing is reserved or proposed for one that has
        none. It takes the most workers that pay (`workers`) and that all other free slots could take, too.
        """
        if self.state.finished is not None:
            return Finished(self.state.finished)
        if len(self.state.open_tasks) >= self.spec.scaling.slots:
            return Wait(f"all {self.spec.scaling.slots} slots are busy")
        while True:
            owed = self.state.owed()
            if owed:
                again = self._again(owed[0], fits)
                if again is not None:
                    return again
                continue
            decision = self._asked() or self.policy.decide(self.state, self.available_flops)
            if isinstance(decision, Wait):
                assert self.state.open_tasks, "a policy waits although nothing is running"
                return decision
            if isinstance(decision, Stop):
                if self.state.open_tasks:
                    return Wait(f"the last tasks are running ({decision.reason})")
                self._write({"kind": "finished", "reason": decision.reason})
                return Finished(decision.reason)
            return self._begin(decision, fits)

    def report(self, task_id: str, row: Row) -> bool:
        """Commit a task's rung row; its key `probes`, if any, holds the probe rows of the way.

        False for a task that is already closed: nothing is written. Raises ValueError for a task that never was or a
        row that is not the task's, UserError where an ok row lacks the metric that the sweep selects by.
        """
        if not self._is_open(task_id):
            return False
        task = self._open_task(task_id)
        if row["status"] == "oom":
            # What it noted before it died is ahead of the work, as in `_ended`.
            row = {**row, "task_flops": min(row["task_flops"], task.reserved_flops)}
        probes = [without_nan(probe) for probe in row.get("probes", ())]
        checked = checked_row(row, task, self.spec.metric.name, needs_trunk=self.arena.climbs(task.config))
        record: Record = {"kind": "row", "task_id": task_id, "row": checked, "probes": probes}
        if checked["status"] == "oom":
            record["memory"] = self._memory(task)
        self._write_end((task.trial, task.rung), record)
        self._breaker.row()
        self._keep_quota()
        return True

    def lost(self, task_id: str, reason: str, *, retry: bool = True, fault: str = WORKER) -> bool:
        """A task ended without a row: what it may have trained is charged. False for a task that is already closed.

        `retry` False: it would end so again (an infeasible configuration, say), so it is given up at once.
        `fault` NODE: its machine spoils whatever it is given: not the task's fault, and no reason to pause; STORAGE:
        the sweep's disk is full, for which whoever asks pauses by himself.
        Raises PausedError, once all is written, where the losses are nobody's configuration (bfm.sweep.driver.breaker).
        """
        if not self._is_open(task_id):
            return False
        loss = self._loss(task_id, reason, fault)
        given_up = {"kind": "abandoned", "trial": loss["trial"], "rung": loss["rung"], "reason": reason}
        self._write_end((loss["trial"], loss["rung"]), loss, *([] if retry else [given_up]))
        if retry and fault == WORKER:
            self._breaker.loss(loss)
        return True

    def yielded(self, task_id: str, account: Account) -> bool:
        """A task ended early because it was asked to: what it trained is charged, and it is owed the rest.

        False for a task that is already closed.
        """
        if not self._is_open(task_id):
            return False
        self._write_end(self.state.open_tasks[task_id], self._ended("yielded", task_id, account))
        return True

    def growable(self, left_s: Mapping[str, float]) -> Iterator[tuple[Task, list[Task]]]:
        """Tasks that could use more workers, each with the ways to do so, most workers first.

        `left_s`: task id -> seconds that it will still take; those that end soon are left alone.
        """
        for task_id, seconds in left_s.items():
            if seconds < GROW_LEFT_S or not self._is_open(task_id):
                continue
            task = self._open_task(task_id)
            wider = [other for other in self._ways(task) if other.scaling["workers"] > task.scaling["workers"]]
            if wider:
                yield task, wider

    def take_runs(self, runs: RunTable) -> Record:
        """Import what the ledger does not have yet of a table; what came of it, counted."""
        record = import_record(self.state, runs, self.spec)
        if record["rows"]:
            self._write(record)
            self._keep_quota()
        return counted_import(record)

    def take(self, request: Request) -> Record:
        """Answer what somebody asks from outside; the record says whether it is refused, and why.

        A cancelled trial that runs goes on until its executor ends it (`yielded`); it is then not started again.
        """
        record = answer(request, self.state, self.arena, self.spec.budget.total_flops, self.epoch)
        self._write(record)
        return record

    def close(self) -> None:
        """Give the lease back; the sweep can be resumed."""
        self._ledger.close()

    def _open(self, extend: bool, log: Mapping[str, str]) -> None:
        records: list[Record] = [{"kind": "opened", "epoch": self.epoch}]
        check_rows((row for trial in self.state.trials.values() for row in trial.rows.values()), log)
        changed = check_changes(self.state.spec, self.spec, extend=extend)
        if self.state.spec is None or changed:
            records.append({"kind": "spec", "spec": self.spec.as_dict(), "hash": self.spec.hash})
        records += [self._loss(task_id, "the driver ended", DRIVER) for task_id in self.state.open_tasks]
        self._write(*records)
        # The last holder may have died between a record and what it drops.
        for evicted in self.state.evicted.values():
            self._ledger.drop(evicted["checkpoint"])
        for place in (*self.state.arrivals[-1:], *list(self.state.abandoned)[-1:]):
            self._drop_made(place)
        self._keep_quota()

    def _keep_quota(self) -> None:
        """The record first: what the ledger calls a trunk must stand."""
        records = evictions(self.spec, self.state, self.policy)
        if records:
            self._write(*records)
            for record in records:
                self._ledger.drop(record["checkpoint"])

    def _write_end(self, place: tuple[str, int], *records: Record) -> None:
        """A try, or a place for good, is over: what neither a row nor the next try goes on from is dropped."""
        before = self.state.attempts[place].progress
        self._write(*records)
        attempt = self.state.attempts.get(place)
        if attempt is None:
            self._drop_made(place)
        elif before not in (None, attempt.progress):
            self._ledger.drop(before)

    def _drop_made(self, place: tuple[str, int]) -> None:
        """Drop what the tries of a place have made and its row does not name, also where no account has named it: a
        writer may be killed between a checkpoint and the note of it."""
        trial, rung = place
        row = self.state.rungs.get(rung, {}).get(trial, {})
        tries = len(list(takewhile(self.state.closed_tasks.__contains__, (_task_id(*place, n) for n in count()))))
        if tries == 1 and row.get("status") == "ok":
            # It has tidied up behind itself.
            return
        for name in (object_name(trial, rung, number, what) for number in range(tries) for what in MADE):
            if name not in (row.get("checkpoint"), row.get("model")):
                self._ledger.drop(name)

    def _write(self, *records: Record) -> None:
        self._ledger.append(records)
        for record in records:
            self.state.apply(record)

    def _is_open(self, task_id: str) -> bool:
        if task_id not in self.state.open_tasks and task_id not in self.state.closed_tasks:
            raise ValueError(f"there is no task {task_id}")
        return task_id in self.state.open_tasks

    def _open_task(self, task_id: str) -> Task:
        return Task.from_dict(self.state.attempts[self.state.open_tasks[task_id]].task)

    def _loss(self, task_id: str, reason: str, fault: str) -> Record:
        attempt = self.state.attempts[self.state.open_tasks[task_id]]
        account = self._settle(self._open_task(task_id))
        if account.progress is None:
            # It got no further than where it began.
            account = replace(account, progress=attempt.progress, progress_flops=attempt.progress_flops)
        return {**self._ended("lost", task_id, account), "reason": reason, "fault": fault}

    def _ended(self, kind: str, task_id: str, account: Account) -> Record:
        """The record of a try without a row."""
        task = self.state.attempts[self.state.open_tasks[task_id]].task
        return {
            "kind": kind,
            "task_id": task_id,
            "trial": task["trial"],
            "rung": task["rung"],
            # An account is ahead of the work, also where the work ends.
            "charged_flops": min(account.spent_flops, task["reserved_flops"]),
            "progress": account.progress,
            "progress_flops": account.progress_flops,
        }

    def _again(self, place: tuple[str, int], fits: Fits) -> Task | Wait | None:
        """Start a lost task again; None after giving it up."""
        attempt = self.state.attempts[place]
        trial, rung = place
        old = Task.from_dict(attempt.task)
        task = self._task(self.state.trials[trial], rung, old.from_rung, attempt.tries)
        if attempt.progress is not None:
            left = task.rung_flops - attempt.progress_flops
            ahead = tuple(flops for flops in task.probes if flops > attempt.progress_flops)
            task = replace(task, progress=attempt.progress, reserved_flops=left, probes=ahead)
        if trial in self.state.cancelled:
            reason = f"it was cancelled by {self.state.cancelled[trial]}"
        elif attempt.lost > self.spec.scaling.max_retries:
            reason = f"it was lost {attempt.lost} times and got no further"
        elif task.reserved_flops > self.available_flops:
            if self.state.open_tasks:
                return Wait("running tasks may leave room under the cap for a lost one")
            reason = f"the cap has no room to train it again ({format_flops(self.available_flops)} FLOPs are left)"
        else:
            placed = self._placed(task, fits, len(self.state.owed()))
            if isinstance(placed, Task):
                self._write({"kind": "task", "task": placed.as_dict(), "reason": f"try {attempt.tries + 1}"})
            return placed
        self._write_end(place, {"kind": "abandoned", "trial": trial, "rung": rung, "reason": reason})
        return None

    def _asked(self) -> Start | Wait | None:
        """What was enqueued goes before what the policy would do, and is refused where the cap has no room left."""
        while (start := next_asked(self.state, self.arena)) is not None and start.request is not None:
            needed_flops = self.arena.reserve_flops(start.subject.config, start.rung, None)
            if needed_flops <= self.available_flops:
                return start
            if self.state.open_tasks:
                return Wait("running tasks may leave room under the cap for what was asked for")
            refused = f"the cap has no room for it ({format_flops(self.available_flops)} FLOPs are left)"
            self._write({**self.state.queue[start.request], "refused": refused})
        return None

    def _begin(self, decision: Start, fits: Fits) -> Task | Wait:
        trial, records = decision.subject, []
        if isinstance(trial, Proposal):
            number, seed = self.state.num_proposals, self.spec.seeds[0] if trial.seed is None else trial.seed
            who = {"trial": f"t{number:05d}", "number": number, "seed": seed}
            records = [{"kind": "proposal", **asdict(trial), **who, "request": decision.request}]
            trial = Trial.proposed(records[0])
        task = self._task(trial, decision.rung, self.state.trunk_below(trial.trial, decision.rung), 0)
        placed = self._placed(task, fits, self.spec.scaling.slots - len(self.state.open_tasks))
        if isinstance(placed, Wait):
            return placed
        task = placed
        assert task.reserved_flops <= self.available_flops, "a policy went over the cap"
        also = {"meant_for": decision.meant_for}
        trained = self.state.trunk_below(task.trial, task.rung, or_evicted=True)
        if trained != task.from_rung:
            spared = self.arena.reserve_flops(task.config, task.rung, trained)
            also["redone_flops"] = task.reserved_flops - spared
        self._write(*records, {"kind": "task", "task": task.as_dict(), "reason": decision.reason, **also})
        return task

    def _placed(self, task: Task, fits: Fits, alike: int) -> Task | Wait:
        """With as many workers as `alike` tasks could have, but at least the fewest; Wait where there is no room."""
        *wider, narrowest = self._ways(task)
        for other in wider:
            if fits(other, alike):
                return other
        return narrowest if fits(narrowest, 1) else Wait("the next task waits for a place", narrowest)

    def _ways(self, task: Task) -> list[Task]:
        """A task with each number of workers that pays, most first."""
        config, rung, limits = task.config, task.rung, self.state.memory_limits
        # After all of them ran out of memory it goes on as it could before.
        places = self.arena.places(config, rung, limits) or self.arena.places(config, rung, {})
        scalings = {place.scaling["workers"]: place.scaling for place in places}
        rows = (self.state.trials[trial].rows[rung] for trial, rung in self.state.arrivals[-_LOOKS_BACK:])
        counts = worthwhile(sorted(scalings), rows, task.config.get("params"), task.reserved_flops)
        return [replace(task, scaling=scalings[workers]) for workers in counts]

    def _memory(self, task: Task) -> tuple[str, int] | None:
        """The kind of tier that a task ran at, and the bytes that one of its workers was estimated to need; None where
        the space has no such tier any more."""
        places = self.arena.places(task.config, task.rung, {})
        found = (place for place in places if place.scaling["workers"] == task.scaling["workers"])
        return next(((place.tier.kind, place.needed_bytes) for place in found), None)

    def _task(self, trial: Trial, rung: int, from_rung: int | None, tries: int) -> Task:
        """Of a trial, from a lower rung's trunk (None: from nothing); its workers are chosen with its place."""
        spec, config = self.spec, trial.config
        # The part of the trunk that is trained again after an eviction has its probe rows.
        trained = self.state.trunk_below(trial.trial, rung, or_evicted=True)
        return Task(
            task_id=_task_id(trial.trial, rung, tries),
            attempt=tries,
            trial=trial.trial,
            rung=rung,
            rung_flops=round(self.arena.row_flops(config, rung)),
            config=config,
            seed=trial.seed,
            resume_from=None if from_rung is None else trial.rows[from_rung]["checkpoint"],
            from_rung=from_rung,
            reserved_flops=self.arena.reserve_flops(config, rung, from_rung),
            scaling={},
            probes=spec.probes_between(config["cooldown_fraction"], rung, trained) if spec.probes else (),
            evaluation_queries=spec.data.evaluation_queries,
            stage1=None if spec.stage1 is None else spec.stage1.checkpoint,
        )


def _task_id(trial: str, rung: int, tries: int) -> str:
    return f"{trial}-r{rung}-a{tries}"
