"""Nominal costs: what a configuration costs per step on a log, before anything is trained.

Enters: a TrainConfig, and what is known of the log (fields, sizes, mean distinct items per negative group).
Leaves: a ConfigCost, from which steps, events, epochs and memory at any C follow. Realised C is counted by the
trainer from the groups it really saw; policies and plans see only the nominal costs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bfm.events.fields import FittedField
from bfm.events.protocol import Protocol as EvaluationProtocol
from bfm.events.shards import Shards
from bfm.events.statistics import GroupMeans, group_means
from bfm.events.windows import Targets
from bfm.model.attention import PACKED_LENGTH
from bfm.model.fields import TABLE_KINDS
from bfm.model.flops import ModelCost
from bfm.model.sizing import Shape
from bfm.objective.methods import shares_catalogue
from bfm.objective.sampling import drawn_inclusion
from bfm.objective.softmax import computes_scores_twice
from bfm.sweep.space.tiers import Tier
from bfm.training.config import TrainConfig
from bfm.training.schedule import check_rung
from bfm.training.task import PROBE_QUERIES

FLOAT_BYTES = 4
STATE_COPIES = 4
"""Numbers held per weight in training: itself, its gradient, AdamW's two moments."""
_TILE_SCORES = 1 << 19
STEP_MARGIN = 0.25
"""Steps differ in cost; one so much dearer than the mean must not make a feasible configuration miss its rung."""


@dataclass(frozen=True)
class ConfigCost:
    """What a configuration costs on a log."""

    params: int
    """Realised N."""
    embedder_share: float
    """Realised s."""
    state_params: int
    """N, stem and tables: everything that the optimizer holds state for."""
    table_params: int
    """Entries of the lookup tables among them."""
    step_flops: float
    """Mean FLOPs of an optimizer step of stage 1."""
    step_events: float
    """Mean targets of a step."""
    epoch_events: int
    """Targets per epoch."""
    evaluation_flops: int
    """One evaluation of the validation part."""
    probe_flops: int
    """One evaluation at a probe."""
    group_bytes: int
    """Activations of one negative group, the scores of its loss left out."""
    group_scores: float
    """Queries times candidates of one group, in the stage with more of them."""
    catalogue_bytes: int
    """Vectors of all items."""
    stage2_step_flops: float | None = None
    freeze_at_flops: float | None = None
    catalogue_flops: int = 0
    """Embedding the catalogue at the freeze."""

    def steps(self, rung_flops: float, cooldown_fraction: float) -> int:
        """Steps to a rung, fewer by the margin. Raises InfeasibleError (see `check_rung`)."""
        caution = 1.0 + STEP_MARGIN
        return check_rung(
            rung_flops,
            step_flops=self.step_flops * caution,
            cooldown_fraction=cooldown_fraction,
            freeze_at_flops=self.freeze_at_flops,
            catalogue_flops=self.catalogue_flops,
            stage2_step_flops=None if self.stage2_step_flops is None else self.stage2_step_flops * caution,
        )

    def events(self, flops: float) -> float:
        """D on a path of `flops`."""
        freeze_flops = self.freeze_at_flops
        if freeze_flops is None or flops <= freeze_flops:
            return flops / self.step_flops * self.step_events
        assert self.stage2_step_flops is not None, "stage 2 needs the cost of its steps"
        later_flops = max(0.0, flops - freeze_flops - self.catalogue_flops)
        return (freeze_flops / self.step_flops + later_flops / self.stage2_step_flops) * self.step_events

    def epochs(self, flops: float) -> float:
        """D over the targets of one epoch."""
        return self.events(flops) / self.epoch_events

    def memory_bytes(self, tier: Tier, micro_groups: int, averaging: bool) -> int:
        """Estimate for one worker: weights, gradients, AdamW's moments as ZeRO divides them, activations, catalogue.

        A catalogue that workers share in training is whole on each of them while it evaluates, without activations.
        """
        divided = {0: 0, 1: 2, 2: 3, 3: 4}[tier.zero_stage]
        copies = (STATE_COPIES - divided) + divided / tier.workers + (1 if averaging else 0)
        state = copies * FLOAT_BYTES * self.state_params
        scores_bytes = 3 * FLOAT_BYTES * _kept_scores(self.group_scores, tier.softmax)
        activations = micro_groups * (self.group_bytes + scores_bytes)
        if self.freeze_at_flops is not None and shares_catalogue(tier.softmax, tier.workers, self.catalogue_bytes):
            return math.ceil(state + max(activations + self.catalogue_bytes / tier.workers, self.catalogue_bytes))
        return math.ceil(state + activations + self.catalogue_bytes)


