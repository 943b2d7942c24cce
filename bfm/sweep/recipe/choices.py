"""A recipe's settings beside N: embedder share, batch, negatives, learning rate at a C that was not spent yet.

Enters: sweeps by axis (bfm.sweep.recipe.evidence), a metric, C. Leaves: one Choice per setting with its source, and the
configurations that they make of every N. A law decides where its sweep was run and the runs identify it; otherwise the
best runs of the top rung do, and the choice says so. No setting leaves the range that was swept.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bfm.errors import InfeasibleError, UserError
from bfm.laws.batch import fit_batch
from bfm.laws.frontier import Row
from bfm.laws.negatives import fit_negatives
from bfm.laws.result import LawFit
from bfm.laws.runs import Runs, from_rows
from bfm.laws.share import fit_share
from bfm.laws.targets import events_to_target
from bfm.sweep.costs import CostModel
from bfm.sweep.recipe.evidence import Evidence, Swept, best_quarter
from bfm.sweep.space import Feasible, FeasibleSet, Rejection
from bfm.training.config import TrainConfig
from bfm.training.schedule import rule_learning_rate
from bfm.units import format_flops

SHARE, BATCH, NEGATIVES = "embedder_share", "batch", "negatives"
_TOP_RUNGS = 2
"""Rungs from which the ratio of the best rates to the rule is taken."""
_STAGE_2 = ("freeze_at_flops", "negatives", "negatives_exponent")
_ONE_STAGE = {"freeze_at_flops": None, "negatives": 0}


@dataclass(frozen=True)
class Choice:
    """One setting of a recipe."""

    name: str
    value: float
    source: str
    """What it comes from, in a few words."""
    by_law: bool = False
    """Whether a law of the setting's own sweep decided."""
    note: str = ""
    """What the runs do not tell, and what was taken instead."""
    runs: tuple[str, ...] = ()
    """The runs that it rests on."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form; the runs are listed with the recipe."""
        return {"value": self.value, "source": self.source, "by_law": self.by_law}


@dataclass(frozen=True)
class BatchRule:
    """B = scale * N^exponent, in target events per step."""

    scale: float
    exponent: float

    def at(self, params: float) -> float:
        """B at a model size."""
        return self.scale * params**self.exponent


def run_name(row: Row) -> str:
    """As laws name a run of a ledger."""
    return f"{row['trial']} at {float(row['rung_flops']):g}"


@dataclass(frozen=True)
class _Law:
    """How a setting is fitted on its own sweep; what is called how: the optimum at a C, its power of C, the column."""

    fit: Callable[[Runs], LawFit]
    optimum: str
    power: str
    column: str


_LAWS = {
    SHARE: _Law(fit_share, optimum="s_opt", power="share", column="share"),
    NEGATIVES: _Law(fit_negatives, optimum="K_opt", power="K", column="negatives"),
}


def choose_share(evidence: Evidence, sizes: Swept, metric: str, flops: float) -> Choice:
    """s: from the share law, else the median of the best runs at the top rung."""
    found = _by_law(SHARE, evidence, metric, flops)
    if isinstance(found, Choice):
        return found
    best = sizes.top_runs(metric)
    return _unscaled(SHARE, statistics.median(float(row["embedder_share"]) for row in best), best, found)


def choose_negatives(evidence: Evidence, sizes: Swept, metric: str, flops: float) -> Choice:
    """K: from the negatives law, else that of the best run at the top rung (0 where it has one stage)."""
    found = _by_law(NEGATIVES, evidence, metric, flops)
    if isinstance(found, Choice):
        return found
    best = sizes.top_runs(metric)[:1]
    kept = _unscaled(NEGATIVES, float(best[0]["config"].get("negatives") or 0), best, found)
    if kept.value:
        return kept
    source = "one stage, as the best run at the top rung"
    return dataclasses.replace(kept, source=source, note=f"{found}: K = 0, stage 1 only")


