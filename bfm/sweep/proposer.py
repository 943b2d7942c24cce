"""The next configuration: Optuna's TPE, random draws or a grid, always inside the feasible set.

Enters: a SweepState and the number of the proposal. Leaves: values of the free parameters with the counted reasons of
the infeasible draws on the way. Nothing is remembered between calls: Optuna's study is rebuilt in memory from the rows
of one rung (results at different C are never mixed), and all randomness is seeded by (seed, number, try).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from bfm.sweep.arena import Proposal
from bfm.sweep.parameters import Parameter
from bfm.sweep.settings import SweepSpec
from bfm.sweep.space import RAN_OUT, Feasible, FeasibleSet, Rejection, binding_bound
from bfm.sweep.state import Record, SweepState, Trial, metric_value
from bfm.training.config import TrainConfig

STARTUP_ROWS = 10
OPTUNA_TRIES = 300
RANDOM_TRIES = 5000
POOL_SIZE = 96
POOL_ERA = 16
POOL_OPTUNA_DRAWS = 16
"""They take away three fifths of the regret, 16 of them a quarter of what 2 leave; without random points beside them it
is half as high again (benchmarks/candidates.py)."""
POOL_TRIES = 2000
_DUPLICATE = "was proposed before"


class Proposer:
    """Proposals of one sweep."""

    def __init__(self, spec: SweepSpec, feasible: FeasibleSet, optuna_draws: int = POOL_OPTUNA_DRAWS) -> None:
        """`optuna_draws`: so many of a pool's points are TPE's."""
        self.spec, self.feasible, self._optuna_draws = spec, feasible, optuna_draws
        self._names = [parameter.name for parameter in spec.free_parameters]
        self._random: tuple[int, dict[tuple[Any, ...], Proposal], dict[str, int]] = (-1, {}, {})

    def propose(self, state: SweepState, number: int) -> Proposal | None:
        """The point of proposal `number`; None where the space has no further one.

        Raises InfeasibleError, naming the bound that binds, where no feasible point is found.
        """
        if self.spec.method == "grid":
            return self._next_of_grid(state, number)
        seen = {self._key(trial.config) for trial in state.trials.values()}
        rejected: Counter[str] = Counter()
        refusals: list[Rejection] = []
        for source, values in self._draws(state, number):
            verdict = self.feasible.judge(values, state.memory_limits)
            if isinstance(verdict, Rejection):
                rejected[verdict.reason] += 1
                refusals.append(verdict)
            elif self._key(verdict.config.as_dict()) in seen:
                rejected[_DUPLICATE] += 1
            else:
                return _proposal(verdict, source, dict(sorted(rejected.items())))
        if rejected[_DUPLICATE] or rejected[RAN_OUT]:
            return None
        raise binding_bound(refusals)

    def pool(self, state: SweepState, number: int) -> tuple[Proposal, ...]:
        """Feasible points that a policy may choose proposal `number` from: TPE's, which refine, and random ones, which
        forget no part of the space.

        The random ones (of a grid: some of its points) serve POOL_ERA proposals. Empty where the space has no further
        point; InfeasibleError as in `propose`.
        """
        seen = {self._key(trial.config) for trial in state.trials.values()}
        if self.spec.method == "grid":
            found = self._grid_pool(seen, number)
        else:
            random, rejected = self._random_pool(number // POOL_ERA)
            found = {key: proposal for key, proposal in random.items() if key not in seen}
            if number % POOL_ERA == 0:
                found = {key: replace(proposal, rejected=rejected) for key, proposal in found.items()}
        for values in self._optuna_pool(state, number):
            verdict = self.feasible.judge(values)
            if isinstance(verdict, Feasible) and (key := self._key(verdict.config.as_dict())) not in seen:
                found[key] = _proposal(verdict, "optuna", {})
        return self._fitting(tuple(found.values()), state.memory_limits)

    def _fitting(self, pool: tuple[Proposal, ...], limits: Mapping[str, int]) -> tuple[Proposal, ...]:
        """Without what is estimated as large as something that ran out of memory; counted with the reason."""
        if not limits:
            return pool
        verdicts = [self.feasible.judge_config(TrainConfig.from_dict(proposal.config), limits) for proposal in pool]
        kept = [p for p, verdict in zip(pool, verdicts, strict=True) if isinstance(verdict, Feasible)]
        ran_out = len(pool) - len(kept)
        return tuple(replace(p, rejected={**p.rejected, RAN_OUT: ran_out}) if ran_out else p for p in kept)

    def _grid_pool(self, seen: set[tuple[Any, ...]], number: int) -> dict[tuple[Any, ...], Proposal]:
        points, rejected = self.feasible.feasible_grid
        if not points:
            raise binding_bound(self.feasible.sample[1])
        counts = dict(sorted(rejected.items())) if number == 0 else {}
        fresh = [values for values in points if self._key(self.spec.config(values).as_dict()) not in seen]
        order = np.random.default_rng((self.spec.seeds[0], number // POOL_ERA)).permutation(len(fresh))
        found = {}
        for place in sorted(order[:POOL_SIZE]):
            verdict = self.feasible.judge(fresh[place])
            assert isinstance(verdict, Feasible)
            found[self._key(verdict.config.as_dict())] = _proposal(verdict, "grid", counts)
        return found

    def _random_pool(self, era: int) -> tuple[dict[tuple[Any, ...], Proposal], dict[str, int]]:
        """Random feasible points and the counted reasons of the others: a function of the seed and the era."""
        if self._random[0] != era:
            found: dict[tuple[Any, ...], Proposal] = {}
            refusals: list[Rejection] = []
            for values in islice(self._era_draws(era), POOL_TRIES):
                verdict = self.feasible.judge(values)
                if isinstance(verdict, Rejection):
                    refusals.append(verdict)
                else:
                    found[self._key(verdict.config.as_dict())] = _proposal(verdict, "random", {})
                if len(found) == POOL_SIZE:
                    break
            if not found:
                raise binding_bound(refusals)
            counts = Counter(refusal.reason for refusal in refusals)
            self._random = era, found, dict(sorted(counts.items()))
        return self._random[1], self._random[2]

    def _era_draws(self, era: int) -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng((self.spec.seeds[0], era))
        while True:
            yield self.feasible.draw(rng)

    def _optuna_pool(self, state: SweepState, number: int) -> Iterator[dict[str, Any]]:
        if self.spec.method != "optuna":
            return
        rows = _rows_before_proposal(state)
        rung = self._learning_rung(state, rows)
        if rung is not None:
            study = self._study(state, rows, rung)
            for attempt in range(self._optuna_draws):
                yield self._ask(study, np.random.default_rng((self.spec.seeds[0], number, attempt)))

    def _next_of_grid(self, state: SweepState, number: int) -> Proposal | None:
        points, rejected = self.feasible.feasible_grid
        if not points:
            raise binding_bound(self.feasible.sample[1])
        seen = {self._key(trial.config) for trial in state.trials.values()}
        ran_out: Counter[str] = Counter()
        for values in points:
            verdict = self.feasible.judge(values, state.memory_limits)
            if isinstance(verdict, Rejection):
                ran_out[verdict.reason] += 1
            elif self._key(verdict.config.as_dict()) not in seen:
                counts = (rejected if number == 0 else Counter[str]()) + ran_out
                return _proposal(verdict, "grid", dict(sorted(counts.items())))
        return None

    def _draws(self, state: SweepState, number: int) -> Iterator[tuple[str, dict[str, Any]]]:
        seed = self.spec.seeds[0]
        rung = self._learning_rung(state, state.rungs) if self.spec.method == "optuna" else None
        if rung is not None:
            study = self._study(state, state.rungs, rung)
            for attempt in range(OPTUNA_TRIES):
                yield "optuna", self._ask(study, np.random.default_rng((seed, number, attempt)))
        for attempt in range(RANDOM_TRIES):
            yield "random", self.feasible.draw(np.random.default_rng((seed, number, attempt)))

    def _learning_rung(self, state: SweepState, rungs: Mapping[int, Mapping[str, Record]]) -> int | None:
        """The highest rung with enough comparable rows; None before the entry rung has them."""
        for rung in reversed(range(len(self.spec.budget.ladder_flops))):
            rows = rungs.get(rung, {})
            known = [
                name for name, row in rows.items() if self._value(row) is not None and self._is_inside(state, name)
            ]
            if len(known) >= STARTUP_ROWS:
                return rung
        return None

    def _study(self, state: SweepState, rungs: Mapping[int, Mapping[str, Record]], rung: int) -> optuna.Study:
        direction = self.spec.metric.goal
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(direction=direction, storage=optuna.storages.InMemoryStorage())
        worst = math.inf if direction == "minimize" else -math.inf
        told = []
        for name, row in rungs[rung].items():
            if row["status"] == "oom" or not self._is_inside(state, name):
                continue
            value = self._value(row)
            # A trial that diverged is as bad as can be: TPE must learn to keep away.
            told.append(self._frozen(state.trials[name], worst if value is None else value))
        begun = {name for rows in rungs.values() for name in rows}
        # So it must from those that run: proposals of one moment would else lie where the best row is, all of them.
        told += [
            self._frozen(trial, None)
            for name, trial in state.trials.items()
            if name not in begun and self._is_inside(state, name)
        ]
        study.add_trials(told)
        return study

    def _ask(self, study: optuna.Study, rng: np.random.Generator) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.sampler = optuna.samplers.TPESampler(
                seed=int(rng.integers(1 << 31)), n_startup_trials=STARTUP_ROWS, multivariate=True, constant_liar=True
            )
        trial = study.ask(self.axes)
        # Only the draw is wanted: a failed trial is one that TPE never looks at.
        study.tell(trial, state=TrialState.FAIL)
        return self.from_optuna(trial.params)

    @cached_property
    def axes(self) -> dict[str, BaseDistribution]:
        """The free parameters in Optuna's words."""
        return {parameter.name: _distribution(parameter) for parameter in self.spec.free_parameters}

    def from_optuna(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Values of the free parameters."""
        free = self.spec.free_parameters
        return {parameter.name: _to_value(parameter, drawn[parameter.name]) for parameter in free}

    def to_optuna(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Inverse of `from_optuna`."""
        free = self.spec.free_parameters
        return {parameter.name: _from_value(parameter, config[parameter.name]) for parameter in free}

    def _frozen(self, trial: Trial, value: float | None) -> FrozenTrial:
        """As Optuna knows a trial; without a value it is running."""
        state = TrialState.RUNNING if value is None else TrialState.COMPLETE
        return create_trial(state=state, value=value, params=self.to_optuna(trial.config), distributions=self.axes)

    def _is_inside(self, state: SweepState, name: str) -> bool:
        """Whether a trial lies in this space: an earlier one may have been another, and TPE knows only one."""
        config = state.trials[name].config
        return all(parameter.contains(config[parameter.name]) for parameter in self.spec.free_parameters)

    def _value(self, row: dict[str, Any]) -> float | None:
        return metric_value(row, self.spec.metric.name, self.spec.budget.tolerance)

    def _key(self, config: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(config[name] for name in self._names)


def _rows_before_proposal(state: SweepState) -> dict[int, dict[str, Record]]:
    """Rows by rung and trial; see SweepState.arrivals_before_proposal."""
    found: dict[int, dict[str, Record]] = {}
    for name, rung in state.arrivals[: state.arrivals_before_proposal]:
        found.setdefault(rung, {})[name] = state.rungs[rung][name]
    return found


def _proposal(point: Feasible, source: str, rejected: dict[str, int]) -> Proposal:
    return Proposal(point.config.as_dict(), point.cost.params, source, rejected)


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
