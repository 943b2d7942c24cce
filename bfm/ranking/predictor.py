"""A model that predicts on its own: kept in a folder, opened again, asked for the first k items of users.

    export.json           shape, window, table width, schema, fitted fields, versions; sha256 of every other file
    weights.safetensors   all weights, float32
    catalogue.safetensors vectors of all items, float32 or bfloat16
    neighbours.npz        counted neighbours of the catalogue's items, where the model mixes them in
    items.parquet items/  row i = item i: its key, its encoded fields
    vocabulary/*.parquet  values behind the ids of fields

Enters: queries of a shard set, or of a log encoded like it (bfm/events/histories.py). Leaves: lists of item ids with
scores. The query is always "what comes at a later timestamp". Needs neither the training code nor the engines.

Q = queries, I = all items, V = catalogue items, R = compared rows, D = retrieval width, k = list length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from bfm.errors import CorruptError, UserError
from bfm.events.encoding import Encoding
from bfm.events.manifest import Manifest
from bfm.events.neighbours import Neighbours
from bfm.events.protocol import QueryTable, seen_items
from bfm.events.shards import Shards
from bfm.files import Store, write_atomic
from bfm.model.sizing import Shape
from bfm.model.two_part import ItemStore, TwoPartModel
from bfm.ragged import Ragged
from bfm.ranking.metrics import check_k
from bfm.ranking.queries import answer
from bfm.ranking.ranks import rank_targets
from bfm.sealed import Sealed, check_files, list_files
from bfm.version import __version__

EXPORT = Sealed("exported model", "export.json", version=5, fix="write one with `bfm export`")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_WEIGHTS, _CATALOGUE, _NEIGHBOURS = "weights.safetensors", "catalogue.safetensors", "neighbours.npz"
_VECTORS = "vectors"
_COMPARED_ROWS = 1000
# Largest difference of a component of a unit vector: rounding of the storage, and of matmuls on another device.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Top:
    """What the model answers to Q queries."""

    item_Qk: np.ndarray
    """Int64 ids by falling score; -1 where filtering leaves fewer than k items."""
    score_Qk: np.ndarray
    """Float32 log probabilities, of a softmax alone logits scale * <h, v>; -inf beside -1."""
    h_QD: np.ndarray
    """Float32 unit vectors of the users."""


class Predictor:
    """A model, the vectors of its items, and what encodes a log for it."""

    def __init__(
        self, model: TwoPartModel, vectors_ID: Tensor, encoding: Encoding, window: int, filter_seen: bool
    ) -> None:
        self.model, self.vectors_ID, self.encoding = model, vectors_ID, encoding
        self.window, self.filter_seen = window, filter_seen

    def save(self, folder: Path, origin: Mapping[str, Any]) -> None:
        """Write the files into a folder and seal it with whatever lies there; `origin` is kept in export.json."""
        facts = {
            **origin,
            "code_version": __version__,
            "shape": dataclasses.asdict(self.model.shape),
            "window": self.window,
            "table_width": self.model.table_width,
            "filter_seen": self.filter_seen,
            "shard_set": dataclasses.replace(self.encoding.manifest, files={}, checks={}).as_dict(),
        }
        self.encoding.copy_to(folder)
        weights = {name: values.cpu().contiguous() for name, values in self.model.state_dict().items()}
        safetensors.torch.save_file(weights, folder / _WEIGHTS)
        safetensors.torch.save_file({_VECTORS: self.vectors_ID.cpu().contiguous()}, folder / _CATALOGUE)
        if self.model.neighbours is not None:
            write_atomic(folder / _NEIGHBOURS, self.model.neighbours.to_bytes())
        EXPORT.write(Store(folder), {**facts, "files": list_files(folder)})

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> Predictor:
        """Read and verify an export.

        Raises:
            UserError: there is none, it is of another version, or its weights are not of this code's model.
            CorruptError: a file is missing or damaged, or its catalogue is not what the model computes.
        """
        folder = Path(folder)
        facts = EXPORT.read(Store(folder))
        check_files(folder, facts["files"])
        encoding = Encoding(folder, Manifest.from_dict(facts["shard_set"]))
        try:
            shape = Shape(**facts["shape"])
            counted = Neighbours.from_bytes((folder / _NEIGHBOURS).read_bytes()) if shape.counted_events else None
            model = TwoPartModel(
                shape,
                encoding.manifest.fields,
                ItemStore(encoding.item_fields, encoding.item_arrays),
                encoding.manifest.has_clock,
                facts["table_width"],
                seed=0,
                neighbours=counted,
            )
            model.load_state_dict(safetensors.torch.load_file(folder / _WEIGHTS))
        except (RuntimeError, TypeError) as error:
            # The files are whole: this code builds another model than the one that wrote them.
            reason = str(error).splitlines()[-1].strip()
            what = f"weights of code {facts['code_version']} do not fit this code's model ({reason})"
            raise UserError(what, file=str(folder), fix="export the checkpoint again") from error
        vectors_ID = safetensors.torch.load_file(folder / _CATALOGUE, device=str(device))[_VECTORS]
        predictor = cls(model.to(device).eval(), vectors_ID, encoding, facts["window"], facts["filter_seen"])
        predictor.verify()
        return predictor

    @torch.no_grad()
    def verify(self) -> None:
        """Embed random items again and compare. Raises CorruptError where a vector is not the model's."""
        generator = torch.Generator().manual_seed(0)
        ids_R = torch.randperm(self.encoding.num_items, generator=generator)[:_COMPARED_ROWS].to(self.model.device)
        difference = float((self.model.embed_items(ids_R) - self.vectors_ID[ids_R]).abs().max())
        tolerance = _TOLERANCE[self.vectors_ID.dtype]
        # Written so that NaN fails.
        if not difference <= tolerance:
            raise CorruptError(
                f"the catalogue is not what the model computes: of {len(ids_R)} items, a component differs by "
                f"{difference:.2g} (allowed: {tolerance:g})"
            )

    def add_items(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Embed items that histories may hold beside the export's: their ids follow it. They are never recommended."""
        new_ND = self.model.embed_all(store=ItemStore(self.encoding.item_fields, arrays))
        self.vectors_ID = torch.cat([self.vectors_ID[: self.encoding.num_items], new_ND.to(self.vectors_ID.dtype)])

    @torch.no_grad()
    def top(self, shards: Shards, queries: QueryTable, k: int) -> Top:
        """The first k items of the catalogue for each query; `queries.filter_seen` takes out those of its history.

        Memory grows with the queries: k items and one vector each, and the items of their histories where filtered.
        Raises DivergedError where a score is not finite.
        """
        num_catalogue = self.encoding.num_catalogue
        check_k(k, num_catalogue)
        answers = answer(self.model, self.vectors_ID, shards, queries, self.window, num_catalogue)
        no_targets = Ragged(np.zeros(0, np.int32), np.zeros(len(queries) + 1, np.int64))
        ranked = rank_targets(answers.scores(), no_targets, num_catalogue, k, seen_items(shards, queries))
        return Top(ranked.top_Qk, ranked.top_score_Qk, answers.h_QD.cpu().numpy())
