"""What a sweep will do and cost, before it starts.

Enters: a SweepSpec, a cost model, and a callable that measures this machine on a configuration. Leaves: a Plan, and
its text. Figures are nominal: the allotment of the cap to rungs, over a fixed sample of the feasible set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bfm.sweep.costs import FLOAT_BYTES, STATE_COPIES, CostModel
from bfm.sweep.policies.allotment import allot
from bfm.sweep.policies.frontier import default_shares
from bfm.sweep.settings import SweepSpec
from bfm.sweep.space import Feasible, FeasibleSet, Rejection
from bfm.training.config import TrainConfig
from bfm.units import GIB, aligned, format_count, format_flops, format_seconds

Measure = Callable[[TrainConfig, float], float]
"""(configuration, seconds to take) -> training FLOP/s of one worker on this machine."""
MEASURED_SIZES = 3
_HEAD = ("rung", "C", "trials", "N", "D", "epochs", "train FLOPs", "share", "eval FLOPs", "memory", "workers", "time")
Range = tuple[float, float]


@dataclass(frozen=True)
class RungPlan:
    """One rung."""

    rung: int
    rung_flops: int
    trials: int
    """Rows, of one seed: the others are trained only of near-ties at the top."""
    params: Range
    """Of the feasible points that have a row there."""
    events: Range
    """D of a row."""
    epochs: Range
    training_flops: int
    """Spent at this rung: what promoted trials trained before is not trained again."""
    evaluation_flops: int
    """Of the rows, and of the probes on their way."""
    memory_gib: float
    """Of one worker, the largest."""
    workers: tuple[int, ...]
    train_s: float | None
    """All of the rung's tasks, over the slots; None: not measured."""


