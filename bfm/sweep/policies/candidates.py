"""Everything that could be begun, rung by rung: paused trials in order of their proposals, then new proposals.

Enters: Views and the pools of their arenas. Leaves: Ways, candidates as arrays of coordinates and costs. What follows
from a trial's rows, or from a proposal, alone is kept from one decision to the next; that is for speed, and changes
nothing. Costs are kept as Python's whole numbers: beyond 2^53 FLOPs a double would round what has to fit under a cap.

Shape legend: M candidates, R rungs, X numeric axes, G axes of choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, islice

import numpy as np

from bfm.sweep.ledger.state import Trial
from bfm.sweep.policies.arena import Arena, Proposal
from bfm.sweep.policies.ground import Step, View, ascent_flops
from bfm.sweep.policies.surrogate import Places

_ROOM = 1024
_STALE = 20_000
"""So many lines of proposals that are gone, and of trials as they were, are worth a fresh start."""
Coordinates = Callable[[Trial | Proposal], tuple[np.ndarray, np.ndarray, int]]
"""Numbers, codes of choices, and who it is (0: a new proposal)."""


@dataclass(frozen=True)
class Ways:
    """Some candidates, each on its way to a rung."""

    table: dict[str, np.ndarray]
    """See Candidates."""
    lines_M: np.ndarray
    rungs_M: np.ndarray

    def __len__(self) -> int:
        return len(self.lines_M)

    def at(self, name: str, rung: int | None = None) -> np.ndarray:
        """A column of the table at a rung; None: at the one that each is on its way to."""
        found: np.ndarray = self.table[name][self.lines_M, self.rungs_M if rung is None else rung]
        return found

    @property
    def cost_M(self) -> np.ndarray:
        """FLOPs of all tasks up to the rung; whole numbers of Python."""
        return self.at("cost_flops")

    @property
    def rung(self) -> int:
        """The one that all of them are on their way to."""
        return int(self.rungs_M[0])

    @property
    def places(self) -> Places:
        """Coordinates of the rows that they are on their way to."""
        table, lines_M = self.table, self.lines_M
        log_flops_M = np.log(self.at("row_flops"))
        return Places(table["numbers"][lines_M], table["codes"][lines_M], log_flops_M, table["id"][lines_M])

    def step(self, place: int) -> Step:
        """One of them."""
        line, rung = int(self.lines_M[place]), int(self.rungs_M[place])
        first, cost_flops = int(self.table["first"][line, rung]), self.table["cost_flops"][line, rung]
        return Step(self.table["subject"][line], first, rung, cost_flops)

    def take(self, kept: np.ndarray | Sequence[int]) -> Ways:
        """Those of an index or a mask."""
        return Ways(self.table, self.lines_M[kept], self.rungs_M[kept])

    def within(self, available_flops: int) -> Ways:
        """Those whose whole way may be reserved."""
        return self.take(np.asarray(self.cost_M <= available_flops, dtype=bool)) if len(self) else self


class Candidates:
    """A table with a line for each, and which of its lines may be begun now."""

    def __init__(self, arena: Arena, coordinates: Coordinates, num_rungs: int) -> None:
        self.arena, self._coordinates, self._num_rungs = arena, coordinates, num_rungs
        self._limits: dict[str, int] | None = None
        self._num_arrivals = self._num_evicted = 0
        """How many of them were seen."""

    def _forget(self) -> None:
        axes, num_rungs = self.arena.axes, self._num_rungs
        self._table = {
            "subject": np.zeros(0, object),
            "numbers": np.zeros((0, 1 + len(axes.numbers))),
            "codes": np.zeros((0, len(axes.choices)), int),
            "id": np.zeros(0, int),
            # Of each rung that there is a way to, its row's C (0: there is none), and the Step: what it costs, and the
            # rung of the task that would be started now.
            "row_flops": np.zeros((0, num_rungs)),
            "cost_flops": np.zeros((0, num_rungs), object),
            "first": np.zeros((0, num_rungs), int),
            # What the rest of the way to the top rung costs; inf without a row there.
            "beyond_flops": np.zeros((0, num_rungs), object),
        }
        self._lines: dict[str | int, int] = {}
        """Of a trial by its name, of a proposal by its id, which is its own as long as the table holds it."""
        self._place: dict[str, int] = {}
        """Of a trial, in order of their proposals."""
        self._line_T = np.full(0, -1)
        """Of trials by their places; -1: its last row is not good, or it has none."""
        self._changed: set[str] = set()
        """Trials whose rows or trunks are others than when they were looked at."""
        self._end = 0
        self._pool: Sequence[Proposal] | None = None

    def take(self, view: View, pool: Sequence[Proposal], trials: Sequence[Trial] | None = None) -> None:
        """What may be begun now: new proposals, and some trials (None: all that are paused)."""
        state = view.state
        if self._limits != state.memory_limits or self._end > len(state.trials) + len(pool) + _STALE:
            self._limits = dict(state.memory_limits)
            self._forget()
        for name, _ in [*state.arrivals[self._num_arrivals :], *list(state.evicted)[self._num_evicted :]]:
            self._lines.pop(name, None)
            self._changed.add(name)
        self._num_arrivals, self._num_evicted = len(state.arrivals), len(state.evicted)
        if trials is None:
            self._trials_now = self._paused(view)
        else:
            self._trials_now = np.array([self._line(view, trial) for trial in trials], dtype=int)
        if pool is not self._pool:
            self._pool = pool
            self._new_now = np.array([self._line(view, proposal) for proposal in pool], dtype=int)

    def to(self, rung: int) -> Ways:
        """All on their way to a rung."""
        return self._to(rung, np.concatenate([self._trials_now, self._new_now]))

    def trials_to(self, rung: int) -> Ways:
        """Trials alone."""
        return self._to(rung, self._trials_now)

    def entries(self) -> Ways:
        """New proposals, each on its way to its first rung."""
        leads_MR = self._table["row_flops"][self._new_now] > 0
        some_M = leads_MR.any(1)
        return Ways(self._table, self._new_now[some_M], leads_MR[some_M].argmax(1))

    def _paused(self, view: View) -> np.ndarray:
        """Lines of View.paused; only trials that have changed are looked at."""
        trials, known = view.state.trials, len(self._place)
        new = list(islice(trials, known, None))
        self._place.update(zip(new, count(known)))
        self._line_T = np.concatenate([self._line_T, np.full(len(new), -1)])
        for name in sorted({*self._changed, *new}, key=self._place.__getitem__):
            trial = trials[name]
            self._line_T[self._place[name]] = self._line(view, trial) if view.is_good(trial) else -1
        self._changed.clear()
        line_T = self._line_T.copy()
        line_T[[self._place[name] for name in view.withheld]] = -1
        return line_T[line_T >= 0]

    def _to(self, rung: int, lines_M: np.ndarray) -> Ways:
        lines_M = lines_M[self._table["row_flops"][lines_M, rung] > 0]
        return Ways(self._table, lines_M, np.full(len(lines_M), rung))

    def _line(self, view: View, subject: Trial | Proposal) -> int:
        key = subject.trial if isinstance(subject, Trial) else id(subject)
        if key not in self._lines:
            self._lines[key] = self._written(subject, view.steps(subject))
        return self._lines[key]

    def _written(self, subject: Trial | Proposal, steps: Sequence[Step]) -> int:
        """The number of a new line."""
        line, config, top = self._end, subject.config, self._num_rungs - 1
        if line == len(self._table["id"]):
            for name, column in self._table.items():
                room = np.zeros((max(_ROOM, line), *column.shape[1:]), column.dtype)
                self._table[name] = np.concatenate([column, room])
        table, reaches = self._table, bool(steps) and steps[-1].rung == top
        table["subject"][line] = subject
        table["numbers"][line], table["codes"][line], table["id"][line] = self._coordinates(subject)
        for step in steps:
            at = line, step.rung
            table["cost_flops"][at], table["first"][at] = step.cost_flops, step.first
            table["row_flops"][at] = self.arena.row_flops(config, step.rung)
            table["beyond_flops"][at] = ascent_flops(self.arena, config, step.rung, top) if reaches else math.inf
        self._end += 1
        return line
