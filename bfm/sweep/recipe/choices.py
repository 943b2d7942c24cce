"""A recipe's settings beside N: embedder share, batch, negatives, learning rate at a C that was not spent yet.

Enters: sweeps by axis (bfm.sweep.recipe.evidence), a metric, C. Leaves: one Choice per setting with its source, and the
sizes that can be trained with them. A law decides where its sweep was run and the runs identify it; otherwise the
best runs of the top rung do, and the choice says so. No setting leaves the range that was swept.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bfm.errors import InfeasibleError, UserError
from bfm.laws.fitting import fit_law, runs_of_sweep
from bfm.laws.frontier import Row
from bfm.laws.result import LawFit
from bfm.laws.runs import Runs, run_name
from bfm.sweep.costs import CostModel
from bfm.sweep.recipe.evidence import Evidence, Swept, best_quarter
from bfm.sweep.space import Feasible, FeasibleSet, Rejection
from bfm.training.config import TrainConfig
from bfm.units import format_flops

SHARE, BATCH, NEGATIVES = "embedder_share", "batch", "negatives"
_TOP_RUNGS = 2
"""Rungs from which the ratio of the best rates to the rule is taken."""
_SIZES_PER_DECADE = 40
SIZE_STEP = 10 ** (1 / _SIZES_PER_DECADE)
"""Factor between neighbouring sizes that are tried."""
_BEYOND = 4.0
"""Sizes are tried so far beyond the fitted ones, and further up as C exceeds the highest rung."""


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
class Power:
    """scale * x^exponent, x being C or N."""

    scale: float
    exponent: float

    def at(self, x: float) -> float:
        """Its value."""
        return self.scale * x**self.exponent


@dataclass(frozen=True)
class _Law:
    """The law of a setting's own sweep."""

    name: str
    """In bfm.laws.fitting; of a law in C also the column of the setting."""
    words: str
    power: str
    """Name of its power of C or N, see `power_of`."""


_LAWS = {
    SHARE: _Law("share", "embedder share law", "share"),
    BATCH: _Law("batch", "critical batch", "gain_halving"),
    NEGATIVES: _Law("negatives", "negatives law", "K"),
}


def choose_share(evidence: Evidence, metric: str, flops: float) -> Choice:
    """s: from the share law, else the median of the best runs at the top rung."""
    found = _by_law(SHARE, evidence, metric, flops)
    if isinstance(found, Choice):
        return found
    best = evidence.sizes.top_runs(metric)
    return _unscaled(SHARE, statistics.median(float(row["embedder_share"]) for row in best), best, found)


def choose_negatives(evidence: Evidence, metric: str, flops: float) -> Choice:
    """K: from the negatives law, else that of the best run at the top rung (0 where it has one stage)."""
    found = _by_law(NEGATIVES, evidence, metric, flops)
    if isinstance(found, Choice):
        return found
    best = evidence.sizes.top_runs(metric)[:1]
    kept = _unscaled(NEGATIVES, own_negatives(best[0]), best, found)
    if kept.value:
        return kept
    source = "one stage, as the best run at the top rung"
    return dataclasses.replace(kept, source=source, note=f"{found}: K = 0, stage 1 only")


def own_negatives(run: Row) -> float:
    """K of a run; 0 where it has one stage."""
    return float(run["config"].get("negatives") or 0)


def choose_batch(evidence: Evidence, metric: str) -> tuple[Choice, Power]:
    """B in target events per step: that of the best runs at the top rung, moved with N as the critical batch moves.

    So the batch stays as far below the critical one as in the runs that the prediction rests on; that one is
    gain-halving, whose exponent does not hang on which batches were tested. Without a law B is not scaled at all. The
    choice's value is that of the power of N at the N of those runs.
    """
    best = evidence.sizes.top_runs(metric)
    batch = statistics.median_low(float(row["batch_events"]) for row in best)
    params = statistics.median(float(row["params"]) for row in best)
    found = _fit(BATCH, evidence, metric)
    if isinstance(found, str):
        return _unscaled(BATCH, batch, best, found, "at all"), Power(batch, 0.0)
    runs, _, critical = found
    if critical is None:
        reason = "the runs do not tell how the critical batch grows with N"
        return _unscaled(BATCH, batch, best, reason, "at all"), Power(batch, 0.0)
    share = min(1.0, batch / critical.at(params))
    source = f"{share:.3g} of the critical batch (that needs twice the least events), as {_taken(best)}"
    rule = Power(share * critical.scale, critical.exponent)
    return Choice(BATCH, rule.at(params), source, by_law=True, runs=runs.names), rule


def choose_rate(sizes: Swept, metric: str) -> Choice:
    """Learning rate over the rule in (N, B): 1 where it was not searched, else the median over the best runs."""
    name = "learning_rate"
    if not sizes.searched(name):
        return Choice(name, 1.0, "the rule in (N, B)", note="the rate was not searched: the rule in (N, B) stands")
    rungs = list(sizes.rungs(metric).values())[-_TOP_RUNGS:]
    best = [row for rows in rungs for row in best_quarter(rows)]
    ratio = statistics.median(row["config"]["learning_rate"] / _rule_rate(row["config"]) for row in best)
    source = f"the rule in (N, B) times {ratio:.3g}, the median of the best {len(best)} runs at the top rungs"
    return Choice(name, ratio, source, runs=tuple(run_name(row) for row in best))


