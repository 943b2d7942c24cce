"""A sweep from its YAML to its end: `python -m ray_jobs.sweep SPACE.yaml --storage URI`, also as a Ray job.

Enters: a search space and a storage prefix. Leaves: <storage>/<name>/ with sweep.yaml, ledger, trials, tensorboard;
exit 0, 1 where nothing came of it, 2 where the input is wrong (one line, before Ray starts), 128 + n on signal n.
Ray runs the tasks and knows nothing else: the ledger is the truth, and the same command goes on from it.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray
import yaml

from bfm.doors.loggers import Log, Told, open_logs, tracking
from bfm.doors.tensorboard import HPARAMS_METRICS, SweepWriter
from bfm.errors import CorruptError, PausedError, UserError
from bfm.exits import exit_code
from bfm.files import Store, absolute
from bfm.laws.frontier import Row
from bfm.ranking.baselines import baseline_scores
from bfm.ranking.paired import Pairing
from bfm.report.console import Display, Leaders, row_words
from bfm.report.floors import Baselines, publish_floors, read_floor_scores
from bfm.sweep.driver.driver import SweepDriver
from bfm.sweep.driver.live import tell_waits
from bfm.sweep.driver.requests import Request, new_requests, request_words
from bfm.sweep.driver.status import import_words
from bfm.sweep.ledger.imports import read_runs
from bfm.sweep.ledger.lease import Lease
from bfm.sweep.ledger.ledger import Ledger, has_begun
from bfm.sweep.ledger.state import IMPORT, STOP
from bfm.sweep.plan.machine import Machine
from bfm.sweep.plan.plan import check_held
from bfm.sweep.space.on_log import OpenedSpace, open_space
from bfm.sweep.space.settings import TENSORBOARD, SweepSpec
from bfm.sweep.space.spec import resolve
from bfm.training.journal import settle
from bfm.units import format_flops
from ray_jobs.attempts import Attempts
from ray_jobs.cluster_session import cluster_address
from ray_jobs.desk import Desk, SweepEvent
from ray_jobs.pulse import Pulses
from ray_jobs.room import ClusterRoom, check_fits
from ray_jobs.signals import Interrupted, signals_raise
from ray_jobs.trial import Executor, Workplace, pauses_where_full
from ray_jobs.tuning import quiet_session, run_tasks

_log = logging.getLogger(__name__)
RESUME = ("auto", "never", "must")
_RAY_TRAIN_WRITES = ("s3://", "gs://")
Progress = Callable[[SweepEvent, SweepDriver], None]


@dataclass(frozen=True)
class SweepOutcome:
    """How a sweep ended."""

    reason: str
    trials: int
    rows: int
    """Rung rows with metrics."""
    failed: int
    """Rung rows without: diverged, out of memory."""
    lost: int
    """Tasks whose worker died."""
    spent_flops: int
    cap_flops: int
    path: str

    @property
    def succeeded(self) -> bool:
        """Whether anything came of it."""
        return self.rows > 0

    def line(self) -> str:
        """One line for a person."""
        losses = f", {self.failed} failed, {self.lost} lost" if self.failed or self.lost else ""
        return (
            f"{self.trials} trials, {self.rows} rows{losses}; spent {format_flops(self.spent_flops)} of "
            f"{format_flops(self.cap_flops)} FLOPs; {self.reason}; {self.path}"
        )


def run_sweep(
    spec: SweepSpec,
    storage: str,
    *,
    resume: str = "auto",
    extend: bool = False,
    runs: str | Path | None = None,
    progress: Progress | None = None,
    execute: Executor | None = None,
) -> SweepOutcome:
    """Run a sweep to its end on the Ray at hand: this process's, RAY_ADDRESS's, or one of its own for this machine.

    Args:
        spec: the checked search space; its name is the folder under `storage`.
        storage: path or URI that every node reaches.
        resume: auto goes on from a ledger if there is one, never refuses one, must demands one.
        extend: more of the spec may differ from that of the ledger (bfm.sweep.ledger.changes).
        runs: table of runs to import (bfm.sweep.ledger.imports).
        progress: called in this process at every event.
        execute: what trains a task, instead of the shards' real training.

    Raises:
        UserError: the space is infeasible on the shards, the sweep does not fit the machine, another one holds the
            ledger, a logger is not installed, or `resume` or `extend` disagree with what stands. Nothing is running
            then.
        CorruptError: shards, checkpoint or ledger are damaged.
        PausedError: tasks are lost to a fault that is nobody's configuration, or the storage's disk is full; the sweep
            can be resumed.
        Interrupted: SIGINT or SIGTERM; the sweep can be resumed.
    """
    store = _sweep_store(storage, spec.name, resume, extend)
    logs = open_logs(spec.listeners, Told(spec.name, store.uri, spec.swept))
    opened = open_space(spec)
    _check_groups(spec, store)
    joins = ray.is_initialized() or bool(cluster_address())
    if not joins:
        machine = Machine.here()
        check_fits(opened.spec, machine)
        check_held(opened.feasible, machine)
    # A table that is refused begins no sweep.
    table = None if runs is None else read_runs(runs, opened.spec, opened.feasible, opened.protocol.hash)
    with signals_raise(), pauses_where_full(store.uri), _driver(opened, store, extend) as driver:
        store.put("sweep.yaml", yaml.safe_dump(opened.spec.as_dict(), sort_keys=False).encode())
        tell = progress or (lambda event, driver: None)
        tell(SweepEvent("opened"), driver)
        if table is not None:
            words = "; ".join([import_words(driver.take_runs(table)), *table.told])
            tell(SweepEvent("imported", reason=words), driver)
        try:
            for request in new_requests(store, driver.state.requests):
                record = driver.take(request)
                tell(SweepEvent("asked", reason=request_words(record)), driver)
                if record["verb"] == STOP and record["refused"] is None:
                    raise Interrupted(signal.SIGTERM, f"`bfm stop` of {record['by']}")
            if driver.state.finished is None:
                with pauses_where_full(store.uri):
                    _train(opened, store, driver, joins, progress, execute, logs)
        except (Interrupted, PausedError) as end:
            why = f"stopped by {end}; the same command goes on" if isinstance(end, Interrupted) else "paused"
            print(_outcome(driver, store, why).line(), file=sys.stderr)
            raise
        return _outcome(driver, store, driver.state.finished or "ended")


def _check_groups(spec: SweepSpec, store: Store) -> None:
    """Raises UserError where Ray Train, which starts groups of workers, cannot write its notes to a storage."""
    several = any(tier.workers > 1 for tiers in spec.scaling.tiers for tier in tiers)
    if several and not (store.is_local or store.uri.startswith(_RAY_TRAIN_WRITES)):
        what = f"tiers of several workers need a storage that Ray Train writes to, and {store.uri} is none"
        raise UserError(what, key="--storage", fix="name an s3:// or gs:// place, or tiers of one worker")


def _sweep_store(storage: str, name: str, resume: str, extend: bool) -> Store:
    if resume not in RESUME:
        raise UserError(f"{resume!r} is not a way to resume", key="--resume", fix=f"write {', '.join(RESUME)}")
    if extend and resume == "never":
        raise UserError("never goes on, but --extend must", key="--resume", fix="leave out one of the two")
    store = Store(absolute(storage)).child(name)
    begun = has_begun(store)
    if begun and resume == "never":
        raise UserError("there is a sweep already", file=store.uri, fix="give another --name, or --resume auto")
    if not begun and extend:
        raise UserError("there is no sweep to extend", file=store.uri, key="--extend", fix="check --storage and --name")
    if not begun and resume == "must":
        raise UserError("there is no sweep to resume", file=store.uri, fix="check --storage and --name")
    return store


@contextmanager
def _driver(opened: OpenedSpace, store: Store, extend: bool) -> Iterator[SweepDriver]:
    log = {"shards_hash": opened.shards.hash, "protocol_hash": opened.protocol.hash}
    lease = Lease.acquire(store)
    try:
        ledger, tidy = Ledger(store, lease), partial(settle, store=store)
        yield SweepDriver.start(opened.feasible, ledger, settle=tidy, extend=extend, log=log)
    finally:
        lease.release()


def _train(
    opened: OpenedSpace,
    store: Store,
    driver: SweepDriver,
    joins: bool,
    progress: Progress | None,
    execute: Executor | None,
    logs: Mapping[str, Log],
) -> None:
    """Run tasks on Ray until the sweep ends. `joins`: the cluster is another's, and may grow."""
    spec = opened.spec
    scores = baseline_scores(opened.shards, opened.protocol, "validation", queries=spec.data.evaluation_queries)
    floors = publish_floors(store, scores)
    with (
        quiet_session(os.cpu_count()),
        # Ray takes the signals for itself when it starts, so they are taken back afterwards.
        signals_raise() as signals,
        _listener(store, driver, floors, logs, progress) as on_event,
        closing(Pulses()) as pulses,
    ):
        signals.waits = True
        room, running = ClusterRoom(grows=joins), Attempts(store, pulses)

        def inbox() -> list[Request]:
            return new_requests(store, driver.state.requests)

        desk = Desk(
            driver,
            spec.scaling.slots,
            on_event=on_event,
            room=room,
            running=running,
            signals=signals,
            inbox=inbox,
            tell_waits=partial(tell_waits, store, driver.epoch),
        )
        place = Workplace(
            absolute(spec.data.shards),
            store.uri,
            HPARAMS_METRICS,
            pulses,
            swept=spec.swept,
            curves=TENSORBOARD in spec.listeners,
        )
        run_tasks(desk, execute or place)


