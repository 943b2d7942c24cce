"""What all runs over one shard set share: encoded items, inclusion probabilities, the protocol. Kept by warm workers.

In: an opened shard set. Out: models, cost formulas and window orders of any configuration over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import cast

import numpy as np
import torch
from torch import Tensor

from bfm.events.neighbours import Neighbours
from bfm.events.protocol import Protocol
from bfm.events.shards import Shards
from bfm.events.statistics import inclusion_elsewhere
from bfm.events.windows import Targets, WindowOrder
from bfm.files import canonical_json, sha256_bytes
from bfm.model.flops import ModelCost
from bfm.model.two_part import ItemStore, TwoPartModel
from bfm.ranking.baselines import best_neighbours
from bfm.training.config import TrainConfig

_KEPT = "_training_data"
"""Of a shard set, so that it goes with it: a dictionary here would hold both for ever."""


class TrainingData:
    """Everything of a shard set that does not depend on a run."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self._log_pi: dict[tuple[int, int], Tensor] = {}

    @classmethod
    def of(cls, shards: Shards) -> TrainingData:
        """The one instance of an opened shard set: a warm worker pays for it once."""
        kept = vars(shards)
        if _KEPT not in kept:
            kept[_KEPT] = cls(shards)
        return cast(TrainingData, kept[_KEPT])

    @cached_property
    def item_store(self) -> ItemStore:
        """Encoded fields of all items."""
        return ItemStore(self.shards.item_fields, self.shards.item_arrays)

    @cached_property
    def protocol(self) -> Protocol:
        """The shard set's evaluation protocol."""
        return Protocol.load(self.shards)

    def neighbours(self, config: TrainConfig) -> Neighbours | None:
        """The table of counted neighbours, where the configuration's model mixes one in."""
        return self._counted if config.counts == "neighbours" else None

    @cached_property
    def _counted(self) -> Neighbours:
        return best_neighbours(self.shards, self.protocol)

    def embedder_hash(self, model: TwoPartModel) -> str:
        """Identity of a frozen catalogue: the embedder's weights, fitted item fields and their encoded values."""
        files = {name: seal for name, seal in self.shards.manifest.files.items() if name.startswith("items/")}
        fields = [field.as_dict() for field in self.shards.item_fields]
        parameters = dict(model.named_parameters())
        digests = [sha256_bytes(canonical_json({"fields": fields, "files": files}))]
        for name in sorted(model.embedder_parameter_names()):
            digests += [name, sha256_bytes(parameters[name].detach().cpu().contiguous().numpy().tobytes())]
        return sha256_bytes("\n".join(digests).encode())

    def log_pi(self, config: TrainConfig) -> Tensor:
        """Log chance that the other windows of a group bring a catalogue item, float32 [V], on the CPU."""
        key = config.window, config.group_windows
        if key not in self._log_pi:
            with np.errstate(divide="ignore"):
                self._log_pi[key] = torch.from_numpy(np.log(inclusion_elsewhere(self.shards, *key))).float()
        return self._log_pi[key]

    def order(self, config: TrainConfig, seed: int) -> WindowOrder:
        """The endless order of groups of a run."""
        # A network whose counts have a given share is trained without them.
        neighbours = None if config.counts_share else self.neighbours(config)
        targets = cast(Targets, config.targets)
        return WindowOrder(
            self.shards, config.window, config.group_windows, seed, neighbours, targets, config.basket_power
        )

    def cost(self, config: TrainConfig) -> ModelCost:
        """FLOPs of the configuration's model."""
        manifest = self.shards.manifest
        return ModelCost(config.shape(), manifest.fields, config.table_width, config.window, manifest.has_clock)

    def build_model(self, config: TrainConfig, seed: int, weight: Mapping[str, Tensor] | None = None) -> TwoPartModel:
        """A model on the CPU with these weights, or with initial ones: a function of (configuration, seed, fields)."""
        model = TwoPartModel(
            config.shape(),
            self.shards.manifest.fields,
            self.item_store,
            self.shards.manifest.has_clock,
            config.table_width,
            seed,
            config.dropout,
            config.initial_scale,
            self.neighbours(config),
        )
        if weight:
            model.load_state_dict(weight)
        return model
