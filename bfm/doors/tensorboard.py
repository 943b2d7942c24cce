"""TensorBoard of a sweep: step records and ledger rows in, event files out; one folder per trial and one for the sweep.

TensorBoard shows groups of tags by name, so what a sweep is about has the first: `frontier`, of the sweep, then
`loss_by_C` and `metrics_by_C`, of its trials. Those are against C, at x = round(1000 log10 C), because the x of
TensorBoard is a whole number (12000 is 1e12 FLOPs); all else of a trial is against steps. Cooldown branches have tags
of their own: the trunk goes on from where they began. `val/` is a row over all its queries, `validation/` a look on the
way at the first of them, `row/` what HParams show of its size. A trial writes a few hundred points however long it
trains. Writers may be opened again in another process: they go on where the folder's files end.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.metadata import PLUGIN_DATA_VERSION, PLUGIN_NAME, SESSION_END_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
from torch.utils.tensorboard.summary import custom_scalars, hparams, text

from bfm.doors.events_file import EventFile, flops_step, stored_events
from bfm.laws.frontier import (
    Compare,
    Results,
    Row,
    by_rung,
    goal_of,
    metric_error,
    metric_value,
    no_answers,
    rung_rows,
)
from bfm.report.floors import Baselines, shown_name, strongest
from bfm.report.tables import frontier_text
from bfm.sweep.ledger.state import SweepState
from bfm.training.records import Record, StepRecord, Validation
from bfm.training.watch import WATCHED
from bfm.units import format_flops

# A point is worth writing when C (of a sweep, the number of results) or the time has grown by this factor, but not
# sooner than after this long, and within this share of the run's time.
POINT_GROWTH, POINT_INTERVAL_S, WRITING_SHARE = 1.02, 10.0, 0.01
_TAGS = {
    "trunk": {
        "train/loss": "loss",
        "train/loss_headline": "loss_headline",
        "train/loss_basket": "loss_basket",
        "opt/lr": "learning_rate",
        "opt/grad_norm": "grad_norm",
        "perf/events_per_s": "events_per_s",
        "perf/flops_per_s": "flops_per_s",
        "progress/events": "events",
        "progress/path_flops": "path_flops",
        "progress/elapsed_s": "elapsed_s",
        "progress/stage": "stage",
    },
    "cooldown": {
        "train_cooldown/loss": "loss",
        "train_cooldown/loss_headline": "loss_headline",
        "train_cooldown/loss_basket": "loss_basket",
        "opt_cooldown/lr": "learning_rate",
        "opt_cooldown/grad_norm": "grad_norm",
        "perf_cooldown/events_per_s": "events_per_s",
    },
}
HPARAMS_METRICS = ("nll", "recall@10", "ndcg@10", "mrr@10", "coverage@10")
"""Metrics that the HParams tab shows, after N, s, D and C of the last row."""
_SIZES = {"row/N": "params", "row/s": "embedder_share", "row/D": "events", "row/C": "path_flops"}
_MARKERS = {"trunk": "train/loss", "cooldown": "train_cooldown/loss"}
_BY_C = {"trunk": "loss_by_C/trunk", "cooldown": "loss_by_C/cooldown"}
_VALIDATION_TAGS = {"trunk": "validation", "cooldown": "validation_cooled"}


class TrialWriter:
    """Scalars of one trial; hands `.take` to training as its observer.

    Steps up to the last one in the folder are not written again. settings: what HParams show of the trial, in this
    order; metrics: names of the protocol's metrics, such as nll and recall@10.
    """

    def __init__(
        self,
        log_dir: str | Path,
        settings: Mapping[str, Any],
        metrics: Sequence[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = EventFile(log_dir, clock)
        self._clock = clock
        self._opened_s = clock()
        self._writing_s = 0.0
        self._written_s = -math.inf
        self._written_flops = dict.fromkeys(_TAGS, 0.0)
        self._last_step = dict.fromkeys(_TAGS, -1)
        self._last_place = dict.fromkeys(_TAGS, -1)
        self._rung_steps: set[int] = set()
        self._validated: dict[str, set[int]] = {tag: set() for tag in _VALIDATION_TAGS.values()}
        self._waiting: StepRecord | None = None
        if not self._read_back():
            self._begin(settings, metrics)

    def step(self, record: StepRecord) -> None:
        """Take a step record (rank 0 only). Most are dropped: see `POINT_GROWTH`; the last of a phase never is."""
        if record.step <= self._last_step[record.phase]:
            return
        if self._waiting is not None and self._waiting.phase != record.phase:
            self._write_waiting()
        self._waiting = record
        now_s = self._clock()
        grown = record.path_flops >= POINT_GROWTH * self._written_flops[record.phase]
        first = self._last_step[record.phase] < 0
        run_s = now_s - self._opened_s
        cheap = self._writing_s <= WRITING_SHARE * run_s
        due = now_s - self._written_s >= max(POINT_INTERVAL_S, (POINT_GROWTH - 1) * run_s)
        if first or (cheap and (grown or due)):
            self._write_waiting()

    def take(self, record: Record) -> None:
        """Take whatever training tells."""
        if isinstance(record, Validation):
            self.validation(record)
        else:
            self.step(record)

    def validation(self, validation: Validation) -> None:
        """A validation on the way beside the best so far and the strongest floors; one that stands is left alone."""
        tag = _VALIDATION_TAGS[validation.phase]
        if validation.step in self._validated[tag]:
            return
        self._validated[tag].add(validation.step)
        values = {f"{tag}/{metric}": value for metric, value in validation.metrics.items()}
        floors = {metric: strongest(validation.floors, metric) for metric in validation.metrics}
        values |= {f"{tag}/{metric}_floor": floor.value for metric, floor in floors.items() if floor is not None}
        values |= {f"{tag}/nll_best": validation.best_nll, f"{tag}/epochs": validation.epochs}
        self._file.scalars(validation.step, values)
        by_c = {_against_c(metric, f"{tag}_{metric}"): value for metric, value in validation.metrics.items()}
        self._file.scalars(flops_step(validation.path_flops), by_c)
        self._file.flush()

    def row(self, row: Row) -> None:
        """Validation metrics of a rung row with two-standard-error bands; a row that failed marks the session so."""
        self._write_waiting()
        if row.get("kind", "rung") != "rung":
            return
        steps = int(row.get("steps") or 0)
        if row.get("status", "ok") != "ok":
            self._file.summary(_session_end("STATUS_FAILURE"))
        elif steps not in self._rung_steps:
            self._rung_steps.add(steps)
            sizes = {tag: row.get(name) for tag, name in _SIZES.items()}
            self._file.scalars(steps, {**_validation(row), **sizes, "progress/rung": row.get("rung")})
            by_c = {_against_c(metric, metric): metric_value(row, metric) for metric in row.get("metrics") or {}}
            self._file.scalars(flops_step(row["path_flops"]), by_c)
        self._file.flush()

    def close(self) -> None:
        """Write what waits and close the file; the writer may not be used after."""
        self._write_waiting()
        self._file.close()

    def __del__(self) -> None:
        # A worker group drops its observer without a word; what waits must still reach the disk.
        if hasattr(self, "_waiting"):
            self.close()

    def _write_waiting(self) -> None:
        record, self._waiting = self._waiting, None
        if record is None:
            return
        began_s = self._clock()
        phase, place = record.phase, flops_step(record.path_flops)
        values = {tag: getattr(record, name) for tag, name in _TAGS[phase].items()}
        kind = _MARKERS[phase].partition("/")[0]
        values |= {f"{kind}/gate_{component}": gate for component, gate in record.gates.items()}
        self._file.scalars(record.step, values)
        if place > self._last_place[phase]:
            self._file.scalars(place, {_BY_C[phase]: record.loss})
            self._last_place[phase] = place
        self._last_step[phase], self._written_flops[phase] = record.step, record.path_flops
        self._written_s = self._clock()
        self._writing_s += self._written_s - began_s

    def _read_back(self) -> bool:
        """Take up what earlier processes wrote; False where the folder has no session yet."""
        started = False
        for event in stored_events(self._file.store):
            for value in event.summary.value:
                started = started or value.metadata.plugin_data.plugin_name == PLUGIN_NAME
                if value.tag.startswith("val/"):
                    self._rung_steps.add(event.step)
                for tag, steps in self._validated.items():
                    if value.tag == f"{tag}/nll":
                        steps.add(event.step)
                for phase, marker in _MARKERS.items():
                    if value.tag == marker:
                        self._last_step[phase] = max(self._last_step[phase], event.step)
                    elif value.tag == _BY_C[phase]:
                        self._last_place[phase] = max(self._last_place[phase], event.step)
        return started

    def _begin(self, settings: Mapping[str, Any], metrics: Sequence[str]) -> None:
        # The three protos go into this very file: torch's add_hparams would open a run of its own beside the curves.
        shown = {name: value for name, value in settings.items() if isinstance(value, (bool, int, float, str))}
        for summary in hparams(shown, dict.fromkeys([*_SIZES, *(f"val/{metric}" for metric in metrics)], 0.0)):
            self._file.summary(summary)
        self._file.summary(custom_scalars(_trial_layout(metrics)))
        self._file.flush()


class SweepWriter:
    """Scalars of the whole sweep against the number of results; results already in the folder are not written again.

    The floors stand beside the frontier of each metric.
    """

    def __init__(self, log_dir: str | Path, baselines: Baselines, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = EventFile(log_dir, clock)
        self._baselines, self._clock = baselines, clock
        self._written_s, self._writing_s = -math.inf, 0.0
        self._waiting: SweepState | None = None
        self._last_step = -1
        for event in stored_events(self._file.store):
            if any(value.tag == "spend/total" for value in event.summary.value):
                self._last_step = max(self._last_step, event.step)
        self._has_layout = self._last_step >= 0

    def update(self, state: SweepState) -> None:
        """After a commit: frontier per metric and rung, spend and occupancy per rung, where a point is worth writing.

        A point looks at all rows, so few are written of many thousand results.
        """
        results = len(state.arrivals)
        if results <= self._last_step:
            return
        self._waiting = state
        grown = results >= POINT_GROWTH * self._last_step
        if grown or self._clock() - self._written_s >= self._writing_s / WRITING_SHARE:
            self._write_waiting()

    def _write_waiting(self) -> None:
        state, self._waiting = self._waiting, None
        if state is None:
            return
        began_s = self._clock()
        self._point(state)
        self._written_s = self._clock()
        self._writing_s = self._written_s - began_s

    def _point(self, state: SweepState) -> None:
        found = rung_rows(state.all_rows())
        if not found:
            return
        self._last_step = len(found)
        told = Results(found).frontiers()
        if not self._has_layout:
            self._has_layout = True
            self._file.summary(custom_scalars(_sweep_layout(list(told))))
        best = {
            f"frontier/{metric}/C={format_flops(point.flops)}": point.value
            for metric, points in told.items()
            for point in points
        }
        best |= {
            f"frontier/{metric}/floor={shown_name(name)}": values[metric]
            for metric in told
            for name, values in self._baselines.items()
            if metric in values
        }
        self._file.scalars(len(found), {**best, **_spend(found, state), **_occupancy(found, state)})
        by_spend = {tag.replace("frontier/", "frontier_by_spend/", 1): value for tag, value in best.items()}
        self._file.scalars(flops_step(state.spent_flops), by_spend)
        self._file.flush()

    def finish(self, rows: Sequence[Row], compare: Compare = no_answers) -> None:
        """The frontier as a text table; closes the file."""
        self._write_waiting()
        self._file.summary(
            text("frontier", f"<pre>\n{frontier_text(Results(rows), self._baselines, compare)}\n</pre>"),
            len(rung_rows(rows)),
        )
        self.close()

    def close(self) -> None:
        """Write what waits and close the file."""
        self._write_waiting()
        self._file.close()


def _validation(row: Row) -> dict[str, float]:
    values: dict[str, float] = {}
    for metric in row.get("metrics") or {}:
        value, error = metric_value(row, metric), metric_error(row, metric)
        values[f"val/{metric}"] = value
        values[f"val_low/{metric}"], values[f"val_high/{metric}"] = value - 2 * error, value + 2 * error
    return values


def _against_c(metric: str, name: str) -> str:
    """The tag of a metric's curve against C."""
    return f"{'loss' if goal_of(metric) == 'minimize' else 'metrics'}_by_C/{name}"


