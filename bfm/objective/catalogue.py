"""The frozen catalogue: the vectors of all items of one embedder, computed once and stored beside what identifies it.

Enters: a model and the hash of the fields its embedder reads. Leaves: a constant matrix [I, D] in float32 or bfloat16,
or a file of it (safetensors) that is refused under any other embedder or fields, and where a byte of it was altered.

Training keeps the matrix in memory and never imports safetensors, so that it needs torch, numpy and pyarrow only.

I = all items, cold ones included, D = retrieval width, R = rows compared by `verify`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import Tensor

from bfm.errors import CorruptError, UserError
from bfm.files import Store, sha256_bytes
from bfm.model.two_part import TwoPartModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VERSION = "1"
_TENSOR = "vectors"
# Largest difference of a component of a unit vector: rounding of the storage, and of matmuls on another device.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class FrozenCatalogue:
    """Item vectors that get no gradient."""

    vectors_ID: Tensor
    """A plain tensor: ZeRO-3 would shard a Parameter, and leave nothing of it outside the model's forward."""
    key: str
    """`embedder_hash` of what made the vectors."""

    @classmethod
    def embed(cls, model: TwoPartModel, fields_hash: str, dtype: torch.dtype = torch.float32) -> FrozenCatalogue:
        """Embed all items of the model's store, on its device. `dtype` is float32 or bfloat16."""
        return cls(model.embed_all().to(dtype), embedder_hash(model, fields_hash))

    def save(self, store: Store, name: str) -> None:
        """Publish the vectors under a name, whole or not at all."""
        import safetensors.torch

        vectors_ID = self.vectors_ID.detach().cpu().contiguous()
        facts = {"version": VERSION, "key": self.key, "sha256": _digest(vectors_ID)}
        store.put(name, safetensors.torch.save({_TENSOR: vectors_ID}, facts))

    @classmethod
    def load(
        cls, store: Store, name: str, key: str, shape: tuple[int, int], device: torch.device | str = "cpu"
    ) -> FrozenCatalogue:
        """Read vectors that `save` wrote.

        Args:
            store, name: where they stand.
            key: `embedder_hash` of the model that is to use them.
            shape: (I, D) that this model has.
            device: where they are wanted.

        Raises:
            UserError: there is no such file, or it is of another model, of other fields or another version.
            CorruptError: truncated or altered.
        """
        where = f"{store.uri}/{name}"
        try:
            data = store.get(name)
        except FileNotFoundError:
            raise UserError("there is no catalogue here", file=where, fix="embed and save it first") from None
        facts, vectors_ID = _parse(data, where)
        if facts.get("version") != VERSION:
            raise UserError(f"catalogue of version {facts.get('version')}, this code reads {VERSION}", file=where)
        if facts["key"] != key:
            raise UserError(
                "the catalogue is of another model: its embedder or its item fields differ",
                file=where,
                fix="embed the catalogue again with this model",
            )
        if _digest(vectors_ID) != facts["sha256"]:
            raise CorruptError(f"{where}: altered (its sha256 does not match)")
        if tuple(vectors_ID.shape) != shape or vectors_ID.dtype not in _TOLERANCE:
            found = f"{tuple(vectors_ID.shape)} {vectors_ID.dtype}"
            raise CorruptError(f"{where}: holds {found}, not {shape} in one of {', '.join(DTYPES)}")
        return cls(vectors_ID.to(device), key)

    @torch.no_grad()
    def verify(self, model: TwoPartModel, rows: int = 1000, seed: int = 0) -> None:
        """Embed `rows` random items again and compare. Raises CorruptError where a vector is not the model's."""
        num_items = len(self.vectors_ID)
        if num_items != model.item_store.num_items:
            raise CorruptError(f"the catalogue has {num_items} items, the model {model.item_store.num_items}")
        generator = torch.Generator().manual_seed(seed)
        ids_R = torch.randperm(num_items, generator=generator)[:rows].to(model.device)
        difference = (model.embed_items(ids_R) - self.vectors_ID[ids_R.to(self.vectors_ID.device)]).abs().max()
        tolerance = _TOLERANCE[self.vectors_ID.dtype]
        # Written so that NaN fails.
        if not difference <= tolerance:
            raise CorruptError(
                f"the catalogue is not what the model computes: of {len(ids_R)} items, a component differs by "
                f"{float(difference):.2g} (allowed: {tolerance:g})"
            )


def embedder_hash(model: TwoPartModel, fields_hash: str) -> str:
    """Identity of the frozen catalogue: weights of the embedder and what it reads."""
    parameters = dict(model.named_parameters())
    digests = [fields_hash]
    for name in sorted(model.embedder_parameter_names()):
        digests.append(name)
        digests.append(sha256_bytes(parameters[name].detach().cpu().contiguous().numpy().tobytes()))
    return sha256_bytes("\n".join(digests).encode())


def _digest(vectors_ID: Tensor) -> str:
    # numpy has no bfloat16: the bytes are read as integers.
    return hashlib.sha256(vectors_ID.view(torch.uint8).numpy().data).hexdigest()


def _parse(data: bytes, where: str) -> tuple[dict[str, str], Tensor]:
    """Metadata and vectors of a safetensors file: 8 bytes with the header's length, the header as JSON, the tensor."""
    import safetensors.torch

    try:
        vectors_ID = safetensors.torch.load(data)[_TENSOR]
        facts = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        return {**facts, "key": facts["key"], "sha256": facts["sha256"]}, vectors_ID
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CorruptError(f"{where}: truncated, or not a catalogue ({' '.join(str(error).split())})") from error
