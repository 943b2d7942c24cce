"""The next steps before they run: the micro-batches of a worker, and what a step costs over all workers.

Enters: stage and cursor of a run. Leaves: batches and exact whole numbers, so that a limit is never passed. While a
step is trained, threads read and index the events of those after it.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from bfm.events.windows import WindowOrder
from bfm.model.attention import packs
from bfm.model.batch import Group, ModelBatch
from bfm.model.flops import ModelCost
from bfm.model.two_part import embeds_twice
from bfm.objective.objective import Objective
from bfm.objective.softmax import computes_scores_twice
from bfm.training.config import TrainConfig
from bfm.training.engine import EngineFactory


@dataclass
class Work:
    """What has been done, by all workers together: exact whole numbers."""

    path_flops: int = 0
    hardware_flops: int = 0
    useful_attention_flops: int = 0
    undeduplicated_flops: int = 0
    """path_flops as they would be if the item of every event were embedded anew, as the source paper does."""
    events: int = 0

    def add(self, work: Work) -> None:
        """Count further work."""
        for name, value in vars(work).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class StepPlan:
    """This worker's micro-batches, and the work of the step: its own or over all workers."""

    batches: list[ModelBatch]
    work: Work


@dataclass
class StepPlanner:
    """Plans the steps of one run; collective over the factory's workers."""

    config: TrainConfig
    order: WindowOrder
    cost: ModelCost
    micro_groups: int
    softmax: str
    factory: EngineFactory
    steps_ahead: int
    """That are begun with one that is asked for; a thread for each."""

    def __post_init__(self) -> None:
        self._threads = ThreadPoolExecutor(self.steps_ahead, thread_name_prefix="next-step")
        self._ahead: dict[tuple[int, int], Future[StepPlan]] = {}
        """By stage and cursor."""

    def plan(self, stage: int, cursor: int, objective: Objective) -> StepPlan:
        """The step that takes the groups from `cursor` on; those after it are begun."""
        # Forgotten before it is looked at: what it may raise is raised once.
        begun = self._ahead.pop((stage, cursor), None)
        following = [(stage, cursor + step * self.config.groups_per_step) for step in range(1, self.steps_ahead + 1)]
        for other in self._ahead.keys() - following:
            self._ahead.pop(other).cancel()
        own = self.own_plan(stage, cursor, objective) if begun is None else begun.result()
        for key in following:
            if key not in self._ahead:
                self._ahead[key] = self._threads.submit(self.own_plan, *key, objective)
        return StepPlan(own.batches, Work(*self.factory.all_reduce_sum(list(vars(own.work).values()))))

    def mean_flops(self, stage: int, cursor: int, objective: Objective, steps: int) -> tuple[float, float | None]:
        """Mean cost of so many steps from `cursor` on, and of stage 2 an estimate where there will be one."""
        freezes, flops, stage2_flops = self.config.freeze_at_flops is not None, 0, 0
        for step in range(steps):
            own = self.own_plan(stage, cursor + step * self.config.groups_per_step, objective)
            flops += own.work.path_flops
            stage2_flops += self._stage2_flops(own) if freezes else 0
        flops, stage2_flops = self.factory.all_reduce_sum([flops, stage2_flops])
        return flops / steps, stage2_flops / steps if freezes else None

    def close(self) -> None:
        """End the threads."""
        self._ahead.clear()
        self._threads.shutdown(cancel_futures=True)

    def own_plan(self, stage: int, cursor: int, objective: Objective) -> StepPlan:
        """This worker's part of a step."""
        factory, batches, work = self.factory, list[ModelBatch](), Work()
        packed = packs(factory.device, self.config.window)
        own = list(range(cursor + factory.rank, cursor + self.config.groups_per_step, factory.world_size))
        for begin in range(0, len(own), self.micro_groups):
            indices = own[begin : begin + self.micro_groups]
            batch = objective.batch(self.order.groups(indices), indices)
            batches.append(batch)
            work.add(Work(hardware_flops=self.cost.layout_flops(batch, packed)))
            embeds_again = stage == 1 and embeds_twice(len(batch.items_U))
            frozen = [len(ids_K) for ids_K in batch.frozen] or [0] * len(batch.groups)
            for group, constant in zip(batch.groups, frozen, strict=True):
                work.add(self._work(stage, group, constant, embeds_again))
        return StepPlan(batches, work)

    def _work(self, stage: int, group: Group, frozen: int, embeds_again: bool) -> Work:
        """Of a group with so many frozen candidates beside the live ones."""
        cost, pairs, candidates = self.cost, (group.attended_pairs, group.query_pairs), group.candidates + frozen
        path_flops = cost.group_flops(stage, group.items, group.queries, candidates, group.windows)
        again_flops = cost.recomputed_flops(group.items if embeds_again else 0, self._scores_again(group, frozen))
        embedded = group.windows * self.config.window + self.config.live_negatives
        return Work(
            path_flops,
            hardware_flops=path_flops + again_flops,
            useful_attention_flops=cost.useful_attention_flops(stage, group.items, *pairs),
            undeduplicated_flops=cost.group_flops(stage, embedded, group.queries, candidates, group.windows),
            events=group.targets,
        )

    def _stage2_flops(self, plan: StepPlan) -> int:
        """What this worker's groups of a step of stage 1 would cost in stage 2, estimated."""
        flops = 0
        for batch in plan.batches:
            for place, group in enumerate(batch.groups):
                # What stage 1 drew is no candidate of stage 2.
                targets = len(torch.unique(batch.target_index_T[batch.targets_of(place)]))
                candidates = targets + self.config.negatives
                flops += self.cost.group_flops(2, group.items, group.queries, candidates, group.windows)
        return flops

    def _scores_again(self, group: Group, frozen: int) -> int:
        """Scores that the backward pass computes again, since they were not kept."""
        return sum(
            group.queries * part
            for part, live in ((group.candidates, True), (frozen, False))
            if computes_scores_twice(group.queries, part, live=live, method=self.softmax)
        )
