"""The engine of one process, PyTorch's own AdamW, and the engine-neutral state that moves between engines.

An engine owns a model whose weights are loaded and whose frozen part is marked, and makes optimizer steps on it: fp32
on CPU, bf16 autocast over fp32 weights on CUDA. It is never re-pointed at other weights: to restore or to freeze, the
loop exports, builds a new model and a new engine. What several processes do otherwise stands in zero.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from bfm.model.batch import ModelBatch
from bfm.model.two_part import TwoPartModel
from bfm.training.config import TrainConfig
from bfm.training.optimizer import STATE_KEYS, TIDY_EVERY_STEPS, build_optimizer, parameter_groups, set_rates

Losses = tuple[Tensor, Tensor]
"""The mean over a batch's groups (scalar), and what is told of its targets, without a gradient."""
Objective = Callable[[Any, ModelBatch], Losses]
"""(model, batch) -> losses."""


@dataclass
class EngineState:
    """Full fp32 CPU tensors by parameter name, the same whatever engine and however many workers wrote them."""

    weight: dict[str, Tensor]
    """Every parameter of the model."""
    moment1: dict[str, Tensor] = field(default_factory=dict)
    """AdamW's mean of gradients; trainable parameters only, empty before the first step."""
    moment2: dict[str, Tensor] = field(default_factory=dict)
    """AdamW's mean of squared gradients."""
    average: dict[str, Tensor] = field(default_factory=dict)
    """Running average of the trunk's weights, where the configuration keeps one."""
    steps: int = 0
    """AdamW's step counter."""

    @property
    def averaged_weight(self) -> dict[str, Tensor]:
        """The trunk's average of the weights, where one is kept, else the weights."""
        return {**self.weight, **self.average}

    def without(self, names: set[str]) -> EngineState:
        """The state with the optimizer's part of some parameters dropped (the freeze); their weights stay."""

        def keep(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor for name, tensor in tensors.items() if name not in names}

        return EngineState(self.weight, keep(self.moment1), keep(self.moment2), keep(self.average), self.steps)


