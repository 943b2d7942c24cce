"""The recipe: what to train with a C that was not spent yet, what will come of it, and how far that can be trusted.

Enters: sweeps (bfm.sweep.recipe.evidence), the cost model of their log, C, a metric. Leaves: a configuration that can
be built and trained at that C, the predicted metric with its interval, and in words whatever the runs could not tell.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bfm.errors import UserError
from bfm.laws.frontier import Row, best_row, is_better, measured, metric_error, metric_value, rung_rows
from bfm.laws.joint_law import doubts
from bfm.laws.result import Estimate
from bfm.laws.runs import Runs
from bfm.sweep.ledger.rows import without_nan
from bfm.sweep.recipe.choices import (
    NEGATIVES,
    Choice,
    Sizes,
    choose_batch,
    choose_negatives,
    choose_rate,
    choose_share,
    own_negatives,
    stage_settings,
    try_sizes,
)
from bfm.sweep.recipe.evidence import Evidence, Fitted, seed_noise
from bfm.sweep.recipe.expectation import Expectation, expect
from bfm.sweep.space.costs import CostModel
from bfm.units import format_flops

MANY_EPOCHS = 4.0
"""Up to about so many, repeated events are worth nearly as much as fresh ones (arXiv 2305.16264)."""
FAR = 10.0
"""Beyond so many times what was measured, a prediction is warned of."""


@dataclass(frozen=True)
class Recipe:
    """What to train at one C."""

    flops: float
    """C."""
    metric: str
    config: Mapping[str, Any]
    """A whole TrainConfig."""
    params: Estimate
    """N as realised; the interval is the law's for the best N."""
    params_source: str
    embedder_share: float
    """s as realised."""
    shape: Mapping[str, Any]
    """Widths and depths."""
    steps: int
    events: float
    """D."""
    batch_events: float
    """B."""
    negatives: int
    """K."""
    learning_rate: float
    choices: tuple[Choice, ...]
    """Where s, B, K and the rate come from."""
    predicted: Estimate
    """The metric of one run, seed and evaluation noise included."""
    predicted_by: str
    epochs: float
    fresh: Estimate | None
    """The prediction were every event seen once; None where the runs cannot tell."""
    flops_beyond: float
    """C over the highest rung with rows."""
    params_beyond: float
    """N over the largest fitted one."""
    seed_noise: float
    """Standard deviation of the metric over seeds; NaN without replicates."""
    evaluation_noise: float
    """Median standard error of the metric over queries; NaN where no row has one."""
    rests_on: Mapping[str, Mapping[str, Any]]
    """Axis -> the sweep's folder, which of its rows, and the runs."""
    notes: tuple[str, ...]
    """What the runs could not tell, and what was taken instead."""
    warnings: tuple[str, ...]
    protocol_hash: str | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        choices = {choice.name: choice.as_dict() for choice in self.choices}
        # N is what the configuration has, however little is known of the best one: no Estimate.as_dict.
        return without_nan({**dataclasses.asdict(self), "choices": choices})


def make_recipe(evidence: Evidence, costs: CostModel, flops: float, metric: str | None = None) -> Recipe:
    """The recipe for `flops` (C) and a metric (None: the one that the sweep selects by).

    N is the size of best expected metric among those that can be trained at C, each with the D that this log's costs
    leave it. Raises UserError where rows lack the metric, are too few to foretell one, or C lies below the lowest rung
    with rows; InfeasibleError naming the bound where no size can be trained at that C.
    """
    sizes = evidence.sizes
    metric = metric or sizes.spec.metric.name
    fitted = Fitted.to(evidence, metric)
    lowest = min(sizes.rungs(metric))
    if flops < lowest:
        raise UserError(
            f"{format_flops(flops)} FLOPs lie below the lowest rung with rows ({format_flops(lowest)})",
            file=sizes.folder,
            key="--flops",
            fix=f"ask for {format_flops(lowest)} or more",
        )
    best = sizes.top_runs(metric)
    batch, rule = choose_batch(evidence, metric)
    share = choose_share(fitted, best, flops)
    rate = choose_rate(fitted, sizes, flops, rule)
    negatives, staged = choose_negatives(fitted, rung_rows(evidence.rows), flops)

    def sizes_with(stages_of: Row, count: float) -> Sizes:
        settings = {"embedder_share": share.value, **stage_settings(stages_of, count, flops)}
        return try_sizes(sizes, fitted.runs, costs, flops, settings=settings, batch=rule, rate_ratio=rate.value)

    plain = [row for row in best if not own_negatives(row)]
    variants = [sizes_with(row, 0.0) for row in plain[:1]]
    variants += [] if staged is None else [sizes_with(staged, negatives.value)]
    found = expect(fitted, variants, flops)
    if staged is not None and not found.point.config.negatives:
        note = f"{negatives.value:.4g} negatives in a second stage promise no better value: K = 0"
        negatives = Choice(NEGATIVES, 0.0, "one stage", by_law=True, note=note)
    batch = dataclasses.replace(batch, value=found.point.cost.step_events)
    return _recipe(evidence, fitted, (share, batch, negatives, rate), found, flops)