def _by_law(name: str, evidence: Evidence, metric: str, flops: float) -> Choice | str:
    """The optimum at a C by the law of the setting's own sweep, or why there is none.

    By the law's power of C where its exponent is bounded, else the highest bracketed optimum.
    """
    found = _fit(name, evidence, metric)
    if isinstance(found, str):
        return found
    runs, law, power = found
    bracketed = [budget for budget in law.budgets if budget.bracketed and budget.optima]
    if power is not None:
        value, source = power.at(flops), f"the {law.law} law in C"
    elif bracketed:
        top = max(bracketed, key=lambda budget: budget.flops)
        (optimum,) = top.optima.values()
        value, source = optimum.estimate, f"the optimum at {format_flops(top.flops)}, the highest bracketed one"
    else:
        return f"the runs do not identify the {_LAWS[name].words}"
    return _within(Choice(name, value, source, by_law=True, runs=runs.names), runs[law.law])


def _fit(name: str, evidence: Evidence, metric: str) -> tuple[Runs, LawFit, Power | None] | str:
    """The runs of a setting's own sweep, their law and its power, or why there is no law."""
    law, sweep = _LAWS[name], evidence.on(name)
    if sweep is None:
        return f"no sweep of the {name.replace('_', ' ')}"
    try:
        runs = runs_of_sweep(law.name, sweep.rows, metric, sweep.folder)
        fitted = fit_law(law.name, runs)
    except UserError as error:
        return f"the {law.words} cannot be fitted ({error.what})"
    return runs, fitted, power_of(fitted, law.power)


def power_of(law: LawFit, name: str) -> Power | None:
    """The power of C or N that a law's parameters of a name make; None where the runs do not bound the exponent."""
    scale, exponent = (law.parameters.get(f"{name}_{part}") for part in ("coefficient", "exponent"))
    if scale is None or exponent is None or not math.isfinite(exponent.high - exponent.low):
        return None
    return Power(scale.estimate, exponent.estimate)


def _unscaled(name: str, value: float, best: Sequence[Row], reason: str, with_what: str = "with C") -> Choice:
    """What the best runs at the top rung have."""
    words, source = name.replace("_", " "), _taken(best)
    note = f"{reason}: {words} {value:.4g} is {source}, not scaled {with_what}"
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
    whose = "the best run's" if len(best) == 1 else f"the median of the best {len(best)} runs"
    return f"{whose} at the top rung"


def _rule_rate(config: Mapping[str, Any]) -> float:
    """What the rule in (N, B) says for a configuration."""
    return TrainConfig.from_dict({**config, "learning_rate": 0.0}).learning_rate


def stage_settings(run: Row, negatives: float, flops: float) -> dict[str, Any]:
    """Stage 2 as in a run, begun at the same share of C and with so many negatives; one stage where the run has one."""
    config = run["config"]
    if config.get("freeze_at_flops") is None:
        return {"freeze_at_flops": None, "negatives": 0}
    share = config["freeze_at_flops"] / float(run["rung_flops"])
    exponent = config["negatives_exponent"]
    return {"freeze_at_flops": share * flops, "negatives": round(negatives), "negatives_exponent": exponent}


@dataclass(frozen=True)
class Sizes:
    """The sizes that were tried at a C, by N."""

    flops: float
    """C."""
    trainable: tuple[Feasible, ...]
    rejected: tuple[tuple[float, Rejection], ...]
    """(N, why it cannot be trained)."""


def try_sizes(
    swept: Swept,
    runs: Runs,
    costs: CostModel,
    flops: float,
    *,
    settings: Mapping[str, Any],
    batch: Power,
    rate_ratio: float,
) -> Sizes:
    """The sizes about those of some runs of a sweep, all else as in its best run but for `settings`.

    `batch` is target events per step at an N, `rate_ratio` the learning rate over the rule in (N, B). Verdicts are by
    the bounds of the sweep's own points: steps, D/N, epochs, memory of the tier. Raises InfeasibleError where no size
    can be trained.
    """
    best = swept.top_runs(runs.metric)[0]
    spec = dataclasses.replace(swept.spec, budget=dataclasses.replace(swept.spec.budget, ladder_flops=(round(flops),)))
    feasible, base = FeasibleSet(spec, costs), {**best["config"], **_depths(swept, best), **settings}
    step_events = costs.of(TrainConfig.from_dict(best["config"])).step_events
    group_events = step_events / best["config"]["groups_per_step"]

    def config(params: float) -> TrainConfig:
        # A number that the most workers share can be shared by fewer, too.
        workers = spec.tiers_at(flops, params)[-1].workers
        groups = workers * max(1, round(batch.at(params) / group_events / workers))
        sized = {**base, "params": params, "groups_per_step": groups}
        return TrainConfig.from_dict({**sized, "learning_rate": rate_ratio * _rule_rate(sized)})

    beyond = _BEYOND * max(1.0, flops / float(runs["flops"].max()))
    low, high = float(runs["params"].min()) / _BEYOND, float(runs["params"].max()) * beyond
    steps = max(2, math.ceil(_SIZES_PER_DECADE * math.log10(high / low)))
    asked = [low * (high / low) ** (step / steps) for step in range(steps + 1)]
    verdicts = [(params, feasible.judge_config(config(params))) for params in asked]
    trainable = tuple(verdict for _, verdict in verdicts if isinstance(verdict, Feasible))
    rejected = tuple((params, verdict) for params, verdict in verdicts if isinstance(verdict, Rejection))
    if not trainable:
        params, first = rejected[len(rejected) // 2]
        raise InfeasibleError(
            f"no model size can be trained at {format_flops(flops)} FLOPs; N = {params:.3g}: {first.reason} "
            f"({first.detail})",
            key=first.key,
            fix=first.fix,
        )
    return Sizes(flops, trainable, rejected)


def _depths(swept: Swept, best: Row) -> dict[str, Any]:
    """A depth that was searched belongs to its own N; its width per layer goes on to others."""
    if not swept.searched("depth") or best["config"].get("depth") is None:
        return {}
    return {"depth": None, "aspect": best["shape"]["width"] / best["shape"]["depth"]}
