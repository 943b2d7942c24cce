"""The DeepSpeed engine: ZeRO stages 0 to 3 over torch.distributed, gloo on CPU and NCCL on CUDA.

In: a model with loaded weights and the engine-neutral state. Out: optimizer steps and the state again, gathered by
parameter name, so that another stage, another number of workers or the plain engine can go on from it.
Weights and optimizer state are fp32 on every device; matmuls run in bf16 on CUDA by autocast inside the forward.
This is the one module that knows DeepSpeed, and it is imported inside functions: the import takes seconds.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import warnings
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bfm.errors import UserError
from bfm.model.two_part import TwoPartModel
from bfm.training.config import TrainConfig
from bfm.training.engine import Engine, EngineFactory, EngineState, cpu_copy
from bfm.training.optimizer import build_optimizer, parameter_groups

# DeepSpeed allocates whole buckets whatever the model's size; its default of 5e8 numbers is 2 GB.
_LARGEST_BUCKET = 12_288 * 4096


class ZeroEngine(Engine):
    """Engine over all processes of the default group; `ZeroFactory` builds it. DeepSpeed owns the model's weights."""

    def __init__(
        self, model: TwoPartModel, config: TrainConfig, state: EngineState, micro_batches: int, stage: int
    ) -> None:
        import deepspeed

        self.stage, self.micro_batches, self.clip_norm = stage, micro_batches, config.clip_norm
        num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(parameter_groups(model, config), config),
            config=_deepspeed_config(stage, micro_batches, config.clip_norm, num_trainable),
            dist_init_required=False,
        )
        self.model, self.called = self.engine.module, self.engine
        self.optimizer = self.engine.optimizer.optimizer if stage else self.engine.optimizer
        self.optimizer.start_state(self._stepped_tensors(), config.averaging)
        if stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        self.load_state(state)

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed divides by micro_batches."""
        self.engine.backward(loss)
        # Before the boundary this only counts micro-batches; at the boundary `step` below updates.
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def update(self) -> Tensor:
        """DeepSpeed clips and updates."""
        if self.stage == 0:
            # DeepSpeed clips here without telling the norm.
            norm: Any = nn.utils.clip_grad_norm_(list(self.trainable.values()), self.clip_norm)
            self.engine.step()
        else:
            self.engine.step()
            norm = math.nan if self.engine.optimizer.overflow else self.engine.get_global_grad_norm()
        # Readings go to the host as one message, so all of them are on the device, NaN too.
        return torch.as_tensor(norm, device=self.model.device)

    def close(self) -> None:
        """Frees hooks, partitions and buffers (an engine left alone leaks them all)."""
        self.engine.destroy()
        super().close()

    def _stepped_tensors(self) -> list[Tensor]:
        """What the optimizer really updates: parameters, or flat fp32 partitions of them."""
        if self.stage == 0:
            return list(self.trainable.values())
        if self.stage == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return list(self.engine.optimizer.single_partition_of_fp32_groups)

    def get_weight(self, parameter: nn.Parameter) -> Tensor:
        """Gathered from all partitions."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        if self.stage and parameter.requires_grad:
            return cpu_copy(safe_get_full_fp32_param(parameter))
        with GatheredParameters([parameter], enabled=self.stage == 3):
            return cpu_copy(parameter)

    def get_state(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Gathered from all partitions."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.stage == 0:
            return cpu_copy(self.optimizer.state[parameter][key])
        return cpu_copy(safe_get_full_optimizer_state(parameter, key))

    def set_state(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Dealt out to all partitions."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage == 0:
            self.optimizer.state[parameter][key].copy_(value)
        elif self.stage == 3:
            # The whole-tensor setter fails where the size does not divide by the workers; ranks own padded slices.
            own, rank, world_size = cast(Any, parameter).partition_numel(), dist.get_rank(), dist.get_world_size()
            flat = nn.functional.pad(value.flatten(), (0, own * world_size - value.numel()))
            safe_set_local_optimizer_state(parameter, flat[own * rank : own * (rank + 1)], key)
        else:
            safe_set_full_optimizer_state(parameter, value, key)


@functools.cache
def _hosts_of(world: Any) -> Any:
    """A group of the same processes, one for all tasks of a standing group.

    What hosts tell each other must not wait for what their devices still have to do.
    """
    return dist.new_group(backend="gloo")


class ZeroFactory(EngineFactory):
    """Builds ZeRO engines; joins the default process group, or makes one of a single process."""

    name = "zero"

    def __init__(self, zero_stage: int = 1, device: torch.device | None = None) -> None:
        super().__init__(device)
        if zero_stage not in (0, 1, 2, 3):
            raise UserError(f"there is no ZeRO stage {zero_stage}", key="zero_stage", fix="use 0, 1, 2 or 3")
        self.zero_stage = zero_stage
        _prepare_deepspeed(self.device)
        if not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self._hosts = _hosts_of(dist.group.WORLD) if self.device.type == "cuda" else dist.group.WORLD

    @property
    def rank(self) -> int:
        """This process in the default group."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """Processes of the default group."""
        return dist.get_world_size()

    def all_reduce_sum(self, values: list[int]) -> list[int]:
        """Exact sums over workers."""
        total = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(total, group=self._hosts)
        return total.tolist()

    def all_reduce_mean(self, values: list[float]) -> list[float]:
        """Means over workers."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._hosts)
        return (total / self.world_size).tolist()

    def gather(self, value: Any) -> list[Any]:
        """The picklable values of all workers, by rank, on all workers."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._hosts)
        return values

    def build(self, model: TwoPartModel, config: TrainConfig, state: EngineState, micro_batches: int) -> ZeroEngine:
        """A ZeRO engine that goes on from `state`."""
        return ZeroEngine(model, config, state, micro_batches, self.zero_stage)


def _prepare_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed for this device, quietly."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # Nothing here is compiled, but DeepSpeed prepares to: seconds of imports in every worker.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # DeepSpeed demands it even where the process group stands already.
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        # On CPU it would compile a shared-memory reduction for inference at first use: 40 s that training never needs.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch is renaming: one warning per step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def _deepspeed_config(stage: int, micro_batches: int, clip_norm: float, num_trainable: int) -> dict[str, Any]:
    # Whole multiples of 4,096 numbers: the alignment that ZeRO asks for divides it.
    bucket = min((num_trainable // 4096 + 2) * 4096, _LARGEST_BUCKET)
    return {
        # A "sample" is a micro-batch here: DeepSpeed only needs the ratio of the three.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "train_batch_size": micro_batches * dist.get_world_size(),
        "gradient_clipping": clip_norm if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            "overlap_comm": False,
        },
        "steps_per_print": 1 << 62,
        "wall_clock_breakdown": False,
    }
