"""A recipe's settings beside N: embedder share, batch, negatives, learning rate at a C that was not spent yet.

Enters: the joint model of all rows (bfm.sweep.recipe.evidence), the best runs, C. Leaves: one Choice per setting with
its source, and the sizes that can be trained with them. The model decides where the rows tell an optimum; otherwise the
best runs of the top rung do, and the choice says so. No setting leaves the range that was swept.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bfm.errors import InfeasibleError, UserError
from bfm.laws.fitting import fit_law, runs_of_sweep
from bfm.laws.frontier import Row, measured, metric_value
from bfm.laws.joint_optimum import axis_at
from bfm.laws.result import Estimate
from bfm.laws.runs import Runs, run_name
from bfm.sweep.recipe.evidence import Evidence, Fitted, Swept
from bfm.sweep.space.costs import CostModel
from bfm.sweep.space.metric import Metric
from bfm.sweep.space.space import Feasible, FeasibleSet, Rejection
from bfm.training.config import TrainConfig
from bfm.units import format_flops

SHARE, BATCH, NEGATIVES, RATE = "embedder_share", "batch", "negatives", "learning_rate"
_COLUMN = {SHARE: "share", NEGATIVES: "negatives", RATE: "rate"}
_SIZES_PER_DECADE = 40
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
    """Whether a law decided."""
    note: str = ""
    """What the runs do not tell, and what was taken instead."""
    runs: tuple[str, ...] = ()
    """The runs that it rests on; none where it rests on all."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form; the runs are listed with the recipe."""
        return {"value": self.value, "source": self.source, "by_law": self.by_law}


@dataclass(frozen=True)
class Power:
    """scale * x^exponent, x being N."""

    scale: float
    exponent: float

    def at(self, x: float) -> float:
        """Its value."""
        return self.scale * x**self.exponent


def choose_share(fitted: Fitted, best: Sequence[Row], flops: float) -> Choice:
    """s: where the model has its optimum, else the median of the best runs at the top rung."""
    own = statistics.median(float(row["embedder_share"]) for row in best)
    return _optimum(SHARE, fitted, best, own, _axis(SHARE, fitted, flops))


def choose_negatives(fitted: Fitted, rows: Sequence[Row], flops: float) -> tuple[Choice, Row | None]:
    """(K of a second stage, the best of the rows that has one): the model's optimum, else that row's; 0 without one."""
    metric = Metric(fitted.runs.metric)
    staged = [row for row in measured(rows, metric.name) if own_negatives(row)]
    if not staged:
        return Choice(NEGATIVES, 0.0, "one stage", note="no run has a second stage: K = 0, stage 1 only"), None
    top = max(float(row["rung_flops"]) for row in staged)
    at_top = [row for row in staged if float(row["rung_flops"]) == top]
    leader = min(at_top, key=lambda row: metric.loss(metric_value(row, metric.name)))
    found = _axis(NEGATIVES, fitted, flops)
    return _optimum(NEGATIVES, fitted, [leader], own_negatives(leader), found), leader


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
    found = _critical(evidence, metric)
    if isinstance(found, str):
        return _own(BATCH, batch, best, found, "at all"), Power(batch, 0.0)
    runs, critical = found
    share = min(1.0, batch / critical.at(params))
    source = f"{share:.3g} of the critical batch (that needs twice the least events), as {_taken(best)}"
    rule = Power(share * critical.scale, critical.exponent)
    return Choice(BATCH, rule.at(params), source, by_law=True, runs=runs.names), rule


def choose_rate(fitted: Fitted, sizes: Swept, flops: float, batch: Power) -> Choice:
    """Learning rate over the rule in (N, B): 1 where it was not searched, else the model's optimum over the rule, or
    that of the best runs at the top rung."""
    if not sizes.searched(RATE):
        return Choice(RATE, 1.0, "the rule in (N, B)", note="the rate was not searched: the rule in (N, B) stands")
    best = sizes.top_runs(fitted.runs.metric)
    own = statistics.median(row["config"]["learning_rate"] / _rule_rate(row["config"]) for row in best)
    found = _axis(RATE, fitted, flops, batch, best[0])
    choice = _optimum(RATE, fitted, best, own, found)
    return dataclasses.replace(choice, source=f"the rule in (N, B) times {choice.value:.3g}: {choice.source}")


def _axis(
    name: str, fitted: Fitted, flops: float, batch: Power | None = None, best: Row | None = None
) -> Estimate | str:
    """The optimum of a setting at one C and its best N, or why there is none; of a rate, over the rule in (N, B).

    Where it is not told to move with C, that of the largest C with rows is kept: a slope of noise leads far astray.
    """
    column = _COLUMN[name]
    if column not in fitted.joint.frame.axes:
        return f"the {name.replace('_', ' ')} was not varied over 4 values"
    exponent = fitted.best.axes[column].exponent()
    at = flops if exponent.low > 0 or exponent.high < 0 else max(fitted.best.budgets)
    params = fitted.size_at(at)
    if batch is None or best is None:
        return axis_at(fitted.joint, column, at, math.log(params))
    found = axis_at(fitted.joint, column, at, math.log(params), batch.at(params))
    groups = best["config"]["groups_per_step"] * batch.at(params) / best["batch_events"]
    rule = _rule_rate({**best["config"], "params": params, "groups_per_step": max(1, round(groups))})
    return found.through_rising(lambda rate: rate / rule)


def _optimum(name: str, fitted: Fitted, best: Sequence[Row], own: float, found: Estimate | str) -> Choice:
    """The model's optimum inside of what was swept; an end where the optimum lies beyond; else the best runs' own."""
    if isinstance(found, str):
        return _own(name, own, best, found)
    words = name.replace("_", " ")
    if math.isfinite(found.estimate):
        ends = f"[{found.low:.3g}, {found.high:.3g}]"
        return Choice(name, found.estimate, f"its optimum at that C and N, of all rows {ends}", by_law=True)
    values_R = fitted.joint.columns[_COLUMN[name]]
    if name != RATE and (found.low > 0 or found.high < math.inf):
        end = float(values_R.max() if found.low > 0 else values_R[values_R > 0].min())
        note = f"the best {words} lies beyond what was swept: its end {end:.4g} is taken"
        return Choice(name, end, "the end of what was swept", by_law=True, note=note)
    return _own(name, own, best, f"the loss is as flat in the {words} as its noise")


def _critical(evidence: Evidence, metric: str) -> tuple[Runs, Power] | str:
    """The runs of the batch sweep and the critical batch (gain-halving) as a power of N, or why there is none."""
    sweep = evidence.on(BATCH)
    if sweep is None:
        return "no sweep of the batch"
    try:
        runs = runs_of_sweep(BATCH, sweep.rows, metric, sweep.folder)
        law = fit_law(BATCH, runs)
    except UserError as error:
        return f"the critical batch cannot be fitted ({error.what})"
    scale, exponent = law.parameters["gain_halving_coefficient"], law.parameters["gain_halving_exponent"]
    if not math.isfinite(exponent.high - exponent.low):
        return "the runs do not tell how the critical batch grows with N"
    return runs, Power(scale.estimate, exponent.estimate)


def _own(name: str, value: float, best: Sequence[Row], reason: str, with_what: str = "with C") -> Choice:
    """What the best runs at the top rung have."""
    words, source = name.replace("_", " "), _taken(best)
    note = f"{reason}: {words} {value:.4g} is {source}, not scaled {with_what}"
    return Choice(name, value, source, note=note, runs=tuple(map(run_name, best)))


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
