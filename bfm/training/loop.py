"""The training loop: one optimizer step after the other along a trunk and, at a rung, along its cooldown branch.

In: a configuration, a seed, the data and an engine factory. Out: counters, engine-neutral state, step records.
The trunk is a pure function of (configuration, seed): group i of the global order belongs to step i // B, everything
random is seeded by (seed, group index), and no decision looks at how far the run is meant to go. The cost of a step is
known, as an exact integer summed over workers, before the step runs; so a limit is never passed. What a step tells is
read when the next one is under way, so that a device never waits for its host.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bfm.errors import CorruptError, DivergedError, UserError
from bfm.files import Store
from bfm.model.batch import ModelBatch
from bfm.model.two_part import TwoPartModel
from bfm.objective.frozen import freeze_items
from bfm.objective.fused import why_not_fused
from bfm.objective.methods import check_method
from bfm.objective.objective import Objective
from bfm.training.checkpoint import Checkpoint, run_identity, save_checkpoint
from bfm.training.config import TrainConfig
from bfm.training.data import TrainingData
from bfm.training.engine import Engine, EngineFactory, EngineState, compute_dtype
from bfm.training.optimizer import average_weight
from bfm.training.readings import Readings
from bfm.training.records import Phase, RecentSteps, StepLoss, StepRecord
from bfm.training.schedule import lr_factor_cooldown, lr_factor_trunk, repeats
from bfm.training.step_plan import StepPlan, StepPlanner, Work
from bfm.training.threads import training_threads, using_threads
from bfm.units import format_flops

COST_STEPS = 8
"""Steps whose mean cost stands for all: they differ by the queries of their windows."""

GPU_STEPS_AHEAD = 4
"""That threads prepare: one of them indexes 1 to 2 M positions a second, and a GPU trains small models on more."""


@dataclass
class Counters(Work):
    """Where a run is, and the work that has led there."""

    stage: int = 1
    phase: Phase = "trunk"
    step: int = 0
    cursor: int = 0
    """Next group of the global order."""
    branch_from_flops: int = 0
    """path_flops where the cooldown branch left the trunk."""


class Trainer:
    """Trains one (configuration, seed); every method is collective over the factory's workers."""

    def __init__(
        self,
        config: TrainConfig,
        seed: int,
        data: TrainingData,
        factory: EngineFactory,
        *,
        observer: Callable[[StepRecord], None] | None = None,
        after_step: Callable[[], None] = lambda: None,
        after_freeze: Callable[[], None] = lambda: None,
        micro_groups: int = 1,
        softmax: str = "auto",
        start: Checkpoint | None = None,
    ) -> None:
        """Begin at step 0, or where a loaded checkpoint stands.

        Both are called on every worker after every step: `observer` with the record of a step, when the next one is
        under way or a limit is reached; `after_step` at once, and may save. `after_freeze` comes before the first step
        of stage 2, whose cost can be told then.
        `softmax` is how the loss is computed (bfm.objective.methods); its value does not depend on it.
        Raises UserError where the workers do not divide the groups of a step, or `softmax` is impossible here.
        """
        _check_softmax(softmax, config, factory)
        self.softmax = softmax
        self.config, self.seed, self.data, self.factory = config, seed, data, factory
        self.observer, self.after_step, self.after_freeze = observer, after_step, after_freeze
        own_groups = groups_per_worker(config, factory.world_size)
        self.micro_groups = max(m for m in range(1, micro_groups + 1) if own_groups % m == 0)
        self.micro_batches = own_groups // self.micro_groups
        self.order = data.order(config, seed)
        self.cost = data.cost(config)
        self.catalogue_flops = self.cost.catalogue_flops(data.shards.num_items)
        steps_ahead = GPU_STEPS_AHEAD if factory.device.type == "cuda" else 1
        self.planner = StepPlanner(config, self.order, self.cost, self.micro_groups, softmax, factory, steps_ahead)
        positions = own_groups * config.group_windows * config.window
        self.threads = training_threads(6.0 * config.shape().params * positions, torch.get_num_threads())
        """That train; evaluation takes all of the process."""
        self.warmup_events = config.shape().params if config.warmup_events is None else config.warmup_events
        self.counters = Counters() if start is None else Counters(**start.meta["counters"])
        self.spent_flops = 0
        """FLOPs trained by this object, a diverged step included."""
        self._started_s = time.monotonic()
        self._plan: StepPlan | None = None
        self._untold: _Untold | None = None
        self._recent = RecentSteps()
        self._embedder_hash = None if start is None else start.meta["embedder_hash"]
        self._start = EngineState({}) if start is None else start.state

    @property
    def engine(self) -> Engine:
        """What steps; built when it is first needed, so that whoever asks may find that memory does not suffice."""
        return self._built[0]

    @property
    def objective(self) -> Objective:
        """What is minimised; built with the engine."""
        return self._built[1]

    @property
    def recent_loss(self) -> float | None:
        """Mean loss over the last RATE_STEPS steps; None before the first one of this object."""
        return self._recent.loss

    @property
    def flops_per_s(self) -> float:
        """Of late; 0 before the first step is told of."""
        return self._recent.rates()[1]

    def run_trunk(self, until_flops: float) -> None:
        """Train the trunk to the largest step whose path_flops is at most `until_flops`.

        Raises DivergedError (on all workers) at a non-finite loss or gradient, once the step after it has begun.
        """
        assert self.counters.phase == "trunk", "a cooled-down run has left its trunk"
        with using_threads(self.threads):
            self._run_trunk(until_flops)
        self._tell()

    def _run_trunk(self, until_flops: float) -> None:
        freeze_flops = math.inf if self.config.freeze_at_flops is None else self.config.freeze_at_flops
        while True:
            plan = self._next_plan()
            after_flops = self.counters.path_flops + plan.work.path_flops
            if self.counters.stage == 1 and after_flops > freeze_flops:
                # A trunk that is asked to stop at the freeze stays in stage 1: studies of stage 2 share it.
                if max(freeze_flops, self.counters.path_flops + self.catalogue_flops) >= until_flops:
                    return
                self._freeze()
                self.after_freeze()
            elif after_flops > until_flops:
                return
            else:
                factor = lr_factor_trunk(self.counters.events + plan.work.events, self.warmup_events)
                self._step(plan, factor, average_weight(self.counters.step + 1) if self.config.averaging else 0.0)

    def run_cooldown(self, until_flops: float) -> None:
        """Leave the trunk here and cool down to rate 0 at `until_flops`, never passing it. Raises DivergedError."""
        counters = self.counters
        if counters.phase == "trunk":
            counters.phase, counters.branch_from_flops = "cooldown", counters.path_flops
        with using_threads(self.threads):
            while counters.path_flops + (plan := self._next_plan()).work.path_flops <= until_flops:
                factor = lr_factor_cooldown(counters.path_flops, counters.branch_from_flops, until_flops)
                self._step(plan, factor * lr_factor_trunk(counters.events + plan.work.events, self.warmup_events), 0.0)
        self._tell()

    def next_step_flops(self) -> int:
        """Exact cost of the next step."""
        return self._next_plan().work.path_flops

    def mean_step_flops(self) -> tuple[float, float | None]:
        """Mean cost of the next COST_STEPS steps in stage 1, and an estimate of it in stage 2 where there is one."""
        assert self.counters.stage == 1, "asked before anything is frozen"
        return self.planner.mean_flops(1, self.counters.cursor, self.objective, COST_STEPS)

    def meta(self) -> dict[str, Any]:
        """JSON-able identity and counters of the present state."""
        return {
            **run_identity(self.config, self.seed, self.data),
            "counters": dataclasses.asdict(self.counters),
            "embedder_hash": self._embedder_hash,
        }

    def save(self, store: Store, name: str, extra: dict[str, Any] | None = None) -> None:
        """Collective; rank 0 writes the checkpoint. Raises DivergedError where the last step was not finite."""
        self._tell()
        state = self.engine.export_state()
        if self.factory.rank == 0:
            save_checkpoint(store, name, state, {**self.meta(), **(extra or {})})
        self.factory.all_reduce_sum([0])  # nobody goes on before the checkpoint stands

    def plain_model(self, weight: dict[str, Tensor]) -> TwoPartModel:
        """A model outside any engine with these weights."""
        return self.data.build_model(self.config, self.seed, weight).to(self.factory.device).eval()

    def close(self) -> None:
        """Free the engine, end the planner's threads."""
        self.planner.close()
        if "_built" in vars(self):
            self.engine.close()

    @functools.cached_property
    def _built(self) -> tuple[Engine, Objective]:
        """An engine around a model with the state's weights, and its objective."""
        state, items = self._start, None
        model = self.data.build_model(self.config, self.seed, state.weight).to(self.factory.device)
        negatives, exponent = self.config.live_negatives, self.config.live_exponent
        if self.counters.stage == 2:
            negatives, exponent = self.config.negatives, self.config.negatives_exponent
            model.freeze_embedder()
            key = self.data.embedder_hash(model)
            if self._embedder_hash not in (None, key):
                raise CorruptError("the frozen embedder or its fields are not those that stage 2 began with")
            self._embedder_hash = key
            factory, dtype = self.factory, compute_dtype(self.factory.device)
            items = freeze_items(model, dtype, self.softmax, factory.rank, factory.world_size)
        log_pi_V, counts_V = self.data.log_pi(self.config).to(self.factory.device), self.data.shards.train_counts
        objective = Objective(log_pi_V, counts_V, negatives, exponent, self.seed, items=items, method=self.softmax)
        engine = self.factory.build(model, self.config, state, self.micro_batches)
        self._start = EngineState({})
        return engine, objective

    def _freeze(self) -> None:
        """Begin stage 2: embedder frozen, its optimizer state dropped, the catalogue embedded once."""
        self._tell()
        names = set(self.engine.model.embedder_parameter_names())
        self._start = self.engine.export_state().without(names)
        self.engine.close()
        flops = self.catalogue_flops
        self.counters.stage = 2
        self.counters.add(Work(flops, hardware_flops=flops, undeduplicated_flops=flops))
        self.spent_flops += self.catalogue_flops
        self._plan = None
        del self._built

    def _next_plan(self) -> StepPlan:
        if self._plan is None:
            self._plan = self.planner.plan(self.counters.stage, self.counters.cursor, self.objective)
        return self._plan

    def _step(self, plan: StepPlan, lr_factor: float, weight_in_average: float) -> None:
        counters = self.counters
        self._recent.begin(time.monotonic(), counters.events, counters.path_flops)
        self.spent_flops += plan.work.path_flops
        loss, sums_2X2 = self._forward_backward(plan.batches)
        learning_rate = lr_factor * self.config.learning_rate
        norm = self.engine.step(
            learning_rate, weight_in_average, repeats(counters.events, self.order.targets_per_epoch)
        )
        counters.step += 1
        counters.cursor += self.config.groups_per_step
        counters.add(plan.work)
        self._plan = None
        self._tell()
        self._untold = _Untold(dataclasses.replace(counters), learning_rate, Readings(loss, norm, sums_2X2))
        self.after_step()

    def _forward_backward(self, batches: list[ModelBatch]) -> tuple[Tensor, Tensor]:
        """Accumulate the step's gradient; this worker's mean loss, and the sums of its batches."""
        parts = []
        for batch in batches:
            loss, sums_2X2 = self.engine.forward(batch, self.objective)
            self.engine.backward(loss)
            parts.append((loss.detach(), sums_2X2))
        losses, sums = zip(*parts, strict=True)
        return functools.reduce(torch.add, losses) / len(batches), functools.reduce(torch.add, sums)

    def _tell(self) -> None:
        """Read what the last step has left, and tell it. Raises DivergedError where it is not finite."""
        step, self._untold = self._untold, None
        if step is None:
            return
        (own_loss,), (grad_norm,), own_sums = step.readings.read()
        loss, *sums = self.factory.all_reduce_mean([own_loss, *own_sums])
        at = step.counters
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            # What the step after it has spent is spent; where the run ended does not depend on who asked when.
            self.counters = at
            what = f"gradient norm {grad_norm}" if math.isfinite(loss) else f"loss {loss}"
            raise DivergedError(f"{what} at step {at.step}, {format_flops(at.path_flops)} FLOPs")
        self._recent.end(at.events, at.path_flops, loss)
        if self.observer is not None:
            events_per_s, flops_per_s = self._recent.rates()
            self.observer(
                StepRecord(
                    step=at.step,
                    stage=at.stage,
                    phase=at.phase,
                    path_flops=at.path_flops,
                    events=at.events,
                    **vars(StepLoss.of(loss, sums, self.config.shape().components)),
                    learning_rate=step.learning_rate,
                    grad_norm=grad_norm,
                    events_per_s=events_per_s,
                    flops_per_s=flops_per_s,
                    elapsed_s=time.monotonic() - self._started_s,
                )
            )


@dataclass(frozen=True)
class _Untold:
    """A step whose figures are still on the device."""

    counters: Counters
    learning_rate: float
    readings: Readings


def _check_softmax(method: str, config: TrainConfig, factory: EngineFactory) -> None:
    check_method(method, freezes=config.freeze_at_flops is not None, workers=factory.world_size, cuda=True)
    if method == "triton":
        q_TD = torch.empty(0, config.d_item, device=factory.device)
        if reason := why_not_fused(q_TD, q_TD.to(compute_dtype(factory.device))):
            raise UserError(f"the Triton kernel cannot run: {reason}", key="softmax", fix="use auto")


def groups_per_worker(config: TrainConfig, workers: int) -> int:
    """Groups of a step that each worker takes. Raises UserError, with the allowed counts, where they do not divide."""
    if config.groups_per_step % workers:
        allowed = [w for w in range(1, config.groups_per_step + 1) if config.groups_per_step % w == 0]
        raise UserError(
            f"{workers} workers cannot share the {config.groups_per_step} groups of a step",
            key="workers",
            fix=f"use one of {', '.join(map(str, allowed[:24]))} workers",
        )
    return config.groups_per_step // workers