class CostModel(Protocol):
    """From a configuration to its nominal cost."""

    @property
    def num_catalogue(self) -> int:
        """V, the bound of `negatives`."""
        ...

    def of(self, config: TrainConfig) -> ConfigCost:
        """Raises InfeasibleError where (N, s) cannot be built."""
        ...


@dataclass(frozen=True, eq=False)
class Costs:
    """Costs on one log, and what they depend on of it."""

    fields: tuple[FittedField, ...]
    has_clock: bool
    num_items: int
    """All items (I)."""
    num_catalogue: int
    """Candidates (V)."""
    train_targets: int
    """Targets per epoch."""
    train_counts: np.ndarray
    """Training events of each catalogue item."""
    context_lengths: np.ndarray
    """Events known to each query of the validation part."""
    evaluation_queries: int | None
    """The first so many are evaluated; None: all."""
    groups: Callable[[int, int, Targets], GroupMeans]
    """(window, group_windows, targets) -> means per negative group."""

    @classmethod
    def on(cls, shards: Shards, protocol: EvaluationProtocol, evaluation_queries: int | None) -> Costs:
        """On a shard set; distinct items as its windows hold them."""
        manifest = shards.manifest
        return cls(
            fields=manifest.fields,
            has_clock=manifest.has_clock,
            num_items=manifest.items,
            num_catalogue=manifest.catalogue,
            train_targets=manifest.train_targets,
            train_counts=shards.train_counts,
            context_lengths=protocol.queries("validation").position + 1,
            evaluation_queries=evaluation_queries,
            groups=functools.partial(group_means, shards),
        )

    def of(self, config: TrainConfig) -> ConfigCost:
        """Nominal cost of a configuration; raises InfeasibleError where (N, s) cannot be built."""
        shape = config.shape()
        alone = self._means(config.window, config.group_windows, config.targets)
        groups = self._joined(alone, config.live_negatives, config.live_exponent)
        cost = ModelCost(shape, self.fields, config.table_width, config.window, self.has_clock)
        first_flops = self._group_flops(cost, config, groups, 1, groups.distinct_targets_mean)
        freezes = config.freeze_at_flops is not None
        candidates = config.negatives + alone.distinct_targets_mean
        second_flops = self._group_flops(cost, config, groups, 2, candidates) if freezes else None
        return ConfigCost(
            params=shape.params,
            embedder_share=shape.embedder_share,
            state_params=shape.params + cost.stem_params + cost.table_params,
            table_params=cost.table_params,
            step_flops=first_flops * config.groups_per_step,
            step_events=groups.targets_mean * config.groups_per_step,
            epoch_events=self.train_targets,
            evaluation_flops=self._evaluation_flops(cost, config.window, self.evaluation_queries),
            probe_flops=self._evaluation_flops(cost, config.window, PROBE_QUERIES),
            group_bytes=group_bytes(shape, config, self.fields, groups),
            group_scores=groups.queries_mean * max(groups.distinct_targets_mean, candidates),
            catalogue_bytes=FLOAT_BYTES * self.num_items * config.d_item,
            stage2_step_flops=None if second_flops is None else second_flops * config.groups_per_step,
            freeze_at_flops=config.freeze_at_flops,
            catalogue_flops=cost.catalogue_flops(self.num_items) if freezes else 0,
        )

    @functools.cached_property
    def _means(self) -> Callable[..., GroupMeans]:
        return functools.cache(self.groups)

    @functools.cached_property
    def _joined(self) -> Callable[..., GroupMeans]:
        return functools.cache(self._join)

    def _join(self, groups: GroupMeans, negatives: int, exponent: float) -> GroupMeans:
        """Means per group, the drawn candidates of stage 1 among its items and targets."""
        if not negatives:
            return groups
        counts_V = self.train_counts
        pi_V = drawn_inclusion(counts_V, negatives, exponent)
        return dataclasses.replace(
            groups,
            distinct_items_mean=union_mean(groups.distinct_items_mean, counts_V, pi_V),
            distinct_targets_mean=union_mean(groups.distinct_targets_mean, counts_V, pi_V),
        )

    def _group_flops(
        self, cost: ModelCost, config: TrainConfig, groups: GroupMeans, stage: int, candidates: float
    ) -> int:
        return cost.group_flops(
            stage,
            distinct_items=round(groups.distinct_items_mean),
            queries=round(groups.queries_mean),
            candidates=round(candidates),
            windows=config.group_windows,
        )

    def _evaluation_flops(self, cost: ModelCost, window: int, queries: int | None) -> int:
        lengths = np.minimum(self.context_lengths[:queries], window)
        # Short contexts are packed into common rows.
        rows = math.ceil(int(lengths.sum()) / window)
        scoring = cost.eval_flops(rows, len(lengths), self.num_catalogue)
        return scoring + cost.catalogue_flops(self.num_items)


