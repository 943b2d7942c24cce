"""Rows of a sweep for MLflow and W&B, by their own SDKs: a run per trial, its metrics by rung.

Enters: rows as they arrive. Leaves: an experiment (MLflow) or project (W&B) of the sweep's name, with what is swept as
the runs' settings. A tool may be slow, away or wrong: it has a thread of its own, its first error is said, all are
counted, and none stops a sweep. Rows that are not taken are in the ledger all the same; they are not told again.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bfm.errors import UserError
from bfm.files import sha256_bytes
from bfm.laws.frontier import Row

CLOSING_S = 30.0
"""A sweep that ends waits so long for rows that a tool has not taken yet."""
SIZES = {"N": "params", "s": "embedder_share", "D": "events", "C": "path_flops", "epochs": "epochs"}
"""What people call it -> its name in a row."""
_log = logging.getLogger(__name__)
Log = Callable[[Row], None]


@dataclass(frozen=True)
class Told:
    """The sweep, as its tools know it."""

    name: str
    place: str
    """Folder or URI of the sweep."""
    swept: tuple[str, ...]
    """The settings in which its trials differ."""

    def settings(self, row: Row) -> dict[str, Any]:
        """What a trial is."""
        config = row.get("config") or {}
        return {**{name: config.get(name) for name in self.swept}, "seed": row.get("seed")}

    def run_id(self, row: Row) -> str:
        """The same for a trial whenever it is told of, and no other's."""
        return sha256_bytes(f"{self.place}/{row['trial']}".encode())[:16]


def values_of(row: Row) -> dict[str, float]:
    """A row's metrics with their standard errors, N, s, D, C and epochs: what of them is a finite number."""
    values = dict(row.get("metrics") or {})
    values |= {f"error/{metric}": error for metric, error in (row.get("errors") or {}).items()}
    values |= {name: row.get(key) for name, key in SIZES.items()}
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


def mlflow_log(told: Told) -> Log:
    """Rows to MLflow, wherever MLFLOW_TRACKING_URI says; `@` is no letter of its names: ndcg_at_10."""
    # Its client prints the address of each run that ends; a sweep's stdout is data.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    package = _package("mlflow")
    entities = package.entities
    runs: dict[str, str] = {}
    # An address that is wrong is told of as one that is away.
    connected = functools.cache(package.MlflowClient)

    def begun(row: Row) -> str:
        client = connected()
        known = client.get_experiment_by_name(told.name)
        experiment = known.experiment_id if known else client.create_experiment(told.name)
        mine = f"tags.bfm_run = '{told.run_id(row)}'"
        if stored := client.search_runs([experiment], filter_string=mine, max_results=1):
            return str(stored[0].info.run_id)
        tags = {"bfm_run": told.run_id(row), "sweep": told.place}
        run = client.create_run(experiment, run_name=row["trial"], tags=tags).info.run_id
        settings = [entities.Param(name, str(value)) for name, value in told.settings(row).items()]
        client.log_batch(run, params=settings)
        return str(run)

    def log(row: Row) -> None:
        client, trial = connected(), str(row["trial"])
        if trial not in runs:
            runs[trial] = begun(row)
        values, now_ms = values_of(row), int(1000 * time.time())
        named = {name.replace("@", "_at_"): value for name, value in values.items()}
        metrics = [entities.Metric(name, value, now_ms, row["rung"]) for name, value in named.items()]
        client.log_batch(runs[trial], metrics=metrics)
        client.set_terminated(runs[trial], "FINISHED" if _is_ok(row) else "FAILED")

    return log


def wandb_log(told: Told) -> Log:
    """Rows to W&B, as its own settings say (WANDB_MODE, WANDB_ENTITY, `wandb login`)."""
    package = _package("wandb")

    def log(row: Row) -> None:
        run = package.init(
            project=told.name,
            id=told.run_id(row),
            name=row["trial"],
            config={**told.settings(row), "sweep": told.place},
            resume="allow",
            # What the sweep shows on its terminal is its own.
            settings=package.Settings(console="off", silent=True),
        )
        run.log(values_of(row), step=row["rung"])
        run.finish(exit_code=0 if _is_ok(row) else 1)

    return log


TOOLS: Mapping[str, Callable[[Told], Log]] = {"mlflow": mlflow_log, "wandb": wandb_log}


class Tracker:
    """One tool, in a thread of its own."""

    def __init__(self, name: str, log: Log) -> None:
        self.name, self._log = name, log
        self.taken = self.failed = 0
        self._rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"sweep-{name}", daemon=True)
        self._thread.start()

    def row(self, row: Row) -> None:
        """Hand a row over; never waits."""
        self._rows.put(row)

    def close(self, patience_s: float = CLOSING_S) -> None:
        """Wait until the tool has taken what it was handed, and say what it has not."""
        self._rows.put(None)
        self._thread.join(patience_s)
        left = max(0, self._rows.qsize() - 1) + 1 if self._thread.is_alive() else 0
        if self.failed or left:
            _log.warning("%s took %d rows, refused %d and left %d", self.name, self.taken, self.failed, left)

    def _run(self) -> None:
        while (row := self._rows.get()) is not None:
            try:
                self._log(row)
                self.taken += 1
            except Exception as error:
                self.failed += 1
                if self.failed == 1:
                    words = " ".join(f"{type(error).__name__}: {error}".split())
                    _log.warning(
                        "%s does not take the row of %s (%s); the sweep goes on", self.name, row["trial"], words
                    )


def open_logs(names: Sequence[str], told: Told) -> dict[str, Log]:
    """The tools among a space's loggers. Raises UserError for one whose package is not installed."""
    return {name: TOOLS[name](told) for name in names if name in TOOLS}


@contextmanager
def tracking(logs: Mapping[str, Log]) -> Iterator[Log]:
    """Hand rows to every tool; at the end wait a while for what they have not taken yet."""
    trackers = [Tracker(name, log) for name, log in logs.items()]

    def row(row: Row) -> None:
        for tracker in trackers:
            tracker.row(row)

    try:
        yield row
    finally:
        for tracker in trackers:
            tracker.close()


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        fix = f"pip install 'bfm[{name}]', or leave it out"
        raise UserError(f"{name} is not installed ({error})", key="loggers", fix=fix) from error


def _is_ok(row: Row) -> bool:
    return bool(row.get("status", "ok") == "ok")
