"""Everything that could be begun, rung by rung: paused trials in order of their proposals, then new proposals.

Enters: Views and the pools of their arenas. Leaves: Ways, candidates as arrays of coordinates and costs. What follows
from a trial's rows, or from a proposal, alone is kept from one decision to the next; that is for speed, and changes
nothing. Costs are kept as Python's whole numbers: beyond 2^53 FLOPs a double would round what has to fit under a cap.

Shape legend: M candidates, S slots (one per trial or proposal seen), R rungs, X numeric axes, G axes of choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bfm.sweep.arena import Arena, Proposal
from bfm.sweep.policies.ground import Step, View, ascent_flops
from bfm.sweep.state import Trial
from bfm.sweep.surrogate import Places

_ROOM = 1024
_STALE = 20_000
"""So many slots of proposals and trials that are gone are worth a fresh start."""
Coordinates = Callable[[Trial | Proposal], tuple[np.ndarray, np.ndarray, int]]
"""Numbers, codes of choices, and who it is (0: a new proposal)."""


@dataclass(frozen=True)
class Ways:
    """Some candidates, each on its way to a rung."""

    of: Candidates
    slots_M: np.ndarray
    rungs_M: np.ndarray

    def __len__(self) -> int:
        return len(self.slots_M)

    @property
    def cost_M(self) -> np.ndarray:
        """FLOPs of all tasks up to the rung; whole numbers of Python."""
        return self.of.cost_SR[self.slots_M, self.rungs_M]

    @property
    def rung(self) -> int:
        """The one that all of them are on their way to."""
        return int(self.rungs_M[0])

    @property
    def first_M(self) -> np.ndarray:
        """The rung of the task that would be started now."""
        return self.of.first_SR[self.slots_M, self.rungs_M]

    @property
    def beyond_M(self) -> np.ndarray:
        """What the rest of the way to the top rung costs; inf without a row there."""
        return np.array([self.of.beyond(*at) for at in zip(self.slots_M, self.rungs_M, strict=True)], dtype=object)

    @property
    def places(self) -> Places:
        """Coordinates of the rows that they are on their way to."""
        of, slots_M = self.of, self.slots_M
        log_flops_M = np.log(of.flops_SR[slots_M, self.rungs_M])
        return Places(of.numbers_SX[slots_M], of.codes_SG[slots_M], log_flops_M, of.ids_S[slots_M])

    def step(self, place: int) -> Step:
        """One of them."""
        return self.of.steps_S[self.slots_M[place]][int(self.rungs_M[place])]

    def take(self, kept: np.ndarray | Sequence[int]) -> Ways:
        """Those of an index or a mask."""
        return Ways(self.of, self.slots_M[kept], self.rungs_M[kept])

    def within(self, available_flops: int) -> Ways:
        """Those whose whole way may be reserved."""
        return self.take(np.asarray(self.cost_M <= available_flops, dtype=bool)) if len(self) else self


class Candidates:
    """See the module."""

    def __init__(self, arena: Arena, coordinates: Coordinates, num_rungs: int) -> None:
        self.arena, self._coordinates, self._num_rungs = arena, coordinates, num_rungs
        self._limits: dict[str, int] | None = None

    def _forget(self) -> None:
        axes, num_rungs = self.arena.axes, self._num_rungs
        self._slots: dict[str | int, int] = {}
        self._stands: list[tuple[int, int, int | None]] = []
        """Of a trial's slot: rows that it had, trunks evicted by then, the trunk that it went on from."""
        self._held: list[Trial | Proposal] = []
        """So that no other proposal can get the id of one that is known."""
        self.steps_S: list[dict[int, Step]] = []
        self.numbers_SX = np.zeros((0, 1 + len(axes.numbers)))
        self.codes_SG = np.zeros((0, len(axes.choices)), dtype=int)
        self.ids_S = np.zeros(0, dtype=int)
        self.flops_SR = np.ones((0, num_rungs))
        self.cost_SR = np.zeros((0, num_rungs), dtype=object)
        self.first_SR = np.zeros((0, num_rungs), dtype=int)
        self.leads_SR = np.zeros((0, num_rungs), dtype=bool)
        """Whether there is a way to the rung."""
        self._beyond: dict[tuple[int, int], float] = {}
        self._pool: Sequence[Proposal] | None = None

    def take(self, view: View, pool: Sequence[Proposal], trials: Sequence[Trial] | None = None) -> None:
        """What may be begun now: new proposals, and some trials (None: all that are paused)."""
        alive = len(view.state.trials) + len(pool)
        if self._limits != view.state.memory_limits or len(self._held) > alive + _STALE:
            self._limits = dict(view.state.memory_limits)
            self._forget()
        num_evicted = len(view.state.evicted)
        trials = view.paused if trials is None else trials
        self._trials_now = np.array([self._of_trial(view, trial, num_evicted) for trial in trials], dtype=int)
        if pool is not self._pool:
            self._pool = pool
            self._new_now = np.array([self._of_new(view, proposal) for proposal in pool], dtype=int)

    def to(self, rung: int) -> Ways:
        """All on their way to a rung."""
        slots_M = np.concatenate([self._trials_now, self._new_now])
        slots_M = slots_M[self.leads_SR[slots_M, rung]]
        return Ways(self, slots_M, np.full(len(slots_M), rung))

    def entries(self) -> Ways:
        """New proposals, each on its way to its first rung."""
        slots_M = self._new_now[self.leads_SR[self._new_now].any(1)]
        return Ways(self, slots_M, self.leads_SR[slots_M].argmax(1))

    def trials_to(self, rung: int) -> Ways:
        """Trials alone."""
        slots_M = self._trials_now[self.leads_SR[self._trials_now, rung]]
        return Ways(self, slots_M, np.full(len(slots_M), rung))

    def beyond(self, slot: int, rung: int) -> float:
        """See Ways.beyond_M."""
        key = int(slot), int(rung)
        if key not in self._beyond:
            config, top = self._held[slot].config, self._num_rungs - 1
            reaches = top in self.arena.rungs(config)
            self._beyond[key] = ascent_flops(self.arena, config, key[1], top) if reaches else math.inf
        return self._beyond[key]

    def _of_trial(self, view: View, trial: Trial, num_evicted: int) -> int:
        slot, num_rows = self._slots.get(trial.trial), len(trial.rows)
        if slot is not None and self._stands[slot][:2] == (num_rows, num_evicted):
            return slot
        trunk = view.state.trunk_below(trial.trial, view.num_rungs)
        if slot is None:
            slot = self._new_slot(trial.trial, trial)
        elif self._stands[slot][::2] == (num_rows, trunk):
            self._stands[slot] = num_rows, num_evicted, trunk
            return slot
        self._stands[slot] = num_rows, num_evicted, trunk
        self._put(slot, view.climbs(trial))
        return slot

    def _of_new(self, view: View, proposal: Proposal) -> int:
        slot = self._slots.get(id(proposal))
        if slot is None:
            slot = self._new_slot(id(proposal), proposal)
            self._put(slot, view.entries(proposal))
        return slot

    def _new_slot(self, key: str | int, subject: Trial | Proposal) -> int:
        slot = self._slots[key] = len(self._held)
        self._held.append(subject)
        self._stands.append((0, 0, None))
        self.steps_S.append({})
        if slot == len(self.ids_S):
            for name in ("numbers_SX", "codes_SG", "ids_S", "flops_SR", "cost_SR", "first_SR", "leads_SR"):
                array = getattr(self, name)
                room = np.zeros((max(_ROOM, slot), *array.shape[1:]), array.dtype)
                setattr(self, name, np.concatenate([array, room]))
        self.numbers_SX[slot], self.codes_SG[slot], self.ids_S[slot] = self._coordinates(subject)
        return slot

    def _put(self, slot: int, steps: Sequence[Step]) -> None:
        self.steps_S[slot] = {step.rung: step for step in steps}
        self.leads_SR[slot] = False
        for step in steps:
            self.leads_SR[slot, step.rung] = True
            self.cost_SR[slot, step.rung], self.first_SR[slot, step.rung] = step.cost_flops, step.first
            self.flops_SR[slot, step.rung] = self.arena.row_flops(step.config, step.rung)