class Engine:
    """Makes optimizer steps with averaged gradients over all workers; `EngineFactory` builds it."""

    def __init__(self, model: TwoPartModel, config: TrainConfig, state: EngineState, micro_batches: int) -> None:
        self.micro_batches, self.clip_norm, self.model = micro_batches, config.clip_norm, model
        self.called: Callable[[ModelBatch, Objective], Losses] = model
        """The model, or what is wrapped around it."""
        groups = parameter_groups(model, config)
        self._places: dict[nn.Parameter, tuple[nn.Parameter, slice]] = {}
        """The vector that each trained parameter is a part of, and where."""
        for group in groups:
            group["params"] = [self._lay_out(group["params"])]
        self.optimizer = build_optimizer(groups, config)
        self._vectors = [group["params"][0] for group in groups]
        self.optimizer.start_state(self._vectors, config.averaging)
        model.add_to_table_gradients()
        self.load_state(state)

    def _lay_out(self, parameters: list[nn.Parameter]) -> nn.Parameter:
        """One vector of parameters, which become views of it, as their gradients do of its own: a step of a small model
        would else spend as long on calls as on numbers."""
        vector = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
        vector.grad, begin = torch.zeros_like(vector), 0
        for parameter in parameters:
            place = slice(begin, begin + parameter.numel())
            parameter.data, parameter.grad = (of[place].view_as(parameter) for of in (vector.detach(), vector.grad))
            self._places[parameter], begin = (vector, place), place.stop
        return vector

    def forward(self, batch: ModelBatch, objective: Objective) -> Losses:
        """Losses of one micro-batch, under the engine's precision."""

        def precise(model: TwoPartModel, inner_batch: ModelBatch) -> Losses:
            with _precision(self.model.device):
                return objective(model, inner_batch)

        return self.called(batch, precise)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of loss / micro_batches; the last micro-batch reduces over workers."""
        (loss / self.micro_batches).backward()

    def step(self, learning_rate: float, average_weight: float, repeats: float) -> Tensor:
        """Averages gradients over workers, clips, applies AdamW; the gradient's norm before clipping, on the device.

        `average_weight` is the new weights' share in the running average (0 leaves it alone), `repeats` the epochs
        beyond the first, by which the tables decay.
        Where the norm is not finite, the weights are worthless.
        """
        set_rates(self.optimizer, learning_rate, repeats)
        self.optimizer.average_weight = average_weight
        self.steps += 1
        self.optimizer.tidies = self.steps % TIDY_EVERY_STEPS == 0
        return self.update()

    def update(self) -> Tensor:
        """Clips and updates by the rates that are set; returns the norm of the averaged gradient before clipping."""
        gradients = [cast(Tensor, vector.grad) for vector in self._vectors]
        norm = nn.utils.get_total_norm(gradients)
        # What the kernel divides by in the pass that it makes anyway.
        self.optimizer.grad_scale = ((norm + 1e-6) / self.clip_norm).clamp_(min=1.0)
        self.optimizer.step()
        for gradient in gradients:
            gradient.zero_()
        return norm

    def load_state(self, state: EngineState) -> None:
        """Take up the optimizer's part of a state, once its own is laid out; before the first step."""
        self.steps = state.steps
        """Made so far, those of the state included."""
        self.optimizer.set_steps(state.steps)
        parts = dict(zip(STATE_KEYS, (state.moment1, state.moment2, state.average), strict=True))
        for key in self._kept_keys:
            for name, parameter in self.trainable.items():
                if name in parts[key]:
                    self.set_state(parameter, key, parts[key][name].to(self.model.device))

    def export_state(self) -> EngineState:
        """Collective; the same on every rank."""
        weight = {name: self.get_weight(p) for name, p in self.model.named_parameters()}
        trainable = self.trainable  # the same names for all: a checkpoint spells each once
        states = {key: {name: self.get_state(p, key) for name, p in trainable.items()} for key in self._kept_keys}
        moment1, moment2, average = (states.get(key, {}) for key in STATE_KEYS)
        return EngineState(weight, moment1, moment2, average, self.steps)

    @property
    def _kept_keys(self) -> list[str]:
        return [key for key in STATE_KEYS if all(key in kept for kept in self.optimizer.state.values())]

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are not frozen."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def get_weight(self, parameter: nn.Parameter) -> Tensor:
        """A full fp32 copy on the CPU."""
        return cpu_copy(parameter)

    def get_state(self, parameter: nn.Parameter, key: str) -> Tensor:
        """A full fp32 copy, on the CPU, of what the optimizer keeps of a parameter."""
        return cpu_copy(self._kept(parameter, key))

    def set_state(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """The inverse of `get_state`."""
        self._kept(parameter, key).copy_(value)

    def _kept(self, parameter: nn.Parameter, key: str) -> Tensor:
        vector, place = self._places[parameter]
        return self.optimizer.state[vector][key][place].view_as(parameter)

    def close(self) -> None:
        """Frees what the engine holds; the model is not usable afterwards."""
        self.optimizer.state.clear()
        self.model.zero_grad(set_to_none=True)


class EngineFactory:
    """Knows the workers and the device before any model exists, and builds engines: here one worker's."""

    name, zero_stage = "plain", 0

    def __init__(self, device: torch.device | None = None) -> None:
        """`device` is where this worker's model lives; None: on a GPU where there is one."""
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def rank(self) -> int:
        """This process among the workers."""
        return 0

    @property
    def world_size(self) -> int:
        """How many workers step together."""
        return 1

    def all_reduce_sum(self, values: list[int]) -> list[int]:
        """Exact sums over workers (each below 2**63)."""
        return values

    def all_reduce_mean(self, values: list[float]) -> list[float]:
        """Means over workers, equal on all of them."""
        return values

    def gather(self, value: Any) -> list[Any]:
        """The picklable values of all workers, by rank, on all workers."""
        return [value]

    def build(self, model: TwoPartModel, config: TrainConfig, state: EngineState, micro_batches: int) -> Engine:
        """An engine that goes on from `state`; collective.

        `model` is on the device with its weights, its frozen part marked; `micro_batches` are of every step.
        """
        return Engine(model, config, state, micro_batches)


def compute_dtype(device: torch.device) -> torch.dtype:
    """What matmuls run in: bf16 on CUDA, fp32 on CPU. Weights and optimizer state are fp32 on both."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast where matmuls run in bf16."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=compute_dtype(device))
    return nullcontext()


def cpu_copy(tensor: Tensor) -> Tensor:
    """A copy without gradient."""
    return tensor.detach().to("cpu", copy=True)
