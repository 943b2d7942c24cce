"""The frozen catalogue: the vectors of all items of one embedder, stored beside what identifies it."""

from __future__ import annotations

from bfm.files import sha256_bytes
from bfm.model.two_part import TwoPartModel


def embedder_hash(model: TwoPartModel, fields_hash: str) -> str:
    """Identity of the frozen catalogue: weights of the embedder and what it reads."""
    parameters = dict(model.named_parameters())
    digests = [fields_hash]
    for name in sorted(model.embedder_parameter_names()):
        digests.append(name)
        digests.append(sha256_bytes(parameters[name].detach().cpu().contiguous().numpy().tobytes()))
    return sha256_bytes("\n".join(digests).encode())