def _spend(found: Sequence[Row], state: SweepState) -> dict[str, float]:
    values = {"spend/total": float(state.spent_flops)}
    if state.cap_flops:
        values["spend/share_of_cap"] = state.spent_flops / state.cap_flops
    for flops, here in by_rung(found).items():
        values[f"spend/C={format_flops(flops)}"] = float(state.trained_at(here[0]["rung"]))
    return values


def _occupancy(found: Sequence[Row], state: SweepState) -> dict[str, float]:
    values: dict[str, float] = {"occupancy/trials": len({str(row["trial"]) for row in found})}
    values["occupancy/failed"] = sum(row.get("status", "ok") != "ok" for row in found)
    values["occupancy/running"] = len(state.open_tasks)
    for flops, here in by_rung(found).items():
        values[f"occupancy/C={format_flops(flops)}"] = len(here)
    return values


def _sweep_layout(metrics: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    against = {"Frontier": "frontier", "Frontier against spend": "frontier_by_spend"}
    return {
        title: {metric: ["Multiline", [f"^{group}/{re.escape(metric)}/"]] for metric in metrics}
        for title, group in against.items()
    }


def _trial_layout(metrics: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    bands = {metric: ["Margin", [f"val/{metric}", f"val_low/{metric}", f"val_high/{metric}"]] for metric in metrics}
    return {
        "Training": {
            "loss against C": ["Multiline", [f"^{tag}$" for tag in _BY_C.values()]],
            "loss": ["Multiline", [f"^{tag}$" for tag in _MARKERS.values()]],
            "loss of headline and of basket targets": ["Multiline", ["^train/loss_", "^train_cooldown/loss_"]],
            "mean gates": ["Multiline", ["^train/gate_", "^train_cooldown/gate_"]],
        },
        "Validation on the way": {
            metric: ["Multiline", [f"^validation/{metric}(_best|_floor)?$"]] for metric in WATCHED
        },
        "Validation, two standard errors": bands,
        "Throughput": {"events per second": ["Multiline", ["^perf/events_per_s$", "^perf_cooldown/events_per_s$"]]},
    }


def _session_end(status: str) -> Summary:
    content = HParamsPluginData(
        session_end_info=SessionEndInfo(status=Status.Value(status)), version=PLUGIN_DATA_VERSION
    ).SerializeToString()
    value = Summary.Value(tag=SESSION_END_INFO_TAG)
    value.metadata.plugin_data.plugin_name = PLUGIN_NAME
    value.metadata.plugin_data.content = content
    return Summary(value=[value])