@contextmanager
def _listener(
    store: Store, driver: SweepDriver, floors: Baselines, logs: Mapping[str, Log], progress: Progress | None
) -> Iterator[Callable[[SweepEvent], None]]:
    """Sweep-level TensorBoard, other people's tools and the caller's display, as one listener."""
    with tracking(logs) as track, _curves(store, driver, floors) as draw:

        def listen(event: SweepEvent) -> None:
            if event.row is not None:
                draw()
                track(event.row)
            if progress is not None:
                progress(event, driver)

        yield listen


@contextmanager
def _curves(store: Store, driver: SweepDriver, floors: Baselines) -> Iterator[Callable[[], None]]:
    """What draws the sweep as it stands; nothing where TensorBoard is none of the loggers."""
    if TENSORBOARD not in driver.spec.listeners:
        yield lambda: None
        return
    writer = SweepWriter(f"{store.uri}/tensorboard/_sweep", floors)
    try:
        yield lambda: writer.update(driver.state)
        rows = driver.state.all_rows()
        try:
            writer.finish(rows, compare=Pairing(store, read_floor_scores(store)))
        except (CorruptError, OSError) as error:
            # As in `_row_line`: what scores say is told beside the results, and is none of them.
            _log.warning("the frontier is drawn without comparisons: %s", error)
            writer.finish(rows)
    finally:
        writer.close()


