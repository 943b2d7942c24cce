"""A first search space for a log and a budget, so that nobody starts from a blank page.

Enters: a shard set and the FLOPs that may be spent. Leaves: the text of a space file, every choice with its reason in a
comment, that `bfm plan` accepts. The sizes are those about the best one that the source paper's law and bfm's own
sweeps of real logs have at the ladder's C (`middle_size`), as far as they can be trained there in 100 steps and more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bfm.errors import InfeasibleError, UserError
from bfm.events.protocol import Protocol
from bfm.events.shards import Shards
from bfm.sweep.space.costs import ConfigCost, Costs
from bfm.training.config import TrainConfig, log_defaults
from bfm.units import format_count, format_flops

_STEP = math.sqrt(10)
_MOST_RUNGS = 4
_TOPS = 16.0
"""The budget over the top rung: a frontier sweep then brings about four trials there."""
_SIZES = np.geomspace(3e2, 3e9, 57)
_AROUND = 8.0
"""Sizes up to so many times smaller and larger than the middle one are searched."""
_LEAST_RATIO = 2.0
"""D / N below which a space lets nothing be trained (`budget.events_per_param`)."""
_GROUPS = (8, 4, 2, 1)
_STEPS = 400
"""Steps of the middle size at the lowest rung: a batch beyond that takes too few, a smaller one wastes the machine."""
_LEAST_QUERIES = 1000
_MOST_EPOCHS = 16.0
"""Beyond so many a repeated event teaches next to nothing (Muennighoff et al. 2023)."""


@dataclass(frozen=True)
class Proposal:
    """What a space is made of."""

    name: str
    shards: str
    ladder_flops: tuple[float, ...]
    total_flops: float
    params: tuple[float, float]
    window: int
    group_windows: int
    groups_per_step: int
    d_item: int
    queries: int
    slots: int
    gpus: int
    notes: tuple[str, ...]

    def text(self) -> str:
        """The file."""
        rungs = ", ".join(map(_plain, self.ladder_flops))
        low, high = map(_plain, self.params)
        gpus = ", gpus: 1" if self.gpus else ""
        notes = "\n".join(f"# {note}" for note in self.notes)
        return f"""\
# A first space for this log and {format_flops(self.total_flops)} FLOPs, proposed by `bfm init`: look at it, then
# `bfm plan` (what it trains, how long it takes) and `bfm sweep`.
{notes}
name: {self.name}
metric: {{name: nll, others: [recall@10, ndcg@10]}}
method: optuna

parameters:
  params:           {{distribution: log_uniform_values, min: {low}, max: {high}}}
  embedder_share:   {{distribution: log_uniform_values, min: 0.05, max: 0.4}}
  groups_per_step:  {{value: {self.groups_per_step}}}
  window:           {{value: {self.window}}}
  group_windows:    {{value: {self.group_windows}}}
  d_item:           {{value: {self.d_item}}}

budget:
  ladder_flops: [{rungs}]
  total_flops: {_plain(_down(self.total_flops))}

scheduler: {{type: frontier}}

scaling:
  slots: {self.slots}
  tiers: [{{engine: plain, cpus: 1{gpus}, micro_groups: {self.groups_per_step}}}]

data: {{shards: {self.shards}, evaluation_queries: {self.queries}}}
seeds: [0]
"""


def _plain(number: float) -> str:
    """Two digits, as YAML and people read them: 530, 2e+10 as 2e10."""
    rounded = float(f"{number:.2g}")
    return f"{rounded:.0f}" if rounded < 1e4 else f"{rounded:.2g}".replace("e+", "e")


def _down(number: float) -> float:
    """The largest number of two digits that is no larger: a cap is the user's."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return math.floor(number / unit * (1 + 1e-12)) * unit


def middle_size(flops: float) -> float:
    """N about which the best one is to be looked for.

    arXiv 2606.05257 has D / N = 344 at 1e15, so N = 7e5, and N goes as C^.617; carried down that is 2.4e3 at 1e11,
    where bfm's own sweeps of two real logs have 2.2e3 and 2.3e3.
    """
    return 7e5 * (flops / 1e15) ** 0.617