def union_mean(distinct_mean: float, counts_V: np.ndarray, pi_V: np.ndarray) -> float:
    """Mean size of a group's distinct items together with items drawn with probabilities pi.

    An item of popularity q is taken to be in a group with probability 1 - exp(-n q), n such that these sum to the mean.
    Items of one popularity have one pi, so a huge catalogue is a few thousand of them.
    """
    count_P, first_P, items_P = np.unique(counts_V, return_index=True, return_counts=True)
    share_P = count_P / counts_V.sum()
    low, high = 0.0, 64.0
    for _ in range(48):
        middle = (low + high) / 2
        too_few = -(items_P * np.expm1(-math.expm1(middle) * share_P)).sum() < distinct_mean
        low, high = (middle, high) if too_few else (low, middle)
    absent_P = np.exp(-math.expm1(high) * share_P)
    return float(distinct_mean + (items_P * absent_P * pi_V[first_P]).sum())


def _kept_scores(scores: float, method: str) -> float:
    """Scores of a group's loss that are held at once: all of them, or one tile of a large problem."""
    if method == "reference":
        return scores
    return _TILE_SCORES if computes_scores_twice(round(scores), 1) else scores


def group_bytes(shape: Shape, config: TrainConfig, fields: Sequence[FittedField], groups: GroupMeans) -> int:
    """Activations kept for the backward of one group, fp32: blocks, attention scores, looked-up rows, field tokens.

    Per position of a block about 10 vectors of the width, 3 of the hidden width, and 2 rows of scores per head; per
    query 4 rows of the pointer (long windows are packed and have neither); per id of a table field its row of the table
    and that row's gradient.
    """

    def block(width: int, hidden: int, heads: int, length: int) -> int:
        return 10 * width + 3 * hidden + 2 * heads * length

    positions = config.group_windows * config.window
    scored = config.window if config.window < PACKED_LENGTH else 0
    tokens = sum(1 for field in fields if field.side == "item")
    item_ids, context_ids = (
        sum(field.columns for field in fields if field.side == side and field.kind in TABLE_KINDS)
        for side in ("item", "context")
    )
    embedder_positions = groups.distinct_items_mean * (tokens if shape.embedder_kind == "transformer" else 1)
    embedder_block = block(shape.embedder_width, shape.embedder_hidden, shape.embedder_heads, tokens)
    numbers = (
        positions * shape.depth * block(shape.width, shape.hidden, shape.heads, scored)
        + (4 * groups.queries_mean * scored if shape.pointer_width else 0)
        + embedder_positions * max(shape.embedder_depth, 1) * embedder_block
        + 2 * (groups.distinct_items_mean * item_ids + positions * context_ids) * config.table_width
        + (groups.distinct_items_mean * tokens + 2 * positions) * shape.d_item
    )
    return math.ceil(FLOAT_BYTES * numbers)