def choose_batch(evidence: Evidence, sizes: Swept, metric: str) -> tuple[Choice, BatchRule]:
    """B in target events per step: that of the best runs at the top rung, moved with N as the critical batch moves.

    So the batch stays as far below the critical one as in the runs that the prediction rests on; that one is
    gain-halving, whose exponent does not hang on which batches were tested. Without a law B is not scaled at all. The
    choice's value is the rule's at the N of those runs.
    """
    best = sizes.top_runs(metric)
    batch = statistics.median_low(float(row["batch_events"]) for row in best)
    params = statistics.median(float(row["params"]) for row in best)
    sweep, words = evidence.on(BATCH), f"{_taken(best)} at the top rung"
    if sweep is None:
        reason = "no sweep of the batch"
    else:
        try:
            law, names = _fit_batch(sweep, metric)
        except UserError as error:
            reason = f"the critical batch cannot be fitted ({error.what})"
        else:
            power = _power(law, "gain_halving")
            if power is not None:
                scale, exponent = power
                share = min(1.0, batch / (scale * params**exponent))
                source = f"{share:.3g} of the critical batch (that needs twice the least events), as {words}"
                rule = BatchRule(share * scale, exponent)
                return Choice(BATCH, rule.at(params), source, by_law=True, runs=names), rule
            reason = "the runs do not tell how the critical batch grows with N"
    note = f"{reason}: batch {batch:.4g} is {words}, not scaled at all"
    return Choice(BATCH, batch, words, note=note, runs=tuple(map(run_name, best))), BatchRule(batch, 0.0)


def choose_rate(sizes: Swept, metric: str) -> Choice:
    """Learning rate over the rule in (N, B): 1 where it was not searched, else the median over the best runs."""
    name = "learning_rate"
    if not sizes.searched(name):
        return Choice(name, 1.0, "the rule in (N, B)", note="the rate was not searched: the rule in (N, B) stands")
    rungs = list(sizes.rungs(metric).values())[-_TOP_RUNGS:]
    best = [row for rows in rungs for row in best_quarter(rows)]
    ratio = statistics.median(_rate_ratio(row) for row in best)
    source = f"the rule in (N, B) times {ratio:.3g}, the median of the best {len(best)} runs at the top rungs"
    return Choice(name, ratio, source, runs=tuple(run_name(row) for row in best))


def _by_law(name: str, evidence: Evidence, metric: str, flops: float) -> Choice | str:
    """The optimum at a C by the law of the setting's own sweep, or why there is none.

    By the law's power of C where its exponent is bounded, else the highest bracketed optimum.
    """
    words, names, sweep = name.replace("_", " "), _LAWS[name], evidence.on(name)
    if sweep is None:
        return f"no sweep of the {words}"
    try:
        runs = from_rows(sweep.rows, metric, source=sweep.folder)
        law = names.fit(runs)
    except UserError as error:
        return f"the {words} law cannot be fitted ({error.what})"
    power = _power(law, names.power)
    bracketed = [budget for budget in law.budgets if budget.bracketed and names.optimum in budget.optima]
    if power is not None:
        scale, exponent = power
        value, source = scale * flops**exponent, f"the {law.law} law in C"
    elif bracketed:
        top = max(bracketed, key=lambda budget: budget.flops)
        value = top.optima[names.optimum].estimate
        source = f"the optimum at {format_flops(top.flops)}, the highest bracketed one"
    else:
        return f"the runs do not identify the {words} law"
    return _within(Choice(name, value, source, by_law=True, runs=runs.names), runs[names.column])


def _power(law: LawFit, name: str) -> tuple[float, float] | None:
    """(coefficient, exponent) of a power law; None where the runs do not bound the exponent."""
    scale, exponent = (law.parameters.get(f"{name}_{part}") for part in ("coefficient", "exponent"))
    if scale is None or exponent is None or not math.isfinite(exponent.high - exponent.low):
        return None
    return scale.estimate, exponent.estimate


def _unscaled(name: str, value: float, best: Sequence[Row], reason: str) -> Choice:
    """What the best runs at the top rung have."""
    words, source = name.replace("_", " "), f"{_taken(best)} at the top rung"
    note = f"{reason}: {words} {value:.4g} is {source}, not scaled with C"
    return Choice(name, value, source, note=note, runs=tuple(map(run_name, best)))


def _within(choice: Choice, swept_R: np.ndarray) -> Choice:
    """Inside of what was swept: a law is no witness beyond."""
    value = min(max(choice.value, float(swept_R.min())), float(swept_R.max()))
    if value == choice.value:
        return choice
    words = choice.name.replace("_", " ")
    note = f"the law asks for {words} {choice.value:.4g}, outside of what was swept: {value:.4g} is taken"
    return dataclasses.replace(choice, value=value, note=note)