@dataclass(frozen=True)
class Plan:
    """A whole sweep."""

    name: str
    total_flops: int
    training_flops: int
    evaluation_flops: int
    rungs: tuple[RungPlan, ...]
    table_params: int
    """Entries of lookup tables beside N, of the point with most; their state is in the rungs' memory."""
    feasible_share: float
    """Of the draws from the space."""
    refusals: tuple[tuple[float, Rejection], ...]
    """Why parts of the space cannot be trained: (share of the draws, the first of them)."""
    flops_per_s: tuple[tuple[int, float], ...]
    """(N, measured FLOP/s)."""
    train_s: float | None
    worst_s: float | None
    """The whole cap at the slowest measured speed: no sweep takes longer, evaluation apart."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        refusals = [
            {"reason": first.reason, "share": share, "example": first.detail, "fix": first.fix}
            for share, first in self.refusals
        ]
        return {**asdict(self), "refusals": refusals}


def plan(spec: SweepSpec, costs: CostModel, measure: Measure | None = None, measure_s: float = 20.0) -> Plan:
    """The plan of a sweep. Raises InfeasibleError naming the bound that binds where nothing can be trained.

    `measure` is called for the smallest, the middle and the largest model, `measure_s` seconds in all.
    """
    feasible = FeasibleSet(spec, costs)
    points, rejected = feasible.sample
    by_size = sorted(points, key=lambda point: point.cost.params)
    speeds = () if measure is None else _measure(by_size, measure, measure_s)
    tasks = [
        [(point, task_flops(spec, point, rung)) for point in by_size if rung in point.rungs]
        for rung in range(len(spec.budget.ladder_flops))
    ]
    rows = _rows(feasible, [round(np.mean([flops for _, flops in here])) for here in tasks])
    rungs = tuple(
        _rung_plan(feasible, rung, count, here, speeds)
        for rung, (count, here) in enumerate(zip(rows, tasks, strict=True))
    )
    counts = Counter(rejection.reason for rejection in rejected)
    tries = len(points) + len(rejected)
    firsts = {rejection.reason: rejection for rejection in reversed(rejected)}
    slowest = min((speed for _, speed in speeds), default=None)
    return Plan(
        name=spec.name,
        total_flops=spec.budget.total_flops,
        training_flops=sum(rung.training_flops for rung in rungs),
        evaluation_flops=sum(rung.evaluation_flops for rung in rungs),
        rungs=rungs,
        table_params=max(point.cost.table_params for point in points),
        feasible_share=len(points) / tries,
        refusals=tuple((count / tries, firsts[reason]) for reason, count in counts.most_common()),
        flops_per_s=speeds,
        train_s=sum(rung.train_s or 0.0 for rung in rungs) if speeds else None,
        worst_s=None if slowest is None else spec.budget.total_flops / slowest / spec.scaling.slots,
    )


def render(sweep: Plan) -> str:
    """The plan as text for a terminal."""
    rows: list[tuple[str, ...]] = [_HEAD]
    for rung in sweep.rungs:
        rows.append(
            (
                str(rung.rung),
                format_flops(rung.rung_flops),
                str(rung.trials),
                _span(rung.params, format_count),
                _span(rung.events, format_count),
                _span(rung.epochs, lambda epochs: f"{epochs:.2g}"),
                format_flops(rung.training_flops),
                f"{rung.training_flops / sweep.total_flops:.0%}",
                format_flops(rung.evaluation_flops),
                f"{rung.memory_gib:.2g} GiB",
                "/".join(map(str, rung.workers)),
                "?" if rung.train_s is None else format_seconds(rung.train_s),
            )
        )
    lines = [*aligned(rows), ""]
    lines.append(
        f"training {format_flops(sweep.training_flops)} of at most {format_flops(sweep.total_flops)} FLOPs, "
        f"evaluation {format_flops(sweep.evaluation_flops)} FLOPs beside it"
    )
    if sweep.train_s is not None and sweep.worst_s is not None:
        lines.append(
            f"training takes about {format_seconds(sweep.train_s)} here, at worst {format_seconds(sweep.worst_s)}"
        )
    if sweep.table_params > min(rung.params[0] for rung in sweep.rungs):
        lines.append(_tables_line(sweep.table_params))
    lines.append(f"{sweep.feasible_share:.0%} of the space is feasible")
    lines += [f"  {share:.0%} {first.reason} ({first.detail}): {first.fix}" for share, first in sweep.refusals]
    return "\n".join(lines)


def _tables_line(table_params: int) -> str:
    count, state_gib = format_count(table_params), STATE_COPIES * FLOAT_BYTES * table_params / GIB
    return (
        f"lookup tables hold {count} numbers beside N, more than a model below N = {count}: {state_gib:.2g} GiB of the "
        "memory (weights, gradient, moments) before ZeRO divides it; a smaller hash_rows in the log's schema takes less"
    )


def task_flops(spec: SweepSpec, point: Feasible, rung: int) -> int:
    """What a point that climbs rung by rung trains for its row."""
    return spec.task_flops(point.config.cooldown_fraction, rung, _below(point, rung))


def _evaluation_flops(spec: SweepSpec, point: Feasible, rung: int) -> int:
    """Of its row, and of the probes on the way to it."""
    probes = spec.probes_between(point.config.cooldown_fraction, rung, _below(point, rung))
    return point.cost.evaluation_flops + len(probes) * point.cost.probe_flops


def _below(point: Feasible, rung: int) -> int | None:
    """The rung whose trunk its row at `rung` goes on from; None where it enters."""
    return rung - 1 if rung > point.rungs[0] else None


def _rows(feasible: FeasibleSet, costs: Sequence[int]) -> Sequence[int]:
    """Configurations per rung, about: what the policy's shares (or its rule) pay for, at a task's mean FLOPs there."""
    spec, rungs = feasible.spec, range(len(costs))
    if spec.scheduler.type == "grid":
        points = feasible.sample[0]
        ends_flops = np.cumsum([sum(task_flops(spec, point, rung) for rung in point.rungs) for point in points])
        number = min(int(np.sum(ends_flops <= spec.budget.total_flops)), spec.budget.max_trials)
        return [sum(rung in point.rungs for point in points[:number]) for rung in rungs]
    if spec.scheduler.type == "random":
        return [min(spec.budget.max_trials, max(1, spec.budget.total_flops // sum(costs)))] * len(rungs)
    by_shares = spec.scheduler.type in ("frontier", "isoflop-window")
    shares = (spec.scheduler.shares or default_shares(len(rungs))) if by_shares else None
    return allot(costs, spec.budget.total_flops, spec.budget.max_trials, spec.scheduler.eta, shares)


def _rung_plan(
    feasible: FeasibleSet,
    rung: int,
    trials: int,
    tasks: Sequence[tuple[Feasible, int]],
    speeds: Sequence[tuple[int, float]],
) -> RungPlan:
    """`tasks`: the points that have a row there, with what each trains for it; `speeds`: (N, FLOP/s)."""
    spec = feasible.spec
    rung_flops = spec.budget.ladder_flops[rung]
    points, trained_flops = zip(*tasks, strict=True)
    places = [place for point in points for place in feasible.holding(point.config, point.cost, rung)]
    task_s = [flops / _speed(point.cost.params, speeds) for point, flops in tasks] if speeds else []
    return RungPlan(
        rung=rung,
        rung_flops=rung_flops,
        trials=trials,
        params=_range(point.cost.params for point in points),
        events=_range(point.cost.events(rung_flops) for point in points),
        epochs=_range(point.cost.epochs(rung_flops) for point in points),
        training_flops=round(trials * float(np.mean(trained_flops))),
        evaluation_flops=round(trials * float(np.mean([_evaluation_flops(spec, point, rung) for point in points]))),
        memory_gib=max(place.needed_bytes for place in places) / GIB,
        workers=tuple(sorted({place.tier.workers for place in places})),
        train_s=trials * float(np.mean(task_s)) / max(1, min(spec.scaling.slots, trials)) if task_s else None,
    )


def _measure(by_size: Sequence[Feasible], measure: Measure, measure_s: float) -> tuple[tuple[int, float], ...]:
    places = np.linspace(0, len(by_size) - 1, MEASURED_SIZES).round().astype(int)
    chosen = {by_size[place].cost.params: by_size[place].config for place in places}
    return tuple((params, measure(config, measure_s / len(chosen))) for params, config in chosen.items())


def _speed(params: int, speeds: Sequence[tuple[int, float]]) -> float:
    """FLOP/s at a size, between the measured sizes on log scales."""
    sizes, rates = zip(*speeds, strict=True)
    return float(np.exp(np.interp(np.log(params), np.log(sizes), np.log(rates))))


def _range(values: Iterable[float]) -> Range:
    known = list(values)
    return min(known), max(known)


def _span(ends: Range, text: Callable[[float], str]) -> str:
    low, high = (text(end) for end in ends)
    return low if low == high else f"{low}..{high}"