def _recipe(
    evidence: Evidence, fitted: Fitted, choices: tuple[Choice, ...], found: Expectation, flops: float
) -> Recipe:
    runs = fitted.runs
    metric, cost, config = runs.metric, found.point.cost, found.point.config
    rows = measured(evidence.sizes.rows, metric)
    errors = [error for row in rows if math.isfinite(error := metric_error(row, metric))]
    noise = seed_noise([row for sweep in evidence.sweeps for row in sweep.rows], metric)
    epochs = cost.epochs(flops)
    reached = metric_value(best_row(rows, metric), metric)
    flops_beyond = flops / max(float(row["rung_flops"]) for row in rows)
    params_beyond = cost.params / float(runs["params"].max())
    choice_notes = [choice.note for choice in choices if choice.note]
    hashes = {row["protocol_hash"] for row in rows if row.get("protocol_hash")}
    return Recipe(
        flops=flops,
        metric=metric,
        config=config.as_dict(),
        params=found.params,
        params_source="the best expected value over the sizes that this C and log allow",
        embedder_share=cost.embedder_share,
        shape=config.shape().as_dict(),
        steps=cost.steps(flops, config.cooldown_fraction),
        events=cost.events(flops),
        batch_events=cost.step_events,
        negatives=config.negatives,
        learning_rate=config.learning_rate,
        choices=choices,
        predicted=found.predicted,
        predicted_by=f"the joint model of {len(runs)} rows",
        epochs=epochs,
        fresh=found.fresh,
        flops_beyond=flops_beyond,
        params_beyond=params_beyond,
        seed_noise=noise,
        evaluation_noise=statistics.median(errors) if errors else math.nan,
        rests_on=_rests_on(evidence, runs, choices),
        notes=(*found.notes, *choice_notes, *_notes(evidence, found, noise, epochs)),
        warnings=(*_warnings(metric, found, reached, flops_beyond, params_beyond, epochs), *doubts(fitted.joint)),
        protocol_hash=next(iter(hashes), None),
    )


def _rests_on(evidence: Evidence, runs: Runs, choices: tuple[Choice, ...]) -> dict[str, dict[str, Any]]:
    several = f" of {len(evidence.sweeps)} sweeps" if len(evidence.sweeps) > 1 else ""
    rests = {"sizes": (f"all rung rows{several}", runs.names)}
    rests |= {choice.name: (choice.source, choice.runs or runs.names) for choice in choices}
    return {
        name: {"sweep": evidence.folder, "rows": rows, "runs": list(names)} for name, (rows, names) in rests.items()
    }


def _notes(evidence: Evidence, found: Expectation, noise: float, epochs: float) -> list[str]:
    notes = []
    if math.isnan(noise):
        notes.append("no replicate seeds: how much of the noise is the seed's cannot be told")
    if found.fresh is None and epochs > 1:
        notes.append("the runs cannot tell what a repeated event is worth, nor what more data would buy")
    if evidence.waiting:
        notes.append(f"without rows so far: {', '.join(evidence.waiting)}")
    return notes


def _warnings(
    metric: str, found: Expectation, reached: float, flops_beyond: float, params_beyond: float, epochs: float
) -> list[str]:
    """`reached`: the best value of the rows."""
    warnings = []
    if flops_beyond > FAR:
        warnings.append(f"C is {flops_beyond:.3g} times the highest rung: the prediction is far from what was run")
    if params_beyond > FAR:
        warnings.append(f"N is {params_beyond:.3g} times the largest fitted one")
    if epochs > MANY_EPOCHS:
        buys = "" if found.fresh is None else f"; fresh events would give {metric} {found.fresh.estimate:.4g}"
        warnings.append(f"{epochs:.3g} epochs over this log{buys}")
    if flops_beyond > 1 and not is_better(metric, found.predicted.estimate, reached):
        warnings.append(f"no better than the best row, {reached:.4g}: the rows do not tell that more FLOPs would help")
    return warnings