def _taken(best: Sequence[Row]) -> str:
    return "the best run's" if len(best) == 1 else f"the median of the best {len(best)} runs"


def _rate_ratio(row: Row) -> float:
    config = row["config"]
    positions = config["groups_per_step"] * config["group_windows"] * config["window"]
    return float(config["learning_rate"] / rule_learning_rate(config["params"], positions))


def _fit_batch(sweep: Swept, metric: str) -> tuple[LawFit, tuple[str, ...]]:
    """The critical batch from events to a target, on probe rows."""
    runs = events_to_target(from_rows(sweep.rows, metric, source=sweep.folder, probes=True))
    return fit_batch(runs), runs.names


@dataclass(frozen=True)
class Chosen:
    """What is the same at every N."""

    embedder_share: float
    batch: BatchRule
    rate_ratio: float
    """Learning rate over the rule in (N, B)."""
    negatives: int
    """K."""
    second_stage: Row | None
    """The run that stage 2 is taken from; None: one stage."""


class Configurations:
    """The configurations that a C allows, by model size.

    A base configuration (that of a sweep's best run) with what was chosen for the C. Verdicts are by the bounds of the
    sweep's own points: steps, D/N, epochs, memory of the tier.
    """

    def __init__(self, sizes: Swept, best: Row, chosen: Chosen, costs: CostModel, flops: float) -> None:
        self.flops, self.chosen = flops, chosen
        budget = dataclasses.replace(sizes.spec.budget, ladder_flops=(round(flops),))
        self._spec = dataclasses.replace(sizes.spec, budget=budget)
        self._feasible = FeasibleSet(self._spec, costs)
        self._base = {**best["config"], **self._depths(sizes, best), **self._stage_2()}
        probe = costs.of(TrainConfig.from_dict(best["config"]))
        self._group_events = probe.step_events / best["config"]["groups_per_step"]

    def at(self, params: float) -> Feasible | Rejection:
        """The verdict on a size; widths, depths, steps and D follow from it."""
        return self._feasible.judge_config(self.config(params))

    def config(self, params: float) -> TrainConfig:
        """The configuration of a size, feasible or not."""
        # A number that the most workers share can be shared by fewer, too.
        workers = self._spec.tiers_at(self.flops, params)[-1].workers
        groups = workers * max(1, round(self.chosen.batch.at(params) / self._group_events / workers))
        positions = groups * self._base["group_windows"] * self._base["window"]
        rate = self.chosen.rate_ratio * rule_learning_rate(params, positions)
        sized = {"params": params, "embedder_share": self.chosen.embedder_share}
        return TrainConfig.from_dict({**self._base, **sized, "groups_per_step": groups, "learning_rate": rate})

    def grid(self, low: float, high: float, per_decade: int) -> tuple[list[Feasible], list[tuple[float, Rejection]]]:
        """Feasible sizes between two N, ascending, and the others. Raises InfeasibleError where there is none."""
        steps = max(2, math.ceil(per_decade * math.log10(high / low)))
        feasible: list[Feasible] = []
        rejected: list[tuple[float, Rejection]] = []
        for step in range(steps + 1):
            params = low * (high / low) ** (step / steps)
            verdict = self.at(params)
            if isinstance(verdict, Feasible):
                feasible.append(verdict)
            else:
                rejected.append((params, verdict))
        if not feasible:
            params, first = rejected[len(rejected) // 2]
            raise InfeasibleError(
                f"no model size can be trained at {format_flops(self.flops)} FLOPs; N = {params:.3g}: {first.reason} "
                f"({first.detail})",
                key=first.key,
                fix=first.fix,
            )
        return feasible, rejected

    def _depths(self, sizes: Swept, best: Row) -> dict[str, Any]:
        """A depth that was searched belongs to its own N; its width per layer goes on to others."""
        if not sizes.searched("depth") or best["config"].get("depth") is None:
            return {}
        return {"depth": None, "aspect": best["shape"]["width"] / best["shape"]["depth"]}

    def _stage_2(self) -> Mapping[str, Any]:
        """Stage 2 begins at the same share of C as in the run that it is taken from."""
        row = self.chosen.second_stage
        if row is None:
            return _ONE_STAGE
        share = row["config"]["freeze_at_flops"] / float(row["rung_flops"])
        taken = {name: row["config"][name] for name in _STAGE_2}
        return {**taken, "freeze_at_flops": share * self.flops, "negatives": self.chosen.negatives}