def _outcome(driver: SweepDriver, store: Store, reason: str) -> SweepOutcome:
    state = driver.state
    rows = [row for here in state.rungs.values() for row in here.values() if row.get("source") != IMPORT]
    ok = sum(row["status"] == "ok" for row in rows)
    cap_flops, failed = driver.spec.budget.total_flops, len(rows) - ok
    return SweepOutcome(
        reason, state.num_proposals, ok, failed, len(state.losses), state.spent_flops, cap_flops, store.uri
    )


def sweep_verb(
    space: str | Path,
    storage: str,
    *,
    name: str | None = None,
    resume: str = "auto",
    extend: bool = False,
    runs: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> int:
    """`bfm sweep`: run with a display on stderr; the exit code. Raises as `run_sweep`, but for signals."""
    spec = resolve(space, [*overrides, *([f"name={name}"] if name else [])])
    compare, leaders = Pairing(Store(storage).child(spec.name)), Leaders(spec.metric.name)
    with Display("sweep") as display:

        def show(event: SweepEvent, driver: SweepDriver) -> None:
            state = driver.state
            if event.kind == "opened":
                display.say(f"sweep {spec.name}: ladder {', '.join(map(format_flops, spec.budget.ladder_flops))} FLOPs")
                return
            if event.row is not None:
                display.say(_row_line(event.row, spec.metric.name, leaders.beside(event.row, state), compare))
            elif event.kind in ("imported", "asked"):
                display.say(event.reason)
            elif event.kind in ("lost", "yielded", "growing", "quarantined", "waiting") and event.task is not None:
                display.say(f"{event.kind} {event.task.task_id}" + (f": {event.reason}" if event.reason else ""))
            rows = len(state.arrivals) - sum(record["rows"] for record in state.imports)
            spent = f"{format_flops(state.spent_flops)} of {format_flops(spec.budget.total_flops)} FLOPs"
            words = f"{state.num_proposals} trials  {rows} rows  {len(state.open_tasks)} running  {spent}"
            display.show(words, state.spent_flops / spec.budget.total_flops)

        try:
            outcome = run_sweep(spec, storage, resume=resume, extend=extend, runs=runs, progress=show)
        except Interrupted as interrupt:
            return 128 + interrupt.number
        display.say(outcome.line())
    return 0 if outcome.succeeded else 1


def _row_line(row: Row, metric: str, best: Row | None, compare: Pairing) -> str:
    try:
        return row_words(row, metric, best, compare)
    except (CorruptError, OSError) as error:
        # Scores that cannot be read end no sweep; `bfm status` raises.
        return f"{row_words(row, metric)}  ({error})"


def main(arguments: Sequence[str] | None = None) -> int:
    """The job's entry point: faults and wrong input are one line on stderr and an exit code."""
    parser = argparse.ArgumentParser(prog="python -m ray_jobs.sweep", description=__doc__)
    parser.add_argument("space", help="search-space YAML")
    parser.add_argument("--storage", required=True, help="path or URI that every node reaches")
    parser.add_argument("--name", help="folder under the storage (default: the file's name)")
    parser.add_argument("--resume", default="auto", help="auto, never or must")
    parser.add_argument("--extend", action="store_true", help="go on with more rungs, seeds or space than before")
    parser.add_argument("--import", dest="runs", metavar="RUNS", help="Parquet, CSV or JSON lines of earlier runs")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    return exit_code(lambda: sweep_verb(**vars(options)))


if __name__ == "__main__":
    sys.exit(main())