def propose(shards: Shards, protocol: Protocol, location: str, total_flops: float, slots: int, gpus: int) -> Proposal:
    """A space for a budget on the shard set at `location`. Raises UserError where it is too small for two rungs."""
    decided = log_defaults((), protocol.filter_seen, shards.history_length)
    window, group_windows = int(decided["window"]), int(decided["group_windows"])
    costs = Costs.on(shards, protocol, None)
    notes: tuple[str, ...] = ()
    while True:
        d_item = 16 if total_flops < 1e14 else 32 if total_flops < 1e17 else 64
        known = [_cost(costs, size, window, group_windows, d_item) for size in _SIZES]
        sizes, top = [cost for cost in known if cost is not None], total_flops / _TOPS
        if min((cost.epochs(top) for cost in _searched(sizes, top)), default=0.0) <= _MOST_EPOCHS:
            break
        total_flops /= _STEP
        notes = (f"less than was given: every size sees the log more than {_MOST_EPOCHS:g} times at rungs above these",)
    ladder = [top / _STEP**rung for rung in reversed(range(_MOST_RUNGS))]
    searched = {flops: _searched(sizes, flops) for flops in ladder}
    ladder = [flops for flops in ladder if searched[flops]]
    if len(ladder) < 2:
        need = next((flops for flops in np.geomspace(top, 1e6 * top, 61) if _searched(sizes, flops)), 1e6 * top)
        what = f"{format_flops(total_flops)} FLOPs leave fewer than two rungs on which a model of this log can be told"
        raise UserError(what, key="--flops", fix=f"give {format_flops(need * _STEP * _TOPS)} or more")
    params = [cost.params for flops in ladder for cost in searched[flops]]
    middle = searched[ladder[0]][len(searched[ladder[0]]) // 2]
    steps = middle.steps(ladder[0], TrainConfig.cooldown_fraction)
    groups = next((groups for groups in _GROUPS if steps / groups >= _STEPS), 1)
    num_queries = protocol.queries("validation").num_headline
    queries = int(np.clip(num_queries * ladder[0] / middle.evaluation_flops, _LEAST_QUERIES, 10_000))
    ends = f"{format_count(min(params))} to {format_count(max(params))}"
    epochs = middle.epochs(ladder[0]), min(cost.epochs(ladder[-1]) for cost in searched[ladder[-1]])
    notes += (
        f"sizes {ends}: a factor {_AROUND:g} about those of the source paper's law at each rung, as far as they exist",
        f"training targets are seen {epochs[0]:.2g} times at the lowest rung, {epochs[1]:.2g} and more at the top",
        f"window: the history of a usual event, {shards.history_length:.0f} events, as a power of two up to 512",
        f"batch: {steps // groups} steps of a middle size at the lowest rung; the learning rate follows (N, B)",
    )
    return Proposal(
        name=shards.manifest.name,
        shards=location,
        ladder_flops=tuple(ladder),
        total_flops=total_flops,
        params=(min(params), max(params)),
        window=window,
        group_windows=group_windows,
        groups_per_step=groups,
        d_item=d_item,
        queries=min(queries, num_queries),
        slots=slots,
        gpus=gpus,
        notes=notes,
    )


def _cost(costs: Costs, size: float, window: int, group_windows: int, d_item: int) -> ConfigCost | None:
    """Of a size; None where no model is that small."""
    config = TrainConfig(params=size, embedder_share=0.15, window=window, group_windows=group_windows, d_item=d_item)
    try:
        return costs.of(config)
    except InfeasibleError:
        return None


def _searched(sizes: Sequence[ConfigCost], flops: float) -> list[ConfigCost]:
    """Those near the middle one of a C that can be trained to it; none where they do not stand on both sides of it."""
    found = []
    for cost in sizes:
        middle = middle_size(flops)
        if not middle / _AROUND <= cost.params <= middle * _AROUND or cost.events(flops) < _LEAST_RATIO * cost.params:
            continue
        try:
            cost.steps(flops, TrainConfig.cooldown_fraction)
        except InfeasibleError:
            continue
        found.append(cost)
    brackets = found and found[0].params < middle_size(flops) < found[-1].params
    return found if brackets else []
