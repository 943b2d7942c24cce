"""Promotion inside strata of model size, and every rung its allotted number of configurations.

Enters: a SweepState. Leaves: decisions (see bfm.sweep.policy). A plain rule beside the frontier policy: it models
nothing, and trains every configuration with every seed.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from bfm.sweep.policies.allotment import allot
from bfm.sweep.policy import Decision, Promote, Propose, Stop
from bfm.sweep.settings import SweepSpec
from bfm.sweep.space import FeasibleSet
from bfm.sweep.state import SweepState, Trial, metric_value
from bfm.sweep.task import Wait
from bfm.units import format_count, format_flops


@dataclass
class _Block:
    """One configuration: its trials, one per seed, are promoted together and judged by their mean.

    Runs that were imported are no block: the rule knows only its own.
    """

    number: int
    trials: list[Trial]

    @property
    def params(self) -> int:
        return self.trials[0].params


class StrataPolicy:
    """Promotion inside strata of model size.

    Curves cross: at equal C small models lead early and lose late. So a rung's best are chosen among models of like
    size, and every rung has its allotted number of configurations (`allot`), which keeps its part of the cap free.
    A configuration goes on as soon as it is in the promoted fraction of its stratum; when the rungs below have settled,
    the places left are filled with the next best. The rule is not clever about sizes that no rung has tried.
    """

    def __init__(self, spec: SweepSpec, feasible: FeasibleSet) -> None:
        self.spec, self._feasible = spec, feasible
        self._seeds = len(spec.seeds)
        cooldown = spec.cooldown_fractions[1]
        self._top = len(spec.budget.ladder_flops) - 1
        self._costs = [
            self._seeds * spec.task_flops(cooldown, rung, rung - 1 if rung else None) for rung in range(self._top + 1)
        ]
        points = len(feasible.feasible_grid[0]) if spec.method == "grid" else spec.budget.max_trials
        self.max_configurations = max(1, min(spec.budget.max_trials // self._seeds, points))
        scheduler = spec.scheduler
        self.places = allot(
            self._costs, spec.budget.total_flops, self.max_configurations, scheduler.eta, scheduler.shares
        )
        """Configurations per rung."""
        self._edges = {count: feasible.size_edges(count) for count in range(1, scheduler.strata + 1)}

    def decide(self, state: SweepState, available_flops: int, can_propose: bool) -> Decision:
        """See Policy."""
        view = _View(self.spec, self._feasible, state, available_flops, self._costs)
        can_propose = can_propose and len(view.blocks) < self.max_configurations
        return (
            self._complete_seeds(view)
            or self._promote_leaders(view)
            or self._propose(view, can_propose)
            or self._fill(view)
            or self._spend_the_rest(view, can_propose)
            or self._end(view, can_propose)
        )

    def _complete_seeds(self, view: _View) -> Decision | None:
        """A configuration that was begun with one seed is begun with all."""
        blocks = view.blocks
        begun = bool(blocks) and len(blocks[-1].trials) < self._seeds and view.can_go(blocks[-1].trials[:1], 0)
        if begun and view.available_flops >= view.costs[0] // self._seeds:
            return Propose(
                0, f"seed {len(blocks[-1].trials) + 1} of {self._seeds} of configuration {blocks[-1].number}"
            )
        for rung in range(1, self._top + 1):
            for block in blocks:
                missing = [trial for trial in block.trials if trial.trial not in view.members[rung]]
                begun = 0 < len(missing) < len(block.trials)
                if begun and missing[0].rows.get(rung - 1) and view.affords(rung, 1) and view.can_go(missing[:1], rung):
                    return Promote(missing[0].trial, rung, f"the other seeds of configuration {block.number} went on")
        return None

    def _promote_leaders(self, view: _View) -> Decision | None:
        for rung in range(self._top, 0, -1):
            if view.issued(rung) >= self.places[rung] or not view.affords_beside_top(rung):
                continue
            fraction = self.places[rung] / self.places[rung - 1]
            for stratum, ranked in self._strata(view, rung):
                quota = int(len(view.done_in(rung - 1, stratum)) * fraction + 1e-9)
                promoted = [block for block in stratum if view.is_issued(block, rung)]
                if len(promoted) < quota and ranked:
                    return self._promote(view, ranked, rung, f"{quota} of {len(view.done_in(rung - 1, stratum))}")
        return None

    def _propose(self, view: _View, can_propose: bool) -> Decision | None:
        if not can_propose or view.issued(0) >= self.places[0] or not view.affords_beside_top(0):
            return None
        return Propose(0, f"configuration {len(view.blocks) + 1} of {self.places[0]} at the entry rung")

    def _fill(self, view: _View) -> Decision | None:
        """Places that the quotas left, once the rungs below bring no more candidates."""
        for rung in range(1, self._top + 1):
            if view.pending_below(rung):
                return None
            if view.issued(rung) < self.places[rung] and view.affords_beside_top(rung):
                for _, ranked in self._strata(view, rung):
                    if ranked:
                        return self._promote(view, ranked, rung, "the rungs below have settled")
        return None

    def _spend_the_rest(self, view: _View, can_propose: bool) -> Decision | None:
        """All places are taken (or cannot be): what is left of the cap, from the top down."""
        if view.pending_below(self._top + 1):
            return None
        for rung in range(self._top, 0, -1):
            if view.affords(rung):
                for _, ranked in self._strata(view, rung):
                    if ranked:
                        return self._promote(view, ranked, rung, "all places are taken and the cap has room")
        if can_propose and view.affords(0):
            return Propose(0, "all places are taken and the cap has room")
        return None

    def _end(self, view: _View, can_propose: bool) -> Decision:
        left = format_flops(max(0, view.available_flops))
        if view.pending_below(self._top + 1):
            return Wait(f"{left} FLOPs may be reserved, and what may come next depends on running tasks")
        if view.affords(0) and not can_propose:
            return Stop(f"every configuration went as far as it can; {left} FLOPs are left")
        return Stop(f"the cap is reached: {left} FLOPs are left")

    def _strata(self, view: _View, rung: int) -> list[tuple[list[_Block], list[_Block]]]:
        """Blocks of each stratum and its candidates, best first; strata with fewest promotions, then largest, first."""
        edges = self._edges[max(1, min(self.spec.scheduler.strata, self.places[rung]))]
        strata: dict[int, list[_Block]] = {index: [] for index in range(len(edges) + 1)}
        for block in view.blocks:
            strata[bisect_right(edges, block.params)].append(block)
        served = {index: sum(view.is_issued(block, rung) for block in blocks) for index, blocks in strata.items()}
        order = sorted(strata, key=lambda index: (served[index], -index))
        return [(strata[index], view.candidates(strata[index], rung)) for index in order]

    def _promote(self, view: _View, ranked: list[_Block], rung: int, why: str) -> Promote:
        best = ranked[0]
        value = self.spec.metric.loss(view.losses(rung - 1)[best.number])
        reason = (
            f"{self.spec.metric.name} {value:.5g} at rung {rung - 1} is the best of {len(ranked)} waiting near "
            f"N = {format_count(best.params)} ({why}; {view.issued(rung) + 1} of {self.places[rung]} places)"
        )
        return Promote(best.trials[0].trial, rung, reason)


class _View:
    """One state, in blocks."""

    def __init__(
        self, spec: SweepSpec, feasible: FeasibleSet, state: SweepState, available_flops: int, costs: list[int]
    ) -> None:
        self.spec, self.feasible, self.state = spec, feasible, state
        self.available_flops, self.costs = available_flops, costs
        self.seeds = len(spec.seeds)
        self.top = len(spec.budget.ladder_flops) - 1
        self.members = [state.members(rung) for rung in range(self.top + 1)]
        self.blocks: list[_Block] = []
        for trial in state.trials.values():
            if trial.number is not None:
                # One that was begun before further seeds were asked for keeps the seeds it has.
                if not self.blocks or self.blocks[-1].trials[0].config != trial.config:
                    self.blocks.append(_Block(len(self.blocks), []))
                self.blocks[-1].trials.append(trial)
        self._losses: dict[int, dict[int, float]] = {}

    def is_issued(self, block: _Block, rung: int) -> bool:
        """Whether any of the block's trials has a row at a rung or is on its way there."""
        return any(trial.trial in self.members[rung] for trial in block.trials)

    def issued(self, rung: int) -> int:
        """Blocks at a rung."""
        return sum(self.is_issued(block, rung) for block in self.blocks)

    def pending_below(self, rung: int) -> bool:
        """Whether anything is reserved or owed below a rung."""
        return any(at < rung for _, at in self.state.attempts)

    def done_in(self, rung: int, blocks: list[_Block]) -> list[_Block]:
        """Blocks with a row (of any status) of every seed."""
        return [block for block in blocks if all(rung in trial.rows for trial in block.trials)]

    def losses(self, rung: int) -> dict[int, float]:
        """Block number -> mean signed metric over seeds, where all of them may be compared."""
        if rung not in self._losses:
            losses = {}
            for block in self.done_in(rung, self.blocks):
                values = [
                    metric_value(trial.rows[rung], self.spec.metric.name, self.spec.budget.tolerance)
                    for trial in block.trials
                ]
                if None not in values:
                    losses[block.number] = sum(self.spec.metric.loss(v) for v in values if v is not None) / len(values)
            self._losses[rung] = losses
        return self._losses[rung]

    def candidates(self, blocks: list[_Block], rung: int) -> list[_Block]:
        """Blocks that may go on to a rung, best first; ties by number."""
        losses = self.losses(rung - 1)
        waiting = [
            block
            for block in blocks
            if block.number in losses and not self.is_issued(block, rung) and self.can_go(block.trials, rung)
        ]
        return sorted(waiting, key=lambda block: (losses[block.number], block.number))

    def can_go(self, trials: list[Trial], rung: int) -> bool:
        """Whether trials fit into the memory at a rung, and the cap pays for their ways from the trunks they have."""
        limits = self.state.memory_limits
        if not all(self.feasible.fits(trial.config, rung, limits) for trial in trials):
            return False
        needed = sum(
            self.spec.task_flops(trial.config["cooldown_fraction"], rung, self.state.trunk_below(trial.trial, rung))
            for trial in trials
        )
        return needed <= self.available_flops

    def affords(self, rung: int, trials: int | None = None) -> bool:
        """Whether a whole block (or so many of its trials) may be reserved at a rung."""
        whole = self.costs[rung]
        return (whole if trials is None else whole * trials // self.seeds) <= self.available_flops

    def affords_beside_top(self, rung: int) -> bool:
        """Whether a block at a rung leaves enough to bring one block to the top, if none is there and one still can."""
        highest = max((at for at in range(self.top + 1) if self.members[at]), default=-1)
        climb = sum(self.costs[max(highest, rung) + 1 :])
        still_can = self.costs[rung] + climb <= self.available_flops
        return still_can or (self.affords(rung) and sum(self.costs[highest + 1 :]) > self.available_flops)
