"""What a sweep will do and cost, before it starts.

Enters: a SweepSpec, a cost model, this machine, and a callable that measures it on a configuration. Leaves: a Plan,
and its text. Figures are nominal: the allotment of the cap to rungs, over a fixed sample of the feasible set. Times are
of as many tasks at a time as this machine holds, and beside them of as many as the space allows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from bfm.errors import UserError
from bfm.sweep.plan.machine import USUAL_CARD_GIB, Machine
from bfm.sweep.policies.allotment import allot
from bfm.sweep.policies.frontier import default_shares
from bfm.sweep.space.costs import FLOAT_BYTES, STATE_COPIES, CostModel
from bfm.sweep.space.settings import SweepSpec
from bfm.sweep.space.space import Feasible, FeasibleSet, Place, Rejection
from bfm.sweep.space.tiers import Tier
from bfm.training.config import TrainConfig
from bfm.units import GIB, aligned, format_count, format_flops, format_seconds

Measure = Callable[[TrainConfig, float], float]
"""(configuration, seconds to take) -> training FLOP/s of one worker on this machine."""
MEASURED_SIZES = 3
MANY_EPOCHS = 100.0
"""Beyond so many the log is learnt by heart: more FLOPs say nothing of more data."""
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
    unheld: float
    """Share of the points whose worker needs more than there is (Machine.worker_gib) and whose tier does not tell."""
    workers: tuple[int, ...]
    tasks_here: int
    """So many at a time this machine holds; 0: not one could start."""
    train_s: float | None
    """All of the rung's tasks on this machine, one at a time where it holds none; None: not measured."""
    slots_train_s: float | None
    """The same over the slots, each as fast as this machine."""


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
    slots: int
    tasks_here: int
    """The fewest of a rung."""
    train_s: float | None
    worst_s: float | None
    """The whole cap at the slowest measured speed: no sweep takes longer on this machine, evaluation apart."""
    slots_train_s: float | None
    slots_worst_s: float | None
    """The same where there is a place like this machine's for every slot."""
    warnings: tuple[str, ...]
    """What should be thought of before this is run."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        refusals = [
            {"reason": first.reason, "share": share, "example": first.detail, "fix": first.fix}
            for share, first in self.refusals
        ]
        return {**asdict(self), "refusals": refusals}


def plan(
    spec: SweepSpec, costs: CostModel, machine: Machine, measure: Measure | None = None, measure_s: float = 20.0
) -> Plan:
    """The plan of a sweep. Raises InfeasibleError naming the bound that binds where nothing can be trained.

    `measure` is called for the smallest, the middle and the largest model, `measure_s` seconds in all.
    """
    feasible = FeasibleSet(spec, costs)
    points, rejected = feasible.sample
    by_size = sorted(points, key=lambda point: point.cost.params)
    speeds = () if measure is None else _measure(by_size, machine, measure, measure_s)
    tasks = [
        [(point, task_flops(spec, point, rung)) for point in by_size if rung in point.rungs]
        for rung in range(len(spec.budget.ladder_flops))
    ]
    rows = _rows(feasible, [round(np.mean([flops for _, flops in here])) for here in tasks])
    rungs = tuple(
        _rung_plan(feasible, machine, rung, count, here, speeds)
        for rung, (count, here) in enumerate(zip(rows, tasks, strict=True))
    )
    counts = Counter(rejection.reason for rejection in rejected)
    tries = len(points) + len(rejected)
    firsts = {rejection.reason: rejection for rejection in reversed(rejected)}
    tables, slots = max(point.cost.table_params for point in points), spec.scaling.slots
    here = min(rung.tasks_here for rung in rungs)
    worst_s = spec.budget.total_flops / min(speed for _, speed in speeds) if speeds else None
    return Plan(
        name=spec.name,
        total_flops=spec.budget.total_flops,
        training_flops=sum(rung.training_flops for rung in rungs),
        evaluation_flops=sum(rung.evaluation_flops for rung in rungs),
        rungs=rungs,
        table_params=tables,
        feasible_share=len(points) / tries,
        refusals=tuple((count / tries, firsts[reason]) for reason, count in counts.most_common()),
        flops_per_s=speeds,
        slots=slots,
        tasks_here=here,
        train_s=sum(rung.train_s or 0.0 for rung in rungs) if speeds else None,
        worst_s=None if worst_s is None else worst_s / max(1, min(slots, here)),
        slots_train_s=sum(rung.slots_train_s or 0.0 for rung in rungs) if speeds else None,
        slots_worst_s=None if worst_s is None else worst_s / slots,
        warnings=tuple(_warnings(spec, machine, rungs, tables, speeds)),
    )


def check_held(feasible: FeasibleSet, machine: Machine) -> None:
    """Raises UserError where no point of a space has a worker here with the memory that it is estimated to need."""
    points, slots = feasible.sample[0], feasible.spec.scaling.slots
    entries = [feasible.holding(point.config, point.cost, point.rungs[0]) for point in points]
    if all(_is_unheld(machine, place, slots) for places in entries for place in places):
        least = min((place for places in entries for place in places), key=lambda place: place.needed_bytes)
        has_gib = machine.worker_gib(least.tier, slots)
        what = f"the smallest model needs about {least.needed_bytes / GIB:,.3g} GiB, a worker here has {has_gib:.3g}"
        fix = "search smaller models, use fewer `micro_groups`, or join a larger cluster with RAY_ADDRESS"
        raise UserError(what, key="parameters.params", fix=fix)


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
    lines += _time_lines(sweep)
    lines.append(f"{sweep.feasible_share:.0%} of the space is feasible")
    lines += [f"  {share:.0%} {first.reason} ({first.detail}): {first.fix}" for share, first in sweep.refusals]
    lines += [f"WARNING: {warning}" for warning in sweep.warnings]
    return "\n".join(lines)


def _time_lines(sweep: Plan) -> Iterator[str]:
    if sweep.train_s is None or sweep.worst_s is None:
        return
    at_a_time = max(1, min(sweep.slots, sweep.tasks_here))
    yield (
        f"training takes about {format_seconds(sweep.train_s)} here, {at_a_time} at a time, "
        f"at worst {format_seconds(sweep.worst_s)}"
    )
    if at_a_time < sweep.slots and sweep.slots_train_s is not None and sweep.slots_worst_s is not None:
        yield (
            f"on {sweep.slots} places as fast as one here about {format_seconds(sweep.slots_train_s)}, "
            f"at worst {format_seconds(sweep.slots_worst_s)}"
        )


def _warnings(
    spec: SweepSpec,
    machine: Machine,
    rungs: Sequence[RungPlan],
    table_params: int,
    speeds: Sequence[tuple[int, float]],
) -> Iterator[str]:
    if speeds and speeds[-1][0] < max(rung.params[1] for rung in rungs):
        yield (
            f"models above N = {format_count(speeds[-1][0])} are taken to be as fast as that one: this machine has no "
            "memory for them, or takes too long for a step"
        )
    if speeds and machine.gpus == 0 and any(tier.gpus for tiers in spec.scaling.tiers for tier in tiers):
        yield f"tiers ask for GPUs and there is none here: the speeds are those of {machine.cores:g} CPUs"
    if machine.gpus and not any(tier.gpus for tiers in spec.scaling.tiers for tier in tiers):
        yield f"no tier asks for a GPU, and {machine.gpus} are here: tasks train on CPUs; write `gpus: 1` in a tier"
    for tiers in spec.scaling.tiers:
        if not any(map(machine.holds, tiers)):
            yield f"{machine.lack(tiers[0])}: it would not start here"
    unheld = [rung for rung in rungs if rung.unheld]
    if unheld:
        shares = ", ".join(f"{rung.unheld:.0%} of the points at rung {rung.rung}" for rung in unheld)
        most_gib = max(rung.memory_gib for rung in unheld)
        card = "" if machine.gpus else f" (of the usual card: {USUAL_CARD_GIB:g} GiB)"
        yield (
            f"{shares} need more memory than a worker has{card}, up to {most_gib:.3g} GiB: name `memory_gib` in the "
            "tiers, so that they are infeasible, or use fewer `micro_groups` or more workers"
        )
    repeated = [rung for rung in rungs if rung.epochs[1] > MANY_EPOCHS]
    if repeated:
        most = max(rung.epochs[1] for rung in repeated)
        yield (
            f"up to {most:.2g} epochs of this log, more than {MANY_EPOCHS:g} from rung {repeated[0].rung} on: such "
            "runs tell of repetition; lower the ladder, bring more data, or set `budget.max_epochs`"
        )
    if table_params > min(rung.params[0] for rung in rungs):
        yield _tables_line(table_params)


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
    machine: Machine,
    rung: int,
    trials: int,
    tasks: Sequence[tuple[Feasible, int]],
    speeds: Sequence[tuple[int, float]],
) -> RungPlan:
    """`tasks`: the points that have a row there, with what each trains for it; `speeds`: (N, FLOP/s)."""
    spec = feasible.spec
    rung_flops = spec.budget.ladder_flops[rung]
    points, trained_flops = zip(*tasks, strict=True)
    holding = [feasible.holding(point.config, point.cost, rung) for point in points]
    places = [place for ways in holding for place in ways]
    here, at_most = (
        min(max(machine.holds(way.tier) for way in ways) for ways in holding),
        min(spec.scaling.slots, trials),
    )
    task_s = [flops / _speed(point.cost.params, speeds) for point, flops in tasks] if speeds else []
    every_s = trials * float(np.mean(task_s)) if task_s else None
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
        unheld=float(np.mean([all(_is_unheld(machine, way, at_most) for way in ways) for ways in holding])),
        workers=tuple(sorted({place.tier.workers for place in places})),
        tasks_here=here,
        train_s=None if every_s is None else every_s / max(1, min(at_most, here)),
        slots_train_s=None if every_s is None else every_s / max(1, at_most),
    )


def _is_unheld(machine: Machine, place: Place, tasks: int) -> bool:
    return place.tier.memory_gib is None and place.needed_bytes / GIB > machine.worker_gib(place.tier, tasks)


def _measure(
    by_size: Sequence[Feasible], machine: Machine, measure: Measure, measure_s: float
) -> tuple[tuple[int, float], ...]:
    """The smallest, and of those that can be measured here a middle one and the largest: a negative group of theirs has
    room, and takes no longer than the time that each has."""
    smallest, share_s = by_size[0], measure_s / MEASURED_SIZES
    speeds = {smallest.cost.params: measure(_alone(smallest.config), share_s)}
    group_flops = share_s * speeds[smallest.cost.params]
    room_bytes = (machine.gpu_memory_gib or machine.memory_gib) * GIB / 2
    able = [
        point
        for point in by_size
        if point.cost.step_flops / point.config.groups_per_step <= group_flops
        and point.cost.memory_bytes(Tier(), 1, point.config.averaging) <= room_bytes
    ]
    for place in np.linspace(0, len(able) - 1, MEASURED_SIZES).round().astype(int) if able else ():
        params = able[place].cost.params
        if params not in speeds:
            speeds[params] = measure(_alone(able[place].config), share_s)
    return tuple(sorted(speeds.items()))


def _alone(config: TrainConfig) -> TrainConfig:
    """With one group a step: how many there are does not change the speed, but the time to the end of the first."""
    return replace(config, groups_per_step=1)


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
