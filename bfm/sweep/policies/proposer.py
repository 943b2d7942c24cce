"""What the next configuration may be: Optuna's TPE, random draws or a grid, always inside the feasible set.

Enters: a SweepState and the number of the proposal. Leaves: points that were not tried yet, with the counted reasons of
the infeasible draws on the way. What calls share is kept for speed alone: TPE learns anew from the rows of one rung
(results at different C are never mixed), and all randomness is seeded by (seed, number or era, try).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from bfm.sweep.ledger.state import Record, SweepState, Trial, comparable_value
from bfm.sweep.policies.arena import OPTUNA, Proposal
from bfm.sweep.policies.tpe import coordinates, draws
from bfm.sweep.space.parameters import ConfigKey, Parameter, config_key
from bfm.sweep.space.space import Feasible, FeasibleSet, Rejection

STARTUP_ROWS = 10
POOL_SIZE = 96
POOL_ERA = 16
POOL_TRIES = 2000
MOST_ERAS = 8
"""So many eras are looked through for a point that was not tried yet."""


class Proposer:
    """Proposals of one sweep."""

    optuna_draws = 16
    """So many of a pool's points are TPE's. They take away three fifths of the regret, 16 of them a quarter of what 2
    leave; without random points beside them it is half as high again (benchmarks/candidates.py)."""

    def __init__(self, feasible: FeasibleSet) -> None:
        self.spec, self.feasible = feasible.spec, feasible
        self._random: dict[int, tuple[dict[ConfigKey, Proposal], dict[str, int]]] = {}
        self._points: dict[str, list[float] | None] = {}

    def pool(self, state: SweepState, number: int) -> tuple[Proposal, ...]:
        """Feasible points that proposal `number` may be chosen from: TPE's, which refine, and random ones, which forget
        no part of the space; of a grid, its next points in order, or some of all.

        The random ones serve POOL_ERA proposals. Empty where no further point was found.
        """
        seen = {trial.key for trial in state.trials.values()}
        if self.spec.method == "grid":
            return self._grid_pool(seen, number)
        found: dict[ConfigKey, Proposal] = {}
        for values in self._optuna_pool(state, number):
            verdict = self.feasible.judge(values)
            if isinstance(verdict, Feasible):
                proposal = _proposal(verdict, OPTUNA)
                found[config_key(proposal.config)] = proposal
        rejected: dict[str, int] = {}
        for era in range(number // POOL_ERA, number // POOL_ERA + MOST_ERAS):
            random, rejected = self._random_pool(era)
            found = {**random, **found}
            if found.keys() - seen:
                break
        fresh = (proposal for key, proposal in found.items() if key not in seen)
        # Counted once, with the first proposal of an era.
        return _counted(fresh, rejected if number % POOL_ERA == 0 else {})

    def _grid_pool(self, seen: set[ConfigKey], number: int) -> tuple[Proposal, ...]:
        fresh = [proposal for key, proposal in self._grid.items() if key not in seen]
        if self.spec.scheduler.type != "grid":
            order = np.random.default_rng((self.spec.seeds[0], number // POOL_ERA)).permutation(len(fresh))
            fresh = [fresh[place] for place in sorted(order[:POOL_SIZE])]
        refused = Counter(refusal.reason for refusal in self.feasible.sample[1]) if number == 0 else {}
        return _counted(fresh[:POOL_SIZE], dict(sorted(refused.items())))

    @cached_property
    def _grid(self) -> dict[ConfigKey, Proposal]:
        proposals = [_proposal(point, "grid") for point in self.feasible.sample[0]]
        return {config_key(proposal.config): proposal for proposal in proposals}

    def _random_pool(self, era: int) -> tuple[dict[ConfigKey, Proposal], dict[str, int]]:
        """Random feasible points and the counted reasons of the others: a function of the seed and the era."""
        if era not in self._random:
            found: dict[ConfigKey, Proposal] = {}
            refused: Counter[str] = Counter()
            for values in islice(self._era_draws(era), POOL_TRIES):
                verdict = self.feasible.judge(values)
                if isinstance(verdict, Rejection):
                    refused[verdict.reason] += 1
                else:
                    proposal = _proposal(verdict, "random")
                    found[config_key(proposal.config)] = proposal
                if len(found) == POOL_SIZE:
                    break
            self._random = {before: pool for before, pool in self._random.items() if before > era - MOST_ERAS}
            self._random[era] = found, dict(sorted(refused.items()))
        return self._random[era]

    def _era_draws(self, era: int) -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng((self.spec.seeds[0], era))
        while True:
            yield self.feasible.draw(rng)

    def _optuna_pool(self, state: SweepState, number: int) -> Iterator[dict[str, Any]]:
        if self.spec.method != "optuna":
            return
        rows = _rows_before_proposal(state)
        rung = self._learning_rung(state, rows)
        if rung is None:
            return
        rngs = (np.random.default_rng((self.spec.seeds[0], number, draw)) for draw in range(self.optuna_draws))
        seeds = [int(rng.integers(1 << 31)) for rng in rngs]
        yield from map(self.from_optuna, draws(self.axes, *self._told(state, rows, rung), seeds))

    def _learning_rung(self, state: SweepState, rungs: Mapping[int, Mapping[str, Record]]) -> int | None:
        """The highest rung with enough comparable rows; None before the entry rung has them."""
        for rung in reversed(range(len(self.spec.budget.ladder_flops))):
            rows = rungs.get(rung, {})
            known = (self._value(row) is not None and self._point(state.trials[name]) for name, row in rows.items())
            if sum(map(bool, known)) >= STARTUP_ROWS:
                return rung
        return None

    def _told(
        self, state: SweepState, rungs: Mapping[int, Mapping[str, Record]], rung: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What TPE learns from: (M, X) points with a row at a rung, their (M,) losses, (M, X) points without a row."""
        sign = 1.0 if self.spec.metric.goal == "minimize" else -1.0
        told, losses = [], []
        for name, row in rungs[rung].items():
            point = self._point(state.trials[name])
            if point is not None and row["status"] != "oom":
                value = self._value(row)
                told.append(point)
                # A trial that diverged is as bad as can be: TPE must learn to keep away.
                losses.append(math.inf if value is None else sign * value)
        begun = {name for rows in rungs.values() for name in rows}
        # So it must from those that run: proposals of one moment would else lie where the best row is, all of them.
        points = (self._point(trial) for name, trial in state.trials.items() if name not in begun)
        running = [point for point in points if point is not None]
        return np.array(told), np.array(losses), np.array(running).reshape(-1, len(self.axes))

    @cached_property
    def axes(self) -> dict[str, BaseDistribution]:
        """The free parameters in Optuna's words."""
        named = {parameter.name: _distribution(parameter) for parameter in self.spec.free_parameters}
        return dict(sorted(named.items()))

    def from_optuna(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Values of the free parameters."""
        free = self.spec.free_parameters
        return {parameter.name: _to_value(parameter, drawn[parameter.name]) for parameter in free}

    def to_optuna(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Inverse of `from_optuna`."""
        free = self.spec.free_parameters
        return {parameter.name: _from_value(parameter, config[parameter.name]) for parameter in free}

    def _point(self, trial: Trial) -> list[float] | None:
        """As TPE knows a trial; None outside this space: earlier ones may have been others, and TPE knows only one."""
        if trial.trial not in self._points:
            free, config = self.spec.free_parameters, trial.config
            inside = all(parameter.contains(config[parameter.name]) for parameter in free)
            self._points[trial.trial] = coordinates(self.axes, self.to_optuna(config)) if inside else None
        return self._points[trial.trial]

    def _value(self, row: dict[str, Any]) -> float | None:
        return comparable_value(row, self.spec.metric.name, self.spec.budget.tolerance)


def _rows_before_proposal(state: SweepState) -> dict[int, dict[str, Record]]:
    """Rows by rung and trial; see SweepState.arrivals_before_proposal."""
    found: dict[int, dict[str, Record]] = {}
    for name, rung in state.arrivals[: state.arrivals_before_proposal]:
        found.setdefault(rung, {})[name] = state.rungs[rung][name]
    return found


def _proposal(point: Feasible, source: str) -> Proposal:
    return Proposal(point.config.as_dict(), point.cost.params, source)


def _counted(proposals: Iterable[Proposal], rejected: dict[str, int]) -> tuple[Proposal, ...]:
    """With the counts; the same objects where there is nothing to count, which policies know again."""
    return tuple(replace(proposal, rejected=rejected) if rejected else proposal for proposal in proposals)


def _distribution(parameter: Parameter) -> BaseDistribution:
    if parameter.values:
        # Positions, because TPE takes no account of the order of choices.
        if _is_ordered(parameter):
            return IntDistribution(0, len(parameter.values) - 1)
        return CategoricalDistribution(parameter.values)
    if parameter.distribution == "int_uniform":
        return IntDistribution(int(parameter.low), int(parameter.high))
    return FloatDistribution(parameter.low, parameter.high, log=parameter.is_log)


def _to_value(parameter: Parameter, drawn: Any) -> Any:
    if parameter.values:
        return sorted(parameter.values)[drawn] if _is_ordered(parameter) else drawn  # type: ignore[type-var]
    return drawn if parameter.distribution == "int_uniform" else parameter.quantise(drawn)


def _from_value(parameter: Parameter, value: Any) -> Any:
    if parameter.values and _is_ordered(parameter):
        return sorted(parameter.values).index(value)  # type: ignore[type-var]
    return value


def _is_ordered(parameter: Parameter) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in parameter.values)
