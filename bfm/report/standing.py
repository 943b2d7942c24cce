"""Where a sweep stands now, for a terminal: whether it runs, what is trained, what waits; once, or again and again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from bfm.report.sweep_view import SweepView
from bfm.report.tables import failures_text, frontier_text, spend_text, trials_text
from bfm.sweep.driver.status import life_text
from bfm.sweep.ledger.state import SweepState
from bfm.units import format_count, format_flops, format_seconds, ruled

_URGENT = (0, 5, 1, 2, 4, 3)
"""Which of `_parts` are cut last."""
_FEWEST = 4
"""Rows of a screen below which a part says nothing."""
_RUNNING = ("running", "rung", "phase", "step", "C", "done", "loss", "events/s", "left", "on", "told")


def status_text(view: SweepView) -> str:
    """For a terminal: whether it runs, what runs and waits, the frontier so far, the spend per rung, the best trials,
    failures, the last decisions."""
    return "\n\n".join(part for part in _parts(view) if part)


def _parts(view: SweepView) -> list[str]:
    return [
        _now_text(view.live, view.state),
        frontier_text(view.results, view.floors, view.compare),
        spend_text(view.results, view.state),
        trials_text(view.results, view.compare),
        failures_text(view.rows, view.state),
        life_text(view.state),
    ]


def watch(
    read: Callable[[], SweepView],
    *,
    every_s: float,
    as_json: bool,
    console: Console | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show a sweep every so many seconds, until it has ended: on a terminal in place, else one look after another.

    With `as_json` each look is a line of JSON.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    if as_json or not console.is_terminal:
        for view in _looks(read, every_s, sleep):
            print(json.dumps(view.as_dict()) if as_json else f"{status_text(view)}\n", flush=True)
        return
    with Live(console=console, auto_refresh=False, transient=False) as shown:
        for view in _looks(read, every_s, sleep):
            shown.update(Text(fitting(_parts(view), console.width, console.height)), refresh=True)


def fitting(parts: Sequence[str], width: int, height: int) -> str:
    """Parts in their order, cut to a screen: what comes first in `_URGENT` has half of what is left, and says how much
    is missing."""
    kept, left = dict[int, str](), height - 1
    for place in _URGENT:
        lines, shown, used = parts[place].splitlines(), list[str](), 0
        room = left if place == _URGENT[-1] else max(left // 2, min(left, _FEWEST))
        for line in lines:
            used += max(1, -(-len(line) // width))
            if used > room - 2:
                shown.append(f"... {len(lines) - len(shown)} more lines without --watch")
                break
            shown.append(line)
        if lines and room >= _FEWEST:
            kept[place] = "\n".join(shown)
            left -= min(used, room - 1) + 1
    return "\n\n".join(kept[place] for place in sorted(kept))


def _looks(read: Callable[[], SweepView], every_s: float, sleep: Callable[[float], None]) -> Iterator[SweepView]:
    while True:
        view = read()
        yield view
        if view.state.finished is not None and view.live["driver"] is None:
            return
        sleep(every_s)


def _now_text(live: Mapping[str, Any], state: SweepState) -> str:
    """Whether it runs, the spend, what is searched and the best checkpoint, then what runs and what waits."""
    parts = ["\n".join([_driver_line(live["driver"], state), _spend_line(state), *_kept_lines(live)])]
    if live["running"]:
        parts.append(ruled(_RUNNING, [_running_cells(task) for task in live["running"]]))
    if live["waiting"]:
        parts.append("\n".join(["waiting", *(f"  {one['what']}: {one['why']}" for one in live["waiting"])]))
    return "\n\n".join(parts)


def _driver_line(driver: Mapping[str, Any] | None, state: SweepState) -> str:
    if driver is not None:
        return f"runs, driven by process {driver['pid']} on {driver['host']}"
    return f"finished: {state.finished}" if state.finished else "nobody runs it; the same command goes on"


def _spend_line(state: SweepState) -> str:
    cap_flops = state.cap_flops or 0
    spent = f"spent {format_flops(state.spent_flops)} of {format_flops(cap_flops)} FLOPs"
    left_flops = cap_flops - state.spent_flops - state.reserved_flops
    return f"{spent}, {format_flops(state.reserved_flops)} reserved, {format_flops(max(0, left_flops))} left"


def _kept_lines(live: Mapping[str, Any]) -> list[str]:
    settings = ", ".join(f"{name} {_range(shape)}" for name, shape in live["settings"].items())
    lines = [f"searches {settings}"] if settings else []
    return [*lines, f"best checkpoint {live['best_checkpoint']}"] if live["best_checkpoint"] else lines


def _range(shape: Mapping[str, Any]) -> str:
    if "values" in shape:
        return f"one of {', '.join(map(str, shape['values']))}"
    return f"{shape['min']:g} to {shape['max']:g}" + (" (log)" if "log" in shape["distribution"] else "")


def _running_cells(task: Mapping[str, Any]) -> list[str]:
    rate, loss, left_s, told_s = (task[name] for name in ("events_per_s", "loss", "left_s", "told_s"))
    return [
        task["task_id"],
        str(task["rung"]),
        task["phase"] or "starts",
        "-" if task["step"] is None else str(task["step"]),
        format_flops(task["path_flops"]),
        f"{task['path_flops'] / task['rung_flops']:.0%}",
        "-" if loss is None else f"{loss:.4f}",
        "-" if rate is None else format_count(rate),
        "-" if left_s is None else format_seconds(left_s),
        "-" if task["host"] is None else f"{task['host']} x{task['workers']}",
        "-" if told_s is None else f"{format_seconds(told_s)} ago",
    ]
