"""What a person watches: progress of data, training and sweeps on stderr; a live bar on a terminal, else lines."""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bfm.laws.frontier import Compare, Row, best_row, gap_between, is_better, metric_value, no_answers
from bfm.report.digits import gap_text, value_text
from bfm.report.floors import strongest
from bfm.sweep.ledger.state import SweepState
from bfm.sweep.plan.crowding import crowding
from bfm.training.records import StepRecord, Validation
from bfm.units import format_count, format_flops, format_seconds

LINE_EVERY_S = 10.0


class Display:
    """One bar with words beside it; without a terminal, a line at most every `LINE_EVERY_S` seconds.

    Use as a context manager. Lines meant to stay go through `say`. Where more threads want to run than there are cores,
    the words end with that.
    """

    def __init__(self, title: str) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._title = title
        self._last_line_s = time.monotonic() - LINE_EVERY_S
        self._last_words = ""
        self._crowding, self._looked_s = "", -math.inf
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[words]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task(title, total=1.0, words="")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.console.print(line, markup=False)

    def show(self, words: str, fraction: float) -> None:
        """Move the bar to `fraction` (0..1) with `words` beside it."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= LINE_EVERY_S:
            self._looked_s, self._crowding = now_s, crowding()
        shown = "  ".join(filter(None, (words, self._crowding)))
        self._bar.update(self._task, completed=min(max(fraction, 0.0), 1.0), words=shown)
        due = now_s - self._last_line_s >= LINE_EVERY_S
        if not self.console.is_terminal and words != self._last_words and (due or fraction >= 1.0):
            self.say(f"{self._title}: {shown} ({fraction:.0%})")
            self._last_line_s, self._last_words = now_s, words


def step_words(record: StepRecord, limit_flops: float, peak_flops_per_s: float) -> str:
    """The live line of training: C, losses, and of the last minute events/s, share of the machine's matmul peak, and
    the time left by that."""
    left_s = max(0.0, limit_flops - record.path_flops) / max(record.flops_per_s, 1.0)
    headline = f" (headline {record.loss_headline:.4f})" if math.isfinite(record.loss_headline) else ""
    return (
        f"C {format_flops(record.path_flops)}  loss {record.loss:.4f}{headline}  "
        f"{format_count(record.events_per_s)} events/s  {record.flops_per_s / peak_flops_per_s:.1%} of peak  "
        f"{format_seconds(left_s)} left"
    )


def validation_text(validation: Validation) -> str:
    """A validation on the way: each metric beside the strongest floor, the best nll so far, and a warning if due."""
    parts = []
    for metric, value in validation.metrics.items():
        floor = strongest(validation.floors, metric)
        beside = ""
        if floor is not None:
            side = "above" if is_better(metric, value, floor.value) else "BELOW"
            beside = f" ({side} {floor.name} {floor.value:.4g})"
        parts.append(f"{metric} {value_text(value, validation.errors.get(metric, math.nan))}{beside}")
    best = "the best so far" if validation.is_best else f"best nll {best_words(validation)}"
    cooled = " cooled," if validation.phase == "cooldown" else ""
    where = f"C {format_flops(validation.path_flops)},{cooled} {validation.epochs:.2g} epochs"
    line = f"validation at {where}: {', '.join(parts)}; {best}"
    return "\n".join(filter(None, (line, memorising_words(validation))))


def memorising_words(validation: Validation) -> str:
    """What is wrong with a model that memorises, and what to do; empty for one that does not."""
    if not validation.memorises:
        return ""
    return (
        f"WARNING: the model memorises: nll is {value_text(validation.rise, validation.rise_error or math.nan)} above "
        f"its best ({best_words(validation)}), while the training loss fell by {validation.loss_fall:.3g}. Train for "
        "fewer epochs, raise `dropout` or `table_weight_decay`, or bring more data."
    )


def best_words(validation: Validation) -> str:
    """The lowest nll so far, and where it was."""
    where = f"C {format_flops(validation.best_flops)}, {validation.best_epochs:.2g} epochs"
    return f"{validation.best_nll:.4g} at {where}"


class Leaders:
    """The best row of each rung as a sweep goes on; every row is looked at once, however many there are."""

    def __init__(self, metric: str) -> None:
        self._metric, self._num_seen = metric, 0
        self._best: dict[int, Row] = {}

    def beside(self, row: Row, state: SweepState) -> Row | None:
        """The best of those that arrived before a row at its rung; None where none has a value.

        To be asked of each row as it arrives, before the next one does.
        """
        for trial, rung in state.arrivals[self._num_seen :]:
            if (trial, rung) == (row["trial"], row["rung"]):
                break
            self._take(state.rungs[rung][trial], rung)
            self._num_seen += 1
        return self._best.get(row["rung"])

    def _take(self, row: Row, rung: int) -> None:
        if row["status"] == "ok" and math.isfinite(metric_value(row, self._metric)):
            best = self._best.get(rung)
            self._best[rung] = row if best is None else best_row((best, row), self._metric)


def row_words(row: Row, metric: str, best: Row | None = None, compare: Compare = no_answers) -> str:
    """One line for a finished rung row: its numbers, and how far it is from the best of the others at its rung."""
    where = f"rung {row['rung']} ({format_flops(row['rung_flops'])})  {row['trial']}"
    if row["status"] != "ok":
        return f"{where}  {row['status']}"
    value, error = row["metrics"][metric], row["errors"].get(metric)
    spread = f" \u00b1 {error:.2g}" if error is not None else ""
    if best is not None:
        spread += f" ({gap_text(gap_between(row, best, metric, compare))} to {best['trial']})"
    return (
        f"{where}  N {format_count(row['params'])}  s {row['embedder_share']:.1%}  D {format_count(row['events'])}  "
        f"{metric} {value:.4g}{spread}  {row['engine']} x{row['workers']}  {format_seconds(row['train_s'])}"
    )
