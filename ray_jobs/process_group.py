"""The torch process group of a Ray Train worker group, set up by its workers alone.

Ray's own TorchConfig does the same, but whoever unpickles it imports torch: seconds in a controller that every worker
waits for.
"""

from __future__ import annotations

import os
from datetime import timedelta

import ray
from ray._common.network_utils import build_address
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig

_COLLECTIVE_TIMEOUT_S = 600
"""A rank that hangs this long in a collective fails its group."""


class ProcessGroup(BackendConfig):
    """NCCL where workers hold GPUs, else gloo."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What sets it up."""
        return _SetUp


class _SetUp(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        """In the controller, once the workers are up."""
        address, port = worker_group.execute_single(0, get_address_and_port)
        ray.get(worker_group.execute_async(_join, f"tcp://{build_address(address, port)}"))


def _join(meeting_point: str) -> None:
    """On every worker."""
    import ray.train
    import torch
    import torch.distributed as dist

    context = ray.train.get_context()
    # DeepSpeed reads it.
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() and ray.get_gpu_ids() else "gloo",
        init_method=meeting_point,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        timeout=timedelta(seconds=_COLLECTIVE_TIMEOUT_S),
    )
