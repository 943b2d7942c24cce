"""What a person watches: progress of data, training and sweeps on stderr; a live bar on a terminal, else lines."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bfm.laws.frontier import Compare, Row, rung_bests, unpaired
from bfm.report.digits import gap_text
from bfm.training.loop import StepRecord
from bfm.units import format_count, format_flops, format_seconds

LINE_EVERY_S = 10.0


class Display:
    """One bar with words beside it; without a terminal, a line at most every `LINE_EVERY_S` seconds.

    Use as a context manager. Lines meant to stay go through `say`.
    """

    def __init__(self, title: str) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._title = title
        self._last_line_s = time.monotonic() - LINE_EVERY_S
        self._last_words = ""
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
        self._bar.update(self._task, completed=min(max(fraction, 0.0), 1.0), words=words)
        due = time.monotonic() - self._last_line_s >= LINE_EVERY_S
        if not self.console.is_terminal and words != self._last_words and (due or fraction >= 1.0):
            self.say(f"{self._title}: {words} ({fraction:.0%})")
            self._last_line_s, self._last_words = time.monotonic(), words


def step_words(record: StepRecord, limit_flops: float, peak_flops_per_s: float) -> str:
    """The live line of training: C, loss, events/s, share of the machine's measured matmul peak, time left."""
    left_s = (limit_flops - record.path_flops) / max(record.flops_per_s, 1.0)
    return (
        f"C {format_flops(record.path_flops)}  loss {record.loss:.4f}  {format_count(record.events_per_s)} events/s  "
        f"{record.flops_per_s / peak_flops_per_s:.1%} of peak  {format_seconds(left_s)} left"
    )


def row_words(row: Row, metric: str, others: Iterable[Row] = (), compare: Compare = unpaired) -> str:
    """One line for a finished rung row: its numbers, and how far it is from the best of the others at its rung."""
    where = f"rung {row['rung']} ({format_flops(row['rung_flops'])})  {row['trial']}"
    if row["status"] != "ok":
        return f"{where}  {row['status']}"
    value, error = row["metrics"][metric], row["errors"].get(metric)
    spread = f" \u00b1 {error:.2g}" if error is not None else ""
    best = rung_bests(others, metric).get(row["rung_flops"])
    if best is not None:
        spread += f" ({gap_text(compare(row, best, metric))} to {best['trial']})"
    return (
        f"{where}  N {format_count(row['params'])}  s {row['embedder_share']:.1%}  D {format_count(row['events'])}  "
        f"{metric} {value:.4g}{spread}  {row['engine']} x{row['workers']}  {format_seconds(row['train_s'])}"
    )
