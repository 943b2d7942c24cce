"""The plain engine: one process, PyTorch's own AdamW. fp32 on CPU, bf16 autocast over fp32 weights on CUDA.

In: a model with loaded weights and the engine-neutral state. Out: optimizer steps and the state again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bfm.model.batch import ModelBatch
from bfm.model.two_part import TwoPartModel
from bfm.training.config import TrainConfig
from bfm.training.engine import EngineState, Objective, compute_precision
from bfm.training.optimizer import AVERAGE, MOMENTS, build_optimizer, set_rates


class PlainEngine:
    """Engine over one process; `PlainFactory` builds it."""

    rank = 0
    world_size = 1

    def __init__(self, model: TwoPartModel, config: TrainConfig, state: EngineState, device: torch.device) -> None:
        self.device = device
        self.model = model.to(device)
        self.clip_norm = config.clip_norm
        self.named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = build_optimizer(self.model, config)
        self.optimizer.start_state(self.named.values(), config.averaging)
        for name, parameter in self.named.items():
            for key, tensors in zip((*MOMENTS, AVERAGE), (state.moment1, state.moment2, state.average), strict=True):
                if name in tensors and key in self.optimizer.state[parameter]:
                    self.optimizer.state[parameter][key].copy_(tensors[name])
        self.optimizer.set_steps(state.steps)
        self.steps = state.steps

    def forward(self, batch: ModelBatch, objective: Objective) -> Tensor:
        """Loss of one micro-batch (scalar)."""
        with compute_precision(self.device):
            return self.model(batch, objective)

    def backward(self, loss: Tensor, micro_batches: int) -> None:
        """Adds the gradient of loss / micro_batches."""
        (loss if micro_batches == 1 else loss / micro_batches).backward()

    def step(self, learning_rate: float, average_weight: float, repeats: float) -> float:
        """Clips and updates; returns the gradient's norm before clipping."""
        parameters = list(self.named.values())
        for parameter in parameters:
            if parameter.grad is None:
                # AdamW would skip it, where ZeRO's flat partitions decay it and move its moments.
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        set_rates(self.optimizer, learning_rate, repeats)
        self.optimizer.average_weight = average_weight
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return float(norm)

    def all_reduce_sum(self, values: list[int]) -> list[int]:
        """One worker: the values."""
        return values

    def all_reduce_mean(self, values: list[float]) -> list[float]:
        """One worker: the values."""
        return values

    def gather(self, value: Any) -> list[Any]:
        """One worker: the value."""
        return [value]

    def export_state(self) -> EngineState:
        """Copies of weights, moments and average."""

        def copy(key: str) -> dict[str, Tensor]:
            states = {name: self.optimizer.state[p] for name, p in self.named.items()}
            return {name: s[key].detach().cpu().clone() for name, s in states.items() if key in s}

        weight = {name: p.detach().cpu().clone() for name, p in self.model.named_parameters()}
        moment1, moment2 = (copy(key) for key in MOMENTS)
        return EngineState(weight, moment1, moment2, copy(AVERAGE), self.steps)

    def close(self) -> None:
        """Drops gradients and optimizer state."""
        self.optimizer.state.clear()
        self.model.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class PlainFactory:
    """Builds plain engines on one device."""

    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    name = "plain"
    zero_stage = 0
    rank = 0
    world_size = 1

    def build(self, model: TwoPartModel, config: TrainConfig, state: EngineState, micro_batches: int) -> PlainEngine:
        """An engine that goes on from `state`."""
        del micro_batches  # accumulation needs no plan here
        return PlainEngine(model, config, state, self.device)
