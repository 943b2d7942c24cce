"""A whole executor of a driver's tasks, one after the other in this process: the reference for what Ray does."""

from __future__ import annotations

from collections.abc import Callable

from bfm.errors import CorruptError, InfeasibleError, UserError
from bfm.sweep.driver.driver import SweepDriver
from bfm.sweep.ledger.rows import Row
from bfm.sweep.ledger.task import Finished, Task


def run_serial(driver: SweepDriver, execute: Callable[[Task], Row]) -> str:
    """Run a sweep to its end in this process, one task at a time; returns why it ended.

    `execute` trains a task. What it raises as a fault of its own (not of the configuration, not of the input) loses
    the task, which is then tried again.
    """
    while True:
        task = driver.next_task()
        if isinstance(task, Finished):
            return task.reason
        assert isinstance(task, Task), "one task at a time leaves nothing to wait for"
        try:
            row = execute(task)
        except InfeasibleError as error:
            driver.lost(task.task_id, str(error), retry=False)
        except (UserError, CorruptError):
            raise
        except Exception as error:
            driver.lost(task.task_id, f"{type(error).__name__}: {error}")
        else:
            driver.report(task.task_id, row)
