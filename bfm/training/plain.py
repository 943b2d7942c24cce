"""The plain engine: one process, PyTorch's own AdamW. fp32 on CPU, bf16 autocast over fp32 weights on CUDA.

In: a model with loaded weights and the engine-neutral state. Out: optimizer steps and the state again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bfm.model.two_part import TwoPartModel
from bfm.training.config import TrainConfig
from bfm.training.engine import Engine, EngineFactory, EngineState
from bfm.training.optimizer import build_optimizer


class PlainEngine(Engine):
    """Engine over one process; `PlainFactory` builds it."""

    def __init__(self, model: TwoPartModel, config: TrainConfig, state: EngineState, micro_batches: int) -> None:
        self.micro_batches, self.clip_norm = micro_batches, config.clip_norm
        self.model = self.called = model
        self.optimizer = build_optimizer(self.model, config)
        self.parameters = list(self.trainable.values())
        self.optimizer.start_state(self.parameters, config.averaging)
        self.load_state(state)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of loss / micro_batches."""
        (loss / self.micro_batches).backward()

    def update(self) -> float:
        """Clips and updates; returns the gradient's norm before clipping."""
        for parameter in self.parameters:
            if parameter.grad is None:
                # AdamW would skip it, where ZeRO's flat partitions decay it and move its moments.
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def close(self) -> None:
        """Drops gradients and optimizer state."""
        super().close()
        self.model.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class PlainFactory(EngineFactory):
    """Builds plain engines on one device."""

    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    name = "plain"
    zero_stage = 0

    def build(self, model: TwoPartModel, config: TrainConfig, state: EngineState, micro_batches: int) -> PlainEngine:
        """An engine that goes on from `state`."""
        return PlainEngine(model, config, state, micro_batches)
