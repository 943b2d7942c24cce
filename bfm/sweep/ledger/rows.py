"""What a task may bring: a row is checked before it becomes a record of the ledger.

Enters: a rung row as training tells it, and its task. Leaves: the row as it is written down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bfm.errors import UserError
from bfm.sweep.ledger.state import Record
from bfm.sweep.ledger.task import Task

Row = Mapping[str, Any]
STATUSES = ("ok", "diverged", "oom")
_NEEDED = ("trial", "rung", "rung_flops", "status", "path_flops", "task_flops", "eval_flops", "metrics")


def checked_row(row: Row, task: Task, metric: str, *, needs_trunk: bool) -> Record:
    """A copy without its probes; an ok row whose selecting metric is no number has diverged.

    Raises ValueError for a row that is not the task's, or names no trunk where one is needed to go on from; UserError
    where an ok row lacks the metric.
    """
    missing = [key for key in _NEEDED if key not in row]
    if missing:
        raise ValueError(f"the row of task {task.task_id} lacks {', '.join(missing)}")
    if (row["trial"], row["rung"]) != (task.trial, task.rung) or row["status"] not in STATUSES:
        raise ValueError(f"the row of task {task.task_id} is of {row['trial']} rung {row['rung']} {row['status']}")
    checked = without_nan({key: value for key, value in row.items() if key != "probes"})
    if checked["status"] == "ok":
        if needs_trunk and not isinstance(row.get("checkpoint"), str):
            raise ValueError(f"the row of task {task.task_id} names no checkpoint to go on from")
        if metric not in row["metrics"]:
            known = ", ".join(sorted(row["metrics"]))
            raise UserError(f"no row has {metric!r}", key="metric.name", fix=f"rows of this log have {known}")
        if checked["metrics"][metric] is None:
            checked["status"] = "diverged"
    return checked


def without_nan(row: Row) -> Record:
    """A copy in which numbers that JSON has no word for are None."""

    def clean(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, Mapping):
            return {key: clean(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(inner) for inner in value]
        return value

    return clean(row)
